"""Compiles training steps of 1.3 billion parameters with the TPU kernels, without a TPU.

    python -m benchmarks.tpu.train_step [MEMORY ...] [--topology v5e:4x4] [--again] [--out FILE.json]

For every memory and mesh: parameters, the memory that a device needs and has, the kernels that the compiled program
calls, and the activations that it gathers beside the tokens of its own rows, which the tensor axis divides between
layers (none are expected: every chip runs the kernels on its own rows and heads).
Each row is written when it is done; rerun the command to resume. Needs libtpu, as benchmarks/tpu/static.py does; a
program takes minutes to compile on two cores.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import re
import sys
import time
from typing import Any

import jax

from benchmarks.tpu.static import prepare_compiler
from memformer.training.build import build_run
from memformer.training.chips import GIB, find_chip
from memformer.training.config import default_config
from memformer.training.dryrun import lower_step
from memformer.training.sharding import mesh_scope
from memformer.training.topology import find_devices

__all__ = ["MESHES", "OUT", "Step", "compile_step", "step_config"]

OUT = pathlib.Path(__file__).parents[1] / "results" / "tpu-train-step.json"

# Devices over data, fsdp and tensor.
MESHES = {"v5e:4x4": (2, 4, 2), "v5p:2x2x2": (2, 2, 2)}

MEMORIES = ("gated_delta_rule", "deltaformer", "linear_attention", "delta_product", "softmax_attention", "delta_rule")

# xlarge_1300m of memformer/models/presets.py. The length equals no other size of the model, which identifies arrays
# with a time axis.
MODEL = {"width": 2048, "depth": 24, "heads": 16, "remat": "full", "dtype": "bfloat16", "scan_layers": True}
LENGTH = 3072


@dataclasses.dataclass(frozen=True)
class Step:
    """Properties of a compiled training step.

    Attributes:
      parameters: number of parameters of the model.
      gib: memory per device, in GiB.
      kernels: names of the library's kernels that it calls.
      gathers: shapes of the gathered arrays that have a time axis, without the layer inputs [rows, T, D] of a device.
      seconds: compilation time.
    """

    parameters: int
    gib: float
    kernels: tuple[str, ...]
    gathers: tuple[str, ...]
    seconds: float


def step_config(memory: str, mesh: tuple[int, int, int], length: int, **model: Any) -> dict[str, Any]:
    """Config of a run on packed text with one batch row per device."""
    config = default_config()
    config.task = {"name": "text", "length": length}
    config.model.update({"memory": memory, **model})
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    config.train.batch_size = mesh[0] * mesh[1]
    return config.to_dict()


def compile_step(config: dict[str, Any], topology: str) -> Step:
    """Compiles the training step of a run for a topology such as "v5e:4x4"."""
    started = time.monotonic()
    run = build_run(config, devices=find_devices(topology))
    with mesh_scope(run.mesh):
        compiled = lower_step(run)[0].compile()
    # one row per device, see step_config
    own = [run.task.steps, config["model"]["width"]]
    need: Any = compiled.memory_analysis()
    size = need.argument_size_in_bytes + need.output_size_in_bytes - need.alias_size_in_bytes + need.temp_size_in_bytes
    text = compiled.as_text() or ""
    gathered = re.findall(r"= \(?(\w+\[[\d,]*\]).* all-gather(?:-start)?\(", text)
    return Step(
        parameters=run.model.size(),
        gib=round(size / 2**30, 2),
        kernels=tuple(sorted(set(re.findall(r"memformer_\w+?_(?:forward|backward)", text)))),
        gathers=tuple(shape for shape in gathered if run.task.steps in _sizes(shape) and _sizes(shape) != own),
        seconds=round(time.monotonic() - started, 1),
    )


def _sizes(shape: str) -> list[int]:
    """Sizes above 1 of a shape such as "bf16[1,448,256]"."""
    return [int(size) for size in re.findall(r"\d+", shape[shape.index("[") :]) if int(size) > 1]


def measure(memory: str, topology: str) -> dict[str, Any]:
    """Row of one step, or of the error that its compilation raised."""
    config = step_config(memory, MESHES[topology], LENGTH, **MODEL)
    row: dict[str, Any] = {"memory": memory, "topology": topology, "ok": False}
    row["mesh"] = dict(zip(("data", "fsdp", "tensor"), MESHES[topology], strict=True))
    kind = find_devices(topology)[0].device_kind
    chip = find_chip(kind)
    limit = chip.memory // GIB if chip else 0
    row |= {"rows": config["train"]["batch_size"], "length": LENGTH, "limit": limit}
    try:
        step = compile_step(config, topology)
    except jax.errors.JaxRuntimeError as error:
        return row | {"error": str(error)[:500]}
    return row | dataclasses.asdict(step) | {"ok": step.gib <= limit and bool(step.kernels) and not step.gathers}


def read(path: pathlib.Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Reads the rows of a file by memory and topology."""
    rows = json.loads(path.read_text()) if path.exists() else []
    return {(row["memory"], row["topology"]): row for row in rows}


def main(arguments: list[str]) -> None:
    """Compiles the chosen rows, and writes each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memories", nargs="*", help=f"default: {', '.join(MEMORIES)}")
    parser.add_argument("--topology", action="append", choices=list(MESHES), help="default: all")
    parser.add_argument("--again", action="store_true", help="compile rows that the file already has")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help=f"default: {OUT.name} of benchmarks/results")
    options = parser.parse_args(arguments)
    prepare_compiler()
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    for memory in options.memories or MEMORIES:
        for topology in options.topology or MESHES:
            if not options.again and read(options.out).get((memory, topology), {}).get("ok"):
                continue
            row = measure(memory, topology)
            row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            found = read(options.out) | {(memory, topology): row | versions}
            options.out.write_text("[\n" + ",\n".join(json.dumps(x) for x in found.values()) + "\n]\n")
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
