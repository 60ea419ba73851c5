"""(I + A)^-1 for strictly lower A inside a kernel.

Diagonal blocks of 8 rows by forward substitution on the vector unit, all blocks of A at once (block
in lanes, row of a block in sublanes); then the ladder of core/triangular.py joins neighbours on the
MXU, 8 to 16 to 32 and on, computing only the rows that change. No power of A is ever formed.
"""

from collections.abc import Generator

import jax.numpy as jnp

from memformer.core.types import Array
from memformer.pallas.tpu.common import SUBLANES, iotas, product

__all__ = ["unit_lower_inverse"]


def unit_lower_inverse(a: Array, passes: int) -> Generator[None, None, Array]:
    """(I + a)^-1 for a [C, C] float32, zero on and above the diagonal; C a power of two of at least 8.

    Yields between steps, for `common.lockstep`.

    Args:
      a: the matrix.
      passes: MXU passes of a product, 3 or 6: one pass loses what cancels when keys repeat.
    """
    x = _substitute(a)
    block = SUBLANES
    while block < a.shape[0]:
        yield
        x = yield from _join(a, x, block, passes)
        block *= 2
    return x


def _substitute(a: Array) -> Array:
    """The inverse of the diagonal blocks of 8 rows."""
    size, b = a.shape[0], SUBLANES
    row, column = iotas((size, size))
    diagonal = row // b == column // b
    blocks = jnp.where(diagonal, a, 0.0)
    # [8, C]: entry (r, j) is row r of the block that column j lies in.
    folded = blocks[:b]
    for start in range(b, size, b):
        folded = folded + blocks[start : start + b]
    row, column = iotas((b, size))
    x = jnp.where(row == column % b, 1.0, 0.0)
    for i in range(b - 1):
        # Row r loses A_ri times row i, which is final.
        weight = _spread(folded, i)
        x = x - weight * x[i : i + 1]
    return jnp.where(diagonal, jnp.concatenate([x] * (size // b), axis=0), 0.0)


def _spread(folded: Array, i: int) -> Array:
    """Entry i of every block of 8 lanes, in all 8 of them."""
    _, column = iotas(folded.shape)
    return jnp.take_along_axis(folded, column // SUBLANES * SUBLANES + i, axis=1, mode="promise_in_bounds")


def _join(a: Array, x: Array, b: int, passes: int) -> Generator[None, None, Array]:
    """Pairs of diagonal blocks of b rows become blocks of 2 b: X2 keeps, -X2 A21 X1 comes below X1."""
    size = a.shape[0]
    _, column = iotas((b, size))
    odd = range(b, size, 2 * b)
    below = [jnp.where(column // b == start // b - 1, a[start : start + b], 0.0) for start in odd]
    second = [x[start : start + b] for start in odd]
    y = product(jnp.concatenate(below), x, "nn", passes)
    yield
    zeros = jnp.zeros((b, size), jnp.float32)
    y = jnp.concatenate([part for p in range(len(second)) for part in (zeros, y[p * b : (p + 1) * b])])
    corner = product(jnp.concatenate(second), y, "nn", passes)
    joined = []
    for p, start in enumerate(odd):
        joined += [x[start - b : start], second[p] - corner[p * b : (p + 1) * b]]
    return jnp.concatenate(joined)
