"""Attention by blocks on every chip: how the arrays of a call are laid, who sees whom, which blocks may be left out."""

from typing import NamedTuple

import jax.numpy as jnp

from memformer.core.segments import pad_time
from memformer.core.types import Array

__all__ = ["Sight", "by_head", "find_first", "find_last", "join", "marks_of", "sight_of"]

# A number beyond every segment.
_FAR = 1 << 23


class Sight(NamedTuple):
    """Who sees whom: segments of the slots held, of the tokens as keys, and as queries; None where all are one.

    A query sees slots of its own number; numbers below 0 see nothing and are not seen.
    """

    held: Array | None = None
    key: Array | None = None
    query: Array | None = None


def sight_of(mask) -> Sight:
    """The segments of a call's mask."""
    return Sight(mask.cache_segment, mask.key_segment, mask.query_segment)


def by_head(x: Array, size: int) -> Array:
    """[B, T, heads, ...] to [B, heads, T, ...], T padded to whole blocks."""
    return jnp.swapaxes(pad_time(x, size), 1, 2)


def join(held: Array | None, new: Array, size: int, multiple: int | None = None) -> Array:
    """Blocks of the state, then those of the call, [B, G, S, ...].

    Args:
      held: of the state [B, S, G, ...], or None.
      new: of the call, [B, T, G, ...].
      size: of a block.
      multiple: what T is padded to a multiple of; None is `size`.
    """
    new = by_head(new, multiple or size)
    return new if held is None else jnp.concatenate([by_head(held, size).astype(new.dtype), new], axis=2)


def marks_of(sight: Sight, size: int, multiple: int | None = None) -> tuple[Array, Array]:
    """Segments of queries and of all slots, padded as `join` pads; padding sees nothing and is not seen."""

    def pad(x, fill, size):
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), constant_values=fill)

    multiple = multiple or size
    query, key = pad(sight.query, -2, multiple), pad(sight.key, -1, multiple)
    if sight.held is not None:
        held = pad(sight.held, -1, size)
        key = jnp.concatenate([jnp.broadcast_to(held, (key.shape[0], held.shape[1])), key], axis=1)
    return query, key


def _seen(query: Array, key: Array, rows: int, columns: int) -> Array:
    """[B, N, M] which blocks of columns a block of rows has not left behind: segments grow with time."""
    query, key = query.reshape(query.shape[0], -1, rows), key.reshape(key.shape[0], -1, columns)
    least = jnp.min(jnp.where(query < 0, jnp.int32(_FAR), query), axis=-1)
    return jnp.max(key, axis=-1)[:, None] >= least[:, :, None]


def find_first(query: Array, key: Array, rows: int, columns: int) -> Array:
    """[B, N] first block of columns that each block of rows sees, M where it sees none.

    Args:
      query: [B, T] segments of rows, negative where blind.
      key: [B, S] segments of columns, negative where unseen.
      rows, columns: sizes of the blocks.
    """
    seen = _seen(query, key, rows, columns)
    first = jnp.argmax(seen, axis=2).astype(jnp.int32)
    return jnp.where(jnp.any(seen, axis=2), first, jnp.int32(seen.shape[2]))


def find_last(query: Array, key: Array, rows: int, columns: int) -> Array:
    """[B, M] one more than the last block of rows that sees each block of columns, 0 where none does."""
    seen = _seen(query, key, rows, columns)
    last = seen.shape[1] - jnp.argmax(seen[:, ::-1], axis=1).astype(jnp.int32)
    return jnp.where(jnp.any(seen, axis=1), last, jnp.int32(0))
