"""Linear regression in context: does a trained model keep the vanishing step of its memory?

A sequence alternates questions and pairs: (x_t, ?), (x_t, y_t), with y = W x + noise and another W for each sequence; a
question is answered before its pair is seen. After training, the answer f_t(x*) to a fixed question after t pairs gives
the excess error E (f_t(x*) - W x*)^2, the slope of log |f_(t+1) - f_t| against log t, and the time to recover from a
change of W at pair c: pairs until the answers are halfway from the old map to the new one.
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
from memformer.lab.plots import DOTTED, draw_bars, new_figure
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade, numbers_in
from memformer.models import build_model
from memformer.training.metrics import log

__all__ = ["CONTEXT", "draw_regression", "draw_test", "ridge_error", "train_regression"]

INPUTS, NOISE, WIDTH = 4, 0.1, 64
BATCH, RATE = 16, 1e-2
# Stated before the runs: the slope of the moves that keep on, of every seed.
MOVES = -0.5


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
    """Sequences, a question for each that is independent of its maps [B, inputs], and the maps.

    Args:
      key, pairs, batch, change: as in `draw_regression`.
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
      pairs: per sequence.
      steps: of training, with batches of 16.
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
    log(f"{name}, {heads} heads, depth {depth}, seed {seed}: loss {float(losses[0]):.2f} to {float(losses[-1]):.3f}")
    return graph, params


@functools.partial(jax.jit, static_argnums=0)
def _answer(graph: Any, params: Any, tokens: Array, segment_ids: Array) -> Array:
    return nnx.merge(graph, params)(tokens, segment_ids=segment_ids).logits[..., 0]


def _ask(model: tuple[Any, Any], tokens: np.ndarray, times: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Answers to the questions `asked` [B, inputs] after the first t pairs of each sequence, [times, B]."""
    count, (batch, length, _) = len(times), tokens.shape
    rows = np.tile(tokens, (count, 1, 1))
    places = np.repeat(2 * times, batch)
    every = np.arange(count * batch)
    rows[every, places] = np.tile(np.asarray(_questions(jnp.asarray(asked))), (count, 1))
    segments = (np.arange(length)[None] <= places[:, None]).astype(np.int32)
    return np.asarray(_answer(*model, rows, segments))[every, places].reshape(count, batch)


def ridge_error(tokens: np.ndarray, asked: np.ndarray, truth: np.ndarray, times: np.ndarray) -> list[float]:
    """Squared error of the best linear answer (ridge regression with the true prior) after t pairs, mean over rows."""
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
    found = _ask(model, tokens, np.concatenate([times, times + 1]), asked)
    before, after = found[: len(times)], found[len(times) :]
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


def _measure(runs: Runs, settings: Settings) -> Result:
    pairs, steps, seeds = (settings[name] for name in ("pairs", "steps", "seeds"))
    rows = []
    for heads, depth in settings["shapes"]:
        for name in settings["memories"]:
            found = []
            for seed in range(seeds):
                model = train_regression(name, heads, depth, pairs=pairs, steps=steps, seed=seed)
                found.append(_test(model, pairs, settings["batch"], seed))
            rows.append(_row((name, heads, depth), found, pairs))
    title = (
        f"Trained {steps} steps on sequences of {pairs} pairs that never change; {seeds} seeds: mean, least and most"
    )
    values = {"pairs": pairs, "steps": steps, "seeds": seeds, "noise": NOISE, "inputs": INPUTS}
    return Result([Table(title, rows)], values)


def _row(label: tuple[str, int, int], runs: Sequence[dict], pairs: int) -> Row:
    times, (name, heads, depth) = _times(pairs), label
    slopes = _slopes(runs, times)
    row: dict[str, Any] = {"memory": name, "heads": heads, "depth": depth}
    for place in (0, len(times) - 1):
        excess = np.mean([run["excess"][place] for run in runs])
        ridge = np.mean([run["ridge"][place] for run in runs])
        row[f"error after {times[place]} pairs (best)"] = f"{excess:.3f} ({ridge:.3f})"
    band = f" ({_range(slopes)})" if len(slopes) > 1 else ""
    row["slope of moves"] = f"{np.mean(slopes):.2f}{band}"
    for number, change in enumerate(_changes(pairs)):
        row[f"recovery, change at {change}"] = _range([run["recovered"][number] for run in runs])
    return row


def _slopes(runs: Sequence[dict], times: np.ndarray) -> list[float]:
    return [slope(times, run["moves"]) for run in runs]


def _range(values: Sequence[float]) -> str:
    if np.isnan(values).any():
        return "never" if np.isnan(values).all() else f"{np.nanmin(values):.2f} to never"
    return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def _judge(result: Result) -> Verdict:
    deepest = max(row["depth"] for row in result.rows())
    rows = {row["memory"]: row for row in result.rows(depth=deepest)}
    slopes = {name: row["slope of moves"] for name, row in rows.items()}
    late = [column for column in rows["softmax"] if column.startswith("recovery")][-1]
    back = {name: row[late] for name, row in rows.items()}
    return Verdict(
        grade(min(numbers_in(slopes["softmax"])) > MOVES, "never" not in back["softmax"]),
        f"After training with 8 heads and 2 layers the slope of the moves is {slopes['softmax']} for softmax (1/t "
        f"has -1; needed of every seed: above {MOVES}) and {slopes['delta']} for the delta rule; after a change at 16 "
        f"pairs the seeds of softmax recover in {back['softmax']} pairs (needed: all do), those of the delta rule in "
        f"{back['delta']}.",
    )


def _draw(result: Result) -> Any:
    figure, axes = new_figure(1, 2, width=8.8, height=3.8)
    shapes = list(dict.fromkeys((row["heads"], row["depth"]) for row in result.rows()))
    names = list(dict.fromkeys(row["memory"] for row in result.rows()))
    error = [column for column in result.rows()[0] if column.startswith("error")][-1]
    series = {f"{h} head{'s' * (h > 1)}, depth {d}": result.rows(heads=h, depth=d) for h, d in shapes}
    slopes = {
        # mean, least, most
        name: [(numbers_in(row["slope of moves"]) * 3)[:3] for row in rows]
        for name, rows in series.items()
    }
    draw_bars(axes[0, 0], names, slopes)
    axes[0, 0].axhline(-1, label="1 / t", **DOTTED)
    axes[0, 0].set_ylabel("slope of |f(t+1) - f(t)|")
    draw_bars(axes[0, 1], names, {name: [numbers_in(row[error])[0] for row in rows] for name, rows in series.items()})
    axes[0, 1].set_ylabel(error.removesuffix(" (best)"))
    for axis in axes[0]:
        axis.tick_params(axis="x", labelsize=8)
    return figure


CONTEXT = Study(
    name="context",
    title="Regression in context, trained",
    claim="Heads, depth and training end the vanishing step of softmax attention: in models trained on linear "
    "regression in context its answers keep moving, and recover from a change in a time that does not grow with "
    "the pairs seen.",
    source="left open in arXiv 2505.19488, section 2.2.2",
    measure=_measure,
    judge=_judge,
    draw=_draw,
    caption="Left: slope of the moves of an answer on log axes (-1 is 1/t; mean of three seeds, least to "
    "greatest). Right: squared error after 32 pairs (the best linear answer has 0.001).",
    settings={
        "pairs": 32,
        "steps": 200,
        "seeds": 3,
        "batch": 64,
        "memories": tuple(MEMORIES),
        # heads and layers
        "shapes": ((1, 1), (8, 2)),
    },
    quick=Quick(
        settings={"pairs": 16, "steps": 100, "seeds": 1, "memories": ("softmax", "delta"), "shapes": ((8, 1),)}
    ),
)
