"""Layout of the arrays of attention in the kernels: heads before time, time in whole blocks, the cache in front."""

import jax
import jax.numpy as jnp

from memformer.core.calls import AttentionCall
from memformer.core.mask import Mask, join_cache
from memformer.core.segments import pad_time
from memformer.core.types import Array

__all__ = ["block_mask", "heads_first", "join_slots", "needs_segments"]


def heads_first(x: Array, size: int) -> Array:
    """[B, T, heads, ...] to [B, heads, T, ...], T padded to a multiple of `size`."""
    return jnp.swapaxes(pad_time(x, size), 1, 2)


def join_slots(cached: Array | None, new: Array, size: int, multiple: int | None = None) -> Array:
    """All slots of a call, [B, G, S, ...]: blocks of the cache, then blocks of the call.

    Args:
      cached: of the cache [B, S, G, ...], or None.
      new: of the call, [B, T, G, ...].
      size: of a block.
      multiple: what T is padded to a multiple of; None is `size`.
    """
    new = heads_first(new, multiple or size)
    return new if cached is None else jnp.concatenate([heads_first(cached, size).astype(new.dtype), new], axis=2)


def needs_segments(call: AttentionCall, size: int) -> bool:
    """Whether segments mask anything: without causality nothing else hides the padding of the last block."""
    return call.mask.key_segment is not None or not (call.causal or call.q.shape[1] % size == 0)


def block_mask(call: AttentionCall, size: int, multiple: int | None = None) -> Mask:
    """The mask of a call over whole blocks, for every batch row; `size` and `multiple` as in `join_slots`."""
    mask, (batch, length) = call.mask, call.q.shape[:2]
    if mask.key_segment is None and needs_segments(call, size):
        zeros = jnp.zeros((batch, length), jnp.int32)
        mask = mask._replace(query_segment=zeros, key_segment=zeros)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, x.shape[1])), join_cache(mask, size, multiple))
