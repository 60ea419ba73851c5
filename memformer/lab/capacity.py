"""Capacity: how many key-value pairs a memory of so many bytes gives back, and how many after each was written anew.

N random keys, each with a value of V random bits, are written one after the other; then every key is asked for, and a
pair is recalled if the sign of each of the V numbers read is right. The capacity is the largest N of which 99% are.
Written anew means two values for each key, in random order; only the later counts.

A matrix memory spends its B bytes (float32) on a matrix K x V: K = B / 4V. A cache spends them on slots of K + V
numbers, with the K that serves it best. Nothing is trained; theory (arXiv 2505.19488, section 2, for sums over random
keys): a number read is 1 plus noise of variance (N - 1) / K in a linear memory, (N - 1) exp(2 - 2 sqrt K) in softmax
attention. V of them are right in 99% of the pairs where 1 / variance >= z^2 with P(normal < z)^V = 0.99.

Keys are random, as theory has them. Orthogonal ones would let every matrix memory recall as many pairs as it has rows:
what training can find is measured by `segments`. It matters most to ARMT, whose read divides by z . phi and so answers
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

from memformer.lab.study import Study, new_figure
from memformer.ops.associative import NEIGHBOURS, AssociativeMemory, associative_read, associative_write, dpfp
from memformer.ops.delta_product import delta_product
from memformer.ops.delta_rule import delta_rule
from memformer.ops.deltaformer import deltaformer
from memformer.ops.linear_attention import linear_attention
from memformer.ops.softmax_attention import softmax_attention
from memformer.training.metrics import say
from memformer.training.plots import COLOURS

__all__ = ["NUMBER", "RECALLERS", "Recaller", "Writes", "capacity", "draw_writes", "measure", "recalled", "theory"]

GOAL = 0.99
# Bytes of a number of state.
NUMBER = 4
# Half-lives of the decaying memory, as parts of the number of writes; it is given its best.
HALF_LIVES = (0.125, 0.25, 0.5, 1.0, math.inf)
# Key widths that a cache may choose among.
CACHE_WIDTHS = (4, 8, 16, 24, 32, 48, 64)

Read = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Writes:
    """A sequence of writes, padded to T, and what should be read after it.

    Attributes:
      order: which pair each token writes, [T].
      values: what it writes, -1 and 1, [T, V].
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
      times: writes of each key.
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
    # of equal places the last assignment stays
    answers[order[:count]] = values[:count]
    return Writes(order, values.astype(np.float32), valid, answers.astype(np.float32), pairs)


@dataclasses.dataclass(frozen=True)
class Recaller:
    """One memory: how it writes a sequence and reads every key, and what its state costs.

    Attributes:
      read: (keys [P, K], k [T, K], v [T, V], valid [T], rate) -> what it answers to each key, [P, V]; rate is the log
        decay of a write, which only the decaying memory takes.
      floats: numbers of state for a key width and a value width; of one slot where there are slots.
      slots: whether the state is a cache.
      unit: keys of length 1; else sqrt(K), the length of Gaussian keys.
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
    """Two pairs a token."""
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
    """Writes, then one token more, which asks for every key, a head each, and writes a zero."""
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
def _run(name: str, keys: jax.Array, order: jax.Array, values: jax.Array, valid: jax.Array, rate: jax.Array):
    """Which values are right in every bit needs the answers, so this gives what is read."""
    written = jnp.where(valid[:, None], jnp.take(keys, order, axis=0), 0)
    return RECALLERS[name].read(keys, written, jnp.where(valid[:, None], values, 0), valid, rate)


@functools.lru_cache(maxsize=16)
def _keys(count: int, width: int, unit: bool, seed: int) -> jax.Array:
    keys = np.random.default_rng((seed, count, width)).standard_normal((count, width), np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return jnp.asarray(keys if unit else math.sqrt(width) * keys)


def recalled(name: str, writes: Writes, key_width: int, seed: int) -> float:
    """Share of the pairs that a memory gives back with every bit right.

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
        read = _run(name, keys, writes.order, writes.values, writes.valid, jnp.float32(rate))
        right = np.all(np.asarray(read)[: writes.pairs] * writes.answers[: writes.pairs] > 0, axis=1)
        shares.append(float(np.mean(right)))
    return max(shares)


def capacity(name: str, key_width: int, *, value_width: int, times: int, most: int, seed: int) -> int:
    """The largest number of pairs, up to `most`, of which 99% are recalled, found by halving; 0 where 1 is not.

    Args:
      name: in RECALLERS.
      key_width: K.
      value_width: V.
      times: writes of each key.
      most: where to stop looking.
      seed: of keys, order and values.

    Example:
      >>> capacity("linear attention", 64, value_width=4, times=1, most=4, seed=0)
      4
    """

    def holds(pairs: int) -> bool:
        sizes = {"tokens": 2 * most, "most": most, "value_width": value_width}
        return recalled(name, draw_writes(pairs, times, seed=seed, **sizes), key_width, seed) >= GOAL

    good, bad = 0, most + 1
    # doubling first: most of the answers are far below `most`
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
    """Pairs that theory gives a linear memory (of a matrix of `size` bytes) or softmax attention (of that cache).

    Example:
      >>> round(theory(False, 4096, 4), 1), round(theory(True, 4096, 4), 1)
      (33.5, 51.2)
    """
    squared = NormalDist().inv_cdf(GOAL ** (1 / value_width)) ** 2
    if not slots:
        return 1 + size / (NUMBER * value_width) / squared
    told = (1 + math.exp(2 * math.sqrt(width) - 2) / squared for width in range(1, 257))
    return max(min(size / (NUMBER * (width + value_width)), pairs) for width, pairs in enumerate(told, 1))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is measured: bytes of state, bits of a value, seeds, key widths of caches, where to stop with them."""

    sizes: tuple[int, ...]
    bits: tuple[int, ...]
    seeds: int
    widths: tuple[int, ...]
    most: int


QUICK = _Plan((1024, 4096), (4,), 2, (12, 16, 48), 64)
FULL = _Plan((1024, 4096, 16384), (4, 64), 5, CACHE_WIDTHS, 512)
WRITTEN = {1: "once", 2: "anew"}


def _matrix_pairs(name: str, size: int, bits: int, times: int, seeds: int) -> list[int]:
    """Of each seed, with the widest key that the bytes allow."""
    width = size // (NUMBER * RECALLERS[name].floats(1, bits))
    if width < 2:
        return [0] * seeds
    most = max(8, size // (2 * NUMBER * bits))
    sizes = {"value_width": bits, "times": times, "most": most}
    return [capacity(name, width, seed=seed, **sizes) for seed in range(seeds)]


def _cache_pairs(name: str, plan: _Plan, bits: int, times: int) -> dict[int, list[int]]:
    """By size, of each seed, with the key width that serves best: it tells pairs apart, but takes room from slots."""
    memory = RECALLERS[name]
    sizes = {"value_width": bits, "times": times, "most": plan.most}
    seeds = range(plan.seeds)
    told = {width: [capacity(name, width, seed=seed, **sizes) for seed in seeds] for width in plan.widths}
    found = {}
    for size in plan.sizes:
        room = {width: size // (NUMBER * memory.floats(width, bits)) // times for width in told}
        # one width for all seeds
        best = max(told, key=lambda width: float(np.median(np.minimum(told[width], room[width]))))
        found[size] = [min(pairs, room[best]) for pairs in told[best]]
    return found


def measure(study: Study, *, quick: bool) -> None:
    """Counts what each memory of the table recalls, by the bytes of its state."""
    plan = QUICK if quick else FULL
    study.claim = (
        "At equal bytes of state a linear memory recalls 1 + K / z^2 random pairs and softmax attention as many as "
        "its cache has slots once keys are O(log^2 N) wide (2505.19488, section 2); only memories with a delta rule "
        "recall keys that were written anew (2102.11174; ARMT, 2407.04841; DeltaFormer)."
    )
    found: dict[tuple[int, int, str, int], list[int]] = {}
    for bits in plan.bits:
        for times in WRITTEN:
            for name, memory in RECALLERS.items():
                if memory.slots:
                    by_size = _cache_pairs(name, plan, bits, times)
                else:
                    by_size = {size: _matrix_pairs(name, size, bits, times, plan.seeds) for size in plan.sizes}
                for size, pairs in by_size.items():
                    found[bits, times, name, size] = pairs
            say(f"values of {bits} bits, written {WRITTEN[times]}: done")
    rows = [_row(found, plan, bits, times, name) for bits in plan.bits for times in WRITTEN for name in RECALLERS]
    study.add_table(f"Pairs recalled by bytes of state (median, lowest and highest of {plan.seeds} seeds)", rows)
    study.outcome = _outcome(found, plan)
    study.values = {"seeds": plan.seeds, "key widths of caches": plan.widths, "share": GOAL}
    _draw(study, found, plan)


def _row(found: dict, plan: _Plan, bits: int, times: int, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"bits of a value": bits, "written": WRITTEN[times], "memory": name}
    for size in plan.sizes:
        pairs = found[bits, times, name, size]
        row[f"{size} bytes"] = f"{np.median(pairs):g} ({min(pairs)}-{max(pairs)})"
    return row


def _outcome(found: dict, plan: _Plan) -> str:
    size = plan.sizes[-1]
    medians = {key: float(np.median(pairs)) for key, pairs in found.items()}
    parts = []
    for bits in plan.bits:
        for times, written in WRITTEN.items():
            told = ", ".join(f"{name} {medians[bits, times, name, size]:g}" for name in RECALLERS)
            parts.append(f"values of {bits} bits written {written}: {told}")
    ratios = []
    for name, slots in (("linear attention", False), ("softmax attention", True)):
        of_theory = [medians[bits, 1, name, n] / theory(slots, n, bits) for n in plan.sizes for bits in plan.bits]
        ratios.append(f"{min(of_theory):.2f} to {max(of_theory):.2f} of theory's pairs in {name}")
    never = [name for name in RECALLERS if not any(medians[b, 2, name, n] for b in plan.bits for n in plan.sizes)]
    return (
        f"pairs recalled with {size} bytes: {'; '.join(parts)}. Written once, all sizes: {' and '.join(ratios)}. "
        f"Keys written anew are never recalled by {' and '.join(never) or 'none'}."
    )


def _draw(study: Study, found: dict, plan: _Plan) -> None:
    figure, axes = new_figure(len(plan.bits), 2, width=10.0, height=3.3 * len(plan.bits) + 0.8)
    # the lines of these two would lie on those of the delta rule and of ARMT
    drawn = [name for name in RECALLERS if name not in ("delta product", "ARMT without gamma")]
    markers = dict(zip(drawn, "osD^vP", strict=True))
    for line, bits in zip(axes, plan.bits, strict=True):
        for axis, times in zip(line, WRITTEN, strict=True):
            for colour, name in zip(COLOURS, drawn, strict=True):
                pairs = np.array([found[bits, times, name, size] for size in plan.sizes])
                axis.plot(plan.sizes, np.median(pairs, axis=1), markers[name], ls="-", ms=4.5, color=colour, label=name)
                axis.fill_between(plan.sizes, pairs.min(axis=1), pairs.max(axis=1), color=colour, alpha=0.2, lw=0)
            if times == 1:
                for slots, style in ((False, ":"), (True, "--")):
                    label = f"theory: {'softmax' if slots else 'linear'}"
                    expected = [theory(slots, size, bits) for size in plan.sizes]
                    axis.plot(plan.sizes, expected, style, color="0.35", label=label)
            axis.set_xscale("log", base=2)
            axis.set_xticks(plan.sizes, [f"{size // 1024}" for size in plan.sizes])
            axis.set_yscale("symlog", linthresh=1, base=2)
            axis.set_ylim(0, None)
            axis.set_yticks([0, 1, 4, 16, 64, 256], ["0", "1", "4", "16", "64", "256"])
            axis.set_title(f"values of {bits} bits, {'each key once' if times == 1 else 'each key twice'}")
            axis.set_xlabel("state, KiB")
            axis.set_ylabel("pairs recalled (99%)")
    named = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(named.values(), named, loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    study.save_figure(
        figure,
        "pairs",
        "Random pairs recalled against bytes of state, untrained; bands: all seeds. The delta product is as the delta "
        f"rule, ARMT without gamma as ARMT. Claim: {study.claim}",
    )
