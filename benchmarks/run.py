"""Times the ops side by side: python -m benchmarks.run [--ops delta_rule] [--peer-python PYTHON] [--out FILE]

Everything compared is run in turns on the same inputs, and medians are compared; outputs (or gradients) of all
contestants are held against each other first. Peers run in a second process that answers one request at a time.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib

import memformer as mf
from benchmarks import cases, goals, timing

PASSES = (("forward", False), ("forward+backward", True))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--ops", help="comma-separated names; all if not given")
    parser.add_argument(
        "--peer-python", help="a python with torch, transformers, flash-linear-attention; none if not given"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes: checks the runner, says nothing about speed")
    parser.add_argument("--no-scaling", action="store_true", help="leave out the lengths of 8k to 64k")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing a case and pass (default 10)")
    parser.add_argument("--out", help="write everything measured as JSON")
    arguments = parser.parse_args(argv)
    arguments.ops = (
        arguments.ops.split(",") if arguments.ops else sorted({case.op for case in cases.CASES} | {"delta_product"})
    )
    return arguments


def measure(case: cases.Case, gradient: bool, peer: timing.PeerProcess | None, budget: float) -> list[dict[str, Any]]:
    """Rows of one case and pass, one an implementation; the default is the first."""
    runners: list[Any] = [timing.Ours(case, name, gradient) for name in case.implementations]
    if peer is not None:
        runners += [timing.Theirs(peer, case, name, gradient) for name in case.peers]
    # The last of ours is the plainest: all others are held against it.
    oracle = runners[len(case.implementations) - 1].outputs()
    errors = [timing.relative_error(runner.outputs(), oracle) for runner in runners]
    samples = timing.interleave(runners, budget)
    flops, moved = cases.floor(case, gradient)
    medians = [statistics.median(sample) for sample in samples]
    return [
        {
            "op": case.op,
            "variant": case.variant,
            "T": case.length,
            "shape": case.shape,
            "pass": "forward+backward" if gradient else "forward",
            "implementation": runner.name,
            "ran": runner.ran,
            "milliseconds": 1e3 * median,
            "low": 1e3 * min(sample),
            "high": 1e3 * max(sample),
            "rounds": len(sample),
            "ratio": median / medians[0],
            "error": error,
            "flops": flops,
            "bytes": moved,
        }
        for runner, sample, median, error in zip(runners, samples, medians, errors, strict=True)
    ]


def scale(group: Sequence[cases.Case], gradient: bool, budget: float) -> dict[str, Any]:
    """Time against length for one memory."""
    samples = timing.interleave([timing.Ours(case, "default", gradient) for case in group], budget)
    medians = [statistics.median(sample) for sample in samples]
    lengths = [case.length for case in group]
    return {
        "op": group[0].op,
        "variant": group[0].variant,
        "shape": group[0].shape,
        "pass": "forward+backward" if gradient else "forward",
        "T": lengths,
        "milliseconds": [1e3 * median for median in medians],
        "exponent": timing.exponent(lengths, medians),
    }


def surroundings(peer: timing.PeerProcess | None, quick: bool) -> dict[str, Any]:
    """When, on what, and with which versions."""

    def git(*words: str) -> str:
        folder = pathlib.Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True).stdout.strip()

    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    flops, bandwidth = timing.peaks(128 if quick else 4096)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--untracked-files=no")),
        "device": str(jax.devices()[0].device_kind),
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "memformer": mf.__version__,
            **(peer.ask(do="versions") if peer is not None else {}),
        },
        "flops_per_second": flops,
        "bytes_per_second": bandwidth,
    }


COLUMNS = {"op": 26, "T": -6, " shape": 10, "pass": 18, "implementation": 34}
FIGURES = ("ms", "low", "high", "floor", "ratio", "error")
HEAD = "".join(f"{name:{'>' if width < 0 else '<'}{abs(width)}}" for name, width in COLUMNS.items())
HEAD += "".join(f"{name:>9}" for name in FIGURES)


def line(row: dict[str, Any], around: dict[str, Any]) -> str:
    """One row of the printed table. The floor is the longer of FLOPs and bytes at the speeds measured here."""
    floor = 1e3 * max(row["flops"] / around["flops_per_second"], row["bytes"] / around["bytes_per_second"])
    name = row["implementation"] + (f" ({row['ran']})" if row["implementation"] == "default" and row["ran"] else "")
    op = row["op"] if row["variant"] == "plain" else f"{row['variant']} {row['op']}"
    figures = (row["milliseconds"], row["low"], row["high"], floor, row["ratio"])
    words = f"{op:26}{row['T']:6} {row['shape']:9}{row['pass']:18}{name:34}"
    return words + "".join(f"{figure:9.2f}" for figure in figures) + f"{row['error']:9.0e}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, prints and writes; returns what was written."""
    arguments = parse(argv)
    table = cases.QUICK if arguments.quick else cases.CASES
    scaling = cases.QUICK_SCALING if arguments.quick else cases.SCALING
    budget = 0.0 if arguments.quick else arguments.budget
    peer = timing.PeerProcess(arguments.peer_python) if arguments.peer_python else None
    found = {**surroundings(peer, arguments.quick), "rows": [], "scaling": []}
    print(f"{found['processor']}, {found['cores']} cores; {found['versions']}")
    print(
        f"floors at {found['flops_per_second'] / 1e9:.0f} GFLOP/s (float32 matrix product) and "
        f"{found['bytes_per_second'] / 1e9:.1f} GB/s (addition in place), both measured now\n{HEAD}"
    )
    for case in table:
        if case.op not in arguments.ops:
            continue
        for _, gradient in PASSES:
            rows = measure(case, gradient, peer, budget)
            found["rows"] += rows
            print("\n".join(line(row, found) for row in rows), flush=True)
    if peer is not None:
        peer.close()
    for group in () if arguments.no_scaling else scaling:
        if group[0].op not in arguments.ops:
            continue
        for _, gradient in PASSES:
            row = scale(group, gradient, budget)
            found["scaling"].append(row)
            times = ", ".join(f"{t}: {ms:.1f}" for t, ms in zip(row["T"], row["milliseconds"], strict=True))
            what = f"{row['variant']} {row['op']} {row['shape']} {row['pass']}"
            print(f"{what}, ms by T: {times}; exponent {row['exponent']:.3f}", flush=True)
    found["goals"] = goals.judge(found["rows"], found["scaling"])
    for verdict in found["goals"]:
        got = "not measured" if verdict["got"] is None else f"{verdict['got']:.2f}"
        print(f"{'met' if verdict['met'] else '-' if verdict['met'] is None else 'NOT MET':8} {verdict['goal']}: {got}")
    if arguments.out:
        path = pathlib.Path(arguments.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
