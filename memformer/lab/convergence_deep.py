"""Does the vanishing step of softmax attention vanish in models of many heads and layers? At random initialisation.

The stream of `memformer.lab.convergence` read by whole blocks (memory, feedforward layer, residuals): tokens are
Gaussian, and after t of them a probe, always the same, is answered. Its answer a_n(t) is the residual stream behind n
blocks, so that one stack gives every depth. Measured are the slope of log |a_n(t + 1) - a_n(t)| against log t, and the
time to recover: from step c on all tokens have another mean, and h(c) is when half of the way to the answer of a stream
that always had it is gone; its growth is log(h(64) / h(16)) / log 4, 1 where it is proportional to c.
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
from memformer.lab.study import Study, legend_below, new_figure
from memformer.models.config import LanguageModelConfig
from memformer.models.language_model import Block
from memformer.training.metrics import say
from memformer.training.plots import COLOURS

__all__ = ["MEMORIES", "halfway", "measure", "probe"]

WIDTH, DEPTH = 64, 4
# Name in `memformer.layers.memory.MEMORIES` and options; no memory knows positions, for a stream has no beginning.
MEMORIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "softmax": ("softmax_attention", {"rotary": False}),
    "linear": ("linear_attention", {}),
    "decay": ("linear_attention", {"decay": "log_sigmoid"}),
    "delta": ("delta_rule", {"conv_width": 0}),
    "deltaformer": ("deltaformer", {}),
}
CHANGES = (16, 64)
# Streams of one seed, and moves that are averaged at each time.
STREAMS, MOVES = 2, 4


@functools.partial(jax.jit, static_argnums=0)
def _block(graph: Any, params: Any, x: Array, segment_ids: Array) -> Array:
    return nnx.merge(graph, params)(x, None, None, segment_ids=segment_ids, positions=None)[0]


def probe(blocks: Sequence[tuple[Any, Any]], rows: np.ndarray, times: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """What a probe is answered behind each block after some of a stream, [blocks, R, D].

    Args:
      blocks: as `nnx.split` gives them.
      rows: streams, [R, T, D].
      times: tokens read before the probe, [R], below T.
      asked: the probes, [R, D].
    """
    place = np.arange(len(rows))
    x = rows.copy()
    x[place, times] = asked
    # what comes after the probe is padding
    segments = (np.arange(rows.shape[1])[None] <= times[:, None]).astype(np.int32)
    found = []
    for graph, params in blocks:
        x = _block(graph, params, x, segments)
        found.append(np.asarray(x)[place, times])
    return np.stack(found)


def halfway(offsets: np.ndarray, shares: np.ndarray) -> float:
    """When `shares` of the way first reaches 1/2, between offsets by the logarithm; nan for never.

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
    # as long as before on average
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


def measure(study: Study, *, quick: bool) -> None:
    """Slopes of the moves and recovery for stacks of 1 to 4 blocks of 1, 8 and 16 heads."""
    steps, seeds = (160, 2) if quick else (520, 6)
    head_counts = (8,) if quick else (1, 8, 16)
    names = ("softmax", "delta") if quick else tuple(MEMORIES)
    study.claim = (
        "Softmax attention moves by 1/t and recovers in a time proportional to t (2505.19488, section 2.2.2); whether "
        "many heads and layers end this is left open there."
    )
    found = {}
    for heads in head_counts:
        for name in names:
            found[name, heads] = [_one_seed(name, heads, seed, steps) for seed in range(seeds)]
        say(f"{heads} heads: done")
    times = _times(steps)
    rows, values = [], {}
    for (name, heads), runs in found.items():
        for depth in range(DEPTH):
            moves = np.array([run["moves"][depth] for run in runs])
            slopes = np.array([slope(times, one) for one in moves])
            pooled = slope(times, np.sqrt(np.mean(moves**2, axis=0)))
            back = np.array([run["recovered"][depth] for run in runs])
            growth = np.log(back[:, 1] / back[:, 0]) / math.log(CHANGES[1] / CHANGES[0])
            rows.append(
                {
                    "memory": name,
                    "heads": heads,
                    "depth": depth + 1,
                    "slope of moves": f"{pooled:.2f} ({slopes.min():.2f} to {slopes.max():.2f})",
                    **{f"recovery, change at {c}": _banded(back[:, i]) for i, c in enumerate(CHANGES)},
                    "growth of recovery": _banded(growth),
                }
            )
            values[f"{name}, {heads} heads, depth {depth + 1}"] = (round(pooled, 3), _median(growth))
    study.add_table(
        f"Blocks at random initialisation, t = {times[0]} to {times[-1]}: slope of the mean of {seeds} seeds, median "
        "for the rest (least to most of seeds)",
        rows,
    )
    study.values = {"width": WIDTH, "steps": steps, "slope and growth": values}
    study.outcome = _outcome(names, values)
    _draw(study, found, names, head_counts, times)


def _median(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else round(float(np.nanmedian(values)), 3)


def _banded(values: np.ndarray) -> str:
    kept = values[~np.isnan(values)]
    if not len(kept):
        return "never"
    missing = f", {len(values) - len(kept)} never" if len(kept) < len(values) else ""
    return f"{np.median(kept):.2f} ({kept.min():.2f} to {kept.max():.2f}{missing})"


def _outcome(names: Sequence[str], values: Mapping[str, tuple[float | None, float | None]]) -> str:
    parts = []
    for name in names:
        mine = [pair for label, pair in values.items() if label.startswith(f"{name}, ")]
        slopes = [pair[0] for pair in mine if pair[0] is not None]
        growths = [pair[1] for pair in mine if pair[1] is not None]
        said = f"{name} {min(slopes):.2f} to {max(slopes):.2f}"
        parts.append(
            said + (f" (growth {min(growths):.2f} to {max(growths):.2f})" if growths else " (never recovered)")
        )
    softmax = [pair[0] for label, pair in values.items() if label.startswith("softmax, ") and pair[0] is not None]
    verdict = "stays" if max(softmax) < -0.8 else "weakens" if max(softmax) < -0.3 else "ends"
    return (
        "Slopes of the moves over all depths and heads (growth of the time to recover): "
        + ", ".join(parts)
        + f". The 1/t of softmax {verdict} in deep models of many heads at initialisation."
    )


def _draw(study: Study, found: dict, names: Sequence[str], head_counts: Sequence[int], times: np.ndarray) -> None:
    figure, axes = new_figure(1, len(head_counts), width=3.6 * len(head_counts) + 0.6, height=3.9)
    for axis, heads in zip(axes[0], head_counts, strict=True):
        for colour, name in zip(COLOURS, names, strict=False):
            moves = np.array([run["moves"] for run in found[name, heads]])
            for depth, style in ((0, "-"), (DEPTH - 1, "--")):
                low, middle, high = np.quantile(moves[:, depth], (0, 0.5, 1), axis=0)
                axis.plot(times, middle, style, color=colour, label=f"{name}, depth {depth + 1}", linewidth=1.4)
                axis.fill_between(times, low, high, color=colour, alpha=0.12, linewidth=0)
        start = 2 * float(np.median([run["moves"][0, 0] for run in found["softmax", heads]]))
        axis.plot(times, start * times[0] / times, ":", color="0.3", label="1 / t")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("tokens read, t")
        axis.set_title(f"{heads} head{'s' if heads > 1 else ''}")
    axes[0, 0].set_ylabel("|a(t + 1) - a(t)|")
    legend_below(figure, axes[0, 0], columns=4, fontsize="small")
    study.save_figure(
        figure,
        "moves",
        "How far the answer to a probe moves with one more token, behind one block (lines) and four (dashes), bands "
        "least to most of seeds. Claim under test: softmax's step vanishes as 1/t; do heads and depth end that?",
    )
