"""The one table of block sizes. No figure here was timed: they are what ptxas compiles without a spill."""

__all__ = ["CHUNK", "KEYS", "PARTS", "SLOTS", "VALUE_BLOCKS", "WRITE_BLOCK", "part"]

# Tokens a chunk: wgmma has 64 rows. With 128 the scan's blocks (q, k, v, P and X as two halves: 168 KiB at K = 128)
# fit in shared memory once, not twice, so that nothing would be on its way while a chunk is computed.
CHUNK = 64

# Key widths of the kernels; a narrower one is padded to the next.
KEYS = (64, 128)

# Value columns a warpgroup of a scan, by key width. State and accumulators must fit the 255 registers of a thread: 64
# columns of 128 keys spill. Two warpgroups share a program where there are two blocks: two of 64 columns take more than
# its shared memory (260 KiB at K = 64).
VALUE_BLOCKS = {64: 32, 128: 32}

# DeltaFormer and attention: tiles in flight, by the bfloat16 halves that make up a value. Three at two halves are too
# many for shared memory at 128 channels, and for the registers of a gradient.
SLOTS = {1: 3, 2: 2}

# Tokens of a part of DeltaFormer's write, by the heads of all batch rows up to which: within one a head is walked block
# by block, what lies before it is read by all blocks of rows at once. While these blocks are no more than the chip has
# SMs, larger parts read with more of them: at 8192 tokens 896 tiles follow each other with parts of 1024, 1152 with 512
# and with 2048.
PARTS = ((16, 1024), (None, 512))

# Value columns a program of that walk.
WRITE_BLOCK = 64


def part(heads: int) -> int:
    """Tokens of a part of a write of so many heads, of all batch rows."""
    return next(tokens for most, tokens in PARTS if most is None or heads <= most)
