"""Static configuration of a call of an attention op, and how it is cut into tiles."""

import dataclasses
from collections.abc import Mapping

from memformer.core.calls import AttentionCall
from memformer.core.similarity import Kernel
from memformer.core.types import Array
from memformer.pallas.config import BaseAttentionConfig
from memformer.pallas.gpu import tuning
from memformer.pallas.gpu.checks import check_call
from memformer.pallas.layout import needs_segments

__all__ = ["TILE", "AttentionConfig", "plan_call"]

# Rows of wgmma.
TILE = tuning.CHUNK


@dataclasses.dataclass(frozen=True)
class AttentionConfig(BaseAttentionConfig):
    """Sizes of one kernel of attention.

    Attributes:
      warpgroups: warpgroups that compute, each with its own tile of rows.
      slots: tiles of columns in flight.
      key, value: widths as padded for the kernels.
      value_block: value columns per program of the write.
      span: tokens per span of the write, see deltaformer.py.
      dtype: of queries and keys.
      value_dtype: of weights and values.
    """

    warpgroups: int
    slots: int
    key: int
    value: int
    value_block: int
    span: int
    dtype: str = dataclasses.field(default="bfloat16", kw_only=True)
    value_dtype: str = dataclasses.field(default="bfloat16", kw_only=True)

    @property
    def rows(self) -> int:
        """R, rows per program."""
        return TILE * self.warpgroups

    @property
    def bounded(self) -> bool:
        """Whether a block of rows may see fewer columns than all up to its own."""
        return self.segments or self.window is not None or not self.causal

    @property
    def parts(self) -> int:
        """Arrays of 16 bits whose sum makes up the weights, and the values."""
        return 1 if self.similarity.normalized else 2

    @property
    def mixed(self) -> bool:
        """Whether queries and keys have another dtype than weights and values."""
        return self.dtype != self.value_dtype


def plan_call(
    call: AttentionCall, similarity: Kernel, operands: Mapping[str, Array], *, writes: bool = False
) -> AttentionConfig:
    """Checks that the kernels serve this call, and cuts it into tiles.

    Args:
      call: of an op.
      similarity: kappa of the kernel, its scale filled in.
      operands: the arrays that enter products, by name.
      writes: whether it is the write.

    Raises:
      NotImplementedError: see `check_call`.
    """
    key, value = call.k.shape[-1], call.v.shape[-1]
    dtype = next(iter(operands.values())).dtype.name
    check_call(call, operands, {"key": key, "value": value}, tuning.ATTENTION_DTYPES)
    batch, length, heads = call.k.shape[:3]
    warpgroups = 1 if length <= TILE else 2
    rows = warpgroups * TILE
    spans = -(-length // tuning.span_length(batch * heads))
    slots = 0 if call.cache is None else call.cache.k.shape[1]
    slots += 0 if call.causal else length
    return AttentionConfig(
        similarity=similarity,
        before=-(-slots // rows),
        own=call.causal,
        strict=False,
        segments=needs_segments(call, rows),
        causal=call.causal,
        window=call.window,
        decay=call.decay is not None,
        restarts=call.decay is not None and call.documents,
        warpgroups=warpgroups,
        slots=tuning.SLOTS[1 if similarity.normalized else 2],
        key=tuning.padded_width(key),
        value=tuning.padded_width(value),
        value_block=min(tuning.padded_width(value), tuning.WRITE_BLOCK),
        span=-(-length // (spans * rows)) * rows,
        dtype=dtype,
        # What a read without a normaliser sums may exceed the range of float16. A write whose operands do has no use.
        value_dtype=dtype if writes or similarity.normalized else "bfloat16",
    )
