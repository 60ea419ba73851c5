"""Segment and causal masks of attention, and the tiles of scores that a mask leaves empty."""

from typing import NamedTuple

import jax.numpy as jnp

from memformer.core.segments import Segments
from memformer.core.symbolic import padding_to
from memformer.core.types import Array, Bool, Dims, Int

__all__ = [
    "BLIND",
    "UNSEEN",
    "Mask",
    "column_bounds",
    "first_tiles",
    "join_cache",
    "last_tiles",
    "make_mask",
    "row_bounds",
]

# Segment numbers that match nothing: of a slot that no query sees, and of a query that sees no slot.
UNSEEN, BLIND = -1, -2

# Beyond every segment and rank.
_FAR = 1 << 30


class Mask(NamedTuple):
    """Segment mask: a query sees the slots of its own segment number; a negative number neither sees nor is seen.

    Causality and the window are fields of the call, not of the mask. Segments are None where all tokens are in one
    segment. Ranks count the valid tokens of a segment; they are None unless a window needs them.

    Attributes:
      query_segment: of the tokens as queries; `BLIND` at padding.
      key_segment: of the tokens as keys; `UNSEEN` at padding.
      cache_segment: of the slots in the cache: 0, or `UNSEEN` where a slot is not valid.
      query_rank, key_rank: of the tokens.
      cache_rank: of the slots in the cache.
    """

    query_segment: Int[Array, "B T"] | None = None
    key_segment: Int[Array, "B T"] | None = None
    cache_segment: Int[Array, "B S"] | None = None
    query_rank: Int[Array, "B T"] | None = None
    key_rank: Int[Array, "B T"] | None = None
    cache_rank: Int[Array, "B S"] | None = None

    def part(self, rows: slice, slots: slice) -> "Mask":
        """Of some queries and slots, over whole tiles."""

        def cut(x, places):
            return None if x is None else x[:, places]

        return Mask(
            query_segment=cut(self.query_segment, rows),
            key_segment=cut(self.key_segment, slots),
            query_rank=cut(self.query_rank, rows),
            key_rank=cut(self.key_rank, slots),
        )


def make_mask(
    cache_valid: Bool[Array, "B S"] | None, segments: Segments | None, dims: Dims, *, ranks: bool = False
) -> Mask:
    """The mask of a call.

    Args:
      cache_valid: which slots of the cache hold a visible token; None without a cache.
      segments: of the call's tokens, from `find_segments`.
      dims: B and T.
      ranks: whether a window needs ranks.
    """
    shape = (dims["B"], dims["T"])
    # From 1, as counts of valid tokens are.
    rank = jnp.arange(1, dims["T"] + 1, dtype=jnp.int32)[None]
    if cache_valid is None and segments is None:
        return Mask(query_rank=rank, key_rank=rank) if ranks else Mask()
    if segments is None:
        key_segment = query_segment = jnp.zeros(shape, jnp.int32)
    else:
        key_segment = jnp.where(segments.valid, segments.index, jnp.int32(UNSEEN))
        query_segment = jnp.where(segments.valid, segments.index, jnp.int32(BLIND))
        rank = jnp.cumsum(segments.valid, axis=1, dtype=jnp.int32)
    mask = Mask(query_segment, key_segment)
    if cache_valid is not None:
        mask = mask._replace(cache_segment=jnp.where(cache_valid, jnp.int32(0), jnp.int32(UNSEEN)))
    if not ranks:
        return mask
    if cache_valid is not None:
        cache_rank = jnp.cumsum(cache_valid, axis=1, dtype=jnp.int32)
        rank = rank + cache_rank[:, -1:]
        mask = mask._replace(cache_rank=cache_rank)
    return mask._replace(query_rank=rank, key_rank=rank)


def join_cache(mask: Mask, size: int, multiple: int | None = None) -> Mask:
    """The mask over whole tiles: keys of the cache first, then those of the call; the cache fields are None.

    Args:
      mask: from `make_mask`.
      size: of a tile; the cache is padded to a multiple of it.
      multiple: what the tokens are padded to a multiple of; None is `size`. Padding sees nothing and is not seen.
    """
    multiple = multiple or size

    def pad(x, fill, multiple):
        if x is None:
            return None
        return jnp.pad(x, ((0, 0), (0, padding_to(x.shape[1], multiple))), constant_values=fill)

    def join(cache, new):
        if cache is None or new is None:
            return new
        batch = max(cache.shape[0], new.shape[0])
        return jnp.concatenate([jnp.broadcast_to(x, (batch, x.shape[1])) for x in (cache, new)], axis=1)

    return Mask(
        query_segment=pad(mask.query_segment, BLIND, multiple),
        key_segment=join(pad(mask.cache_segment, UNSEEN, size), pad(mask.key_segment, UNSEEN, multiple)),
        query_rank=pad(mask.query_rank, _FAR, multiple),
        key_rank=join(pad(mask.cache_rank, 0, size), pad(mask.key_rank, 0, multiple)),
    )


def first_tiles(mask: Mask, rows: int, columns: int, window: int | None = None) -> Int[Array, "B N"] | None:
    """The first tile of keys that each tile of queries sees, M where it sees none; None where nothing is masked.

    Args:
      mask: over whole tiles, from `join_cache`.
      rows, columns: queries and keys of a tile.
      window: how many tokens back a query sees, or None.
    """
    pair = row_bounds(mask, rows, columns, window, causal=True)
    return None if pair is None else pair[0]


def last_tiles(mask: Mask, rows: int, columns: int, window: int | None = None) -> Int[Array, "B M"] | None:
    """One more than the last tile of queries that sees each tile of keys, 0 where none does; as `first_tiles`."""
    pair = column_bounds(mask, rows, columns, window, causal=True)
    return None if pair is None else pair[1]


def row_bounds(
    mask: Mask, rows: int, columns: int, window: int | None = None, *, causal: bool
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]] | None:
    """The first tile of keys that each tile of queries sees, and one more than the last.

    M and 0 where it sees none. None where nothing is masked. With `causal`, later tiles are left to the caller.
    """
    visible = _visible_tiles(mask, rows, columns, window, causal)
    return None if visible is None else _bounds(visible, 2)


def column_bounds(
    mask: Mask, rows: int, columns: int, window: int | None = None, *, causal: bool
) -> tuple[Int[Array, "B M"], Int[Array, "B M"]] | None:
    """The same of the tiles of queries that see each tile of keys."""
    visible = _visible_tiles(mask, rows, columns, window, causal)
    return None if visible is None else _bounds(visible, 1)


def _bounds(visible: Bool[Array, "B N M"], axis: int) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
    """The first visible tile along an axis, and one more than the last."""
    size, any_visible = visible.shape[axis], jnp.any(visible, axis)
    first = jnp.argmax(visible, axis).astype(jnp.int32)
    last = size - jnp.argmax(jnp.flip(visible, axis), axis).astype(jnp.int32)
    return jnp.where(any_visible, first, jnp.int32(size)), jnp.where(any_visible, last, jnp.int32(0))


def _visible_tiles(
    mask: Mask, rows: int, columns: int, window: int | None, causal: bool
) -> Bool[Array, "B N M"] | None:
    """True for tiles that neither other segments (segments grow with time) nor the window exclude as a whole.

    With `causal`, later tiles are left to the caller.
    """

    def tiles(x, size):
        return x.reshape(x.shape[0], -1, size)

    visible = None
    if mask.query_segment is not None:
        query, key = tiles(mask.query_segment, rows), tiles(mask.key_segment, columns)
        least = jnp.min(jnp.where(query < 0, jnp.int32(_FAR), query), axis=-1)
        visible = jnp.max(key, axis=-1)[:, None] >= least[:, :, None]
        if not causal:
            least = jnp.min(jnp.where(key < 0, jnp.int32(_FAR), key), axis=-1)
            visible &= jnp.max(query, axis=-1)[:, :, None] >= least[:, None]
    if window is not None:
        query, key = tiles(mask.query_rank, rows), tiles(mask.key_rank, columns)
        near = jnp.min(query, axis=-1)[:, :, None] - jnp.max(key, axis=-1)[:, None] < window
        if not causal:
            # the rank of padding is far beyond all: a tile of it alone sees nothing
            most = jnp.max(jnp.where(query == _FAR, jnp.int32(-_FAR), query), axis=-1)
            near &= jnp.min(key, axis=-1)[:, None] - most[:, :, None] < window
        visible = near if visible is None else visible & near
    return visible
