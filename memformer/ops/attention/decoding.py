"""The kernels of softmax attention: one of few tokens over a cache of fixed capacity, and those of all others.

The former has no derivative of its own: whatever is differentiated runs as the recurrence.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from memformer.core.calls import AttentionCall
from memformer.core.symbolic import is_symbolic
from memformer.core.types import Array, Float
from memformer.ops.attention import recurrent
from memformer.ops.attention.cache import place
from memformer.pallas import attention as pallas
from memformer.pallas.decoding import MOST_TOKENS
from memformer.pallas.platform import chip

__all__ = ["decodes", "softmax_attention"]

# Fields of a call that hold arrays.
ARRAYS = ("q", "k", "v", "mask", "cache")


def decodes(call: AttentionCall) -> bool:
    """Whether the kernel for a few tokens serves a call, if there is one for this chip."""
    length, cache, others = call.q.shape[1], call.cache, (call.decay, call.sinks, call.window)
    if chip() != "tpu" or cache is None or not cache.fixed or is_symbolic(length):
        return False
    return length <= MOST_TOKENS and all(x is None for x in others)


def softmax_attention(call: AttentionCall) -> Float[Array, "B T H V"]:
    """Runs softmax attention by a kernel.

    Returns:
      The output in float32 (in bfloat16 from the kernels of many tokens where v is).

    Raises:
      NotImplementedError: no kernel serves the call, or the chip; the message names the implementation that does.
    """
    if not decodes(call):
        return pallas.softmax_attention(call)
    fixed: Any = dataclasses.replace(call, **dict.fromkeys(ARRAYS))

    def restore(arrays):
        return dataclasses.replace(fixed, **dict(zip(ARRAYS, arrays, strict=True)))

    @jax.custom_jvp
    def decode(arrays):
        return _decode(restore(arrays))

    @decode.defjvp
    def _(primals, tangents):
        return jax.jvp(lambda arrays: recurrent.softmax_attention(restore(arrays)), primals, tangents)

    return decode([getattr(call, name) for name in ARRAYS])


def _decode(call: AttentionCall) -> Array:
    cache, mask = call.cache, call.mask
    placed, start = recurrent.place_mask(call)
    rows = call.q.shape[:2]
    slots = jnp.broadcast_to(start + jnp.arange(rows[1], dtype=jnp.int32)[None], rows)
    read = pallas.CacheRead(
        q=call.q,
        k=place(cache, cache.k, call.k),
        v=place(cache, cache.v, call.v),
        key_segment=jnp.broadcast_to(placed.key_segment, (rows[0], cache.k.shape[1])),
        query_segment=jnp.broadcast_to(mask.query_segment, rows),
        last_slot=slots,
        scale=call.read_kernel.scale,
        precision=call.precision,
    )
    return pallas.decode(call.op, read)
