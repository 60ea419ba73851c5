"""(I + A)^-1 for strictly lower A inside a kernel.

Diagonal blocks of 16 rows by forward substitution on the vector unit, all blocks of A at once (block
in lanes, row of a block in sublanes); then the ladder of core/triangular.py joins neighbours on the
MXU, 16 to 32 and on. Blocks stay side by side in lanes, and one product joins those of two heads:
the later blocks of one lie where the other has its earlier ones. No power of A is ever formed.
"""

import functools
from collections.abc import Generator, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from memformer.core.types import Array
from memformer.pallas.tpu.common import iotas, product, split

__all__ = ["unit_lower_inverse", "unit_lower_inverses"]

# Rows of a diagonal block: on the vector unit a step a row, on the MXU six products for each doubling.
BLOCK = 16


def unit_lower_inverse(a: Any, passes: int) -> Generator[None, None, Array]:
    """`unit_lower_inverses` of one matrix."""
    return (yield from unit_lower_inverses([a], passes))[0]


def unit_lower_inverses(a: Sequence[Any], passes: int) -> Generator[None, None, list[Array]]:
    """(I + a)^-1 for each a [C, C] float32, zero on and above the diagonal; C a power of two of at least 16.

    Yields between steps, for `common.lockstep`.

    Args:
      a: the matrices of one or two heads, or references to them.
      passes: MXU passes of a product, 3 or 6: one pass loses what cancels when keys repeat.
    """
    x = yield from _substitute(a)
    block = BLOCK
    while block < a[0].shape[0]:
        yield
        x = yield from _join(a, x, block, passes)
        block *= 2
    return x


def _substitute(a: Sequence[Any]) -> Generator[None, None, list[Array]]:
    """The inverse of the diagonal blocks, side by side: [BLOCK, C], entry (r, j) in the block that column j is of."""
    size = a[0].shape[0]
    row, column = iotas((BLOCK, size))
    unit = jnp.where(row == column % BLOCK, 1.0, 0.0)
    # Registers of 8 rows.
    tops = range(0, BLOCK, 8)
    folded = [_fold(one, range(0, size, BLOCK), BLOCK, column // BLOCK * BLOCK) for one in a]
    folded = [[one[top : top + 8] for top in tops] for one in folded]
    x = [[unit[top : top + 8] for top in tops] for _ in a]
    for i in range(BLOCK - 1):
        yield
        # Row r > i loses A_ri times row i, which is final.
        for one, parts in zip(x, folded, strict=True):
            final = one[i // 8][i % 8 : i % 8 + 1]
            for part in range((i + 1) // 8, BLOCK // 8):
                one[part] = one[part] - _spread(parts[part], i) * final
    return [jnp.concatenate(one) for one in x]


def _fold(a: Any, tops: range, rows: int, place: Array) -> Array:
    """[rows, C]: in every column those rows of a, from one of `tops`, that `place` says; 0 where it says another."""
    parts = (jnp.where(place == top, a[top : top + rows, :], 0.0) for top in tops)
    return functools.reduce(jnp.add, parts)


def _spread(folded: Array, i: int) -> Array:
    """Entry i of every block's lanes, in all of them."""
    _, column = iotas(folded.shape)
    return jnp.take_along_axis(folded, column // BLOCK * BLOCK + i, axis=1, mode="promise_in_bounds")


def _join(a: Sequence[Any], x: Sequence[Array], b: int, passes: int) -> Generator[None, None, list[Array]]:
    """Pairs of diagonal blocks of b rows become blocks of 2 b: X2 keeps, -X2 A21 X1 comes below X1.

    Args:
      a: [C, C] of each head.
      x: [b, C] of each head.
      b: rows of a block.
      passes: MXU passes of a product.
    """
    size = a[0].shape[0]
    _, column = iotas((b, size))
    even = column // b % 2 == 0
    # A21 has the columns of X1.
    below = [_fold(one, range(b, size, 2 * b), b, (column // b + 1) * b) for one in a]
    # The second head gives way by one block, so that two heads fill the lanes.
    below, moved = ([one, pltpu.roll(other, b, 1)] for one, other in ((below[0], below[-1]), (x[0], x[-1])))
    alone = len(a) == 1
    first, below = (jnp.where(even, one, 0.0 if alone else other) for one, other in (moved, below))
    second = jnp.where(even, moved[1], moved[0])
    y = product(below, _spaced(split(first, passes), b, 0), "nn", passes)
    yield
    # X2 lies one block after its X1.
    corner = product(second, _spaced(split(y, passes), b, 1), "nn", passes)
    yield
    corners = [corner, pltpu.roll(corner, size - b, 1)]
    return [
        jnp.concatenate([jnp.where(even, one, 0.0), jnp.where(even, -corner, one)])
        for one, corner in zip(x, corners, strict=False)
    ]


def _spaced(parts: tuple[Array, ...], b: int, later: int) -> tuple[Array, ...]:
    """[b, C], blocks side by side, as a block diagonal, its rows `later` blocks down."""
    size = parts[0].shape[1]
    row, column = iotas((size, size))
    keep = row // b == (column // b + later) % (size // b)
    return tuple(jnp.where(keep, jnp.concatenate([x] * (size // b)), jnp.zeros((), x.dtype)) for x in parts)
