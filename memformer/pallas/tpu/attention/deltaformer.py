"""DeltaFormer on TPU: layout of a call, and the write in spans of tokens, with its rule of differentiation.

A span is as many tokens as VMEM holds keys and u of. The slots before it, of the cache and of earlier spans, are first
read as softmax attention reads (forward.py); the kernel of write.py continues from these sums.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memformer.core.calls import AttentionCall
from memformer.core.mask import Mask, join_cache
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.pallas.layout import heads_first, join_slots
from memformer.pallas.tpu.attention.backward import attention_backward
from memformer.pallas.tpu.attention.config import AttentionConfig, plan_call
from memformer.pallas.tpu.attention.forward import read
from memformer.pallas.tpu.attention.softmax_attention import attend, output_dtype, score_operand
from memformer.pallas.tpu.attention.write import solve_transposed, write_span

__all__ = ["run"]


def run(call: AttentionCall) -> tuple[Float[Array, "B T H V"], Float[Array, "B T G V"]]:
    """Runs DeltaFormer; w, alpha and beta are given.

    Returns:
      The output, bfloat16 where v is and products have one pass, else float32; and u in float32.

    Raises:
      NotImplementedError: no TPU; float64; a chunk size that no kernel has.
    """
    config = plan_call(call, call.write_kernel)
    size, length = config.block, call.k.shape[1]
    mask = join_cache(call.mask, size)
    k = join_slots(None if call.cache is None else call.cache.k, score_operand(config, call.k), size)
    if call.cache is None:
        cache_u = jnp.zeros((*k.shape[:2], 0, call.v.shape[3]), jnp.float32)
    else:
        cache_u = heads_first(call.cache.values, size).astype(jnp.float32)
    q, w = (heads_first(score_operand(config, x), size) for x in (call.q, call.w))
    v, alpha, beta = (heads_first(x, size) for x in (call.v, call.alpha.astype("float32"), call.beta.astype("float32")))
    arrays = (k, w, v, alpha, beta, cache_u, q)
    k, w, v, alpha, beta, cache_u, q = (vary_like(x, *arrays, *jax.tree.leaves(mask)) for x in arrays)
    u = write(config, k, w, v, alpha, beta, cache_u, mask)
    slots = u if call.cache is None else jnp.concatenate([cache_u, u], axis=2)
    reading = dataclasses.replace(config, similarity=call.read_kernel)
    o = attend(reading, output_dtype(config, call), k, q, slots, mask)
    return tuple(jnp.swapaxes(x, 1, 2)[:, :length] for x in (o, u))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def write(
    config: AttentionConfig, k: Array, w: Array, v: Array, alpha: Array, beta: Array, cache_u: Array, mask: Mask
) -> Array:
    """The writes u [B, G, T, V] of a call in float32; memory is linear in time, backward too.

    Saved: the inputs, u and the log-sum-exp of the rows.

    Args:
      config: sizes; `before` counts the blocks of the cache.
      k: keys of the cache and then of the call, [B, G, S, K]; S and T are multiples of R.
      w: [B, G, T, K].
      v: [B, G, T, V].
      alpha: [B, G, T].
      beta: [B, G, T].
      cache_u: u of the cache, [B, G, S - T, V].
      mask: over whole blocks.
    """
    return _write(config, k, w, v, alpha, beta, cache_u, mask)[0]


class _Span(NamedTuple):
    """The tokens of a span, and how many slots lie before them."""

    rows: slice
    slots: int

    @property
    def own(self) -> slice:
        """The slots of the span's tokens."""
        return slice(self.slots, self.slots + self.rows.stop - self.rows.start)


def _spans(config: AttentionConfig, length: int) -> list[_Span]:
    """Spans of the call that fit in VMEM."""
    step, before = config.resident * config.block, config.before * config.block
    return [_Span(slice(s, min(s + step, length)), before + s) for s in range(0, length, step)]


def _span_configs(config: AttentionConfig, span: _Span) -> tuple[AttentionConfig, AttentionConfig]:
    """Of the write within a span, and of the read of all slots before it."""
    own = dataclasses.replace(config, before=0, own=True, strict=True)
    return own, dataclasses.replace(config, before=span.slots // config.block, own=False)


def _span_masks(config: AttentionConfig, span: _Span, mask: Mask) -> tuple[Mask, Mask]:
    """Of the same two."""
    if not config.segments:
        return mask, mask
    query, key = mask.query_segment[:, span.rows], mask.key_segment
    own = Mask(query_segment=query, key_segment=key[:, span.own])
    return own, Mask(query_segment=query, key_segment=key[:, : span.slots])


def _value_operand(config: AttentionConfig, u: Array) -> Array:
    """u or its gradient as products take them."""
    return u.astype(jnp.bfloat16) if config.value_passes == 1 else u


def _write(config, k, w, v, alpha, beta, cache_u, mask):
    """u, and the log-sum-exp of the rows."""
    slots, lse = cache_u, []
    for span in _spans(config, w.shape[2]):
        own, before = _span_configs(config, span)
        own_mask, before_mask = _span_masks(config, span, mask)
        rows, start = span.rows, None
        if span.slots:
            values = _value_operand(config, slots)
            start = read(before, jnp.float32, k[:, :, : span.slots], w[:, :, rows], values, before_mask)
        operands = (k[:, :, span.own], *(x[:, :, rows] for x in (w, v, alpha, beta)))
        u, span_lse = write_span(own, *operands, own_mask, start)
        slots = jnp.concatenate([slots, u], axis=2) if slots.shape[2] else u
        lse.append(span_lse)
    return slots[:, :, cache_u.shape[2] :], jnp.concatenate(lse, axis=2)


def _write_forward(config, k, w, v, alpha, beta, cache_u, mask):
    u, lse = _write(config, k, w, v, alpha, beta, cache_u, mask)
    return u, (k, w, v, alpha, beta, cache_u, mask, u, lse)


def _write_backward(config, saved, du):
    k, w, v, alpha, beta, cache_u, mask, u, lse = saved
    cached = cache_u.shape[2]
    dk = jnp.zeros(k.shape, jnp.float32)
    du = jnp.concatenate([jnp.zeros(cache_u.shape, jnp.float32), du], axis=2) if cached else du
    slots = jnp.concatenate([cache_u, u], axis=2) if cached else u
    row_gradients = []
    for span in reversed(_spans(config, w.shape[2])):
        own, before = _span_configs(config, span)
        own_mask, before_mask = _span_masks(config, span, mask)
        rows = span.rows
        scalars = {"lse": lse[:, :, rows], "alpha": alpha[:, :, rows], "beta": beta[:, :, rows]}
        keys, queries, values = k[:, :, span.own], w[:, :, rows], v[:, :, rows]
        dk_own, dw, dp, dbeta = attention_backward(
            own,
            keys,
            queries,
            u[:, :, rows],
            values,
            own_mask,
            scalars,
            solve=solve_transposed,
            du=du[:, :, span.own],
        )
        if span.slots:
            earlier = slice(0, span.slots)
            erased = alpha[:, :, rows, None] * values.astype(jnp.float32) - u[:, :, rows]
            scalars["delta"] = -jnp.sum(dp * erased, axis=-1)
            values, g = _value_operand(config, slots[:, :, earlier]), _value_operand(config, dp)
            dk_before, dw_before, du_before, dbeta_before = attention_backward(
                before, k[:, :, earlier], queries, values, g, before_mask, scalars
            )
            dw, dbeta = dw + dw_before, dbeta + dbeta_before
            dk, du = dk.at[:, :, earlier].add(dk_before), du.at[:, :, earlier].add(du_before)
        dk = dk.at[:, :, span.own].add(dk_own)
        row_gradients.append((dw, dp, dbeta))
    dw, dp, dbeta = (jnp.concatenate(x[::-1], axis=2) for x in zip(*row_gradients, strict=True))
    dv, dalpha = alpha[..., None] * dp, jnp.sum(v.astype(jnp.float32) * dp, axis=-1)
    inputs = (k, w, v, alpha, beta)
    gradients = (x.astype(y.dtype) for x, y in zip((dk, dw, dv, dalpha, dbeta), inputs, strict=True))
    return *gradients, du[:, :, :cached], None


write.defvjp(_write_forward, _write_backward)
