"""Floors of DeltaFormer's and attention's TPU kernels, for benchmarks/tpu_static.py.

A program of theirs takes one block of R rows through two stretches, each a row of the table:

    walk   the loop over earlier blocks, one block of R columns a turn (backward: over later blocks of rows)
    own    the block against itself: half of a turn's products, and for the write the triangular solve
"""

from typing import Any

import jax
import jax.numpy as jnp

from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.common import check_backend

__all__ = ["PARTS", "block_rows", "floor_flops", "heads", "traffic"]

# By the number of loops around it.
PARTS = {1: "own", 2: "walk"}


def block_rows(case: Any, backward: bool) -> int:
    """R, as the library cuts this case for the chip of the mesh that is set."""
    kind = check_backend(case.op, jax.ShapeDtypeStruct((), case.dtype))
    itemsize = jnp.dtype(case.dtype).itemsize
    size, _, _, back, _ = tuning.choose_tiles(kind, case.length, case.key, case.value, itemsize)
    return back if backward else size


def heads(case: Any, kernel: str) -> int:
    """Heads a program: the write takes two where they are even."""
    return 2 if "write_forward" in kernel and case.groups % 2 == 0 else 1


def floor_flops(case: Any, rows: int, part: str, backward: bool) -> int:
    """FLOPs of the products that one stretch needs.

    Forward: scores and values; backward: scores, their gradients, and what reaches q, k and x. On its own block a
    row meets half of the columns, and the solve takes as many FLOPs as the values would.
    """
    products = 3 * case.key + 2 * case.value if backward else case.key + case.value
    return (2 if part == "walk" else 1) * rows**2 * products


def traffic(case: Any, kernel: str, rows: int) -> tuple[float, float]:
    """Bytes that R tokens of one head move, and those of inputs and outputs alone; keys and values once a head."""
    K, V, itemsize = case.key, case.value, jnp.dtype(case.dtype).itemsize
    # u, and every gradient on its way out of a kernel, is float32; eight numbers of 4 bytes lie together.
    values = 4 * V if "write" in kernel else itemsize * V
    least = itemsize * (2 * K + V) + values
    numbers = 4 + 32 * ("write" in kernel or case.segments) + 32 * case.segments
    if "backward" in kernel:
        least += itemsize * (2 * K + V)
        numbers += (4 - itemsize) * (2 * K + V) + 32
    return rows * (least + numbers), rows * least
