"""Block sizes of the kernels. None was timed: they are the largest that ptxas compiles without a spill."""

__all__ = [
    "CHANNEL_VALUES",
    "CHUNK",
    "DTYPES",
    "KEYS",
    "KEY_PART",
    "MULTIPROCESSORS",
    "PARTS",
    "PART_CHUNKS",
    "REMAT",
    "SCAN_REGISTERS",
    "SCAN_SLOTS",
    "SHARED_MEMORY",
    "SLOTS",
]
__all__ += ["SCALARS", "SPANS", "SUMMED", "VALUE_PART", "WIDTHS", "WRITE_BLOCK", "padded_width", "span_length"]

# Tokens per chunk or tile: wgmma has 64 rows. With 128 the blocks of the chunk scan (q, k, v, P, and X in two parts:
# 168 KiB at K = 128) fit in shared memory once, not twice, and no copy would overlap the computation.
CHUNK = 64

# Key widths of the kernels; narrower keys are padded to the next.
KEYS = (64, 128)

# Key widths of matrix memories, key and value widths of attention. With 256 keys, two warpgroups of the chunk scan have
# half of the state each.
WIDTHS = (64, 128, 256)

# Inputs. The kernels of a decay per channel take float16 too, as the sum of two bfloat16 arrays.
DTYPES = ("bfloat16", "float16")

# Key channels per program of the gradients within chunks, 64 per warpgroup: more than two have too few registers.
KEY_PART = 128

# Value columns per program of the chunk scan of a decay per key channel, with many heads.
CHANNEL_VALUES = 64

# Bytes of shared memory that a program may have, less 1 KiB for barriers.
SHARED_MEMORY = 226 * 1024

# Chunk scan: chunks in shared memory, as far as they fit, and registers per thread of two computing warpgroups and of
# the copying one.
SCAN_SLOTS = 2
SCAN_REGISTERS = (240, 24)

# Chunk scan: parts of the time that are scanned at once where heads are few, and the least number of chunks of one.
# Parts cost two more scans, of all but one of them: two parts gain nothing.
PARTS = (8, 4)
PART_CHUNKS = 8

# Value columns per program of the gradients within chunks: what fits in shared memory beside 128 keys.
VALUE_PART = 128

# Multiprocessors of an H200 (and an H100).
MULTIPROCESSORS = 132

# What the gradient of a matrix memory has beside the inputs; the first is chosen. At 8192 tokens, 16 key and 32 value
# heads of 128 channels, "states" are 0.37 GB per layer beside inputs of 0.13 GB. `jax.checkpoint` around the op keeps
# the inputs alone too.
REMAT = ("states", "inputs")

# Attention: tiles in flight, by the number of bfloat16 parts of a value. Three tiles of two parts exceed shared memory
# at 128 channels, and the registers of the backward kernels.
SLOTS = {1: 3, 2: 2}

# DeltaFormer's write: tokens per span, by heads of all batch rows (up to the first number). Within a span each head
# runs block by block; earlier spans are read by all row blocks in parallel. While row blocks are fewer than the SMs of
# the chip, larger spans read with more of them: at 8192 tokens the longest chain is 896 tiles with spans of 1024, and
# 1152 with 512 or 2048.
SPANS = ((16, 1024), (None, 512))

# Attention: value columns per program of the read, and key channels of a kernel of gradients where registers do not
# hold 256. With more of either, dk and dx are kernels of their own.
SUMMED = 128

# Attention: bytes of shared memory for scalars per token.
SCALARS = 8 * 1024

# DeltaFormer's write: value columns per program.
WRITE_BLOCK = 64


def padded_width(width: int, widths: tuple[int, ...] = KEYS) -> int:
    """The narrowest of `widths` that holds `width` channels."""
    return next(key for key in widths if key >= width)


def span_length(heads: int) -> int:
    """Tokens per span of a write of `heads` heads, counted over all batch rows."""
    return next(tokens for most, tokens in SPANS if most is None or heads <= most)
