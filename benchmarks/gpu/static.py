"""Registers, spills and warnings of the GPU kernels, without a GPU: `python -m benchmarks.gpu --static`.

The CUDA plugin wheels (jax-cuda13-pjrt, jax-cuda13-plugin of jax's version) contain the compiler of GPU machines; it
needs ptxas, from the CUDA toolkit on the PATH or from the nvidia-cuda-nvcc wheel. Mosaic itself rejects a kernel that
needs more shared memory than a block may have (227 KiB); such a case is a row with a fault. Where nvdisasm lies beside
ptxas (the toolkit, or the nvidia-cuda-nvdisasm wheel), a row has the counts of the kernel's main loop too (sass.py).
"""

import ctypes
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import unittest.mock
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.gpu import sass
from benchmarks.gpu.cases import SHIPPED
from benchmarks.workers import shorten
from memformer.pallas.gpu import tuning

__all__ = ["compile_for_h200", "find_ptxas", "hash_sources", "make_rows", "read_report", "report"]

# XLA's description of the chip, from its data sheet.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
"""

# Line printed after each compiled case, followed by the error, if any.
DONE = "memformer: done"


def find_ptxas() -> pathlib.Path | None:
    """Path of ptxas, from the toolkit on the PATH or from the wheel; None where there is none."""
    found = shutil.which("ptxas")
    if found is not None:
        return pathlib.Path(found).resolve()
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    wheels = (path for folder in folders or () for path in pathlib.Path(folder).glob("c*/bin/ptxas"))
    return next(wheels, None)


def hash_sources(chip: str = "gpu", table: bool = True) -> str:
    """Short hash of the sources of a chip's kernels, with or without its table of sizes."""
    folder = pathlib.Path(__file__).parents[2] / "memformer" / "pallas"
    found = (*folder.glob("*.py"), *folder.glob(f"{chip}/**/*.py"))
    paths = [path for path in found if table or path.name != "tuning.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:12]


def compile_for_h200(case: Case):
    """Compiles a case's kernels, without and with gradients, for an H200 that need not be present."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from benchmarks.gpu.contestants import function, round_inputs

    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("one",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P())
    arrays = round_inputs(cases.inputs(case), case.dtype)
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in arrays.items()}
    run = function(case, "pallas")

    def both(arrays):
        # With a gradient the forward pass keeps more, and is a different kernel.
        return run(arrays), jax.grad(lambda x: jnp.sum(run(x).astype(jnp.float32)))(arrays)

    # The callback that reports too many documents needs a GPU to compile.
    silent = unittest.mock.patch.object(jax.debug, "callback", lambda *_, **__: None)
    with silent, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(both).lower(specs).compile()


def read_report(case: str, text: str) -> list[dict[str, Any]]:
    """Parses the compiler's output into one row per kernel of the library; "fault" names a defect, or is None."""
    rows = []
    for part in re.split(r"(?=Compiling entry function)", text):
        kernel = re.match(r"Compiling entry function '(\w+)_mosaic_gpu_kernel", part)
        if kernel is None:
            continue
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        # Warnings precede the report of their function.
        warnings = [line for line in text.splitlines() if "(C75" in line and f"'{kernel[1]}_mosaic" in line]
        row: dict[str, Any] = {"case": case, "kernel": kernel[1]}
        row["registers"] = int(used[1]) if used else None
        row["spills"] = sum(map(int, spilled.groups())) if spilled else None
        row["warnings"] = sorted(set(re.findall(r"C75\d\d", " ".join(warnings))))
        faults = [f"{row['spills']} bytes spilled"] * bool(row["spills"])
        serialized = any("serialized" in line or re.search(r"C751[012]", line) for line in warnings)
        faults += ["wgmma serialized"] * serialized
        faults += ["no report"] * (used is None or spilled is None)
        for code in sass.read_sass(part).get(kernel[1], []):
            row["loop"] = sass.describe(sass.main_loop(code))
        rows.append(row | {"fault": ", ".join(faults) or None})
    return rows


def report(wanted: Sequence[Case] = SHIPPED, sizes: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Compiles the cases and yields one row per kernel, case by case.

    A case that has no kernel, or that the compiler rejects, is a row with a fault.

    Args:
      wanted: cases.
      sizes: values for names of memformer.pallas.gpu.tuning, in place of its own.

    Raises:
      FileNotFoundError: no ptxas.
    """
    ptxas = find_ptxas()
    if ptxas is None:
        raise FileNotFoundError("ptxas not found: install the CUDA toolkit or the wheel nvidia-cuda-nvcc")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={ptxas.parent.parent}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "XLA_FLAGS": flags}
    environment["PATH"] = f"{ptxas.parent}{os.pathsep}{environment.get('PATH', '')}"
    if (ptxas.parent / "nvdisasm").exists():
        environment |= {"MOSAIC_GPU_DUMP_SASS": "1", "CUDA_ROOT": str(ptxas.parent.parent)}
    left = list(wanted)
    while left:
        # The compiler writes its report to standard output: it runs in a process of its own.
        todo = json.dumps([dataclasses.asdict(case) for case in left])
        command = [sys.executable, "-m", "benchmarks.gpu.static", todo, json.dumps(dict(sizes or {}))]
        lines: list[str] = []
        with subprocess.Popen(
            command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            for line in process.stdout or ():
                done = re.match(rf"{DONE} (.*)", line)
                if done is None:
                    lines.append(line)
                    continue
                yield from make_rows(left.pop(0), "".join(lines), done[1])
                lines = []
        if left:
            yield from make_rows(left.pop(0), "", f"the compiler exited: {' | '.join(lines[-3:])}"[:600])


def make_rows(case: Case, text: str, error: str) -> list[dict[str, Any]]:
    """Rows of a case from the compiler's output and error; no kernel at all is a fault."""
    rows = read_report(case.name, text)
    if error or not rows:
        rows.append({"case": case.name, "kernel": None, "fault": error or "no kernel"})
    return rows


def main(todo: list[Case]) -> None:
    """Compiles cases, and prints a line with the error, if any, after each."""
    for case in todo:
        error = ""
        try:
            compile_for_h200(case)
        # Any error is part of the row.
        except Exception as problem:  # noqa: BLE001
            error = shorten(problem)
        # The compiler's own output comes first.
        ctypes.CDLL(None).fflush(None)
        print(f"\n{DONE} {error}", flush=True)


if __name__ == "__main__":
    for name, value in json.loads(sys.argv[2]).items():
        setattr(tuning, name, value)
    main([cases.from_json(case) for case in json.loads(sys.argv[1])])
