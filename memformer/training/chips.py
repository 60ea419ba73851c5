"""Accelerators: peak rates, memory and networks per device, from the vendors' data sheets."""

import dataclasses

__all__ = ["CHIPS", "GIB", "Chip", "find_chip"]

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one device, as JAX counts devices (one of the two of a TPU7x chip).

    Attributes:
      name: part of `jax.Device.device_kind`.
      memory: bytes of device memory.
      flops: dense bfloat16 peak, FLOP/s.
      bandwidth: of the device memory, bytes/s.
      link: one direction of one link of the fast network (ICI of a TPU, NVLink of a GPU), bytes/s.
      network: a device's share of the network between slices or hosts, bytes/s.
      host: a device's share of the host's bus, bytes/s.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    host: float = 8e9


# The first match wins. Sources: cloud.google.com/tpu/docs (system architecture), nvidia.com (data sheets); links and
# networks of TPUs as measured in "How To Scale Your Model", jax-ml.github.io/scaling-book.
CHIPS = (
    Chip("TPU7x", 96 * GIB, 1153e12, 3690e9, 90e9, 12.5e9),
    Chip("TPU v6", 32 * GIB, 918e12, 1640e9, 90e9, 12.5e9),
    Chip("TPU v5p", 95 * GIB, 459e12, 2765e9, 90e9, 6.25e9),
    Chip("TPU v5 lite", 16 * GIB, 197e12, 819e9, 45e9, 3.125e9),
    Chip("TPU v5e", 16 * GIB, 197e12, 819e9, 45e9, 3.125e9),
    Chip("TPU v5", 95 * GIB, 459e12, 2765e9, 90e9, 6.25e9),
    Chip("TPU v4", 32 * GIB, 275e12, 1228e9, 45e9, 6.25e9),
    Chip("H200", 141 * 10**9, 989e12, 4800e9, 450e9, 50e9, 50e9),
    Chip("H100", 80 * 10**9, 989e12, 3350e9, 450e9, 50e9, 50e9),
    Chip("A100", 80 * 10**9, 312e12, 2039e9, 300e9, 25e9, 25e9),
)


def find_chip(device_kind: str) -> Chip | None:
    """The accelerator of a device kind, or None if unknown (CPUs).

    Example:
      >>> find_chip("NVIDIA H100 80GB HBM3").flops, find_chip("cpu")
      (989000000000000.0, None)
    """
    return next((chip for chip in CHIPS if chip.name in device_kind), None)
