"""The GPU kernels on an H200: verified, then timed beside what else can do the same, in one run.

    python -m benchmarks.gpu [--verify] [--time] [--static] [--limit SECONDS] [--peer-path FOLDER] [--out FILE.json]

  --verify   the ops' suite and more against float64 (gpu_verify.py), a line a case
  --time     forward and forward+backward at the shapes of gpu_cases.TIMED (the default)
  --static   what ptxas says of every kernel: registers, spills, warnings (gpu_static.py). Needs no GPU, but the CUDA
             plugin wheels (extra gpu-compiler) and ptxas. Goes on where it stopped: a good case of these
             kernels and this jax is not compiled again

The exit status is 1 if a case verified was wrong or not reached, or a kernel spills or serializes its products.

Beside our kernels run our chunked form and recurrence, cuDNN through jax.nn, PyTorch's attention, and FLA's Triton
ops. torch and triton must be there already. FLA is pure Python; where no network is, carry its wheels in a folder:

    pip download --no-deps -d .whl fla-core flash-linear-attention
    pip install --no-deps --no-index --no-compile --target /tmp/site .whl/*.whl
    python -m benchmarks.gpu --verify --time --limit 570 --peer-path /tmp/site --out gpu.json

What is missing or fails is a row that says so. Each contestant runs in turns with the others of its case, in a process
that may hang or die (workers.py); every row is in the file as soon as it is there. Other processes compile the peers'
kernels ahead, while --verify runs or before the first row: their compiler keeps them on disk.

The floor of a row is its FLOPs or its bytes (gpu_cases.floor), whichever takes longer at the rates that the same run
measured of a matrix product and a copy. Without an sm_90 GPU toy shapes run by the forms that serve there, to show
that all of this runs: those times mean nothing, and it says so.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import queue
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks import gpu_cases, gpu_static
from benchmarks.gpu_cases import ANCHORS, FLA, PASSES, SHIPPED, TIMED, TOY, Case
from benchmarks.workers import Worker, WorkerError

JAX, TORCH = "benchmarks.gpu_worker", "benchmarks.gpu_peers"

# Seconds that a request may take: to compile and run once, to be timed, to be verified.
LOAD, TIME, VERIFY = 150.0, 60.0, 100.0

# To compile a peer ahead: its library tries many variants of each kernel.
AHEAD = 180.0

# Share of the limit that --verify may take where times are wanted too.
VERIFIED = 0.45

# Processes that verify at one time: compilers take most of it.
VERIFIERS = 6

# Turns of every contestant, and seconds of each.
TURNS, TURN = 3, 0.15


class Report:
    """What was measured, in a file that is whole after every row."""

    def __init__(self, path: str | None, limit: float):
        self.path = None if path is None else pathlib.Path(path)
        self.end = time.monotonic() + limit
        self.content: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        self.lock = threading.Lock()

    def left(self) -> float:
        """Seconds until the limit."""
        return self.end - time.monotonic()

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Prints a row, and writes all of them."""
        with self.lock:
            self.content.setdefault(part, []).append(row)
            print("  ".join(f"{key} {_short(value)}" for key, value in row.items() if key != "samples"), flush=True)
            self.write()

    def write(self) -> None:
        """Writes the file: whole, or not at all."""
        if self.path is not None:
            part = self.path.with_name(f"{self.path.name}.part")
            part.write_text("{\n" + ",\n".join(_lines(*item) for item in self.content.items()) + "\n}\n")
            part.replace(self.path)


def _lines(key: str, value: Any) -> str:
    """A part of the file, a row a line."""
    if not isinstance(value, list | tuple):
        return f" {json.dumps(key)}: {json.dumps(value)}"
    rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
    return f" {json.dumps(key)}: [\n{rows}\n ]"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_verify(report: Report, names: Sequence[str], toy: bool, seconds: float) -> None:
    """All cases, several at one time; what is not reached within so many seconds is a fault."""
    end = time.monotonic() + seconds
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)

    def work() -> None:
        worker = Worker(JAX)
        while not waiting.empty():
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                break
            row: dict[str, Any] = {"case": name, "met": False, "failed": "not reached"}
            if (left := end - time.monotonic()) > 0:
                try:
                    row = worker.ask(min(VERIFY, left), do="verify", case=name, toy=toy)
                except WorkerError as error:
                    row["failed"] = str(error)
            report.add("verified", {"ok": "ok" if row["met"] else "FAULT", **row})
        worker.close()

    threads = [threading.Thread(target=work) for _ in range(1 if toy else VERIFIERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = report.content.get("verified", [])
    print(f"verified: {sum(row['met'] for row in rows)} of {len(rows)} cases", flush=True)


class Ahead:
    """Processes that run every peer once, so that its compiler's cache on disk is full; one process for each op.

    What fails will say so when it is timed.
    """

    def __init__(self, cases: Iterable[Case], python: str, environment: dict[str, str]):
        self.workers: list[Worker] = []
        self.threads: list[threading.Thread] = []
        self.stopped = threading.Event()
        # Compiled kernels depend on heads, not on time.
        kinds = {(case.op, case.heads, case.only_u, bool(case.segments)): case for case in cases}
        for op in dict.fromkeys(case.op for case in kinds.values()):
            self.workers.append(Worker(TORCH, python, environment))
            of = [case for case in kinds.values() if case.op == op]
            self.threads.append(threading.Thread(target=self._run, args=(self.workers[-1], of), daemon=True))
            self.threads[-1].start()

    def _run(self, worker: Worker, cases: Sequence[Case]) -> None:
        for case in cases:
            for what, gradient in PASSES:
                for kind, name in gpu_cases.contestants(case, gradient):
                    if kind != "torch" or self.stopped.is_set():
                        continue
                    start, error = time.monotonic(), ""
                    try:
                        worker.ask(AHEAD, do="load", case=dataclasses.asdict(case), gradient=gradient, name=name)
                    except WorkerError as problem:
                        error = f": {problem}"
                    took = time.monotonic() - start
                    print(f"ahead: {name} {case.name} {what} {took:.0f} s{error}", flush=True)

    def finish(self, seconds: float) -> None:
        """Waits so long at most, and ends them."""
        end = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
        self.stopped.set()
        for worker in self.workers:
            worker.close()


class Race:
    """The contestants of one case and pass."""

    def __init__(self, workers: dict[str, Worker], case: Case, gradient: bool):
        self.workers, self.case, self.gradient = workers, case, gradient
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.holds: dict[tuple[str, str], int] = {}

    def load(self, who: tuple[str, str]) -> bool:
        """Whether a contestant is loaded; its row says why not."""
        worker, row = self.workers[who[0]], self.rows.setdefault(who, {})
        if "error" in row:
            return False
        running = worker.process is not None and worker.process.poll() is None
        if running and self.holds.get(who) == worker.starts:
            return True
        try:
            case = dataclasses.asdict(self.case)
            row |= worker.ask(LOAD, do="load", case=case, gradient=self.gradient, name=who[1])
        except WorkerError as error:
            row["error"] = str(error)
            return False
        self.holds[who] = worker.starts
        return True

    def turn(self, who: tuple[str, str], seconds: float) -> None:
        """One turn of a contestant."""
        row = self.rows[who]
        if not self.load(who):
            return
        try:
            taken = self.workers[who[0]].ask(TIME, do="time", name=who[1], seconds=seconds)
        except WorkerError as error:
            row["error"] = str(error)
            return
        row.setdefault("samples", []).extend(taken["samples"])
        row["host"] = taken["host"]

    def run(self, turns: int, seconds: float) -> list[dict[str, Any]]:
        """Loads all, then gives each its turns; rows in the order of contestants."""
        order = gpu_cases.contestants(self.case, self.gradient)
        for who in order:
            self.load(who)
        for turn in range(turns):
            # Each turn starts with another, so that none always follows the same.
            for place in range(len(order)):
                self.turn(order[(turn + place) % len(order)], seconds)
        probes = {who: row.pop("probe") for who, row in self.rows.items() if "probe" in row}
        # Rows without the chunked form are held against the peer.
        wanted = next((probes[who] for who in (("jax", "chunked"), ("torch", FLA)) if who in probes), None)
        for who, probe in probes.items():
            if wanted is not None and "error" not in self.rows[who]:
                self.rows[who]["differs"] = difference(probe, wanted)
        return [self.rows[who] | {"name": who[1]} for who in order]


def difference(got: dict[str, list[float]], want: dict[str, list[float]]) -> float:
    """The largest relative RMS difference of the arrays of two contestants."""
    if set(got) != set(want):
        return float("nan")
    pairs = [(np.asarray(got[key]), np.asarray(want[key])) for key in want]
    return float(max(np.sqrt(np.mean((a - b) ** 2) / max(np.mean(b**2), 1e-60)) for a, b in pairs))


def run_time(report: Report, cases: Iterable[Case], workers: dict[str, Worker], chip: bool) -> None:
    """Every contestant of every case, forward and forward+backward."""
    try:
        peaks = workers["jax"].ask(LOAD, do="peaks")
    except WorkerError as error:
        report.content["error"] = str(error)
        peaks = {"flops": 788e12, "bytes": 4.3e12}
    report.content["peaks"] = peaks
    print(f"product {peaks['flops'] / 1e12:.4g} TFLOP/s, copy {peaks['bytes'] / 1e12:.4g} TB/s", flush=True)
    for case in cases:
        compile_ours(workers["jax"], case, report.left())
        for what, gradient in PASSES:
            common: dict[str, Any] = {"case": case.name, "pass": what}
            if report.left() <= 0:
                report.add("rows", {**common, "implementation": "all", "error": "not reached"})
                continue
            flops, moved = gpu_cases.floor(case, gradient)
            least = 1e3 * max(flops / peaks["flops"], moved / peaks["bytes"])
            for row in Race(workers, case, gradient).run(*((TURNS, TURN) if chip else (1, 0.002))):
                report.add("rows", _row({**common, "implementation": row.pop("name"), "floor": least}, row))
        for worker in workers.values():
            if worker.process is not None:
                with contextlib.suppress(WorkerError):
                    worker.ask(TIME, do="drop")


def compile_ours(worker: Worker, case: Case, seconds: float) -> None:
    """Compiles all of a case that JAX runs, at once: compilers take longer than what is timed."""
    wanted = [
        (gradient, name)
        for _, gradient in PASSES
        for kind, name in gpu_cases.contestants(case, gradient)
        if kind == "jax"
    ]
    if seconds > 0:
        # What hangs or dies here does so again, alone, when it is loaded.
        with contextlib.suppress(WorkerError):
            worker.ask(LOAD, do="compile", case=dataclasses.asdict(case), wanted=wanted)


def _row(common: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A row of the file from what a race found."""
    samples = row.get("samples", [])
    if "error" in row or not samples:
        return common | {"error": row.get("error", "not timed")}
    middle = statistics.median(samples)
    figures = {
        "milliseconds": middle,
        "low": min(samples),
        "high": max(samples),
        "over floor": middle / common["floor"],
    }
    memory = row["memory"] if row["memory"] is None else round(row["memory"] / 2**20, 1)
    rest = {"MiB": memory, "host": row["host"], "differs": row.get("differs"), "first": row["first"]}
    return common | figures | rest | {"samples": samples}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line a case and pass, one column a contestant; milliseconds (times the floor)."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = [f"| case | pass | floor | {' | '.join(names)} |", f"|{'---|' * (len(names) + 3)}"]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["case"], row["pass"]), {})[row["implementation"]] = row
    for (case, what), of in found.items():
        cells = []
        for name in names:
            row = of.get(name, {})
            text = f"{row['milliseconds']:.3f} ({row['over floor']:.1f})" if "milliseconds" in row else ""
            cells.append("failed" if "error" in row else text)
        least = next((row["floor"] for row in of.values() if "floor" in row), float("nan"))
        lines.append(f"| {case} | {what} | {least:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_static(report: Report, cases: Sequence[Case]) -> None:
    """Registers, spills and warnings of all cases; good ones of these kernels stay in the file."""
    kept = json.loads(report.path.read_text()).get("static", []) if report.path and report.path.exists() else []
    common = {"jax": importlib.metadata.version("jax"), "source": gpu_static.source()}
    known = {case.name for case in SHIPPED}
    kept = [row for row in kept if row.get("source") == common["source"] and row["case"] in known]
    here = [row for row in kept if row["jax"] == common["jax"]]
    good = {row["case"] for row in here} - {row["case"] for row in here if row["fault"]}
    wanted = [case for case in cases if case.name not in good]
    again = {case.name for case in wanted}
    report.content["static"] = [row for row in kept if row["jax"] != common["jax"] or row["case"] not in again]
    for row in gpu_static.static(wanted):
        report.add("static", {**row, "date": report.content["date"], **common})


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("verify", "time", "static"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds; what is not reached by then says so")
    parser.add_argument("--only", default="", help="cases that have this in their name, of all that is run")
    parser.add_argument("--peer-path", help="folder where the peers' packages lie, beside those installed")
    parser.add_argument("--peer-python", default=sys.executable, help="python that has torch (default: this one)")
    parser.add_argument("--out", help="JSON file")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Prints rows, writes them where asked; 1 if something was wrong."""
    options = arguments(given)
    report = Report(options.out, options.limit)
    extra = {}
    if options.peer_path:
        path = [options.peer_path, os.environ.get("PYTHONPATH", "")]
        extra = {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    workers = {"jax": Worker(JAX), "torch": Worker(TORCH, options.peer_python, extra)}
    try:
        if options.static:
            run_static(report, [case for case in SHIPPED if options.only in case.name])
        if options.verify or options.time or not options.static:
            run_device(report, options, workers, extra)
    finally:
        for worker in workers.values():
            worker.close()
        report.write()
    wrong = [row for row in report.content.get("verified", []) if not row["met"]]
    wrong += [row for row in report.content.get("static", []) if row["fault"]]
    return int(bool(wrong))


def run_device(report: Report, options: argparse.Namespace, workers: dict[str, Worker], extra: dict[str, str]) -> None:
    """What --verify and --time ask for."""
    about = workers["jax"].ask(LOAD, do="about")
    chip = about["chip"]
    report.content |= {"meaningful": chip, **about, "peers": workers["torch"].ask(LOAD, do="about")}
    if not chip:
        print("no sm_90 GPU here: toy shapes by the forms that serve; no time below means anything", flush=True)
    cases = [case for case in (TIMED if chip else TOY) if options.only in case.name]
    timed = options.time or not (options.verify or options.static)
    ahead = Ahead(cases if chip and timed else [], options.peer_python, extra)
    if options.verify:
        from benchmarks import gpu_verify

        names = [name for name in gpu_verify.names(not chip) if options.only in name]
        run_verify(report, names, not chip, VERIFIED * report.left() if timed else report.left())
    ahead.finish(min(AHEAD, 0.3 * report.left()))
    if timed:
        run_time(report, cases, workers, chip)
        report.content |= {"goals": gpu_cases.goals(report.content.get("rows", [])), "anchors": ANCHORS}
        print(table(report.content.get("rows", [])))
        for goal in report.content["goals"]:
            print("  ".join(f"{key} {_short(value)}" for key, value in goal.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
