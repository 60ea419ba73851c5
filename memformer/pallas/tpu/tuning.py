"""The one table of block sizes, by kind of TPU; figures come from benchmarks/tpu_static.py."""

import dataclasses

__all__ = ["REMAT", "TABLE", "Tuning", "VMEM_LIMIT", "choose", "choose_tiles"]

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
# K = V = 128, with 8 heads: 642 on v5p, 580 on v6e; before chunks were prepared ahead, 2, 4, 8 heads took 1300, 1057,
# 903 on v5p, and 4 heads 927 on v6e. v5e and tpu7x follow their like. Wide heads: two, so that a pair fills a product.
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
    chunk = sizes.chunk
    while chunk > 16 and chunk // 2 >= length:
        chunk //= 2
    key, value = (-(-width // 128) * 128 for width in (key, min(value, sizes.values)))
    # The backward pass holds q, k, dq, dk and v, do, dv; a state that enters, and two that are carried.
    one = 2 * itemsize * chunk * (4 * key + 3 * value) + 4 * 4 * key * value
    # float32 products take six passes: half the heads make as long a program.
    heads = max(1, min(sizes.heads * 2 // itemsize, BLOCKS // one))
    return dataclasses.replace(sizes, chunk=chunk, heads=heads)


# Attention and DeltaFormer: rows of a block, and of the sub-blocks that the write inverts.
TILES = {
    "TPU v5 lite": (256, 128),
    "TPU v5": (256, 128),
    "TPU v6 lite": (256, 128),
    "TPU7x": (256, 128),
    "interpreter": (32, 16),
}

# Bytes of VMEM that what lies there for a whole head may take.
RESIDENT = 40 * 2**20


def choose_tiles(kind: str, length: int, key: int, value: int, itemsize: int) -> tuple[int, int, int]:
    """Rows of a block, rows of a sub-block, and how many blocks of one head VMEM holds.

    Args:
      kind: device kind.
      length: T.
      key, value: widths K and V.
      itemsize: bytes of an operand of the products.
    """
    size, sub = TILES.get(kind, TILES["TPU v5"])
    while size > sub and size // 2 >= length:
        size //= 2
    key, value = (-(-width // 128) * 128 for width in (key, value))
    # The backward pass holds most: a query, its gradient in float32 and what is weighed, twice, and the numbers.
    token = 2 * itemsize * (key + value) + 8 * key + 128
    return size, sub, RESIDENT // (token * size)
