"""Static configuration of attention on TPU."""

import dataclasses

from memformer.core.calls import AttentionCall
from memformer.core.similarity import Kernel
from memformer.pallas.checks import unsupported
from memformer.pallas.config import BaseAttentionConfig
from memformer.pallas.layout import needs_segments
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.checks import check_tpu
from memformer.pallas.tpu.products import PASSES

__all__ = ["AttentionConfig", "plan_call"]


@dataclasses.dataclass(frozen=True)
class AttentionConfig(BaseAttentionConfig):
    """Blocks of a call. Time is divided into blocks of R tokens, for rows (queries) and columns (keys) alike.

    Attributes:
      block: R.
      sub_block: rows that the write inverts at once; divides R.
      tile: rows and columns of a tile in the loop over earlier blocks, for a program of one head and of two; all
        divide R.
      backward_block: R of the backward pass; divides R.
      resident: blocks of one head that fit in VMEM.
      passes: MXU passes per product.
      sinks: whether the log-sum-exp has a gradient.
    """

    block: int
    sub_block: int
    tile: tuple[tuple[int, int], tuple[int, int]]
    backward_block: int
    resident: int
    passes: int
    sinks: bool = False

    @property
    def scalars(self) -> bool:
        """Whether slots have scalars, and queries in softmax attention."""
        return self.segments or self.decay or self.window is not None

    @property
    def backward(self) -> "AttentionConfig":
        """The configuration of the backward pass."""
        ratio = self.block // self.backward_block
        return dataclasses.replace(
            self, block=self.backward_block, resident=self.resident * ratio, before=self.before * ratio
        )

    @property
    def value_passes(self) -> int:
        """Passes of products with values and gradients: sums without a normaliser cancel, where one is too few."""
        return self.passes if self.similarity.normalized else max(self.passes, 3)

    @property
    def solve_passes(self) -> int:
        """Passes of products within the triangular solve of the write."""
        return max(self.passes, 3)

    @property
    def sub_blocks(self) -> tuple[slice, ...]:
        """The sub-blocks of a block."""
        return tuple(slice(top, top + self.sub_block) for top in range(0, self.block, self.sub_block))


def plan_call(call: AttentionCall, similarity: Kernel) -> AttentionConfig:
    """Checks that the kernels serve this call, and chooses its blocks.

    Raises:
      NotImplementedError: no TPU; float64; a chunk size that no kernel has.
    """
    kind = check_tpu(call.op, call.k, call.v)
    passes = PASSES[call.precision]
    length, key, value = call.k.shape[1], call.k.shape[3], call.v.shape[3]
    try:
        sizes = tuning.choose_tiles(kind, length, key, value, 2 if passes == 1 else 4, call.chunk_size)
    except ValueError as error:
        raise unsupported(call.op, f"has no blocks for this call: {error}") from None
    slots = 0 if call.cache is None else call.cache.k.shape[1]
    slots += 0 if call.causal else length
    return AttentionConfig(
        similarity=similarity,
        before=-(-slots // sizes.block),
        own=call.causal,
        strict=False,
        segments=needs_segments(call, sizes.block),
        causal=call.causal,
        window=call.window,
        passes=passes,
        decay=call.decay is not None,
        restarts=call.decay is not None and call.documents,
        **sizes._asdict(),
    )
