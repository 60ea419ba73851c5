"""Verifies the GPU kernels on an H200 and times them beside other implementations, in one run.

    python -m benchmarks.gpu [--verify] [--time] [--static] [--limit SECONDS] [--peer-path FOLDER] [--out FILE.json]

  --verify   compare with float64: the ops' test suite and more (verify.py), one line per case
  --time     time forward and forward+backward at the shapes of cases.TIMED (the default)
  --static   report registers, spills and warnings of every kernel (static.py). Needs no GPU, but the CUDA plugin
             wheels (extra gpu-compiler) and ptxas. Resumes: good cases of the same kernels and jax are not
             compiled again

The exit status is 1 if a case failed verification or was not reached, or if a kernel spills or serializes its
products.

The contestants are our kernels, our chunked form and recurrence, cuDNN through jax.nn, PyTorch's attention, and FLA's
Triton ops. torch and triton must be installed. FLA is pure Python; without a network, bring its wheels in a folder:

    pip download --no-deps -d .whl fla-core flash-linear-attention
    pip install --no-deps --no-index --no-compile --target /tmp/site .whl/*.whl
    python -m benchmarks.gpu --verify --time --limit 570 --peer-path /tmp/site --out gpu.json

A contestant that is missing or fails is a row with an error. The contestants of a case run in interleaved turns, each
in a worker process that may hang or crash (workers.py), and every row is written at once. Other processes compile the
peers' kernels into Triton's disk cache, while --verify runs or before the first row.

The floor of a row is its FLOPs or its bytes (floor.py), whichever takes longer at the speeds of a matrix product and
of a copy that the same run measured. Without an sm_90 GPU, toy shapes run on the implementations available there, to
test this program: their times mean nothing.
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

from benchmarks.cases import PASSES, Case
from benchmarks.floor import floor
from benchmarks.gpu import goals, static
from benchmarks.gpu.cases import FLA, SHIPPED, TIMED, TOY, contestants
from benchmarks.timing import relative_error
from benchmarks.workers import Worker, WorkerError

JAX, TORCH = "benchmarks.gpu.worker", "benchmarks.gpu.peers"

# Seconds per request: to compile and run once, to time, to verify.
LOAD, TIME, VERIFY = 150.0, 60.0, 100.0

# Seconds to compile a peer in advance: Triton autotunes many variants of each kernel.
AHEAD = 180.0

# Share of the limit for --verify when --time follows.
VERIFIED = 0.45

# Parallel processes of --verify, which mostly compile.
VERIFIERS = 6

# Turns per contestant, and seconds per turn.
TURNS, TURN = 3, 0.15


class Report:
    """Measurements, written to a file that is complete after every row."""

    def __init__(self, path: str | None, limit: float):
        self.path = None if path is None else pathlib.Path(path)
        self.end = time.monotonic() + limit
        self.content: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        self.lock = threading.Lock()

    def left(self) -> float:
        """Seconds until the limit."""
        return self.end - time.monotonic()

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Adds a row, prints it, and rewrites the file."""
        with self.lock:
            self.content.setdefault(part, []).append(row)
            print("  ".join(f"{key} {_short(value)}" for key, value in row.items() if key != "samples"), flush=True)
            self.write()

    def write(self) -> None:
        """Writes the file atomically."""
        if self.path is not None:
            part = self.path.with_name(f"{self.path.name}.part")
            part.write_text("{\n" + ",\n".join(_lines(*item) for item in self.content.items()) + "\n}\n")
            part.replace(self.path)


def _lines(key: str, value: Any) -> str:
    """Formats one entry of the file, one row per line."""
    if not isinstance(value, list | tuple):
        return f" {json.dumps(key)}: {json.dumps(value)}"
    rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
    return f" {json.dumps(key)}: [\n{rows}\n ]"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_verify(report: Report, names: Sequence[str], toy: bool, seconds: float) -> None:
    """Verifies cases in parallel; a case not reached within `seconds` is a fault."""
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
    """Processes, one per op, that run every peer once to fill its compiler's disk cache.

    Failures are reported when the peer is timed.
    """

    def __init__(self, cases: Iterable[Case], python: str, environment: dict[str, str]):
        self.workers: list[Worker] = []
        self.threads: list[threading.Thread] = []
        self.stopped = threading.Event()
        # Compiled kernels depend on the heads, not on the length.
        kinds = {(case.op, case.heads, case.only_u, bool(case.segments)): case for case in cases}
        for op in dict.fromkeys(case.op for case in kinds.values()):
            self.workers.append(Worker(TORCH, python, environment))
            of = [case for case in kinds.values() if case.op == op]
            self.threads.append(threading.Thread(target=self._run, args=(self.workers[-1], of), daemon=True))
            self.threads[-1].start()

    def _run(self, worker: Worker, cases: Sequence[Case]) -> None:
        for case in cases:
            for what, gradient in PASSES:
                for kind, name in contestants(case, gradient):
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
        """Waits at most `seconds`, then kills the processes."""
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
        """Loads a contestant; False, with the error in its row, where that fails."""
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
        """Times one turn of a contestant."""
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
        """Loads all contestants, then times them in turns; rows in the order of contestants."""
        order = contestants(self.case, self.gradient)
        for who in order:
            self.load(who)
        for turn in range(turns):
            # Rotating the order, so that no contestant always follows the same one.
            for place in range(len(order)):
                self.turn(order[(turn + place) % len(order)], seconds)
        probes = {who: row.pop("probe") for who, row in self.rows.items() if "probe" in row}
        # Without the chunked form, the peer is the oracle.
        wanted = next((probes[who] for who in (("jax", "chunked"), ("torch", FLA)) if who in probes), None)
        for who, probe in probes.items():
            if wanted is not None and "error" not in self.rows[who]:
                self.rows[who]["differs"] = relative_error(probe, wanted)
        return [self.rows[who] | {"name": who[1]} for who in order]


def run_time(report: Report, cases: Iterable[Case], workers: dict[str, Worker], chip: bool) -> None:
    """Times every contestant of every case, forward and forward+backward."""
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
            flops, moved = floor(case, gradient)
            least = 1e3 * max(flops / peaks["flops"], moved / peaks["bytes"])
            for row in Race(workers, case, gradient).run(*((TURNS, TURN) if chip else (1, 0.002))):
                report.add("rows", _row({**common, "implementation": row.pop("name"), "floor": least}, row))
        for worker in workers.values():
            if worker.process is not None:
                with contextlib.suppress(WorkerError):
                    worker.ask(TIME, do="drop")


def compile_ours(worker: Worker, case: Case, seconds: float) -> None:
    """Compiles all JAX contestants of a case in parallel: compilation takes longer than the timing."""
    wanted = [(gradient, name) for _, gradient in PASSES for kind, name in contestants(case, gradient) if kind == "jax"]
    if seconds > 0:
        # A contestant that hangs or crashes here does so again, alone, when it is loaded.
        with contextlib.suppress(WorkerError):
            worker.ask(LOAD, do="compile", case=dataclasses.asdict(case), wanted=wanted)


def _row(common: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Makes a row of the file from the result of a race."""
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
    """Markdown table: one line per case and pass, one column per contestant; milliseconds (multiples of the floor)."""
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
    """Reports registers, spills and warnings; rows of good cases of the same kernels are kept from the file."""
    kept = json.loads(report.path.read_text()).get("static", []) if report.path and report.path.exists() else []
    common = {"jax": importlib.metadata.version("jax"), "source": static.hash_sources()}
    known = {case.name for case in SHIPPED}
    kept = [row for row in kept if row.get("source") == common["source"] and row["case"] in known]
    here = [row for row in kept if row["jax"] == common["jax"]]
    good = {row["case"] for row in here} - {row["case"] for row in here if row["fault"]}
    wanted = [case for case in cases if case.name not in good]
    again = {case.name for case in wanted}
    report.content["static"] = [row for row in kept if row["jax"] != common["jax"] or row["case"] not in again]
    for row in static.report(wanted):
        report.add("static", {**row, "date": report.content["date"], **common})


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("verify", "time", "static"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for the whole run (default: 3600)")
    parser.add_argument("--only", default="", help="run only cases whose name contains this")
    parser.add_argument("--peer-path", help="folder with further packages of the peers")
    parser.add_argument("--peer-python", default=sys.executable, help="python with torch (default: this one)")
    parser.add_argument("--out", help="JSON file")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Runs the benchmark; returns 1 if a case or kernel has a fault."""
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
    """Runs --verify and --time."""
    about = workers["jax"].ask(LOAD, do="about")
    chip = about["chip"]
    report.content |= {"meaningful": chip, **about, "peers": workers["torch"].ask(LOAD, do="about")}
    if not chip:
        print("no sm_90 GPU: toy shapes on the available implementations; the times below mean nothing", flush=True)
    cases = [case for case in (TIMED if chip else TOY) if options.only in case.name]
    timed = options.time or not (options.verify or options.static)
    ahead = Ahead(cases if chip and timed else [], options.peer_python, extra)
    if options.verify:
        # Loads the tests, which the other modes do not need.
        from benchmarks.gpu import verify

        names = [name for name in verify.names(not chip) if options.only in name]
        run_verify(report, names, not chip, VERIFIED * report.left() if timed else report.left())
    ahead.finish(min(AHEAD, 0.3 * report.left()))
    if timed:
        run_time(report, cases, workers, chip)
        report.content |= {"goals": goals.judge(report.content.get("rows", [])), "anchors": goals.ANCHORS}
        print(table(report.content.get("rows", [])))
        for goal in report.content["goals"]:
            print("  ".join(f"{key} {_short(value)}" for key, value in goal.items()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
