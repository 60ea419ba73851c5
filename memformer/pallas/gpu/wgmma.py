"""Building blocks of the kernels: shared memory as wgmma reads it, products on the tensor cores, per-token vectors."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.types import Array
from memformer.pallas.gpu import compat

__all__ = ["Refs", "anew", "broadcast_rows", "iotas", "load_column", "load_float32", "load_row", "partial_products"]
__all__ += ["products", "shared_block", "split_bf16", "split_block", "split_outside", "start_anew", "store"]
__all__ += ["store_split", "sum_product", "transposed"]


class Refs(dict):
    """References of a kernel by name."""

    __getattr__ = dict.__getitem__


def shared_block(*shape: int, columns: int = 64, dtype: Any = jnp.bfloat16) -> plgpu.SMEM:
    """A block of shared memory, tiled and swizzled as wgmma reads it.

    Args:
      *shape: rows and columns last; leading axes count blocks.
      columns: width of a tile. Both operands of a product need the same.
      dtype: of the numbers.
    """
    swizzle = jnp.dtype(dtype).itemsize * columns
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def start_anew(zero) -> None:
    """Prepares `zero`, shared memory of one int32, for `anew`."""
    zero[0] = jnp.int32(0)
    plgpu.commit_smem()


def anew(zero, refs: Sequence[Any]) -> list[Any]:
    """The only block of each of the refs [1, ...], by an index that is read from shared memory.

    Used in every step of a loop, it makes the compiler compute addresses where they are needed. Otherwise it keeps
    those of all products over the loop: they take a third of the registers, and spill.

    Args:
      zero: see `start_anew`.
      refs: blocks of shared memory.
    """
    at = zero[0]
    return [ref.at[at] for ref in refs]


def split_block(*shape: int, columns: int = 64) -> list[plgpu.SMEM]:
    """Two blocks whose sum keeps 16 bits of a float32 array."""
    return [shared_block(*shape, columns=columns)] * 2


def store(ref, x: Array) -> None:
    """Stores x in the dtype of the block."""
    ref[...] = x.astype(ref.dtype)


def split_bf16(x: Array, count: int) -> tuple[Array, ...]:
    """x as the sum of `count` bfloat16 arrays: 8 bits each."""
    parts = []
    for _ in range(count - 1):
        # Truncated: what a rounded part leaves costs a conversion of its own per entry, at half the rate of others.
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32)
        parts.append(high.astype(jnp.bfloat16))
        x = x - high
    return (*parts, x.astype(jnp.bfloat16))


def split_outside(x: Array) -> tuple[Array, Array]:
    """x as the sum of two bfloat16 arrays, outside of a kernel."""
    # XLA may drop a cast to bfloat16 and back, but not this.
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def store_split(refs: Sequence[Any], x: Array) -> None:
    """Stores x as the sum of bfloat16 blocks."""
    for ref, part in zip(refs, split_bf16(x, len(refs)), strict=True):
        ref[...] = part


def partial_products(a: Sequence[Any], b: Sequence[Any]) -> tuple[tuple[Any, Any], ...]:
    """Pairs of parts whose products sum to a @ b, to the bits that the operands have.

    Args:
      a, b: parts of the operands, as `split_bf16` orders them.
    """
    count = max(len(a), len(b))
    return tuple((x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < count)


def transposed(ref):
    """The transpose of a block of shared memory."""
    return compat.transpose_ref(ref)


def products(*sums: Sequence[tuple[Any, Any]]) -> tuple[Array, ...]:
    """Sums of matrix products in float32, all in flight at once.

    Args:
      *sums: for each result, the pairs (a, b) of blocks in shared memory over which a @ b is summed.
    """

    def run(*accumulators):
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        plgpu.wgmma_wait(0)
        return tuple(accumulator[...] for accumulator in accumulators)

    shapes = [(pairs[0][0].shape[0], pairs[0][1].shape[1]) for pairs in sums]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def broadcast_rows(x: Array, width: int) -> Array:
    """[C] to [C, width], one value per row."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (x.shape[0], width), (0,)), plgpu.Layout.WGMMA)


def load_float32(ref) -> Array:
    """Loads a block of shared memory as a float32 matrix."""
    return compat.load(ref, plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)


def sum_product(a, b, width: int = 64) -> Array:
    """Row sums of a * b, in parts of `width` columns: whole blocks take half of the registers."""
    parts = [pl.ds(i, width) for i in range(0, a.shape[1], width)]
    sums = (jnp.sum(load_float32(a.at[:, part]) * load_float32(b.at[:, part]), axis=1) for part in parts)
    return functools.reduce(jnp.add, sums)


def load_column(ref, width: int) -> Array:
    """Loads a [C] vector as [C, width], one value per row."""
    return broadcast_rows(compat.load(ref, plgpu.Layout.WGMMA.reduce(1)), width)


def load_row(ref, height: int) -> Array:
    """Loads a [C] vector as [height, C], one value per column."""
    x = compat.load(ref, plgpu.Layout.WGMMA.reduce(0))
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (height, ref.shape[0]), (1,)), plgpu.Layout.WGMMA)


def iotas(rows: int, columns: int | None = None) -> tuple[Array, Array]:
    """Row and column index of every entry of a matrix, square by default."""
    shape = (rows, rows if columns is None else columns)
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    return row, column
