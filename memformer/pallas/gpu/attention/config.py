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

__all__ = ["TILE", "AttentionConfig", "fit", "plan_call"]

# Rows of wgmma.
TILE = tuning.CHUNK


@dataclasses.dataclass(frozen=True)
class AttentionConfig(BaseAttentionConfig):
    """Sizes of one kernel of attention.

    Attributes:
      warpgroups: warpgroups that compute, each with its own tile of rows.
      slots: tiles of columns in flight.
      key, value: widths as padded for the kernels.
      value_start: the first column of the values that a read takes.
      key_start, key_block: the first channel of which a kernel computes gradients of queries or keys, and how many.
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
    value_start: int = dataclasses.field(default=0, kw_only=True)
    key_start: int = dataclasses.field(default=0, kw_only=True)
    key_block: int = dataclasses.field(default=0, kw_only=True)

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

    def key_blocks(self, split: bool) -> list["AttentionConfig"]:
        """Of the kernels of the gradients of queries or keys; `split` where registers do not hold all channels."""
        block = min(self.key, tuning.SUMMED) if split else self.key
        return [dataclasses.replace(self, key_start=start, key_block=block) for start in range(0, self.key, block)]

    @property
    def mixed(self) -> bool:
        """Whether queries and keys have another dtype than weights and values."""
        return self.dtype != self.value_dtype


def fit(config: AttentionConfig, slot: int, own: int) -> AttentionConfig:
    """The configuration with fewer slots, then with one warpgroup, where shared memory holds no more.

    Args:
      config: sizes.
      slot: channels in 16 bits of a tile in a slot.
      own: the same of the tiles of a warpgroup.
    """
    bytes_per_channel, most = 2 * TILE, tuning.SHARED_MEMORY - tuning.SCALARS
    for warpgroups in range(config.warpgroups, 0, -1):
        slots = (most // bytes_per_channel - warpgroups * own) // slot
        if slots >= 1:
            before = config.before * config.warpgroups // warpgroups
            slots = min(config.slots, slots)
            return dataclasses.replace(config, warpgroups=warpgroups, slots=slots, before=before)
    raise NotImplementedError(f"a tile of {own} and one of {slot} channels exceed the shared memory of an SM")


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
    dtype, widths = next(iter(operands.values())).dtype.name, tuning.WIDTHS
    check_call(call, operands, {"key": key, "value": value}, tuning.DTYPES, widths[-1])
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
        key=tuning.padded_width(key, widths),
        value=tuning.padded_width(value, widths),
        value_block=min(tuning.padded_width(value, widths), tuning.WRITE_BLOCK),
        span=-(-length // (spans * rows)) * rows,
        dtype=dtype,
        # What a read without a normaliser sums may exceed the range of float16. A write whose operands do has no use.
        value_dtype=dtype if writes or similarity.normalized else "bfloat16",
    )
