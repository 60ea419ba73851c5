"""Static configuration of a call of a matrix memory, and how its kernels are launched."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from memformer.core.calls import MatrixCall
from memformer.core.documents import DocumentChunks
from memformer.core.sharding import vary_like
from memformer.core.types import Array
from memformer.pallas.config import BaseScanConfig
from memformer.pallas.documents import align
from memformer.pallas.gpu import tuning
from memformer.pallas.gpu.checks import check_call, launch_grid

__all__ = ["AXES", "ScanConfig", "align_documents", "call_kernel", "plan_call", "take"]

# Grid axes: batch row, value head, and chunk or block of value columns.
AXES = ("batch_row", "head", "block")


@dataclasses.dataclass(frozen=True)
class ScanConfig(BaseScanConfig):
    """Sizes of a call; key and value are the widths as padded for the kernels.

    Attributes:
      dtype: of q, k, v and the output.
      remat: what the backward pass has beside the inputs: "states", what the chunk scan computed, or "inputs", nothing
        more, so that the forward kernels run again.
    """

    dtype: str = dataclasses.field(default="bfloat16", kw_only=True)
    remat: str = dataclasses.field(default=tuning.REMAT[0], kw_only=True)

    def __post_init__(self):
        if self.remat not in tuning.REMAT:
            raise ValueError(f"remat must be one of {tuning.REMAT}, got {self.remat!r}")

    def local(self, q: Array, v: Array) -> "ScanConfig":
        """The configuration of one device's shard: q [B, T, G, K], v [B, T, H, V]."""
        return dataclasses.replace(self, batch=v.shape[0], heads=v.shape[2], groups=q.shape[2])

    @property
    def value_block(self) -> int:
        """Value columns per program of the chunk scan of a decay per key channel.

        32 keep more multiprocessors busy, and the registers hold no more of a state with 256 key channels.
        """
        narrow = self.batch * self.heads * max(self.documents, 1) * self.value // 32 <= tuning.MULTIPROCESSORS
        return 32 if narrow or self.key > tuning.KEYS[-1] else tuning.CHANNEL_VALUES

    @property
    def value_rows(self) -> int:
        """Value columns per computing warpgroup of the chunk scan: rows of a product."""
        return 64

    @property
    def key_groups(self) -> int:
        """Computing warpgroups of the chunk scan that share a block of value columns: 2, each with half of the keys."""
        return 2 if self.key > tuning.KEYS[-1] else 1

    @property
    def key_part(self) -> int:
        """Key channels per program of the gradients within chunks."""
        return tuning.KEY_PART if self.key % tuning.KEY_PART == 0 else 64

    @property
    def value_part(self) -> int:
        """Value columns per program of the gradients within chunks."""
        return tuning.VALUE_PART if self.value % tuning.VALUE_PART == 0 else 64

    @property
    def parts(self) -> int:
        """Parts of the time that are scanned at once: more than one where one would leave multiprocessors idle."""
        programs = self.batch * self.heads * self.value // self.value_rows
        for parts in tuning.PARTS:
            divides = self.chunks % parts == 0 and self.chunks // parts >= tuning.PART_CHUNKS
            if divides and programs * parts <= tuning.MULTIPROCESSORS:
                return parts
        return 1

    def warpgroups(self, blocks: int, parts: int) -> int:
        """Blocks of value columns per program of a chunk scan, each with its own `key_groups`.

        Two share copies and a multiprocessor, where there are more blocks than multiprocessors.

        Args:
          blocks: of value columns.
          parts: of the time.
        """
        if self.key_groups == 2:
            return 1
        return 2 if blocks % 2 == 0 and self.batch * self.heads * blocks * parts > tuning.MULTIPROCESSORS else 1

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the token scalars of this call, in the order of their array; see token_scalars.py."""
        kinds: tuple[tuple[str, bool], ...] = (("decay_in", self.carries), ("decay_out", self.carries))
        kinds += (
            ("beta", self.beta),
            ("-beta", self.beta),
            ("whole", self.decay),
            ("-whole", self.decay),
            ("fraction", self.decay),
            ("-fraction", self.decay),
            ("segment", self.segments),
            ("-segment", self.segments),
        )
        return tuple(name for name, present in kinds if present)


def plan_call(call: MatrixCall, remat: str = tuning.REMAT[0]) -> ScanConfig:
    """Checks that the kernels serve this call, and chooses its padded widths.

    Args:
      call: one write per token.
      remat: see `ScanConfig`.

    Raises:
      NotImplementedError: see `check_call`; keys wider than the kernels support.
    """
    operands, widths = {"q": call.q, "k": call.k, "v": call.v}, {"key": call.q.shape[-1]}
    check_call(call, operands, widths, tuning.DTYPES, most=tuning.WIDTHS[-1])
    key, value = call.q.shape[-1], call.v.shape[-1]
    widths = {"key": tuning.padded_width(key, tuning.WIDTHS), "value": -(-value // 64) * 64}
    return ScanConfig.of(call, tuning.CHUNK, **widths, dtype=call.q.dtype.name, remat=remat)


def align_documents(
    config: ScanConfig, call: MatrixCall
) -> tuple[MatrixCall, DocumentChunks | None, tuple[Array, ...]]:
    """The call as `align` moves its documents, their places, and the first chunk and number of chunks of each.

    A call without states per document is left as it is.
    """
    if not config.documents:
        return call, None, ()
    call, documents = align(call, config.chunk)
    return call, documents, (jnp.stack([documents.first, documents.chunks], axis=2),)


def take(values: Sequence[Any], *counts: int) -> list[Sequence[Any]]:
    """The first values in groups of these sizes, and what is left."""
    ends = [0, *itertools.accumulate(counts)]
    return [*(values[i:j] for i, j in itertools.pairwise(ends)), values[ends[-1] :]]


def call_kernel(
    config: ScanConfig, name: str, body, grid, out, scratch, operands, automatic_barriers: bool = True, **threads
) -> tuple[Array, ...]:
    """Launches a Mosaic GPU kernel named after its memory and `name`.

    Args:
      config: sizes.
      name: of the kernel.
      body: the kernel.
      grid: programs along AXES.
      out: shapes and dtypes of the results.
      scratch: shared memory and barriers.
      operands: arrays.
      automatic_barriers: whether Pallas puts barriers of the warpgroup around stores and copies.
      **threads: num_threads and thread_name, with more than one warpgroup per program.

    Raises:
      NotImplementedError: see `launch_grid`.
    """
    memory = "delta_rule" if config.beta else "linear_attention"
    kernel = plgpu.kernel(
        body,
        out_type=list(out),
        scratch_types=scratch,
        kernel_name=f"memformer_{memory}_{name}",
        # Warpgroup semantics, the default since 0.11, solves for layouts: that takes minutes for the inverse, and
        # some layouts are never found.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=not automatic_barriers
        ),
        **launch_grid(grid, AXES),
        **threads,
    )
    # Under shard_map results vary as the operands do; the kernel's own types do not say so.
    return tuple(vary_like(x, *operands) for x in kernel(*operands))
