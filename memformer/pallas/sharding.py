"""Calls that every device makes for its own batch rows and heads.

A Pallas call is opaque to the partitioner and to vmap. All arrays of ours have batch first and heads
second, and no row or head knows of another. So under a mesh (jax.set_mesh) the call is wrapped in
shard_map over those two axes, and vmap folds its axis into the batch.
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

# Mesh axes, by the names of the library's own meshes, that batch and heads lie on.
BATCH, HEADS = ("data", "fsdp"), ("tensor",)


def split_batch_and_heads(
    function: Callable[..., Sequence[Array]], static: tuple[Any, ...], results: int
) -> Callable[..., Sequence[Array]]:
    """`function(*static, *arrays)`, made for sharded and for mapped arrays.

    Args:
      function: takes arrays [B, H, ...], the first two [B, G, ...], of any B and as many heads as a device holds.
      static: its first arguments.
      results: how many it returns, [B, H, ...] or [B, G, ...].
    """

    def local(*arrays):
        return tuple(function(*static, *arrays))

    @custom_vmap
    def call(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        free = [name for name in mesh.axis_names if name not in mesh.manual_axes]
        if math.prod(mesh.shape[name] for name in free) == 1:
            return local(*arrays)
        spec = _spec(mesh, free, arrays)
        out_specs = (spec,) * results
        return jax.shard_map(local, in_specs=spec, out_specs=out_specs, axis_names=set(free))(*arrays)

    @call.def_vmap
    def _(size, batched, *arrays):
        wide = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(arrays, batched, strict=True)]
        out = call(*(x.reshape(-1, *x.shape[2:]) for x in wide))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in out), (True,) * len(out)

    return call


def _spec(mesh: AbstractMesh, free: Sequence[str], arrays: Sequence[Array]) -> PartitionSpec:
    """Where batch and heads lie; an axis that does not divide them is left out."""
    if any(kind == AxisType.Explicit for kind in mesh.axis_types):
        # Types say where arrays lie; the first has the fewest heads.
        return PartitionSpec(*jax.typeof(arrays[0]).sharding.spec[:2])
    batch, heads = arrays[0].shape[:2]

    def fitting(names, size):
        names = tuple(name for name in names if name in free)
        return names if size % math.prod(mesh.shape[name] for name in names) == 0 else None

    return PartitionSpec(fitting(BATCH, batch), fitting(HEADS, heads))


def varying_result(shape: tuple[int, ...], dtype, *like: Array) -> jax.ShapeDtypeStruct:
    """A result of a kernel that varies over the mesh axes of shard_map as `like` do."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in like))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))
