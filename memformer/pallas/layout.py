"""Layout of the arrays of attention in the kernels: heads before time, time in whole blocks, the cache in front."""

import jax.numpy as jnp

from memformer.core.segments import pad_time
from memformer.core.types import Array

__all__ = ["heads_first", "join_slots"]


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
