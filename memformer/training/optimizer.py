"""Optimizer of a run: AdamW or Muon, weight-decay mask, learning rates by group, clipping, schedules, EMA."""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from memformer.core.checks import check_number
from memformer.core.patterns import match_names
from memformer.layers.lora import is_lora

__all__ = [
    "OPTIMIZERS",
    "check_rate_factors",
    "decay_mask",
    "frozen_names",
    "make_optimizer",
    "make_schedule",
    "parse_rate_factors",
    "update_ema",
]

# Words in the names of parameters without weight decay. The rule is by name and not by rank, so that stacking the
# parameters of scanned layers changes nothing. Of a path such as "blocks.0.norm.scale" the last part counts.
NO_DECAY = frozenset(
    {
        "bias",
        # of norms
        "scale",
        # decay rates, step sizes and gates of memories
        "rate",
        "decay",
        "log",
        "dt",
        "gamma",
        # weight of a skip connection
        "skip",
        # the vector that scores additive attention
        "score",
        # learned initial states
        "initial",
    }
)


def make_schedule(options: Mapping[str, Any], steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Returns the learning rate as a function of the step (counted from 0); `options` is the `optimizer` section.

    - constant: lr
    - cosine: linear warm-up, then a cosine to end_factor lr at the last of `steps`
    - warmup_stable_decay: warm-up, lr, then linear to end_factor lr over the last decay_fraction of `steps`
    - rsqrt: lr min(1, sqrt(warmup_steps / step)) after the warm-up
    - exponential: lr step_factor^floor(step / step_every)
    All start with `warmup_steps` of linear warm-up, if any.

    Example:
      >>> options = {"learning_rate": 1.0, "schedule": "exponential", "warmup_steps": 0,
      ...            "step_factor": 0.5, "step_every": 10}
      >>> float(make_schedule(options, 100)(25))
      0.25
    """
    rate, name, warmup = options["learning_rate"], options["schedule"], options["warmup_steps"]
    after = max(steps - warmup, 1)
    if name == "constant":
        body = optax.constant_schedule(rate)
    elif name == "exponential":
        body = optax.exponential_decay(rate, options["step_every"], options["step_factor"], staircase=True)
    elif name == "cosine":
        body = optax.cosine_decay_schedule(rate, after, options["end_factor"])
    elif name == "warmup_stable_decay":
        falling = max(int(steps * options["decay_fraction"]), 1)
        fall = optax.linear_schedule(rate, rate * options["end_factor"], falling)
        body = optax.join_schedules([optax.constant_schedule(rate), fall], [max(after - falling, 0)])
    elif name == "rsqrt":
        base = max(warmup, 1)

        def body(count: jax.typing.ArrayLike) -> jax.Array:
            return rate * jnp.sqrt(base / (jnp.asarray(count, jnp.float32) + base))
    else:
        raise ValueError(f"optimizer.schedule {name!r} is not known")
    if warmup:
        body = optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), body], [warmup])
    return _promoting(body)


def _promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an optax function with standard dtype promotion, which optax relies on, under stricter settings too."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return call


def decay_mask(params: Mapping[str, jax.Array]) -> dict[str, bool]:
    """True for the parameters that weight decay applies to: those without a word of `NO_DECAY` in their name.

    Example:
      >>> decay_mask({"layers.0.norm.scale": jnp.ones(4), "head.kernel": jnp.ones((4, 4))})
      {'layers.0.norm.scale': False, 'head.kernel': True}
    """
    return {name: NO_DECAY.isdisjoint(name.rpartition(".")[2].lower().split("_")) for name in params}


def parse_rate_factors(text: str) -> dict[str, float]:
    """Reads `optimizer.rate_factors`: words of parameter paths, each with the factor of its learning rate.

    Raises:
      ValueError: another form, or a factor that is not a finite number of at least 0.

    Example:
      >>> parse_rate_factors("embedding:0.5, decay:0.1")
      {'embedding': 0.5, 'decay': 0.1}
    """
    factors = {}
    for part in text.split(","):
        word, colon, factor = (piece.strip() for piece in part.partition(":"))
        if not part.strip():
            continue
        try:
            number = float(factor)
        except ValueError:
            number = math.nan
        if not word or not colon or math.isnan(number):
            raise ValueError(
                f"optimizer.rate_factors must be such as 'embedding:0.5, decay:0.1', got {part.strip()!r} in {text!r}"
            )
        factors[word] = check_number("optimizer.rate_factors", number, at_least=0)
    return factors


def _factor_of(name: str, factors: Mapping[str, float]) -> float:
    """The factor of the first word that is a part of a path such as "blocks.0.memory.decay.rate"."""
    parts = name.split(".")
    return next((factor for word, factor in factors.items() if word in parts), 1.0)


def check_rate_factors(options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError for a word of `optimizer.rate_factors` that is in no parameter's path."""
    words = {part for name in names for part in name.split(".") if not part.isdecimal()}
    for word in parse_rate_factors(options["rate_factors"]):
        if word not in words:
            raise ValueError(
                f"optimizer.rate_factors names {word!r}, which is in no parameter's path; the paths are made of "
                f"{', '.join(sorted(words))}"
            )


def frozen_names(config: Mapping[str, Any], names: Collection[str]) -> frozenset[str]:
    """The parameters that a run does not train: those of `optimizer.freeze`, and with `lora` all but its own.

    Args:
      config: with the sections lora and optimizer.
      names: paths of the parameters.

    Raises:
      ValueError: a pattern that is found in no path, or nothing left to train.

    Example:
      >>> config = {"lora": {"rank": 0}, "optimizer": {"freeze": "norm"}}
      >>> frozen_names(config, ("norm.scale", "head.kernel"))
      frozenset({'norm.scale'})
    """
    frozen = set(match_names("optimizer.freeze", config["optimizer"]["freeze"], names))
    if config["lora"]["rank"]:
        frozen.update(name for name in names if not is_lora(name))
    if frozen.issuperset(names):
        raise ValueError(f"optimizer.freeze must leave parameters to train, got {config['optimizer']['freeze']!r}")
    return frozenset(frozen)


def _scale_groups(factors: Mapping[str, float]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: {n: update * _factor_of(n, factors) for n, update in updates.items()})


def _adamw(options: Mapping[str, Any], schedule: Callable[..., Any]) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=options["b1"],
        b2=options["b2"],
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        mask=decay_mask,
    )


def _muon(options: Mapping[str, Any], schedule: Callable[..., Any]) -> optax.GradientTransformation:
    """Muon for the matrices inside a model, AdamW for embeddings, head, convolutions and vectors."""
    muon = optax.contrib.muon(
        schedule,
        beta=options["momentum"],
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        # updates as large as AdamW's, so that learning rates carry over
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrix_axes,
    )
    return optax.partition({True: muon, False: _adamw(options, schedule)}, _is_matrix)


def _is_matrix(params: Mapping[str, Any]) -> dict[str, bool]:
    return {
        # inside of the partition the other parameters are masked, and have no rank
        name: name.endswith(".kernel") and name != "head.kernel" and getattr(x, "ndim", 0) > 1
        for name, x in params.items()
    }


def _matrix_axes(params: Mapping[str, Any]) -> dict[str, Any]:
    """Axes of the matrix that each parameter is, or stacks over layers or experts."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return {name: axes if matrix else None for name, matrix in _is_matrix(params).items()}


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def make_optimizer(
    options: Mapping[str, Any], steps: int
) -> tuple[optax.GradientTransformation, Callable[[jax.typing.ArrayLike], jax.Array]]:
    """Returns the gradient transformation of the `optimizer` section, and its learning-rate schedule.

    Source: AdamW, Loshchilov and Hutter, 2019 (https://arxiv.org/abs/1711.05101), algorithm 2; Muon, Jordan et al.,
    2024, with the scale of Liu et al., 2025 (https://arxiv.org/abs/2502.16982), section 2.2.
    """
    schedule = make_schedule(options, steps)
    rule = OPTIMIZERS[options["name"]](options, schedule)
    clip = optax.clip_by_global_norm(options["clip_norm"]) if options["clip_norm"] else optax.identity()
    factors = parse_rate_factors(options["rate_factors"])
    tx = optax.chain(clip, rule, *([_scale_groups(factors)] if factors else []))
    return optax.GradientTransformation(tx.init, _promoting(tx.update)), schedule


def update_ema(ema: dict[str, jax.Array], params: dict[str, jax.Array], decay: float, step: jax.Array) -> dict:
    """ema <- d ema + (1 - d) params with d = min(decay, (1 + step) / (10 + step)), in float32.

    The smaller early d keeps the initial parameters from dominating the average.
    """
    count = step.astype(jnp.float32)
    d = jnp.minimum(jnp.float32(decay), (1 + count) / (10 + count))
    return {name: d * ema[name] + (1 - d) * value.astype(jnp.float32) for name, value in params.items()}
