"""DeltaFormer on Hopper: layout of a call, and the write in spans of tokens, with its rule of differentiation.

What the rows of a span see of earlier slots is a read of keys and u that exist already, with programs for all row
blocks of all heads: few heads fill the chip too. The scan of write.py is left with what lies within the span.
Backward, spans in reverse: what reaches a span's dU from later rows is again parallel over blocks, then the reverse
scan gives dP. Once all of dP is known the gradients of the scores are those of attention.

Memory is linear in time, backward too. Saved: the inputs, u, and the log-sum-exp of the rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.calls import AttentionCall
from memformer.core.mask import Mask, join_cache
from memformer.core.segments import pad_time
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.gpu.attention.backward import key_gradients, query_gradients
from memformer.pallas.gpu.attention.config import AttentionConfig, plan_call
from memformer.pallas.gpu.attention.forward import read
from memformer.pallas.gpu.attention.softmax_attention import attend
from memformer.pallas.gpu.attention.write import write_backward, write_forward
from memformer.pallas.gpu.wgmma import split_outside
from memformer.pallas.layout import heads_first, join_slots

__all__ = ["run"]


def run(call: AttentionCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B T G V"]]:
    """Runs DeltaFormer; w, alpha and beta are given.

    Returns:
      The output in bfloat16, and u in float32 (16 bits are exact).

    Raises:
      NotImplementedError: no kernel serves this machine or call; the message says why.
    """
    operands = {"q": call.q, "k": call.k, "w": call.w, "v": call.v}
    config, reading = (plan_call(call, kernel, operands) for kernel in (call.write_kernel, call.read_kernel))
    length, width = call.v.shape[1], call.v.shape[3]
    mask = join_cache(call.mask, config.rows, config.span)

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
    arrays = (k, w, v, alpha, beta, cache_u, q)
    k, w, v, alpha, beta, cache_u, q = (vary_like(x, *arrays, *jax.tree.leaves(mask)) for x in arrays)
    u = write(config, k, w, v, alpha, beta, cache_u, mask)
    o = attend(reading, jnp.bfloat16, k, q, jnp.concatenate([cache_u, u], axis=2), mask)
    return tuple(jnp.swapaxes(x, 1, 2)[:, :length, :, :width] for x in (o, u))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def write(
    config: AttentionConfig, k: Array, w: Array, v: Array, alpha: Array, beta: Array, cache_u: Array, mask: Mask
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
    """
    parts, _ = _write(config, k, w, v, alpha, beta, cache_u, mask)
    return _sum_parts(parts, cache_u.shape[2])


def _write_forward(config, k, w, v, alpha, beta, cache_u, mask):
    parts, lse = _write(config, k, w, v, alpha, beta, cache_u, mask)
    return _sum_parts(parts, cache_u.shape[2]), (k, w, v, alpha, beta, cache_u, mask, parts, lse)


def _write_backward(config, saved, du):
    k, w, v, alpha, beta, cache_u, mask, u, lse = saved
    before = cache_u.shape[2]
    dp = _solve_transposed(config, k[:, :, before:], w, beta, lse, du, u[0][:, :, before:], mask)
    exact = _sum_parts(dp)
    target = alpha[..., None] * v.astype(jnp.float32)
    scalars = {"lse": lse, "beta": beta, "delta": None}
    if lse is not None:
        scalars["delta"] = -jnp.sum(exact * (target - _sum_parts(u, before)), axis=-1)
    everything = dataclasses.replace(config, own=True, strict=True)
    dw, dbeta = query_gradients(everything, k, w, u, dp, mask, scalars)
    (dk,) = key_gradients(everything, k, w, u, dp, mask, scalars, ("dk",))
    dcache = jnp.zeros(cache_u.shape, cache_u.dtype)
    if before:
        _, far = _span_configs(config)
        cached = (k[:, :, :before], w, tuple(x[:, :, :before] for x in u), dp)
        (dcache,) = key_gradients(far, *cached, _slice_mask(mask, keys=(0, before)), scalars, ("dx",))
    dv, dalpha = alpha[..., None] * exact, jnp.sum(v.astype(jnp.float32) * exact, axis=-1)
    inputs = (k, w, v, alpha, beta, cache_u)
    gradients = (dk, dw, dv, dalpha, dbeta, dcache)
    return *(x.astype(y.dtype) for x, y in zip(gradients, inputs, strict=True)), None


write.defvjp(_write_forward, _write_backward)


def _span_configs(config: AttentionConfig) -> tuple[AttentionConfig, AttentionConfig]:
    """Of the scan within a span, and of the read of all slots before it."""
    far = dataclasses.replace(config, before=0, own=False, strict=True)
    return dataclasses.replace(far, own=True), far


def _sum_parts(parts: tuple[Array, Array], start: int = 0) -> Array:
    return parts[0][:, :, start:].astype(jnp.float32) + parts[1][:, :, start:].astype(jnp.float32)


def _slice(x: Array, start, size: int, axis: int = 2) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _slice_mask(mask: Mask, *, queries=None, keys=None) -> Mask:
    """The mask of the (start, size) ranges of queries and of keys that are given."""
    if mask.query_segment is None:
        return mask
    query, key = (
        x if place is None else _slice(x, *place, axis=1)
        for x, place in ((mask.query_segment, queries), (mask.key_segment, keys))
    )
    return Mask(query_segment=query, key_segment=key)


def _write(config, k, w, v, alpha, beta, cache_u, mask):
    """u of all slots in two parts [B, G, S, V]; the log-sum-exp of the rows [B, G, T], None without a normaliser."""
    before, length, span = cache_u.shape[2], w.shape[2], config.span
    own, far = _span_configs(config)
    target = alpha[..., None] * v.astype(jnp.float32)
    if before == 0 and length == span:
        return write_forward(own, k, w, target, beta, mask, None)
    zeros = jnp.zeros(target.shape, jnp.bfloat16)
    everything = tuple(jnp.concatenate([x, zeros], axis=2) for x in split_outside(cache_u))

    def step(everything, start):
        queries = (start, span)
        rows = _slice(w, *queries)
        value, lse = read(far, jnp.float32, k, rows, everything, _slice_mask(mask, queries=queries), before + start)
        keys = (before + start, span)
        u, lse = write_forward(
            own,
            _slice(k, *keys),
            rows,
            _slice(target, *queries),
            _slice(beta, *queries),
            _slice_mask(mask, queries=queries, keys=keys),
            (value, lse),
        )
        everything = tuple(
            lax.dynamic_update_slice_in_dim(x, y, before + start, 2) for x, y in zip(everything, u, strict=True)
        )
        return everything, lse

    starts = jnp.arange(0, length, span, dtype=jnp.int32)
    everything, lse = lax.scan(step, everything, starts)
    return everything, None if lse is None else jnp.moveaxis(lse, 0, 2).reshape(beta.shape)


def _solve_transposed(config, k, w, beta, lse, du, u, mask):
    """dP in two parts [B, G, T, V], from the last span to the first; arrays of the call's own slots."""
    length, span, before = w.shape[2], config.span, config.before * config.rows
    own, far = _span_configs(config)
    # delta has no part in dx.
    scalars = {"lse": lse, "beta": beta, "delta": lse}
    if length == span:
        return write_backward(own, k, w, du, scalars, _slice_mask(mask, keys=(before, length)))
    dp = (jnp.zeros(du.shape, jnp.bfloat16),) * 2

    def step(dp, start):
        queries, keys = (start, span), (before + start, span)
        rows = {name: None if x is None else _slice(x, *queries) for name, x in scalars.items()}
        own_k, own_u = _slice(k, *queries), (_slice(u, *queries),)
        (later,) = key_gradients(far, own_k, w, own_u, dp, _slice_mask(mask, keys=keys), scalars, ("dx",), start + span)
        here = _slice_mask(mask, queries=queries, keys=keys)
        new = write_backward(own, own_k, _slice(w, *queries), _slice(du, *queries) + later, rows, here)
        return tuple(lax.dynamic_update_slice_in_dim(x, y, start, 2) for x, y in zip(dp, new, strict=True)), None

    starts = jnp.arange(0, length, span, dtype=jnp.int32)
    return lax.scan(step, dp, starts, reverse=True)[0]
