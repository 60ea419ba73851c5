"""Convergence of a memory's answer as the context grows, and its recovery after a change of the map.

A fixed query q reads a stream of pairs v_t = W k_t + noise at every step; o_t is the answer. Softmax attention is an
update with a vanishing step (arXiv 2505.19488, section 2.2.2):

    o_t = o_(t-1) + (kappa_t / Z_t)(v_t - o_(t-1)),    kappa_t / Z_t ~ 1 / t

so |o_t - o_(t-1)| falls as 1 / t and |o_t - o_inf| as 1 / sqrt t. For k ~ N(0, I) and kappa = exp(s q . k) the limit is
o_inf = W s q, since the keys that count are then distributed as N(s q, I).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memformer.core.numerics import l2norm
from memformer.core.similarity import Kernel
from memformer.core.types import Array
from memformer.lab.plots import draw_bars, draw_lines, new_figure
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade
from memformer.ops.delta_rule import delta_rule
from memformer.ops.deltaformer import deltaformer
from memformer.ops.linear_attention import linear_attention
from memformer.ops.softmax_attention import softmax_attention
from memformer.training.metrics import log

__all__ = ["CONVERGENCE", "READERS", "Reader", "answers", "recovery", "slope"]

# Width of all heads together, and of the answer.
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
    """Answers to a fixed query after each step, [B, T, heads * V].

    Args:
      name: a key of `READERS`.
      steps: T.
      heads: the width of 64 is divided among them.
      batch: independent streams.
      change: step from which values follow another map; None for never.
      seed: of the streams.
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
    """Steps after a change of the map until the answer is halfway to the new one.

    Old and new answer are those of streams that never change, averaged over the last half of the streams.

    Returns:
      Steps, or None if the stream of `steps` ends before.
    """
    moved = answers(name, steps=steps, heads=heads, batch=batch, change=change, seed=seed)
    old = moved[:, change // 2 : change].mean(axis=1)
    new = answers(name, steps=steps, heads=heads, batch=batch, change=0, seed=seed)[:, steps // 2 :].mean(axis=1)
    direction = new - old
    share = np.einsum("btv,bv->bt", moved[:, change:] - old[:, None], direction) / np.sum(direction**2, 1)[:, None]
    reached = np.median(share, axis=0) >= 0.5
    return int(np.argmax(reached)) + 1 if reached.any() else None


def _measure(runs: Runs, settings: Settings) -> Result:
    steps, batch, changes = (settings[name] for name in ("steps", "streams", "changes"))
    times, rows = np.arange(steps // 16, steps), []
    for heads in settings["heads"]:
        for name in READERS:
            moves = _moves(answers(name, steps=steps, heads=heads, batch=batch))
            row: dict = {"memory": name, "heads": heads, "slope of moves": round(slope(times, moves[times - 1]), 2)}
            for change in changes:
                taken = recovery(name, change, steps=steps, heads=heads, batch=batch)
                row[f"recovery, change at {change}"] = "never" if taken is None else taken
            rows.append(row)
        log(f"{heads} heads: done")
    title = f"Slope of log |o_t - o_(t-1)| against log t to t = {steps}, and steps until halfway to the new answer"
    limits = [_settling(heads, steps, batch) for heads in settings["heads"]]
    values = {"steps": steps, "streams": batch, "width": WIDTH, "beta": BETA, "decay": DECAY, "noise": NOISE}
    return Result([Table(title, rows), Table("Softmax: slope of log |o_t - o_inf| against log t", limits)], values)


def _settling(heads: int, steps: int, batch: int) -> Row:
    """Distance of softmax's answer to W s q, with s = 1 / sqrt K."""
    q, _, _, maps = _stream(0, steps, heads, batch, None, unit=False)
    limit = jnp.einsum("bhk,bhkv->bhv", q[:, 0] / math.sqrt(WIDTH // heads), maps[0]).reshape(batch, 1, WIDTH)
    outputs = answers("softmax", steps=steps, heads=heads, batch=batch) - np.asarray(limit)
    distance = np.sqrt(np.mean(np.sum(outputs**2, axis=2), axis=0))
    times = np.arange(steps // 16, steps)
    return {"heads": heads, "slope": round(slope(times, distance[times - 1]), 2)}


def _recoveries(row: Row) -> dict[int, float]:
    """Time of the change to steps; nan for never."""
    cells = {name: cell for name, cell in row.items() if name.startswith("recovery")}
    return {int(name.split()[-1]): math.nan if cell == "never" else cell for name, cell in cells.items()}


def _judge(result: Result) -> Verdict:
    one = {row["memory"]: row for row in result.rows(heads=1)}
    slopes = {name: row["slope of moves"] for name, row in one.items()}
    back = {name: _recoveries(row) for name, row in one.items()}
    first, last = min(back["softmax"]), max(back["softmax"])
    growth = {name: found[last] / found[first] for name, found in back.items()}
    settles = abs(slopes["softmax"] + 1) < 0.1 and abs(result.rows(1)[0]["slope"] + 0.5) < 0.1
    moves = max(abs(slopes[name]) for name in ("decay", "delta")) < 0.1 and growth["delta"] < 2 and growth["decay"] < 4
    return Verdict(
        grade(settles and growth["softmax"] > 10, moves),
        f"Slope of moves: softmax {slopes['softmax']:.2f}, delta {slopes['delta']:.2f}, decay {slopes['decay']:.2f}. "
        f"Recovery after a change at {last} takes softmax {growth['softmax']:.0f} times as long as at {first}, delta "
        f"{growth['delta']:.1f} times, decay {growth['decay']:.1f} times.",
    )


def _summary(result: Result) -> list[Row]:
    return [{**row, "memory": f"{row['memory']}, 1 head"} for row in result.rows(heads=1)]


def _draw(result: Result) -> Any:
    figure, axes = new_figure(1, 2, width=8.8, height=3.8)
    left, right = axes[0]
    heads = sorted({row["heads"] for row in result.rows()})
    # heads are the groups of the left panel, memories the colours of both
    draw_bars(
        left,
        [f"{count} head{'s' * (count > 1)}" for count in heads],
        {name: [row["slope of moves"] for row in result.rows(memory=name)] for name in READERS},
    )
    left.set_ylabel("slope of |o(t) - o(t-1)|")
    draw_lines(right, {row["memory"]: _recoveries(row) for row in result.rows(heads=heads[0])}, x_base=2, y_scale="log")
    right.set_xlabel("time of the change, pairs read")
    right.set_ylabel("steps until halfway to the new answer")
    return figure


CONVERGENCE = Study(
    name="convergence",
    title="Convergence with context",
    claim="Softmax attention's step vanishes as 1/t and its answer converges as 1/sqrt t, so that after a change of "
    "the map at time t it recovers in a time that grows with t; memories with a decay or with the delta rule at "
    "constant beta keep moving and recover in a constant time.",
    source="arXiv 2505.19488, section 2.2.2",
    measure=_measure,
    judge=_judge,
    draw=_draw,
    caption="Left: slope of the moves against time on log axes (-1 is 1/t, 0 constant). Right: recovery after a change "
    "of the map, one head.",
    settings={"steps": 4096, "streams": 32, "heads": (1, 8, 16), "changes": (32, 64, 128, 256, 512, 1024)},
    quick=Quick(settings={"steps": 512, "streams": 8, "heads": (1,), "changes": (32, 64, 128)}),
    summary=_summary,
)
