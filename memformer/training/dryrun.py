"""Dry run: compiles a train step for devices that need not be present, and reports whether it fits."""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from memformer.training.build import Run, build_run
from memformer.training.config import RunError
from memformer.training.input import batch_arrays
from memformer.training.metrics import flops_per_token, log
from memformer.training.sharding import batch_sharding, mesh_scope
from memformer.training.step import abstract_state, make_train_step

__all__ = ["DryRun", "dry_run", "find_devices", "lower_step", "show_dry_run"]

GIB = 1 << 30
# Memory of one device in GiB, from the vendors' data sheets; the first match wins.
MEMORY = (
    ("TPU v6", 32),
    ("TPU v5p", 95),
    ("TPU v5 lite", 16),
    ("TPU v5e", 16),
    ("TPU v5", 95),
    ("TPU v4", 32),
    ("H200", 141),
    ("H100", 80),
    ("A100", 80),
)
# error messages of the TPU compiler: the whole program does not fit, or its temporaries alone
OVERFLOW = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
OVERFLOW_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")


@dataclasses.dataclass(frozen=True)
class DryRun:
    """Requirements of a run; bytes are per device.

    Attributes:
      devices: number and kind.
      parameters: number of parameters of the model.
      state_bytes: parameters, optimizer state and the rest of the train state.
      working_bytes: temporary memory of the step (activations, gradients, a batch).
      limit_bytes: memory of the device; None if unknown (CPU).
      flops: analytic FLOPs of one step over all devices (without rematerialization).
      seconds: compile time.
      advice: changes that reduce the memory, if it does not fit.

    Example:
      >>> print(DryRun("8 x TPU v5 lite", 10**9, 2 * GIB, 20 * GIB, 16 * GIB, 3e15, 40.0, ("smaller",)))
      1,000,000,000 parameters on 8 x TPU v5 lite; 3e+15 FLOPs per step; compiled in 40 s
      each device: 22.00 GiB (2.00 GiB of train state, 20.00 GiB of temporaries)
      does not fit in 16.00 GiB
      smaller
    """

    devices: str
    parameters: int
    state_bytes: int
    working_bytes: int
    limit_bytes: int | None
    flops: float
    seconds: float
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None if its size is unknown."""
        return None if self.limit_bytes is None else self.state_bytes + self.working_bytes <= self.limit_bytes

    def __str__(self) -> str:
        lines = [
            f"{self.parameters:,} parameters on {self.devices}; {self.flops:.3g} FLOPs per step; "
            f"compiled in {self.seconds:.0f} s",
            f"each device: {_gib(self.state_bytes + self.working_bytes)} ({_gib(self.state_bytes)} of train state, "
            f"{_gib(self.working_bytes)} of temporaries)",
        ]
        if self.limit_bytes is None:
            lines.append("whether that fits is unknown: the memory of this device is not known")
        else:
            verdict = "fits" if self.fits else "does not fit"
            lines.append(f"{verdict} in {_gib(self.limit_bytes)}")
        return "\n".join([*lines, *self.advice])


def dry_run(config: Mapping[str, Any], where: str = "here") -> DryRun:
    """Compiles the sharded train step of a run and reads its memory from the compiled program.

    Nothing is trained or allocated, so a laptop can compile for a pod. For TPUs the compiler's number is exact; on CPU
    it is that of the CPU program, an estimate.

    Args:
      config: the config of a run; `config.mesh` must fit the devices.
      where: "here" for the devices of this machine (JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 makes eight virtual ones),
        or a TPU topology such as "v5p:4x4x4", "v5e:4x4", "v6e:2x4".

    Raises:
      RunError: a config that cannot be built, an unknown topology, or no libtpu to compile for it.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    devices = find_devices(where)
    run = build_run(config, devices=devices)
    started = time.monotonic()
    with mesh_scope(run.mesh):
        lowered, held = lower_step(run)
        total, limit = _memory(lowered, devices[0].device_kind, held)
    tokens = config["train"]["batch_size"] * run.task.steps
    flops = tokens * flops_per_token(
        config["model"], run.model.size(without=("embedding", "positions")), run.task.steps
    )
    return DryRun(
        devices=f"{len(devices)} x {devices[0].device_kind}",
        parameters=run.model.size(),
        state_bytes=held,
        working_bytes=total - held,
        limit_bytes=limit,
        flops=flops,
        seconds=time.monotonic() - started,
        advice=_advice(run, held, total - held, limit),
    )


def lower_step(run: Run) -> tuple[jax.stages.Lowered, int]:
    """Lowers the train step of a run (inside `mesh_scope(run.mesh)`); also returns the bytes of state per device."""
    train, ema = run.config["train"], run.config["optimizer"]["ema"]
    state = abstract_state(run.model, run.tx, run.mesh, ema)
    step = make_train_step(run.model, run.tx, run.schedule, run.mesh, train, ema)
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return step.lower(state, _abstract_batch(run)), held


def show_dry_run(config: Mapping[str, Any], where: str) -> None:
    """Prints the result of `dry_run`."""
    log(str(dry_run(config, where)))


def find_devices(where: str) -> list[jax.Device]:
    """Returns the devices of this machine ("here"), or those of a named TPU topology to compile for.

    Raises:
      RunError: an unknown topology, or no libtpu to compile for it.
    """
    return jax.devices() if where == "here" else _topology(where)


def _topology(name: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise RunError(
            f"the dry run for {name} compiles with libtpu, which is not installed: pip install 'jax[tpu]=="
            f"{jax.__version__}' installs the version for this jax (no TPU is needed)."
        )
    # without these libtpu queries the metadata server of a TPU machine and logs every failure
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    for variable, value in (("SKIP_MDS_QUERY", "1"), ("WORKER_HOSTNAMES", "localhost"), ("ACCELERATOR_TYPE", "v5p-8")):
        os.environ.setdefault(f"TPU_{variable}", value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise RunError(
            f"--dryrun must be here or a TPU topology such as v5p:2x2x2, v5e:4x4 or v6e:2x4, got {name!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _abstract_batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    arrays = {}
    for name, extra in batch_arrays(run.task).items():
        shape = (run.config["train"]["batch_size"], *extra.shape)
        sharding = batch_sharding(name, shape, run.mesh)
        arrays[name] = jax.ShapeDtypeStruct(shape, np.dtype(extra.dtype), sharding=sharding)
    return arrays


def _memory(lowered: jax.stages.Lowered, kind: str, state: int) -> tuple[int, int | None]:
    """Bytes per device that the program needs, and that the device has."""
    limit = next((gib * GIB for name, gib in MEMORY if name in kind), None)
    try:
        need: Any = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        found = OVERFLOW.search(str(error)) or OVERFLOW_TEMPORARIES.search(str(error))
        if found is None:
            raise
        used, available = _bytes(*found.group(1, 2)), _bytes(*found.group(3, 4))
        return used + (state if found.re is OVERFLOW_TEMPORARIES else 0), available
    used = need.argument_size_in_bytes + need.output_size_in_bytes - need.alias_size_in_bytes
    return used + need.temp_size_in_bytes + need.generated_code_size_in_bytes, limit


def _advice(run: Run, state: int, working: int, limit: int | None) -> tuple[str, ...]:
    if limit is None or state + working <= limit:
        return ()
    advice = []
    model, train, mesh = run.config["model"], run.config["train"], run.mesh.shape
    if state > limit // 2:
        advice.append(
            "the train state takes most of it: shard it over more devices with --config.mesh.fsdp "
            f"(now {mesh['fsdp']}) or --config.mesh.tensor"
        )
    if working > limit // 4:
        micro = train["batch_size"] // train["accumulate"]
        advice.append(
            "the step takes much of it: use more micro-batches with --config.train.accumulate "
            f"(now {train['accumulate']}, {micro} rows each), or a smaller --config.train.batch_size"
        )
        if model.get("remat", "") is None:
            advice.append("store less for the backward pass with --config.model.remat=full")
        if model.get("dtype") == "float32":
            advice.append("halve the activations with --config.model.dtype=bfloat16")
    return tuple(advice)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"
