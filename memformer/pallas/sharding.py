"""Kernels on sharded arrays and under vmap.

A Pallas call is opaque to the partitioner and to vmap. The kernels compute every batch row and every head on its own,
so that under a mesh (jax.set_mesh) a call is wrapped in shard_map over these two axes, and vmap folds its axis into
the batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from memformer.core.types import Array

__all__ = ["split_batch_and_heads", "varying_result"]

# Mesh axes over which the library's own meshes shard batch and heads.
BATCH, HEADS = ("data", "fsdp"), ("tensor",)


def split_batch_and_heads(
    function: Callable[..., Sequence[Array]],
    static: tuple[Any, ...] = (),
    *,
    results: int | Sequence[int],
    operands: Sequence[int] | None = None,
) -> Callable[..., Sequence[Array]]:
    """`function(*static, *arrays)` for sharded arrays and under vmap: each device runs it on its own shard.

    Args:
      function: takes arrays with batch first, of any B and as many heads as a device holds; the first has G heads.
      static: its first arguments.
      results: head axis of each result, or how many results there are if it is axis 1 of all.
      operands: head axis of each array; None is axis 1 of all.
    """
    if isinstance(results, int):
        results = (1,) * results

    def local(*arrays):
        return tuple(function(*static, *arrays))

    @custom_vmap
    def call(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        free = [name for name in mesh.axis_names if name not in mesh.manual_axes]
        if math.prod(mesh.shape[name] for name in free) == 1:
            return local(*arrays)
        axes = operands or (1,) * len(arrays)
        batch, heads = _mesh_axes(mesh, free, arrays[0], axes[0])
        in_specs, out_specs = (tuple(_spec(batch, heads, axis) for axis in group) for group in (axes, results))
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=set(free))(*arrays)

    @call.def_vmap
    def _(size, batched, *arrays):
        wide = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(arrays, batched, strict=True)]
        out = call(*(x.reshape(-1, *x.shape[2:]) for x in wide))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in out), (True,) * len(out)

    return call


def _spec(batch, heads, axis: int) -> PartitionSpec:
    """Of an array with its heads on this axis."""
    return PartitionSpec(batch, *(None,) * (axis - 1), heads)


def _mesh_axes(mesh: AbstractMesh, free: Sequence[str], array: Array, axis: int) -> tuple[Any, Any]:
    """Mesh axes of batch and of heads; None for one that does not divide them."""
    if any(kind == AxisType.Explicit for kind in mesh.axis_types):
        # Types say how arrays are sharded; the first has the fewest heads.
        spec = jax.typeof(array).sharding.spec
        return spec[0], spec[axis]

    def fitting(names, size):
        names = tuple(name for name in names if name in free)
        return names if size % math.prod(mesh.shape[name] for name in names) == 0 else None

    return fitting(BATCH, array.shape[0]), fitting(HEADS, array.shape[axis])


def varying_result(shape: tuple[int, ...], dtype, *like: Array) -> jax.ShapeDtypeStruct:
    """The type of a result of a kernel that varies over all mesh axes of shard_map over which any of `like` varies."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in like))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))
