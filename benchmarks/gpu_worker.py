"""Our implementations and JAX's, timed on a GPU in a process of their own; benchmarks.gpu asks it (see workers.py).

    {"do": "about"}                                                  {"chip": true, "device": ..., "jax": ...}
    {"do": "peaks"}                                                  {"flops": FLOP/s, "bytes": byte/s}
    {"do": "compile", "case": {...}, "wanted": [[gradient, name], ...]}   {"seconds": ...}
    {"do": "load", "case": {...}, "gradient": true, "name": ...}     {"memory": bytes, "first": seconds, "probe": [...]}
    {"do": "time", "name": ..., "seconds": 0.1}                      {"samples": [ms, ...], "host": share}
    {"do": "drop"}                                                   {}
    {"do": "verify", "case": ..., "toy": true}                       a row of gpu_verify.py

A sample is the mean of calls that are started one after another and waited for once; "host" is the share of its time
that starting them took: near 1 the host was the limit, and the device faster than the figure says.
"""

import concurrent.futures
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

# Processes take turns on one device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import memformer as mf
from benchmarks import gpu_cases
from benchmarks.gpu_cases import Case
from benchmarks.workers import serve
from memformer.pallas.gpu.common import is_hopper

__all__ = ["function", "rounded"]


def rounded(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """As the kernels take them: q, k, v and w in bfloat16, the rest in float32."""
    return {name: jnp.asarray(x).astype(jnp.bfloat16 if name in "qkvw" else jnp.float32) for name, x in arrays.items()}


def function(case: Case, name: str) -> Callable[..., jax.Array]:
    """What a contestant computes: the output, or u, from the arrays of `gpu_cases.inputs`."""
    ids = gpu_cases.segment_ids(case)
    if name == gpu_cases.CUDNN:
        return functools.partial(_cudnn, ids)
    options: dict[str, Any] = {"implementation": name}
    if case.op == "deltaformer":
        options["write_kernel"] = case.write

    def run(arrays):
        given = dict(arrays)
        if case.op == "deltaformer" and case.heads == case.groups:
            # FLA writes and reads by one query.
            given["w"] = given["q"]
        given["segment_ids"] = _segments(ids)
        output, state = getattr(mf, case.op)(**given, **options)
        return state.u if case.only_u else output

    return run


def _segments(ids: np.ndarray | None) -> jax.Array | None:
    # What the compiler knows it would work out ahead.
    return None if ids is None else jax.lax.optimization_barrier(jnp.asarray(ids))


def _cudnn(ids: np.ndarray | None, arrays: Mapping[str, jax.Array]) -> jax.Array:
    # It has no segments: all that its public form takes for them is a T x T mask.
    segments = _segments(ids)
    mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
    q, k, v = (arrays[name] for name in "qkv")
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def compiled(case: Case, name: str, gradient: bool, arrays: Mapping[str, jax.Array], weight: jax.Array):
    """The program of one contestant: `(arrays, weight) -> {name: array}`, the output or the gradients."""
    run = function(case, name)

    def forward(arrays, weight):
        return {"output": run(arrays)}

    def both(arrays, weight):
        output, pull = jax.vjp(run, arrays)
        return pull(weight.astype(output.dtype))[0]

    return jax.jit(both if gradient else forward).lower(arrays, weight).compile()


def thin(x: Any) -> list[float]:
    """Numbers of an array, evenly spread, the same ones for every contestant."""
    flat = x.reshape(-1)
    return np.asarray(flat[:: max(1, flat.shape[0] // gpu_cases.PROBE)][: gpu_cases.PROBE], np.float64).tolist()


class Bench:
    """What is loaded: inputs of the case in hand, and its programs."""

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> dict[str, Any]:
        """Forgets all arrays and programs."""
        self.held: tuple[Case, list[dict[str, jax.Array]], jax.Array] | None = None
        self.programs: dict[str, Any] = {}
        self.ready: dict[tuple[bool, str], Any] = {}
        jax.clear_caches()
        return {}

    def arrays(self, case: Case) -> tuple[list[dict[str, jax.Array]], jax.Array]:
        """Sets of inputs of a case, and the cotangent."""
        if self.held is None or self.held[0] != case:
            self.drop()
            first = rounded(gpu_cases.inputs(case))
            size = sum(x.nbytes for x in first.values())
            copies = [
                jax.tree.map(jnp.copy, first)
                for _ in range(min(gpu_cases.MOST_SETS, math.ceil(gpu_cases.ROTATED / size)) - 1)
            ]
            weight = jnp.asarray(gpu_cases.cotangent(case)).astype(jnp.bfloat16)
            self.held = case, jax.block_until_ready([first, *copies]), weight
        return self.held[1], self.held[2]

    def compile(self, case: dict[str, Any], wanted: list[tuple[bool, str]]) -> dict[str, Any]:
        """Compiles several contestants at once; what fails says so when it is loaded."""
        given = gpu_cases.from_json(case)
        sets, weight = self.arrays(given)
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for gradient, name in wanted:
                self.ready[gradient, name] = pool.submit(compiled, given, name, gradient, sets[0], weight)
        return {"seconds": time.perf_counter() - start}

    def load(self, case: dict[str, Any], gradient: bool, name: str) -> dict[str, Any]:
        """Runs one contestant, and compiles it if that was not done."""
        given = gpu_cases.from_json(case)
        sets, weight = self.arrays(given)
        start = time.perf_counter()
        ready = self.ready.get((gradient, name))
        program = ready.result() if ready else compiled(given, name, gradient, sets[0], weight)
        results = jax.block_until_ready(program(sets[0], weight))
        first = time.perf_counter() - start
        self.programs[name] = program
        memory = program.memory_analysis()
        held = sum(getattr(memory, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp"))
        return {"memory": held, "first": first, "probe": {key: thin(x) for key, x in results.items()}}

    def time(self, name: str, seconds: float) -> dict[str, Any]:
        """Samples of a contestant."""
        assert self.held is not None, "load first"
        _, sets, weight = self.held
        program = self.programs[name]
        return gpu_cases.run_calls(lambda i: program(sets[i % len(sets)], weight), jax.block_until_ready, seconds)


def peaks(chip: bool) -> dict[str, float]:
    """FLOP/s of a bfloat16 product of random matrices, and byte/s of a copy, read and written."""
    size = 8192 if chip else 256
    square = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.copy)
    long = jnp.tile(square, (16, 1))
    seconds = 0.5 if chip else 0.01
    of_product = gpu_cases.run_calls(lambda i: product(square, square), jax.block_until_ready, seconds)["samples"]
    of_copy = gpu_cases.run_calls(lambda i: copy(long), jax.block_until_ready, seconds)["samples"]
    return {
        "flops": 2e3 * size**3 / statistics.median(of_product),
        "bytes": 2e3 * long.nbytes / statistics.median(of_copy),
    }


def about() -> dict[str, Any]:
    """Where this runs."""
    device = jax.devices()[0]
    return {"chip": is_hopper(), "device": device.device_kind, "jax": jax.__version__, "memformer": mf.__version__}


def verify(case: str, toy: bool) -> dict[str, Any]:
    """One case of gpu_verify.py."""
    from benchmarks import gpu_verify

    return gpu_verify.verify(case, toy)


def main() -> None:
    """Answers requests until stdin ends."""
    bench = Bench()
    actions: dict[str, Callable[..., dict[str, Any]]] = {"load": bench.load, "time": bench.time, "drop": bench.drop}
    actions |= {"compile": bench.compile}
    serve({**actions, "about": about, "verify": verify, "peaks": lambda: peaks(is_hopper())})


if __name__ == "__main__":
    main()
