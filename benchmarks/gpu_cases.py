"""What benchmarks.gpu measures: calls, their inputs, the least they cost, who runs them, and the goals.

Numpy only: the process of the PyTorch peers reads it too.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "ANCHORS",
    "SHIPPED",
    "TIMED",
    "TOY",
    "Case",
    "contestants",
    "cotangent",
    "floor",
    "from_json",
    "goals",
    "inputs",
    "run_calls",
    "segment_ids",
]

RECURRENT = "recurrent"

# Bytes of inputs that do not fit the caches of any chip, and how many sets of them there are at most.
ROTATED, MOST_SETS = 256e6, 4

# Numbers of an array that are compared between contestants.
PROBE = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op in bfloat16.

    Attributes:
      op: name of the public function.
      batch, length, heads, groups, key, value: B, T, H, G, K, V. In delta_rule and linear_attention G counts the heads
        of q and k, in deltaformer and softmax_attention those of k and v.
      decay: whether there is a log decay per head.
      segments: how many sequences of one length are packed; 0 is none, and no segment_ids.
      write: DeltaFormer's write kernel.
      only_u: whether DeltaFormer's u is what is wanted, and nothing is read.
      ours: implementations of this library that are timed. The recurrence is where it ends within seconds, the chunked
        form at one shape of each op: its compilation takes longer than all that is timed.
    """

    op: str
    batch: int
    length: int
    heads: int
    groups: int
    key: int = 128
    value: int = 128
    decay: bool = False
    segments: int = 0
    write: str = "softmax"
    only_u: bool = False
    ours: tuple[str, ...] = ("pallas",)

    @property
    def name(self) -> str:
        """As tables say it."""
        what = [self.op]
        if self.op == "deltaformer":
            what += ["u"] * self.only_u + [self.write] * (self.write != "softmax")
        what += ["gated"] * self.decay + [f"{self.segments} segments"] * bool(self.segments)
        heads = f"{self.groups}/{self.heads}" if self.groups != self.heads else f"{self.heads}"
        width = f"{self.key}" if self.key == self.value else f"{self.key}/{self.value}"
        return f"{' '.join(what)} [{self.batch}, {self.length}, {heads}, {width}]"

    @property
    def cached(self) -> bool:
        """Whether k and v have the fewer heads, and q more."""
        return self.op in ("deltaformer", "softmax_attention")


PLAIN = ("pallas", "chunked")


def _gated(length: int, heads: int, ours: tuple[str, ...] = ("pallas",)) -> Case:
    return Case("delta_rule", 1, length, heads, 16, decay=True, ours=ours)


def _u(batch: int, heads: int, length: int = 8192, ours: tuple[str, ...] = ("pallas",)) -> Case:
    return Case("deltaformer", batch, length, heads, heads, only_u=True, ours=ours)


def from_json(given: Mapping[str, Any]) -> Case:
    """A case from what dataclasses.asdict made of it, and JSON of that."""
    return Case(**{**given, "ours": tuple(given["ours"])})


# Most important first: a run that is stopped has them.
TIMED = (
    _u(2, 32, ours=PLAIN),
    _gated(8192, 64, (*PLAIN, RECURRENT)),
    _gated(8192, 32),
    Case("softmax_attention", 1, 16384, 16, 16, ours=PLAIN),
    Case("linear_attention", 1, 8192, 96, 96, ours=(*PLAIN, RECURRENT)),
    Case("deltaformer", 2, 8192, 32, 32, ours=PLAIN),
    _gated(2048, 64),
    _gated(32768, 64),
    _gated(32768, 32),
    _u(1, 1),
    _u(1, 8),
    Case("softmax_attention", 1, 16384, 16, 16, segments=8),
    _u(8, 32, length=4096),
    _gated(2048, 32),
    _u(4, 32),
)

# One of every op, to show that all of this runs. These times mean nothing.
TOY = (
    Case("deltaformer", 1, 32, 2, 2, 16, 16, only_u=True, ours=PLAIN),
    Case("delta_rule", 1, 32, 2, 1, 16, 16, decay=True, ours=(*PLAIN, RECURRENT)),
    Case("softmax_attention", 1, 32, 2, 2, 16, 16, segments=2, ours=PLAIN),
)

# Configurations whose registers are read: every op, with and without what changes the kernels. A process compiles equal
# kernels once: DeltaFormer, which has kernels of its own beside those of attention, comes after it.
SHIPPED = (
    *(
        Case(op, 1, 256, 2, 1, width, width, decay, segments)
        for op in ("delta_rule", "linear_attention")
        for width in (64, 128)
        for decay in (False, True)
        for segments in (0, 2)
    ),
    *(
        Case("softmax_attention", 1, 256, 2, 1, width, width, segments=segments)
        for width in (64, 128)
        for segments in (2, 0)
    ),
    # More than one part of a write (pallas/gpu/parts.py), one part, and less than two tiles.
    *(
        Case("deltaformer", 1, length, 2, 1, width, width, write=write, segments=segments)
        for length, writes in ((2048, ("softmax", "linear", "round", "relu")), (256, ("softmax", "linear")))
        for write in writes
        for width in (64, 128)
        for segments in (2, 0)
    ),
    *(Case(op, 1, 64, 2, 1) for op in ("softmax_attention", "deltaformer")),
)


def _seeded(case: Case, stream: int) -> np.random.Generator:
    # The fastest generator there is: at the largest shapes others take longer than all that is timed.
    return np.random.Generator(np.random.SFC64([stream, case.length, case.heads]))


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Arguments of the op by name, float32, keys of length 1; `w` is left to `q`, as FLA's DeltaFormer has it."""
    random = _seeded(case, 0)
    time = (case.batch, case.length)
    of_q, of_v = (case.heads, case.groups) if case.cached else (case.groups, case.heads)
    arrays = {
        name: random.standard_normal((*time, heads, width), np.float32)
        for name, heads, width in (("q", of_q, case.key), ("k", case.groups, case.key), ("v", of_v, case.value))
    }
    if not case.cached:
        # Queries too: a recurrence has no softmax that would level them.
        for name in "qk":
            arrays[name] /= np.linalg.norm(arrays[name], axis=-1, keepdims=True)
    if case.op in ("delta_rule", "deltaformer"):
        arrays["beta"] = random.uniform(0.1, 0.9, (*time, of_v)).astype(np.float32)
    if case.decay:
        arrays["decay"] = random.uniform(-0.1, 0.0, (*time, of_v)).astype(np.float32)
    return arrays


def cotangent(case: Case) -> np.ndarray:
    """What weighs the output in the summed loss, float32."""
    heads = case.groups if case.only_u else case.heads
    return _seeded(case, 1).standard_normal((case.batch, case.length, heads, case.value), np.float32)


def segment_ids(case: Case) -> np.ndarray | None:
    """[B, T] int32 ids of segments of one length, or None."""
    if not case.segments:
        return None
    ids = 1 + np.arange(case.length, dtype=np.int32) * case.segments // case.length
    return np.broadcast_to(ids, (case.batch, case.length))


def floor(case: Case, gradient: bool) -> tuple[float, float]:
    """FLOPs and bytes that no implementation can do without.

    A fixed-state memory is counted as its recurrence (2 K V for each of its products a token and head), its backward
    as twice that; attention over visible pairs, one product with keys and one with values, its backward as 2.5 times
    that; DeltaFormer likewise, once for u and once for what is read. Bytes are each argument and the output once;
    in the backward each of them, the cotangent, and each gradient once.
    """
    rows = float(case.batch * case.heads * case.length)
    if case.cached:
        pairs = case.length / max(case.segments, 1) / 2
        parts = 2 if case.op == "deltaformer" and not case.only_u else 1
        flops, back = parts * rows * pairs * 2 * (case.key + case.value), 2.5
    else:
        flops, back = rows * case.key * case.value * 2 * (3 if case.op == "delta_rule" else 2), 2.0
    few, many = case.batch * case.length * case.groups, case.batch * case.length * case.heads
    of_q, of_v = (many, few) if case.cached else (few, many)
    numbers = (case.op in ("delta_rule", "deltaformer")) + case.decay
    given = 2.0 * (of_q * case.key + few * case.key + of_v * case.value) + 4.0 * numbers * of_v
    out = 2.0 * (of_v if case.only_u else many) * case.value
    return (flops * (1 + back), 3 * given + 2 * out) if gradient else (flops, given + out)


# Names of peers; gpu_peers.py and gpu_worker.py say what they are.
FLA, SDPA, CUDNN = "FLA (Triton)", "torch sdpa", "cuDNN (jax.nn)"


def contestants(case: Case, gradient: bool) -> list[tuple[str, str]]:
    """Who runs this: pairs of the process ("jax" or "torch") and the name of an implementation."""
    # The recurrence's backward would keep the state of every token.
    ours = [name for name in case.ours if not (gradient and name == RECURRENT)]
    theirs = [FLA]
    if case.op == "softmax_attention":
        ours.append(CUDNN)
        theirs += [SDPA] * (not case.segments)
    return [("jax", name) for name in ours] + [("torch", name) for name in theirs]


def _anchor(case: Case, direction: str, who: str, chip: str, milliseconds: float) -> dict[str, Any]:
    return {"case": case.name, "pass": direction, "who": who, "chip": chip, "milliseconds": milliseconds}


FORWARD, BOTH, BACKWARD = "forward", "forward+backward", "backward"
PASSES = ((FORWARD, False), (BOTH, True))

# Published figures.
ANCHORS = (
    _anchor(TIMED[0], FORWARD, "the paper", "H100", 12.7),
    *(
        _anchor(_gated(length, 64), FORWARD, who, "H200", ms)
        for length, times in ((2048, (0.220, 0.113)), (8192, (0.814, 0.397)), (32768, (3.331, 1.521)))
        for who, ms in zip(("FLA 0.5.1", "FlashQLA"), times, strict=True)
    ),
    *(
        _anchor(_gated(length, 32), BACKWARD, who, "H200", ms)
        for length, times in ((8192, (1.444, 0.789)), (32768, (5.697, 2.515)))
        for who, ms in zip(("FLA 0.5.1", "FlashQLA"), times, strict=True)
    ),
    _anchor(TIMED[4], FORWARD, FLA, "H100", 0.726),
    _anchor(TIMED[4], BOTH, FLA, "H100", 3.367),
    # 2 T^2 H (K + V) / 2 FLOPs at 645 TFLOP/s
    _anchor(TIMED[3], FORWARD, "cuDNN", "H100", 2.0 * 16384**2 * 16 * 128 / 645e9),
)


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every goal with what was measured of it; "met" is None where a time is missing."""
    times = {(row["case"], row["pass"], row["implementation"]): row.get("milliseconds") for row in rows}

    def ours(case: str, direction: str, name: str = "pallas") -> float | None:
        forward, both = (times.get((case, way, name)) for way in (FORWARD, BOTH))
        if direction == BACKWARD:
            return None if forward is None or both is None else both - forward
        return forward if direction == FORWARD else both

    def judge(case: str, direction: str, limit: float | None, what: str) -> dict[str, Any]:
        got = ours(case, direction)
        met = None if got is None or limit is None else bool(got <= limit)
        return {"goal": f"{case} {direction}: {what}", "limit": limit, "milliseconds": got, "met": met}

    found = [judge(TIMED[0].name, FORWARD, 2.5, "at most 2.5 ms")]
    rival = ours(TIMED[0].name, BOTH, FLA)
    found.append(judge(TIMED[0].name, BOTH, rival and rival / 5, "at least 5 times FLA's in this run"))
    for case in TIMED:
        if case.op == "delta_rule":
            for direction in (FORWARD, BACKWARD):
                limit = ours(case.name, direction, FLA)
                found.append(judge(case.name, direction, limit, "ahead of FLA's in this run"))
    for anchor in ANCHORS:
        if "delta_rule" in anchor["case"]:
            what = f"ahead of {anchor['who']}'s published {anchor['milliseconds']} ms ({anchor['chip']})"
            found.append(judge(anchor["case"], anchor["pass"], anchor["milliseconds"], what))
    return found


def run_calls(call: Callable[[int], Any], wait: Callable[[Any], Any], seconds: float) -> dict[str, Any]:
    """Samples of a call of about `seconds` in all; `call(i)` starts the i-th, `wait` waits for what it returned."""

    def sample(count: int) -> tuple[float, float]:
        start = time.perf_counter()
        for i in range(count):
            last = call(i)
        started = time.perf_counter()
        wait(last)
        return time.perf_counter() - start, started - start

    # The clock of an idle device is low: what is not counted raises it.
    once, _ = sample(1)
    if once < 0.3 * seconds:
        once = sample(4)[0] / 4
        sample(max(1, math.ceil(0.3 * seconds / once)))
        once = sample(4)[0] / 4
    count = max(1, round(0.2 * seconds / once))
    taken = [sample(count) for _ in range(5 if once * 3 < seconds else 1)]
    host = statistics.median(started / total for total, started in taken)
    return {"samples": [1e3 * total / count for total, _ in taken], "host": host}
