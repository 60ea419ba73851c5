"""(I + A)^-1 for strictly lower A inside a kernel.

Diagonal blocks of 16 rows by forward substitution on the vector unit, all blocks of A at once (block
in lanes, row of a block in sublanes); then the ladder of core/triangular.py joins neighbours on the
MXU, 16 to 32 and on, computing only the rows that change. No power of A is ever formed.
"""

from collections.abc import Generator

import jax.numpy as jnp

from memformer.core.types import Array
from memformer.pallas.tpu.common import iotas, product, split

__all__ = ["unit_lower_inverse"]

# Rows of a diagonal block: on the vector unit a step a row, on the MXU six products for each doubling.
BLOCK = 16


def unit_lower_inverse(a: Array, passes: int) -> Generator[None, None, Array]:
    """(I + a)^-1 for a [C, C] float32, zero on and above the diagonal; C a power of two of at least 16.

    Yields between steps, for `common.lockstep`.

    Args:
      a: the matrix.
      passes: MXU passes of a product, 3 or 6: one pass loses what cancels when keys repeat.
    """
    x = yield from _substitute(a)
    block = BLOCK
    while block < a.shape[0]:
        yield
        x = yield from _join(a, x, block, passes)
        block *= 2
    return x


def _substitute(a: Array) -> Generator[None, None, Array]:
    """The inverse of the diagonal blocks."""
    size = a.shape[0]
    row, column = iotas((size, size))
    diagonal = row // BLOCK == column // BLOCK
    blocks = jnp.where(diagonal, a, 0.0)
    # [BLOCK, C]: entry (r, j) is row r of the block that column j lies in.
    folded = blocks[:BLOCK]
    for start in range(BLOCK, size, BLOCK):
        folded = folded + blocks[start : start + BLOCK]
    row, column = iotas((BLOCK, size))
    # Registers of 8 rows.
    folded = [folded[top : top + 8] for top in range(0, BLOCK, 8)]
    x = [jnp.where(row == column % BLOCK, 1.0, 0.0)[top : top + 8] for top in range(0, BLOCK, 8)]
    for i in range(BLOCK - 1):
        yield
        # Row r > i loses A_ri times row i, which is final.
        final = x[i // 8][i % 8 : i % 8 + 1]
        for part in range((i + 1) // 8, BLOCK // 8):
            x[part] = x[part] - _spread(folded[part], i) * final
    whole = jnp.concatenate(x * (size // BLOCK), axis=0)
    return jnp.where(diagonal, whole, 0.0)


def _spread(folded: Array, i: int) -> Array:
    """Entry i of every block's lanes, in all of them."""
    _, column = iotas(folded.shape)
    return jnp.take_along_axis(folded, column // BLOCK * BLOCK + i, axis=1, mode="promise_in_bounds")


def _join(a: Array, x: Array, b: int, passes: int) -> Generator[None, None, Array]:
    """Pairs of diagonal blocks of b rows become blocks of 2 b: X2 keeps, -X2 A21 X1 comes below X1."""
    size = a.shape[0]
    _, column = iotas((b, size))
    odd = range(b, size, 2 * b)
    below = jnp.concatenate([jnp.where(column // b == top // b - 1, a[top : top + b], 0.0) for top in odd])
    parts = split(x, passes)
    y = product(below, parts, "nn", passes)
    yield

    def spaced(part):
        zeros = jnp.zeros((b, size), part.dtype)
        return jnp.concatenate([rows for p in range(len(odd)) for rows in (zeros, part[p * b : (p + 1) * b])])

    second = tuple(jnp.concatenate([part[top : top + b] for top in odd]) for part in parts)
    corner = product(second, tuple(spaced(part) for part in split(y, passes)), "nn", passes)
    joined = []
    for p, top in enumerate(odd):
        joined += [x[top - b : top], x[top : top + b] - corner[p * b : (p + 1) * b]]
    return jnp.concatenate(joined)
