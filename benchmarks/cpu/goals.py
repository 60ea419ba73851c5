"""The goals that the CPU timings are held against."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cases import BOTH, FORWARD, RECURRENT
from benchmarks.cpu.cases import SDPA, TORCH

__all__ = ["GOALS", "judge"]

# (op, shape, pass, rival, minimum speedup of the default over the rival), all at T = 2048, float32
GOALS = (
    ("delta_rule", "4 x 64", FORWARD, RECURRENT, 1.0),
    ("delta_rule", "16 x 128", FORWARD, RECURRENT, 1.0),
    ("delta_rule", "4 x 64", BOTH, RECURRENT, 8.0),
    ("delta_rule", "4 x 64", FORWARD, TORCH, 4.0),
    ("delta_rule", "4 x 64", BOTH, TORCH, 2.5),
    ("delta_rule", "16 x 128", FORWARD, TORCH, 2.0),
    ("delta_rule", "16 x 128", BOTH, TORCH, 1.8),
    ("softmax_attention", "4 x 64", FORWARD, SDPA, 1.0),
    ("softmax_attention", "4 x 64", BOTH, SDPA, 1.0),
    ("softmax_attention", "16 x 128", FORWARD, SDPA, 1.0),
    ("softmax_attention", "16 x 128", BOTH, SDPA, 1.0),
)
EXPONENT = 1.1

# Most times as long as with a decay per head that a decay per key channel takes.
PER_CHANNEL = 3.0


def judge(
    rows: Sequence[Mapping[str, Any]],
    scaling: Sequence[Mapping[str, Any]],
    per_channel: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """One row per goal: its limit, what was measured, and whether it was met (None where nothing was measured)."""
    verdicts = []
    for op, shape, direction, rival, want in GOALS:
        wanted = {"op": op, "shape": shape, "pass": direction, "implementation": rival, "T": 2048}
        got = next((row["ratio"] for row in rows if all(row[key] == value for key, value in wanted.items())), None)
        goal = f"{op} {shape} {direction}: default at least {want:g} times as fast as {rival}"
        verdicts.append({"goal": goal, "want": want, "got": got, "met": None if got is None else got >= want})
    for row in scaling:
        goal = f"{row['op']} ({row['variant']}) {row['pass']}: exponent of time in T at most {EXPONENT}"
        got = row["exponent"]
        verdicts.append({"goal": goal, "want": EXPONENT, "got": got, "met": got <= EXPONENT})
    for row in per_channel:
        goal = f"{row['op']} T {row['T']} {row['pass']}: decay per channel at most {PER_CHANNEL:g} times per head"
        got = row["ratio"]
        verdicts.append({"goal": goal, "want": PER_CHANNEL, "got": got, "met": got <= PER_CHANNEL})
    return verdicts
