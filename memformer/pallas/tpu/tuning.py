"""The one table of block sizes, by kind of TPU; figures come from benchmarks/tpu/static.py."""

import dataclasses
from typing import TypeAlias

__all__ = ["PAIR", "REMAT", "RESIDENT", "TABLE", "TILES", "Tuning", "VMEM_LIMIT", "choose", "choose_tiles"]

# Bytes of VMEM a kernel may ask for: below what every chip since v5e has (64 MiB on the smallest, tpu7x).
VMEM_LIMIT = 56 * 2**20

# Bytes of VMEM that the blocks of one program may take, double buffering included.
BLOCKS = 12 * 2**20


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernels of a memory with a matrix state cut a call.

    Attributes:
      chunk: tokens a chunk.
      heads: heads a program, at most; a divisor of the heads there are is taken.
      values: value columns a program; wider values are cut into blocks, each with an inverse of its own.
      remat: what is saved for the backward pass beside the inputs: "states", the state that enters each chunk,
        or "inputs", nothing: the forward kernel runs once more.
    """

    chunk: int
    heads: int
    values: int
    remat: str = "states"

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat must be one of {REMAT}, got {self.remat!r}")


REMAT = ("states", "inputs")

# By kind of TPU and widest of K and V, in bfloat16. Bundles a chunk and head of the delta rule forward, decay a head,
# K = V = 128, with 8 heads: 642 on v5p, 631 on v5e, 578 on v6e; with 4 heads 742 on v5e (205 spills for 248); chunks of
# 64 on v6e 893 for 128 tokens. tpu7x follows its like. Wide heads: two, so that a pair fills a product.
TABLE = {
    "TPU v5 lite": {128: Tuning(128, 8, 128), 256: Tuning(128, 2, 256)},
    "TPU v5": {128: Tuning(128, 8, 128), 256: Tuning(128, 2, 256)},
    "TPU v6 lite": {128: Tuning(128, 8, 128), 256: Tuning(128, 2, 256)},
    "TPU7x": {128: Tuning(128, 8, 128), 256: Tuning(128, 2, 256)},
    "interpreter": {128: Tuning(16, 4, 128), 256: Tuning(16, 2, 256)},
}


def choose(kind: str, length: int, key: int, value: int, itemsize: int) -> Tuning:
    """The table's choice, cut down to what the call has and VMEM holds.

    Args:
      kind: device kind.
      length: T.
      key, value: widths K and V.
      itemsize: bytes of an element of the inputs.
    """
    row = TABLE.get(kind, TABLE["TPU v5"])
    sizes = row[128 if max(key, value) <= 128 else 256]
    # float32 inputs want 1e-4: one rounding of k . k is in every score of a chunk, and equal keys add it up over it.
    chunk = max(16, sizes.chunk * 2 // itemsize)
    while chunk > 16 and chunk // 2 >= length:
        chunk //= 2
    key, value = (-(-width // 128) * 128 for width in (key, min(value, sizes.values)))
    # The backward pass holds q, k, dq, dk and v, do, dv; a state that enters, and two that are carried.
    one = 2 * itemsize * chunk * (4 * key + 3 * value) + 4 * 4 * key * value
    # float32 products take six passes: half the heads make as long a program.
    heads = max(1, min(sizes.heads * 2 // itemsize, BLOCKS // one))
    return dataclasses.replace(sizes, chunk=chunk, heads=heads)


Tiles: TypeAlias = tuple[tuple[int, int], tuple[int, int]]

# Attention and DeltaFormer: rows of a block, of the sub-blocks that the write inverts, rows and columns of a tile of
# one head, and of two side by side, and rows of a block backward. Seen in the main loop, bundles for 512 rows and
# columns: of one head on v5p with tiles of 256 x 128 1228, 128 x 128 1428, 256 x 64 1674, on v6e 128 x 256 968,
# 512 x 128 939 (more spills), 256 x 256 978; of two, a head, on v5p 256 x 128 1144, 128 x 128 1111, on v6e 128 x 256
# 808, 128 x 128 1044.
TILES: dict[str, tuple[int, int, Tiles, int]] = {
    "TPU v5 lite": (512, 128, ((256, 128), (128, 128)), 256),
    "TPU v5": (512, 128, ((256, 128), (128, 128)), 256),
    "TPU v6 lite": (512, 128, ((128, 256), (128, 256)), 256),
    "TPU7x": (512, 128, ((128, 256), (128, 256)), 256),
    "interpreter": (64, 16, ((32, 16), (16, 32)), 32),
}

# Bytes of VMEM that what lies there for a whole head may take.
RESIDENT = 40 * 2**20

# The same where two heads share a program, as they do if it is enough.
PAIR = 30 * 2**20


def choose_tiles(
    kind: str, length: int, key: int, value: int, itemsize: int, chunk_size: int | None = None
) -> tuple[int, int, Tiles, int, int]:
    """A row of the table that fits the call, and how many blocks of one head VMEM holds.

    Args:
      kind: device kind.
      length: T.
      key, value: widths K and V.
      itemsize: bytes of an operand of the products.
      chunk_size: rows of a block where the caller names them.

    Raises:
      ValueError: chunk_size does not go with the table's sub-blocks.
    """
    size, sub, tile, back = TILES.get(kind, TILES["TPU v5"])
    while size > sub and size // 2 >= length:
        size //= 2
    if chunk_size is not None:
        size, sub = chunk_size, min(sub, chunk_size)
        if size % sub or sub % 16:
            raise ValueError(f"chunk_size must be a multiple of {sub}, or of 16 and less, got {chunk_size}")
    one, two = ((high if size % high == 0 else sub, wide if size % wide == 0 else sub) for high, wide in tile)
    key, value = (-(-width // 128) * 128 for width in (key, value))
    # The backward pass holds most: a query, its gradient in float32 and what is weighed, twice, and the numbers.
    token = 2 * itemsize * (key + value) + 8 * key + 128
    return size, sub, (one, two), back if size % back == 0 else size, max(1, RESIDENT // (token * size))
