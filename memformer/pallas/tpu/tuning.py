"""The one table of block sizes, by kind of TPU; figures come from benchmarks/tpu_static.py."""

__all__ = ["VMEM_LIMIT", "choose", "choose_tiles"]

# Bytes of VMEM a kernel may ask for: below what every chip since v5e has (64 MiB on the smallest, tpu7x).
VMEM_LIMIT = 56 * 2**20

# Bytes of VMEM that the blocks of one program may take, double buffering included.
BLOCKS = 12 * 2**20

# Chunk, and most heads a program in bfloat16. Seen on v5p, bundles a chunk and head of the delta rule forward, with
# 2, 4, 8 heads: 1300, 1057, 903 (backward with 4, 8: 1539, 1355). The others have not been tried with 8.
SIZES = {
    "TPU v5 lite": (128, 4),
    "TPU v5": (128, 8),
    "TPU v6 lite": (128, 4),
    "TPU7x": (128, 4),
    "interpreter": (16, 4),
}


def choose(kind: str, length: int, key: int, value: int, itemsize: int) -> tuple[int, int]:
    """Chunk, and heads a program at most.

    Args:
      kind: device kind.
      length: T.
      key, value: widths K and V.
      itemsize: bytes of an element of the inputs.
    """
    chunk, most = SIZES.get(kind, SIZES["TPU v5"])
    while chunk > 16 and chunk // 2 >= length:
        chunk //= 2
    # float32 products take six passes: half the heads make as long a program.
    most = max(1, most * 2 // itemsize)
    key, value = (-(-width // 128) * 128 for width in (key, value))
    # The backward pass holds q, k, dq, dk and v, do, dv; a state that enters, and two that are carried.
    one = 2 * itemsize * chunk * (4 * key + 3 * value) + 4 * 4 * key * value
    return chunk, max(1, min(most, BLOCKS // one))


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
