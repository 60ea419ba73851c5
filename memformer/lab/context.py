"""Linear regression in context: does a trained model keep the vanishing step of its memory?

A sequence is questions and pairs in turn: (x_t, asked), (x_t, y_t), with y = W x + noise and another W for each
sequence; a question is answered before its pair is seen. After training the answer f_t(x*) to a fixed question behind t
pairs gives the excess error E (f_t(x*) - W x*)^2, the slope of log |f_(t+1) - f_t| against log t, and the time to
recover from a change of W at pair c: pairs until the answers are half of the way from the old map to the new one.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memformer.core.types import Array
from memformer.lab.convergence import slope
from memformer.lab.convergence_deep import MEMORIES, halfway
from memformer.lab.fit import fit
from memformer.lab.study import Study, legend_below, new_figure
from memformer.models import build_model
from memformer.training.metrics import say
from memformer.training.plots import COLOURS

__all__ = ["draw_regression", "draw_test", "measure", "ridge_error", "train_regression"]

INPUTS, NOISE, WIDTH = 4, 0.1, 64
BATCH, RATE = 16, 1e-2
# Heads and layers of the models.
SHAPES = ((1, 1), (8, 2))


def draw_regression(key: Array, pairs: int, batch: int, change: int | None = None) -> tuple[Array, Array, Array]:
    """(tokens [B, 2 N, inputs + 2], answers to the questions [B, N], maps [2, B, inputs]).

    Args:
      key: of the draw.
      pairs: N.
      batch: B.
      change: pair from which the second map holds; None for never.

    Example:
      >>> tokens, answers, maps = draw_regression(jax.random.key(0), 8, 2)
      >>> tokens.shape, answers.shape, maps.shape
      ((2, 16, 6), (2, 8), (2, 2, 4))
    """
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (batch, pairs, INPUTS))
    maps = jax.random.normal(keys[1], (2, batch, INPUTS)) / math.sqrt(INPUTS)
    first, second = (jnp.einsum("bni,bi->bn", x, one) for one in maps)
    late = jnp.arange(pairs)[None] >= (pairs if change is None else change)
    y = jnp.where(late, second, first) + NOISE * jax.random.normal(keys[2], (batch, pairs))
    return jnp.stack([_questions(x), _tokens(x, y)], axis=2).reshape(batch, 2 * pairs, INPUTS + 2), y, maps


def draw_test(
    key: Array, pairs: int, batch: int, change: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences, a question for each that knows nothing of its maps [B, inputs], and the maps.

    Args:
      key, pairs, batch, change: as in `draw_regression`.

    Example:
      >>> tokens, asked, maps = draw_test(jax.random.key(0), 8, 2)
      >>> tokens.shape, asked.shape, maps.shape
      ((2, 16, 6), (2, 4), (2, 2, 4))
    """
    # not fold_in, which gives the keys of split again
    sequences, questions = jax.random.split(key)
    tokens, _, maps = draw_regression(sequences, pairs, batch, change)
    asked = jax.random.normal(questions, (batch, INPUTS))
    return np.asarray(tokens), np.asarray(asked), np.asarray(maps)


def _tokens(x: Array, y: Array) -> Array:
    return jnp.concatenate([x, y[..., None], jnp.zeros_like(y[..., None])], axis=-1)


def _questions(x: Array) -> Array:
    ones = jnp.ones_like(x[..., :1])
    return jnp.concatenate([x, jnp.zeros_like(ones), ones], axis=-1)


def _loss(model: Any, batch: tuple[Array, Array]) -> Array:
    tokens, answers = batch
    return jnp.mean((model(tokens).logits[:, ::2, 0] - answers) ** 2)


@functools.cache
def _drawing(pairs: int) -> Any:
    def draw(key: Array) -> tuple[Array, Array]:
        return draw_regression(key, pairs, BATCH)[:2]

    return draw


def train_regression(name: str, heads: int, depth: int, *, pairs: int, steps: int, seed: int) -> tuple[Any, Any]:
    """A model trained on sequences that never change, as `nnx.split` gives it.

    Args:
      name: a key of `memformer.lab.convergence_deep.MEMORIES`.
      heads: H, of a width of 64.
      depth: layers.
      pairs: a sequence.
      steps: of batches of 16.
      seed: of weights and sequences.
    """
    memory, options = MEMORIES[name]
    config = {"memory": memory, "memory_options": options, "width": WIDTH, "heads": heads, "depth": depth}
    model = build_model(
        {**config, "feedforward": "mlp", "feedforward_options": {"hidden": 2 * WIDTH}, "scan_layers": True},
        vocab_size=0,
        features=INPUTS + 2,
        num_classes=1,
        rngs=nnx.Rngs(seed),
    )
    graph, params = nnx.split(model)
    params, losses = fit(graph, params, jax.random.key(seed), loss=_loss, draw=_drawing(pairs), steps=steps, rate=RATE)
    say(f"{name}, {heads} heads, depth {depth}, seed {seed}: loss {float(losses[0]):.2f} to {float(losses[-1]):.3f}")
    return graph, params


@functools.partial(jax.jit, static_argnums=0)
def _answer(graph: Any, params: Any, tokens: Array, segment_ids: Array) -> Array:
    return nnx.merge(graph, params)(tokens, segment_ids=segment_ids).logits[..., 0]


def _ask(model: tuple[Any, Any], tokens: np.ndarray, times: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Answers to the questions `asked` [B, inputs] behind the first t pairs of each sequence, [times, B]."""
    count, (batch, length, _) = len(times), tokens.shape
    rows = np.tile(tokens, (count, 1, 1))
    places = np.repeat(2 * times, batch)
    every = np.arange(count * batch)
    rows[every, places] = np.tile(np.asarray(_questions(jnp.asarray(asked))), (count, 1))
    segments = (np.arange(length)[None] <= places[:, None]).astype(np.int32)
    return np.asarray(_answer(*model, rows, segments))[every, places].reshape(count, batch)


def ridge_error(tokens: np.ndarray, asked: np.ndarray, truth: np.ndarray, times: np.ndarray) -> list[float]:
    """Squared error of the best linear answer (ridge regression with the true prior) behind t pairs, mean over rows."""
    x, y = tokens[:, 1::2, :INPUTS], tokens[:, 1::2, INPUTS]
    errors = []
    for time in times:
        seen = x[:, :time]
        gram = np.einsum("bni,bnj->bij", seen, seen) + NOISE**2 * INPUTS * np.eye(INPUTS)
        map_ = np.linalg.solve(gram, np.einsum("bni,bn->bi", seen, y[:, :time])[..., None])[..., 0]
        errors.append(float(np.mean((np.sum(map_ * asked, axis=1) - truth) ** 2)))
    return errors


def _test(model: tuple[Any, Any], pairs: int, batch: int, seed: int) -> dict[str, Any]:
    """Excess errors and moves by time, and steps to recover, of one trained model."""
    key, times = jax.random.key(1000 + seed), _times(pairs)
    tokens, asked, maps = draw_test(key, pairs + 2, batch)
    old, new = (np.sum(one * asked, axis=1) for one in maps)
    said = _ask(model, tokens, np.concatenate([times, times + 1]), asked)
    before, after = said[: len(times)], said[len(times) :]
    recovered = []
    for change in _changes(pairs):
        offsets = 2 ** np.arange(int(math.log2(pairs - change)) + 1)
        moved = draw_test(key, pairs + 2, batch, change)[0]
        answers = _ask(model, moved, change + np.array([0, 1, 2, 4, 8, 16, 32])[: len(offsets) + 1], asked)
        way = new - old
        recovered.append(halfway(offsets, np.sum((answers[1:] - old) * way, axis=1) / np.sum(way**2)))
    return {
        "excess": np.mean((before - old) ** 2, axis=1),
        "moves": np.sqrt(np.mean((after - before) ** 2, axis=1)),
        "recovered": recovered,
        "ridge": ridge_error(tokens, asked, old, times),
    }


def _times(pairs: int) -> np.ndarray:
    return 2 ** np.arange(2, int(math.log2(pairs)) + 1)


def _changes(pairs: int) -> tuple[int, int]:
    return pairs // 8, pairs // 2


def measure(study: Study, *, quick: bool) -> None:
    """Trains models of several shapes with each memory, and asks them."""
    pairs, steps, seeds, batch = (16, 100, 1, 64) if quick else (32, 200, 2, 64)
    names = ("softmax", "delta") if quick else tuple(MEMORIES)
    shapes = ((8, 1),) if quick else SHAPES
    study.claim = (
        "Models of any memory learn linear regression in context; if heads, depth and training ended the vanishing "
        "step of softmax attention (2505.19488, section 2.2.2), its answers would keep moving and recover from a "
        "change in a time that does not grow with the pairs seen."
    )
    found = {}
    for heads, depth in shapes:
        for name in names:
            runs = []
            for seed in range(seeds):
                model = train_regression(name, heads, depth, pairs=pairs, steps=steps, seed=seed)
                runs.append(_test(model, pairs, batch, seed))
            found[name, heads, depth] = runs
    rows = [_row(label, runs, pairs) for label, runs in found.items()]
    study.add_table(
        f"Trained {steps} steps on sequences of {pairs} pairs that never change; least to most of {seeds} seeds", rows
    )
    study.values = {"pairs": pairs, "steps": steps, "seeds": seeds, "noise": NOISE, "inputs": INPUTS}
    study.outcome = _outcome(found, pairs)
    _draw(study, found, shapes, pairs)


def _row(label: tuple[str, int, int], runs: Sequence[dict], pairs: int) -> dict[str, Any]:
    times, (name, heads, depth) = _times(pairs), label
    slopes = _slopes(runs, times)
    row: dict[str, Any] = {"memory": name, "heads": heads, "depth": depth}
    for place in (0, len(times) - 1):
        excess = np.mean([run["excess"][place] for run in runs])
        ridge = np.mean([run["ridge"][place] for run in runs])
        row[f"error after {times[place]} pairs (best)"] = f"{excess:.3f} ({ridge:.3f})"
    row["slope of moves"] = _range(slopes)
    for number, change in enumerate(_changes(pairs)):
        row[f"recovery, change at {change}"] = _range([run["recovered"][number] for run in runs])
    return row


def _slopes(runs: Sequence[dict], times: np.ndarray) -> list[float]:
    return [slope(times, run["moves"]) for run in runs]


def _range(values: Sequence[float]) -> str:
    if np.isnan(values).any():
        return "never" if np.isnan(values).all() else f"{np.nanmin(values):.2f} to never"
    return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def _outcome(found: dict, pairs: int) -> str:
    times = _times(pairs)
    parts = []
    for (name, heads, depth), runs in found.items():
        back = [_range([run["recovered"][i] for run in runs]) for i in (0, 1)]
        parts.append(
            f"{name} ({heads} heads, depth {depth}) slope {np.mean(_slopes(runs, times)):.2f}, recovery {back[0]} and "
            f"{back[1]}"
        )
    return f"Slope of the moves, and pairs to recover after a change at {' and '.join(map(str, _changes(pairs)))}: " + (
        "; ".join(parts) + "."
    )


def _draw(study: Study, found: dict, shapes: Sequence[tuple[int, int]], pairs: int) -> None:
    figure, axes = new_figure(2, len(shapes), width=3.5 * len(shapes) + 0.6, height=5.6)
    times = _times(pairs)
    for column, (heads, depth) in enumerate(shapes):
        for colour, name in zip(COLOURS, MEMORIES, strict=False):
            runs = found.get((name, heads, depth))
            if runs is None:
                continue
            for axis, what in zip(axes[:, column], ("excess", "moves"), strict=True):
                values = np.array([run[what] for run in runs])
                axis.plot(times, values.mean(axis=0), "o-", color=colour, label=name, markersize=3, linewidth=1.4)
                axis.fill_between(times, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
            ridge = np.mean([run["ridge"] for run in runs], axis=0)
        axes[0, column].plot(times, ridge, ":", color="0.3", label="best linear answer")
        axes[1, column].plot(times, 0.8 * times[0] / times, ":", color="0.3", label="1 / t")
        axes[0, column].set_title(f"{heads} heads, depth {depth}")
        axes[1, column].set_xlabel("pairs read, t")
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
    axes[0, 0].set_ylabel("excess error, squared")
    axes[1, 0].set_ylabel("|f(t + 1) - f(t)|")
    legend_below(figure, axes[0, 0], columns=6, fontsize="small")
    study.save_figure(
        figure,
        "regression",
        "Models trained on linear regression in context: error of the answer to a fixed question (above), and how far "
        "it moves with one more pair (below; dotted falls as 1/t), bands least to most of seeds. Claim under test: "
        "softmax's step vanishes as 1/t in deep trained models too.",
    )
