"""Dry run: compiles a train step for devices that need not be present; reports whether it fits, how fast it can be."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from memformer.tasks import Task
from memformer.training.buffers import compile_to_buffers, compile_whole, run_apart
from memformer.training.build import Run, build_run
from memformer.training.chips import GIB, Chip, find_chip
from memformer.training.input import batch_arrays, batch_shapes, make_loader
from memformer.training.metrics import flops_per_token, format_table, looked_up
from memformer.training.program import Collective, Program, read_program
from memformer.training.roofline import Roofline, roofline
from memformer.training.sharding import batch_layout, batch_sharding, mesh_scope
from memformer.training.step import abstract_state, make_train_step
from memformer.training.topology import GPUS, find_devices

__all__ = ["DryRun", "Feeding", "compile_step", "describe_feeding", "dry_run", "lower_step", "step_flops"]

# error messages of the TPU compiler; both sizes are those of all buffers, arguments included
OVERFLOW = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
OVERFLOW_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")

# processes that a host can hold
MOST_WORKERS = 64
# LLVM's passes take most of the time and change no number that is read here: the program never runs
CPU_OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Feeding:
    """Whether a host can make the batches as fast as its devices take them.

    Attributes:
      rows: examples of each batch that a host reads.
      made: examples per second that one thread of this machine makes; None where the data cannot be read here.
      steps: length of an example.
    """

    rows: int
    made: float | None
    steps: int


@dataclasses.dataclass(frozen=True)
class DryRun:
    """Requirements of a run; bytes are per device.

    Attributes:
      devices: number and kind.
      parameters: number of parameters of the model.
      bytes: by kind: weights, optimizer (moments, averages, counts), batch, and the temporaries of the step
        (activations, gradients, code).
      limit_bytes: memory of the device; None if unknown (CPU).
      flops: analytic FLOPs of one step over all devices (without rematerialization).
      seconds: compile time.
      roofline: bound of the step's time; None where the chip is unknown or the program does not fit.
      collectives: of one step; empty where the program does not fit.
      feeding: of the input; None without a roofline.
      estimate: the program was compiled for CPUs, which keep more in float32 and fuse less.
      partial: the compiler was ended once it had assigned the buffers; the temporaries lack the code.

    Example:
      >>> sizes = {"weights": GIB, "optimizer": GIB, "batch": 0, "temporaries": 20 * GIB}
      >>> print(DryRun("8 x TPU v5 lite", 10**9, sizes, 16 * GIB, 3e15, 40.0))
      1,000,000,000 parameters on 8 x TPU v5 lite; 3e+15 FLOPs per step; compiled in 40 s
      each device: 22.00 GiB (weights 1.00 GiB, optimizer 1.00 GiB, batch 0.0 MiB, temporaries 20.00 GiB)
      does not fit in 16.00 GiB
    """

    devices: str
    parameters: int
    bytes: Mapping[str, int]
    limit_bytes: int | None
    flops: float
    seconds: float
    roofline: Roofline | None = None
    collectives: tuple[Collective, ...] = ()
    feeding: Feeding | None = None
    estimate: bool = False
    partial: bool = False

    @property
    def peak_bytes(self) -> int:
        """Memory that a device needs."""
        return sum(self.bytes.values())

    @property
    def state_bytes(self) -> int:
        """Parameters, optimizer state and the rest of the train state."""
        return self.bytes["weights"] + self.bytes["optimizer"]

    @property
    def working_bytes(self) -> int:
        """Memory of the step beside the train state."""
        return self.peak_bytes - self.state_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None if its size is unknown."""
        return None if self.limit_bytes is None else self.peak_bytes <= self.limit_bytes

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in self.bytes.items())
        lines = [
            f"{self.parameters:,} parameters on {self.devices}; {self.flops:.3g} FLOPs per step; "
            f"compiled in {self.seconds:.0f} s",
            f"each device: {_gib(self.peak_bytes)} ({parts})",
        ]
        if self.estimate:
            lines.append("compiled for CPUs: memory and collectives are estimates from above, of arrays in float32")
        if self.partial:
            lines.append("compiled until buffers were assigned, without the code: --dryrun_full compiles to the end")
        if self.collectives:
            rows = [(f"{c.kind} over {'+'.join(c.axes)}", _gib(int(c.bytes)), c.calls) for c in self.collectives[:8]]
            lines.append(format_table(("collectives per step", "size", "calls"), rows))
        if self.roofline is not None:
            lines += _describe(self.roofline)
        if self.roofline is not None and self.feeding is not None:
            lines.append(describe_feeding(self.feeding, self.roofline.seconds))
        if self.limit_bytes is None:
            lines.append("whether that fits is unknown: the memory of this device is not known")
        else:
            lines.append(f"{'fits' if self.fits else 'does not fit'} in {_gib(self.limit_bytes)}")
        return "\n".join(lines)


def _describe(bound: Roofline) -> list[str]:
    terms = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in bound.terms.items())
    return [
        f"a step takes at least {1e3 * bound.seconds:.3g} ms ({terms}); largest term: {bound.largest}; "
        f"MFU at most {100 * bound.mfu:.0f}%",
    ]


def describe_feeding(feeding: Feeding, seconds: float) -> str:
    """A sentence on whether a host can feed its devices at `seconds` per step.

    Example:
      >>> describe_feeding(Feeding(rows=8, made=1000.0, steps=512), 0.1)
      'input: a host needs 40,960 tokens/s; one thread of this machine makes 512,000: enough'
    """
    needed = feeding.rows / seconds
    text = f"input: a host needs {needed * feeding.steps:,.0f} tokens/s"
    if feeding.made is None:
        return f"{text}; the data are not here, so that what it makes is unknown"
    text += f"; one thread of this machine makes {feeding.made * feeding.steps:,.0f}: "
    if feeding.made >= needed:
        return text + "enough"
    workers = math.ceil(needed / feeding.made)
    if workers > MOST_WORKERS:
        return text + f"too few by a factor of {workers:,}: the input bounds the step"
    return text + f"too few; set --config.train.input_workers={workers}"


def dry_run(config: Mapping[str, Any], where: str = "here", *, full: bool = True) -> DryRun:
    """Compiles the sharded train step of a run and reads its costs from the compiled program.

    Nothing is trained or allocated, so a laptop can compile for a pod. For TPUs the compiler's memory is exact; on CPU
    it is that of the CPU program, an estimate.

    Args:
      config: the config of a run; `config.mesh` must fit the devices.
      where: "here" for the devices of this machine (JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 makes eight virtual ones),
        or the devices of `find_devices`: "v5p-128", "v6e:8x8", "tpu7x:2x2x1", "h200:8". `config.mesh.slices` of them.
      full: compile to the end. False ends the compiler for TPUs once buffers are assigned, in a process of its own:
        the same figures but for the size of the code, in a fraction of the time; whether each kernel compiles, and fits
        in the memory on the chip, is not seen.

    Raises:
      RunError: a config that cannot be built, an unknown topology, or no libtpu to compile for it.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    elsewhere = where != "here" and where.partition(":")[0] not in GPUS
    return run_apart(config, where) if elsewhere and not full else compile_step(config, where, full=True)


def compile_step(config: dict[str, Any], where: str, *, full: bool) -> DryRun:
    """`dry_run` in this process, whose compiler keeps running in a thread if not `full`."""
    devices = find_devices(where, max(config.get("mesh", {}).get("slices", 0), 1))
    run = build_run(config, devices=devices)
    kind = GPUS.get(where.partition(":")[0], devices[0].device_kind)
    chip, cpu = find_chip(kind), devices[0].platform == "cpu"
    started = time.monotonic()
    with mesh_scope(run.mesh):
        lowered, held = lower_step(run)
        needed, program, limit = _compile(lowered, run, held, full)
    seconds = time.monotonic() - started
    flops = step_flops(run)
    bound = None
    if program is not None and chip is not None:
        bound = _bound(run, program, chip, flops, needed if cpu else None)
    return DryRun(
        devices=f"{len(devices)} x {kind}",
        parameters=run.model.size(),
        bytes=needed,
        limit_bytes=limit or (chip.memory if chip else None),
        flops=flops,
        seconds=seconds,
        roofline=bound,
        collectives=program.collectives if program else (),
        feeding=_feeding(run) if bound else None,
        estimate=cpu and chip is not None,
        partial=not full and program is not None,
    )


def step_flops(run: Run) -> float:
    """Analytic FLOPs of one step over all devices, without rematerialization."""
    model = run.config["model"]
    tokens = run.config["train"]["batch_size"] * run.task.steps
    return tokens * flops_per_token(model, run.model.matrix_size(without=looked_up(model)), run.task.steps)


def _bound(run: Run, program: Program, chip: Chip, flops: float, needed: Mapping[str, int] | None) -> Roofline:
    """The roofline of a compiled step; `needed` replaces the traffic of a program for CPUs."""
    devices, model = run.mesh.size, run.config["model"]
    computed = program.flops
    if program.kernels:
        # the text of a kernel does not show its FLOPs
        matrices = 6.0 * run.model.matrix_size(without=looked_up(model))
        tokens = run.config["train"]["batch_size"] * run.task.steps
        passes = 4 / 3 if model.get("remat") else 1.0
        computed += passes * max(flops - matrices * tokens, 0.0) / devices
    # loops whose trip count depends on data are counted once
    computed = max(computed, flops / devices)
    # every value of the state and of the temporaries is written once and read once
    traffic = program.bytes if needed is None else 2.0 * sum(needed.values())
    return roofline(
        chip,
        run.mesh,
        flops=computed,
        bytes=traffic,
        collectives=program.collectives,
        model_flops=flops / devices,
    )


def lower_step(run: Run) -> tuple[jax.stages.Lowered, dict[str, int]]:
    """Lowers the train step of a run (inside `mesh_scope(run.mesh)`); also returns its bytes per device by kind."""
    train, ema = run.config["train"], run.config["optimizer"]["ema"]
    state = abstract_state(run.model, run.tx, run.mesh, ema)
    step = make_train_step(run.model, run.tx, run.schedule, run.mesh, train, ema)
    batch = _abstract_batch(run)
    weights = {name: state[name] for name in ("params", "rest") if name in state}
    others = {name: part for name, part in state.items() if name not in weights}
    held = {"weights": _shard_bytes(weights), "optimizer": _shard_bytes(others), "batch": _shard_bytes(batch)}
    return step.lower(state, batch), held


def _shard_bytes(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _abstract_batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    arrays = {}
    for name, extra in batch_arrays(run.task).items():
        shape = (run.config["train"]["batch_size"], *extra.shape)
        sharding = batch_sharding(name, shape, run.mesh)
        arrays[name] = jax.ShapeDtypeStruct(shape, np.dtype(extra.dtype), sharding=sharding)
    return arrays


def _compile(
    lowered: jax.stages.Lowered, run: Run, held: Mapping[str, int], full: bool = True
) -> tuple[dict[str, int], Program | None, int | None]:
    """Bytes per device by kind, the program, and the compiler's limit; no program where the memory overflows."""
    known = sum(held.values())
    cpu = run.mesh.devices.flat[0].platform == "cpu"
    try:
        total, text = compile_whole(lowered, CPU_OPTIONS if cpu else None) if full else compile_to_buffers(lowered)
    except jax.errors.JaxRuntimeError as error:
        found = OVERFLOW.search(str(error)) or OVERFLOW_TEMPORARIES.search(str(error))
        if found is None:
            raise
        used, available = _bytes(*found.group(1, 2)), _bytes(*found.group(3, 4))
        return {**held, "temporaries": max(used - known, 0)}, None, available
    return {**held, "temporaries": max(total - known, 0)}, read_program(text, run.mesh), None


def _feeding(run: Run) -> Feeding:
    size = run.config["train"]["batch_size"]
    first = run.mesh.devices.flat[0].process_index
    own = [device for device in run.mesh.devices.flat if device.process_index == first]
    rows = len(batch_layout(batch_shapes(run.task, size), run.mesh, own).rows)
    return Feeding(rows, _examples_per_second(run.task, run.config["seed"], min(rows, 64)), run.task.steps)


def _examples_per_second(task: Task, seed: int, rows: int) -> float | None:
    """Examples per second that one thread makes, over a quarter of a second; None where the data are missing."""
    try:
        loader = make_loader(task, "train", batch_size=rows, seed=seed, prefetch=0)
        next(loader)
    except (ImportError, OSError, ValueError):
        return None
    count, started = 0, time.monotonic()
    while time.monotonic() - started < 0.25:
        next(loader)
        count += rows
    loader.close()
    return count / (time.monotonic() - started)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"
