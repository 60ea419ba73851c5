"""How a memory's answer moves as the context grows: does it settle, and does it follow when the world changes?

A fixed query q reads a stream of pairs v_t = W k_t + noise at every step; o_t is what the memory answers then. Softmax
attention is an update with a vanishing step (arXiv 2505.19488, section 2.2.2):

    o_t = o_(t-1) + (kappa_t / Z_t)(v_t - o_(t-1)),    kappa_t / Z_t ~ 1 / t

so |o_t - o_(t-1)| falls as 1 / t and |o_t - o_inf| as 1 / sqrt t. For k ~ N(0, I) and kappa = exp(s q . k) the limit is
o_inf = W s q, since the keys that count are then distributed as N(s q, I).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memformer.core.numerics import l2norm
from memformer.core.similarity import Kernel
from memformer.core.types import Array
from memformer.lab.study import Study, new_figure
from memformer.ops.delta_rule import delta_rule
from memformer.ops.deltaformer import deltaformer
from memformer.ops.linear_attention import linear_attention
from memformer.ops.softmax_attention import softmax_attention
from memformer.training.metrics import say
from memformer.training.plots import COLOURS

__all__ = ["READERS", "Reader", "answers", "measure", "recovery", "slope"]

# Width of all heads together, and of what is answered.
WIDTH = 64
NOISE = 0.1
DECAY = -0.02
BETA = 0.2


@dataclasses.dataclass(frozen=True)
class Reader:
    """A memory as a function of queries, keys and values [B, T, H, K].

    Attributes:
      read: the op.
      unit: keys and queries have length 1.
    """

    read: Callable[[Array, Array, Array], Array]
    unit: bool = False


def _positive(x: Array) -> Array:
    return jax.nn.elu(x) + jnp.ones_like(x)


def _constant(like: Array, value: float) -> Array:
    return jnp.full(like.shape[:-1], value, like.dtype)


def _sharp(width: int) -> Kernel:
    """Softmax on unit keys with the spread of scores that Gaussian keys have at the usual scale."""
    return Kernel("softmax", scale=math.sqrt(width))


READERS: dict[str, Reader] = {
    "softmax": Reader(lambda q, k, v: softmax_attention(q, k, v)[0]),
    "linear": Reader(lambda q, k, v: linear_attention(_positive(q), _positive(k), v, normalize=True)[0]),
    "decay": Reader(
        lambda q, k, v: linear_attention(_positive(q), _positive(k), v, normalize=True, decay=_constant(k, DECAY))[0]
    ),
    "delta": Reader(lambda q, k, v: delta_rule(q, k, v, _constant(k, BETA), scale=1.0)[0], unit=True),
    "deltaformer": Reader(
        lambda q, k, v: deltaformer(
            q,
            k,
            v,
            beta=_constant(k, BETA),
            write_kernel="linear",
            read_kernel=Kernel("softmax", math.sqrt(k.shape[-1])),
        )[0],
        unit=True,
    ),
}


def _stream(seed: int, steps: int, heads: int, batch: int, change: int | None, *, unit: bool) -> tuple[Array, ...]:
    """(q, k [B, T, H, K], v [B, T, H, V], maps [2, B, H, K, V]); W is the second map from step `change` on."""
    width = WIDTH // heads
    keys = jax.random.split(jax.random.key(seed), 4)
    k = jax.random.normal(keys[0], (batch, steps, heads, width))
    q = jnp.broadcast_to(jax.random.normal(keys[1], (batch, 1, heads, width)), k.shape)
    if unit:
        k, q = l2norm(k), l2norm(q)
    maps = jax.random.normal(keys[2], (2, batch, heads, width, width)) / math.sqrt(width)
    late = jnp.arange(steps) >= (steps if change is None else change)
    before, after = (jnp.einsum("bthk,bhkv->bthv", k, w) for w in maps)
    v = jnp.where(late[:, None, None], after, before)
    return q, k, v + NOISE * jax.random.normal(keys[3], v.shape), maps


def answers(name: str, *, steps: int, heads: int, batch: int, change: int | None = None, seed: int = 0) -> np.ndarray:
    """What a fixed query is answered after each step, [B, T, heads * V].

    Args:
      name: a key of `READERS`.
      steps: T.
      heads: the width of 64 is divided among them.
      batch: independent streams.
      change: step from which values follow another map; None for never.
      seed: of the streams.

    Example:
      >>> answers("delta", steps=8, heads=4, batch=2).shape
      (2, 8, 64)
    """
    reader = READERS[name]
    q, k, v, _ = _stream(seed, steps, heads, batch, change, unit=reader.unit)
    return np.asarray(jax.jit(reader.read)(q, k, v)).reshape(batch, steps, WIDTH)


def slope(times: np.ndarray, sizes: np.ndarray) -> float:
    """d log size / d log time, by least squares."""
    return float(np.polyfit(np.log(times), np.log(sizes), 1)[0])


def _moves(outputs: np.ndarray) -> np.ndarray:
    """Root mean square of |o_t - o_(t-1)| over streams, [T - 1]."""
    return np.sqrt(np.mean(np.sum(np.diff(outputs, axis=1) ** 2, axis=2), axis=0))


def recovery(name: str, change: int, *, steps: int, heads: int, batch: int, seed: int = 0) -> int | None:
    """Steps after a change of the map at `change` until half of the way to the new answer is gone.

    Old and new answer are those of streams that never change, averaged over the streams' last half.

    Returns:
      Steps, or None where those up to `steps` are not enough.
    """
    moved = answers(name, steps=steps, heads=heads, batch=batch, change=change, seed=seed)
    old = moved[:, change // 2 : change].mean(axis=1)
    new = answers(name, steps=steps, heads=heads, batch=batch, change=0, seed=seed)[:, steps // 2 :].mean(axis=1)
    direction = new - old
    share = np.einsum("btv,bv->bt", moved[:, change:] - old[:, None], direction) / np.sum(direction**2, 1)[:, None]
    reached = np.median(share, axis=0) >= 0.5
    return int(np.argmax(reached)) + 1 if reached.any() else None


def measure(study: Study, *, quick: bool) -> None:
    """Moves, distance to the limit and recovery, by memory and number of heads."""
    steps, batch = (512, 8) if quick else (4096, 32)
    head_counts = (1,) if quick else (1, 8, 16)
    changes = (32, 64, 128) if quick else (32, 64, 128, 256, 512, 1024)
    study.claim = (
        "Softmax attention's step vanishes as 1/t and its answer settles as 1/sqrt t, so that after a change of the "
        "map at time t it recovers in a time that grows with t; memories with a decay or with the delta rule at "
        "constant beta keep moving and recover in a constant time (2505.19488, section 2.2.2)."
    )
    times = np.arange(steps // 16, steps)
    curves, rows = {}, []
    for heads in head_counts:
        for name in READERS:
            outputs = answers(name, steps=steps, heads=heads, batch=batch)
            moves = _moves(outputs)
            curves[name, heads] = moves
            back = [recovery(name, change, steps=steps, heads=heads, batch=batch) for change in changes]
            row: dict = {"memory": name, "heads": heads, "slope of moves": round(slope(times, moves[times - 1]), 2)}
            for change, taken in zip(changes, back, strict=True):
                row[f"recovery, change at {change}"] = "never" if taken is None else taken
            rows.append(row)
        say(f"{heads} heads: done")
    study.add_table(f"Slope of log |o_t - o_(t-1)| against log t to t = {steps}, and steps to recover half", rows)
    limits = [_settling(heads, steps, batch) for heads in head_counts]
    study.add_table("Softmax: slope of log |o_t - o_inf| against log t", limits)
    first, last = changes[0], changes[-1]
    by_name = {row["memory"]: row for row in rows if row["heads"] == head_counts[0]}
    study.outcome = (
        "Slopes of the moves with one head: "
        + ", ".join(f"{name} {row['slope of moves']}" for name, row in by_name.items())
        + f"; softmax's distance to its limit falls with slope {limits[0]['slope']}. Steps to recover half after a "
        f"change at {first} and {last}: "
        + ", ".join(
            f"{name} {row[f'recovery, change at {first}']} and {row[f'recovery, change at {last}']}"
            for name, row in by_name.items()
        )
        + "."
    )
    study.values = {"steps": steps, "streams": batch, "width": WIDTH, "beta": BETA, "decay": DECAY, "noise": NOISE}
    _draw(study, curves, rows, changes, head_counts)


def _settling(heads: int, steps: int, batch: int) -> dict:
    """Distance of softmax's answer to W s q, with s = 1 / sqrt K."""
    q, _, _, maps = _stream(0, steps, heads, batch, None, unit=False)
    limit = jnp.einsum("bhk,bhkv->bhv", q[:, 0] / math.sqrt(WIDTH // heads), maps[0]).reshape(batch, 1, WIDTH)
    outputs = answers("softmax", steps=steps, heads=heads, batch=batch) - np.asarray(limit)
    distance = np.sqrt(np.mean(np.sum(outputs**2, axis=2), axis=0))
    times = np.arange(steps // 16, steps)
    return {"heads": heads, "slope": round(slope(times, distance[times - 1]), 2)}


def _draw(study: Study, curves: dict, rows: list[dict], changes: Sequence[int], head_counts: Sequence[int]) -> None:
    figure, axes = new_figure(1, 2, width=9.0, height=3.6)
    left, right = axes[0]
    for colour, name in zip(COLOURS, READERS, strict=False):
        for heads, style in zip(head_counts, ("-", "--", ":"), strict=False):
            moves = curves[name, heads]
            # means over windows that grow with time: a line that can be read
            edges = np.unique(np.geomspace(4, len(moves), 30).astype(int))
            means = [moves[a:b].mean() for a, b in zip(edges[:-1], edges[1:], strict=True)]
            label = name if heads == head_counts[0] else None
            left.plot(np.sqrt(edges[:-1] * edges[1:]), means, style, color=colour, label=label, linewidth=1.4)
        row = next(row for row in rows if row["memory"] == name and row["heads"] == head_counts[0])
        taken = [row[f"recovery, change at {change}"] for change in changes]
        right.plot(
            changes, [math.nan if n == "never" else n for n in taken], "o-", color=colour, label=name, markersize=4
        )
    left.set_ylabel("|o_t - o_(t-1)|, root mean square")
    left.set_xlabel("time t, pairs read")
    right.set_ylabel("steps to recover half")
    right.set_xlabel("time of the change, pairs read")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    right.legend(frameon=False, fontsize="small")
    study.save_figure(
        figure,
        "moves",
        "Left: how far an answer moves at each pair read ("
        + ", ".join(
            f"{style} {heads} heads" for heads, style in zip(head_counts, ("line:", "dashes:", "dots:"), strict=False)
        )
        + "). Right: steps after a change of the map until half of the way to the new answer is gone, one head; never "
        "before the stream ends is left out. Claim: softmax settles as 1/t and recovers ever more "
        "slowly, decay and delta keep moving.",
    )
