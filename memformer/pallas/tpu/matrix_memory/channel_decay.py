"""Linear attention and the delta rule with a log decay per key channel, on TPU.

Per chunk and head, with S the state that enters the chunk, G_r the cumulative decay [K] up to token r, W the erase
vectors (K where the call has none), a = alpha, b = beta, s the scale:

    M_ri = sum_c W_rc K_ic exp(G_rc - G_ic), i < r      X = (I + b M)^-1    U = X (a V - b (e^G W) S)
    P_ri = s sum_c Q_rc K_ic exp(G_rc - G_ic), i <= r   O = s (e^G Q) S + P U
    S' = e^G_C S + (e^(G_C - G) K)^T U

Without beta, in linear attention, U = V. Across the start of a segment reads of S, M, P and writes are masked.

M and P by the ladder of scores: a pair belongs to the level of the highest bit in which its two token numbers differ.
At level l tokens with bit l are rows and the others are columns, and both factors of the decay are sums of the log
decays in between, of blocks of 2^l tokens:

    p_r = sum of g from the start of the block of r to r       f_i = sum of g after i to the end of the block of i

From each level to the next, a token adds the total of its sibling block to p (with the bit) or to f (without). No
exponent is positive and nothing is subtracted, so that any decay down to -inf is exact; after the last level p = G and
f = G_C - G. The backward pass adds the gradients of p and f in the reverse order. One product serves both scores: rows
of its left operand are e^p Q with the bit and e^f K without it, of its right operand e^p W and e^f K, so that P lies
below the diagonal and M^T above it. Scores are the first stage, the inverse the second, as in delta_rule.py.

Backward, with dM, dP masked like M and P, and E = e^p of rows, e^f of columns, at each level:

    dU = P^T dO + (e^(G_C - G) K) dS'      dR = X^T dU      dM = -b dR U^T      dP = s dO U^T
    dV = a dR     da = sum of V dR         db = -sum of (dR U^T) M - sum of dR ((e^G W) S)
    dQ = sum over levels of E (dP (E K)) + s e^G (dO S^T)      dW = sum of E (dM (E K)) - e^G (b dR S^T)
    dK = sum over levels of E (dP^T (E Q) + dM^T (E W)) + e^(G_C - G) (U dS'^T)
    dS = e^G_C dS' + (e^G Q)^T s dO - (e^G W)^T b dR

Source: arXiv 2312.06635 (linear attention), 2510.26692 (delta rule); the ladder: ops/matrix_memory/scores.py.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Generator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from memformer.core.calls import MatrixCall
from memformer.core.types import Array, Float
from memformer.pallas.tpu.interleave import Steps
from memformer.pallas.tpu.inverse import unit_lower_inverses
from memformer.pallas.tpu.matrix_memory.chunk_scan import ChunkStep, run_scan
from memformer.pallas.tpu.matrix_memory.config import ScanConfig, plan_call
from memformer.pallas.tpu.matrix_memory.token_scalars import ScalarGradients, TokenScalars
from memformer.pallas.tpu.products import exact_passes, iotas, product, split_bf16
from memformer.pallas.tpu.tuning import Tuning

__all__ = ["run"]

LOG2_E = math.log2(math.e)


def _levels(config: ScanConfig) -> range:
    return range(config.chunk.bit_length() - 1)


def _has_bit(shape: tuple[int, ...], level: int) -> Array:
    """Whether the number of a token (its row) has bit `level`."""
    return (iotas(shape)[0] >> level) & 1 == 1


def _halves(x: Array, level: int) -> tuple[Array, Array]:
    """The rows of x whose number is without bit `level` and those with it, in whole registers of 8 rows (level > 2)."""
    half = 1 << level
    tops = range(0, x.shape[0], half)
    without, bit = (jnp.concatenate([x[top : top + half] for top in tops[start::2]]) for start in range(2))
    return without, bit


def _weave(without: Array, bit: Array, level: int) -> Array:
    """The inverse of `_halves`."""
    half = 1 << level
    tops = range(0, bit.shape[0], half)
    return jnp.concatenate([x[top : top + half] for top in tops for x in (without, bit)])


def _choose(without: Array, bit: Array, level: int) -> Array:
    """Rows of `bit` where their number has bit `level`, rows of `without` elsewhere."""
    if level < 3:
        return jnp.where(_has_bit(bit.shape, level), bit, without)
    return _weave(_halves(without, level)[0], _halves(bit, level)[1], level)


def _rows(x: Array, level: int) -> Array:
    """The rows of x whose number has bit `level`, where they are whole registers of 8 rows; else all of x."""
    return x if level < 3 else _halves(x, level)[1]


def _add_rows(x: Array, rows: Array, level: int) -> Array:
    """Adds to the rows of `_rows`."""
    if level < 3:
        return x + rows
    without, bit = _halves(x, level)
    return _weave(without, bit + rows, level)


def _roll_registers(x: Array, shift: int) -> Array:
    """Rolls every 8 rows of x by `shift` rows."""
    return pltpu.roll(x.reshape(-1, 8, x.shape[1]), shift % 8, 1).reshape(x.shape)


def _merge_rows(q: Array, w: Array | None, level: int) -> Array:
    """Rows of a level, from `_rows`, of q and, where it is given, of w as one operand: one product serves both."""
    if w is None:
        return q
    # Within registers, rows of w take the places that q leaves free.
    return _choose(_roll_registers(w, -(1 << level)), q, level) if level < 3 else jnp.concatenate([q, w])


def _divide_rows(x: Array, level: int, merged: bool) -> tuple[Array, Array | None]:
    """The inverse of `_merge_rows`, 0 in rows of no use; None without w."""
    if level < 3:
        q, w = (_choose(jnp.zeros_like(x), one, level) for one in (x, _roll_registers(x, 1 << level)))
        return q, w if merged else None
    middle = x.shape[0] // 2 if merged else x.shape[0]
    return x[:middle], x[middle:] if merged else None


def _of_sibling(x: Array, level: int) -> Array:
    """Row r ^ 2^level of x [C, K], for each row r."""
    half = 1 << level
    if level > 2:
        return _weave(*reversed(_halves(x, level)), level)
    after = _roll_registers(x, half)
    return after if half == 4 else _choose(_roll_registers(x, -half), after, level)


def _summands(shape: tuple[int, ...], passes: int) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and dtype of each array of `split_bf16`."""
    return [(shape, jnp.float32)] if passes == 6 else [(shape, jnp.bfloat16)] * (1 if passes == 1 else 2)


def _prepared(config: ScanConfig, backward: bool) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of the fields of `_Prepared`."""
    square, wide = (config.chunk, config.chunk), (config.chunk, config.key)
    exact = functools.partial(_summands, passes=exact_passes(config.passes))
    inverse = [(square, jnp.float32), *exact(square)] if config.beta else []
    if not backward:
        keys = _summands(wide, config.passes) * (2 if config.beta else 1)
        return inverse + exact(square) + keys + exact(wide) + [((8, config.key), jnp.float32)]
    scores = [(square, jnp.float32)] * (2 if config.beta else 1)
    return inverse + scores + [((len(_levels(config)), *wide), jnp.float32)] + [(wide, jnp.float32)] * 2


class _Prepared(NamedTuple):
    """References to what is prepared for one head.

    Attributes:
      inverse: X in summands; empty in linear attention.
      scores: forward P in summands; backward M, except in linear attention, and P.
      factors: backward exp(p) of rows and exp(f) of columns of all levels; else None.
      growth, rest: e^G and e^(G_C - G).
    """

    inverse: list[Any]
    scores: list[Any]
    factors: Any | None
    growth: Any
    rest: Any

    @classmethod
    def of(cls, config: ScanConfig, refs) -> "_Prepared":
        refs = refs[int(config.beta) :]
        count = len(_summands((), exact_passes(config.passes))) if config.beta else 0
        *scores, growth, rest = refs[count:]
        factors = scores.pop() if len(scores[-1].shape) == 3 else None
        return cls(refs[:count], scores, factors, growth, rest)


class _Scaled(NamedTuple):
    """References to what the forward pass reads of one head, each in summands.

    Attributes:
      inverse: X; empty in linear attention.
      scores: P.
      q, w: e^G Q and e^G W; w is empty in linear attention.
      k: e^(G_C - G) K.
      growth: the last 8 rows of e^G.
    """

    inverse: list[Any]
    scores: list[Any]
    q: list[Any]
    w: list[Any]
    k: list[Any]
    growth: Any

    @classmethod
    def of(cls, config: ScanConfig, refs) -> "_Scaled":
        exact, own = (len(_summands((), passes)) for passes in (exact_passes(config.passes), config.passes))
        refs = iter(refs[int(config.beta) :])
        counts = (exact * config.beta, exact, own, own * config.beta, exact)
        return cls(*(list(itertools.islice(refs, count)) for count in counts), *refs)


def _take(config: ScanConfig, keys) -> tuple[Array, Array, Array]:
    """q, k and w of one head, in float32."""
    q, k, w = (*keys[: config.keys], keys[1])[:3]
    return q.astype(jnp.float32), k.astype(jnp.float32), w.astype(jnp.float32)


def _store(refs, x: Array, passes: int) -> None:
    for ref, summand in zip(refs, split_bf16(x, passes), strict=True):
        ref[...] = summand


def _prepare(config: ScanConfig, scalars: TokenScalars, heads, keys, refs) -> Steps:
    passes = exact_passes(config.passes)
    backward = any(len(ref.shape) == 3 for ref in refs[0])
    first = [head_refs[0] for head_refs in refs]
    refs = [(_Prepared if backward else _Scaled).of(config, head_refs) for head_refs in refs]
    row, column = iotas((config.chunk, config.chunk))
    for h, own, to, to_a in zip(heads, keys, refs, first, strict=True):
        q, k, w = _take(config, own)
        scores, (growth, rest) = yield from _scores(config, (q, k, w), own[-1], to.factors if backward else None)
        if config.segments:
            scores = jnp.where(scalars.same_segment(h), scores, 0.0)
        p, m = jnp.where(row >= column, scores, 0.0), scores.T if config.beta else None
        if backward:
            to.growth[...], to.rest[...] = growth, rest
            if m is not None:
                to.scores[0][...] = jnp.where(row > column, m, 0.0)
            to.scores[-1][...] = config.scale * p
        else:
            _store(to.scores, p, passes)
            _store(to.q, growth * q, config.passes)
            if m is not None:
                _store(to.w, growth * w, config.passes)
            _store(to.k, rest * k, passes)
            to.growth[...] = growth[-8:]
        if m is not None:
            to_a[...] = scalars.column("beta", h) * m
        yield


def _invert(config: ScanConfig, refs) -> Steps:
    """The second stage: X from beta M."""
    passes = exact_passes(config.passes)
    inverses = yield from unit_lower_inverses([head_refs[0] for head_refs in refs], passes, config.stacked)
    for head_refs, x in zip(refs, inverses, strict=True):
        _store(head_refs[1 : 1 + len(_summands((), passes))], x, passes)


def _scores(
    config: ScanConfig, keys, decay: Array, factors
) -> Generator[None, None, tuple[Array, tuple[Array, Array]]]:
    """Scores of one head [C, C], segments not masked, and (e^G, e^(G_C - G)); stores the factors of the decay.

    P / s stands on and below the diagonal, with beta M^T above it: tokens without the bit of a level read there what
    those with it read below. A level is right between blocks of 2^level tokens of one block of twice that size. Inside
    these blocks finer levels are kept; outside of them, coarser ones overwrite it.
    """
    q, k, _ = keys
    size, passes = config.chunk, exact_passes(config.passes)
    shape = (size // 8, 8, size)
    block, row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    # Registers of 8 rows differ in one constant alone.
    apart, first = row ^ column, 8 * block
    scores = jnp.broadcast_to(jnp.sum(q * k, axis=1, keepdims=True), (size, size))
    ladder = _ladder(decay, len(_levels(config)))
    for level in _levels(config):
        factor = next(ladder)
        if factors is not None:
            factors[level] = factor
        found = product(*_operands(config, keys, factor, level), "nt", passes, config.stacked)
        yield
        if found.shape[0] < size:
            found = _weave(_halves(scores, level)[0], found, level)
        known = apart >> level == first >> level
        scores = jnp.where(known, scores.reshape(shape), found.reshape(shape)).reshape(size, size)
    return scores, next(ladder)


def _operands(config: ScanConfig, keys, factor: Array, level: int) -> list[tuple[Array, ...]]:
    """Left and right operand of the scores of a level, in summands: q, w of tokens with the bit, k of the others.

    Without beta nobody reads at tokens without the bit: the left operand then has only the rows of `_rows`.
    """
    (q, k, w), passes = keys, exact_passes(config.passes)
    if level < 3:
        q, k, w = factor * q, factor * k, (factor * w if config.erase else None)
        bit = _has_bit(k.shape, level)
        right = k if w is None else jnp.where(bit, w, k)
        return [split_bf16(x, passes) for x in (jnp.where(bit, q, k) if config.beta else q, right)]
    (after, before), (k, k_bit) = _halves(factor, level), _halves(k, level)
    k, rows = after * k, (before * _rows(q, level), before * (_rows(w, level) if config.erase else k_bit))
    if not config.beta:
        # What stands in the columns with the bit is overwritten.
        return [split_bf16(rows[0], passes), split_bf16(_weave(k, k, level), passes)]
    if level == 3:
        return [split_bf16(_weave(k, x, level), passes) for x in rows]
    # Registers of bfloat16 hold 16 rows: k is split once.
    k = split_bf16(k, passes)
    return [tuple(_weave(one, other, level) for one, other in zip(k, split_bf16(x, passes), strict=True)) for x in rows]


def _repeat(x: Array, times: int) -> Array:
    """Repeats every 8 rows of x."""
    return jnp.concatenate([x[top : top + 8] for top in range(0, x.shape[0], 8) for _ in range(times)])


def _ladder(decay: Array, levels: int) -> Generator[Any, None, None]:
    """Yields the factors of every level, exp(p) at tokens with its bit, exp(f) at the others; then (e^p, e^f)."""
    size, width = decay.shape
    # The chip's exponential has base 2.
    g = (decay * LOG2_E).reshape(size // 8, 8, width)
    row = lax.broadcasted_iota(jnp.int32, g.shape, 1)
    before, after, total = g, jnp.zeros_like(g), g
    for level in range(min(levels, 3)):
        bit, half = (row >> level) & 1 == 1, 1 << level
        yield jnp.exp2(jnp.where(bit, before, after)).reshape(size, width)
        sibling = pltpu.roll(total, half, 1)
        if half < 4:
            sibling = jnp.where(bit, sibling, pltpu.roll(total, 8 - half, 1))
        before, after = jnp.where(bit, before + sibling, before), jnp.where(bit, after, after + sibling)
        total += sibling
    # From here on halves of blocks are whole registers, and every 8 rows of `total` are equal: one block has 8.
    before, after, total = (x.reshape(size, width) for x in (before, after, total))
    for level in range(3, levels):
        (p, p_bit), (f, f_bit), totals = _halves(before, level), _halves(after, level), _halves(total, 3)
        yield jnp.exp2(_weave(f, p_bit, level))
        of_first, of_second = (_repeat(x, 1 << (level - 3)) for x in totals)
        before, after = _weave(p, p_bit + of_first, level), _weave(f + of_second, f_bit, level)
        total = totals[0] + totals[1]
    yield jnp.exp2(before), jnp.exp2(after)


def _last_row(x: Array) -> Array:
    """The last row of x [C, K] as a column [K, 1]."""
    return x[-8:].T[:, 7:]


def _decay_state(config: ScanConfig, scalars: TokenScalars, h: int, growth: Array, state: Array) -> Array:
    """A state [K, V], decayed over the whole chunk; 0 where a segment starts inside it."""
    return scalars.decay_state(h, _last_row(growth) * state)


def _forward(config: ScanConfig, scalars: TokenScalars, h: int, prepared, keys, v, state):
    del keys
    mm = functools.partial(product, passes=config.passes)
    refs = _Scaled.of(config, prepared)

    def read(summands):
        return tuple(ref[...] for ref in summands)

    u = v.astype(jnp.float32)
    if config.beta:
        stored = scalars.decay_in(h, mm(read(refs.w), state[...], "nn"))
        yield
        missing = scalars.column("alpha", h) * u - scalars.column("beta", h) * stored
        u = config.exact(read(refs.inverse), missing, "nn")
        yield
    o = scalars.decay_in(h, mm(read(refs.q), state[...], "nn"))
    yield
    o = config.scale * (o + config.exact(read(refs.scores), u, "nn"))
    yield
    written = config.exact(read(refs.k), scalars.write(h, u), "tn")
    return o, _decay_state(config, scalars, h, refs.growth[...], state[...]) + written


def _backward(
    config: ScanConfig, scalars: TokenScalars, gradients: ScalarGradients, h: int, prepared, keys, v, state, do, ds
):
    mm, exact = functools.partial(product, passes=config.passes), config.exact
    q, k, w = _take(config, keys)
    refs = _Prepared.of(config, prepared)
    inverse = tuple(ref[...] for ref in refs.inverse)
    growth, rest = refs.growth[...], refs.rest[...]
    do, value = do.astype(jnp.float32), v.astype(jnp.float32)
    u, scaled_k = value, rest * k
    if config.beta:
        alpha, beta = scalars.column("alpha", h), scalars.column("beta", h)
        stored = scalars.decay_in(h, mm(growth * w, state[...], "nn"))
        yield
        u = exact(inverse, alpha * value - beta * stored, "nn")
        yield
    du = exact(refs.scores[-1][...], do, "tn") + scalars.write(h, exact(scaled_k, ds[...], "nn"))
    yield
    dcarried = scalars.decay_in(h, config.scale * do)
    dgrown_q, dgrown_w = mm(dcarried, state[...], "nt"), None
    dstate = mm(growth * q, dcarried, "tn")
    yield
    dv, dm = du, None
    if config.beta:
        du = exact(inverse, du, "tn")
        yield
        dv, dm = alpha * du, -exact(du, u, "nt")
        yield
        erased = beta * scalars.decay_in(h, du)
        dgrown_w, dstate = -mm(erased, state[...], "nt"), dstate - exact(growth * w, erased, "tn")
        gradients.add_column("alpha", h, jnp.sum(value * du, axis=1, keepdims=True))
        row, column = iotas(dm.shape)
        change = jnp.sum(dm * refs.scores[0][...], axis=1, keepdims=True) - jnp.sum(du * stored, axis=1, keepdims=True)
        gradients.add_column("beta", h, change)
        dm = beta * jnp.where(row > column, dm, 0.0)
        yield
    dp = config.scale * exact(do, u, "nt")
    if config.segments:
        same = scalars.same_segment(h)
        dp, dm = (x if x is None else jnp.where(same, x, 0.0) for x in (dp, dm))
    yield
    dscaled_k = mm(scalars.write(h, u), ds[...], "nt")
    yield
    carried = _decay_state(config, scalars, h, growth, ds[...] * state[...].astype(jnp.float32))
    by_key = yield from _descend(config, (q, k, w), (dp, dm), (dgrown_q, dgrown_w, dscaled_k), refs, carried)
    return by_key, dv, _decay_state(config, scalars, h, growth, ds[...]) + dstate


def _descend(config: ScanConfig, keys, dscores, dgrown, refs: _Prepared, carried) -> Steps:
    """Gradients of q, k, w and of the decay, from those of the scores and of the scaled keys.

    Args:
      config: sizes.
      keys: q, k, w.
      dscores: dP and dM (None without beta), segments masked.
      dgrown: gradients of e^G q, of e^G w (None without beta) and of e^(G_C - G) k.
      refs: what was prepared.
      carried: [K, V], whose sums over columns are the gradient of the decay over the whole chunk.
    """
    (q, k, w), (dp, dm), (dgrown_q, dgrown_w, dscaled_k) = keys, dscores, dgrown
    mm, size = functools.partial(product, passes=config.passes), config.chunk
    passes, (row, column) = exact_passes(config.passes), iotas((size, size))
    diagonal = jnp.sum(jnp.where(row == column, dp, 0.0), axis=1, keepdims=True)
    growth = refs.growth[...]
    dq, dk = growth * dgrown_q, refs.rest[...] * dscaled_k
    last = iotas(q.shape)[0] == size - 1
    dbefore = q * dq + jnp.where(last, jnp.sum(carried.T, axis=0, keepdims=True), 0.0)
    dafter, dtotal = k * dk, jnp.zeros_like(dq)
    dw = None if dm is None else growth * dgrown_w
    dbefore = dbefore if dw is None else dbefore + w * dw
    dq, dk = dq + diagonal * k, dk + diagonal * q
    # The pairs of a level with its rows; registers of 8 rows differ in one constant alone.
    shape = (size // 8, 8, size)
    block, row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    for level in reversed(_levels(config)):
        dtotal += _of_sibling(dtotal + _choose(dafter, dbefore, level), level)
        yield
        factor, pairs = refs.factors[level], (row ^ column) >> level == (8 * block >> level) ^ 1
        own, own_q, own_w = (_rows(x, level) for x in (factor, q, w))
        rows = _merge_rows(own * own_q, None if dm is None else own * own_w, level)
        dpairs = _merge_rows(*(
            None if x is None else _rows(jnp.where(pairs, x.reshape(shape), 0.0).reshape(x.shape), level)
            for x in (dp, dm)
        ), level)  # fmt: skip
        columns = factor * k
        columns = columns if level < 3 else _weave(*[_halves(columns, level)[0]] * 2, level)
        # What is not at a row of the level, or not at a column, is 0.
        dq_level, dw_level = _divide_rows(product(dpairs, columns, "nn", passes, config.stacked), level, dm is not None)
        dk_level = mm(dpairs, rows, "tn")
        yield
        dq_level *= own
        dq, change = _add_rows(dq, dq_level, level), own_q * dq_level
        if dw_level is not None:
            dw_level *= own
            dw, change = _add_rows(dw, dw_level, level), change + own_w * dw_level
        dbefore = _add_rows(dbefore, change, level)
        yield
        dk_level *= factor
        dk, dafter = _choose(dk + dk_level, dk, level), _choose(dafter + k * dk_level, dafter, level)
    dkeys = (dq, dk if dw is None or config.erase else dk + dw, dw)[: config.keys]
    return *dkeys, dbefore + dtotal


STEPS = {
    erases: ChunkStep(
        f"channel_{name}",
        _forward,
        _backward,
        (_prepare, _invert) if erases else (_prepare,),
        _prepared,
        delay=14,
        stagger=6,
    )
    for erases, name in ((False, "linear_attention"), (True, "delta_rule"))
}


def run(call: MatrixCall, sizes: Tuning | None = None) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs a matrix memory with a decay per channel, an erase vector or a write strength of its own.

    A decay per head is repeated for every channel.

    Args:
      call: any with one write per token.
      sizes: in place of those of the table in tuning.py.

    Returns:
      The output (bfloat16 where q, k and v are, else float32), and the state.

    Raises:
      NotImplementedError: no TPU; float64; a chunk size that no kernel has.
    """
    decay = jnp.zeros(call.v.shape[:3], jnp.float32) if call.decay is None else call.decay
    if decay.ndim == 3:
        decay = jnp.broadcast_to(decay[..., None], (*decay.shape, call.q.shape[3]))
    call = dataclasses.replace(call, decay=decay)
    return run_scan(STEPS[call.beta is not None], plan_call(call, sizes), call)
