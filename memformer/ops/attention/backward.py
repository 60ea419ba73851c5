"""Gradients through tiles of scores, which are recomputed from the log-sum-exp of their rows."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memformer.core.sharding import vary_like
from memformer.core.similarity import similarity, similarity_slope
from memformer.core.types import Array
from memformer.ops.attention import tiles
from memformer.ops.attention.layout import in_columns, in_rows
from memformer.ops.attention.tiles import Decay, Gap, TileMask, Tiling

__all__ = ["add_row", "key_gradient", "tile_gradient"]


def tile_gradient(
    tiling: Tiling,
    mask: Array,
    gap: Gap | None,
    q: Array,
    k: Array,
    x: Array,
    lse: Array | None,
    do: Array,
    delta: Array | None,
) -> tuple[tuple[Array, Array | None], tuple[Array, Array, Array | None]]:
    """Gradients through one tile of the output: of q and its decay, and of k, x and their decay.

    Args:
      tiling: static settings.
      mask, gap: of the tile.
      q, k, x: queries, keys and values of the tile; the queries are [B, G, R, C, K], and so is their gradient.
      lse: log-sum-exp of the queries, or None.
      do: gradient of the output.
      delta: sum of output times `do`, or None without a normaliser.
    """
    columns, do_columns = in_columns(q), in_columns(do)
    scores = tiles.tile_scores(tiling, columns, k, gap)
    weights = tiles.attention_weights(tiling, mask, scores, lse, gap)
    dx = tiles.tile_product(tiling, "bgsrt,bgrtv->bgsv", weights, do)
    dweights = tiles.tile_product(tiling, "bgsv,bgvrt->bgsrt", x, do_columns)
    if tiling.kernel.normalized:
        dgap = dscores = weights * (dweights - delta[:, :, None])
    else:
        slope, dgap = similarity_slope(tiling.kernel, scores, weights), None
        if gap is not None:
            factor = jnp.exp(gap.log)
            slope = similarity_slope(tiling.kernel, scores, similarity(tiling.kernel, scores)) * factor
            dgap = dweights * weights
        dscores = jnp.where(mask, dweights * slope, jnp.zeros((), scores.dtype))
    dscores = dscores * tiling.kernel.scale
    dq = in_rows(tiles.tile_product(tiling, "bgks,bgsrt->bgkrt", jnp.swapaxes(k, 2, 3), dscores))
    dk = tiles.tile_product(tiling, "bgsrt,bgrtk->bgsk", dscores, q)
    if gap is None:
        return (dq, None), (dk, dx, None)
    dgap = jnp.where(gap.apart, dgap, jnp.zeros((), scores.dtype))
    return (dq, jnp.sum(dgap, axis=2)), (dk, dx, -jnp.swapaxes(jnp.sum(dgap, axis=-1), 2, 3))


def key_gradient(
    tiling: Tiling,
    mask: TileMask,
    decay: Decay | None,
    j: Array,
    rows: tuple,
    k: Array,
    x: Array,
    q: Array,
    rest: tuple,
    queries: tuple[Array, Array | None],
    part: Array | int = 0,
) -> tuple[tuple[Array, Array | None], tuple[Array, Array, Array | None]]:
    """Gradients through the tiles of column j in rows[0] <= i < rows[1].

    Args:
      tiling: static settings.
      mask, decay: of the call.
      j: chunk of keys.
      rows: first row and one more than the last.
      k, x: all keys and values.
      q: all queries.
      rest: lse, do and delta of `tile_gradient`, of all rows.
      queries: gradients of all queries and of their decay so far.
      part: of the heads.

    Returns:
      `queries` with these tiles added, and the gradients of k[j], x[j] and their decay.
    """
    of_column, of_row = (part * (a.shape[0] // tiling.parts) for a in (k, q))
    k, x = tiles.take(k, of_column + j), tiles.take(x, of_column + j)
    key_decay = None if decay is None else tiles.take(decay.key, j)

    def row(i, carry):
        queries, keys = carry
        seen = tiles.tile_mask(tiling, mask, i, j)
        gap = tiles.tile_gap(tiling, mask, decay, i, j, seen)
        of_queries, of_keys = tile_gradient(
            tiling, seen, gap, tiles.take(q, of_row + i), k, x, *(tiles.take(r, of_row + i) for r in rest)
        )
        return add_row(queries, of_queries, of_row + i), jax.tree.map(jnp.add, keys, of_keys)

    def zeros(a):
        others = (q, k, x, *rest, *mask.arrays, *(decay or ()))
        return None if a is None else vary_like(jnp.zeros(a.shape, queries[0].dtype), *others)

    first, last = (jnp.asarray(bound, jnp.int32) for bound in rows)
    if mask.last is not None:
        last = jnp.minimum(last, tiles.take(mask.last, j))
    return lax.fori_loop(first, last, row, (queries, tuple(map(zeros, (k, x, key_decay)))))


def add_row(total: tuple[Array, Array | None], rows: tuple[Array, Array | None], i: Array) -> Any:
    """Adds the gradients of one chunk of queries to those of all."""

    def add(total, part):
        return lax.dynamic_update_index_in_dim(total, tiles.take(total, i) + part, i, 0)

    return jax.tree.map(add, total, rows)
