"""Dry runs of the presets on pods: docs/scaling.md.

    JAX_PLATFORMS=cpu python -m benchmarks.scaling [--model NAME ...] [--memory NAME ...] [--target NAME ...] [--again]
                                                   [--limit SECONDS]

One row per model size, memory and slice: the memory of a device and the bound of the step, read from the compiled
program (memformer.training.dryrun). Nothing is trained. Needs libtpu; in place of GPUs virtual CPUs are compiled for.
Each row is written when it is done, to benchmarks/results/scaling.json; rerun the command to resume.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from memformer.models import PRESETS, preset_fields
from memformer.training.config import RunError, default_config
from memformer.training.dryrun import DryRun, dry_run
from memformer.training.topology import GPUS

__all__ = ["MODELS", "OUT", "PAGE", "TARGETS", "Target", "make_page", "measure", "run_config"]

OUT = pathlib.Path(__file__).parent / "results" / "scaling.json"
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "scaling.md"

# Target: devices, and rows of the batch per device.
Target = tuple[int, int]
TARGETS: dict[str, Target] = {"v5p-128": (64, 8), "v5e-256": (256, 2), "v6e-256": (256, 4), "h200:8": (8, 8)}
MODELS = tuple(name for name in PRESETS if name not in ("tiny", "mini_10m"))
MEMORIES = (
    "softmax_attention", "gated_delta_rule", "gla", "kda", "deltaformer", "linear_attention", "ssd", "delta_rule",
)  # fmt: skip
LENGTH, VOCABULARY = 2048, 32768


def run_config(model: str, memory: str, target: str, length: int = LENGTH) -> dict[str, Any]:
    """The config of a row: all devices over fsdp, 2048 tokens per example, a vocabulary of 32,768."""
    devices, rows = TARGETS[target]
    config = default_config(task="mqar")
    config.task.update({"length": length, "vocab_size": VOCABULARY, "pairs": 4})
    config.model.update({**preset_fields(model), "memory": memory})
    config.mesh.update({"data": 1, "fsdp": devices})
    config.train.batch_size = devices * rows
    return config.to_dict()


def measure(model: str, memory: str, target: str, length: int = LENGTH) -> dict[str, Any]:
    """One row, by dry run."""
    found = dry_run(run_config(model, memory, target, length), target, full=False)
    row = {"model": model, "memory": memory, "target": target, "length": length, "rows": TARGETS[target][1]}
    return {**row, **_figures(found)}


def _figures(found: DryRun) -> dict[str, Any]:
    row: dict[str, Any] = {"parameters": found.parameters, "fits": found.fits, "seconds": round(found.seconds, 1)}
    row["gib"] = {name: round(size / 2**30, 3) for name, size in found.bytes.items()}
    bound = found.roofline
    if bound is not None:
        row["step"] = bound.seconds
        row["terms"] = {"compute": bound.terms["compute"], "memory": bound.terms["memory"], "network": bound.network}
        row["mfu"] = round(bound.mfu, 3)
    return row


def list_rows(models: Iterable[str], memories: Iterable[str], targets: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Model, memory and target of each row; GPUs, of which the figures are estimates, come last."""
    for gpus in (False, True):
        for memory, target in itertools.product(memories, targets):
            if (target.partition(":")[0] in GPUS) == gpus:
                yield from ((model, memory, target) for model in models)


def make_page(rows: list[dict[str, Any]]) -> str:
    """The page of these rows.

    Example:
      >>> row = {"model": "small", "memory": "gla", "target": "v5e-256", "length": 2048, "rows": 2, "fits": True}
      >>> row |= {"parameters": 2 * 10**8, "gib": {"weights": 1.0, "temporaries": 2.0}, "step": 0.1, "mfu": 0.5}
      >>> row |= {"terms": {"compute": 0.1, "memory": 0.02, "network": 0.01}}
      >>> make_page([row]).splitlines()[-1]
      '| small | 0.20 B | gla | 2 | 3.0 | 1.0 | 100 ms | compute | 10.5 M | 50% |'
    """
    lines = [INTRODUCTION]
    for target, (devices, _) in TARGETS.items():
        found = [row for row in rows if row["target"] == target]
        if not found:
            continue
        note = " (compiled for CPUs, an estimate)" if target.partition(":")[0] in GPUS else ""
        lines += [f"## {target}: {devices} devices{note}", "", HEADER]
        order = {name: i for i, name in enumerate((*MODELS, *MEMORIES))}
        found.sort(key=lambda row: (order.get(row["model"], 99), order.get(row["memory"], 99)))
        lines += [_line(row, devices) for row in found] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _line(row: dict[str, Any], devices: int) -> str:
    total, state = sum(row["gib"].values()), row["gib"]["weights"] + row["gib"].get("optimizer", 0.0)
    cells = [row["model"], f"{row['parameters'] / 1e9:.2f} B", row["memory"], str(row["rows"])]
    cells += [f"{total:.1f}" + ("" if row["fits"] else " (does not fit)"), f"{state:.1f}"]
    if "step" in row:
        largest = max(row["terms"], key=lambda name: row["terms"][name])
        tokens = devices * row["rows"] * row["length"] / row["step"]
        cells += [f"{1e3 * row['step']:.0f} ms", largest, f"{tokens / 1e6:.1f} M", f"{100 * row['mfu']:.0f}%"]
    else:
        cells += ["-"] * 4
    return f"| {' | '.join(cells)} |"


INTRODUCTION = """# What fits, and how fast it can be

Dry runs of the presets of `memformer/models/presets.py` with examples of 2048 tokens, a vocabulary of 32,768, AdamW in
float32 and all devices over fsdp. Written by `JAX_PLATFORMS=cpu python -m benchmarks.scaling`; rows that are not here
have not been compiled yet, and the same command adds them. For your own run:

    python train.py --config=configs/CONFIG.py --dryrun=v5p-128

"Step" is a lower bound, not a measurement: the largest of arithmetic, memory traffic and collectives at the peak rates
of the chips (memformer/training/chips.py), each read from the compiled program with loops counted. "MFU" is the model
FLOPs utilization of such a step. The memory is libtpu's own count for TPUs. In place of GPUs a program for CPUs is
read: its arrays are in float32 where a GPU's are in bfloat16, and its traffic is taken to be the train state and the
temporaries, each written and read once.

The TPU compiler is ended once it has assigned the buffers, as for `--dryrun` unless `--dryrun_full` is given: what
follows, the scheduling of instructions, takes nine tenths of the time and adds nothing to this table but the size of
the code, some tens of MiB. The FLOPs of Pallas kernels are counted from the model; that the kernels compile for each
TPU is in benchmarks/results/tpu-compile.json.
"""
HEADER = """| model | parameters | memory | rows per device | GiB per device | of it state | step at least | largest term | tokens/s at most | MFU at most |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""  # noqa: E501


def read(path: pathlib.Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Reads the rows of a file by model, memory and target."""
    rows = json.loads(path.read_text()) if path.exists() else []
    return {(row["model"], row["memory"], row["target"]): row for row in rows}


def main(arguments: list[str]) -> None:
    """Compiles the chosen rows, and writes each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--memory", action="append", help=f"default: {', '.join(MEMORIES)}")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--again", action="store_true", help="compile rows that the file already has")
    parser.add_argument("--limit", type=float, default=math.inf, help="start no row after so many seconds")
    options = parser.parse_args(arguments)
    # before JAX's first use of a device
    jax.config.update("jax_num_cpu_devices", 8)
    started = time.monotonic()
    for key in list_rows(options.model or MODELS, options.memory or MEMORIES, options.target or TARGETS):
        if key in read(OUT) and not options.again:
            continue
        if time.monotonic() - started > options.limit:
            break
        try:
            row = measure(*key)
        except (RunError, RuntimeError) as error:
            print(f"{' '.join(key)}: {str(error)[:300]}", flush=True)
            continue
        row |= {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
        found = list((read(OUT) | {key: row}).values())
        OUT.write_text("[\n" + ",\n".join(json.dumps(x) for x in found) + "\n]\n")
        PAGE.write_text(make_page(found))
        print(_line(row, TARGETS[key[2]][0]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
