"""Calls that no GPU kernel serves."""

from collections.abc import Mapping

from jax import lax

from memformer.core.calls import AttentionCall, MatrixCall
from memformer.core.types import Array
from memformer.pallas.checks import check_chip, check_chunk_size, check_dtypes, unsupported
from memformer.pallas.gpu import tuning
from memformer.pallas.platform import interpreting_for, is_hopper

__all__ = ["check_call", "launch_grid"]

# Programs along the second and third axis of a CUDA grid; Pallas' last axis is the first.
MOST_PROGRAMS = 65535


def check_call(
    call: MatrixCall | AttentionCall,
    operands: Mapping[str, Array],
    widths: Mapping[str, int],
    allowed: tuple[str, ...] = ("bfloat16",),
    most: int = tuning.KEYS[-1],
) -> None:
    """Checks that the kernels serve a call.

    Args:
      call: of either family.
      operands: the arrays that enter products, by name.
      widths: channels that the kernels hold in registers or shared memory, by what they belong to.
      allowed: dtypes of the operands, one for all of them.
      most: channels of a width.

    Raises:
      NotImplementedError: not an sm_90 GPU; operands of another dtype, or of two; a precision above bfloat16 products;
        a width or a chunk size that no kernel has.
    """
    op = call.op
    check_chip(op, interpreting_for("gpu") or is_hopper(), "an sm_90 GPU")
    names = list(operands)
    dtypes = " or ".join(allowed)
    takes = f"takes {dtypes} {', '.join(names[:-1])} and {names[-1]} (its products are wgmma on {dtypes})"
    first, *others = operands.values()
    check_dtypes(op, (first,), allowed, takes)
    check_dtypes(op, tuple(others), (first.dtype.name,), takes)
    if call.precision != lax.Precision.DEFAULT:
        raise unsupported(op, "has products at default precision only")
    for name, width in widths.items():
        if width > most:
            raise unsupported(op, f"takes at most {most} {name} channels, got {width}")
    check_chunk_size(op, call.chunk_size, (tuning.CHUNK,))


def launch_grid(grid: tuple[int, int, int], names: tuple[str, str, str]) -> dict[str, tuple]:
    """Grid and axis names of a kernel over batch rows, heads and blocks, as keyword arguments of `plgpu.kernel`.

    Blocks of one head run side by side, because they share its operands in the L2 cache. Their axis, the last one,
    is also the only one with 2^31 - 1 programs: more batch rows or heads than 65,535 (vmap adds to the batch rows)
    take its place.

    Args:
      grid: programs along each axis.
      names: of the axes.

    Raises:
      NotImplementedError: two axes have more programs than a CUDA grid holds.
    """
    order = sorted(range(3), key=lambda axis: (grid[axis] > MOST_PROGRAMS, axis))
    if grid[order[1]] > MOST_PROGRAMS:
        counts = ", ".join(f"{count} {name}s" for name, count in zip(names, grid, strict=True))
        raise NotImplementedError(
            f"the GPU kernels take one axis of more than {MOST_PROGRAMS} programs (mapped axes of vmap count as batch"
            f" rows), got {counts.replace('_', ' ')}; implementation='chunked' takes more"
        )
    return {"grid": tuple(grid[axis] for axis in order), "grid_names": tuple(names[axis] for axis in order)}
