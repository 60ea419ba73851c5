"""Contestants and how they are timed: interleaved rounds, medians."""

import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case, function, inputs

__all__ = ["Contestant", "Ours", "PeerProcess", "Theirs", "exponent", "interleave", "peaks", "relative_error"]


class Contestant(Protocol):
    """Something that can be run and timed on the inputs of one case."""

    name: str

    def outputs(self) -> dict[str, np.ndarray]:
        """The output, or the gradients by argument."""

    def seconds(self, calls: int) -> float:
        """Mean time of a call over `calls` calls."""


class Ours:
    """A JAX function, compiled for one case."""

    def __init__(self, case: Case, implementation: str, gradient: bool):
        self.name = implementation
        run = function(case, implementation)
        arrays = {key: jnp.asarray(value) for key, value in inputs(case).items()}
        cotangent = arrays.pop("cotangent")
        self.gradient = gradient
        self.arguments = (arrays, cotangent)

        def forward(arrays, cotangent):
            return run(**arrays)

        def loss(arrays, cotangent):
            result = run(**arrays)
            return jnp.sum((result[0] if isinstance(result, tuple) else result) * cotangent)

        self.compiled = jax.jit(jax.grad(loss) if gradient else forward).lower(*self.arguments).compile()
        # dispatch leaves its choice in the compiled program
        ran = set(re.findall(rf"memformer\.{case.op}\.(\w+)", self.compiled.as_text() or ""))
        self.ran = ", ".join(sorted(ran)) or None

    def outputs(self) -> dict[str, np.ndarray]:
        """The output, or the gradients by argument."""
        result = self.compiled(*self.arguments)
        if self.gradient:
            return {key: np.asarray(value) for key, value in result.items()}
        return {"output": np.asarray(result[0] if isinstance(result, tuple) else result)}

    def seconds(self, calls: int) -> float:
        """Mean time of a call over `calls` calls."""
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(self.compiled(*self.arguments))
        return (time.perf_counter() - start) / calls


class PeerProcess:
    """benchmarks/peers.py under another python, one request at a time."""

    def __init__(self, python: str):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "2"}
        # Threads of the one that waits must not spin on the cores of the one that is timed.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        program = pathlib.Path(__file__).with_name("peers.py")
        self.process = subprocess.Popen(
            [python, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.folder = tempfile.TemporaryDirectory()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer.

        Raises:
          RuntimeError: the program ended; its own words are on stderr.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer program ended with status {self.process.wait()} at {request}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the program."""
        self.process.communicate()
        self.folder.cleanup()


class Theirs:
    """A peer, loaded with the inputs of one case."""

    def __init__(self, peer: PeerProcess, case: Case, name: str, gradient: bool):
        self.name, self.peer, self.ran = name, peer, None
        path = pathlib.Path(peer.folder.name, "inputs.npz")
        np.savez(path, **inputs(case))  # type: ignore[arg-type]
        peer.ask(do="load", name=name, inputs=str(path), gradient=gradient)

    def outputs(self) -> dict[str, np.ndarray]:
        """The output, or the gradients by argument."""
        path = pathlib.Path(self.peer.folder.name, "outputs.npz")
        self.peer.ask(do="save", to=str(path))
        return dict(np.load(path))

    def seconds(self, calls: int) -> float:
        """Mean time of a call over `calls` calls."""
        return self.peer.ask(do="time", calls=calls)["seconds"]


def interleave(contestants: Sequence[Contestant], budget: float, least: int = 5, most: int = 25) -> list[list[float]]:
    """Times contestants in turns, so that a noisy minute of the machine falls on all of them.

    In each round a contestant runs once uncounted, so that it finds its own data in the caches, then for about 30 ms.
    One that takes more than a second a call has no need of the former and takes part in three rounds only.

    Args:
      contestants: who runs.
      budget: seconds that all rounds together should take.
      least: rounds at least, whatever they take.
      most: rounds at most.

    Returns:
      For each contestant its samples, one a round.
    """
    first = [contestant.seconds(1) for contestant in contestants]
    slow = [seconds > 1.0 for seconds in first]
    calls = [min(20, max(1, math.ceil(0.03 / seconds))) for seconds in first]
    cost = sum(first[i] * (calls[i] + 1) for i in range(len(first)) if not slow[i])
    rounds = min(most, max(least, int(budget / cost) if cost else least))
    samples: list[list[float]] = [[] for _ in contestants]
    for turn in range(rounds):
        for place in range(len(contestants)):
            # Each round starts with another, so that none always follows the same.
            i = (turn + place) % len(contestants)
            if slow[i] and len(samples[i]) == 3:
                continue
            if not slow[i]:
                contestants[i].seconds(1)
            samples[i].append(contestants[i].seconds(calls[i]))
    return samples


def relative_error(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest relative RMS difference over the arrays of both."""
    errors = []
    for key, array in want.items():
        size = np.sqrt(np.mean(np.square(array, dtype=np.float64)))
        errors.append(np.sqrt(np.mean(np.square(got[key] - array, dtype=np.float64))) / max(size, 1e-30))
    return float(max(errors))


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """p of seconds ~ length^p, by least squares on logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def peaks(size: int) -> tuple[float, float]:
    """What the machine gives: FLOP/s of a float32 matrix product of `size`, bytes/s of an addition in place."""
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
