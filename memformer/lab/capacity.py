"""Capacity: the number of key-value pairs that a memory of so many bytes recalls, and after each was rewritten.

N random keys, each with a value of V random bits, are written one after the other; then every key is queried, and a
pair is recalled if the sign of each of the V numbers read is correct. The capacity is the largest N of which 99% are.
Rewritten means two values for each key, in random order; only the later counts.

A matrix memory spends its B bytes (float32) on a K x V matrix: K = B / 4V. A cache spends them on slots of K + V
numbers, with the best K. Nothing is trained; theory (arXiv 2505.19488, section 2, for sums over random keys): a number
read is 1 plus noise of variance (N - 1) / K in a linear memory, (N - 1) exp(2 - 2 sqrt K) in softmax attention. V of
them are correct in 99% of the pairs where 1 / variance >= z^2 with P(normal < z)^V = 0.99.

Keys are random, as in theory. Orthogonal ones would let every matrix memory recall as many pairs as it has rows:
`segment_recall` measures what training can find. It matters most to ARMT, whose read divides by z . phi and so answers
a key that matches little (random DPFP features have a cosine of 0.1) as if it matched in full.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memformer.lab.plots import DOTTED, Lines
from memformer.lab.study import Quick, Result, Row, Runs, Settings, Study, Table, Verdict, grade, numbers_in, pivot
from memformer.ops.associative import NEIGHBOURS, AssociativeMemory, associative_read, associative_write, dpfp
from memformer.ops.delta_product import delta_product
from memformer.ops.delta_rule import delta_rule
from memformer.ops.deltaformer import deltaformer
from memformer.ops.linear_attention import linear_attention
from memformer.ops.softmax_attention import softmax_attention
from memformer.training.metrics import log

__all__ = ["CAPACITY", "NUMBER", "RECALLERS", "Recaller", "Writes", "capacity", "draw_writes", "recalled", "theory"]

GOAL = 0.99
# Bytes of a number of state.
NUMBER = 4
# Half-lives of the decaying memory, as parts of the number of writes; the best one counts.
HALF_LIVES = (0.125, 0.25, 0.5, 1.0, math.inf)

Read = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Writes:
    """A sequence of writes, padded to T, and the values to be read after it.

    Attributes:
      order: the pair that each token writes, [T].
      values: its value, of -1 and 1, [T, V].
      valid: False for padding, [T].
      answers: the latest value of each pair, [P, V]; only the first `pairs` are asked for.
      pairs: N.
    """

    order: np.ndarray
    values: np.ndarray
    valid: np.ndarray
    answers: np.ndarray
    pairs: int


def draw_writes(pairs: int, times: int, *, tokens: int, most: int, value_width: int, seed: int) -> Writes:
    """N pairs, each written `times` times with values of their own, in random order; the last value counts.

    Args:
      pairs: N.
      times: number of writes per key.
      tokens: T >= N * times.
      most: P >= N.
      value_width: V.
      seed: of order and values.

    Example:
      >>> writes = draw_writes(2, 2, tokens=6, most=3, value_width=1, seed=0)
      >>> sorted(writes.order[writes.valid].tolist()), int(writes.valid.sum()), writes.answers.shape
      ([0, 0, 1, 1], 4, (3, 1))
    """
    rng = np.random.default_rng((seed, pairs, times, value_width))
    count = pairs * times
    order, valid = np.zeros(tokens, np.int32), np.arange(tokens) < count
    order[:count] = rng.permutation(np.tile(np.arange(pairs), times))
    values = 2.0 * rng.integers(2, size=(tokens, value_width)) - 1
    answers = np.zeros((most, value_width))
    # the last of several assignments to one index holds
    answers[order[:count]] = values[:count]
    return Writes(order, values.astype(np.float32), valid, answers.astype(np.float32), pairs)


@dataclasses.dataclass(frozen=True)
class Recaller:
    """One memory: its write and read of every key, and the size of its state.

    Attributes:
      read: (keys [P, K], k [T, K], v [T, V], valid [T], rate) -> the value read at each key, [P, V]; rate is the log
        decay per write, which only the decaying memory uses.
      floats: numbers of state for a key width and a value width; per slot where there are slots.
      slots: whether the state is a cache.
      unit: keys have length 1; else sqrt(K), the length of Gaussian keys.
      decays: whether the best of HALF_LIVES is taken.
    """

    read: Read
    floats: Callable[[int, int], int]
    slots: bool = False
    unit: bool = True
    decays: bool = False


def _ids(valid: jax.Array) -> jax.Array:
    return valid.astype(jnp.int32)[None]


def _asked(keys: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [1, P, 1, K], and the keys and values of tokens that write nothing."""
    q = keys[None, :, None]
    return q, jnp.zeros_like(q), jnp.zeros((1, len(keys), 1, v.shape[1]), v.dtype)


def _linear(keys: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, rate: jax.Array) -> jax.Array:
    k, v = k[None, :, None], v[None, :, None]
    decay = jnp.full(k.shape[:3], rate, jnp.float32)
    _, state = linear_attention(k, k, v, decay=decay, segment_ids=_ids(valid))
    return linear_attention(*_asked(keys, v[0, :, 0]), initial_state=state)[0][0, :, 0]


def _delta(keys: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, rate: jax.Array) -> jax.Array:
    k, v = k[None, :, None], v[None, :, None]
    _, state = delta_rule(k, k, v, jnp.ones(k.shape[:3]), segment_ids=_ids(valid))
    q, nothing, blank = _asked(keys, v[0, :, 0])
    return delta_rule(q, nothing, blank, jnp.zeros(q.shape[:3]), initial_state=state)[0][0, :, 0]


def _product(keys: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, rate: jax.Array) -> jax.Array:
    """Two pairs per token."""
    beta = valid.astype(jnp.float32).reshape(1, -1, 2, 1)
    k, v = k.reshape(1, -1, 2, 1, k.shape[1]), v.reshape(1, -1, 2, 1, v.shape[1])
    _, state = delta_product(k[:, :, 0], k, v, beta)
    q, nothing, blank = _asked(keys, v[0, :, 0, 0])
    none = jnp.zeros((*q.shape[:2], 1, 1))
    return delta_product(q, nothing[:, :, None], blank[:, :, None], none, initial_state=state)[0][0, :, 0]


def _associative(correction: bool, keys: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, rate: jax.Array):
    features = dpfp(k)

    def write(memory: AssociativeMemory, token: tuple) -> tuple[AssociativeMemory, None]:
        phi, value, counts = token
        after = associative_write(memory, phi[None, None], value[None, None], jnp.ones((1, 1)), correction=correction)
        return jax.tree.map(lambda new, old: jnp.where(counts, new, old), after, memory), None

    empty = AssociativeMemory(jnp.zeros((1, features.shape[1], v.shape[1])), jnp.zeros((1, features.shape[1])))
    memory, _ = jax.lax.scan(write, empty, (features, v, valid))
    return associative_read(memory, dpfp(keys)[None])[0]


def _cached(attend: Callable[..., Any], keys: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, rate: jax.Array):
    """Writes, then one more token, which queries one key per head and writes a zero."""
    _, state = attend(k[None, :, None], k[None, :, None], v[None, :, None], segment_ids=_ids(valid))
    blank = jnp.zeros((1, 1, 1, v.shape[1]), v.dtype)
    return attend(keys[None, None], jnp.zeros_like(k[None, :1, None]), blank, initial_state=state)[0][0, 0]


_ROUND = functools.partial(deltaformer, write_kernel="round", read_kernel="round")

RECALLERS: dict[str, Recaller] = {
    "linear attention": Recaller(_linear, lambda k, v: k * v),
    "linear attention, decay": Recaller(_linear, lambda k, v: k * v, decays=True),
    "delta rule": Recaller(_delta, lambda k, v: k * v),
    "delta product": Recaller(_product, lambda k, v: k * v),
    "ARMT": Recaller(functools.partial(_associative, True), lambda k, v: 2 * NEIGHBOURS * k * (v + 1)),
    "ARMT without gamma": Recaller(functools.partial(_associative, False), lambda k, v: 2 * NEIGHBOURS * k * (v + 1)),
    "softmax attention": Recaller(
        functools.partial(_cached, softmax_attention), lambda k, v: k + v, slots=True, unit=False
    ),
    "DeltaFormer (round)": Recaller(functools.partial(_cached, _ROUND), lambda k, v: k + v, slots=True),
}


@functools.partial(jax.jit, static_argnums=0)
def _run(read: Read, keys: jax.Array, order: jax.Array, values: jax.Array, valid: jax.Array, rate: jax.Array):
    """The values read at every key; the memories with one `read` share a program."""
    written = jnp.where(valid[:, None], jnp.take(keys, order, axis=0), 0)
    return read(keys, written, jnp.where(valid[:, None], values, 0), valid, rate)


@functools.lru_cache(maxsize=16)
def _keys(count: int, width: int, unit: bool, seed: int) -> jax.Array:
    keys = np.random.default_rng((seed, count, width)).standard_normal((count, width), np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return jnp.asarray(keys if unit else math.sqrt(width) * keys)


def recalled(name: str, writes: Writes, key_width: int, seed: int) -> float:
    """Share of the pairs that a memory recalls with every bit correct.

    Args:
      name: in RECALLERS.
      writes: of `draw_writes`.
      key_width: K.
      seed: of the keys.

    Example:
      >>> writes = draw_writes(3, 2, tokens=8, most=4, value_width=4, seed=0)
      >>> recalled("delta rule", writes, 256, 0)
      1.0
    """
    memory = RECALLERS[name]
    keys = _keys(len(writes.answers), key_width, memory.unit, seed)
    count = int(writes.valid.sum())
    rates = [-math.log(2) / (part * count) for part in HALF_LIVES] if memory.decays else [0.0]
    shares = []
    for rate in rates:
        read = _run(memory.read, keys, writes.order, writes.values, writes.valid, jnp.float32(rate))
        correct = np.all(np.asarray(read)[: writes.pairs] * writes.answers[: writes.pairs] > 0, axis=1)
        shares.append(float(np.mean(correct)))
    return max(shares)


def capacity(name: str, key_width: int, *, value_width: int, times: int, most: int, seed: int) -> int:
    """The largest number of pairs, up to `most`, of which 99% are recalled, found by halving; 0 where 1 is not.

    Args:
      name: in RECALLERS.
      key_width: K.
      value_width: V.
      times: number of writes per key.
      most: the largest number that is tried.
      seed: of keys, order and values.

    Example:
      >>> capacity("linear attention", 64, value_width=4, times=1, most=4, seed=0)
      4
    """

    def holds(pairs: int) -> bool:
        sizes = {"tokens": 2 * most, "most": most, "value_width": value_width}
        return recalled(name, draw_writes(pairs, times, seed=seed, **sizes), key_width, seed) >= GOAL

    good, bad = 0, most + 1
    # doubling first: most answers are far below `most`
    pairs = 1
    while bad - good > 1:
        if holds(pairs):
            good, pairs = pairs, 2 * pairs
        else:
            bad = pairs
        if pairs >= bad:
            pairs = (good + bad) // 2
    return good


def theory(slots: bool, size: int, value_width: int) -> float:
    """Pairs that theory lets a linear memory (a matrix of `size` bytes) or softmax attention (that cache) recall.

    Example:
      >>> round(theory(False, 4096, 4), 1), round(theory(True, 4096, 4), 1)
      (33.5, 51.2)
    """
    squared = NormalDist().inv_cdf(GOAL ** (1 / value_width)) ** 2
    if not slots:
        return 1 + size / (NUMBER * value_width) / squared
    kept = (1 + math.exp(2 * math.sqrt(width) - 2) / squared for width in range(1, 257))
    return max(min(size / (NUMBER * (width + value_width)), pairs) for width, pairs in enumerate(kept, 1))


WRITTEN = {1: "once", 2: "rewritten"}


def _matrix_pairs(name: str, size: int, bits: int, times: int, seeds: int) -> list[int]:
    """Capacity by seed, with the widest key that the bytes allow."""
    width = size // (NUMBER * RECALLERS[name].floats(1, bits))
    if width < 2:
        return [0] * seeds
    most = max(8, size // (2 * NUMBER * bits))
    sizes = {"value_width": bits, "times": times, "most": most}
    return [capacity(name, width, seed=seed, **sizes) for seed in range(seeds)]


def _cache_pairs(name: str, settings: Settings, bits: int, times: int) -> dict[int, list[int]]:
    """Capacity by size and seed, with the best key width: a wide key separates pairs, but leaves fewer slots."""
    memory = RECALLERS[name]
    sizes = {"value_width": bits, "times": times, "most": settings["most"]}
    seeds = range(settings["seeds"])
    capacities = {width: [capacity(name, width, seed=seed, **sizes) for seed in seeds] for width in settings["widths"]}
    found = {}
    for size in settings["sizes"]:
        room = {width: size // (NUMBER * memory.floats(width, bits)) // times for width in capacities}
        # one width for all seeds
        best = max(capacities, key=lambda width: float(np.median(np.minimum(capacities[width], room[width]))))
        found[size] = [min(pairs, room[best]) for pairs in capacities[best]]
    return found


def _measure(runs: Runs, settings: Settings) -> Result:
    rows = []
    for bits in settings["bits"]:
        for times in WRITTEN:
            rows += [_row(name, settings, bits, times) for name in RECALLERS]
            log(f"values of {bits} bits, {WRITTEN[times]}: done")
    title = f"Pairs recalled by bytes of state (median, least and most of {settings['seeds']} seeds)"
    values = {"seeds": settings["seeds"], "key widths of caches": settings["widths"], "share": GOAL}
    return Result([Table(title, rows)], values)


def _row(name: str, settings: Settings, bits: int, times: int) -> Row:
    if RECALLERS[name].slots:
        found = _cache_pairs(name, settings, bits, times)
    else:
        seeds = settings["seeds"]
        found = {size: _matrix_pairs(name, size, bits, times, seeds) for size in settings["sizes"]}
    row: dict[str, Any] = {"bits per value": bits, "written": WRITTEN[times], "memory": name}
    for size, pairs in found.items():
        row[f"{size} bytes"] = f"{np.median(pairs):g} ({min(pairs)}-{max(pairs)})"
    return row


def _by_size(row: Row) -> dict[int, list[float]]:
    """Bytes of state to [median, least, most]."""
    return {int(name.split()[0]): numbers_in(cell) for name, cell in row.items() if name.endswith(" bytes")}


def _judge(result: Result) -> Verdict:
    once, rewritten, ratios = {}, {}, []
    for row in result.rows():
        found = {size: cell[0] for size, cell in _by_size(row).items()}
        most = found[max(found)]
        if row["written"] == "rewritten":
            rewritten[row["memory"], row["bits per value"]] = most
        elif row["memory"] in ("linear attention", "softmax attention"):
            slots = row["memory"] == "softmax attention"
            ratios += [pairs / theory(slots, size, row["bits per value"]) for size, pairs in found.items()]
            once[row["memory"], row["bits per value"]] = most
    near = 0.5 < min(ratios) and max(ratios) < 2
    never = [name for name in RECALLERS if max(rewritten[name, bits] for bits in (4, 64)) == 0]
    delta = rewritten["delta rule", 4]
    holds = never == ["linear attention", "softmax attention"] and rewritten["linear attention, decay", 4] < 0.1 * delta
    return Verdict(
        grade(near, holds),
        f"Written once, linear and softmax attention recall {min(ratios):.2f} to {max(ratios):.2f} times theory's "
        f"pairs. Rewritten, {' and '.join(never) or 'no memory'} recall none, the delta rule {delta:g} and ARMT "
        f"{rewritten['ARMT', 4]:g} (16 KiB, values of 4 bits).",
    )


def _summary(result: Result) -> list[Row]:
    rows = [{**row, "kind": f"{row['bits per value']} bits, {row['written']}"} for row in result.rows()]
    return pivot(rows, "memory", "kind", "16384 bytes", corner="pairs recalled in 16 KiB")


def _with_theory(result: Result) -> Result:
    """The result with rows of theory; without the memories that coincide with the delta rule and ARMT."""
    rows = [row for row in result.rows() if row["memory"] not in ("delta product", "ARMT without gamma")]
    for name, slots in (("theory, linear attention", False), ("theory, softmax attention", True)):
        for row in result.rows(memory=name.removeprefix("theory, "), written="once"):
            sizes = {f"{size} bytes": theory(slots, size, row["bits per value"]) for size in _by_size(row)}
            rows.append({**row, "memory": name, **sizes})
    return Result([Table("", rows)])


FIGURE = Lines(
    line="memory",
    points="{} bytes",
    panel=lambda row: f"{row['bits per value']}-bit values, {row['written'].replace('once', 'written once')}",
    x="bytes of state",
    y="pairs recalled (99%)",
    columns=2,
    options={
        "styles": {"theory, linear attention": DOTTED, "theory, softmax attention": {**DOTTED, "linestyle": "-."}},
        "x_base": 2,
        "y_scale": "symlog",
    },
)
CAPACITY = Study(
    name="capacity",
    title="Capacity of untrained memories",
    claim="At equal bytes of state a linear memory recalls 1 + K / z^2 random pairs and softmax attention as many as "
    "its cache has slots once keys are O(log^2 N) wide; only memories with a delta rule recall rewritten keys.",
    source="arXiv 2505.19488, section 2; 2102.11174; 2407.04841; DeltaFormer, NeurIPS 2025",
    measure=_measure,
    judge=_judge,
    draw=lambda result: FIGURE(_with_theory(result)),
    caption="Random pairs recalled by bytes of state without training; bands: all seeds. The delta product coincides "
    "with the delta rule, ARMT without gamma with ARMT.",
    settings={
        "sizes": (1024, 4096, 16384),
        "bits": (4, 64),
        "seeds": 5,
        # key widths that a cache may choose among, and the most pairs that are tried in it
        "widths": (4, 8, 16, 24, 32, 48, 64),
        "most": 512,
    },
    quick=Quick(settings={"sizes": (1024, 4096), "bits": (4,), "seeds": 2, "widths": (12, 16, 48), "most": 64}),
    summary=_summary,
)
