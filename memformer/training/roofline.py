"""Lower bound of the time of a step: arithmetic, memory traffic and collectives at the peak rates of the chips."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from memformer.training.chips import Chip
from memformer.training.program import Collective

__all__ = ["Roofline", "collective_seconds", "roofline"]


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The terms of a step in seconds, each at the peak rate of its part of the machine.

    Attributes:
      terms: "compute", "memory", and "network AXES" by mesh axes.
      model_flops: FLOPs per step and device that count for MFU, without recomputation.
      chip: the device.

    Example:
      >>> from memformer.training.chips import find_chip
      >>> found = Roofline({"compute": 0.5, "memory": 0.2}, 0.4 * 197e12, find_chip("TPU v5e"))
      >>> found.seconds, found.largest, round(found.mfu, 3)
      (0.5, 'compute', 0.8)
    """

    terms: Mapping[str, float]
    model_flops: float
    chip: Chip

    @property
    def network(self) -> float:
        """Time of all collectives, one after another."""
        return sum(value for name, value in self.terms.items() if name.startswith("network"))

    @property
    def seconds(self) -> float:
        """The least time of a step: the largest of arithmetic, memory and network, which can overlap."""
        return max(self.terms["compute"], self.terms["memory"], self.network)

    @property
    def largest(self) -> str:
        """Name of the largest of arithmetic, memory and network."""
        parts = {"compute": self.terms["compute"], "memory": self.terms["memory"], "network": self.network}
        return max(parts, key=lambda name: parts[name])

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization of a step that takes no longer."""
        return self.model_flops / (self.chip.flops * self.seconds) if self.seconds else math.nan


def roofline(
    chip: Chip, mesh: Mesh, *, flops: float, bytes: float, collectives: Sequence[Collective], model_flops: float
) -> Roofline:
    """Returns the bound of a step.

    Args:
      chip: the devices of the mesh.
      mesh: the mesh of the run.
      flops: per device, recomputation included.
      bytes: moved to and from the memory of a device.
      collectives: of one step.
      model_flops: per device, without recomputation.
    """
    terms = {"compute": flops / chip.flops, "memory": bytes / chip.bandwidth}
    for item in collectives:
        name = f"network {'+'.join(item.axes)}"
        terms[name] = terms.get(name, 0.0) + collective_seconds(item, chip, mesh)
    return Roofline(terms, model_flops, chip)


def collective_seconds(item: Collective, chip: Chip, mesh: Mesh) -> float:
    """Least time of the collectives of one kind.

    Bytes that a device sends, over the links that its group of devices uses: on a torus one per dimension in which the
    group extends, twice where it closes to a ring. Groups of several slices or hosts of GPUs also send their part of
    the array over the network between these.
    """
    group = _group(mesh, item.axes)
    size = len(group)
    if size < 2:
        return 0.0
    # all-reduce = reduce-scatter and all-gather
    passes = {"all-reduce": 2.0}.get(item.kind, 1.0)
    share = {"collective-permute": 1.0}.get(item.kind, (size - 1) / size)
    inside, parts = _parts(group)
    seconds = 0.0
    if inside > 1:
        links = _links(group, mesh)
        # on a ring, what a device sends to all others passes a quarter of them on average
        hops = inside / 4 if item.kind.endswith("all-to-all") and group[0].platform == "tpu" else 1.0
        seconds += passes * share * item.bytes * hops / (chip.link * links)
    if parts > 1:
        seconds += passes * (parts - 1) / parts * item.bytes / inside / chip.network
    return seconds


def _group(mesh: Mesh, axes: Sequence[str]) -> list:
    """The devices that differ from the first of the mesh along `axes` only."""
    index = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    return list(np.ravel(mesh.devices[index]))


def _parts(group: Sequence) -> tuple[int, int]:
    """Devices of the group per slice (host, for GPUs), and the number of these."""
    name = "slice_index" if group[0].platform == "tpu" else "process_index"
    parts = len({getattr(device, name, 0) for device in group})
    return len(group) // parts, parts


def _links(group: Sequence, mesh: Mesh) -> int:
    """Links of a device that a collective of the group can use at once; 1 where devices have no places on a torus."""
    if not hasattr(group[0], "coords"):
        return 1
    places = [device.coords for device in group]
    sides = np.max([device.coords for device in mesh.devices.flat], axis=0) + 1
    # tori of two dimensions close at 16 chips, those of three in units of four
    flat = sides[2] == 1
    links = 0
    for axis, side in enumerate(sides):
        extent = len({place[axis] for place in places})
        closed = extent == side and (side >= 16 if flat else side % 4 == 0)
        links += (2 if closed else 1) if extent > 1 else 0
    return max(links, 1)
