"""Candidates for the sizes of the GPU kernels of matrix memories, for `python -m benchmarks.tune gpu`.

An entry is a group of kernels, compiled for the delta rule with a decay, K = V = 128, bfloat16, packed; its candidates
are values of names of memformer/pallas/gpu/tuning.py. The cost is the estimate of sass.py for one chunk of one head and
all value columns, summed over the kernels of the entry. It needs nvdisasm beside ptxas. A spill, a serialized product
or too much shared memory is a fault. Of equal candidates the one whose kernels need fewest registers is chosen.

    scan        chunks in shared memory, and registers of the computing warpgroups and of the copying one
    gradients   value columns per program of the gradients within chunks
    channel     value columns per program of the scans of a decay per key channel

    cycles      of each kernel, by name, per chunk and head
    most        registers of the kernel that needs most
    seconds     to compile
"""

import functools
import importlib.metadata
import pathlib
import time
from typing import Any

from benchmarks.cases import Case
from benchmarks.gpu.static import hash_sources, report
from memformer.pallas.gpu import tuning

__all__ = ["ENTRIES", "OUT", "TOLERANCE", "measure", "rank", "versions"]

OUT = pathlib.Path(__file__).parents[1] / "results" / "gpu-tune.json"

# Estimates of equal programs do not differ; those of nearly equal ones mean little.
TOLERANCE = 0.01

# More blocks of value columns than multiprocessors: two computing warpgroups per program.
HEAD = Case("delta_rule", 4, 256, 32, 1, decay="head", segments=2)
CHANNEL = Case("delta_rule", 4, 256, 32, 1, decay="channel", segments=2)

# By entry: the case, the beginnings of its kernels' names, and value columns per program, by the sizes.
KERNELS = {
    "scan": (HEAD, ("chunk_scan",), lambda sizes: 128),
    "gradients": (HEAD, ("intra_chunk_backward",), lambda sizes: sizes["VALUE_PART"]),
    "channel": (CHANNEL, ("channel_chunk_scan",), lambda sizes: sizes["CHANNEL_VALUES"]),
}

CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "scan": [
        {"SCAN_SLOTS": 2, "SCAN_REGISTERS": [240, 24]},
        {"SCAN_SLOTS": 2, "SCAN_REGISTERS": [232, 40]},
        {"SCAN_SLOTS": 3, "SCAN_REGISTERS": [240, 24]},
    ],
    "gradients": [{"VALUE_PART": 128}, {"VALUE_PART": 64}],
    "channel": [{"CHANNEL_VALUES": 64}, {"CHANNEL_VALUES": 32}],
}


def _entries() -> dict[str, list[dict[str, Any]]]:
    entries = {}
    for name, candidates in CANDIDATES.items():
        table = {key: getattr(tuning, key) for key in candidates[0]}
        table = {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}
        entries[name] = [table, *(sizes for sizes in candidates if sizes != table)]
    return entries


ENTRIES = _entries()


@functools.cache
def versions() -> dict[str, str]:
    """The compiler, and a hash of the sources of the kernels."""
    return {"compiler": f"jax {importlib.metadata.version('jax')}", "source": hash_sources(table=False)}


def rank(row: dict[str, Any]) -> float:
    """Order of candidates of equal cost, least first: registers."""
    return row["most"]


def measure(entry: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Compiles one candidate: cost, seconds, fault and figures.

    Raises:
      FileNotFoundError: no nvdisasm.
    """
    started = time.monotonic()
    case, names, columns = KERNELS[entry]
    rows = list(report([case], sizes))
    faults = [f"{row['kernel']}: {row['fault']}" for row in rows if row["fault"]]
    prefixes = tuple(f"memformer_{case.op}_{name}" for name in names)
    rows = [row for row in rows if row["kernel"] and row["kernel"].startswith(prefixes)]
    if any("loop" not in row for row in rows):
        raise FileNotFoundError("nvdisasm not found beside ptxas: install the wheel nvidia-cuda-nvdisasm")
    cycles: dict[str, int] = {}
    for row in rows:
        # Kernels of a call with and without gradients have one name; the slower one counts.
        warpgroups = 1 + (entry == "scan")
        once = row["loop"]["cycles"][warpgroups - 1] * 128 // columns(sizes)
        cycles[row["kernel"]] = max(once, cycles.get(row["kernel"], 0))
    figures = {"cycles": cycles, "most": max((row["registers"] or 0 for row in rows), default=0)}
    cost = {"cost": float(sum(cycles.values())) or None, "fault": "; ".join(faults)[:500] or None}
    return cost | figures | {"seconds": round(time.monotonic() - started, 1)}
