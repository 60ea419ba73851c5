"""The GPU kernels on an H200: verified, then timed beside what else can do the same.

    python -m benchmarks.gpu [--verify] [--static] [--peers] [--out FILE.json]

  --verify   the ops against the float64 recurrence, adversarial keys included; on a GPU by its kernels
  --static   what ptxas says of every kernel: registers, spills, warnings. Needs no GPU, but the CUDA plugin wheels
             (jax-cuda13-pjrt and jax-cuda13-plugin of jax's version) and ptxas on the PATH
  --peers    also FLA's Triton ops, where torch and flash-linear-attention are installed

With neither --verify nor --static it times forward and forward+backward at the shapes of interest: medians of calls
under jit, each waited for. Without an sm_90 GPU it runs on toy shapes by the forms that serve there, to show that it
runs: those times mean nothing, and it says so.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import memformer as mf
from memformer.pallas.gpu.common import is_hopper

# Measured on an H200: bfloat16 product of 8192^3, and copy.
FLOPS, BANDWIDTH = 788e12, 4.3e12


@dataclasses.dataclass(frozen=True)
class Case:
    """One call."""

    op: str
    length: int
    heads: int
    groups: int
    key: int = 128
    value: int = 128
    decay: bool = True
    segments: bool = False
    batch: int = 1

    @property
    def name(self) -> str:
        """As tables say it."""
        what = f"{self.op}{' decay' * self.decay}{' segments' * self.segments}"
        return f"{what} {self.batch}x{self.length} {self.groups}/{self.heads} {self.key}/{self.value}"


TIMED = (
    *(Case("delta_rule", length, 64, 16) for length in (2048, 8192, 32768)),
    *(Case("delta_rule", length, 32, 16) for length in (8192, 32768)),
    Case("linear_attention", 8192, 96, 96),
)
TOY = (Case("delta_rule", 128, 2, 1, 16, 16), Case("linear_attention", 128, 2, 2, 16, 16))
SHIPPED = tuple(
    Case(op, 256, 2, 1, key, 128, decay, segments)
    for op in ("delta_rule", "linear_attention")
    for key in (64, 128)
    for decay in (False, True)
    for segments in (False, True)
)


def inputs(case: Case, keys: str = "random") -> dict[str, np.ndarray]:
    """Arguments of the op by name, float64; keys are "random" or "identical"."""
    random = np.random.default_rng(0)
    few = (case.batch, case.length, case.groups, case.key)
    many = (case.batch, case.length, case.heads)
    k = random.standard_normal(few)
    k = np.broadcast_to(k[:, :1], few) if keys == "identical" else k
    arrays = {
        "q": random.standard_normal(few),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": random.standard_normal((*many, case.value)),
    }
    if case.op == "delta_rule":
        arrays["beta"] = random.uniform(0.1, 0.9, many) if keys == "random" else np.full(many, 1.9)
    if case.decay:
        arrays["decay"] = -random.uniform(0.0, 0.1, many)
    return arrays


def rounded(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """As the kernels take them."""
    return {name: jnp.asarray(x, jnp.bfloat16 if name in "qkv" else jnp.float32) for name, x in arrays.items()}


def run(case: Case, implementation: str | None, gradient: bool):
    """A function of the arrays: output and state, and with `gradient` the gradients of their weighted sum."""

    def call(arrays):
        ids = 1 + jnp.arange(case.length, dtype=jnp.int32)[None] // 100 if case.segments else None
        ids = None if ids is None else jnp.broadcast_to(ids, (case.batch, case.length))
        return getattr(mf, case.op)(**arrays, segment_ids=ids, implementation=implementation)

    def loss(arrays):
        output, state = call(arrays)
        return jnp.sum(jnp.sin(output.astype(state.dtype))) + jnp.sum(state), (output, state)

    return jax.jit(jax.grad(loss, has_aux=True) if gradient else call)


def relative_error(got: Any, want: Any) -> float:
    """Largest relative root mean square of the leaves."""

    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))

    return max(map(one, jax.tree.leaves(got), jax.tree.leaves(want)))


def verify(implementation: str | None) -> list[dict[str, Any]]:
    """Output, state and gradients against the float64 recurrence, on inputs rounded to bfloat16."""
    rows = []
    for case in SHIPPED if implementation else TOY:
        for keys in ("random", "identical"):
            arrays = rounded(inputs(case, keys))
            of_arrays, seen = run(case, implementation, True)(arrays)
            with jax.enable_x64(True):
                wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
                want, want_seen = jax.tree.map(np.asarray, run(case, "recurrent", True)(wide))
            errors = {"error": relative_error(seen, want_seen), "gradient error": relative_error(of_arrays, want)}
            met = errors["error"] <= 2e-2 and errors["gradient error"] <= 6e-2
            rows.append({"case": case.name, "keys": keys, **errors, "met": met})
    return rows


def floor(case: Case, gradient: bool) -> float:
    """Milliseconds that no implementation can do without: FLOPs of the recurrence or bytes, whichever takes longer."""
    products = 3 if case.op == "delta_rule" else 2
    flops = 2.0 * products * case.batch * case.length * case.heads * case.key * case.value
    few, many = case.batch * case.length * case.groups * case.key, case.batch * case.length * case.heads * case.value
    moved = 2.0 * (2 * few + 2 * many)
    return 1e3 * max(flops * (3 if gradient else 1) / FLOPS, moved * (3 if gradient else 1) / BANDWIDTH)


def clock(function, arguments, seconds: float) -> float:
    """Median milliseconds of a call, warm."""
    jax.block_until_ready(function(arguments))
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(function(arguments))
        samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples)


def fla(case: Case, gradient: bool, seconds: float) -> float:
    """Median milliseconds of FLA's Triton op."""
    import torch
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.simple_gla import chunk_simple_gla

    given = {n: torch.tensor(np.asarray(x, np.float32), device="cuda") for n, x in inputs(case).items()}
    given = {n: (x.bfloat16() if n in "qkv" else x).requires_grad_(gradient) for n, x in given.items()}
    repeat = case.heads // case.groups

    def call(_):
        q, k = (given[name].repeat_interleave(repeat, 2) for name in "qk")
        if case.op == "delta_rule":
            output = chunk_gated_delta_rule(q, k, given["v"], g=given["decay"], beta=given["beta"])[0]
        else:
            output = chunk_simple_gla(q, k, given["v"], g=given["decay"])[0]
        if gradient:
            output.float().sum().backward()
        torch.cuda.synchronize()

    return clock(call, None, seconds)


def measure(peers: bool, seconds: float) -> list[dict[str, Any]]:
    """Rows of times, one a case, pass and contestant."""
    chip = is_hopper()
    rows = []
    for case in TIMED if chip else TOY:
        for gradient in (False, True):
            contestants = {name: run(case, name, gradient) for name in (("pallas",) if chip else ()) + ("chunked",)}
            if not (chip and gradient):
                # Its backward keeps the state of every token.
                contestants["recurrent"] = run(case, "recurrent", gradient)
            arrays = rounded(inputs(case))
            times = {name: clock(function, arrays, seconds) for name, function in contestants.items()}
            if peers and chip:
                times["FLA (Triton)"] = fla(case, gradient, seconds)
            what = "forward+backward" if gradient else "forward"
            common = {"case": case.name, "pass": what, "floor": floor(case, gradient)}
            rows += [{**common, "implementation": name, "milliseconds": ms} for name, ms in times.items()]
    return rows


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


def compile_for_h200(case: Case):
    """Forward and backward of a case, compiled for an H200 that need not be there."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("one",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P())
    arrays = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for n, x in rounded(inputs(case)).items()}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return run(case, None, True).lower(arrays).compile()


def static(cases: tuple[Case, ...] = SHIPPED) -> list[dict[str, Any]]:
    """What ptxas says of the kernels of each case.

    Raises:
      FileNotFoundError: no ptxas on the PATH.
      RuntimeError: the compiler failed.
    """
    ptxas = shutil.which("ptxas")
    if ptxas is None:
        raise FileNotFoundError("ptxas is not on the PATH: install CUDA's compiler")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={pathlib.Path(ptxas).resolve().parent.parent}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "XLA_FLAGS": flags}
    rows = []
    for case in cases:
        # The report is written by the compiler itself, to the standard output of a process of its own.
        code = f"from benchmarks import gpu; gpu.compile_for_h200(gpu.Case(**{dataclasses.asdict(case)!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        text = done.stdout + done.stderr
        if done.returncode:
            raise RuntimeError(f"{case.name}: {text[-1500:]}")
        for part in re.split(r"(?=Compiling entry function)", text)[1:]:
            if "mosaic_gpu_kernel" not in part.splitlines()[0]:
                continue
            stored, loaded = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)[0]
            row: dict[str, Any] = {"case": case.name, "kernel": re.findall(r"'(\w+)_mosaic_gpu_kernel'", part)[0]}
            row |= {"registers": int(re.findall(r"Used (\d+) registers", part)[0]), "spills": int(stored) + int(loaded)}
            rows.append({**row, "serialized": len(re.findall(r"C751[0-24]", text))})
    return rows


def main(arguments: list[str]) -> int:
    """Prints rows, writes them where asked; 1 if something verified was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("verify", "static", "peers"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a contestant (default 1)")
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args(arguments)
    chip = is_hopper()
    if not (chip or options.static):
        print("no sm_90 GPU here: toy shapes by the forms that serve; no time below means anything")
    rows = []
    if options.static:
        rows = static()
    elif options.verify:
        rows = verify("pallas" if chip else None)
    else:
        rows = measure(options.peers, options.seconds if chip else 0.0)
    for row in rows:
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    around = {"device": jax.devices()[0].device_kind, "meaningful": chip, "jax": jax.__version__, "rows": rows}
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps({**around, "memformer": mf.__version__}, indent=1) + "\n")
    return int(any(row.get("met") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
