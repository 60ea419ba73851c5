"""Overwriting in the memory of ARMT: recall of the latest value against the number of writes, with nothing trained.

Sixteen keys are written again and again, each time with one of sixteen values, as in the task rewrite; then every key
is queried, and what is read is decoded as the nearest value. Keys are chosen such that their features do not overlap
("disjoint", the best that training could find) or at random, orthogonal before the feature map. A memory token sees the
value beside the key, so what a model writes at is key + leak * (a vector of this key and this value), both of the same
norm: the leak is what training has not yet removed.

A write replaces the fraction beta / (z . phi) of what is stored. z . phi is 1 with disjoint features and gamma, settles
a little above 1 with features that overlap, and grows with every write without gamma.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from memformer.lab.plots import Lines
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade, spread
from memformer.ops.associative import NEIGHBOURS, AssociativeMemory, associative_read, associative_write, dpfp

__all__ = ["OVERWRITING", "latest_recalled"]

SYMBOLS, VALUE_WIDTH = 16, 16
# Stated before the measurement: exact, and lost, after the most writes.
EXACT, LOST = 0.999, 0.5
# Kinds of a memory: keys, leak, gamma.
KINDS = {
    "disjoint features": ("disjoint", 0.0, True),
    "orthogonal keys": ("orthogonal", 0.0, True),
    "orthogonal keys, leak 0.1": ("orthogonal", 0.1, True),
    "orthogonal keys, leak 0.3": ("orthogonal", 0.3, True),
    "disjoint features, without gamma": ("disjoint", 0.0, False),
}
BEST, OVERLAPPING, _, LEAKY, WITHOUT = KINDS
# Writes per call of one compiled program; the numbers of writes are multiples.
PART = 10


@functools.partial(jax.jit, static_argnames="correction")
def _write(
    memory: AssociativeMemory, features: jax.Array, values: jax.Array, pairs: jax.Array, correction: bool
) -> AssociativeMemory:
    """The memory after the writes `pairs`, key and value [N, 2, B]; features are [keys, values, P]."""

    def step(memory: AssociativeMemory, pair: jax.Array) -> tuple[AssociativeMemory, None]:
        phi, v = features[pair[0], pair[1]], values[pair[1]]
        beta = jnp.ones((len(v), 1), v.dtype)
        return associative_write(memory, phi[:, None], v[:, None], beta, correction=correction), None

    return lax.scan(step, memory, pairs)[0]


def _keys(kind: str, key_width: int, rng: np.random.Generator) -> np.ndarray:
    """Sixteen keys of equal norm, [16, K]."""
    if kind == "orthogonal":
        return np.linalg.qr(rng.normal(size=(key_width, key_width)))[0][:SYMBOLS] * np.sqrt(key_width)
    # two neighbours, both positive or both negative: one feature per key
    pairs = np.kron(np.eye(SYMBOLS // 2, key_width // 2), [1.0, 1.0])
    return np.concatenate([pairs, -pairs]) * np.sqrt(key_width / 2)


def latest_recalled(
    kind: str, key_width: int, leak: float, correction: bool, *, writes: tuple[int, ...], rows: int, seed: int = 0
) -> tuple[dict[int, float], float]:
    """The share of keys whose latest value is read, by the number of writes, and the mean z . phi after the last.

    Args:
      kind: of keys, "disjoint" or "orthogonal".
      key_width: K before the feature map, even and at least 16.
      leak: norm of the part of a written key that depends on the value, over that of the key.
      correction: whether to use gamma.
      writes: when to ask, multiples of 10 in ascending order.
      rows: number of memories.
      seed: of keys, values and writes.
    """
    rng = np.random.default_rng(seed)
    keys = _keys(kind, key_width, rng)
    noise = rng.normal(size=(SYMBOLS, SYMBOLS, key_width))
    values = jnp.asarray(rng.normal(size=(SYMBOLS, VALUE_WIDTH)), jnp.float32)
    features = dpfp(jnp.asarray(keys[:, None] + leak * noise, jnp.float32))
    queries = jnp.broadcast_to(dpfp(jnp.asarray(keys, jnp.float32)), (rows, SYMBOLS, 2 * NEIGHBOURS * key_width))
    width = features.shape[-1]
    memory = AssociativeMemory(jnp.zeros((rows, width, VALUE_WIDTH)), jnp.zeros((rows, width)))
    pairs = rng.integers(SYMBOLS, size=(writes[-1], 2, rows), dtype=np.int32)
    latest, shares = np.full((rows, SYMBOLS), -1), {}
    for start in range(0, writes[-1], PART):
        part = pairs[start : start + PART]
        memory = _write(memory, features, values, jnp.asarray(part), correction)
        for key, value in part:
            latest[np.arange(rows), key] = value
        if start + PART in writes:
            read = associative_read(memory, queries)
            nearest = jnp.argmin(jnp.sum((read[:, :, None] - values[None, None]) ** 2, axis=-1), axis=-1)
            shares[start + PART] = float(np.mean((np.asarray(nearest) == latest)[latest >= 0]))
    return shares, float(jnp.mean(jnp.einsum("bp,bsp->bs", memory.normaliser, queries)))


def _measure(runs: Runs, settings: Settings) -> Result:
    rows: list[Row] = []
    values: dict[str, Mapping[str, list[float]]] = {}
    sizes = {"writes": settings["writes"], "rows": settings["rows"]}
    for width in settings["key_widths"]:
        for name in settings["kinds"]:
            kind, leak, gamma = KINDS[name]
            found = [latest_recalled(kind, width, leak, gamma, seed=n, **sizes) for n in range(settings["seeds"])]
            shares = {n: [one[n] for one, _ in found] for n in settings["writes"]}
            columns = {f"{n} writes": spread(seeds) for n, seeds in shares.items()}
            total = np.mean([total for _, total in found])
            rows.append({"K": width, "memory": name} | columns | {"z . phi at the end": f"{total:.3g}"})
            values[f"{name}, K = {width}"] = {str(n): [round(x, 4) for x in seeds] for n, seeds in shares.items()}
    return Result([Table("Keys whose latest value is read, by the number of writes", rows)], values)


def _judge(result: Result) -> Verdict:
    width = max(row["K"] for row in result.rows())
    best, overlapping, leaky, without = (
        result.values[f"{name}, K = {width}"] for name in (BEST, OVERLAPPING, LEAKY, WITHOUT)
    )
    most = str(max(map(int, best)))
    return Verdict(
        grade(min(best[most]) >= EXACT, max(without[most]) < LOST),
        f"With disjoint features and gamma {spread(best[most])} of the latest values are read after {most} writes to "
        f"16 keys, without gamma {spread(without[most])} (K = {width}). Features that overlap cost a little at any "
        f"number of writes: {spread(overlapping[most])}. Where the value leaks into the key, recall falls with the "
        f"writes: {spread(leaky['50'])} after 50, {spread(leaky[most])} after {most} (leak 0.3).",
    )


OVERWRITING = Study(
    name="overwriting",
    title="ARMT: overwriting",
    claim="With the gamma correction a key can be written any number of times and its latest value is read exactly; "
    "without it the normaliser grows with every write, and old values stay.",
    source="arXiv 2407.04841, section 2",
    measure=_measure,
    judge=_judge,
    draw=Lines(
        line="memory",
        points="{} writes",
        panel=lambda row: f"K = {row['K']}",
        x="writes to 16 keys",
        y="latest value read",
        limits=(0, 1.04),
        options={"x_base": 10},
    ),
    caption="Share of keys whose latest value is read after so many writes, untrained; mean and range of three seeds. "
    "Leak: the part of a written key that depends on the value.",
    settings={
        "key_widths": (16, 64),
        "kinds": tuple(KINDS),
        "writes": (20, 50, 100, 200, 500),
        "rows": 16,
        "seeds": 3,
    },
    quick=Quick(settings={"key_widths": (16,), "kinds": (BEST, WITHOUT), "writes": (20, 50), "rows": 8, "seeds": 1}),
)
