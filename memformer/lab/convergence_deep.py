"""The vanishing step of softmax attention in models of many heads and layers, at random initialisation.

The stream of `memformer.lab.convergence` read by whole blocks (memory, feedforward layer, residuals): tokens are
Gaussian, and after t of them a fixed probe is answered. Its answer a_n(t) is the residual stream after n blocks, so
that one stack gives every depth. Measured are the slope of log |a_n(t + 1) - a_n(t)| against log t, and the time to
recover: from step c on all tokens have another mean, and h(c) is the time until the answer is halfway to that of a
stream that always had it; its growth is log(h(64) / h(16)) / log 4, 1 where it is proportional to c.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from memformer.core.types import Array
from memformer.lab.convergence import slope
from memformer.lab.plots import Lines
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade
from memformer.models.config import LanguageModelConfig
from memformer.models.language_model import Block
from memformer.training.metrics import log

__all__ = ["CONVERGENCE_DEEP", "MEMORIES", "halfway", "probe"]

WIDTH, DEPTH = 64, 4
# Name in `memformer.layers.table.MEMORIES` and options; no memory has positions, for a stream has no beginning.
MEMORIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "softmax": ("softmax_attention", {"rotary": False}),
    "linear": ("linear_attention", {}),
    "decay": ("linear_attention", {"decay": "log_sigmoid"}),
    "delta": ("delta_rule", {"conv_width": 0}),
    "deltaformer": ("deltaformer", {}),
}
CHANGES = (16, 64)
# Streams per seed, and moves averaged at each time.
STREAMS, MOVES = 2, 4


@functools.partial(jax.jit, static_argnums=0)
def _block(graph: Any, params: Any, x: Array, segment_ids: Array) -> Array:
    return nnx.merge(graph, params)(x, None, None, segment_ids=segment_ids, positions=None)[0]


def probe(blocks: Sequence[tuple[Any, Any]], rows: np.ndarray, times: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Answers to a probe after each block and part of a stream, [blocks, R, D].

    Args:
      blocks: as `nnx.split` gives them.
      rows: streams, [R, T, D].
      times: tokens read before the probe, [R], below T.
      asked: the probes, [R, D].
    """
    place = np.arange(len(rows))
    x = rows.copy()
    x[place, times] = asked
    # tokens after the probe are padding
    segments = (np.arange(rows.shape[1])[None] <= times[:, None]).astype(np.int32)
    found = []
    for graph, params in blocks:
        x = _block(graph, params, x, segments)
        found.append(np.asarray(x)[place, times])
    return np.stack(found)


def halfway(offsets: np.ndarray, shares: np.ndarray) -> float:
    """Offset where `shares` first reaches 1/2, interpolated on a log scale; nan for never.

    Example:
      >>> round(float(halfway(np.array([1, 4, 16]), np.array([0.0, 0.25, 0.75]))), 6)
      8.0
    """
    reached = np.flatnonzero(shares >= 0.5)
    if not len(reached):
        return math.nan
    last = reached[0]
    if last == 0:
        return float(offsets[0])
    part = (0.5 - shares[last - 1]) / (shares[last] - shares[last - 1])
    return float(np.exp(np.interp(part, (0, 1), np.log(offsets[last - 1 : last + 1]))))


def _stack(name: str, heads: int, seed: int) -> list[tuple[Any, Any]]:
    memory, options = MEMORIES[name]
    config = LanguageModelConfig(
        memory=memory, memory_options=options, width=WIDTH, heads=heads, depth=DEPTH, feedforward="mlp"
    )
    return [nnx.split(Block(config, memory, rngs=nnx.Rngs(seed * DEPTH + i))) for i in range(DEPTH)]


def _one_seed(name: str, heads: int, seed: int, steps: int) -> dict[str, np.ndarray]:
    """Moves [depth, times], and steps to recover [depth, changes], of streams through one stack."""
    rng = np.random.default_rng(seed)
    stream = rng.standard_normal((STREAMS, steps, WIDTH), np.float32)
    asked = rng.standard_normal((STREAMS, WIDTH), np.float32)
    # the same length as before on average
    moved = ((stream + rng.standard_normal((STREAMS, 1, WIDTH), np.float32)) / math.sqrt(2)).astype(np.float32)
    times = _times(steps)
    offsets = 2 ** np.arange(int(math.log2(steps - 1 - CHANGES[-1])) + 1)
    rows: list[np.ndarray] = []
    at: list[int] = []
    for one, other in zip(stream, moved, strict=True):
        for time in times:
            rows += [one] * (MOVES + 1)
            at += range(time, time + MOVES + 1)
        for change in CHANGES:
            late = np.where(np.arange(steps)[:, None] >= change, other, one)
            rows += [late] * (1 + len(offsets))
            at += [change, *(change + offsets)]
        rows.append(other)
        at.append(steps - 1)
    each = len(rows) // STREAMS
    answers = probe(_stack(name, heads, seed), np.stack(rows), np.array(at), np.repeat(asked, each, axis=0))
    answers = answers.reshape(DEPTH, STREAMS, each, WIDTH)
    settled = (MOVES + 1) * len(times)
    near = answers[:, :, :settled].reshape(DEPTH, STREAMS, len(times), MOVES + 1, WIDTH)
    moves = np.sqrt(np.mean(np.sum(np.diff(near, axis=3) ** 2, axis=-1), axis=(1, 3)))
    new, recovered = answers[:, :, -1:], np.full((DEPTH, len(CHANGES)), math.nan)
    for number in range(len(CHANGES)):
        first = settled + number * (1 + len(offsets))
        old, after = answers[:, :, first : first + 1], answers[:, :, first + 1 : first + 1 + len(offsets)]
        way = new - old
        shares = np.sum((after - old) * way, axis=(1, 3)) / np.sum(way**2, axis=(1, 3))
        recovered[:, number] = [halfway(offsets, share) for share in shares]
    return {"moves": moves, "recovered": recovered}


def _times(steps: int) -> np.ndarray:
    return 2 ** np.arange(4, int(math.log2(steps - MOVES - 1)) + 1)


def _measure(runs: Runs, settings: Settings) -> Result:
    steps, seeds = settings["steps"], settings["seeds"]
    times, rows, values = _times(steps), [], {}
    for heads in settings["heads"]:
        for name in settings["memories"]:
            found = [_one_seed(name, heads, seed, steps) for seed in range(seeds)]
            for depth in range(DEPTH):
                row, pair = _row(name, heads, depth, found, times)
                rows.append(row)
                values[f"{name}, {heads} heads, depth {depth + 1}"] = pair
        log(f"{heads} heads: done")
    title = (
        f"Blocks at random initialisation, t = {times[0]} to {times[-1]}: slope of the mean of {seeds} seeds, median "
        "for the rest (least to most of seeds)"
    )
    return Result([Table(title, rows)], {"width": WIDTH, "steps": steps, "slope and growth": values})


def _row(
    name: str, heads: int, depth: int, found: Sequence[Mapping[str, np.ndarray]], times: np.ndarray
) -> tuple[Row, tuple[float, float | None]]:
    """The row of one depth, and (slope, median growth)."""
    moves = np.array([run["moves"][depth] for run in found])
    slopes = np.array([slope(times, one) for one in moves])
    pooled = slope(times, np.sqrt(np.mean(moves**2, axis=0)))
    back = np.array([run["recovered"][depth] for run in found])
    growth = np.log(back[:, 1] / back[:, 0]) / math.log(CHANGES[1] / CHANGES[0])
    row = {
        "memory": name,
        "heads": heads,
        "depth": depth + 1,
        "slope of moves": f"{pooled:.2f} ({slopes.min():.2f} to {slopes.max():.2f})",
        **{f"recovery, change at {c}": _banded(back[:, i]) for i, c in enumerate(CHANGES)},
        "growth of recovery": _banded(growth),
    }
    return row, (round(pooled, 3), _median(growth))


def _median(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else round(float(np.nanmedian(values)), 3)


def _banded(values: np.ndarray) -> str:
    kept = values[~np.isnan(values)]
    if not len(kept):
        return "never"
    missing = f", {len(values) - len(kept)} never" if len(kept) < len(values) else ""
    return f"{np.median(kept):.2f} ({kept.min():.2f} to {kept.max():.2f}{missing})"


def _judge(result: Result) -> Verdict:
    found = {name: pair for name, pair in result.values["slope and growth"].items() if name.startswith("softmax,")}
    slopes = [pair[0] for pair in found.values()]
    growths = [pair[1] for pair in found.values() if pair[1] is not None]
    return Verdict(
        grade(max(slopes) < -0.8, min(growths) > 0.7),
        f"At initialisation, with 1 to 16 heads and 1 to 4 layers, the slope of softmax lies between {min(slopes):.2f} "
        f"and {max(slopes):.2f} (1/t has -1), and its recovery grows with exponent {min(growths):.2f} to "
        f"{max(growths):.2f}.",
    )


def _summary(result: Result) -> list[Row]:
    """Slope and growth of the shallowest and the deepest model of each memory, most heads."""
    heads = max(row["heads"] for row in result.rows())
    rows = [row for row in result.rows(heads=heads) if row["depth"] in (1, DEPTH)]
    return [
        {name: row[name] for name in ("memory", "heads", "depth", "slope of moves", "growth of recovery")}
        for row in rows
    ]


CONVERGENCE_DEEP = Study(
    name="convergence_deep",
    title="Convergence in deep models, untrained",
    claim="The vanishing step of softmax attention, moves by 1/t and recovery in a time proportional to t, survives "
    "many heads and layers.",
    source="left open in arXiv 2505.19488, section 2.2.2",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="memory",
        points="depth",
        value="slope of moves",
        panel=lambda row: f"{row['heads']} head{'s' * (row['heads'] > 1)}",
        x="depth",
        y="slope of |a(t+1) - a(t)|",
        level=-1.0,
        level_label="1 / t",
        limits=(-1.3, 0.1),
        width=3.0,
    ),
    caption="Slope of the moves of a probe's answer on log axes by depth; bands: least to most of the seeds.",
    settings={"steps": 520, "seeds": 6, "heads": (1, 8, 16), "memories": tuple(MEMORIES)},
    quick=Quick(settings={"steps": 160, "seeds": 2, "heads": (8,), "memories": ("softmax", "delta")}),
    summary=_summary,
)
