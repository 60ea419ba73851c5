"""Sums over the tiles of one chunk of queries: weighted values and, for softmax, the running maximum and sum."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.numerics import accumulation_dtype
from memformer.core.sharding import vary_like
from memformer.core.types import Array, Float
from memformer.ops.attention import tiles
from memformer.ops.attention.layout import in_columns
from memformer.ops.attention.tiles import Decay, Gap, TileMask, Tiling

__all__ = ["RowSums", "rescale", "row_lse", "sum_row"]

# Tiles on the diagonal from this side on are read in two halves of queries.
HALVED = 256


class RowSums(NamedTuple):
    """Sums over the tiles of one row so far: maximum, sum of exponentials (softmax only) and weighted values."""

    top: Float[Array, "B G R C"] | None
    total: Float[Array, "B G R C"] | None
    value: Float[Array, "B G V R C"]


def _weighted_values(tiling: Tiling, weights: Array, x: Array) -> Float[Array, "B G V R C"]:
    """Sum of values by weights. Normalised weights are at most 1: they may be as narrow as the values."""
    if tiling.kernel.normalized:
        weights = weights.astype(x.dtype)
    return tiles.tile_product(tiling, "bgvs,bgsrt->bgvrt", jnp.swapaxes(x, 2, 3), weights)


def rescale(sums: RowSums, scores: Array) -> tuple[Array, Array, Array]:
    """One step of the online softmax.

    Args:
      sums: over the tiles so far.
      scores: masked scores of one more tile.

    Returns:
      The new maximum, the factor on the old sums, and the tile's exponentials.
    """
    top = jnp.maximum(sums.top, jnp.max(scores, axis=2))
    return top, jnp.exp(sums.top - top), jnp.exp(scores - top[:, :, None])


def _empty_sums(tiling: Tiling, q: Array, x: Array, *others: Array | None) -> RowSums:
    """Sums over no tile for one chunk of queries, in columns."""
    dtype = accumulation_dtype(q, x)
    batch, groups, _, repeats, size = q.shape
    shape = batch, groups, repeats, size
    value = vary_like(jnp.zeros((batch, groups, x.shape[-1], repeats, size), dtype), q, x, *others)
    if not tiling.kernel.normalized:
        return RowSums(None, None, value)
    top = vary_like(jnp.full(shape, jnp.finfo(dtype).min / 2, dtype), q, x, *others)
    return RowSums(top, jnp.zeros_like(value[:, :, 0]), value)


def sum_row(
    tiling: Tiling,
    mask: TileMask,
    decay: Decay | None,
    i: Array,
    q: Array,
    k: Array,
    x: Array,
    steps: Array,
    own: bool,
    part: Array | int = 0,
) -> RowSums:
    """Sums over the first `steps` tiles of row i, unused chunks of the cache left out.

    Args:
      tiling: static settings.
      mask, decay: of the call.
      i: row.
      q: its queries, [B, G, R, C, K].
      k, x: all keys and values.
      steps: number of tiles.
      own: whether the last of them is the row's own tile, which lies on the diagonal.
      part: of the heads.
    """
    q, start_of_part = in_columns(q), part * (k.shape[0] // tiling.parts)

    def tile(masked, step, sums):
        j = jnp.where(step < mask.used, step, step - mask.used + tiling.cached)
        seen = tiles.tile_mask(tiling, mask, i, j) if masked else None
        gap = tiles.tile_gap(tiling, mask, decay, i, j, seen)
        return _add_tile(tiling, sums, q, tiles.take(k, start_of_part + j), tiles.take(x, start_of_part + j), seen, gap)

    first = jnp.int32(0)
    if mask.first is not None:
        first = tiles.take(mask.first, i)
        first = jnp.where(first < tiling.cached, jnp.minimum(first, mask.used), first - tiling.cached + mask.used)
    start = _empty_sums(tiling, q, x, k, *mask.arrays, *(decay or ()))
    steps = jnp.asarray(steps, jnp.int32)
    if not tiling.causal or tiling.cached or decay is not None or any(x is not None for x in mask.mask):
        return lax.fori_loop(first, steps, functools.partial(tile, True), start)
    # Nothing hides a token but the diagonal: a mask would be one more pass over each tile.
    sums = lax.fori_loop(first, steps - int(own), functools.partial(tile, False), start)
    if not own:
        return sums
    return _add_diagonal(
        tiling, sums, q, tiles.take(k, start_of_part + steps - 1), tiles.take(x, start_of_part + steps - 1)
    )


def _add_tile(
    tiling: Tiling, sums: RowSums, q: Array, k: Array, x: Array, seen: Array | None, gap: Gap | None
) -> RowSums:
    """The sums with one more tile, of queries in columns q, keys k and values x."""
    scores = tiles.tile_scores(tiling, q, k, gap)
    if not tiling.kernel.normalized:
        weights = tiles.attention_weights(tiling, seen, scores, None, gap)
        return sums._replace(value=sums.value + _weighted_values(tiling, weights, x))
    top, shrink, weights = rescale(sums, tiles.mask_scores(scores, seen))
    total = sums.total * shrink + jnp.sum(weights, axis=2)
    return RowSums(top, total, sums.value * shrink[:, :, None] + _weighted_values(tiling, weights, x))


def _add_diagonal(tiling: Tiling, sums: RowSums, q: Array, k: Array, x: Array) -> RowSums:
    """The sums with the tile on the diagonal, whose first half of queries sees only the first half of keys."""
    size = tiling.size
    half = size // 2 if size >= HALVED else size

    def queries(start, end):
        """Those from `start` to `end`, which see keys before `end`."""
        key, query = jnp.arange(end, dtype=jnp.int32), jnp.arange(start, end, dtype=jnp.int32)
        seen = (key[:, None] <= query[None])[None, None, :, None]
        part = jax.tree.map(lambda a: a[..., start:end], sums)
        return _add_tile(tiling, part, q[..., start:end], k[:, :, :end], x[:, :, :end], seen, None)

    parts = [queries(0, half)] + ([queries(half, size)] if half < size else [])
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *parts)


def row_lse(sums: RowSums) -> Float[Array, "B G R C"] | None:
    """Log-sum-exp of the rows; a large negative number where a row sees nothing. None without a normaliser."""
    if sums.top is None:
        return None
    return sums.top + jnp.log(jnp.where(sums.total > 0, sums.total, jnp.ones_like(sums.total)))
