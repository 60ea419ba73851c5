"""Timing without a framework: interleaved rounds, samples of asynchronous calls, comparison of results.

Numpy only: the processes that run PyTorch import this module too.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

__all__ = ["Contestant", "exponent", "interleave", "probe", "relative_error", "run_calls"]

# Numbers per array that contestants report for comparison.
PROBE = 4096


class Contestant(Protocol):
    """Anything that can be timed on the inputs of one case."""

    name: str

    def seconds(self, calls: int) -> float:
        """Mean seconds per call over `calls` calls."""


def interleave(contestants: Sequence[Contestant], budget: float, least: int = 5, most: int = 25) -> list[list[float]]:
    """Times contestants in turn, so that background load affects all of them.

    In each round a contestant runs once untimed, which brings its data into the caches, then for about 30 ms. A
    contestant that takes more than a second per call skips the untimed run and takes part in three rounds only.

    Args:
      contestants: what is timed.
      budget: target seconds of all rounds together.
      least: minimum number of rounds, whatever they take.
      most: maximum number of rounds.

    Returns:
      For each contestant its samples, one per round.
    """
    first = [contestant.seconds(1) for contestant in contestants]
    slow = [seconds > 1.0 for seconds in first]
    calls = [min(20, max(1, math.ceil(0.03 / seconds))) for seconds in first]
    cost = sum(first[i] * (calls[i] + 1) for i in range(len(first)) if not slow[i])
    rounds = min(most, max(least, int(budget / cost) if cost else least))
    samples: list[list[float]] = [[] for _ in contestants]
    for turn in range(rounds):
        for place in range(len(contestants)):
            # Rotating the order, so that no contestant always follows the same one.
            i = (turn + place) % len(contestants)
            if slow[i] and len(samples[i]) == 3:
                continue
            if not slow[i]:
                contestants[i].seconds(1)
            samples[i].append(contestants[i].seconds(calls[i]))
    return samples


def run_calls(call: Callable[[int], Any], wait: Callable[[Any], Any], seconds: float) -> dict[str, Any]:
    """Samples an asynchronous call for about `seconds` in all.

    Args:
      call: `call(i)` starts the i-th call.
      wait: waits for the result of a call.
      seconds: total time.

    Returns:
      "samples", milliseconds per call, and "host", the share of that time spent starting calls: near 1, the host is
      the bottleneck and the device is faster than the samples show.
    """

    def sample(count: int) -> tuple[float, float]:
        start = time.perf_counter()
        for i in range(count):
            last = call(i)
        started = time.perf_counter()
        wait(last)
        return time.perf_counter() - start, started - start

    # An idle device runs at a low clock: untimed calls raise it.
    once, _ = sample(1)
    if once < 0.3 * seconds:
        once = sample(4)[0] / 4
        sample(max(1, math.ceil(0.3 * seconds / once)))
        once = sample(4)[0] / 4
    count = max(1, round(0.2 * seconds / once))
    taken = [sample(count) for _ in range(5 if once * 3 < seconds else 1)]
    host = statistics.median(started / total for total, started in taken)
    return {"samples": [1e3 * total / count for total, _ in taken], "host": host}


def probe(array: Any) -> Any:
    """At most `PROBE` evenly spaced elements of an array or tensor, the same ones for every contestant."""
    flat = array.reshape(-1)
    return flat[:: max(1, flat.shape[0] // PROBE)][:PROBE]


def relative_error(got: Mapping[str, Any], want: Mapping[str, Any]) -> float:
    """Largest relative RMS difference over the arrays of two contestants; NaN when their names differ."""
    if set(got) != set(want):
        return float("nan")
    errors = []
    for name in want:
        a, b = (np.asarray(arrays[name], np.float64) for arrays in (got, want))
        errors.append(np.sqrt(np.mean((a - b) ** 2) / np.maximum(np.mean(b**2), 1e-60)))
    return float(max(errors))


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """p of seconds ~ length^p, by least squares on logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])
