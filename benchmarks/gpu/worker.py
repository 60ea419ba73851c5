"""The process that times and verifies JAX programs on a GPU; benchmarks.gpu sends it requests (see workers.py).

    {"do": "about"}                                                  {"chip": true, "device": ..., "jax": ...}
    {"do": "peaks"}                                                  {"flops": FLOP/s, "bytes": byte/s}
    {"do": "compile", "case": {...}, "wanted": [[gradient, name], ...]}   {"seconds": ...}
    {"do": "load", "case": {...}, "gradient": true, "name": ...}     {"memory": bytes, "first": seconds, "probe": {...}}
    {"do": "time", "name": ..., "seconds": 0.1}                      {"samples": [ms, ...], "host": share}
    {"do": "drop"}                                                   {}
    {"do": "verify", "case": ..., "toy": true}                       a row of gpu/verify.py

load, time, drop and about are the requests of the PyTorch peers too (torch_peers.py).
"""

import concurrent.futures
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# Several processes share one device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import memformer as mf
from benchmarks import cases, timing
from benchmarks.cases import Case
from benchmarks.gpu.contestants import compile_call, round_inputs
from benchmarks.torch_peers import MAX_COPIES, ROTATED
from benchmarks.workers import serve
from memformer.pallas.platform import is_hopper


class Bench:
    """The loaded case: its inputs and its programs."""

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> dict[str, Any]:
        """Releases all arrays and programs."""
        self.held: tuple[Case, list[dict[str, jax.Array]], jax.Array] | None = None
        self.programs: dict[str, Any] = {}
        self.ready: dict[tuple[bool, str], Any] = {}
        jax.clear_caches()
        return {}

    def arrays(self, case: Case) -> tuple[list[dict[str, jax.Array]], jax.Array]:
        """Copies of the inputs of a case, and the cotangent."""
        if self.held is None or self.held[0] != case:
            self.drop()
            first = round_inputs(cases.inputs(case))
            size = sum(x.nbytes for x in first.values())
            copies = [jax.tree.map(jnp.copy, first) for _ in range(min(MAX_COPIES, math.ceil(ROTATED / size)) - 1)]
            cotangent = jnp.asarray(cases.cotangent(case)).astype(jnp.bfloat16)
            self.held = case, jax.block_until_ready([first, *copies]), cotangent
        return self.held[1], self.held[2]

    def compile(self, case: dict[str, Any], wanted: list[tuple[bool, str]]) -> dict[str, Any]:
        """Compiles several contestants in parallel; a failure is reported when the contestant is loaded."""
        given = cases.from_json(case)
        sets, cotangent = self.arrays(given)
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for gradient, name in wanted:
                self.ready[gradient, name] = pool.submit(compile_call, given, name, gradient, sets[0], cotangent)
        return {"seconds": time.perf_counter() - start}

    def load(self, case: dict[str, Any], gradient: bool, name: str) -> dict[str, Any]:
        """Runs one contestant, compiling it where `compile` has not."""
        given = cases.from_json(case)
        sets, cotangent = self.arrays(given)
        start = time.perf_counter()
        ready = self.ready.get((gradient, name))
        program = ready.result() if ready else compile_call(given, name, gradient, sets[0], cotangent)
        results = jax.block_until_ready(program(sets[0], cotangent))
        first = time.perf_counter() - start
        self.programs[name] = program
        memory = program.memory_analysis()
        held = sum(getattr(memory, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp"))
        probes = {key: np.asarray(timing.probe(x), np.float64).tolist() for key, x in results.items()}
        return {"memory": held, "first": first, "probe": probes}

    def time(self, name: str, seconds: float) -> dict[str, Any]:
        """Samples one contestant for about `seconds`."""
        assert self.held is not None, "load first"
        _, sets, cotangent = self.held
        program = self.programs[name]
        return timing.run_calls(lambda i: program(sets[i % len(sets)], cotangent), jax.block_until_ready, seconds)


def measure_peaks(chip: bool) -> dict[str, float]:
    """FLOP/s of a bfloat16 product of random matrices, and byte/s of a copy, reads and writes counted."""
    size = 8192 if chip else 256
    square = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.copy)
    long = jnp.tile(square, (16, 1))
    seconds = 0.5 if chip else 0.01
    of_product = timing.run_calls(lambda i: product(square, square), jax.block_until_ready, seconds)["samples"]
    of_copy = timing.run_calls(lambda i: copy(long), jax.block_until_ready, seconds)["samples"]
    return {
        "flops": 2e3 * size**3 / statistics.median(of_product),
        "bytes": 2e3 * long.nbytes / statistics.median(of_copy),
    }


def about() -> dict[str, Any]:
    """Device and versions."""
    device = jax.devices()[0]
    return {"chip": is_hopper(), "device": device.device_kind, "jax": jax.__version__, "memformer": mf.__version__}


def verify(case: str, toy: bool) -> dict[str, Any]:
    """One case of gpu/verify.py."""
    # Loads the tests, which timing does not need.
    from benchmarks.gpu.verify import verify

    return verify(case, toy)


def actions() -> dict[str, Callable[..., dict[str, Any]]]:
    """The function of each request."""
    bench = Bench()
    found: dict[str, Callable[..., dict[str, Any]]] = {"load": bench.load, "time": bench.time, "drop": bench.drop}
    found |= {"compile": bench.compile, "about": about, "verify": verify, "peaks": lambda: measure_peaks(is_hopper())}
    return found


if __name__ == "__main__":
    serve(actions())
