"""Every TPU kernel through the real compiler, at the large shapes, on a machine without a TPU.

    python -m benchmarks.tpu_compile [NAME ...] [--topology v5p:2x2x1] [--again] [--out FILE.json]

Needs the libtpu wheel, as benchmarks/tpu_static.py does. Each row is one op at one shape, dtype and chip, forward and
backward in one program, through the output and the state:

    ok        the compiler took it, and the program calls every kernel that the op is made of, by name
    vmem      MiB of VMEM of the kernel that holds most, blocks that are on their way (double buffering) included
    limit     MiB of VMEM a core of the chip has
    seconds   to trace, lower and compile

A row is written when it is done, and a second start takes up what is missing or failed; --again compiles all that is
asked for anew. All of it takes hours of one core. NAME is an op, or part of a row's name ("delta_rule", "256x256").
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from benchmarks.tpu_schedule import scoped_memory
from benchmarks.tpu_static import TOPOLOGIES, Case, compile_case, make_mesh, prepare_compiler

__all__ = ["OUT", "ROWS", "kernels"]

OUT = pathlib.Path(__file__).parent / "results" / "tpu-compile.json"

# DeltaFormer writes by kernels of its own and reads by those of attention; delta_product is the delta rule's.
PARTS = {
    "delta_product": ("delta_rule",),
    "deltaformer": ("write", "attention"),
    "softmax_attention": ("attention",),
}

OPS: dict[str, dict[str, Any]] = {
    "linear_attention": {"op": "linear_attention"},
    "linear_attention decay": {"op": "linear_attention", "decay": True},
    "delta_rule": {"op": "delta_rule"},
    "delta_rule decay": {"op": "delta_rule", "decay": True},
    "delta_product decay": {"op": "delta_product", "decay": True, "steps": 2},
    "deltaformer softmax": {"op": "deltaformer", "write": "softmax"},
    "softmax_attention": {"op": "softmax_attention"},
}

# Batch, length, heads, groups, key, value; the first is where a chip's time goes.
SHAPES = {
    "1x8192x16x128": (1, 8192, 16, 16, 128, 128),
    "2x4096x4x128": (2, 4096, 4, 4, 128, 128),
    "1x1000x3x64/96": (1, 1000, 3, 3, 64, 96),
    "1x4096x4x256": (1, 4096, 4, 4, 256, 256),
}

WRITES = {f"deltaformer {write}": {"op": "deltaformer", "write": write} for write in ("linear", "round", "relu")}


def _rows() -> dict[str, Case]:
    rows = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        for shape, sizes in SHAPES.items():
            writes = WRITES if shape == "2x4096x4x128" else {}
            for op, options in (OPS | writes).items():
                case = Case(options["op"], *sizes, dtype)
                rest = {key: value for key, value in options.items() if key != "op"}
                rows[f"{op} {shape} {jnp.dtype(dtype).name}"] = dataclasses.replace(case, **rest)
    return rows


ROWS = _rows()


def kernels(op: str) -> list[str]:
    """Names of the kernels of an op, forward and backward."""
    return [f"memformer_{part}_{way}" for part in PARTS.get(op, (op,)) for way in ("forward", "backward")]


def measure(case: Case, topology: str) -> dict[str, Any]:
    """Compiles one case."""
    started = time.monotonic()
    with jax.set_mesh(make_mesh(topology)):
        limit = pltpu.get_tpu_info().vmem_capacity_bytes
    row: dict[str, Any] = {"ok": False, "limit": limit // 2**20}
    try:
        text = compile_case(case, topology).as_text()
        memory = {kernel: scoped_memory(text, kernel) for kernel in kernels(case.op)}
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        row["error"] = str(error)[:500]
    else:
        row["vmem"] = round(max(memory.values()) / 2**20, 1)
        row["kernels"] = {name.removeprefix("memformer_"): round(size / 2**20, 1) for name, size in memory.items()}
        row["ok"] = max(memory.values()) < limit
    return row | {"seconds": round(time.monotonic() - started, 1)}


def main(arguments: list[str]) -> None:
    """Compiles what is asked for, and writes each row when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="part of a row's name; default: all")
    parser.add_argument("--topology", action="append", help=f"default: {', '.join(TOPOLOGIES)}")
    parser.add_argument("--again", action="store_true", help="also what the file has")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help=f"default: {OUT.name} of benchmarks/results")
    options = parser.parse_args(arguments)
    prepare_compiler()
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    for name, case in ROWS.items():
        if options.names and not any(part in name for part in options.names):
            continue
        for topology in options.topology or TOPOLOGIES:
            found = read(options.out)
            if not options.again and found.get((name, topology), {}).get("ok"):
                continue
            row = {"row": name, "topology": topology} | measure(case, topology)
            row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            found = read(options.out) | {(name, topology): row | versions}
            options.out.write_text("[\n" + ",\n".join(json.dumps(x) for x in found.values()) + "\n]\n")
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def read(path: pathlib.Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a file, by name and topology."""
    rows = json.loads(path.read_text()) if path.exists() else []
    return {(row["row"], row["topology"]): row for row in rows}


if __name__ == "__main__":
    main(sys.argv[1:])
