"""Layout of the arrays of attention by tiles: chunks of time first, then examples and heads."""

import jax.numpy as jnp

from memformer.core.segments import chunk_time, unchunk_time
from memformer.core.types import Array, Float

__all__ = [
    "chunk_keys",
    "chunk_queries",
    "in_columns",
    "in_rows",
    "join_keys",
    "unchunk_keys",
    "unchunk_queries",
]


def chunk_queries(x: Float[Array, "B T H K"], groups: int, size: int) -> Float[Array, "N B G R C K"]:
    """Chunks of queries, heads grouped by the key head that serves them."""
    x = chunk_time(x, size)
    x = x.reshape(*x.shape[:3], groups, -1, x.shape[-1])
    return jnp.transpose(x, (0, 1, 3, 4, 2, 5))


def unchunk_queries(x: Float[Array, "N B G R C V"], length: int) -> Float[Array, "B T H V"]:
    """The inverse of `chunk_queries`."""
    x = jnp.transpose(x, (0, 1, 4, 2, 3, 5))
    return unchunk_time(x.reshape(*x.shape[:3], -1, x.shape[-1]), length)


def chunk_keys(x: Float[Array, "B T G *rest"], size: int) -> Float[Array, "N B G C *rest"]:
    """Chunks of keys, values, or token scalars."""
    return jnp.swapaxes(chunk_time(x, size), 2, 3)


def unchunk_keys(x: Float[Array, "N B G C V"], length: int) -> Float[Array, "B T G V"]:
    """The inverse of `chunk_keys`."""
    return unchunk_time(jnp.swapaxes(x, 2, 3), length)


def join_keys(cached: Array | None, new: Array, size: int) -> Float[Array, "M B G C V"]:
    """Chunks of the cache in front of those of the call."""
    new = chunk_keys(new, size)
    return new if cached is None else jnp.concatenate([chunk_keys(cached, size), new])


def in_columns(x: Float[Array, "B G R C K"]) -> Float[Array, "B G K R C"]:
    """Queries, or their gradients, as columns."""
    return jnp.moveaxis(x, -1, -3)


def in_rows(x: Float[Array, "B G K R C"]) -> Float[Array, "B G R C K"]:
    """The inverse of `in_columns`."""
    return jnp.moveaxis(x, -3, -1)
