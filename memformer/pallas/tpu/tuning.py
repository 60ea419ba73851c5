"""Block sizes of the kernels, by kind of TPU. Bundle counts are from benchmarks/tpu/static.py."""

import dataclasses
from typing import NamedTuple, TypeAlias

__all__ = [
    "KERNELS",
    "PAIR",
    "REMAT",
    "RESIDENT",
    "TABLE",
    "TILES",
    "VMEM_LIMIT",
    "AttentionSizes",
    "Tuning",
    "choose",
    "choose_tiles",
]

# Bytes of VMEM that a kernel may request: less than every chip since v5e has (64 MiB on the smallest, tpu7x).
VMEM_LIMIT = 56 * 2**20

# Bytes of VMEM for the blocks of one program, double buffering included.
BLOCKS = 12 * 2**20


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes of the kernels of a matrix memory.

    Attributes:
      chunk: tokens per chunk.
      heads: heads per program, at most; the largest divisor of the number of heads is used.
      values: value columns per program; wider values are split into blocks, each with an inverse of its own.
      remat: what the backward pass has beside the inputs: "states", the state that enters each chunk, or "inputs",
        nothing more, so that the forward kernel runs again.
      interleaved: heads that are computed interleaved while later chunks are prepared; the groups follow each other.
        Fewer heads hold fewer values in registers.
      stacked: how products of operands in two summands are computed, see `product`.
    """

    chunk: int
    heads: int
    values: int
    remat: str = "states"
    interleaved: int = 4
    stacked: str | None = None

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat must be one of {REMAT}, got {self.remat!r}")


REMAT = ("states", "inputs")

KERNELS = ("delta_rule", "linear_attention", "channel_delta_rule", "channel_linear_attention")


def _rows(*sizes: tuple[int, int], chunk: int = 128, square: bool = False):
    """Sizes by kernel and the larger of K and V; given are heads and interleaved heads of each of `KERNELS` at 128.

    Programs of wide heads have two, because a pair of heads fills a product. `square` is for chips whose MXU is 256 x
    256.
    """
    rows: dict[tuple[str, int], Tuning] = {}
    for kernel, (heads, interleaved) in zip(KERNELS, sizes, strict=True):
        # With a decay per channel the other form was not measured.
        stacked = ("square" if kernel == "delta_rule" else "rows") if square else None
        rows[kernel, 128] = Tuning(chunk, heads, 128, "states", interleaved, stacked)
        rows[kernel, 256] = Tuning(chunk, 2, 256, stacked=stacked)
    return rows


# By kind of TPU, for bfloat16. The delta rule's on v5p and v6e are from `python -m benchmarks.tune tpu`, which says how
# much each choice matters (benchmarks/results/tpu-tune.json); tpu7x has those of v6e, v5e those of v5p. The others were
# not searched.
TABLE = {
    "TPU v5 lite": _rows((8, 4), (8, 8), (8, 2), (8, 2)),
    "TPU v5": _rows((8, 4), (8, 8), (8, 2), (8, 2)),
    "TPU v6 lite": _rows((8, 2), (8, 8), (8, 4), (8, 4), square=True),
    "TPU7x": _rows((8, 2), (8, 8), (8, 4), (8, 4), square=True),
    "interpreter": _rows(*[(4, 2)] * 4, chunk=16, square=True),
}


def choose(kind: str, kernel: str, length: int, key: int, value: int, itemsize: int) -> Tuning:
    """The sizes of the table, reduced to what the call needs and VMEM holds.

    Args:
      kind: device kind.
      kernel: one of `KERNELS`.
      length: T.
      key, value: widths K and V.
      itemsize: bytes per element of the inputs.
    """
    row = TABLE.get(kind, TABLE["TPU v5"])
    sizes = row[kernel, 128 if max(key, value) <= 128 else 256]
    # float32 inputs call for an error of 1e-4: with equal keys the rounding error of k . k adds up over a chunk.
    chunk = max(16, sizes.chunk * 2 // itemsize)
    while chunk > 16 and chunk // 2 >= length:
        chunk //= 2
    key, value = (-(-width // 128) * 128 for width in (key, min(value, sizes.values)))
    # The backward pass holds q, k, dq, dk and v, do, dv; the state that enters a chunk, and two that are carried.
    per_head = 2 * itemsize * chunk * (4 * key + 3 * value) + 4 * 4 * key * value
    # float32 products take six passes: a program with half the heads is as long.
    heads = max(1, min(sizes.heads * 2 // itemsize, BLOCKS // per_head))
    return dataclasses.replace(sizes, chunk=chunk, heads=heads)


Tiles: TypeAlias = tuple[tuple[int, int], tuple[int, int]]


class AttentionSizes(NamedTuple):
    """Sizes of the kernels of attention, see `AttentionConfig`."""

    block: int
    sub_block: int
    tile: Tiles
    backward_block: int
    resident: int


# block, sub_block, tile and backward_block of `AttentionSizes`. Bundles of the main loop per head, for 512 rows and
# columns: programs of one head on v5p with tiles of 256 x 128 1228, 128 x 128 1428, 256 x 64 1674, on v6e 128 x 256
# 968, 512 x 128 939 (more spills), 256 x 256 978; programs of two heads on v5p with tiles of 256 x 128 1144, 128 x 128
# 1111, on v6e 128 x 256 808, 128 x 128 1044.
TILES: dict[str, tuple[int, int, Tiles, int]] = {
    "TPU v5 lite": (512, 128, ((256, 128), (128, 128)), 256),
    "TPU v5": (512, 128, ((256, 128), (128, 128)), 256),
    "TPU v6 lite": (512, 128, ((128, 256), (128, 256)), 256),
    "TPU7x": (512, 128, ((128, 256), (128, 256)), 256),
    "interpreter": (64, 16, ((32, 16), (16, 32)), 32),
}

# Bytes of VMEM for arrays that stay there for a whole head.
RESIDENT = 40 * 2**20

# Bytes of VMEM for the same arrays of two heads in one program; heads that need more get programs of their own.
PAIR = 30 * 2**20


def choose_tiles(
    kind: str, length: int, key: int, value: int, itemsize: int, chunk_size: int | None = None
) -> AttentionSizes:
    """The sizes of the table, reduced to what the call needs and VMEM holds.

    Args:
      kind: device kind.
      length: T.
      key, value: widths K and V.
      itemsize: bytes per element of the operands of products.
      chunk_size: rows per block if the caller sets them.

    Raises:
      ValueError: chunk_size is no multiple of the sub-blocks.
    """
    block, sub_block, tile, backward_block = TILES.get(kind, TILES["TPU v5"])
    while block > sub_block and block // 2 >= length:
        block //= 2
    if chunk_size is not None:
        block, sub_block = chunk_size, min(sub_block, chunk_size)
        if block % sub_block or sub_block % 16:
            raise ValueError(f"chunk_size must be a multiple of {sub_block}, or of 16 and less, got {chunk_size}")

    def fitting(side):
        return side if block % side == 0 else sub_block

    one, two = ((fitting(rows), fitting(columns)) for rows, columns in tile)
    key, value = (-(-width // 128) * 128 for width in (key, value))
    # The backward pass holds most: q, its gradient in float32, g (all double-buffered), and the scalars.
    per_token = 2 * itemsize * (key + value) + 8 * key + 128
    resident = max(1, RESIDENT // (per_token * block))
    backward_block = backward_block if block % backward_block == 0 else block
    return AttentionSizes(block, sub_block, (one, two), backward_block, resident)
