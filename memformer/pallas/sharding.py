"""Kernels on sharded arrays and under vmap.

A Pallas call is opaque to the partitioner and to vmap. The kernels compute every batch row and every head on its own,
so that under a mesh (jax.set_mesh) a call is wrapped in shard_map over these two axes, and vmap folds its axis into
the batch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec

from memformer.core.sharding import mesh_axes
from memformer.core.types import Array

__all__ = [
    "KernelAxes",
    "axis_names",
    "dividing",
    "dividing_axes",
    "kernel_axes",
    "key_head_repeats",
    "split_batch_and_heads",
    "varying_result",
]

# Mesh axes over which the library's own meshes shard batch and heads.
BATCH, HEADS = ("data", "fsdp", "expert"), ("tensor",)


class KernelAxes(NamedTuple):
    """Mesh axes over which batch and heads are sharded."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]


def kernel_axes() -> KernelAxes:
    """The mesh axes of the op that is traced: on an Explicit mesh those of its arguments, else the library's own.

    The backward pass is traced later, when the arguments are gone: it takes the axes from the call's configuration.
    """
    batch, heads = axis_names(mesh_axes("B")), axis_names(mesh_axes("G") or mesh_axes("H"))
    if not batch and not heads:
        return KernelAxes(BATCH, HEADS)
    return KernelAxes(batch, tuple(name for name in heads if name not in batch))


def key_head_repeats(groups: int, heads: int) -> int:
    """Repeats of the key heads that let devices share them out; 1 where that is not needed, or impossible.

    Fewer key heads than devices along the heads would leave every device with all heads.

    Args:
      groups: G, key heads.
      heads: H, a multiple of G.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = (name for name in kernel_axes().heads if name in mesh.axis_names and name not in mesh.manual_axes)
    count = math.lcm(groups, math.prod(mesh.shape[name] for name in names))
    return count // groups if heads % count == 0 else 1


def dividing_axes(batch: int, heads: int) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """The free mesh axes over which the batch and the heads of the op that is traced divide; None where none does.

    Args:
      batch: B.
      heads: G, or H where those divide.
    """
    axes = kernel_axes()
    return dividing(axes.batch, batch), dividing(axes.heads, heads)


def axis_names(part: Any) -> tuple[str, ...]:
    """The mesh axes of a part of a PartitionSpec."""
    if part is None:
        return ()
    return (part,) if isinstance(part, str) else tuple(part)


def split_batch_and_heads(
    function: Callable[..., Sequence[Array]],
    static: tuple[Any, ...],
    axes: KernelAxes,
    *,
    results: int | Sequence[int],
    operands: tuple[int | None, ...] | None = None,
    check_vma: bool = True,
    shared: bool = False,
) -> Callable[..., Sequence[Array]]:
    """`function(*static, *arrays)` for sharded arrays and under vmap: each device runs it on its own shard.

    Args:
      function: takes arrays with batch first, of any B and as many heads as a device holds; the first has G heads.
      static: its first arguments.
      axes: of the mesh, from the call's configuration.
      results: head axis of each result, or how many results there are if it is axis 1 of all.
      operands: head axis of each array, None where it has no heads; None is axis 1 of all.
      check_vma: whether arrays have types inside the shard_map, see `jax.shard_map`.
      shared: whether equal calls share one trace and one lowered kernel, so that a model of many equal layers traces it
        once. `function` and what it calls must then read nothing that changes between calls.
    """
    if isinstance(results, int):
        results = (1,) * results
    options = (function, static, axes, tuple(results), operands, check_vma)
    return functools.partial(_shared_call, *options) if shared else _split_call(*options)


def _split_call(
    function: Callable[..., Sequence[Array]],
    static: tuple[Any, ...],
    axes: KernelAxes,
    results: tuple[int, ...],
    operands: tuple[int | None, ...] | None,
    check_vma: bool,
) -> Callable[..., Sequence[Array]]:
    """See `split_batch_and_heads`."""

    def local(*arrays):
        return tuple(function(*static, *arrays))

    @custom_vmap
    def per_device(*arrays):
        mesh = jax.sharding.get_abstract_mesh()
        free = [name for name in mesh.axis_names if name not in mesh.manual_axes]
        if math.prod(mesh.shape[name] for name in free) == 1:
            return local(*arrays)
        heads = operands or (1,) * len(arrays)
        sizes = arrays[0].shape[0], arrays[0].shape[heads[0] or 1]
        parts = [dividing(names, size) for names, size in zip(axes, sizes, strict=True)]
        in_specs, out_specs = (tuple(_spec(*parts, axis) for axis in group) for group in (heads, results))
        options: dict[str, Any] = {"axis_names": set(free), "check_vma": check_vma}
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, **options)(*arrays)

    @per_device.def_vmap
    def _(size, batched, *arrays):
        wide = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(arrays, batched, strict=True)]
        out = per_device(*(x.reshape(-1, *x.shape[2:]) for x in wide))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in out), (True,) * len(out)

    @jax.custom_jvp
    def call(*arrays):
        return per_device(*arrays)

    @call.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            "the Pallas kernels have a first derivative in reverse mode only (jax.grad, jax.vjp);"
            " implementation='recurrent' has higher derivatives and forward mode"
        )

    return call


@functools.partial(jax.jit, static_argnums=range(6))
def _shared_call(function, static, axes, results, operands, check_vma, *arrays):
    return _split_call(function, static, axes, results, operands, check_vma)(*arrays)


def _spec(batch, heads, axis: int | None) -> PartitionSpec:
    """The spec of an array with its heads on this axis, or without heads."""
    return PartitionSpec(batch) if axis is None else PartitionSpec(batch, *(None,) * (axis - 1), heads)


def dividing(names: Sequence[str], size: int) -> tuple[str, ...] | None:
    """Those of the mesh axes `names` that are free in the mesh of the context; None where they do not divide `size`."""
    mesh = jax.sharding.get_abstract_mesh()
    names = tuple(name for name in names if name in mesh.axis_names and name not in mesh.manual_axes)
    return names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None


def varying_result(shape: tuple[int, ...], dtype, *like: Array) -> jax.ShapeDtypeStruct:
    """The type of a result of a kernel that varies over all mesh axes of shard_map over which any of `like` varies."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in like))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=axes))
