"""The mesh of a run, and the table from logical axis names to mesh axes."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from memformer.data.source import BATCH_KEYS
from memformer.layers.sharding import RULES, partition_spec
from memformer.training.config import RunError

__all__ = [
    "AXES",
    "RULES",
    "BatchLayout",
    "batch_layout",
    "count_slices",
    "global_batch",
    "make_mesh",
    "mesh_scope",
    "partition_spec",
    "state_shardings",
]

AXES = ("data", "fsdp", "context", "tensor")
# With mesh.expert above 1.
EXPERT_AXES = ("data", "fsdp", "expert", "context", "tensor")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of axes data, fsdp, context, tensor over `devices` (by default all), and expert if it is given.

    Over several slices of TPUs, which a data-center network joins, the slices are the outer part of the data axis: one
    sum of gradients per step crosses that network, and no other axis does.

    Args:
      sizes: axis name to size; one may be -1, the devices that the others leave. `expert` may be left out; a mesh has
        this axis, between fsdp and context, if its size is not 1. `slices`, if given and not 0, is the
        number of slices; by default it is read from TPU devices, and 1 elsewhere. Devices that report no slices are cut
        into as many equal blocks.
      devices: the devices of the mesh; all of them must be used.

    Raises:
      RunError: sizes that these devices cannot form.

    Example:
      >>> make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:1]).axis_names
      ('data', 'fsdp', 'context', 'tensor')
    """
    devices = jax.devices() if devices is None else list(devices)
    if set(sizes) - {"slices", "expert"} != set(AXES):
        raise RunError(f"config.mesh must have the axes {', '.join(AXES)}, got {', '.join(sizes)}.")
    axes = AXES if sizes.get("expert", 1) == 1 else EXPERT_AXES
    shape = _axis_sizes({name: sizes[name] for name in axes}, devices)
    slices = _slices(sizes.get("slices", 0), devices)
    asked = ", ".join(f"{name}={size}" for name, size in zip(axes, shape, strict=True))
    if shape[0] % len(slices):
        raise RunError(
            f"config.mesh.data must be a multiple of the {len(slices)} slices, which the data axis spans, got {asked}. "
            "Change the sizes with --config.mesh.data=... and the others."
        )
    inner = [shape[0] // len(slices), *shape[1:]]
    try:
        # An axis may take part of a physical axis of a TPU's torus: eight-way axes on a 4 x 4 x 4 slice need it.
        grids = [mesh_utils.create_device_mesh(inner, part, allow_split_physical_axes=True) for part in slices]
    except (ValueError, NotImplementedError) as error:
        raise RunError(
            f"config.mesh ({asked}) cannot be laid out; {_found(devices)}: {str(error).splitlines()[0]} Choose "
            "axes that are products of factors of the sides of the slice."
        ) from error
    return Mesh(np.concatenate(grids), axes, axis_types=(AxisType.Auto,) * len(axes))


def _axis_sizes(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> list[int]:
    """The size of each axis, with -1 replaced."""
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise RunError(f"config.mesh sizes must be at least 1, with at most one -1 (the rest), got {asked}.")
    fixed = math.prod(size for name, size in sizes.items() if name not in free)
    if len(devices) % fixed if free else fixed != len(devices):
        need = f"a multiple of {fixed}" if free else str(fixed)
        raise RunError(
            f"config.mesh ({asked}) needs {need} devices, but {_found(devices)}. Change the sizes with "
            f"--config.mesh.{free[0] if free else 'data'}=..., or run where there are as many devices "
            "(on CPU, JAX_NUM_CPU_DEVICES=8 makes eight)."
        )
    return [len(devices) // fixed if name in free else size for name, size in sizes.items()]


def count_slices(devices: Sequence[jax.Device] | None = None) -> int:
    """Number of TPU slices that the devices (by default all) report; 1 elsewhere."""
    return len(_slices(0, jax.devices() if devices is None else devices))


def _slices(count: int, devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each slice."""
    reported: dict[int, list[jax.Device]] = {}
    if devices[0].platform == "tpu":
        for device in devices:
            reported.setdefault(getattr(device, "slice_index", 0), []).append(device)
    found = [reported[index] for index in sorted(reported)]
    uneven = len({len(part) for part in found}) > 1
    if uneven or (len(found) > 1 and count not in (0, len(found))):
        held = ", ".join(str(len(part)) for part in found)
        raise RunError(
            f"config.mesh.slices must be 0 or {len(found)}, the slices of these TPUs, each with as many devices; got "
            f"{count} and slices of {held} devices."
        )
    if len(found) > 1 or count in (0, 1):
        return found or [list(devices)]
    if count < 0 or len(devices) % count:
        raise RunError(
            f"config.mesh.slices must be 0 (as the devices report) or a divisor of the {len(devices)} devices, got "
            f"{count}."
        )
    size = len(devices) // count
    return [list(devices[size * i : size * (i + 1)]) for i in range(count)]


def _found(devices: Sequence[jax.Device]) -> str:
    return f"{len(devices)} {devices[0].platform} device{'s were' if len(devices) > 1 else ' was'} found"


@contextlib.contextmanager
def mesh_scope(mesh: Mesh) -> Iterator[None]:
    """Scope in which models are built, traced and run: sets the mesh and the rules that layers read."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        yield


def state_shardings(state: Any, params: Mapping[str, NamedSharding], mesh: Mesh) -> Any:
    """Sharding of every leaf of an (abstract) train state.

    A leaf with a parameter's name and rank (the parameter, a moment of the optimizer, an average) is sharded like the
    parameter; everything else is replicated.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = getattr(path[-1], "key", None) if path else None
        found = params.get(name) if isinstance(name, str) else None
        return found if found is not None and len(found.spec) <= leaf.ndim and leaf.ndim > 0 else whole

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(name: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Sharding of one array of a batch, [B, T, ...], or [B, ...] of an extra one."""
    names = ("activation_batch", "activation_time" if name in BATCH_KEYS else None) + (None,) * (len(shape) - 2)
    return NamedSharding(mesh, partition_spec(names[: len(shape)], shape, mesh))


@dataclasses.dataclass(frozen=True)
class BatchLayout:
    """The part of each batch that the devices of one process hold.

    Created by `batch_layout`.

    Attributes:
      rows: numbers of its rows, increasing. Other processes hold the same rows where a tensor or context axis spans
        processes, and the rows need not be neighbours.
      steps: numbers of its time steps by array; None where the array is not sharded over time.
      shapes: global shapes by array.
      shardings: shardings by array.
    """

    rows: np.ndarray
    steps: Mapping[str, np.ndarray | None]
    shapes: Mapping[str, tuple[int, ...]]
    shardings: Mapping[str, NamedSharding]

    def keep(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Drops the time steps that the process does not hold from a batch of `rows`."""
        result = dict(batch)
        for name, steps in self.steps.items():
            if steps is not None and len(steps) < self.shapes[name][1]:
                result[name] = batch[name][:, steps]
        return result

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Puts a batch of `rows` on the devices of this process, as global arrays."""
        kept = self.keep(batch)
        return {name: self._put(name, array) for name, array in kept.items()}

    def _put(self, name: str, array: np.ndarray) -> jax.Array:
        numbers = (self.rows, self.steps[name])

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            # global slices to slices of the rows and steps that are here
            slices = list(index or ())
            for axis, here in enumerate(numbers[: len(slices)]):
                if here is not None:
                    start, stop, _ = slices[axis].indices(self.shapes[name][axis])
                    first = int(np.searchsorted(here, start))
                    slices[axis] = slice(first, first + stop - start)
            return array[tuple(slices)]

        return jax.make_array_from_callback(self.shapes[name], self.shardings[name], shard)


def batch_layout(
    shapes: Mapping[str, Sequence[int]], mesh: Mesh, devices: Sequence[jax.Device] | None = None
) -> BatchLayout:
    """Returns the part of each batch that a process holds, from the index map of the batch's sharding.

    Args:
      shapes: global shapes [B, T, ...] by array.
      mesh: the mesh of the run.
      devices: the devices of the process; by default those of this one.

    Raises:
      RunError: a batch size not divisible by the axes that divide the batch.

    Example:
      >>> mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:1])
      >>> batch_layout({"inputs": (4, 8)}, mesh).rows.tolist()
      [0, 1, 2, 3]
    """
    sizes = {name: tuple(shape) for name, shape in shapes.items()}
    count = next(iter(sizes.values()))[0]
    shards = {name: mesh.shape[name] for name in dict(RULES)["activation_batch"] or () if name in mesh.shape}
    if count % math.prod(shards.values()):
        product = f"{' x '.join(shards)} = {' x '.join(map(str, shards.values()))}"
        raise RunError(
            f"train.batch_size must be a multiple of mesh {product}, got {count}. "
            "Set --config.train.batch_size (eval.py: --batch_size) to such a multiple."
        )
    here = set(mesh.local_devices if devices is None else devices)
    shardings = {name: batch_sharding(name, shape, mesh) for name, shape in sizes.items()}
    rows, steps = np.arange(0), {}
    for name, shape in sizes.items():
        indices = [i for device, i in shardings[name].devices_indices_map(shape).items() if device in here]
        # the same for all arrays: their rows are sharded alike
        rows = _numbers(shape[0], [index[0] for index in indices])
        sharded = len(shardings[name].spec) > 1 and shardings[name].spec[1] is not None
        steps[name] = _numbers(shape[1], [index[1] for index in indices]) if sharded else None
    return BatchLayout(rows, steps, sizes, shardings)


def _numbers(size: int, slices: Sequence[slice]) -> np.ndarray:
    """The numbers in [0, size) that lie in at least one of the slices."""
    inside = np.zeros(size, bool)
    for part in slices:
        inside[part] = True
    return np.flatnonzero(inside)


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a batch on the devices of a mesh, as global arrays; every process has the whole batch.

    Raises:
      RunError: a batch size not divisible by the axes that divide the batch.
    """
    layout = batch_layout({name: array.shape for name, array in batch.items()}, mesh)
    return layout.place({name: array[layout.rows] for name, array in batch.items()})
