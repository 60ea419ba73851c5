"""Candidates for the table of sizes of the TPU kernels, for `python -m benchmarks.tune tpu`.

An entry is a kernel of a matrix memory on one chip, K = V = 128, bfloat16; its candidates are heads per program, and
how many of them are computed interleaved. The cost is bundles per token and head, forward and backward together. More
heads give the scheduler more independent work, and more values to hold: where costs are equal, the candidate with the
fewest spills is chosen, because the schedule does not know what the copies of the next chunk leave of VMEM's bandwidth.

    forward, backward   bundles per token and head
    spills              vector registers stored for lack of registers, per chunk and head, forward / backward
    vmem                MiB of VMEM of the larger kernel
    seconds             CPU seconds to compile both kernels
"""

import dataclasses
import functools
import importlib.metadata
import pathlib
import tempfile
import time
from typing import Any

import jax

from benchmarks.cases import Case
from benchmarks.gpu.static import hash_sources
from benchmarks.tpu.static import matrix_rows, prepare_compiler
from memformer.pallas.tpu import tuning

__all__ = ["ENTRIES", "OUT", "TOLERANCE", "measure", "rank", "versions"]

ROOT = pathlib.Path(__file__).parents[2]
OUT = ROOT / "benchmarks" / "results" / "tpu-tune.json"

# The schedules of versions of a kernel that should be equal differ by half of this.
TOLERANCE = 0.08

KINDS = {"v5p:2x2x1": "TPU v5", "v6e:2x2": "TPU v6 lite"}

# Heads per program, and how many of them are computed interleaved.
CANDIDATES = ((8, 8), (8, 4), (4, 4))


def _entries() -> dict[str, list[dict[str, Any]]]:
    entries = {}
    for topology, kind in KINDS.items():
        for kernel in tuning.KERNELS:
            table = tuning.TABLE[kind][kernel, 128]
            pairs = list(dict.fromkeys(((table.heads, table.interleaved), *CANDIDATES)))
            # Linear attention prepares nothing, and interleaves all heads.
            pairs = [pair for pair in pairs if kernel != "linear_attention" or pair[0] == pair[1]]
            entries[f"{kernel} {topology}"] = [{"heads": heads, "interleaved": count} for heads, count in pairs]
    return entries


ENTRIES = _entries()


@functools.cache
def versions() -> dict[str, str]:
    """The compiler, and a hash of the sources of the kernels."""
    compiler = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
    return {"compiler": compiler, "source": hash_sources("tpu", table=False)}


def rank(row: dict[str, Any]) -> float:
    """Order of candidates of equal cost, least first: spills, forward and backward."""
    return sum(map(int, row["spills"].split(" / ")))


@functools.cache
def _dumps() -> tempfile.TemporaryDirectory[str]:
    """The folder of the compiler's schedules; libtpu reads its name once."""
    folder = tempfile.TemporaryDirectory(prefix="tpu-tune-")
    prepare_compiler(pathlib.Path(folder.name))
    return folder


def measure(entry: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Compiles one candidate: cost, seconds, fault and figures."""
    folder = pathlib.Path(_dumps().name)
    kernel, topology = entry.split(" ")
    decay = "channel" if kernel.startswith("channel") else "head"
    case = Case(kernel.removeprefix("channel_"), 1, 1024, 16, 16, 128, 128, decay=decay)
    rows = tuning.TABLE[KINDS[topology]]
    before, started = rows[kernel, 128], time.process_time()
    rows[kernel, 128] = dataclasses.replace(before, **sizes)
    row: dict[str, Any] = {"cost": None, "fault": None}
    try:
        found = {loop["kernel"].rsplit("_", 1)[-1]: loop for loop in matrix_rows(entry, case, topology, folder)}
        row |= {way: round(loop["bundles"] / loop["chunk"], 2) for way, loop in found.items()}
        row["cost"] = round(row["forward"] + row["backward"], 2)
        row["spills"] = " / ".join(str(found[way]["spills"]) for way in ("forward", "backward"))
        row["vmem"] = max(loop["vmem"] for loop in found.values())
    except jax.errors.JaxRuntimeError as error:
        row["fault"] = str(error)[:300]
    finally:
        rows[kernel, 128] = before
        for path in folder.glob("*"):
            path.unlink()
    return row | {"seconds": round(time.process_time() - started, 1)}
