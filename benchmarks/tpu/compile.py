"""Compiles every TPU kernel at the large shapes by the real TPU compiler, without a TPU.

    python -m benchmarks.tpu.compile [NAME ...] [--topology v5p:2x2x1] [--again] [--out FILE.json]

Needs the libtpu wheel, as benchmarks/tpu/static.py does. Each row is one op at one shape, dtype and chip: forward and
backward in one program, through the output and the state.

    ok        the program compiles and calls every kernel of the op by name
    vmem      MiB of VMEM of the largest kernel, double-buffered blocks included
    limit     MiB of VMEM per core of the chip
    seconds   to trace, lower and compile

Each row is written when it is done. Rerun the command to resume: rows that are missing or failed are compiled; --again
compiles all. The whole table takes hours of one core. NAME is an op, or part of a row's name ("delta_rule", "256x256").
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
from jax.experimental.pallas import tpu as pltpu

from benchmarks.cases import Case
from benchmarks.tpu.schedule import scoped_memory
from benchmarks.tpu.static import TOPOLOGIES, compile_case, decodes, make_mesh, prepare_compiler

__all__ = ["OUT", "ROWS", "kernels"]

OUT = pathlib.Path(__file__).parents[1] / "results" / "tpu-compile.json"

# DeltaFormer writes with kernels of its own and reads with those of attention; delta_product uses the delta rule's.
PARTS = {
    "delta_product": ("delta_rule",),
    "deltaformer": ("write", "attention"),
    "softmax_attention": ("attention",),
}

OPS: dict[str, dict[str, Any]] = {
    "linear_attention": {"op": "linear_attention"},
    "linear_attention decay": {"op": "linear_attention", "decay": "head"},
    "delta_rule": {"op": "delta_rule"},
    "delta_rule decay": {"op": "delta_rule", "decay": "head"},
    "linear_attention channel": {"op": "linear_attention", "decay": "channel"},
    "delta_rule channel": {"op": "delta_rule", "decay": "channel"},
    "delta_product decay": {"op": "delta_product", "decay": "head", "steps": 2},
    "deltaformer softmax": {"op": "deltaformer", "write": "softmax"},
    "deltaformer softmax decay": {"op": "deltaformer", "write": "softmax", "decay": "head"},
    "softmax_attention": {"op": "softmax_attention"},
    "softmax_attention decay": {"op": "softmax_attention", "decay": "head"},
}

# Batch, length, heads, groups, key, value; the first is the typical training shape.
SHAPES = {
    "1x8192x16x128": (1, 8192, 16, 16, 128, 128),
    "2x4096x4x128": (2, 4096, 4, 4, 128, 128),
    "1x1000x3x64/96": (1, 1000, 3, 3, 64, 96),
    "1x4096x4x256": (1, 4096, 4, 4, 256, 256),
}

WRITES = {f"deltaformer {write}": {"op": "deltaformer", "write": write} for write in ("linear", "round", "relu")}


def _rows() -> dict[str, Case]:
    rows = {}
    for dtype in ("bfloat16", "float32"):
        for shape, sizes in SHAPES.items():
            writes = WRITES if shape == "2x4096x4x128" else {}
            for op, options in (OPS | writes).items():
                case = Case(options["op"], *sizes, dtype)
                rest = {key: value for key, value in options.items() if key != "op"}
                rows[f"{op} {shape} {dtype}"] = dataclasses.replace(case, **rest)
    return rows


ROWS = _rows()


def kernels(case: Case) -> list[str]:
    """Names of the kernels of a case, forward and backward; of the one that decodes a few tokens."""
    if decodes(case):
        return [f"memformer_{case.op}_decode"]
    own = "channel_" if case.decay == "channel" else ""
    parts = PARTS.get(case.op, (case.op,))
    return [f"memformer_{own}{part}_{way}" for part in parts for way in ("forward", "backward")]


def measure(case: Case, topology: str) -> dict[str, Any]:
    """Compiles one case and returns its row."""
    started = time.monotonic()
    with jax.set_mesh(make_mesh(topology)):
        limit = pltpu.get_tpu_info().vmem_capacity_bytes
    row: dict[str, Any] = {"ok": False, "limit": limit // 2**20}
    try:
        text = compile_case(case, topology).as_text()
        memory = {kernel: scoped_memory(text, kernel) for kernel in kernels(case)}
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        row["error"] = str(error)[:500]
    else:
        row["vmem"] = round(max(memory.values()) / 2**20, 1)
        row["kernels"] = {name.removeprefix("memformer_"): round(size / 2**20, 1) for name, size in memory.items()}
        row["ok"] = max(memory.values()) < limit
    return row | {"seconds": round(time.monotonic() - started, 1)}


def main(arguments: list[str]) -> None:
    """Compiles the chosen rows, and writes each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of row names (default: all)")
    parser.add_argument("--topology", action="append", help=f"default: {', '.join(TOPOLOGIES)}")
    parser.add_argument("--again", action="store_true", help="compile rows that the file already has")
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
    """Reads the rows of a file by name and topology."""
    rows = json.loads(path.read_text()) if path.exists() else []
    return {(row["row"], row["topology"]): row for row in rows}


if __name__ == "__main__":
    main(sys.argv[1:])
