"""What the timings are held against."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["GOALS", "judge"]

TORCH = "torch chunked (transformers)"

# (op, shape, pass, implementation compared with, times as fast the default must be), all at T = 2048, float32
GOALS = (
    ("delta_rule", "4 x 64", "forward", "recurrent", 1.0),
    ("delta_rule", "16 x 128", "forward", "recurrent", 1.0),
    ("delta_rule", "4 x 64", "forward+backward", "recurrent", 8.0),
    ("delta_rule", "4 x 64", "forward", TORCH, 4.0),
    ("delta_rule", "4 x 64", "forward+backward", TORCH, 2.5),
    ("delta_rule", "16 x 128", "forward", TORCH, 2.0),
    ("delta_rule", "16 x 128", "forward+backward", TORCH, 1.8),
)
EXPONENT = 1.1


def judge(rows: Sequence[Mapping[str, Any]], scaling: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a goal: what was wanted, what was measured, met or not (None where it was not measured)."""
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
    return verdicts
