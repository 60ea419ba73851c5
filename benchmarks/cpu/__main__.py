"""Times the ops beside textbook JAX and PyTorch: python -m benchmarks.cpu [--ops delta_rule] [--out FILE]

All contestants of a case run on the same inputs in interleaved rounds, and their medians are compared; outputs (or
gradients) are compared first. Peers run in a second process (--peer-python). Without --ops, the seconds to the first
training step of two configs come last (first_step.py).
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
from benchmarks import timing
from benchmarks.cases import BOTH, FORWARD, PASSES, Case
from benchmarks.cpu import cases, goals
from benchmarks.cpu.contestants import LOAD, Ours, Theirs, measure_peaks, start_peers
from benchmarks.cpu.first_step import CONFIGS, first_step
from benchmarks.floor import floor
from benchmarks.workers import Worker


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--ops", help="comma-separated names of ops (default: all)")
    parser.add_argument(
        "--peer-python", help="python with torch, transformers and flash-linear-attention (default: no peers)"
    )
    parser.add_argument("--quick", action="store_true", help="toy sizes, which check the program and measure nothing")
    parser.add_argument("--no-scaling", action="store_true", help="skip the lengths from 8k to 64k")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing per case and pass (default: 10)")
    parser.add_argument("--out", help="JSON file for all measurements")
    arguments = parser.parse_args(argv)
    arguments.configs = () if arguments.ops else CONFIGS
    arguments.ops = (
        arguments.ops.split(",") if arguments.ops else sorted({case.op for case in cases.CASES} | {"delta_product"})
    )
    return arguments


def measure(case: Case, gradient: bool, peers: Worker | None, budget: float) -> list[dict[str, Any]]:
    """Rows of one case and pass, one per contestant; the default is the first."""
    runners: list[Any] = [Ours(case, name, gradient) for name in case.implementations]
    # The last of ours is the simplest, and the oracle of the others.
    oracle = runners[-1].outputs()
    if peers is not None:
        runners += [Theirs(peers, case, name, gradient) for name in case.peers]
    errors = [runner.error(oracle) for runner in runners]
    samples = timing.interleave(runners, budget)
    flops, moved = floor(case, gradient)
    medians = [statistics.median(sample) for sample in samples]
    return [
        {
            "op": case.op,
            "variant": cases.variant(case),
            "T": case.length,
            "shape": _shape(case),
            "pass": BOTH if gradient else FORWARD,
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


def _shape(case: Case) -> str:
    return f"{case.heads} x {case.key}"


def scale(group: Sequence[Case], gradient: bool, budget: float) -> dict[str, Any]:
    """Times one memory at several lengths."""
    samples = timing.interleave([Ours(case, "default", gradient) for case in group], budget)
    medians = [statistics.median(sample) for sample in samples]
    lengths = [case.length for case in group]
    return {
        "op": group[0].op,
        "variant": cases.variant(group[0]),
        "shape": _shape(group[0]),
        "pass": BOTH if gradient else FORWARD,
        "T": lengths,
        "milliseconds": [1e3 * median for median in medians],
        "exponent": timing.exponent(lengths, medians),
    }


def compare(pair: Sequence[Case], gradient: bool, budget: float) -> dict[str, Any]:
    """Times a decay per key channel beside one per head, in interleaved rounds."""
    head, channel = map(
        statistics.median, timing.interleave([Ours(case, "default", gradient) for case in pair], budget)
    )
    return {
        "op": pair[0].op,
        "T": pair[0].length,
        "shape": _shape(pair[0]),
        "pass": BOTH if gradient else FORWARD,
        "head": 1e3 * head,
        "channel": 1e3 * channel,
        "ratio": channel / head,
    }


def environment(peers: Worker | None, quick: bool) -> dict[str, Any]:
    """Date, machine and versions of a run."""

    def git(*words: str) -> str:
        folder = pathlib.Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True).stdout.strip()

    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    flops, bandwidth = measure_peaks(128 if quick else 4096)
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
            **(peers.ask(LOAD, do="about") if peers is not None else {}),
        },
        "flops_per_second": flops,
        "bytes_per_second": bandwidth,
    }


COLUMNS = {"op": 26, "T": -6, " shape": 10, "pass": 18, "implementation": 34}
FIGURES = ("ms", "low", "high", "floor", "ratio", "error")
HEAD = "".join(f"{name:{'>' if width < 0 else '<'}{abs(width)}}" for name, width in COLUMNS.items())
HEAD += "".join(f"{name:>9}" for name in FIGURES)


def line(row: dict[str, Any], around: dict[str, Any]) -> str:
    """Formats a row; its floor is the longer time of its FLOPs and bytes at the speeds measured in this run."""
    least = 1e3 * max(row["flops"] / around["flops_per_second"], row["bytes"] / around["bytes_per_second"])
    name = row["implementation"] + (f" ({row['ran']})" if row["implementation"] == "default" and row["ran"] else "")
    op = row["op"] if row["variant"] == "plain" else f"{row['variant']} {row['op']}"
    figures = (row["milliseconds"], row["low"], row["high"], least, row["ratio"])
    labels = f"{op:26}{row['T']:6} {row['shape']:9}{row['pass']:18}{name:34}"
    return labels + "".join(f"{figure:9.2f}" for figure in figures) + f"{row['error']:9.0e}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, prints and writes the benchmark; returns what was written."""
    arguments = parse(argv)
    table = cases.QUICK if arguments.quick else cases.CASES
    scaling = cases.QUICK_SCALING if arguments.quick else cases.SCALING
    pairs = cases.QUICK_PER_CHANNEL if arguments.quick else cases.PER_CHANNEL
    budget = 0.0 if arguments.quick else arguments.budget
    peers = start_peers(arguments.peer_python) if arguments.peer_python else None
    found = {**environment(peers, arguments.quick), "rows": [], "scaling": [], "per_channel": [], "first_step": []}
    print(f"{found['processor']}, {found['cores']} cores; {found['versions']}")
    print(
        f"floors at {found['flops_per_second'] / 1e9:.0f} GFLOP/s (float32 matrix product) and "
        f"{found['bytes_per_second'] / 1e9:.1f} GB/s (addition in place), both measured in this run\n{HEAD}"
    )
    for case in table:
        if case.op not in arguments.ops:
            continue
        for _, gradient in PASSES:
            rows = measure(case, gradient, peers, budget)
            found["rows"] += rows
            print("\n".join(line(row, found) for row in rows), flush=True)
    if peers is not None:
        peers.close()
    for pair in pairs:
        for _, gradient in PASSES if pair[0].op in arguments.ops else ():
            row = compare(pair, gradient, budget)
            found["per_channel"].append(row)
            times = f"per head {row['head']:.1f} ms, per channel {row['channel']:.1f} ms"
            print(
                f"{row['op']} T {row['T']} {row['shape']} {row['pass']}: {times}, ratio {row['ratio']:.2f}", flush=True
            )
    for group in () if arguments.no_scaling else scaling:
        if group[0].op not in arguments.ops:
            continue
        for _, gradient in PASSES:
            row = scale(group, gradient, budget)
            found["scaling"].append(row)
            times = ", ".join(f"{t}: {ms:.1f}" for t, ms in zip(row["T"], row["milliseconds"], strict=True))
            what = f"{row['variant']} {row['op']} {row['shape']} {row['pass']}"
            print(f"{what}, ms by T: {times}; exponent {row['exponent']:.3f}", flush=True)
    found["first_step"] = [first_step(config, arguments.quick) for config in arguments.configs]
    for row in found["first_step"]:
        phases = ", ".join(f"{name} {row[name]:.1f}" for name in ("import", "build", "trace", "compile"))
        whole = f"first step after {row['first']:.1f} s ({phases}; {row['cpu']:.1f} s of CPU)"
        print(f"{row['config']}: {whole}, then {row['step']:.1f} ms per step", flush=True)
    found["goals"] = goals.judge(found["rows"], found["scaling"], found["per_channel"])
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
