"""The one table of block sizes. No figure here was timed: they are what ptxas compiles without a spill."""

__all__ = ["CHUNK", "KEYS", "PART", "SLOTS", "VALUE_BLOCKS", "WRITE_BLOCK"]

# Tokens a chunk: wgmma has 64 rows, and the scores of 128 would take all registers of a warpgroup.
CHUNK = 64

# Key widths of the kernels; a narrower one is padded to the next.
KEYS = (64, 128)

# Value columns a program, by key width. State and accumulators must fit the 255 registers of a thread: 64 columns of
# 128 keys spill.
VALUE_BLOCKS = {64: 64, 128: 32}

# DeltaFormer and attention: tiles on their way to a program; shared memory holds four at two halves a value.
SLOTS = 3

# Tokens of a part of DeltaFormer's write: within one a head is walked block by block, what lies before it is read by
# all blocks of rows at once.
PART = 512

# Value columns a program of that walk.
WRITE_BLOCK = 64
