"""The contestants of benchmarks.cpu: JAX programs in this process, and peers in a worker."""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import memformer as mf
from benchmarks import cases, timing
from benchmarks.cases import Case
from benchmarks.cpu import dense
from benchmarks.cpu.cases import DENSE
from benchmarks.workers import Worker

__all__ = ["Ours", "Theirs", "function", "measure_peaks", "start_peers"]

# Seconds per request of a peer: to load a case, to time it.
LOAD, TIME = 600.0, 600.0


def function(case: Case, implementation: str) -> Callable[..., Any]:
    """The function of an implementation, called with the arrays of `cases.inputs` by name; output first."""
    if implementation == DENSE:
        run = getattr(dense, case.op)
    else:
        run = _library_op(getattr(mf, case.op), None if implementation == "default" else implementation)
    if case.op != "deltaformer":
        return run
    # FLA's DeltaFormer writes with the read queries, and so do all contestants.
    return lambda q, k, v, beta: run(q, k, v, w=q, beta=beta)


def _library_op(op: Callable[..., Any], implementation: str | None) -> Callable[..., Any]:
    return lambda *args, **kwargs: op(*args, **kwargs, implementation=implementation)


class Ours:
    """A JAX function, compiled for one case.

    Attributes:
      name: of the implementation.
      ran: the implementation that the op chose.
    """

    def __init__(self, case: Case, implementation: str, gradient: bool):
        self.name = implementation
        run = function(case, implementation)
        arrays = {key: jnp.asarray(value) for key, value in cases.inputs(case).items()}
        self.gradient = gradient
        self.arguments = (arrays, jnp.asarray(cases.cotangent(case)))

        def forward(arrays, cotangent):
            return run(**arrays)

        def loss(arrays, cotangent):
            result = run(**arrays)
            return jnp.sum((result[0] if isinstance(result, tuple) else result) * cotangent)

        self.compiled = jax.jit(jax.grad(loss) if gradient else forward).lower(*self.arguments).compile()
        # dispatch names its choice in the compiled program
        ran = set(re.findall(rf"memformer\.{case.op}\.(\w+)", self.compiled.as_text() or ""))
        self.ran = ", ".join(sorted(ran)) or None

    def outputs(self) -> dict[str, np.ndarray]:
        """The output, or the gradients by argument."""
        result = self.compiled(*self.arguments)
        if self.gradient:
            return {key: np.asarray(value) for key, value in result.items()}
        return {"output": np.asarray(result[0] if isinstance(result, tuple) else result)}

    def error(self, want: dict[str, np.ndarray]) -> float:
        """Relative RMS difference to the outputs of another contestant."""
        return timing.relative_error(self.outputs(), want)

    def seconds(self, calls: int) -> float:
        """Mean seconds per call over `calls` calls."""
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(self.compiled(*self.arguments))
        return (time.perf_counter() - start) / calls


def start_peers(python: str) -> Worker:
    """The process of benchmarks/cpu/peers.py under another python."""
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "2"}
    # Its threads must not spin on the cores while another contestant is timed.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    return Worker("benchmarks.cpu.peers", python, environment)


class Theirs:
    """A peer, loaded with the inputs of one case.

    Attributes:
      name: of the peer.
      ran: None.
    """

    def __init__(self, worker: Worker, case: Case, name: str, gradient: bool):
        self.name, self.worker, self.ran = name, worker, None
        answer = worker.ask(LOAD, do="load", case=dataclasses.asdict(case), gradient=gradient, name=name)
        self.probes = answer["probe"]

    def error(self, want: dict[str, np.ndarray]) -> float:
        """Relative RMS difference to the outputs of another contestant, over the elements that a peer reports."""
        return timing.relative_error(self.probes, {key: timing.probe(x) for key, x in want.items()})

    def seconds(self, calls: int) -> float:
        """Mean seconds per call over `calls` calls."""
        return float(self.worker.ask(TIME, do="calls", name=self.name, calls=calls)["seconds"])


def measure_peaks(size: int) -> tuple[float, float]:
    """FLOP/s of a float32 matrix product of `size`, and bytes/s of an addition in place."""
    square = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul).lower(square, square).compile()
    # In place: a fresh result would time the system's allocation of pages.
    add = jax.jit(lambda x: x + 1, donate_argnums=0).lower(square).compile()
    products, adds = [], []
    for _ in range(9):
        start = time.perf_counter()
        jax.block_until_ready(product(square, square))
        middle = time.perf_counter()
        square = jax.block_until_ready(add(square))
        products.append(middle - start)
        adds.append(time.perf_counter() - middle)
    return 2 * size**3 / statistics.median(products), 2 * square.nbytes / statistics.median(adds)
