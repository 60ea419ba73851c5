"""(I + A)^-1 for a strictly lower triangular A of 64 rows, inside a kernel.

Forward substitution inverts the diagonal blocks of 16 rows: one warp per block and one lane per column, so that no
step needs another lane. The right-hand sides of every second block are its identity and, beside it, the block of A to
its left, which is half of the first join. The rest of the ladder of core/triangular.py is three products on the tensor
cores. Their operands are split into two bfloat16 parts, those of the last into three: identical keys round alike in
every row, and the state accumulates the error (at beta 2, 4% in 256 tokens; with three parts, 1%). No power of A is
formed. With bfloat16 or TF32 operands nearly equal keys at beta 2 would leave one correct digit.

Kernels may run this without automatic barriers: a `commit_smem`, which is one, separates every store from the reads of
other warps, and every product from the stores that replace its operands.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu import compat
from memformer.pallas.gpu.wgmma import iotas, partial_products, products, split_block, store_split

__all__ = ["ROWS", "inverse_scratch", "unit_lower_inverse", "write_inverse"]

ROWS, BLOCK = 64, 16
PAIR = 2 * BLOCK

# Entry (block, column) of an array [4, 32] lies in that warp and lane.
LANES = plgpu.Layout.TILED(plgpu.Tiling(((4, 32), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

# Row r of an array [4, n] lies in every lane of warp r.
EVERY_LANE = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 1),)), warp_dims=(-2,), lane_dims=(plgpu.Replicated(32),), vector_dim=-1
)


def inverse_scratch() -> list:
    """Shared memory of an inverse, 56 KiB; its first two pairs are free again once that is known."""
    shapes = ((ROWS, BLOCK + PAIR), (ROWS // BLOCK, BLOCK, BLOCK + PAIR))
    return [split_block(ROWS, PAIR, columns=PAIR)] * 4 + [plgpu.SMEM(shape, jnp.float32) for shape in shapes]


def write_inverse(a: Array, scratch, targets, place: tuple) -> None:
    """Starts the copies of (I + a)^-1 to global memory, as the sum of bfloat16 arrays.

    Args:
      a: [64, 64] float32, zero on and above the diagonal.
      scratch: see `inverse_scratch`.
      targets: one array per summand.
      place: indices of the matrix in each of them.
    """
    sides = unit_lower_inverse(a, scratch)
    plgpu.commit_smem()
    for pair, x in zip(scratch, sides, strict=False):
        # The first pairs of the scratch are free again.
        store_split(pair, x)
    plgpu.commit_smem()
    for i, x in enumerate(sides):
        for source, target in zip(scratch[i], targets, strict=True):
            plgpu.copy_smem_to_gmem(source, target.at[(*place, slice(None), pl.ds(i * x.shape[1], x.shape[1]))])


def unit_lower_inverse(a: Array, scratch) -> tuple[Array, Array]:
    """The left and the right 32 columns of (I + a)^-1.

    Args:
      a: [64, 64] float32, zero on and above the diagonal.
      scratch: see `inverse_scratch`.
    """
    *corners, stack, corner_left, flat, blocks = scratch
    rows, columns = iotas(ROWS, PAIR)
    block, later = lax.div(rows, BLOCK), rows >= PAIR
    odd, left = lax.rem(block, 2) == 1, columns < BLOCK
    sides = [lax.slice(a, (0, side), (ROWS, side + PAIR)) for side in (0, PAIR)]
    store_split(corner_left, jnp.where(later, sides[0], 0.0))
    x = _substitute(a, sides, flat, blocks)
    # Join blocks of 16 rows: X2 A21 stands below X1 and becomes -X2 A21 X1.
    between = jnp.where(odd & left, x, 0.0)
    store_split(corners[0], jnp.where(later, 0.0, between))
    store_split(corners[1], jnp.where(later, between, 0.0))
    store_split(stack, x)
    plgpu.commit_smem()
    first, second = ([ref.at[pl.ds(top, PAIR)] for ref in stack] for top in (0, PAIR))
    (corner,) = products(partial_products(corners[0], first) + partial_products(corners[1], second))
    x = jnp.where(odd & left, -corner, x)
    # All warps have finished the first product, so its blocks can be reused.
    plgpu.commit_smem()
    stack, product = [*stack, corners[0][0]], [corners[0][1], *corners[1]]
    store_split(stack, x)
    plgpu.commit_smem()
    (y,) = products(partial_products(corner_left, first))
    store_split(product, y)
    plgpu.commit_smem()
    (corner,) = products(partial_products(stack, [ref.at[pl.ds(PAIR, PAIR)] for ref in product]))
    return jnp.where(later, -corner, x), jnp.where(later, x, 0.0)


def _substitute(a: Array, sides, flat, blocks) -> Array:
    """[64, 32]: for both pairs of blocks, [X1, 0] above [X2 A21, X2]."""
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
    # The rows of wgmma's layout cannot be split into blocks; those of a plain layout can.
    blocks[...] = flat[...].reshape(blocks.shape)
    plgpu.commit_smem()
    solved = []
    for r in range(BLOCK):
        x = compat.load(blocks.at[:, r, BLOCK:], LANES)
        factors = compat.load(blocks.at[:, r, 0:BLOCK], EVERY_LANE)
        for i, earlier in enumerate(solved):
            x = x - _broadcast_column(factors, i) * earlier
        solved.append(x)
    for r, x in enumerate(solved):
        blocks[:, r, BLOCK:] = x
    plgpu.commit_smem()
    flat[...] = blocks[...].reshape(flat.shape)
    plgpu.commit_smem()
    return compat.load(flat.at[:, BLOCK:], plgpu.Layout.WGMMA)


def _broadcast_column(factors: Array, i: int) -> Array:
    """Column i of [4, n], broadcast to [4, 32]."""
    one = jnp.sum(lax.slice(factors, (0, i), (factors.shape[0], i + 1)), axis=1)
    return plgpu.layout_cast(lax.broadcast_in_dim(one, (factors.shape[0], PAIR), (0,)), LANES)
