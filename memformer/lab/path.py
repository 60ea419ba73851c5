"""Path length: how strongly, and over how many steps, an input far back reaches the answer.

The gradient of the last output by the input d tokens earlier, g(d) = |d y_T / d x_(T-d)|, of one memory layer; its
graph has a chain of d updates where a state is handed on, and one step where the answer reads the token itself. By how
much a step multiplies the gradient at initialisation:

    rnn                 rms of tanh' (the state's weights are orthogonal)
    lstm                the forget gate, about sigmoid(1)
    delta rule          sqrt(1 - beta (2 - beta) / K): a write erases beta of what lies along its key
    gated delta rule    the same times exp(g)
    attention           1: nothing lies between

then the same after training on delayed recall: a symbol, `delay` distractors, and the question for it.
"""

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
from memformer.lab.study import Study, legend_below, new_figure
from memformer.layers.memory import build_memory
from memformer.layers.recurrent import CELLS
from memformer.models import build_model
from memformer.training.metrics import say
from memformer.training.plots import COLOURS

__all__ = ["LAYERS", "draw_recall", "gradients", "measure", "train_recall", "width_for"]

WIDTH, HEADS = 64, 4
# Symbols to be recalled, distractors, and the question.
SYMBOLS, DISTRACTORS = 8, 8
VOCAB = SYMBOLS + DISTRACTORS + 1
PARAMETERS = 20_000
BATCH, RATE = 16, 5e-3
# Sequences of each delay that a trained model is asked.
ASKED = 64

# Options besides the row's own (short convolutions would be a second way through time), and the least and the most
# steps from an input to an answer d tokens later.
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


def width_for(name: str) -> int:
    """The largest width, in steps of 2 a head, at which a model of this memory has no more than 20,000 parameters.

    Example:
      >>> width_for("rnn") > width_for("softmax_attention") > width_for("lstm")
      True
    """

    def size(width: int) -> int:
        shapes = jax.eval_shape(lambda: nnx.split(_model(name, width, 0))[1])
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    step = 2 * HEADS
    return next(width for width in range(256, step, -step) if size(width) <= PARAMETERS)


def train_recall(name: str, longest: int, *, steps: int, seed: int = 0) -> tuple[Any, Any, np.ndarray]:
    """A model of one layer trained on delays up to `longest`: (graph, parameters, losses [steps]).

    Args:
      name: a key of `LAYERS`.
      longest: most distractors between symbol and question.
      steps: of batches of 16.
      seed: of weights and batches.
    """
    graph, params = nnx.split(_model(name, width_for(name), seed))
    key = jax.random.fold_in(jax.random.key(1), seed)
    params, losses = fit(graph, params, key, loss=_recall_loss, draw=_drawing(longest), steps=steps, rate=RATE)
    return graph, params, np.asarray(losses)


def steps_to_learn(losses: np.ndarray) -> int | None:
    """The first step from which on the mean of ten losses lies below a tenth of that of a guess; None for never.

    Example:
      >>> steps_to_learn(np.array([2.0] * 20 + [0.1] * 20)), steps_to_learn(np.array([2.0] * 20))
      (21, None)
    """
    means = np.convolve(losses, np.full(10, 0.1), mode="valid")
    low = means < 0.1 * math.log(SYMBOLS)
    return int(np.argmax(low)) + 1 if low.any() else None


@functools.partial(jax.jit, static_argnums=0)
def _right(graph: Any, params: Any, tokens: Array) -> Array:
    return jnp.argmax(_logits(nnx.merge(graph, params), tokens), axis=1) == _symbol(tokens)


def recalled(graph: Any, params: Any, delays: Sequence[int], seed: int) -> list[float]:
    """Accuracy at each delay, on fresh sequences all as long as the longest needs."""
    keys = jax.random.split(jax.random.key(1000 + seed), len(delays))
    tokens = [draw_recall(key, (delay, delay), ASKED, max(delays) + 2) for key, delay in zip(keys, delays, strict=True)]
    right = np.asarray(_right(graph, params, jnp.concatenate(tokens)))
    return right.reshape(len(delays), ASKED).mean(axis=1).tolist()


def _after_training(model: Any, delay: int, length: int, seed: int) -> np.ndarray:
    """g(d) of the trained memory layer on sequences of its task, the symbol at distance delay + 1."""
    tokens = draw_recall(jax.random.key(100 + seed), (delay, delay), BATCH, length)
    block = model.blocks[0]
    graph, params = nnx.split(block.memory)
    return np.asarray(_gradients(graph, params, block.norm(model.embedding(tokens)), jax.random.key(seed)))


def factor_a_step(falls: np.ndarray, first: int, last: int) -> float:
    """exp of the slope of log g by d, least squares over d = first...last; g is [seeds, T]."""
    distance = np.arange(first, last + 1)
    logs = np.log(np.maximum(falls[:, first : last + 1], 1e-30)).mean(axis=0)
    return float(np.exp(np.polyfit(distance, logs, 1)[0]))


def _theory(name: str) -> float | None:
    """What one step multiplies the gradient by at initialisation, as the module's docstring has it."""
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
        # the head that forgets least is what is left far back
        decay = np.asarray(layer.decay(x)[0]).mean(axis=(0, 1))
        return kept * float(np.exp(decay.max()))
    if name == "rnn":
        h = np.asarray(layer.layer(x)[0])
        return float(np.sqrt(np.mean((1 - h**2) ** 2)))
    return None


def measure(study: Study, *, quick: bool) -> None:
    """Gradients at initialisation, accuracy by delay, gradients after training."""
    length, seeds, batch = (65, 2, 4) if quick else (513, 8, 16)
    layers = tuple(name for name in LAYERS if not quick or name not in ("gru", "linear_attention", "gated_delta_rule"))
    names = ("rnn", "softmax_attention") if quick else layers
    longest, steps, trainings = (16, 80, 1) if quick else (128, 300, 3)
    delays = tuple(2**e for e in range(1, int(math.log2(longest)) + 2))
    shown = longest // 2
    study.claim = (
        "From the recurrent network to attention the path from an input to the answer shrinks from d steps to one: the "
        "gradient falls exponentially with the distance d for the RNN, more slowly for gated cells and the delta rule, "
        "and not at all for attention and DeltaFormer, which read the token itself; so does delayed recall at matched "
        "parameters."
    )
    falls = {name: _at_start(name, length, seeds, batch) for name in layers}
    rows = [_row(name, falls[name], length) for name in layers]
    study.add_table("Gradient by distance at initialisation (median of seeds, 10% to 90%)", rows)
    accuracy: dict[str, np.ndarray] = {}
    learnt: dict[str, list[int | None]] = {}
    after: dict[str, np.ndarray] = {}
    for name in names:
        runs = [train_recall(name, longest, steps=steps, seed=seed) for seed in range(trainings)]
        accuracy[name] = np.array([recalled(*run[:2], delays, seed) for seed, run in enumerate(runs)])
        after[name] = np.stack(
            [_after_training(nnx.merge(*run[:2]), shown, longest + 2, seed) for seed, run in enumerate(runs)]
        )
        learnt[name] = [steps_to_learn(losses) for _, _, losses in runs]
        say(f"{name}: done")
    study.add_table(
        f"Delayed recall after {steps} steps at delays 1 to {longest}: accuracy by delay, median, least and most of "
        f"{trainings} seeds (guessing: {1 / SYMBOLS:.1%})",
        [_accuracy_row(name, accuracy[name], learnt[name], delays) for name in names],
    )
    study.add_table(
        f"Gradient after training, at the symbol {shown + 1} tokens back, relative to the mean of the distractors "
        "between",
        [_trained_row(name, after[name], shown) for name in names],
    )
    study.outcome = _outcome(rows, falls, accuracy, names, delays)
    study.values = {"width": WIDTH, "heads": HEADS, "length": length, "seeds": seeds, "parameters": PARAMETERS}
    _draw(study, falls, accuracy, after, delays, shown)


def _row(name: str, falls: np.ndarray, length: int) -> dict[str, Any]:
    row: dict[str, Any] = {"memory": name, "steps from input to answer (least / most)": LAYERS[name][1]}
    relative = falls / falls[:, 1:2]
    for distance in (d for d in (4, 16, 64, 256) if d < length):
        low, middle, high = np.quantile(relative[:, distance], (0.1, 0.5, 0.9))
        row[f"g({distance}) / g(1)"] = f"{middle:.2g} ({low:.2g} to {high:.2g})"
    # states of cells fall below what float32 can tell soon
    last = 24 if name in CELLS else 64
    row["factor a step"] = round(factor_a_step(falls, 4, last), 3)
    theory = _theory(name)
    row["theory"] = "" if theory is None else round(theory, 3)
    return row


def _accuracy_row(name: str, accuracy: np.ndarray, learnt: list, delays: Sequence[int]) -> dict[str, Any]:
    row: dict[str, Any] = {"memory": name, "width": width_for(name)}
    row["steps until the loss is a tenth of a guess's"] = ", ".join("never" if n is None else str(n) for n in learnt)
    for delay, right in zip(delays, accuracy.T, strict=True):
        row[f"delay {delay}"] = f"{np.median(right):.0%} ({right.min():.0%} to {right.max():.0%})"
    return row


def _trained_row(name: str, after: np.ndarray, delay: int) -> dict[str, Any]:
    ratio = after[:, delay + 1] / after[:, 1 : delay + 1].mean(axis=1)
    return {"memory": name, "least": float(f"{ratio.min():.2g}"), "most": float(f"{ratio.max():.2g}")}


def _outcome(rows: list[dict], falls: dict, accuracy: dict, names: Sequence[str], delays: Sequence[int]) -> str:
    factors = ", ".join(f"{row['memory']} {row['factor a step']:.3f}" for row in rows)
    solved = {name: np.array(delays)[np.median(accuracy[name], axis=0) >= 0.98] for name in names}
    reached = {name: int(found.max()) if len(found) else 0 for name, found in solved.items()}
    far = [
        name
        for name, delay in reached.items()
        if delay and np.median(falls[name][:, min(delay, falls[name].shape[1] - 1)] / falls[name][:, 1]) < 1e-2
    ]
    against = (
        f" Not as claimed: {', '.join(far)} recall over distances at which their gradient at initialisation is below "
        "1% of that at d = 1; training opens the gates, and the gradient at the start does not decide what is learnt."
    )
    return (
        f"At initialisation a step multiplies the gradient by: {factors}. Longest delay recalled (median of seeds at "
        f"least 98%; 0 for none): {', '.join(f'{name} {delay}' for name, delay in reached.items())}."
        + (against if far else "")
    )


def _draw(study: Study, falls: dict, accuracy: dict, after: dict, delays: Sequence[int], shown: int) -> None:
    figure, axes = new_figure(1, 3, width=12.0, height=4.2)
    left, middle, right = axes[0]
    for index, name in enumerate(LAYERS):
        if name not in falls:
            continue
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": "-" if index < len(COLOURS) else "--"}
        # on a log axis, and few enough that the SVG stays small
        distance = np.unique(np.geomspace(1, falls[name].shape[1] - 1, 80).astype(int))
        low, mid, high = np.quantile(falls[name][:, distance] / falls[name][:, 1:2], (0.1, 0.5, 0.9), axis=0)
        left.plot(distance, mid, label=name, linewidth=1.5, **style)
        left.fill_between(distance, low, high, color=style["color"], alpha=0.2, linewidth=0)
        if name in after:
            found = np.median(after[name], axis=0)
            middle.plot(np.arange(1, len(found)), np.maximum(found[1:], 1e-6), linewidth=1.3, **style)
            scores = accuracy[name]
            right.plot(delays, np.median(scores, axis=0), marker="o", markersize=4, linewidth=1.5, **style)
            right.fill_between(delays, scores.min(axis=0), scores.max(axis=0), color=style["color"], alpha=0.12)
    left.set_ylim(1e-6, 10)
    left.set_ylabel("gradient g(d) / g(1)")
    left.set_title("at initialisation")
    middle.set_ylabel("gradient g(d)")
    middle.set_title(f"after training; the symbol at {shown + 1}")
    middle.axvline(shown + 1, color="0.6", linewidth=0.8)
    for axis in (left, middle):
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("distance d, tokens")
    right.axhline(1 / SYMBOLS, color="0.4", linestyle=":", label="guess")
    right.set_xscale("log", base=2)
    right.set_ylim(0, 1.03)
    right.set_xlabel("delay, tokens")
    right.set_ylabel("accuracy of delayed recall")
    right.set_title("at matched parameters")
    legend_below(figure, left, columns=4)
    study.save_figure(
        figure,
        "gradients",
        "Left: gradient of the last output by the input d tokens before it, at initialisation, bands 10% to 90% of "
        "seeds. Middle: the same after training on delayed recall. Right: accuracy against delay, bands least to most "
        "of seeds. Claim: exponential fall for the RNN, slower for gates and the delta rule, flat for attention.",
    )
