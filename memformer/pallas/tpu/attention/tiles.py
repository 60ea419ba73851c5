"""Tiles of attention on TPU, shared by the read and by DeltaFormer's write.

The slots of the cache come first, in blocks of their own, then the blocks of the call. A program holds all keys and
values of one head (or a part of them) in VMEM and loops over blocks of columns. Within a block, sub-blocks of rows are
computed interleaved.

Scalars per row lie in arrays [B, heads, N, 8, R], one sublane per name in `SCALARS`: a register has eight sublanes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.similarity import similarity
from memformer.core.types import Array
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.attention.config import AttentionConfig
from memformer.pallas.tpu.interleave import Steps, interleave, interleave_groups
from memformer.pallas.tpu.products import iotas, product

__all__ = [
    "LOW",
    "SCALARS",
    "SumRefs",
    "add_block",
    "add_tile",
    "attention_weights",
    "block_slice",
    "clear_sums",
    "compiler_params",
    "diagonal_mask",
    "logsumexp",
    "mask_segments",
    "pack_scalars",
    "rescale",
    "sums_scratch",
    "to_columns",
    "to_row",
]

# segment    number of the row's segment
# start_lse  log-sum-exp over the slots before the span (write only)
# the others are what their names say; lse and delta are of the row's scores.
SCALARS = ("segment", "alpha", "beta", "lse", "delta", "start_lse")

# A masked score. Running maxima start at half of it, so that its exponential is 0.
LOW = float(jnp.finfo(jnp.float32).min)


class SumRefs(NamedTuple):
    """References to the running sums of a block of rows, rows in lanes.

    Attributes:
      top: running maximum, [8, R] of equal sublanes.
      total: sums of exponentials, by sublane, [8, R].
      value: weighted sums of values, [V, R].
    """

    top: Any
    total: Any
    value: Any


def sums_scratch(config: AttentionConfig, value: int) -> dict[str, Any]:
    """Scratch for `SumRefs`, by name."""
    row = pltpu.VMEM((8, config.block), jnp.float32)
    return {"top": row, "total": row, "value": pltpu.VMEM((value, config.block), jnp.float32)}


def clear_sums(sums: SumRefs) -> None:
    """Sets the sums to those over no column."""
    sums.top[...] = jnp.full(sums.top.shape, LOW / 2, jnp.float32)
    sums.total[...] = jnp.zeros(sums.total.shape, jnp.float32)
    sums.value[...] = jnp.zeros(sums.value.shape, jnp.float32)


def add_tile(config: AttentionConfig, sums: SumRefs, rows: slice, q, k, x, columns, mask) -> Steps:
    """Adds one tile of columns to the sums of some rows.

    Args:
      config: sizes.
      sums: of the block of rows.
      rows: which of them.
      q: reference to [R, K].
      k: reference to [S, K].
      x: reference to [S, V].
      columns: which of k and x.
      mask: [columns, rows], or None where nothing is masked.
    """
    # Loaded where needed: whole blocks would not stay in registers.
    scores = product(k[columns], q[rows], "nt", config.passes) * config.factor
    yield
    if not config.similarity.normalized:
        weights = attention_weights(config, scores, mask, None)
        yield
        sums.value[:, rows] += product(x[columns], weights, "tn", config.value_passes)
        return
    if mask is not None:
        scores = jnp.where(mask, scores, LOW)
    before = sums.top[:, rows]
    top, factor, weights = yield from rescale(sums, rows, before, scores)
    sums.top[:, rows] = top
    yield
    read = product(x[columns], weights, "tn", config.passes)
    sums.value[:, rows] = sums.value[:, rows] * factor[:1] + read


def rescale(sums: SumRefs, rows: slice, before: Array, scores: Array) -> Steps:
    """Adds one tile of masked scores to `total`.

    Returns:
      The new running maximum and the factor that it gives older sums, [8, rows], and the exponentials of the tile.
    """
    top = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
    yield
    weights = jnp.exp2(scores - top[:1])
    factor = jnp.exp2(before - top)
    sums.total[:, rows] = sums.total[:, rows] * factor + _sum_to_sublanes(weights)
    return top, factor, weights


def _sum_to_sublanes(x: Array) -> Array:
    """[columns, rows] to [8, rows]: sums that need no exchange between sublanes."""
    return jnp.sum(x.reshape(-1, 8, x.shape[1]), axis=0)


def add_block(
    config: AttentionConfig,
    heads: Sequence[tuple[SumRefs, Any, Any, Any]],
    j,
    row_segment: Array | None,
    column_segment: Array | None,
) -> None:
    """Adds block j of columns, which lies before the rows, to the sums of one head or of two.

    Args:
      config: sizes.
      heads: for each head the sums of its block of rows, and references q, k and x as in `add_tile`.
      j: which block of k and x.
      row_segment: segments of the rows, [1, R], or None.
      column_segment: segments of the columns, [R, 1].
    """
    tiles = []
    height, width = config.tile[len(heads) - 1]
    for left in range(0, config.block, width):
        for top in range(0, config.block, height):
            rows = slice(top, top + height)
            mask = None
            if row_segment is not None:
                mask = row_segment[:, rows] == column_segment[left : left + width]
            columns = block_slice(config, j, left, width)
            tile = [add_tile(config, sums, rows, q, k, x, columns, mask) for sums, q, k, x in heads]
            tiles.append(interleave_groups(tile, len(tile)))
    # One turn apart, so that a tile finds the sums that the one before it has left.
    interleave(tiles, stagger=1)


def logsumexp(top: Array, total: Array) -> Array:
    """The log-sum-exp of the rows to base 2, [1, R]; a large negative number for a row without visible columns."""
    total = jnp.sum(total, axis=0, keepdims=True)
    return top[:1] + jnp.log2(jnp.where(total > 0, total, 1.0))


def attention_weights(config: AttentionConfig, scores: Array, mask, lse: Array | None) -> Array:
    """Similarities in one tile, normalised by `lse` where it is a softmax; 0 where masked."""
    if config.similarity.normalized:
        return jnp.exp2((scores if mask is None else jnp.where(mask, scores, LOW)) - lse)
    if mask is None:
        return similarity(config.similarity, scores)
    # Masked scores are cleared first: their exponential may be infinite.
    return jnp.where(mask, similarity(config.similarity, jnp.where(mask, scores, 0.0)), 0.0)


def diagonal_mask(config: AttentionConfig, rows: slice, columns: slice, *, transposed: bool = False) -> Array:
    """The causal mask [rows, columns] of rows and columns of the same block."""
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    row, column = iotas(shape[::-1])[::-1] if transposed else iotas(shape)
    gap = (row + rows.start) - (column + columns.start)
    return gap > 0 if config.strict else gap >= 0


def mask_segments(mask, row: Array | None, column: Array | None):
    """Restricts `mask` (or None) to equal segments; None where nothing is masked."""
    if row is None:
        return mask
    same = row == column
    return same if mask is None else mask & same


def to_columns(rows: Array) -> Array:
    """Scalars [8, R] as columns [R, 8]."""
    return rows.T


def to_row(column: Array) -> Array:
    """A column [R, 1], or [R, lanes] of equal lanes, as a row [8, R] of equal sublanes."""
    return jnp.broadcast_to(column[:, :1], (column.shape[0], 128)).T[:8]


def block_slice(config: AttentionConfig, i, offset: int = 0, count: int | None = None):
    """The rows of block i in an array that holds all blocks, or `count` of them starting at `offset`."""
    start = i * config.block
    start = start if isinstance(i, int) else pl.multiple_of(start, config.block)
    return pl.ds(start + offset, config.block if count is None else count)


def pack_scalars(config: AttentionConfig, heads: int, **scalars: Array | None) -> Array:
    """[B, heads, N, 8, R] float32 from [B, T] or [B, heads, T] arrays by their names; T is a multiple of R."""
    scalars = {name: x for name, x in scalars.items() if x is not None}
    first = next(iter(scalars.values()))
    batch, length = first.shape[0], first.shape[-1]
    shape = (batch, heads, length // config.block, config.block)

    def by_block(name):
        x = scalars.get(name)
        if x is None:
            return jnp.zeros(shape, jnp.float32)
        x = x.astype(jnp.float32)
        x = jnp.broadcast_to(x[:, None] if x.ndim == 2 else x, (batch, heads, length))
        return x.reshape(shape)

    names = (*SCALARS, *[""] * (8 - len(SCALARS)))
    return jnp.stack([by_block(name) for name in names], axis=3)


def compiler_params(axes: int) -> pltpu.CompilerParams:
    """Batch and heads in any order, the other axes of the grid in sequence."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * 2 + ("arbitrary",) * (axes - 2), vmem_limit_bytes=tuning.VMEM_LIMIT
    )
