"""DeltaFormer on Hopper: the write, its rule of differentiation, and the op.

Rows R of one block, earlier slots E, A the matrix of the write kernel, B = diag(beta):

    u_R  = (I + B A[R, R])^-1 (alpha V_R - B A[R, E] u_E)
    dP_R = (I + B A[R, R])^-T (dU_R - sum over later R' of A[R', R]^T B dP_R')

A holds the decay of each pair, if any: the inverse and the scans do not change.

A call is cut into spans of tokens. What the rows of a span see of earlier slots is a read of keys and u that exist
already (softmax_attention.py), with programs for all row blocks of all heads: few heads fill the chip too. One kernel
scans the blocks of each head within a span, forward for u, in reverse for dP. Backward, spans come in reverse: what
reaches a span's dU from later rows is again parallel over blocks. Once all of dP is known the gradients of the scores
are those of attention. Memory is linear in time, backward too. Saved: the inputs, u, and the log-sum-exp of the rows.

The kernel of the scans is in write_kernel.py.

Source: "DeltaFormer: Unlock the State Space of Transformer" (NeurIPS 2025), section 3.3.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.calls import AttentionCall
from memformer.core.decay import CumulativeDecay
from memformer.core.mask import Mask
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.gpu.attention import tiles
from memformer.pallas.gpu.attention.backward import key_gradients, query_gradients, sums_scores
from memformer.pallas.gpu.attention.config import AttentionConfig, plan_call
from memformer.pallas.gpu.attention.scalars import (
    column_values,
    key_mask,
    pack_scalars,
    query_mask,
    row_values,
)
from memformer.pallas.gpu.attention.softmax_attention import (
    attend_with_sinks,
    read,
)
from memformer.pallas.gpu.attention.write_kernel import write_columns, write_rows, write_shard
from memformer.pallas.layout import block_mask, heads_first, join_slots
from memformer.pallas.pair_decay import QueryKeyDecay, fraction_gradient, join_decay
from memformer.pallas.sharding import split_batch_and_heads

__all__ = ["run"]


class _Earlier(NamedTuple):
    """Of earlier slots, for a span.

    Attributes:
      value: their read, [B, G, span, V].
      lse: its log-sum-exp, or None.
      u: of all slots in two parts [B, G, S, V], those from the span on not known.
      bound: `tiles.bounds` of the span's first slot and of its first row.
    """

    value: Array
    lse: Array | None
    u: tuple[Array, Array]
    bound: Array


def _scan_forward(
    config: AttentionConfig,
    k: Array,
    w: Array,
    v: Array,
    scalars: Array,
    mask: Mask,
    decay: QueryKeyDecay | None,
    earlier: _Earlier | None,
) -> tuple[tuple[Array, Array], Array | None]:
    """u of all slots in two parts, and the log-sum-exp of the span's rows to base 2 (None without a normaliser).

    Args:
      config: sizes.
      k: of all slots, [B, G, S, K].
      w: of all rows, [B, G, T, K].
      v: of all rows, [B, G, T, V].
      scalars: of all rows, packed by `write_rows`.
      mask: of the span, over whole tiles.
      decay: of the span, or None.
      earlier: where the span is not the whole, what is known of earlier slots.
    """
    heads = k.shape[1]
    rest: tuple[Array, ...] = ()
    if earlier is not None:
        lse = () if earlier.lse is None else (earlier.lse,)
        rest = (earlier.value, *lse, *earlier.u, earlier.bound)
    rest += (scalars,)
    columns = write_columns(config, False)
    if columns:
        rest += (pack_scalars(columns, heads, column_values(key_mask(mask), decay and decay[1])),)
    rest += tuple(tiles.row_bounds(config, k, config.span, mask).values())
    results = 2 + config.similarity.normalized
    kernel = split_batch_and_heads(write_shard, (config, False, bool(earlier)), config.axes, results=results)
    high, low, *lse = kernel(k, w, v, *rest)
    return (high, low), lse[0] if lse else None


def _scan_reverse(
    config: AttentionConfig,
    k: Array,
    w: Array,
    du: Array,
    scalars: dict[str, Array | None],
    mask: Mask,
    decay: QueryKeyDecay | None,
) -> tuple[Array, ...]:
    """dP [B, G, T, V] in two parts.

    Args:
      config, k, w, mask, decay: see `_scan_forward`.
      du: gradient of u, [B, G, T, V] float32.
      scalars: lse (with a normaliser) and beta of the rows [B, G, T].
    """
    heads, rows = k.shape[1], write_rows(config, True)
    query, key = (None, None) if decay is None else decay
    rest: tuple[Array, ...] = ()
    if rows:
        rest += (pack_scalars(rows, heads, row_values(key_mask(mask), key)),)
    columns = scalars | column_values(query_mask(mask), query, transposed=True)
    rest += (pack_scalars(write_columns(config, True), heads, columns),)
    if config.bounded:
        rest += tuple(tiles.column_bounds(config, k, w, mask).values())
    return split_batch_and_heads(write_shard, (config, True, False), config.axes, results=2)(w, k, du, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def write(
    config: AttentionConfig,
    k: Array,
    w: Array,
    v: Array,
    alpha: Array,
    beta: Array,
    cache_u: Array,
    mask: Mask,
    decay: QueryKeyDecay | None,
) -> Array:
    """The writes u [B, G, T, V] of a call, float32, exact to 16 bits.

    Args:
      config: sizes; `before` counts the blocks of the cache. T is a multiple of the span.
      k: keys of the cache and then of the call, [B, G, S, K].
      w: [B, G, T, K].
      v: [B, G, T, V].
      alpha: [B, G, T].
      beta: [B, G, T].
      cache_u: u of the cache, [B, G, S - T, V].
      mask: over whole tiles.
      decay: of key heads, or None.
    """
    parts, _ = _write(config, k, w, v, alpha, beta, cache_u, mask, decay)
    return _join_parts(parts, cache_u.shape[2])


def _write_forward(config, k, w, v, alpha, beta, cache_u, mask, decay):
    parts, lse = _write(config, k, w, v, alpha, beta, cache_u, mask, decay)
    return _join_parts(parts, cache_u.shape[2]), (k, w, v, alpha, beta, cache_u, mask, decay, parts, lse)


def _write_backward(config, saved, du):
    k, w, v, alpha, beta, cache_u, mask, decay, u, lse = saved
    before = cache_u.shape[2]
    dp = _solve_transposed(config, k[:, :, before:], w, beta, lse, du, u[0][:, :, before:], mask, decay)
    exact = _join_parts(dp)
    target = alpha[..., None] * v.astype(jnp.float32)
    scalars = {"lse": lse, "beta": beta, "delta": None}
    if lse is not None:
        scalars["delta"] = -jnp.sum(exact * (target - _join_parts(u, before)), axis=-1)
    everything = dataclasses.replace(config, own=True, strict=True)
    operands = (k, w, u, dp, mask, decay, scalars)
    dw, dbeta, *query_decay = query_gradients(everything, *operands)
    dk, *key_decay = key_gradients(everything, *operands, ("dk",) + ("ddecay",) * sums_scores(config))
    dcache = vary_like(jnp.zeros(cache_u.shape, cache_u.dtype), cache_u)
    if before:
        _, far = _span_configs(config)
        cached = (k[:, :, :before], w, tuple(x[:, :, :before] for x in u), dp)
        (dcache,) = key_gradients(far, *cached, *_slice_pairs(mask, decay, keys=(0, before)), scalars, ("dx",))
    dv, dalpha = alpha[..., None] * exact, jnp.sum(v.astype(jnp.float32) * exact, axis=-1)
    inputs = (k, w, v, alpha, beta, cache_u)
    gradients = (dk, dw, dv, dalpha, dbeta, dcache)
    if config.decay and not key_decay:
        query_decay = [beta * dbeta]
        key_decay = [-jnp.sum(_join_parts(u) * jnp.concatenate([dcache, exact - du], axis=2), axis=-1)]
    ddecay = fraction_gradient(*query_decay, *key_decay) if config.decay else None
    return *(x.astype(y.dtype) for x, y in zip(gradients, inputs, strict=True)), None, ddecay


write.defvjp(_write_forward, _write_backward)


def _span_configs(config: AttentionConfig) -> tuple[AttentionConfig, AttentionConfig]:
    """Of the scan within a span, and of the read of all slots before it."""
    far = dataclasses.replace(config, before=0, own=False, strict=True)
    return dataclasses.replace(far, own=True), far


def _join_parts(parts: tuple[Array, Array], start: int = 0) -> Array:
    return parts[0][:, :, start:].astype(jnp.float32) + parts[1][:, :, start:].astype(jnp.float32)


def _slice(x: Array, start, size: int, axis: int = 2) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _slice_pairs(
    mask: Mask, decay: QueryKeyDecay | None, *, queries=None, keys=None
) -> tuple[Mask, QueryKeyDecay | None]:
    """Mask and decay of the (start, size) ranges of queries and of keys that are given."""

    def part(x, place, axis):
        return x if x is None or place is None else _slice(x, *place, axis=axis)

    mask = Mask(
        query_segment=part(mask.query_segment, queries, 1),
        key_segment=part(mask.key_segment, keys, 1),
        query_rank=part(mask.query_rank, queries, 1),
        key_rank=part(mask.key_rank, keys, 1),
    )
    if decay is None:
        return mask, None
    sides = zip(decay, (queries, keys), strict=True)
    return mask, QueryKeyDecay(*(CumulativeDecay(*(part(x, place, 2) for x in side)) for side, place in sides))


def _write(config, k, w, v, alpha, beta, cache_u, mask, decay):
    """u of all slots in two parts [B, G, S, V]; the log-sum-exp of the rows [B, G, T], None without a normaliser."""
    before, length, span = cache_u.shape[2], w.shape[2], config.span
    own, far = _span_configs(config)
    by_name = {"alpha": alpha, "beta": beta} | row_values(query_mask(mask), decay and decay[0])
    scalars = pack_scalars(write_rows(own, False), k.shape[1], by_name)
    if before == 0 and length == span:
        return _scan_forward(own, k, w, v, scalars, mask, decay, None)
    empty = vary_like(lax.empty(v.shape, jnp.dtype(config.value_dtype)), v)
    everything = tuple(jnp.concatenate([x, empty], axis=2) for x in tiles.split_outside(config, cache_u))

    def step(everything, start):
        # The kernels take whole arrays, and write u in place: nothing is copied.
        queries, keys = (start, span), (before + start, span)
        bound = tiles.bounds(k, before + start, start)
        seen = _slice_pairs(mask, decay, queries=queries)
        value, lse = read(far, jnp.float32, k, w, everything, *seen, (bound, span))
        here = _slice_pairs(mask, decay, queries=queries, keys=keys)
        return _scan_forward(own, k, w, v, scalars, *here, _Earlier(value, lse, everything, bound))

    starts = jnp.arange(0, length, span, dtype=jnp.int32)
    everything, lse = lax.scan(step, everything, starts)
    return everything, None if lse is None else jnp.moveaxis(lse, 0, 2).reshape(beta.shape)


def _solve_transposed(config, k, w, beta, lse, du, u, mask, decay):
    """dP in two parts [B, G, T, V], from the last span to the first; arrays of the call's own slots."""
    length, span, before = w.shape[2], config.span, config.before * config.rows
    own, far = _span_configs(config)
    # delta has no part in dx.
    scalars = {"lse": lse, "beta": beta, "delta": lse}
    if length == span:
        return _scan_reverse(own, k, w, du, scalars, *_slice_pairs(mask, decay, keys=(before, length)))
    dp = (vary_like(jnp.zeros(du.shape, jnp.dtype(config.value_dtype)), du),) * 2

    def step(dp, start):
        queries, keys = (start, span), (before + start, span)
        rows = {name: None if x is None else _slice(x, *queries) for name, x in scalars.items()}
        own_k, own_u = _slice(k, *queries), (_slice(u, *queries),)
        seen = _slice_pairs(mask, decay, keys=keys)
        (later,) = key_gradients(far, own_k, w, own_u, dp, *seen, scalars, ("dx",), start + span)
        here = _slice_pairs(mask, decay, queries=queries, keys=keys)
        new = _scan_reverse(own, own_k, _slice(w, *queries), _slice(du, *queries) + later, rows, *here)
        return tuple(lax.dynamic_update_slice_in_dim(x, y, start, 2) for x, y in zip(dp, new, strict=True)), None

    starts = jnp.arange(0, length, span, dtype=jnp.int32)
    return lax.scan(step, dp, starts, reverse=True)[0]


def run(call: AttentionCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B T G V"]]:
    """Runs DeltaFormer; w, alpha and beta are given.

    Returns:
      The output in the dtype of q, k, w and v, and u in float32 (16 bits are exact).

    Raises:
      NotImplementedError: no kernel serves this machine or call; the message says why.
    """
    operands = {"q": call.q, "k": call.k, "w": call.w, "v": call.v}
    config = plan_call(call, call.write_kernel, operands, writes=True)
    reading = plan_call(call, call.read_kernel, operands)
    length, width = call.v.shape[1], call.v.shape[3]
    mask = block_mask(call, config.rows, config.span)

    def pad(x, width):
        return pad_time(x, width, axis=3)

    cache_k = None if call.cache is None else pad(call.cache.k, config.key)
    k = join_slots(cache_k, pad(call.k, config.key), config.rows, config.span)
    q, w = (heads_first(pad(x, config.key), config.span) for x in (call.q, call.w))
    v = heads_first(pad(call.v, config.value), config.span)
    alpha, beta = (heads_first(x.astype(jnp.float32), config.span) for x in (call.alpha, call.beta))
    if call.cache is None:
        cache_u = jnp.zeros((*k.shape[:2], 0, config.value), jnp.float32)
    else:
        cache_u = heads_first(pad(call.cache.values, config.value), config.rows).astype(jnp.float32)
    arrays = (k, w, v, alpha, beta, cache_u, q, join_decay(call, config.rows, config.span))
    arrays = jax.tree.map(lambda x: vary_like(x, *jax.tree.leaves((arrays, mask))), arrays)
    k, w, v, alpha, beta, cache_u, q, decay = arrays
    u = write(config, k, w, v, alpha, beta, cache_u, mask, decay)
    # Each query head of a group has the group's decay.
    shared = jax.tree.map(lambda x: jnp.repeat(x, q.shape[1] // k.shape[1], axis=1), decay)
    o = attend_with_sinks(reading, call.sinks, k, q, jnp.concatenate([cache_u, u], axis=2), mask, shared)
    return tuple(jnp.swapaxes(x, 1, 2)[:, :length, :, :width] for x in (o, u))
