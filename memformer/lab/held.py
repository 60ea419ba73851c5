"""The contents of each memory after the same 64 writes: a picture of sums, erasing and forgetting, without training.

48 random unit keys of width 64 are written once each, then the first 16 again with new values. The value of write i is
the i-th unit vector of 64, so that a read is its own answer to "how much of which write?". After the last write every
key is read. A memory is its row of `memformer.layers.table.MEMORIES` with fixed gates: it writes and erases in full,
and forgets with a half-life of 32 writes (per channel: from 8 to 128). Queries of a softmax are K times as long, so
that a key that matches has a logit of sqrt(K) = 8.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memformer.lab.plots import new_figure
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade
from memformer.ops.delta_rule import delta_rule
from memformer.ops.deltaformer import deltaformer
from memformer.ops.linear_attention import linear_attention
from memformer.ops.log_linear_attention import log_linear_attention
from memformer.ops.mesa import mesa
from memformer.ops.softmax_attention import softmax_attention
from memformer.training.plots import COLOURS

__all__ = ["HELD", "HOLDERS", "Holder", "held"]

WRITES, REPLACED, WIDTH = 64, 16, 64
HALF_LIFE, HALF_LIVES = 32, (8, 128)
RIDGE = 0.1
# Of the log-linear memory: a block of the past weighs half as much as one four times as young.
LEVELS = 2.0 ** (-np.arange(8) / 2)


@dataclasses.dataclass(frozen=True)
class Holder:
    """A memory under test.

    Attributes:
      kind: of its update.
      read: op on (q, k, v, forget), arrays [B, T, 1, K], and [B, T, 1] log decays -> (output, state).
    """

    kind: str
    read: Callable[[Any, Any, Any, Any], Any]


def _ones(q: jax.Array) -> jax.Array:
    return jnp.ones(q.shape[:3], q.dtype)


def _channels(q: jax.Array) -> jax.Array:
    """Log decays per channel, from the shortest half-life to the longest."""
    return jnp.broadcast_to(-math.log(2) / jnp.geomspace(*HALF_LIVES, q.shape[-1]), q.shape).astype(q.dtype)


def _levels(q: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(LEVELS, q.dtype), (*q.shape[:3], len(LEVELS)))


def _sum(q, k, v, decay=None):
    return linear_attention(q, k, v, decay=decay, scale=1.0)


def _delta(q, k, v, decay=None):
    return delta_rule(q, k, v, _ones(q), decay=decay, scale=1.0)


def _softmax(q, k, v, decay=None):
    return softmax_attention(q * q.shape[-1], k, v, decay=decay)


def _deltaformer(q, k, v, decay=None):
    return deltaformer(q * q.shape[-1], k, v, decay=decay, write_kernel="linear")


def _rounded(q, k, v):
    """Keys that match a little count as not matching at all."""
    return deltaformer(q, k, v, write_kernel="round", read_kernel="round")


SUMS, ERASING, CACHES = "matrices: sums", "matrices: erase", "caches"
HOLDERS: Mapping[str, Holder] = {
    "linear attention": Holder(SUMS, lambda q, k, v, g: _sum(q, k, v)),
    "with decay (RetNet, Mamba-2)": Holder(SUMS, _sum),
    "decay per channel (GLA)": Holder(SUMS, lambda q, k, v, g: _sum(q, k, v, _channels(q))),
    "log-linear attention": Holder(SUMS, lambda q, k, v, g: log_linear_attention(q, k, v, _levels(q), scale=1.0)),
    "Mesa (least squares)": Holder(SUMS, lambda q, k, v, g: mesa(q, k, v, _ones(q), RIDGE + 0 * q, scale=1.0)),
    "delta rule": Holder(ERASING, lambda q, k, v, g: _delta(q, k, v)),
    "gated delta rule": Holder(ERASING, _delta),
    "decay per channel (KDA)": Holder(ERASING, lambda q, k, v, g: _delta(q, k, v, _channels(q))),
    "softmax attention": Holder(CACHES, lambda q, k, v, g: _softmax(q, k, v)),
    "Forgetting Transformer": Holder(CACHES, _softmax),
    "DeltaFormer": Holder(CACHES, lambda q, k, v, g: _deltaformer(q, k, v)),
    "gated DeltaFormer": Holder(CACHES, _deltaformer),
    "DeltaFormer, round kernel": Holder(CACHES, lambda q, k, v, g: _rounded(q, k, v)),
}


def held(name: str, *, writes: int = WRITES, replaced: int = REPLACED, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """The share of each write in what is read at the key of each write, after the last one: [writes, writes].

    Args:
      name: in `HOLDERS`.
      writes: T; the last `replaced` of them write to the keys of the first.
      replaced: number of keys that are written twice.
      width: K.
      seed: of the keys.

    Example:
      >>> np.diag(held("delta rule", writes=4, replaced=1, width=256)).round(1) + 0.0
      array([0., 1., 1., 1.], dtype=float32)
    """
    keys = np.random.default_rng(seed).standard_normal((writes - replaced, width))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    keys = np.concatenate([keys, keys[:replaced]]).astype(np.float32)
    # one row of the batch for each key that is read: by the query of the last token
    k = np.broadcast_to(keys[None, :, None], (writes, writes, 1, width))
    v = np.broadcast_to(np.eye(writes, dtype=np.float32)[None, :, None], (writes, writes, 1, writes))
    q = np.broadcast_to(keys[:, None, None], k.shape)
    decay = np.full(k.shape[:3], -math.log(2) / HALF_LIFE, np.float32)
    read = jax.jit(lambda *x: HOLDERS[name].read(*x)[0][:, -1, 0])
    return np.asarray(read(*(jnp.asarray(x) for x in (q, k, v, decay))))


def _measure(runs: Runs, settings: Settings) -> Result:
    writes, replaced = settings["writes"], settings["replaced"]
    rows: list[Row] = []
    values: dict[str, list[float]] = {}
    for name in settings["memories"]:
        shares = held(name, writes=writes, replaced=replaced)
        own, current = np.diag(shares), np.arange(replaced, writes)
        wrong = (shares - np.eye(writes))[current]
        quarter = (writes - 2 * replaced) // 4
        parts = {
            "replaced values": own[:replaced],
            "written once, oldest quarter": own[replaced : replaced + quarter],
            "written once, newest quarter": own[writes - replaced - quarter : writes - replaced],
            "new values": own[writes - replaced :],
        }
        means = {part: round(float(part_values.mean()), 3) + 0.0 for part, part_values in parts.items()}
        error = round(float(np.sqrt(np.mean(np.sum(wrong**2, axis=1)))), 3)
        rows.append({"memory": name, "kind": HOLDERS[name].kind, **means, "error": error})
        values[name] = [round(float(value), 3) + 0.0 for value in own]
    title = f"Share of the value of a write that is read at its key after {writes} writes, and the error of a read"
    return Result([Table(title, rows)], values)


def _judge(result: Result) -> Verdict:
    found = {row["memory"]: row for row in result.rows()}
    old = {name: row["replaced values"] for name, row in found.items()}
    matrices = [name for name in found if found[name]["kind"] == ERASING]
    fading = ("with decay (RetNet, Mamba-2)", "gated delta rule", "Forgetting Transformer", "gated DeltaFormer")
    first, last = "written once, oldest quarter", "written once, newest quarter"
    faded = {name: found[name][first] / found[name][last] for name in fading}
    error = {name: row["error"] for name, row in found.items()}
    replaced = max(abs(old[name]) for name in matrices)
    return Verdict(
        grade(
            old["linear attention"] > 0.9 and 0.4 < old["softmax attention"] < 0.6,
            max(replaced, old["DeltaFormer"], old["gated DeltaFormer"]) < 0.15,
            max(faded.values()) < 0.8,
            error["DeltaFormer"] == min(value for name, value in error.items() if "round" not in name),
        ),
        f"Of a replaced value linear attention reads {old['linear attention']:.2f}, softmax attention "
        f"{old['softmax attention']:.2f}, matrices that erase at most {replaced:.2f}, DeltaFormer "
        f"{old['DeltaFormer']:.2f}: what it wrote last is the difference to the value before, and a softmax read of "
        f"two equal keys is the mean of both writes. With a half-life of 32 writes the oldest values have "
        f"{min(faded.values()):.2f} to {max(faded.values()):.2f} of the share of those 24 writes newer. Error of a "
        f"read: linear attention {error['linear attention']:.2f}, delta rule {error['delta rule']:.2f}, softmax "
        f"attention {error['softmax attention']:.2f}, DeltaFormer {error['DeltaFormer']:.2f}, with the round kernel "
        f"{error['DeltaFormer, round kernel']:.2f}.",
    )


def _draw(result: Result) -> Any:
    """A row of 64 cells per memory, and the error of its reads."""
    rows = result.rows()
    names, writes = [row["memory"] for row in rows], len(next(iter(result.values.values())))
    replaced = writes // 4
    figure, axes = new_figure(1, 2, width=9.0, height=1.6 + 0.3 * len(rows))
    cells, bars = axes[0]
    grid = axes[0, 0].get_gridspec()
    grid.set_width_ratios([4, 1])
    image = cells.imshow(
        np.array([result.values[name] for name in names]),
        cmap="Blues",
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="none",
        extent=(0.5, writes + 0.5, len(rows) - 0.5, -0.5),
    )
    cells.set_yticks(range(len(rows)), names)
    cells.set_xticks([1, *(n * replaced for n in range(1, 5))])
    cells.set_xlabel("write, oldest to newest")
    sections = (
        "value replaced later\n(should be white)",
        "written once\n(should be dark)",
        "the new values\n(should be dark)",
    )
    starts = (0, replaced, writes - replaced, writes)
    for text, start, end in zip(sections, starts[:-1], starts[1:], strict=True):
        cells.text((start + end + 1) / 2, -0.75, text, ha="center", va="bottom", fontsize=9)
    for place in starts[1:-1]:
        cells.axvline(place + 0.5, color="0.3", linewidth=1)
    kinds = [row["kind"] for row in rows]
    for number in range(len(rows)):
        edge = number and kinds[number] != kinds[number - 1]
        for axis in (cells, bars):
            axis.axhline(number - 0.5, color="0.3" if edge else "white", linewidth=1 if edge else 3)
    bars.barh(range(len(rows)), [row["error"] for row in rows], 0.6, color=COLOURS[1])
    for kind in dict.fromkeys(kinds):
        middle = kinds.index(kind) + (kinds.count(kind) - 1) / 2
        upright: dict[str, Any] = {"transform": bars.get_yaxis_transform(), "rotation": 270, "va": "center"}
        bars.text(1.04, middle, kind, fontsize=8, color="0.3", **upright)
    bars.set_ylim(len(rows) - 0.5, -0.5)
    bars.set_xticks([0.5, 1])
    bars.set_yticks([])
    bars.set_xlabel("error of a read\n(0: the value itself)")
    for axis in (cells, bars):
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    figure.colorbar(
        image, ax=cells, location="bottom", shrink=0.6, aspect=40, label="share of the value that is read at its key"
    )
    return figure


HELD = Study(
    name="held",
    title="What a memory holds",
    claim="A sum holds a replaced value like any other, and softmax attention reads the mean of both; what erases "
    "holds the new one alone. A decay lets all values fade with age, also those that nothing replaced. What a matrix "
    "cannot hold apart is an error of each read, which is least where a cache erases (DeltaFormer).",
    source="arXiv 2406.06484; 2412.06464; 2503.02130; 2505.19488",
    measure=_measure,
    judge=_judge,
    draw=_draw,
    caption="Share of the value of each of 64 writes that is read at its key after the last one; the first 16 keys are "
    "written again at the end. Error: distance of a read from the current value, root mean square.",
    settings={"writes": WRITES, "replaced": REPLACED, "memories": tuple(HOLDERS)},
    quick=Quick(
        settings={"writes": 16, "replaced": 4, "memories": ("linear attention", "delta rule", "softmax attention")}
    ),
)
