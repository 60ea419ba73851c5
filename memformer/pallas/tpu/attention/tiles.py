"""Attention by tiles on TPU: what the read and the write of DeltaFormer share.

Time is cut into blocks of R tokens, for rows (queries) and columns (keys) alike; the slots of a state come first, in
blocks of their own. A program holds all keys and values of one head (or a part of them) in VMEM and walks over blocks
of columns. Inside a block, sub-blocks of rows take their steps in turn (`common.lockstep`).

What is one number a token lies in arrays [B, heads, N, 8, R], one sublane a name (`NAMES`): a register holds eight.
"""

import dataclasses
import math
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memformer.core.similarity import Kernel, similarity
from memformer.core.types import Array
from memformer.pallas import mask as sight
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.common import abreast, iotas, lockstep, product

__all__ = [
    "LOW",
    "NAMES",
    "Plan",
    "Sums",
    "add_block",
    "add_tile",
    "block_at",
    "compiler_params",
    "find_first",
    "find_last",
    "norm_of",
    "own_mask",
    "pack_rows",
    "same_segment",
    "start_sums",
    "sums_scratch",
    "to_columns",
    "to_row",
    "weights_of",
    "widen",
]

# segment  index of the token's segment; start  log-sum-exp over the state's slots; the others by their names.
NAMES = ("segment", "alpha", "beta", "norm", "mean", "start")

# A hidden score; running maxima start at half of it, so that its exponential is 0.
LOW = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call is cut, all static.

    Attributes:
      kernel: the similarity kernel.
      scale: factor on inner products.
      size: R, rows of a block.
      sub: rows of a sub-block: what the write inverts at once; divides R.
      tile: rows and columns of a tile in the walk, for a program of one head and of two; all divide R.
      back: R of the backward pass; divides R.
      most: blocks of one head that VMEM holds at most.
      before: blocks of slots before the call's own tokens.
      own: whether queries see slots of the call (those up to their own).
      strict: whether their own slot is left out.
      segments: whether there are segments.
      passes: MXU passes of a product.
    """

    kernel: Kernel
    scale: float
    size: int
    sub: int
    tile: tuple[tuple[int, int], tuple[int, int]]
    back: int
    most: int
    before: int
    own: bool
    strict: bool
    segments: bool
    passes: int

    @property
    def backward(self) -> "Plan":
        """The plan of the backward pass."""
        times = self.size // self.back
        return dataclasses.replace(self, size=self.back, most=self.most * times, before=self.before * times)

    @property
    def factor(self) -> float:
        """What makes scores of inner products; exponentials of a softmax are to base 2, as the chip has them."""
        return self.scale * math.log2(math.e) if self.kernel.normalized else self.scale

    @property
    def value_passes(self) -> int:
        """Passes of products with values, and with gradients: with no normaliser sums cancel, and one is too few."""
        return self.passes if self.kernel.normalized else max(self.passes, 3)

    @property
    def exact(self) -> int:
        """Passes of products inside the triangular solve."""
        return max(self.passes, 3)

    @property
    def subs(self) -> tuple[slice, ...]:
        """The sub-blocks of a block."""
        return tuple(slice(top, top + self.sub) for top in range(0, self.size, self.sub))


class Sums(NamedTuple):
    """A block of rows so far, in VMEM, rows in lanes.

    Attributes:
      top: running maximum, [8, R] of equal sublanes.
      total: sums of exponentials, by sublane, [8, R].
      value: weighted values, [V, R].
    """

    top: Any
    total: Any
    value: Any


def sums_scratch(plan: Plan, value: int) -> dict[str, Any]:
    """Scratch for `Sums`, by name."""
    row = pltpu.VMEM((8, plan.size), jnp.float32)
    return {"top": row, "total": row, "value": pltpu.VMEM((value, plan.size), jnp.float32)}


def start_sums(sums: Sums) -> None:
    """Nothing seen yet."""
    sums.top[...] = jnp.full(sums.top.shape, LOW / 2, jnp.float32)
    sums.total[...] = jnp.zeros(sums.total.shape, jnp.float32)
    sums.value[...] = jnp.zeros(sums.value.shape, jnp.float32)


def add_tile(plan: Plan, sums: Sums, rows: slice, q, k, x, columns, mask) -> Generator[None, None, None]:
    """Adds to the sums of some rows what they read in one tile.

    Args:
      plan: as ever.
      sums: of the block.
      rows: which of them.
      q: reference to [R, K].
      k: reference to [S, K].
      x: reference to [S, V].
      columns: which of k and x.
      mask: [columns, rows] what is seen, or None for everything.
    """
    # Loaded where needed: whole blocks would not stay in registers.
    scores = product(k[columns], q[rows], "nt", plan.passes) * plan.factor
    yield
    if not plan.kernel.normalized:
        weights = weights_of(plan, scores, mask, None)
        yield
        sums.value[:, rows] += product(x[columns], weights, "tn", plan.value_passes)
        return
    if mask is not None:
        scores = jnp.where(mask, scores, LOW)
    before = sums.top[:, rows]
    top, shrink, weights = yield from widen(sums, rows, before, scores)
    sums.top[:, rows] = top
    yield
    read = product(x[columns], weights, "tn", plan.passes)
    sums.value[:, rows] = sums.value[:, rows] * shrink[:1] + read


def widen(sums: Sums, rows: slice, before: Array, scores: Array) -> Generator[None, None, tuple[Array, Array, Array]]:
    """Adds one tile to `total`; its running maximum and what that makes of older sums, [8, rows], its exponentials."""
    top = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
    yield
    weights = jnp.exp2(scores - top[:1])
    shrink = jnp.exp2(before - top)
    sums.total[:, rows] = sums.total[:, rows] * shrink + _fold(weights)
    return top, shrink, weights


def _fold(x: Array) -> Array:
    """[columns, rows] to [8, rows]: sums that need no exchange between sublanes."""
    return jnp.sum(x.reshape(-1, 8, x.shape[1]), axis=0)


def add_block(
    plan: Plan, heads: Sequence[tuple[Sums, Any, Any, Any]], j, segment: Array | None, key: Array | None
) -> None:
    """Adds to the sums what all rows of some heads read of block j, which lies before them.

    Args:
      plan: as ever.
      heads: sums of the block of rows, and references q, k and x as in `add_tile`, of each head.
      j: which block of k and x.
      segment: segments of the rows, [1, R], or None.
      key: segments of the columns, [R, 1].
    """
    steps = []
    high, wide = plan.tile[len(heads) - 1]
    for left in range(0, plan.size, wide):
        for top in range(0, plan.size, high):
            rows = slice(top, top + high)
            mask = None if key is None else segment[:, rows] == key[left : left + wide]
            at = block_at(plan, j, left, wide)
            tile = [add_tile(plan, sums, rows, q, k, x, at, mask) for sums, q, k, x in heads]
            steps.append(abreast(tile, len(tile), 0))
    # A turn apart, so that a tile finds the sums of the one before it.
    lockstep(steps, apart=1)


def norm_of(top: Array, total: Array) -> Array:
    """[1, R] log-sum-exp of rows, to base 2; a large negative number where a row saw nothing."""
    total = jnp.sum(total, axis=0, keepdims=True)
    return top[:1] + jnp.log2(jnp.where(total > 0, total, 1.0))


def weights_of(plan: Plan, scores: Array, mask, norm: Array | None) -> Array:
    """Values of the kernel in one tile, normalised by the log-sum-exp `norm` where it is softmax; 0 where hidden."""
    if plan.kernel.normalized:
        return jnp.exp2((scores if mask is None else jnp.where(mask, scores, LOW)) - norm)
    if mask is None:
        return similarity(plan.kernel, scores)
    # Hidden scores are cleared before the kernel too: their exponential may be infinite.
    return jnp.where(mask, similarity(plan.kernel, jnp.where(mask, scores, 0.0)), 0.0)


def own_mask(plan: Plan, rows: slice, columns: slice, *, transposed: bool = False) -> Array:
    """[rows, columns] what rows of a block see of columns of the same block, as if all were one segment."""
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    row, column = iotas(shape[::-1])[::-1] if transposed else iotas(shape)
    gap = (row + rows.start) - (column + columns.start)
    return gap > 0 if plan.strict else gap >= 0


def same_segment(mask, row: Array | None, column: Array | None):
    """`mask` (or None) and the segments equal; None where there is nothing to hide."""
    if row is None:
        return mask
    same = row == column
    return same if mask is None else mask & same


def to_columns(rows: Array) -> Array:
    """[8, R] to [R, 8]."""
    return rows.T


def to_row(column: Array) -> Array:
    """[R, 1], or [R, lanes] of equal lanes, to [8, R] of equal sublanes."""
    return jnp.broadcast_to(column[:, :1], (column.shape[0], 128)).T[:8]


def block_at(plan: Plan, i, offset: int = 0, count: int | None = None):
    """Rows of block i in an array that holds all of them, or `count` of them from `offset` on."""
    start = i * plan.size
    start = start if isinstance(i, int) else pl.multiple_of(start, plan.size)
    return pl.ds(start + offset, plan.size if count is None else count)


def pack_rows(plan: Plan, heads: int, **numbers: Array | None) -> Array:
    """[B, heads, N, 8, R] float32 from [B, T] or [B, heads, T] arrays by their names; T a multiple of R."""
    numbers = {name: x for name, x in numbers.items() if x is not None}
    first = next(iter(numbers.values()))
    batch, length = first.shape[0], first.shape[-1]
    shape = (batch, heads, length // plan.size, plan.size)

    def lay(name):
        x = numbers.get(name)
        if x is None:
            return jnp.zeros(shape, jnp.float32)
        x = x.astype(jnp.float32)
        x = jnp.broadcast_to(x[:, None] if x.ndim == 2 else x, (batch, heads, length))
        return x.reshape(shape)

    names = (*NAMES, *[""] * (8 - len(NAMES)))
    return jnp.stack([lay(name) for name in names], axis=3)


def find_first(plan: Plan, query: Array, key: Array) -> Array:
    """[B, N] first block of columns that each block of rows sees, M where it sees none.

    Args:
      plan: as ever.
      query: [B, T] segments of rows, negative where blind.
      key: [B, S] segments of columns, negative where unseen.
    """
    return sight.find_first(query, key, plan.size, plan.size)


def find_last(plan: Plan, query: Array, key: Array) -> Array:
    """[B, M] one more than the last block of rows that sees each block of columns, 0 where none does."""
    return sight.find_last(query, key, plan.size, plan.size)


def compiler_params(axes: int) -> pltpu.CompilerParams:
    """Batch and heads in any order, the other axes of the grid in turn."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",) * 2 + ("arbitrary",) * (axes - 2), vmem_limit_bytes=tuning.VMEM_LIMIT
    )
