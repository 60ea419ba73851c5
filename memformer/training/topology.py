"""Devices to compile for: those of this machine, or a slice of TPUs or a box of GPUs that need not be present."""

import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from memformer.training.config import RunError

__all__ = ["GPUS", "find_devices", "topology_name"]

# Kind of device by the name of its box; JAX's device_kind contains it.
GPUS = {"h200": "H200", "h100": "H100", "a100": "A100"}
# Generation: dimensions of its torus, and numbers per chip in its accelerator types (v5p-128 has 128 cores, 64 chips).
TPUS = {"v4": (3, 2), "v5p": (3, 2), "v5e": (2, 1), "v5litepod": (2, 1), "v6e": (2, 1), "tpu7x": (3, 2)}
NAMES = "here, a TPU type or topology such as v5p-128, v6e:8x8 or tpu7x:2x2x1, or GPUs such as h200:8"


def find_devices(where: str, slices: int = 1) -> list[jax.Device]:
    """Returns the devices of this machine ("here"), or devices to compile for.

    Args:
      where: "here"; an accelerator type ("v5p-128", "v5e-256", "v6e-64") or topology ("v6e:8x8", "tpu7x:2x2x1") of
        TPUs, for which libtpu compiles; or a box of up to eight GPUs ("h200:8"), in whose place as many virtual CPU
        devices compile.
      slices: number of such slices.

    Raises:
      RunError: an unknown name, or no libtpu to compile for it.
    """
    if where == "here":
        return jax.devices()
    kind, _, count = where.partition(":")
    if kind in GPUS:
        return _stand_ins(where, count)
    return _tpus(topology_name(where), where, slices)


def topology_name(where: str) -> str:
    """The topology of an accelerator type; a topology is returned unchanged.

    Example:
      >>> topology_name("v5p-128"), topology_name("v5e-256"), topology_name("v6e:2x4")
      ('v5p:4x4x4', 'v5e:16x16', 'v6e:2x4')
    """
    found = re.fullmatch(r"(\w+)-(\d+)", where)
    if found is None or found[1] not in TPUS:
        return where
    dimensions, cores = TPUS[found[1]]
    chips, sides, turn = int(found[2]) // cores, [2] * dimensions, dimensions - 1
    if chips in (1, 4):
        sides = [math.isqrt(chips)] * 2 + [1] * (dimensions - 2)
    while math.prod(sides) < chips:
        sides[turn] *= 2
        turn = (turn - 1) % dimensions
    if math.prod(sides) * cores != int(found[2]):
        raise RunError(
            f"--dryrun={where}: the number must be a power of two that makes a slice (the chips times {cores}); name "
            f"another slice by its sides, such as {found[1]}:{'x'.join(['4'] * dimensions)}."
        )
    generation = {"v5litepod": "v5e"}.get(found[1], found[1])
    return f"{generation}:{'x'.join(map(str, sides))}"


def _tpus(name: str, where: str, slices: int) -> list[jax.Device]:
    if re.fullmatch(r"\w+:\d+(x\d+)*", name) is None:
        raise RunError(f"--dryrun must be {NAMES}, got {where!r}.")
    if importlib.util.find_spec("libtpu") is None:
        raise RunError(
            f"the dry run for {where} compiles with libtpu, which is not installed: pip install 'jax[tpu]=="
            f"{jax.__version__}' installs the version for this jax (no TPU is needed)."
        )
    # without these libtpu queries the metadata server of a TPU machine and logs every failure
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    for variable, value in (("SKIP_MDS_QUERY", "1"), ("WORKER_HOSTNAMES", "localhost"), ("ACCELERATOR_TYPE", "v5p-8")):
        os.environ.setdefault(f"TPU_{variable}", value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.endswith(":1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise RunError(f"--dryrun must be {NAMES}, got {where!r}: {str(error).splitlines()[0]}") from error


def _stand_ins(where: str, count: str) -> list[jax.Device]:
    """As many CPU devices as GPUs: the program is that of a CPU, divided in the same way."""
    if not count.isdecimal() or not 1 <= int(count) <= 8:
        raise RunError(f"--dryrun={where} needs the number of GPUs of one box, 1 to 8: {where.partition(':')[0]}:8.")
    try:
        # works as long as nothing has used JAX's devices
        jax.config.update("jax_num_cpu_devices", int(count))
    except RuntimeError:
        pass
    devices = jax.devices("cpu")
    if len(devices) < int(count):
        raise RunError(
            f"--dryrun={where} compiles for {count} virtual CPU devices in place of the GPUs, but there are "
            f"{len(devices)}: start Python with JAX_NUM_CPU_DEVICES={count}."
        )
    return devices[: int(count)]
