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
f = G_C - G. The backward pass adds the gradients of p and f in the reverse order.

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
from collections.abc import Generator
from typing import Any, NamedTuple

import jax.numpy as jnp
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


def _levels(config: ScanConfig) -> range:
    return range(config.chunk.bit_length() - 1)


def _has_bit(shape: tuple[int, ...], level: int) -> Array:
    """Whether the number of a token (its row) has bit `level`."""
    return (iotas(shape)[0] >> level) & 1 == 1


def _pairs(size: int, level: int) -> Array:
    """The pairs (row, column) of a level [C, C]."""
    row, column = iotas((size, size))
    return ((row ^ column) >> level == 1) & (row > column)


def _rows(x: Array, level: int) -> Array:
    """The rows of x whose number has bit `level`, where they are whole registers of 8 rows; else all of x."""
    half = 1 << level
    return x if half < 8 else jnp.concatenate([x[top : top + half] for top in range(half, x.shape[0], 2 * half)])


def _spread(x: Array, level: int) -> Array:
    """The inverse of `_rows`, 0 in the other rows."""
    half = 1 << level
    if half < 8:
        return x
    zeros = jnp.zeros((half, x.shape[1]), x.dtype)
    return jnp.concatenate([part for top in range(0, x.shape[0], half) for part in (zeros, x[top : top + half])])


def _merge_rows(q: Array, w: Array | None, level: int) -> Array:
    """The rows of a level of q and, where it is given, of w as one operand: one product serves both."""
    half = 1 << level
    if w is None:
        return _rows(q, level)
    if half < 8:
        # Those of w take the places that q leaves free.
        return jnp.where(_has_bit(q.shape, level), q, pltpu.roll(w, q.shape[0] - half, 0))
    return jnp.concatenate([_rows(q, level), _rows(w, level)])


def _divide_rows(x: Array, level: int, merged: bool) -> tuple[Array, Array | None]:
    """The inverse of `_merge_rows`, 0 in the other rows; None without w."""
    half = 1 << level
    if not merged:
        return _spread(x, level), None
    if half < 8:
        bit = _has_bit(x.shape, level)
        return jnp.where(bit, x, 0.0), jnp.where(bit, pltpu.roll(x, half, 0), 0.0)
    middle = x.shape[0] // 2
    return _spread(x[:middle], level), _spread(x[middle:], level)


def _of_sibling(x: Array, level: int) -> Array:
    """Row r ^ 2^level of x [C, K], for each row r."""
    size, half = x.shape[0], 1 << level
    return jnp.where(_has_bit(x.shape, level), pltpu.roll(x, half, 0), pltpu.roll(x, size - half, 0))


def _prepared(config: ScanConfig, backward: bool) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of the fields of `_Prepared`."""
    square, wide = (config.chunk, config.chunk), (config.chunk, config.key)
    exact = [(square, jnp.bfloat16)] * 2 if exact_passes(config.passes) == 3 else [(square, jnp.float32)]
    inverse = exact if config.beta else []
    ends = [(wide, jnp.float32)] * 2
    if not backward:
        return inverse + exact + ends
    scores = [(square, jnp.float32)] * (2 if config.beta else 1)
    return inverse + scores + [((len(_levels(config)), *wide), jnp.float32), *ends]


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
        count = (2 if exact_passes(config.passes) == 3 else 1) if config.beta else 0
        *scores, growth, rest = refs[count:]
        factors = scores.pop() if len(scores[-1].shape) == 3 else None
        return cls(refs[:count], scores, factors, growth, rest)


def _take(config: ScanConfig, keys) -> tuple[Array, Array, Array]:
    """q, k and w of one head, in float32."""
    q, k, w = (*keys[: config.keys], keys[1])[:3]
    return q.astype(jnp.float32), k.astype(jnp.float32), w.astype(jnp.float32)


def _prepare(config: ScanConfig, scalars: TokenScalars, heads, keys, refs) -> Steps:
    passes = exact_passes(config.passes)
    refs, a = [_Prepared.of(config, head_refs) for head_refs in refs], []
    for h, own, to in zip(heads, keys, refs, strict=True):
        m, p = yield from _scores(config, own, to)
        if config.segments:
            same = scalars.same_segment(h)
            m, p = (x if x is None else jnp.where(same, x, 0.0) for x in (m, p))
        p = config.scale * p
        scores = split_bf16(p, passes) if to.factors is None else [x for x in (m, p) if x is not None]
        for ref, x in zip(to.scores, scores, strict=True):
            ref[...] = x
        if m is not None:
            a.append(scalars.column("beta", h) * m)
        yield
    if not a:
        return
    inverses = yield from unit_lower_inverses(a, passes)
    for to, x in zip(refs, inverses, strict=True):
        for ref, summand in zip(to.inverse, split_bf16(x, passes), strict=True):
            ref[...] = summand


def _scores(config: ScanConfig, keys, to: _Prepared) -> Generator[None, None, tuple[Array | None, Array]]:
    """M (None in linear attention) and P / s of one head, segments not masked; stores the factors of the decay."""
    q, k, w = _take(config, keys)
    size, passes = config.chunk, exact_passes(config.passes)
    row, column = iotas((size, size))
    p = jnp.where(row == column, jnp.sum(q * k, axis=1, keepdims=True), 0.0)
    m = jnp.zeros((size, size), jnp.float32) if config.beta else None
    before, after, total = keys[-1], jnp.zeros_like(keys[-1]), keys[-1]
    for level in _levels(config):
        bit = _has_bit(before.shape, level)
        factor = jnp.exp(jnp.where(bit, before, after))
        if to.factors is not None:
            to.factors[level] = factor
        pairs = _pairs(size, level)
        columns = split_bf16(factor * k, passes)
        rows = _merge_rows(factor * q, None if m is None else factor * w, level)
        of_q, of_w = _divide_rows(product(rows, columns, "nt", passes), level, m is not None)
        yield
        p = jnp.where(pairs, of_q, p)
        m = m if of_w is None else jnp.where(pairs, of_w, m)
        sibling = _of_sibling(total, level)
        before, after = jnp.where(bit, before + sibling, before), jnp.where(bit, after, after + sibling)
        total += sibling
    to.growth[...], to.rest[...] = jnp.exp(before), jnp.exp(after)
    return m, p


def _last_row(x: Array) -> Array:
    """The last row of x [C, K] as a column [K, 1]."""
    return x[-8:].T[:, 7:]


def _decay_state(config: ScanConfig, scalars: TokenScalars, h: int, growth: Array, state: Array) -> Array:
    """A state [K, V], decayed over the whole chunk; 0 where a segment starts inside it."""
    return scalars.decay_state(h, _last_row(growth) * state)


def _forward(config: ScanConfig, scalars: TokenScalars, h: int, prepared, keys, v, state):
    mm = functools.partial(product, passes=config.passes)
    q, k, w = _take(config, keys)
    refs = _Prepared.of(config, prepared)
    growth, u = refs.growth[...], v.astype(jnp.float32)
    if config.beta:
        stored = scalars.decay_in(h, mm(growth * w, state[...], "nn"))
        yield
        missing = scalars.column("alpha", h) * u - scalars.column("beta", h) * stored
        u = config.exact(tuple(ref[...] for ref in refs.inverse), missing, "nn")
        yield
    o = config.scale * scalars.decay_in(h, mm(growth * q, state[...], "nn"))
    yield
    o += config.exact(tuple(ref[...] for ref in refs.scores), u, "nn")
    yield
    written = config.exact(refs.rest[...] * k, scalars.write(h, u), "tn")
    return o, _decay_state(config, scalars, h, growth, state[...]) + written


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
    carried = _decay_state(config, scalars, h, growth, ds[...] * state[...])
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
    for level in reversed(_levels(config)):
        bit = _has_bit(q.shape, level)
        dtotal += _of_sibling(dtotal + jnp.where(bit, dbefore, dafter), level)
        yield
        factor, pairs = refs.factors[level], _pairs(size, level)
        rows = _merge_rows(factor * q, None if dm is None else factor * w, level)
        dpairs, dpairs_w = (None if x is None else jnp.where(pairs, x, 0.0) for x in (dp, dm))
        dpairs, columns = _merge_rows(dpairs, dpairs_w, level), split_bf16(factor * k, passes)
        # What is not at a row of the level, or not at a column, is 0.
        dq_level, dw_level = _divide_rows(product(dpairs, columns, "nn", passes), level, dm is not None)
        dk_level = factor * mm(dpairs, rows, "tn")
        yield
        dq_level *= factor
        dbefore += q * dq_level
        if dw_level is not None:
            dw_level *= factor
            dw += dw_level
            dbefore += w * dw_level
        yield
        dq, dk, dafter = dq + dq_level, dk + dk_level, dafter + k * dk_level
    dkeys = (dq, dk if dw is None or config.erase else dk + dw, dw)[: config.keys]
    return *dkeys, dbefore + dtotal


STEPS = {
    erases: ChunkStep(f"channel_{name}", _forward, _backward, (_prepare,), _prepared, delay=8)
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
