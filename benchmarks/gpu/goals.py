"""Published figures, and the goals that the GPU timings are held against."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cases import BOTH, FORWARD, Case
from benchmarks.gpu.cases import FLA, TIMED, gated_case

__all__ = ["ANCHORS", "judge"]

BACKWARD = "backward"


def _anchor(case: Case, direction: str, who: str, chip: str, milliseconds: float) -> dict[str, Any]:
    return {"case": case.name, "pass": direction, "who": who, "chip": chip, "milliseconds": milliseconds}


# Published figures.
ANCHORS = (
    _anchor(TIMED[0], FORWARD, "the paper", "H100", 12.7),
    *(
        _anchor(gated_case(length, 64), FORWARD, who, "H200", ms)
        for length, times in ((2048, (0.220, 0.113)), (8192, (0.814, 0.397)), (32768, (3.331, 1.521)))
        for who, ms in zip(("FLA 0.5.1", "FlashQLA"), times, strict=True)
    ),
    *(
        _anchor(gated_case(length, 32), BACKWARD, who, "H200", ms)
        for length, times in ((8192, (1.444, 0.789)), (32768, (5.697, 2.515)))
        for who, ms in zip(("FLA 0.5.1", "FlashQLA"), times, strict=True)
    ),
    _anchor(TIMED[4], FORWARD, FLA, "H100", 0.726),
    _anchor(TIMED[4], BOTH, FLA, "H100", 3.367),
    # 2 T^2 H (K + V) / 2 FLOPs at 645 TFLOP/s
    _anchor(TIMED[3], FORWARD, "cuDNN", "H100", 2.0 * 16384**2 * 16 * 128 / 645e9),
)


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per goal: its limit, what was measured, and whether it was met (None where a time is missing)."""
    times = {(row["case"], row["pass"], row["implementation"]): row.get("milliseconds") for row in rows}

    def measured(case: str, direction: str, name: str = "pallas") -> float | None:
        forward, both = (times.get((case, way, name)) for way in (FORWARD, BOTH))
        if direction == BACKWARD:
            return None if forward is None or both is None else both - forward
        return forward if direction == FORWARD else both

    def verdict(case: str, direction: str, limit: float | None, what: str) -> dict[str, Any]:
        got = measured(case, direction)
        met = None if got is None or limit is None else bool(got <= limit)
        return {"goal": f"{case} {direction}: {what}", "limit": limit, "milliseconds": got, "met": met}

    found = [verdict(TIMED[0].name, FORWARD, 2.5, "at most 2.5 ms")]
    rival = measured(TIMED[0].name, BOTH, FLA)
    found.append(verdict(TIMED[0].name, BOTH, rival and rival / 5, "at least 5 times as fast as FLA in this run"))
    for case in TIMED:
        if case.op == "delta_rule":
            for direction in (FORWARD, BACKWARD):
                limit = measured(case.name, direction, FLA)
                found.append(verdict(case.name, direction, limit, "faster than FLA in this run"))
    for anchor in ANCHORS:
        if "delta_rule" in anchor["case"]:
            what = f"faster than {anchor['who']}'s published {anchor['milliseconds']} ms ({anchor['chip']})"
            found.append(verdict(anchor["case"], anchor["pass"], anchor["milliseconds"], what))
    return found
