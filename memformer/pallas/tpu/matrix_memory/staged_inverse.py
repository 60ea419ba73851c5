"""(I + A)^-1 in two stages of preparing a chunk, see `ChunkStep`: the diagonal blocks, and what joins them.

One stage would be a chain of fifteen row steps and six products that wait for each other, longer than the rest of a
chunk. The stages leave in scratch, per head: A, the inverses of its diagonal blocks, and the inverse in summands.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from memformer.core.types import Array
from memformer.pallas.tpu.interleave import Steps
from memformer.pallas.tpu.inverse import invert_blocks, join_blocks, join_pairs
from memformer.pallas.tpu.matrix_memory.config import ScanConfig
from memformer.pallas.tpu.products import exact_passes, split_bf16

__all__ = ["SCRATCH", "first_stage", "inverse_scratch", "inverse_summands", "second_stage"]

# Rows of the diagonal blocks whose inverses the first stage leaves to the second. Bundles per chunk and head of the
# delta rule forward with four heads per program: 32 rows 658 on v5p and 616 on v6e, 64 rows 712 and 618.
JOINED = 32

# Arrays of `inverse_scratch` before the inverse.
SCRATCH = 2


def inverse_summands(config: ScanConfig) -> int:
    """Number of summands of the inverse, see `split_bf16`."""
    return 2 if exact_passes(config.passes) == 3 else 1


def inverse_scratch(config: ScanConfig) -> list[tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes: A [C, C], inverses of its diagonal blocks [32, C], the summands of the inverse [C, C]."""
    square, count = (config.chunk, config.chunk), inverse_summands(config)
    blocks = (min(JOINED, config.chunk), config.chunk)
    dtype = jnp.bfloat16 if count == 2 else jnp.float32
    return [(square, jnp.float32), (blocks, jnp.float32), *[(square, dtype)] * count]


def first_stage(config: ScanConfig, folded: Sequence[Array], refs) -> Steps:
    """Stores the inverses of the diagonal blocks of each head.

    Args:
      config: sizes.
      folded: the diagonal blocks of A of each head, see `fold_diagonal`.
      refs: of `inverse_scratch`, by head; A is in the first.
    """
    a, passes = [head_refs[0] for head_refs in refs], exact_passes(config.passes)
    blocks = yield from invert_blocks(folded)
    blocks = yield from join_blocks(a, blocks, passes, min(JOINED, config.chunk), config.stacked)
    for one, head_refs in zip(blocks, refs, strict=True):
        head_refs[1][...] = one


def second_stage(config: ScanConfig, refs) -> Steps:
    """Stores the inverse of each head; refs: as of `first_stage`, others may follow. Overwrites A."""
    passes, count = exact_passes(config.passes), inverse_summands(config)
    a, blocks = zip(*(head_refs[:SCRATCH] for head_refs in refs), strict=True)

    def store_blocks(h, top, part):
        # No later pair needs these rows of A.
        a[h][top : top + part.shape[0], :] = part

    def store_inverse(h, top, part):
        for ref, summand in zip(refs[h][SCRATCH : SCRATCH + count], split_bf16(part, passes), strict=True):
            ref[top : top + part.shape[0], :] = summand

    first = rows = blocks[0].shape[0]
    if rows == config.chunk:
        for h, one in enumerate(blocks):
            store_inverse(h, 0, one[...])
    while rows < config.chunk:
        yield
        last = 2 * rows == config.chunk
        # Blocks that lie where the next ones are stored are read before.
        x = blocks if last or rows == first else [one[...] for one in blocks]
        yield from join_pairs(a, x, passes, config.stacked, store_inverse if last else store_blocks)
        rows *= 2
        blocks = [one.at[:rows] for one in a]
