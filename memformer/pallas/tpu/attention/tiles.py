"""Tiles of attention on TPU, shared by the read and by DeltaFormer's write.

The slots of the cache come first, in blocks of their own, then the blocks of the call. A program holds all keys and
values of one head (or a part of them) in VMEM and loops over blocks of columns. Within a block, sub-blocks of rows are
computed interleaved.

Scalars per row lie in arrays [B, heads, N, 8, R], one sublane per name in `SCALARS`, those per slot likewise by
`KEY_SCALARS`: a register has eight sublanes.

Decays are those of pallas/pair_decay.py; a block of slots has its least whole number as its anchor.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.decay import CumulativeDecay
from memformer.core.mask import Mask
from memformer.core.similarity import similarity
from memformer.core.types import Array
from memformer.pallas.pair_decay import HIDDEN, LOG2E, RADIX, block_scalars, row_scalars
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.attention.config import AttentionConfig
from memformer.pallas.tpu.interleave import Steps, interleave, interleave_groups
from memformer.pallas.tpu.products import iotas, product

__all__ = [
    "KEY_SCALARS",
    "LOW",
    "SCALARS",
    "BlockDecay",
    "SumRefs",
    "TokenMask",
    "add_block",
    "add_tile",
    "attention_weights",
    "block_decay",
    "block_slice",
    "clear_sums",
    "column_mask",
    "compiler_params",
    "decay_factor",
    "decay_scores",
    "diagonal_mask",
    "logsumexp",
    "mask_scalars",
    "mask_segments",
    "mask_tokens",
    "own_gap",
    "pack_keys",
    "pack_rows",
    "rank_place",
    "rescale",
    "row_decay",
    "row_mask",
    "sums_scratch",
    "to_columns",
    "to_row",
]

# segment         number of the row's segment
# rank            of the token, for a window; it has the place of alpha, or of delta beside an alpha
# lse, delta      of the row's scores; in the forward write lse is over the slots before the span
# anchor_*, decay_*  see pallas/pair_decay.py
# the others are what their names say.
SCALARS = ("segment", "alpha", "beta", "lse", "delta", "decay_high", "decay_low", "decay_fraction")
KEY_SCALARS = ("segment", "anchor_high", "anchor_low", "decay_whole", "decay_fraction", "decay_total", "rank")
# A masked score. Running maxima start at half of it, so that its exponential is 0.
LOW = float(jnp.finfo(jnp.float32).min)


class TokenMask(NamedTuple):
    """Segments and ranks of a block of rows [1, R] or of columns [R, 1]; None where they mask nothing."""

    segment: Array | None = None
    rank: Array | None = None


def row_mask(config: AttentionConfig, rows: Array, *, alpha: bool = False) -> TokenMask:
    """Of a block of rows, from their scalars [8, R]; `alpha` says whether that is one of them."""
    rank = rank_place(alpha)
    return TokenMask(rows[:1] if config.segments else None, None if config.window is None else rows[rank : rank + 1])


def rank_place(alpha: bool) -> int:
    """The place of the rank among the scalars of rows."""
    return SCALARS.index("delta" if alpha else "alpha")


def column_mask(config: AttentionConfig, columns: Array) -> TokenMask:
    """Of a block of slots, from their scalars as columns [R, 8]."""
    rank = KEY_SCALARS.index("rank")
    return TokenMask(
        columns[:, :1] if config.segments else None, None if config.window is None else columns[:, rank : rank + 1]
    )


class BlockDecay(NamedTuple):
    """Cumulative log decays of a block of rows [1, R] and of a block of columns [R, 1], less the columns' anchor.

    Blocks of earlier slots have sums to base 2 and no fractions, but where decays restart within a row. `own` is the
    block of the rows.
    """

    row: Array
    column: Array
    row_fraction: Array | None = None
    column_fraction: Array | None = None
    own: bool = False

    def gap(self, rows: slice, columns: slice) -> Array:
        """The log decay of each pair to base 2, [columns, rows]; positive for pairs against time."""
        if self.row_fraction is None or self.column_fraction is None:
            return self.row[:, rows] - self.column[columns]
        row, row_fraction = self.row[:, rows], self.row_fraction[:, rows]
        return own_gap(row, row_fraction, self.column[columns], self.column_fraction[columns])


def own_gap(row: Array, row_fraction: Array, column: Array, column_fraction: Array) -> Array:
    """The log decay to base 2 between tokens of one block, from whole parts less the anchor and fractions."""
    return ((row - column) + (row_fraction - column_fraction)) * LOG2E


def row_decay(scalar, anchor_high: Array, anchor_low: Array) -> tuple[Array, Array]:
    """The whole part of the rows' decay less an anchor, and its fraction; `scalar` is the rows' scalar by its name."""
    whole = (scalar("decay_high") - anchor_high) * RADIX + (scalar("decay_low") - anchor_low)
    return whole, scalar("decay_fraction")


def block_decay(config: AttentionConfig, rows: Array, keys: Array, columns: Array, *, own: bool) -> BlockDecay:
    """The decay of a block.

    Args:
      config: sizes.
      rows: scalars of the rows, [8, R].
      keys: scalars of the slots, [8, R].
      columns: the same as columns, [R, 8].
      own: whether it is the block of the rows.
    """

    def row(name):
        place = SCALARS.index(name)
        return rows[place : place + 1]

    def column(name):
        place = KEY_SCALARS.index(name)
        return columns[:, place : place + 1]

    anchor = (keys[place : place + 1] for place in map(KEY_SCALARS.index, ("anchor_high", "anchor_low")))
    whole, fraction = row_decay(row, *anchor)
    if own or config.restarts:
        return BlockDecay(whole, column("decay_whole"), fraction, column("decay_fraction"), own)
    return BlockDecay((whole + fraction) * LOG2E, column("decay_total"))


def decay_scores(scores: Array, mask, gap: Array | None):
    """Scores of a softmax and their mask, with the decay of each pair added; pairs that it hides are masked."""
    if gap is None:
        return scores, mask
    seen = gap > HIDDEN
    return scores + gap, seen if mask is None else mask & seen


def decay_factor(gap: Array) -> Array:
    """The factor on a similarity that is no softmax; 1 for pairs against time, which are masked."""
    return jnp.exp2(jnp.minimum(gap, 0.0))


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


def add_tile(config: AttentionConfig, sums: SumRefs, rows: slice, q, k, x, columns, mask, gap=None) -> Steps:
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
      gap: a function without arguments that returns the decay of each pair, [columns, rows], or None.
    """
    # Loaded where needed: whole blocks would not stay in registers.
    scores = product(k[columns], q[rows], "nt", config.passes) * config.factor
    yield
    decay = None if gap is None else gap()
    if not config.similarity.normalized:
        weights = attention_weights(config, scores, mask, None, decay)
        yield
        sums.value[:, rows] += product(x[columns], weights, "tn", config.value_passes)
        return
    scores, mask = decay_scores(scores, mask, decay)
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
    heads: Sequence[tuple[SumRefs, Any, Any, Any, BlockDecay | None]],
    j,
    row: TokenMask,
    column: TokenMask,
) -> None:
    """Adds block j of columns, which lies before the rows, to the sums of one head or of two.

    Args:
      config: sizes.
      heads: for each head the sums of its block of rows, references q, k and x as in `add_tile`, and the decay.
      j: which block of k and x.
      row: what masks the rows.
      column: what masks the columns.
    """
    tiles = []
    height, width = config.tile[len(heads) - 1]
    for left in range(0, config.block, width):
        for top in range(0, config.block, height):
            rows, columns = slice(top, top + height), slice(left, left + width)
            mask = mask_tokens(config, None, row, column, rows, columns)
            at = block_slice(config, j, left, width)
            tile = []
            for sums, q, k, x, decay in heads:
                gap = None if decay is None else functools.partial(decay.gap, rows, columns)
                tile.append(add_tile(config, sums, rows, q, k, x, at, mask, gap))
            tiles.append(interleave_groups(tile, len(tile)))
    # One turn apart, so that a tile finds the sums that the one before it has left.
    interleave(tiles, stagger=1)


def logsumexp(top: Array, total: Array) -> Array:
    """The log-sum-exp of the rows to base 2, [1, R]; a large negative number for a row without visible columns."""
    total = jnp.sum(total, axis=0, keepdims=True)
    return top[:1] + jnp.log2(jnp.where(total > 0, total, 1.0))


def attention_weights(
    config: AttentionConfig, scores: Array, mask, lse: Array | None, gap: Array | None = None
) -> Array:
    """Decayed similarities in one tile, normalised by `lse` where it is a softmax; 0 where masked."""
    if config.similarity.normalized:
        scores, mask = decay_scores(scores, mask, gap)
        return jnp.exp2((scores if mask is None else jnp.where(mask, scores, LOW)) - lse)
    if mask is None:
        weights = similarity(config.similarity, scores)
    else:
        # Masked scores are cleared first: their exponential may be infinite.
        weights = jnp.where(mask, similarity(config.similarity, jnp.where(mask, scores, 0.0)), 0.0)
    return weights if gap is None else weights * decay_factor(gap)


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


def mask_scalars(config: AttentionConfig, mask: Mask, side: str) -> dict[str, Array | None]:
    """Segments and ranks of the queries ("query") or of the slots ("key"), [B, T] by name; None where not needed."""
    queries = side == "query"
    segment = mask.query_segment if queries else mask.key_segment
    rank = mask.query_rank if queries else mask.key_rank
    return {"segment": segment if config.segments else None, "rank": None if config.window is None else rank}


def mask_tokens(config: AttentionConfig, mask, row: TokenMask, column: TokenMask, rows: slice, columns: slice):
    """Restricts `mask` [columns, rows] (or None) to pairs of one segment within the window."""
    if row.segment is not None and column.segment is not None:
        mask = mask_segments(mask, row.segment[:, rows], column.segment[columns])
    if row.rank is None or column.rank is None or config.window is None:
        return mask
    distance = row.rank[:, rows] - column.rank[columns]
    near = distance < config.window
    if not config.causal:
        near &= distance > -config.window
    return near if mask is None else mask & near


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


def pack_rows(
    config: AttentionConfig, heads: int, decay: CumulativeDecay | None = None, **scalars: Array | None
) -> Array:
    """[B, heads, N, 8, R] float32 from [B, T] or [B, heads, T] arrays by their names; T is a multiple of R.

    Args:
      config: sizes.
      heads: H or G.
      decay: of the rows, [B, heads, T].
      **scalars: names of `SCALARS`, or rank.
    """
    if decay is not None:
        scalars |= row_scalars(decay)
    rank = scalars.pop("rank", None)
    if rank is not None:
        scalars[SCALARS[rank_place("alpha" in scalars)]] = rank
    return _pack(config, SCALARS, heads, scalars)


def pack_keys(
    config: AttentionConfig, heads: int, segment: Array | None, decay: CumulativeDecay | None, rank: Array | None = None
) -> Array:
    """The same for slots, by `KEY_SCALARS`."""
    scalars = {"segment": segment, "rank": rank}
    if decay is not None:
        scalars |= block_scalars(decay, config.block)
    return _pack(config, KEY_SCALARS, heads, scalars)


def _pack(config: AttentionConfig, names: Sequence[str], heads: int, scalars: dict[str, Array | None]) -> Array:
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

    names = (*names, *[""] * (8 - len(names)))
    return jnp.stack([by_block(name) for name in names], axis=3)


def compiler_params(axes: int) -> pltpu.CompilerParams:
    """Batch and heads in any order, the other axes of the grid in sequence."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * 2 + ("arbitrary",) * (axes - 2), vmem_limit_bytes=tuning.VMEM_LIMIT
    )
