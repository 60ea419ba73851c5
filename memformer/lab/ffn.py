"""The feedforward layer read as a memory: keys are the rows of W1, values those of W2, the kernel is the activation.

    f(x) = sum_i a_i(x) w2_i        mlp: a_i = act(k_i . x)        swiglu: a_i = silu(g_i . x) (k_i . x)
                                    moe: the same, times the router's weight of the expert that holds i

Asked in the direction of a key, at the length r = sqrt(d) of a normalised input, 1 / SNR for N i.i.d. Gaussian keys is
N E[a_j^2] / a_i^2 (MATH as in lab snr): N / 2d for relu, and for gelu and silu once r |k| is large. A gate makes the
kernel a product: asked in the direction of g_i + k_i it is about 2 N / d^2.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memformer.core.numerics import l2norm
from memformer.core.types import Array
from memformer.lab.inside import block_inputs, initial_model, test_batch
from memformer.lab.runs import run_rows, train_runs
from memformer.lab.study import Study, new_figure
from memformer.layers.feedforward import ACTIVATIONS, MLP, MixtureOfExperts, SwiGLU
from memformer.training.evaluation import LoadedRun
from memformer.training.plots import COLOURS

__all__ = ["Dropped", "Pairs", "inverse_snr", "measure", "overlap", "read_pairs"]

TABLE: Mapping[str, Mapping[str, Any]] = {
    **{
        name: {"model.feedforward": "mlp", "model.feedforward_options": {"activation": name}}
        for name in ("relu", "gelu", "silu")
    },
    "swiglu": {"model.feedforward": "swiglu"},
    "moe": {"model.feedforward": "moe", "model.feedforward_options": {"experts": 4, "active": 2}},
}
BASE: Mapping[str, Any] = {
    "task": {"name": "text", "length": 128, "folder": "", "suffix": ".py"},
    "model.memory": "softmax_attention",
    "model.width": 64,
    "model.depth": 2,
    "model.heads": 2,
    "optimizer.learning_rate": 4e-3,
    "optimizer.warmup_steps": 30,
    "train.batch_size": 16,
    "train.steps": 300,
    "train.log_every": 50,
    "train.eval_batches": 4,
    "train.final_batches": 8,
}
SMALLER: Mapping[str, Any] = {
    "task.length": 32,
    "model.width": 32,
    "model.depth": 1,
    "train.batch_size": 8,
    "train.steps": 20,
    "train.log_every": 20,
    "train.final_batches": 1,
}
RANDOM_SEEDS = 5


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A feedforward layer as pairs.

    Attributes:
      keys: [N, D]; of a gated layer the gate's, which decide whether a pair answers.
      factors: [N, D], the linear factor of a gated layer; None without a gate.
      values: [N, D].
      activation: of the product with the keys.
    """

    keys: np.ndarray
    factors: np.ndarray | None
    values: np.ndarray
    activation: str

    def answers(self, x: np.ndarray) -> np.ndarray:
        """a_i(x) without a router, [M, N] of x [M, D]."""
        answered = np.asarray(ACTIVATIONS[self.activation](jnp.asarray(x @ self.keys.T)))
        return answered if self.factors is None else answered * (x @ self.factors.T)


def read_pairs(layer: Any) -> Pairs:
    """The pairs that a feedforward layer holds; those of all experts of a mixture.

    Example:
      >>> from memformer.layers.basic import Dtypes
      >>> pairs = read_pairs(SwiGLU(4, hidden=8, dtypes=Dtypes(), rngs=nnx.Rngs(0)))
      >>> pairs.keys.shape, pairs.factors.shape, pairs.values.shape
      ((8, 4), (8, 4), (8, 4))
    """

    def rows(weights: Any) -> np.ndarray:
        """Pairs before width, of experts in their order."""
        found = np.asarray(weights[...])
        return np.moveaxis(found, -1, -2).reshape(-1, found.shape[-2])

    if isinstance(layer, MixtureOfExperts):
        down = np.asarray(layer.down[...])
        return Pairs(rows(layer.gate), rows(layer.up), down.reshape(-1, down.shape[-1]), "silu")
    down = np.asarray(layer.down.kernel[...])
    if isinstance(layer, SwiGLU):
        return Pairs(rows(layer.gate.kernel), rows(layer.up.kernel), down, "silu")
    return Pairs(rows(layer.up.kernel), None, down, layer.activation)


def _coefficients(layer: Any, x: Array) -> Array:
    """a_i(x) [..., N] as the layer has them, with the router's weights."""
    if isinstance(layer, MLP):
        return ACTIVATIONS[layer.activation](layer.up(x))
    if isinstance(layer, SwiGLU):
        return jax.nn.silu(layer.gate(x)) * layer.up(x)
    probability = jax.nn.softmax(layer.router(x), axis=-1)
    least = jax.lax.top_k(probability, layer.active)[0][..., -1:]
    chosen = jnp.where(probability >= least, probability, jnp.zeros_like(probability))
    weight = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, layer.gate[...])) * jnp.einsum("btd,edf->btef", x, layer.up[...])
    return (h * weight[..., None]).reshape(*x.shape[:-1], -1)


def _values(layer: Any) -> Array:
    down = layer.down[...] if isinstance(layer, MixtureOfExperts) else layer.down.kernel[...]
    return down.reshape(-1, down.shape[-1])


class Dropped(nnx.Module):
    """A feedforward layer that does without some of its pairs at each token.

    Args:
      layer: the layer.
      count: pairs that do not answer.
      seed: None drops those that contribute most, |a_i(x)| |w2_i|; a number draws them from all pairs.

    Example:
      >>> from memformer.layers.basic import Dtypes
      >>> layer, x = MLP(4, hidden=8, dtypes=Dtypes(), rngs=nnx.Rngs(0)), jnp.ones((1, 2, 4))
      >>> bool(jnp.allclose(Dropped(layer, 0)(x)[0], layer(x)[0], atol=1e-6)), Dropped(layer, 8)(x)[0].sum().item()
      (True, 0.0)
    """

    def __init__(self, layer: Any, count: int, seed: int | None = None):
        self.layer = layer
        # variables, so that one program serves every count and seed; -1 is no seed
        self.count, self.seed = nnx.Variable(jnp.int32(count)), nnx.Variable(jnp.int32(-1 if seed is None else seed))

    def __call__(self, x: Array, valid: Array | None = None) -> tuple[Array, dict]:
        """Returns (y, {}), as the layers do."""
        answered, values = _coefficients(self.layer, x), _values(self.layer)
        count, seed = self.count[...], self.seed[...]
        loud = jnp.abs(answered) * jnp.linalg.norm(values, axis=1)[None, None]
        rank = jnp.where(seed < 0, loud, jax.random.uniform(jax.random.key(seed), answered.shape))
        least = jnp.take(jnp.sort(rank, axis=-1), answered.shape[-1] - jnp.maximum(count, 1), axis=-1)[..., None]
        answered = jnp.where((rank >= least) & (count > 0), jnp.zeros_like(answered), answered)
        return answered @ values, {}


def inverse_snr(pairs: Pairs) -> np.ndarray:
    """1 / SNR of each pair asked by its own key at length sqrt(d), [N].

    Example:
      >>> eye = np.eye(4, dtype=np.float32)
      >>> inverse_snr(Pairs(eye, None, eye, "relu")).tolist()
      [0.0, 0.0, 0.0, 0.0]
    """
    asked = pairs.keys
    if pairs.factors is not None:
        asked = np.asarray(l2norm(jnp.asarray(pairs.keys))) + np.asarray(l2norm(jnp.asarray(pairs.factors)))
    asked = np.asarray(l2norm(jnp.asarray(asked))) * np.float32(math.sqrt(pairs.keys.shape[1]))
    answers = pairs.answers(asked)
    own = np.diag(answers)[:, None] * pairs.values
    return np.sum((answers @ pairs.values - own) ** 2, axis=1) / np.sum(own**2, axis=1)


def overlap(rows: np.ndarray) -> tuple[float, float]:
    """Root mean square cosine of two rows, and the median over rows of the largest |cosine| with another.

    Example:
      >>> overlap(np.eye(3))
      (0.0, 0.0)
    """
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = np.abs(unit @ unit.T) * (1 - np.eye(len(rows)))
    return float(np.sqrt(np.sum(cosines**2) / (len(rows) * (len(rows) - 1)))), float(np.median(cosines.max(axis=1)))


def _theory(pairs: Pairs) -> float:
    count, width = pairs.keys.shape
    return count / (2 * width) if pairs.factors is None else 2 * count / width**2


def _gaussian(pairs: Pairs, seed: int) -> Pairs:
    """As many pairs with i.i.d. keys of unit entries."""
    rng = np.random.default_rng(seed)

    def draw(like: np.ndarray) -> np.ndarray:
        return rng.standard_normal(like.shape, np.float32)

    factors = None if pairs.factors is None else draw(pairs.factors)
    return Pairs(draw(pairs.keys), factors, draw(pairs.values), pairs.activation)


def measure(study: Study, *, quick: bool) -> None:
    """Trains small language models with each kind of feedforward layer, and reads the layers."""
    table = {name: TABLE[name] for name in (("swiglu",) if quick else TABLE)}
    runs = train_runs(study, table, base=BASE, quick=quick, smaller=SMALLER)
    counts = (1, 8) if quick else (1, 4, 16, 64)
    study.claim = (
        "A feedforward layer is a memory of as many pairs as it has hidden units: its keys interfere as 1/SNR = N/2d "
        "for relu, a gate makes the kernel quadratic (2N/d^2), and a token is answered by few pairs, so that dropping "
        "the strongest one changes the output far more than dropping one at random (MATH of 2505.19488, section 2; "
        "2012.14913)."
    )
    rows, drops = [], {}
    for name, run in runs.items():
        rows += _layer_rows(name, run)
        drops[name] = _drop(name, run, counts, quick)
    study.add_table("Pairs of each layer, before and after training", rows)
    draws = 2 if quick else RANDOM_SEEDS
    study.add_table(
        f"Dropping k pairs at each token in every layer: change of the first layer's output |df| / |f|, and bits per "
        f"byte of test files (random: mean of {draws} draws)",
        [row for found in drops.values() for row in found],
    )
    study.add_table("Models of bytes of Python's standard library, trained here", run_rows(runs))
    study.outcome = _outcome(rows, drops)
    study.values = {"width": runs["swiglu"].config["model"]["width"], "counts": counts}
    _draw(study, rows, drops)


def _layer_rows(name: str, run: LoadedRun) -> list[dict[str, Any]]:
    trained: Any = run.module()
    start = initial_model(run)
    read = block_inputs(trained, test_batch(run, run.config["train"]["batch_size"])["inputs"])
    rows = []
    for place, (before, after) in enumerate(zip(start.blocks, trained.blocks, strict=True)):
        old, new = read_pairs(before.feedforward), read_pairs(after.feedforward)
        gaussian = [float(np.median(inverse_snr(_gaussian(new, seed)))) for seed in range(4)]
        used = _in_use(after.feedforward, read[place].feedforward)
        rows.append(
            {
                "layer": f"{name} {place + 1}",
                "N": len(new.keys),
                "d": new.keys.shape[1],
                "theory 1/SNR": float(f"{_theory(new):.3g}"),
                "Gaussian keys": float(f"{np.median(gaussian):.3g}"),
                "at the start": float(f"{np.median(inverse_snr(old)):.3g}"),
                "trained": float(f"{np.median(inverse_snr(new)):.3g}"),
                "rms cosine of keys (1/sqrt d)": f"{overlap(new.keys)[0]:.3f} ({new.keys.shape[1] ** -0.5:.3f})",
                "largest cosine, start": round(overlap(old.keys)[1], 3),
                "largest cosine, trained": round(overlap(new.keys)[1], 3),
                **used,
            }
        )
    return rows


def _in_use(layer: Any, x: Array) -> dict[str, Any]:
    """How many pairs answer a token, and how loud the first is."""
    answered, values = _coefficients(layer, x), _values(layer)
    size = np.asarray(jnp.abs(answered) * jnp.linalg.norm(values, axis=1)[None, None]).reshape(-1, values.shape[0])
    whole = np.asarray(answered @ values).reshape(-1, values.shape[1])
    top = size.argmax(axis=1)
    first = np.take_along_axis(np.asarray(answered).reshape(size.shape), top[:, None], 1) * np.asarray(values)[top]
    rest = np.sum((whole - first) ** 2, axis=1) / np.sum(first**2, axis=1)
    return {
        "pairs that answer a token": round(float(np.median(size.sum(1) ** 2 / np.sum(size**2, axis=1))), 1),
        "rest / loudest pair, power": float(f"{np.median(rest):.3g}"),
    }


def _drop(name: str, run: LoadedRun, counts: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    """Rows of one model: what is lost with the k loudest pairs, and with k at random."""
    batch = test_batch(run, 8 if quick else 24)
    whole = _bits(run, batch, 0, None)
    model: Any = run.module()
    layer, x = model.blocks[0].feedforward, block_inputs(model, batch["inputs"])[0].feedforward
    rows = []
    for count in counts:
        seeds = range(2 if quick else RANDOM_SEEDS)
        top = _change(layer, x, count, None)
        chance = [_change(layer, x, count, seed) for seed in seeds]
        rows.append(
            {
                "model": name,
                "k": count,
                "loudest: change": round(top, 3),
                "random: change": round(float(np.mean(chance)), 3),
                "bits per byte, all pairs": round(whole, 3),
                "without the loudest": round(_bits(run, batch, count, None), 3),
                "without random ones": round(float(np.mean([_bits(run, batch, count, s) for s in seeds])), 3),
            }
        )
    return rows


def _change(layer: Any, x: Array, count: int, seed: int | None) -> float:
    """Median over tokens of |f without those pairs - f| / |f|."""
    whole = layer(x)[0]
    changed = _call(*nnx.split(Dropped(layer, count, seed)), x) - whole
    return float(jnp.median(jnp.linalg.norm(changed, axis=-1) / jnp.linalg.norm(whole, axis=-1)))


@functools.partial(jax.jit, static_argnums=0)
def _call(graph: Any, params: Any, x: Array) -> Array:
    return nnx.merge(graph, params)(x)[0]


def _bits(run: LoadedRun, batch: Mapping[str, np.ndarray], count: int, seed: int | None) -> float:
    """Bits per byte with those pairs dropped in every layer."""
    model: Any = run.module()
    for block in model.blocks:
        block.feedforward = Dropped(block.feedforward, count, seed)
    graph, params = nnx.split(model)
    return float(_loss(graph, params, *(batch[name] for name in ("inputs", "targets", "loss_weights")))) / math.log(2)


@functools.partial(jax.jit, static_argnums=0)
def _loss(graph: Any, params: Any, inputs: Array, targets: Array, weights: Array) -> Array:
    spoken = jax.nn.log_softmax(nnx.merge(graph, params)(inputs).logits)
    picked = jnp.take_along_axis(spoken, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weights) / jnp.sum(weights)


def _outcome(rows: list[dict], drops: dict) -> str:
    snr = "; ".join(
        f"{row['layer']} {row['trained']:.3g} (start {row['at the start']:.3g}, theory {row['theory 1/SNR']:.3g})"
        for row in rows
    )
    lost = "; ".join(
        f"{name} {found[0]['loudest: change']:.0%} against {found[0]['random: change']:.1%}, "
        f"{found[0]['without the loudest'] - found[0]['bits per byte, all pairs']:+.3f} against "
        f"{found[0]['without random ones'] - found[0]['bits per byte, all pairs']:+.3f} bits per byte"
        for name, found in drops.items()
    )
    noisier = [row["layer"] for row in rows if row["trained"] > 2 * row["theory 1/SNR"]]
    against = (
        f" Not as theory has it: {', '.join(noisier)} are more than twice as noisy, their keys are no longer i.i.d."
    )
    return (
        f"1/SNR of trained keys: {snr}."
        + (against if noisier else "")
        + f" Without the loudest pair, against one at random: {lost}."
    )


def _draw(study: Study, rows: list[dict], drops: dict) -> None:
    figure, axes = new_figure(1, 2, width=10.0, height=4.0)
    left, right = axes[0]
    places = np.arange(len(rows))
    for colour, mark, column in zip(COLOURS, "s^o", ("theory 1/SNR", "at the start", "trained"), strict=False):
        left.plot(places, [row[column] for row in rows], mark, color=colour, label=column, markersize=6)
    left.set_yscale("log")
    left.set_xticks(places, [row["layer"] for row in rows], rotation=45, ha="right")
    left.set_ylabel("1 / SNR of a key asked for (noise over signal)")
    left.legend(frameon=False, fontsize="small")
    for colour, (name, found) in zip(COLOURS, drops.items(), strict=False):
        counts = [row["k"] for row in found]
        for column, style in (("without the loudest", "o-"), ("without random ones", "s:")):
            gain = [max(row[column] - row["bits per byte, all pairs"], 1e-4) for row in found]
            label = name if style == "o-" else None
            right.plot(counts, gain, style, color=colour, label=label, markersize=4)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("pairs dropped at each token and layer, k")
    right.set_ylabel("bits per byte lost (below 1e-4: at 1e-4)")
    right.set_title("loudest (lines), random (dotted)")
    right.legend(frameon=False, fontsize="small")
    study.save_figure(
        figure,
        "pairs",
        "Left: noise over signal of each layer's keys, median over pairs. Right: bits per byte lost by dropping k "
        "pairs at every token. Claim: keys interfere as theory says, a token is answered by few pairs, so the loudest "
        "are worth far more than random ones.",
    )
