"""The one table of block sizes. No figure here was timed: they are what ptxas compiles without a spill."""

__all__ = ["CHUNK", "KEYS", "VALUE_BLOCKS"]

# Tokens a chunk: wgmma has 64 rows, and the scores of 128 would take all registers of a warpgroup.
CHUNK = 64

# Key widths of the kernels; a narrower one is padded to the next.
KEYS = (64, 128)

# Value columns a program, by key width. State and accumulators must fit the 255 registers of a thread: 64 columns of
# 128 keys spill.
VALUE_BLOCKS = {64: 64, 128: 32}
