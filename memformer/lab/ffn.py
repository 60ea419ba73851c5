"""The feedforward layer as a memory: keys are the rows of W1, values those of W2, the similarity is the activation.

    f(x) = sum_i a_i(x) w2_i        mlp: a_i = act(k_i . x)        swiglu: a_i = silu(g_i . x) (k_i . x)
                                    moe: the same, times the router's weight of the expert of i

Queried in the direction of a key, at the length r = sqrt(d) of a normalised input, 1 / SNR for N i.i.d. Gaussian keys
is N E[a_j^2] / a_i^2 (see `snr`): N / 2d for relu, and for gelu and silu once r |k| is large. A gate makes the
similarity a product: queried in the direction of g_i + k_i it is about 2 N / d^2.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memformer.core.numerics import l2norm
from memformer.core.types import Array
from memformer.lab.inside import block_inputs, initial_model, test_batch
from memformer.lab.plots import draw_lines, line_style, new_figure
from memformer.lab.runs import measure_seeds
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade, numbers_in, percent
from memformer.layers.feedforward import ACTIVATIONS, MLP, MixtureOfExperts, SwiGLU
from memformer.training.evaluation import LoadedRun

__all__ = ["BASE", "Dropped", "FFN", "Pairs", "inverse_snr", "overlap", "read_pairs"]

ROWS: Mapping[str, Row] = {
    **{
        name: {"model.feedforward": "mlp", "model.feedforward_options": {"activation": name}}
        for name in ("relu", "gelu", "silu")
    },
    "swiglu": {"model.feedforward": "swiglu"},
    "moe": {"model.feedforward": "moe", "model.feedforward_options": {"experts": 4, "active": 2}},
}
BASE: Row = {
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
# What the claim needs, stated before the runs, in every layer or model of every seed: dropping the largest pair changes
# the output this many times as much as a random one, and trained keys interfere less than so many times as in theory.
FEW, NEAR = 5, 2
GATED = ("swiglu", "moe")
SMALLER: Row = {
    "task.length": 32,
    "model.width": 32,
    "model.depth": 1,
    "train.batch_size": 8,
    "train.steps": 20,
    "train.log_every": 20,
    "train.final_batches": 1,
}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A feedforward layer as pairs.

    Attributes:
      keys: [N, D]; of a gated layer those of the gate.
      factors: [N, D], the linear factor of a gated layer; None without a gate.
      values: [N, D].
      activation: applied to the product with the keys.
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
    """The pairs of a feedforward layer; those of all experts of a mixture.

    Example:
      >>> from memformer.layers.basic import Dtypes
      >>> pairs = read_pairs(SwiGLU(4, hidden=8, dtypes=Dtypes(), rngs=nnx.Rngs(0)))
      >>> pairs.keys.shape, pairs.factors.shape, pairs.values.shape
      ((8, 4), (8, 4), (8, 4))
    """

    def rows(weights: Any) -> np.ndarray:
        """[pairs, width], experts in order."""
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
    """a_i(x) [..., N] of the layer, with the router's weights."""
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
    """A feedforward layer with some of its pairs dropped at each token.

    Args:
      layer: the layer.
      count: number of pairs dropped.
      seed: None drops those that contribute most, |a_i(x)| |w2_i|; with a seed they are drawn at random.

    Example:
      >>> from memformer.layers.basic import Dtypes
      >>> layer, x = MLP(4, hidden=8, dtypes=Dtypes(), rngs=nnx.Rngs(0)), jnp.ones((1, 2, 4))
      >>> Dropped(layer, 3)(x)[0].shape
      (1, 2, 4)
    """

    def __init__(self, layer: Any, count: int, seed: int | None = None):
        self.layer = layer
        # variables, so that one program serves every count and seed; -1 is no seed
        self.count, self.seed = nnx.Variable(jnp.int32(count)), nnx.Variable(jnp.int32(-1 if seed is None else seed))

    def __call__(self, x: Array, valid: Array | None = None) -> tuple[Array, dict]:
        """Returns (y, {}), as feedforward layers do."""
        answered, values = _coefficients(self.layer, x), _values(self.layer)
        count, seed = self.count[...], self.seed[...]
        size = jnp.abs(answered) * jnp.linalg.norm(values, axis=1)[None, None]
        rank = jnp.where(seed < 0, size, jax.random.uniform(jax.random.key(seed), answered.shape))
        least = jnp.take(jnp.sort(rank, axis=-1), answered.shape[-1] - jnp.maximum(count, 1), axis=-1)[..., None]
        answered = jnp.where((rank >= least) & (count > 0), jnp.zeros_like(answered), answered)
        return answered @ values, {}


def inverse_snr(pairs: Pairs) -> np.ndarray:
    """1 / SNR of each pair queried by its own key at length sqrt(d), [N].

    Example:
      >>> eye = np.eye(4, dtype=np.float32)
      >>> inverse_snr(Pairs(eye, None, eye, "relu")).tolist()
      [0.0, 0.0, 0.0, 0.0]
    """
    queries = pairs.keys
    if pairs.factors is not None:
        queries = np.asarray(l2norm(jnp.asarray(pairs.keys))) + np.asarray(l2norm(jnp.asarray(pairs.factors)))
    queries = np.asarray(l2norm(jnp.asarray(queries))) * np.float32(math.sqrt(pairs.keys.shape[1]))
    answers = pairs.answers(queries)
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


@measure_seeds
def _measure(runs: Runs, settings: Settings) -> Result:
    layers = [row for name, run in runs.items() for row in _layer_rows(name, run)]
    drops = [row for name, run in runs.items() for row in _drop(name, run, settings)]
    title = (
        f"Dropping k pairs per token in every layer: change of the first layer's output |df| / |f|, and bits per byte "
        f"of test files (random: mean of {settings['draws']} draws)"
    )
    lost: dict[str, dict[str, dict[str, float]]] = {}
    for row in drops:
        for name in ("largest", "random"):
            text = f"without {'the largest' if name == 'largest' else 'random ones'}"
            bits = row[text] - row["bits per byte, all pairs"]
            lost.setdefault(row["model"], {}).setdefault(name, {})[str(row["k"])] = round(bits, 4)
    values = {
        "trained / theory": {row["layer"]: row["trained"] / row["theory 1/SNR"] for row in layers},
        "change": {
            row["model"]: {n: row[f"change, {n}"] for n in lost[row["model"]]} for row in drops if row["k"] == 1
        },
        "bits lost": lost,
    }
    return Result([Table("Pairs of each layer, before and after training", layers), Table(title, drops)], values)


def _layer_rows(name: str, run: LoadedRun) -> list[Row]:
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
                "1/sqrt d": round(new.keys.shape[1] ** -0.5, 3),
                "rms cosine of keys": round(overlap(new.keys)[0], 3),
                "largest cosine, start": round(overlap(old.keys)[1], 3),
                "largest cosine, trained": round(overlap(new.keys)[1], 3),
                **used,
            }
        )
    return rows


def _in_use(layer: Any, x: Array) -> Row:
    """The number of pairs that answer a token, and the power of the others relative to the largest."""
    answered, values = _coefficients(layer, x), _values(layer)
    size = np.asarray(jnp.abs(answered) * jnp.linalg.norm(values, axis=1)[None, None]).reshape(-1, values.shape[0])
    whole = np.asarray(answered @ values).reshape(-1, values.shape[1])
    top = size.argmax(axis=1)
    first = np.take_along_axis(np.asarray(answered).reshape(size.shape), top[:, None], 1) * np.asarray(values)[top]
    rest = np.sum((whole - first) ** 2, axis=1) / np.sum(first**2, axis=1)
    return {
        "active pairs per token": round(float(np.median(size.sum(1) ** 2 / np.sum(size**2, axis=1))), 1),
        "power, rest / largest pair": float(f"{np.median(rest):.3g}"),
    }


def _drop(name: str, run: LoadedRun, settings: Settings) -> list[Row]:
    """Rows of one model: the loss without the k largest pairs, and without k at random."""
    batch = test_batch(run, settings["examples"])
    whole = _bits(run, batch, 0, None)
    model: Any = run.module()
    layer, x = model.blocks[0].feedforward, block_inputs(model, batch["inputs"])[0].feedforward
    rows = []
    for count in settings["counts"]:
        seeds = range(settings["draws"])
        top = _change(layer, x, count, None)
        random = [_change(layer, x, count, seed) for seed in seeds]
        rows.append(
            {
                "model": name,
                "k": count,
                "change, largest": round(top, 3),
                "change, random": round(float(np.mean(random)), 3),
                "bits per byte, all pairs": round(whole, 3),
                "without the largest": round(_bits(run, batch, count, None), 3),
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
    logs = jax.nn.log_softmax(nnx.merge(graph, params)(inputs).logits)
    picked = jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weights) / jnp.sum(weights)


def _judge(result: Result) -> Verdict:
    values = result.values
    ratio = {name: (min(seeds), max(seeds)) for name, seeds in values["trained / theory"].items()}
    gated = [bound for name, bounds in ratio.items() if name.startswith(GATED) for bound in bounds]
    plain = [bound for name, bounds in ratio.items() if not name.startswith(GATED) for bound in bounds]
    pairs = [pair for one in values["change"].values() for pair in zip(one["largest"], one["random"], strict=True)]
    largest, random = zip(*pairs, strict=True)
    few = min(a / max(b, 1e-3) for a, b in pairs) > FEW
    return Verdict(
        grade(few, max(gated) < NEAR, max(plain) < NEAR),
        f"Dropping the largest pair changes the output by {percent(min(largest), 0)} to {percent(max(largest), 0)}, a "
        f"random one by at most {percent(max(random))} (needed in every seed: {FEW} times as much). Trained keys "
        f"interfere {min(gated):.1f} to {max(gated):.1f} times as much as in theory in gated layers, {min(plain):.1f} "
        f"to {max(plain):.1f} times in mlp layers (needed in every seed: less than {NEAR}).",
    )


def _summary(result: Result) -> list[Row]:
    columns = ("layer", "N", "d", "theory 1/SNR", "at the start", "trained", "active pairs per token")
    return [{name: row[name] for name in columns} for row in result.rows()]


def _draw(result: Result) -> Any:
    figure, axes = new_figure(1, 2, width=9.0, height=4.2)
    left, right = axes[0]
    rows = result.rows()
    for number, name in enumerate(("theory 1/SNR", "at the start", "trained")):
        points = [numbers_in(row[name]) for row in rows]
        colour = f"{0.25 * number}"
        left.plot([numbers[0] for numbers in points], "s^o"[number], color=colour, label=name, markersize=6)
        left.vlines(range(len(rows)), [min(n) for n in points], [max(n) for n in points], color=colour, linewidth=1)
    left.set_yscale("log")
    left.set_xticks(range(len(rows)), [row["layer"] for row in rows], rotation=45, ha="right")
    left.set_ylabel("1 / SNR of a queried key")
    series, styles = {}, {}
    for number, (model, lost) in enumerate(result.values["bits lost"].items()):
        for name, line in (("largest", "-"), ("random", ":")):
            label = f"{model}, {name}"
            series[label] = {
                int(k): [max(float(x), 1e-4) for x in (np.mean(seeds), min(seeds), max(seeds))]
                for k, seeds in lost[name].items()
            }
            styles[label] = {**line_style(number), "linestyle": line}
    draw_lines(right, series, styles=styles, x_base=2, y_scale="log")
    right.set_xlabel("pairs dropped per token and layer, k")
    right.set_ylabel("bits per byte lost, at least 1e-4")
    return figure


FFN = Study(
    name="ffn",
    title="The feedforward layer as a memory",
    claim="A feedforward layer is a memory of as many pairs as it has hidden units: its keys interfere as 1/SNR = N/2d "
    "for relu, a gate makes the similarity quadratic (2N/d^2), and few pairs answer a token, so that dropping the "
    "largest one changes the output far more than dropping one at random.",
    source="arXiv 2505.19488, section 2; 2012.14913",
    measure=_measure,
    judge=_judge,
    draw=_draw,
    caption="Left: noise over signal of each layer's keys, median over pairs. Right: loss by dropping k pairs at every "
    "token. Mean of three seeds; lines and bands: least to greatest.",
    base=BASE,
    rows=ROWS,
    seeds=3,
    settings={"counts": (1, 4, 16, 64), "examples": 24, "draws": 5},
    quick=Quick({"swiglu": ROWS["swiglu"]}, SMALLER, {"counts": (1, 8), "examples": 8, "draws": 2}),
    summary=_summary,
)
