"""What ptxas says of the GPU kernels, on a machine without a GPU: `python -m benchmarks.gpu --static`.

The CUDA plugin wheels (jax-cuda13-pjrt, jax-cuda13-plugin of jax's version) hold the compiler that runs on GPU
machines; it wants ptxas, from the CUDA toolkit on the PATH or from the nvidia-cuda-nvcc wheel. A kernel that asks for
more shared memory than a block may have (227 KiB) is refused by Mosaic itself: such a case is a row with a fault.
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
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import gpu_cases
from benchmarks.gpu_cases import SHIPPED, Case

__all__ = ["compile_for_h200", "find_ptxas", "read_report", "rows_of", "source", "static"]

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

# A line of the process that compiles: a case is done; what follows is what was wrong.
DONE = "memformer: done"


def find_ptxas() -> pathlib.Path | None:
    """ptxas of the toolkit on the PATH, or of the wheel."""
    found = shutil.which("ptxas")
    if found is not None:
        return pathlib.Path(found).resolve()
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations if package else None
    wheels = (path for folder in folders or () for path in pathlib.Path(folder).glob("c*/bin/ptxas"))
    return next(wheels, None)


def source() -> str:
    """A short hash of the kernels' source."""
    folder = pathlib.Path(__file__).parent.parent / "memformer" / "pallas" / "gpu"
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:12]


def compile_for_h200(case: Case):
    """A case by its kernels, alone and with its gradients, compiled for an H200 that need not be there."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from benchmarks import gpu_worker

    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("one",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P())
    arrays = gpu_worker.rounded(gpu_cases.inputs(case))
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in arrays.items()}
    run = gpu_worker.function(case, "pallas")

    def both(arrays):
        # The forward pass keeps more for a gradient, and is another kernel then.
        return run(arrays), jax.grad(lambda x: jnp.sum(run(x).astype(jnp.float32)))(arrays)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(both).lower(specs).compile()


def read_report(case: str, text: str) -> list[dict[str, Any]]:
    """Rows, one a compiled kernel of ours, of what the compiler wrote; "fault" says what must not be."""
    rows = []
    for part in re.split(r"(?=Compiling entry function)", text):
        kernel = re.match(r"Compiling entry function '(\w+)_mosaic_gpu_kernel", part)
        if kernel is None:
            continue
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        # Warnings come before the report of their function.
        said = [line for line in text.splitlines() if "(C75" in line and f"'{kernel[1]}_mosaic" in line]
        row: dict[str, Any] = {"case": case, "kernel": kernel[1]}
        row["registers"] = int(used[1]) if used else None
        row["spills"] = sum(map(int, spilled.groups())) if spilled else None
        row["warnings"] = sorted(set(re.findall(r"C75\d\d", " ".join(said))))
        faults = [f"{row['spills']} bytes spilled"] * bool(row["spills"])
        serialized = any("serialized" in line or re.search(r"C751[012]", line) for line in said)
        faults += ["wgmma serialized"] * serialized
        faults += ["no report"] * (used is None or spilled is None)
        rows.append(row | {"fault": ", ".join(faults) or None})
    return rows


def static(cases: Sequence[Case] = SHIPPED) -> Iterator[dict[str, Any]]:
    """What ptxas says of the kernels of each case, one row a kernel, as they come.

    A case that no kernel serves, or that the compiler refuses, is a row with a fault.

    Raises:
      FileNotFoundError: no ptxas.
    """
    ptxas = find_ptxas()
    if ptxas is None:
        raise FileNotFoundError("no ptxas: neither CUDA's compiler on the PATH nor the wheel nvidia-cuda-nvcc")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={ptxas.parent.parent}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "XLA_FLAGS": flags}
    environment["PATH"] = f"{ptxas.parent}{os.pathsep}{environment.get('PATH', '')}"
    left = list(cases)
    while left:
        # The report is written by the compiler itself, to the standard output of a process of its own.
        todo = json.dumps([dataclasses.asdict(case) for case in left])
        command = [sys.executable, "-m", "benchmarks.gpu_static", todo]
        lines: list[str] = []
        with subprocess.Popen(
            command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            for line in process.stdout or ():
                done = re.match(rf"{DONE} (.*)", line)
                if done is None:
                    lines.append(line)
                    continue
                yield from rows_of(left.pop(0), "".join(lines), done[1])
                lines = []
        if left:
            yield from rows_of(left.pop(0), "", f"the compiler ended: {' | '.join(lines[-3:])}"[:600])


def rows_of(case: Case, text: str, error: str) -> list[dict[str, Any]]:
    """Rows of a case from what its compiler wrote and what went wrong; no kernel at all is a fault."""
    rows = read_report(case.name, text)
    if error or not rows:
        rows.append({"case": case.name, "kernel": None, "fault": error or "no kernel"})
    return rows


def main(cases: list[Case]) -> None:
    """Compiles, and says after each case that it is done, or what was wrong."""
    for case in cases:
        error = ""
        try:
            compile_for_h200(case)
        # Whatever the compiler says is the row's.
        except Exception as problem:  # noqa: BLE001
            words = [word.strip() for word in str(problem).splitlines() if word.strip()] or [""]
            error = f"{type(problem).__name__}: {words[0]} ... {words[-1]}"[:600]
        # The compiler's own words first.
        ctypes.CDLL(None).fflush(None)
        print(f"\n{DONE} {error}", flush=True)


if __name__ == "__main__":
    main([gpu_cases.from_json(case) for case in json.loads(sys.argv[1])])
