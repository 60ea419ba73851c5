"""(I + A)^-1 for strictly lower triangular A inside a kernel.

Diagonal blocks of 16 rows are inverted by forward substitution on the vector unit, all blocks of A at once (blocks in
lanes, rows of a block in sublanes). Then the ladder of core/triangular.py joins neighbouring blocks on the MXU: 16 to
32 rows, 32 to 64, and so on. Blocks stay side by side in lanes, and one product joins those of two heads: the later
blocks of one head lie in the lanes where the other head has its earlier ones. No power of A is ever formed.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from memformer.core.types import Array
from memformer.pallas.tpu.interleave import Steps
from memformer.pallas.tpu.products import iotas, product, split_bf16

__all__ = ["BLOCK", "fold_diagonal", "invert_blocks", "join_blocks", "join_pairs", "unit_lower_inverses"]

# Rows of a diagonal block: the vector unit takes one step per row, the MXU six products per doubling.
BLOCK = 16


def unit_lower_inverses(
    a: Sequence[Any], passes: int, stacked: str | None = None
) -> Generator[None, None, list[Array]]:
    """(I + a)^-1 for each a [C, C] float32, whose entries on and above the diagonal are ignored.

    C is a power of two of at least 16.

    Yields between steps, for `interleave`.

    Args:
      a: the matrices of one or two heads, or references to them.
      passes: MXU passes per product, 3 or 6: with one pass, repeated keys lose all precision to cancellation.
      stacked: see `product`.
    """
    x = yield from invert_blocks([fold_diagonal(one[...], 0) for one in a])
    return (yield from join_blocks(a, x, passes, stacked=stacked))


def join_blocks(
    a: Sequence[Any], x: list[Array], passes: int, rows: int | None = None, stacked: str | None = None
) -> Generator[None, None, list[Array]]:
    """Joins the inverses of diagonal blocks to those of blocks of `rows` rows, by default to the whole inverses.

    Args:
      a: see `unit_lower_inverses`.
      x: of each matrix the inverses of its diagonal blocks of b rows, side by side, [b, C].
      passes: see `unit_lower_inverses`.
      rows: of the blocks to return.
      stacked: see `product`.
    """
    block = x[0].shape[0]
    while block < (rows or a[0].shape[0]):
        yield
        parts: list[list[Array]] = [[] for _ in a]
        yield from join_pairs(a, x, passes, stacked, lambda h, top, half, parts=parts: parts[h].append(half))
        x = [jnp.concatenate(own) for own in parts]
        block *= 2
    return x


def fold_diagonal(a: Array, top: int, folded: Array | None = None) -> Array:
    """[BLOCK, C]: the diagonal blocks of rows of a matrix side by side, or these added to those of the rows before.

    Args:
      a: [rows, C], whole blocks of a matrix [C, C].
      top: index of the first of these rows.
      folded: of the rows before.
    """
    _, column = iotas((BLOCK, a.shape[1]))
    place = column // BLOCK * BLOCK
    return _fold(a, range(0, a.shape[0], BLOCK), BLOCK, place - top, folded)


def invert_blocks(folded: Sequence[Array]) -> Generator[None, None, list[Array]]:
    """Inverses of the diagonal blocks, side by side: [BLOCK, C], entry (r, j) is row r of the block of column j.

    Args:
      folded: the blocks of each head, from `fold_diagonal`; entries on and above their diagonals are ignored.
    """
    size = folded[0].shape[1]
    row, column = iotas((BLOCK, size))
    unit = jnp.where(row == column % BLOCK, 1.0, 0.0)
    # A register holds 8 rows.
    tops = range(0, BLOCK, 8)
    below = row > column % BLOCK
    masked = [jnp.where(below, one, 0.0) for one in folded]
    entries = [[one[top : top + 8] for top in tops] for one in masked]
    x = [[unit[top : top + 8] for top in tops] for _ in folded]
    for i in range(BLOCK - 1):
        yield
        # Subtract A_ri times row i, which is final, from each row r > i.
        for one, parts in zip(x, entries, strict=True):
            final = one[i // 8][i % 8 : i % 8 + 1]
            for part in range((i + 1) // 8, BLOCK // 8):
                one[part] = one[part] - _broadcast_entry(parts[part], i) * final
    return [jnp.concatenate(one) for one in x]


def _fold(a: Any, tops: range, rows: int, place: Array, folded: Array | None = None) -> Array:
    """[rows, C]: in each column the rows of a from the top that `place` selects; `folded`, or 0, where it is no top."""
    folded = jnp.zeros(place.shape, jnp.float32) if folded is None else folded
    for top in tops:
        folded = jnp.where(place == top, a[top : top + rows, :], folded)
    return folded


def _broadcast_entry(folded: Array, i: int) -> Array:
    """Broadcasts entry i of each block's lanes over the lanes of the block."""
    _, column = iotas(folded.shape)
    return jnp.take_along_axis(folded, column // BLOCK * BLOCK + i, axis=1, mode="promise_in_bounds")


def join_pairs(
    a: Sequence[Any], x: Sequence[Any], passes: int, stacked: str | None, store: Callable[[int, int, Array], None]
) -> Steps:
    """Joins pairs of diagonal blocks of b rows to blocks of 2 b rows: the corner below X1 is -X2 A21 X1.

    Args:
      a: [C, C] of each head, or references.
      x: [b, C] of each head, or references, which are read where they are needed: values would be held in registers.
      passes: MXU passes per product.
      stacked: see `product`.
      store: receives each half of a result as soon as it is known: the head, the first row, and the rows [b, C].
    """
    b, size = x[0].shape
    _, column = iotas((b, size))
    even = column // b % 2 == 0
    alone = len(a) == 1
    # A21 has the columns of X1. The second head moves by one block, so that two heads fill the lanes.
    below = [_fold(one, range(b, size, 2 * b), b, (column // b + 1) * b) for one in a]
    left = jnp.where(even, below[0], 0.0 if alone else pltpu.roll(below[-1], b, 1))
    first = jnp.where(even, x[0][...], 0.0 if alone else pltpu.roll(x[-1][...], b, 1))
    y = product(left, _block_diagonal(split_bf16(first, passes), b, 0), "nn", passes, stacked)
    for h, one in enumerate(x):
        store(h, 0, jnp.where(even, one[...], 0.0))
    yield
    # X2 lies one block after its X1.
    second = jnp.where(even, pltpu.roll(x[-1][...], b, 1), x[0][...])
    corner = product(second, _block_diagonal(split_bf16(y, passes), b, 1), "nn", passes, stacked)
    yield
    for h, one in enumerate(x):
        store(h, b, jnp.where(even, -(pltpu.roll(corner, size - b, 1) if h else corner), one[...]))


def _block_diagonal(parts: tuple[Array, ...], b: int, later: int) -> tuple[Array, ...]:
    """Blocks side by side, [b, C], as a block diagonal matrix whose rows lie `later` blocks further down."""
    size = parts[0].shape[1]
    row, column = iotas((size, size))
    own = row // b == (column // b + later) % (size // b)
    return tuple(jnp.where(own, jnp.concatenate([x] * (size // b)), jnp.zeros((), x.dtype)) for x in parts)
