"""A train step of 1.3 billion parameters by the TPU kernels, compiled for chips that need not be there.

    python -m benchmarks.tpu_train_step [MEMORY ...] [--topology v5e:4x4] [--out FILE.json]

For every memory and mesh: parameters, memory a device needs, which kernels the compiled program calls, and arrays of
activations that it gathers (there should be none: every chip calls the kernels for its own rows and heads). Needs
libtpu, as benchmarks/tpu_static.py does; a program takes minutes to compile on two cores.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import sys
import time
from typing import Any

from benchmarks.tpu_static import prepare_compiler
from memformer.training.build import build_run
from memformer.training.config import default_config
from memformer.training.dryrun import find_devices, lower_step
from memformer.training.sharding import mesh_scope

__all__ = ["MESHES", "Step", "compile_step", "step_config"]

# Devices over data, fsdp and tensor.
MESHES = {"v5e:4x4": (2, 4, 2), "v5p:2x2x2": (2, 2, 2)}

MEMORIES = ("delta_rule", "gated_delta_rule", "linear_attention", "retnet", "delta_product", "deltaformer")

# xlarge_1300m of memformer/models/presets.py; a length that is no other size of it, so that arrays over time are known.
MODEL = {"width": 2048, "depth": 24, "heads": 16, "remat": "full", "dtype": "bfloat16", "scan_layers": True}
LENGTH = 3072


@dataclasses.dataclass(frozen=True)
class Step:
    """What the compiled train step is.

    Attributes:
      parameters: of the model.
      gib: memory a device needs.
      kernels: names of the library's kernels that it calls.
      gathers: shapes of arrays with a time axis that it gathers.
      seconds: to compile.
    """

    parameters: int
    gib: float
    kernels: tuple[str, ...]
    gathers: tuple[str, ...]
    seconds: float


def step_config(memory: str, mesh: tuple[int, int, int], length: int, **model: Any) -> dict[str, Any]:
    """The config of a run on packed text, one row a device."""
    config = default_config()
    config.task = {"name": "text", "length": length}
    config.model.update({"memory": memory, **model})
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    config.train.batch_size = mesh[0] * mesh[1]
    return config.to_dict()


def compile_step(config: dict[str, Any], topology: str) -> Step:
    """Compiles the step of a run for a topology such as "v5e:4x4"."""
    started = time.monotonic()
    run = build_run(config, devices=find_devices(topology))
    with mesh_scope(run.mesh):
        compiled = lower_step(run)[0].compile()
    need: Any = compiled.memory_analysis()
    size = need.argument_size_in_bytes + need.output_size_in_bytes - need.alias_size_in_bytes + need.temp_size_in_bytes
    text = compiled.as_text() or ""
    gathered = re.findall(r"= \(?(\w+\[[\d,]*\]).* all-gather(?:-start)?\(", text)
    return Step(
        parameters=run.model.size(),
        gib=round(size / 2**30, 2),
        kernels=tuple(sorted(set(re.findall(r"memformer_\w+?_(?:forward|backward)", text)))),
        gathers=tuple(shape for shape in gathered if str(run.task.steps) in re.findall(r"\d+", shape)),
        seconds=round(time.monotonic() - started, 1),
    )


def main(arguments: list[str]) -> None:
    """Prints the table, and writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memories", nargs="*", help=f"default: {', '.join(MEMORIES)}")
    parser.add_argument("--topology", action="append", choices=list(MESHES), help="default: all")
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args(arguments)
    prepare_compiler()
    rows = []
    for topology in options.topology or MESHES:
        for memory in options.memories or MEMORIES:
            step = compile_step(step_config(memory, MESHES[topology], LENGTH, **MODEL), topology)
            rows.append({"memory": memory, "topology": topology} | dataclasses.asdict(step))
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            if options.out:
                pathlib.Path(options.out).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
