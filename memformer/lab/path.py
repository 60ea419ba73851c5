"""Path length: the strength of the gradient from an input far back to the answer, and the steps between them.

The gradient of the last output by the input d tokens earlier, g(d) = |d y_T / d x_(T-d)|, of one memory layer; its
graph has a chain of d updates where a state is carried on, and one step where the answer reads the token itself. The
factor per step at initialisation:

    rnn                 rms of tanh' (the state's weights are orthogonal)
    lstm                the forget gate, about sigmoid(1)
    delta rule          sqrt(1 - beta (2 - beta) / K): a write erases beta of the part along its key
    gated delta rule    the same times exp(g)
    attention           1: nothing lies between

then the same after training on delayed recall: a symbol, `delay` distractors, and the question for it.
"""

import bisect
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memformer.core.types import Array
from memformer.lab.fit import fit
from memformer.lab.plots import DOTTED, draw_lines, line_style, new_figure
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade, numbers_in
from memformer.layers.memory import build_memory
from memformer.layers.recurrent import CELLS
from memformer.models import build_model
from memformer.training.metrics import log

__all__ = ["LAYERS", "PATH", "draw_recall", "factor_per_step", "gradients", "train_recall", "width_for"]

WIDTH, HEADS = 64, 4
# Symbols to recall, distractors, and the question.
SYMBOLS, DISTRACTORS = 8, 8
VOCAB = SYMBOLS + DISTRACTORS + 1
PARAMETERS = 20_000
BATCH, RATE = 16, 5e-3
# Test sequences per delay.
ASKED = 64

# Options (short convolutions would be a second path through time), and the least and the most steps from an input to
# an answer d tokens later.
LAYERS: dict[str, tuple[Mapping[str, Any], str]] = {
    "rnn": ({}, "d / d"),
    "lstm": ({}, "d / d"),
    "gru": ({}, "d / d"),
    "linear_attention": ({}, "d / d, added to"),
    "delta_rule": ({"conv_width": 0}, "d / d"),
    "gated_delta_rule": ({"conv_width": 0}, "d / d"),
    "softmax_attention": ({}, "1 / 1"),
    "deltaformer": ({}, "1 / d"),
}


def gradients(layer: Any, x: Array, key: Array) -> Array:
    """Root mean square of |r . d y_T / d x_(T-d)| by distance d = 0...T-1, r a random direction of length sqrt(D).

    Args:
      layer: called as `layer(x) -> (y, state)`.
      x: [B, T, D].
      key: of the directions.

    Example:
      >>> layer = build_memory("softmax_attention", 8, heads=2, rngs=nnx.Rngs(0))
      >>> gradients(layer, jnp.ones((2, 5, 8)), jax.random.key(0)).shape
      (5,)
    """
    directions = jax.random.normal(key, (x.shape[0], x.shape[2]), x.dtype)

    def answer(x: Array) -> Array:
        return jnp.sum(directions * layer(x)[0][:, -1])

    slope = jax.grad(answer)(x)
    return jnp.sqrt(jnp.mean(jnp.sum(slope**2, axis=2), axis=0))[::-1]


@functools.partial(jax.jit, static_argnums=0)
def _gradients(graph: Any, params: Any, x: Array, key: Array) -> Array:
    return gradients(nnx.merge(graph, params), x, key)


def _at_start(name: str, length: int, seeds: int, batch: int) -> np.ndarray:
    """g(d) of layers at initialisation on Gaussian inputs, [seeds, length]."""
    found = []
    for seed in range(seeds):
        keys = jax.random.split(jax.random.key(seed))
        graph, params = nnx.split(_layer(name, WIDTH, seed))
        found.append(_gradients(graph, params, jax.random.normal(keys[0], (batch, length, WIDTH)), keys[1]))
    return np.stack([np.asarray(one) for one in found])


def _layer(name: str, width: int, seed: int) -> nnx.Module:
    return build_memory(name, width, heads=HEADS, options=LAYERS[name][0], rngs=nnx.Rngs(seed))


def draw_recall(key: Array, delays: tuple[int, int], batch: int, length: int) -> Array:
    """Sequences [B, T] of distractors with one symbol in them, and the question for it at the end.

    Args:
      key: of the draw.
      delays: the fewest and the most distractors between symbol and question, drawn evenly on a log scale.
      batch: B.
      length: T.

    Example:
      >>> tokens = draw_recall(jax.random.key(0), (3, 3), 2, 8)
      >>> (tokens[:, 3] < 8).tolist(), tokens[:, -1].tolist()
      ([True, True], [16, 16])
    """
    keys = jax.random.split(key, 3)
    symbol = jax.random.randint(keys[0], (batch, 1), 0, SYMBOLS)
    noise = jax.random.randint(keys[1], (batch, length - 1), SYMBOLS, SYMBOLS + DISTRACTORS)
    low, high = math.log(delays[0]), math.log(delays[1] + 1)
    delay = jnp.floor(jnp.exp(jax.random.uniform(keys[2], (batch, 1), minval=low, maxval=high))).astype(jnp.int32)
    place = length - 2 - jnp.clip(delay, *delays)
    tokens = jnp.where(jnp.arange(length - 1)[None] == place, symbol, noise)
    return jnp.concatenate([tokens, jnp.full((batch, 1), VOCAB - 1)], axis=1)


def _symbol(tokens: Array) -> Array:
    """[B], the one symbol of each sequence."""
    return jnp.min(tokens, axis=1)


def _logits(model: Any, tokens: Array) -> Array:
    return model(tokens).logits[:, -1, :SYMBOLS]


def _recall_loss(model: Any, tokens: Array) -> Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(_logits(model, tokens)), _symbol(tokens)[:, None], axis=1))


@functools.cache
def _drawing(longest: int) -> Any:
    return functools.partial(draw_recall, delays=(1, longest), batch=BATCH, length=longest + 2)


def _model(name: str, width: int, seed: int) -> nnx.Module:
    config = {
        "memory": name,
        "memory_options": LAYERS[name][0],
        "width": width,
        "heads": HEADS,
        "feedforward": None,
        "scan_layers": False,
    }
    return build_model(config, vocab_size=VOCAB, rngs=nnx.Rngs(seed))


@functools.cache
def width_for(name: str) -> int:
    """The largest width, in steps of 2 per head, at which a model of this memory has no more than 20,000 parameters.

    Example:
      >>> width_for("rnn") > width_for("lstm")
      True
    """

    def size(width: int) -> int:
        shapes = jax.eval_shape(lambda: nnx.split(_model(name, width, 0))[1])
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    widths = range(4 * HEADS, 257, 2 * HEADS)
    return widths[bisect.bisect_right(widths, PARAMETERS, key=size) - 1]


def train_recall(name: str, longest: int, *, steps: int, seed: int = 0) -> tuple[Any, Any, np.ndarray]:
    """A model of one layer trained on delays up to `longest`: (graph, parameters, losses [steps]).

    Args:
      name: a key of `LAYERS`.
      longest: most distractors between symbol and question.
      steps: of training, with batches of 16.
      seed: of weights and batches.
    """
    graph, params = nnx.split(_model(name, width_for(name), seed))
    key = jax.random.fold_in(jax.random.key(1), seed)
    params, losses = fit(graph, params, key, loss=_recall_loss, draw=_drawing(longest), steps=steps, rate=RATE)
    return graph, params, np.asarray(losses)


def steps_to_learn(losses: np.ndarray) -> int | None:
    """The first step whose mean of ten losses is below a tenth of the loss of guessing; None for never.

    Example:
      >>> steps_to_learn(np.array([2.0] * 20 + [0.1] * 20)), steps_to_learn(np.array([2.0] * 20))
      (21, None)
    """
    means = np.convolve(losses, np.full(10, 0.1), mode="valid")
    low = means < 0.1 * math.log(SYMBOLS)
    return int(np.argmax(low)) + 1 if low.any() else None


@functools.partial(jax.jit, static_argnums=0)
def _correct(graph: Any, params: Any, tokens: Array) -> Array:
    return jnp.argmax(_logits(nnx.merge(graph, params), tokens), axis=1) == _symbol(tokens)


def recalled(graph: Any, params: Any, delays: Sequence[int], seed: int) -> list[float]:
    """Accuracy at each delay, on fresh sequences all as long as the longest needs."""
    keys = jax.random.split(jax.random.key(1000 + seed), len(delays))
    tokens = [draw_recall(key, (delay, delay), ASKED, max(delays) + 2) for key, delay in zip(keys, delays, strict=True)]
    correct = np.asarray(_correct(graph, params, jnp.concatenate(tokens)))
    return correct.reshape(len(delays), ASKED).mean(axis=1).tolist()


def _after_training(model: Any, delay: int, length: int, seed: int) -> np.ndarray:
    """g(d) of the trained memory layer on sequences of its task, the symbol at distance delay + 1."""
    tokens = draw_recall(jax.random.key(100 + seed), (delay, delay), BATCH, length)
    block = model.blocks[0]
    graph, params = nnx.split(block.memory)
    return np.asarray(_gradients(graph, params, block.norm(model.embedding(tokens)), jax.random.key(seed)))


def factor_per_step(falls: np.ndarray, first: int, last: int) -> float:
    """exp of the slope of log g by d, least squares over d = first...last; g is [seeds, T]."""
    distance = np.arange(first, last + 1)
    logs = np.log(np.maximum(falls[:, first : last + 1], 1e-30)).mean(axis=0)
    return float(np.exp(np.polyfit(distance, logs, 1)[0]))


def _theory(name: str) -> float | None:
    """The factor per step at initialisation by the formulas of the module's docstring."""
    if name in ("softmax_attention", "deltaformer", "linear_attention"):
        return 1.0
    if name == "lstm":
        return 1 / (1 + math.exp(-1))
    beta, width = 0.5, WIDTH // HEADS
    kept = math.sqrt(1 - beta * (2 - beta) / width)
    if name == "delta_rule":
        return kept
    x = jax.random.normal(jax.random.key(0), (4, 64, WIDTH))
    layer: Any = _layer(name, WIDTH, 0)
    if name == "gated_delta_rule":
        # far back only the head that forgets least is left
        decay = np.asarray(layer.decay(x)[0]).mean(axis=(0, 1))
        return kept * float(np.exp(decay.max()))
    if name == "rnn":
        h = np.asarray(layer.layer(x)[0])
        return float(np.sqrt(np.mean((1 - h**2) ** 2)))
    return None


def _measure(runs: Runs, settings: Settings) -> Result:
    length, longest, steps = (settings[name] for name in ("length", "longest", "steps"))
    delays = tuple(2**e for e in range(1, int(math.log2(longest)) + 2))
    shown = longest // 2
    falls = {name: _at_start(name, length, settings["seeds"], settings["batch"]) for name in settings["layers"]}
    recall, after = [], []
    for name in settings["trained"]:
        models = [train_recall(name, longest, steps=steps, seed=seed) for seed in range(settings["trainings"])]
        accuracy = np.array([recalled(*model[:2], delays, seed) for seed, model in enumerate(models)])
        gradient = np.stack(
            [_after_training(nnx.merge(*model[:2]), shown, longest + 2, seed) for seed, model in enumerate(models)]
        )
        recall.append(_accuracy_row(name, accuracy, [steps_to_learn(losses) for _, _, losses in models], delays))
        after.append(_trained_row(name, gradient, shown))
        log(f"{name}: done")
    tables = [
        Table(
            "Gradient by distance at initialisation (median of seeds, 10% to 90%)",
            [_row(name, found, length) for name, found in falls.items()],
        ),
        Table(
            f"Delayed recall after {steps} steps at delays 1 to {longest}: accuracy by delay, median, least and most "
            f"of {settings['trainings']} seeds (chance {1 / SYMBOLS:.1%})",
            recall,
        ),
        Table(
            f"Gradient after training, at the symbol {shown + 1} tokens back, relative to the mean of the distractors "
            "between",
            after,
        ),
    ]
    values = {"width": WIDTH, "heads": HEADS, "length": length, "seeds": settings["seeds"], "parameters": PARAMETERS}
    return Result(tables, values)


def _row(name: str, falls: np.ndarray, length: int) -> Row:
    row: dict[str, Any] = {"memory": name, "steps from input to answer (least / most)": LAYERS[name][1]}
    relative = falls / falls[:, 1:2]
    for distance in (d for d in (4, 16, 64, 256) if d < length):
        low, middle, high = np.quantile(relative[:, distance], (0.1, 0.5, 0.9))
        row[f"g({distance}) / g(1)"] = f"{middle:.2g} ({low:.2g} to {high:.2g})"
    # gradients through cells soon underflow float32
    last = 24 if name in CELLS else 64
    row["factor per step"] = round(factor_per_step(falls, 4, last), 3)
    theory = _theory(name)
    row["theory"] = "" if theory is None else round(theory, 3)
    return row


def _accuracy_row(name: str, accuracy: np.ndarray, learnt: list, delays: Sequence[int]) -> Row:
    row: dict[str, Any] = {"memory": name, "width": width_for(name)}
    row["steps to a tenth of the loss of guessing"] = ", ".join("never" if n is None else str(n) for n in learnt)
    for delay, one in zip(delays, accuracy.T, strict=True):
        row[f"delay {delay}"] = f"{np.median(one):.0%} ({one.min():.0%} to {one.max():.0%})"
    return row


def _trained_row(name: str, after: np.ndarray, delay: int) -> Row:
    ratio = after[:, delay + 1] / after[:, 1 : delay + 1].mean(axis=1)
    return {"memory": name, "least": float(f"{ratio.min():.2g}"), "most": float(f"{ratio.max():.2g}")}


def _gradients_of(row: Row) -> dict[int, list[float]]:
    """Distance to [median, low, high] of g(d) / g(1)."""
    cells = {name: cell for name, cell in row.items() if name.startswith("g(")}
    return {1: [1.0] * 3, **{int(name[2 : name.index(")")]): numbers_in(cell) for name, cell in cells.items()}}


def _accuracies_of(row: Row) -> dict[int, list[float]]:
    """Delay to [median, least, most] accuracy."""
    return {int(name.split()[1]): numbers_in(cell) for name, cell in row.items() if name.startswith("delay")}


def _judge(result: Result) -> Verdict:
    factors = {row["memory"]: row["factor per step"] for row in result.rows()}
    falls = factors["rnn"] < factors["lstm"] < factors["delta_rule"] < min(1.0, factors["softmax_attention"])
    reached = {
        row["memory"]: max((d for d, cell in _accuracies_of(row).items() if cell[0] >= 0.98), default=0)
        for row in result.rows(1)
    }
    names = ("rnn", "gru", "lstm", "delta_rule", "softmax_attention")
    return Verdict(
        grade(falls, reached["rnn"] < reached["gru"] < reached["softmax_attention"]),
        "Factor of the gradient per step at initialisation and longest delay recalled: "
        + ", ".join(f"{name} {factors[name]:g} and {reached[name]}" for name in names)
        + ".",
    )


def _summary(result: Result) -> list[Row]:
    return [{name: cell for name, cell in row.items() if not name.startswith("g(")} for row in result.rows()]


def _draw(result: Result) -> Any:
    figure, axes = new_figure(1, 2, width=9.0, height=4.2)
    left, right = axes[0]
    gradients = {
        row["memory"]: {d: [max(x, 1e-6) for x in cell] for d, cell in _gradients_of(row).items()}
        for row in result.rows()
    }
    draw_lines(left, gradients, x_base=2, y_scale="log")
    left.set_xlabel("distance d, tokens")
    left.set_ylabel("gradient g(d) / g(1), at least 1e-6")
    styles = {name: line_style(place) for place, name in enumerate(gradients)}
    draw_lines(right, {row["memory"]: _accuracies_of(row) for row in result.rows(1)}, styles=styles, x_base=2)
    right.axhline(1 / SYMBOLS, label="chance", **DOTTED)
    right.set_ylim(0, 1.04)
    right.set_xlabel("delay, tokens")
    right.set_ylabel("accuracy of delayed recall")
    return figure


PATH = Study(
    name="path",
    title="Path length of gradients",
    claim="From the recurrent network to attention the path from an input to the answer shrinks from d steps to one: "
    "the gradient falls exponentially with the distance d for the RNN, more slowly for gated cells and the delta rule, "
    "and not at all for attention and DeltaFormer, which read the token itself; so does delayed recall at matched "
    "parameters.",
    source="the path lengths of arXiv 1706.03762, table 1",
    measure=_measure,
    judge=_judge,
    draw=_draw,
    caption="Left: gradient of the last output by the input d tokens before it, at initialisation (bands: 10% to 90% "
    "of seeds). Right: accuracy of delayed recall after training at matched parameters (bands: all seeds).",
    settings={
        "length": 513,
        "seeds": 8,
        "batch": 16,
        "layers": tuple(LAYERS),
        "trained": tuple(LAYERS),
        "trainings": 3,
        "longest": 128,
        "steps": 300,
    },
    quick=Quick(
        settings={
            "length": 65,
            "seeds": 2,
            "batch": 4,
            "layers": ("rnn", "lstm", "delta_rule", "softmax_attention", "deltaformer"),
            "trained": ("rnn", "softmax_attention"),
            "trainings": 1,
            "longest": 16,
            "steps": 80,
        }
    ),
    summary=_summary,
)
