"""Calls that no GPU kernel serves."""

from collections.abc import Mapping

from jax import lax

from memformer.core.calls import AttentionCall, MatrixCall
from memformer.core.types import Array
from memformer.pallas.checks import check_chip, check_chunk_size, check_dtypes, unsupported
from memformer.pallas.gpu import tuning
from memformer.pallas.platform import interpreting_for, is_hopper

__all__ = ["check_call", "check_grid"]

# Programs along the second and third axis of a CUDA grid.
MOST_PROGRAMS = 65535


def check_call(call: MatrixCall | AttentionCall, operands: Mapping[str, Array], widths: Mapping[str, int]) -> None:
    """Checks that the kernels serve a call.

    Args:
      call: of either family.
      operands: the arrays that enter products, by name.
      widths: channels that the kernels hold in registers or shared memory, by what they belong to.

    Raises:
      NotImplementedError: not an sm_90 GPU; operands that are not bfloat16; a precision above bfloat16 products;
        a width or a chunk size that no kernel has.
    """
    op = call.op
    check_chip(op, interpreting_for("gpu") or is_hopper(), "an sm_90 GPU")
    names = list(operands)
    takes = f"takes bfloat16 {', '.join(names[:-1])} and {names[-1]} (its products are wgmma on bfloat16)"
    check_dtypes(op, tuple(operands.values()), ("bfloat16",), takes)
    if call.precision != lax.Precision.DEFAULT:
        raise unsupported(op, "has products at default precision only")
    for name, width in widths.items():
        if width > tuning.KEYS[-1]:
            raise unsupported(op, f"takes at most {tuning.KEYS[-1]} {name} channels, got {width}")
    check_chunk_size(op, call.chunk_size, (tuning.CHUNK,))


def check_grid(grid: tuple[int, int, int]) -> None:
    """Checks that a grid of batch rows, heads and blocks can be launched; vmap adds to the batch rows.

    Raises:
      NotImplementedError: more batch rows or heads than a CUDA grid holds.
    """
    for name, count in zip(("batch rows", "heads"), grid, strict=False):
        if count > MOST_PROGRAMS:
            raise NotImplementedError(
                f"the GPU kernels take at most {MOST_PROGRAMS} {name} in one call (mapped axes of vmap included), got"
                f" {count}; implementation='chunked' takes more"
            )
