"""Softmax attention on TPU: layout of a call, and the rule of differentiation of a read."""

import dataclasses
import functools
from typing import Any

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

__all__ = ["attend", "output_dtype", "run", "score_operand"]


def run(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Runs softmax attention, causal and without a window.

    Returns:
      The output, bfloat16 where v is and products have one pass, else float32.

    Raises:
      NotImplementedError: no TPU; float64; a chunk size that no kernel has.
    """
    config = plan_call(call, call.read_kernel)
    mask = join_cache(call.mask, config.block)
    cache_k, cache_v = (None, None) if call.cache is None else (call.cache.k, call.cache.values)
    arrays = (
        join_slots(cache_k, score_operand(config, call.k), config.block),
        heads_first(score_operand(config, call.q), config.block),
        join_slots(cache_v, call.v, config.block),
    )
    k, q, v = (vary_like(x, *arrays, *jax.tree.leaves(mask)) for x in arrays)
    o = attend(config, output_dtype(config, call), k, q, v, mask)
    return jnp.swapaxes(o, 1, 2)[:, : call.q.shape[1]]


def score_operand(config: AttentionConfig, x: Array) -> Array:
    """Queries or keys as the products of scores take them."""
    return x.astype(jnp.bfloat16 if config.passes == 1 else jnp.float32)


def output_dtype(config: AttentionConfig, call: AttentionCall) -> Any:
    """bfloat16 where v is and products have one pass, else float32."""
    return jnp.bfloat16 if call.v.dtype == jnp.bfloat16 and config.passes == 1 else jnp.float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(config: AttentionConfig, dtype: Any, k: Array, q: Array, x: Array, mask: Mask) -> Array:
    """`read`, differentiable in k, q and x; memory is linear in time, backward too.

    Saved: the inputs, the output and the log-sum-exp.
    """
    return read(config, dtype, k, q, _value_operand(config, x), mask)[0]


def _value_operand(config: AttentionConfig, x: Array) -> Array:
    """Values or gradients as products take them."""
    return x.astype(jnp.bfloat16 if config.value_passes == 1 else jnp.float32)


def _attend_forward(config, dtype, k, q, x, mask):
    o, lse = read(config, dtype, k, q, _value_operand(config, x), mask)
    return o, (k, q, x, mask, o if config.similarity.normalized else None, lse)


def _attend_backward(config, dtype, saved, do):
    k, q, x, mask, o, lse = saved
    delta = None if o is None else jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    operands = (_value_operand(config, x), mask, lse, delta, _value_operand(config, do))
    dk, dq, dx = _gradients(config, k, q, *operands)
    return dk.astype(k.dtype), dq.astype(q.dtype), dx.astype(x.dtype), None


attend.defvjp(_attend_forward, _attend_backward)


def _gradients(
    config: AttentionConfig, k: Array, q: Array, x: Array, mask: Mask, lse: Array, delta: Array | None, do: Array
) -> tuple[Array, Array, Array]:
    """Gradients of k, q and x, in spans of queries that fit in VMEM.

    Args:
      config, k, q, x, mask: as in `read`.
      lse: log-sum-exp of the rows, from `read`.
      delta: sum of output times do per row, [B, H, T]; None without a normaliser.
      do: gradient of the output, [B, H, T, V].
    """
    length, span = q.shape[2], config.resident * config.block
    if length <= span:
        return attention_backward(config, k, q, x, do, mask, {"lse": lse, "delta": delta})
    dq, dk, dx = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(x.shape, jnp.float32)
    for start in range(0, length, span):
        rows = slice(start, min(start + span, length))
        slots = config.before * config.block + (rows.stop if config.own else 0)
        before = config.before + start // config.block if config.own else config.before
        part_mask = mask
        if config.segments:
            part_mask = Mask(query_segment=mask.query_segment[:, rows], key_segment=mask.key_segment[:, :slots])
        scalars = {"lse": lse[:, :, rows], "delta": None if delta is None else delta[:, :, rows]}
        part_dk, part_dq, part_dx = attention_backward(
            dataclasses.replace(config, before=before),
            k[:, :, :slots],
            q[:, :, rows],
            x[:, :, :slots],
            do[:, :, rows],
            part_mask,
            scalars,
        )
        dq.append(part_dq)
        dk, dx = dk.at[:, :, :slots].add(part_dk), dx.at[:, :, :slots].add(part_dx)
    return dk, jnp.concatenate(dq, axis=2), dx
