"""(I + A)^-1 for strictly lower A of 64 rows, inside a kernel.

Diagonal blocks of 16 rows by forward substitution: a warp takes a block, a lane one column, so that a step needs no
other lane. The right sides of every second block are its identity and, beside it, the block of A to its left, which
is half of the first join. What is left of the ladder of core/triangular.py are three products on the tensor cores,
their operands as two bfloat16 halves, the last one's as three: identical keys make the same rounding in every row, and
the state adds them up (at beta 2 4% of it in 256 tokens, with three parts 1%). No power of A is ever formed. With
single halves, or TF32, nearly equal keys at beta 2 would lose all but a digit.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.common import halves, iotas, pairs, products, put_parts

__all__ = ["ROWS", "inverse_scratch", "unit_lower_inverse"]

ROWS, BLOCK = 64, 16
PAIR = 2 * BLOCK

# Entry (block, column) of an array [4, 32] lies in that warp and lane; all of a row [4, n] in every lane of that warp.
LANES = plgpu.Layout.TILED(plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
EVERY_LANE = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 1),)), warp_dims=(-2,), lane_dims=(plgpu.Replicated(32),), vector_dim=-1
)


def inverse_scratch() -> list:
    """Shared memory that `unit_lower_inverse` works in, 56 KiB; its result may go to the first two pairs."""
    shapes = ((ROWS, BLOCK + PAIR), (ROWS // BLOCK, BLOCK, BLOCK + PAIR))
    return [halves(PAIR, ROWS, PAIR)] * 4 + [plgpu.SMEM(shape, jnp.float32) for shape in shapes]


def unit_lower_inverse(a: Array, scratch) -> tuple[Array, Array]:
    """The left and the right 32 columns of (I + a)^-1.

    Args:
      a: [64, 64] float32, zero on and above the diagonal.
      scratch: as `inverse_scratch` says.
    """
    *spread, stack, corner_left, flat, blocks = scratch
    rows, columns = iotas(ROWS, PAIR)
    block, later = lax.div(rows, BLOCK), rows >= PAIR
    odd, left = lax.rem(block, 2) == 1, columns < BLOCK
    halves_of_a = [lax.slice(a, (0, side), (ROWS, side + PAIR)) for side in (0, PAIR)]
    put_parts(corner_left, jnp.where(later, halves_of_a[0], 0.0))
    x = _substitute(a, halves_of_a, flat, blocks)
    # Blocks of 32: below X1 stands X2 A21, and -X2 A21 X1 shall.
    between = jnp.where(odd & left, x, 0.0)
    put_parts(spread[0], jnp.where(later, 0.0, between))
    put_parts(spread[1], jnp.where(later, between, 0.0))
    put_parts(stack, x)
    plgpu.commit_smem()
    first, second = ([ref.at[pl.ds(top, PAIR)] for ref in stack] for top in (0, PAIR))
    (corner,) = products(pairs(spread[0], first) + pairs(spread[1], second))
    x = jnp.where(odd & left, -corner, x)
    # The blocks of the first product are free again.
    stack, product = [*stack, spread[0][0]], [spread[0][1], *spread[1]]
    put_parts(stack, x)
    plgpu.commit_smem()
    (y,) = products(pairs(corner_left, first))
    put_parts(product, y)
    plgpu.commit_smem()
    (corner,) = products(pairs(stack, [ref.at[pl.ds(PAIR, PAIR)] for ref in product]))
    return jnp.where(later, -corner, x), jnp.where(later, x, 0.0)


def _substitute(a: Array, sides, flat, blocks) -> Array:
    """[64, 32]: X1, and beside it nothing, above X2 A21 and X2, of both pairs of blocks."""
    rows, columns = iotas(ROWS, PAIR)
    block, place = lax.div(rows, BLOCK), lax.rem(rows, BLOCK)
    own = lax.div(columns, BLOCK) == lax.rem(block, 2)
    beside = jnp.where(rows >= PAIR, sides[1], sides[0])
    right = jnp.where((lax.rem(block, 2) == 1) & ~own, beside, 0.0)
    right = jnp.where(own & (lax.rem(columns, BLOCK) == place), 1.0, right)
    rows, _ = iotas(ROWS, BLOCK)
    diagonal = jnp.zeros((ROWS, BLOCK), jnp.float32)
    for b in range(ROWS // BLOCK):
        part = lax.slice(a, (0, b * BLOCK), (ROWS, (b + 1) * BLOCK))
        part = jnp.where(lax.div(rows, BLOCK) == b, part, 0.0)
        diagonal = part if b == 0 else diagonal + part
    flat[:, 0:BLOCK] = diagonal
    flat[:, BLOCK:] = right
    plgpu.commit_smem()
    # Wgmma's rows cannot be split into blocks, those of a plain layout can.
    blocks[...] = flat[...].reshape(blocks.shape)
    plgpu.commit_smem()
    solved = []
    for r in range(BLOCK):
        x = compat.load(blocks.at[:, r, BLOCK:], LANES)
        factors = compat.load(blocks.at[:, r, 0:BLOCK], EVERY_LANE)
        for i, earlier in enumerate(solved):
            x = x - _spread(factors, i) * earlier
        solved.append(x)
    for r, x in enumerate(solved):
        blocks[:, r, BLOCK:] = x
    plgpu.commit_smem()
    flat[...] = blocks[...].reshape(flat.shape)
    plgpu.commit_smem()
    return compat.load(flat.at[:, BLOCK:], plgpu.Layout.WGMMA)


def _spread(factors: Array, i: int) -> Array:
    """Column i of [4, n], one number a block, for all columns of the blocks."""
    one = jnp.sum(lax.slice(factors, (0, i), (factors.shape[0], i + 1)), axis=1)
    return plgpu.layout_cast(lax.broadcast_in_dim(one, (factors.shape[0], PAIR), (0,)), LANES)
