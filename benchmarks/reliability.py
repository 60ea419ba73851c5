"""Tries faults on small runs and tables the outcomes: python -m benchmarks.reliability [--only FAULT] [--times N]

The outcomes of a fault are written to benchmarks/results/reliability.json, with --add on top of those that stand there,
and the table of docs/reliability.md is written from it. An attempt that is not among the good outcomes makes the exit
code 1. A full disk needs the right to mount one.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from memformer.training.lock import LOCK
from tests.processes import Script, launch
from tests.training import runs

RESULTS = runs.ROOT / "benchmarks" / "results" / "reliability.json"
PAGE = runs.ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: python -m benchmarks.reliability -->", "<!-- end of table -->"
STEPS = 60
# Good outcomes; any other text is a failure.
SAME = "resumed, same bits as an uninterrupted run"
WARNED = "skipped with a warning; resumed, same bits"
AGAIN = "a sentence; the rerun resumed, same bits"
BACK = "a sentence; the rerun resumed"
SENTENCE = "a sentence that names the step"
ONE = "one trained undisturbed, the other was refused"
FAST, SLOW = "ended within 1 s with a sentence that names it", "ended within 30 s with a sentence that names it"
LAYOUT = "resumed, and says that results agree to rounding"
BOTH = "both ended with a sentence that names the disk"
GOOD = {BOTH, SAME, WARNED, AGAIN, BACK, SENTENCE, ONE, FAST, SLOW, LAYOUT}


class Lab:
    """Folders and runs of one session: an uninterrupted run to compare with, and a cache of compiled programs."""

    def __init__(self, root: pathlib.Path, rng: random.Random):
        self.root, self.rng, self._count = root, rng, 0
        self.settings = {"train.steps": STEPS, "train.compile_cache": root / "cache"}
        self.whole = root / "whole"
        runs.finish(runs.start(self.whole, self.settings), f"{self.whole}.log")

    def folder(self) -> pathlib.Path:
        """A new path for a run."""
        self._count += 1
        return self.root / f"run{self._count}"

    def start(self, folder: pathlib.Path, settings=(), flags=()) -> Script:
        """Starts or resumes the run of `folder`."""
        return runs.start(folder, {**self.settings, **dict(settings)}, flags=flags, launch=launch)

    def stopped(self, folder: pathlib.Path, step: int = 20) -> None:
        """Trains until some step, and kills the run."""
        process = self.start(folder)
        runs.wait_until(lambda: runs.last_step(folder) >= step, process)
        process.kill()
        process.wait()

    def resumes(self, folder: pathlib.Path, warns: str = "", good: str = SAME) -> str:
        """Resumes a run; see `ended`."""
        return self.ended(self.start(folder), folder, warns, good)

    def ended(self, process: Script, folder: pathlib.Path, warns: str = "", good: str = SAME) -> str:
        """`good` if a run ends as the uninterrupted one and, where asked, warned."""
        said = runs.finish(process, f"{folder}.log")
        runs.assert_same_run(folder, self.whole)
        return good if re.search(warns, said) else f"no warning: {last_line(folder)}"

    def refuses(self, folder: pathlib.Path, settings, pattern: str) -> bool:
        """Whether the run of `folder` ends with one paragraph that matches."""
        code = self.start(folder, settings).wait(180)
        return code != 0 and says(folder, pattern)


def last_line(folder: pathlib.Path) -> str:
    lines = pathlib.Path(f"{folder}.log").read_text().strip().splitlines()
    return lines[-1] if lines else ""


def says(folder: pathlib.Path, pattern: str) -> bool:
    """Whether the last line of a run is an error that matches, and no traceback stands before it."""
    said = pathlib.Path(f"{folder}.log").read_text()
    return "Traceback" not in said and bool(re.match(f"error: .*{pattern}", last_line(folder)))


def kill_while_saving(lab: Lab, times: int) -> Iterator[str]:
    """kill -9 at a random moment of a save"""
    folder, killed = lab.folder(), 0
    checkpoints = folder / "checkpoints"
    while killed < times:
        # one run has about twenty saves: a new one where most are used up
        if folder.exists() and runs.last_step(folder) > STEPS - 12:
            yield from [lab.resumes(folder)] * killed
            times, killed, folder = times - killed, 0, lab.folder()
            checkpoints = folder / "checkpoints"
        process = lab.start(folder)
        target = runs.last_step(folder) + lab.rng.randrange(2, 8)
        runs.wait_until(lambda: runs.last_step(folder) >= target, process)  # noqa: B023
        runs.wait_until(lambda: checkpoints.is_dir() and any("tmp" in p.name for p in checkpoints.iterdir()), process)  # noqa: B023
        time.sleep(lab.rng.uniform(0, 0.03))
        process.kill()
        process.wait()
        killed += 1
    yield from [lab.resumes(folder)] * killed


def full_disk(lab: Lab, times: int) -> Iterator[str]:
    """A disk that fills up, of 8 to 300 KiB; then it has space again"""
    for _ in range(times):
        disk = lab.folder()
        disk.mkdir()
        size = lab.rng.randrange(8, 301, 4)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
        try:
            folder = disk / "run"
            # the output goes to another disk
            os.symlink(lab.root / f"{disk.name}-small.log", f"{folder}.log")
            refused = lab.refuses(folder, (), r"cannot write .*No space left on device.*free of")
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            yield AGAIN if refused and lab.resumes(folder) == SAME else f"{size} KiB: {last_line(folder)}"
        finally:
            subprocess.run(["umount", "-l", disk], check=True)


def damaged(harm: Callable[[pathlib.Path, random.Random], None]) -> Callable[[Lab, int], Iterator[str]]:
    def attempts(lab: Lab, times: int) -> Iterator[str]:
        for _ in range(times):
            folder = lab.folder()
            lab.stopped(folder)
            step = max(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal())
            files = [p for p in (folder / "checkpoints" / str(step)).rglob("*") if p.is_file() and p.stat().st_size]
            harm(lab.rng.choice([p for p in files if "commit_success" not in p.name]), lab.rng)
            yield lab.resumes(folder, rf"Checkpoint {step} in .*skipped", WARNED)

    return attempts


def truncate(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip(path: pathlib.Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


def empty_newest_step(lab: Lab, times: int) -> Iterator[str]:
    """An empty folder as the newest step"""
    for _ in range(times):
        folder = lab.folder()
        lab.stopped(folder)
        (folder / "checkpoints" / "59").mkdir()
        yield lab.resumes(folder, "Checkpoint 59 in .*skipped", WARNED)


def vanished_data(lab: Lab, times: int) -> Iterator[str]:
    """The text of a run vanishes before a restart; then it is back"""
    for _ in range(times):
        folder, corpus = lab.folder(), lab.folder()
        corpus.mkdir()
        (corpus / "input.txt").write_text("\n".join(map(str, range(20_000))))
        own = {"task.length": 32, "task.folder": corpus, "task.suffix": ".txt", "train.final_lengths": "(32,)"}
        settings = {k: v for k, v in {**runs.SMALL, **lab.settings, **own}.items() if k != "task.objects"}
        settings |= {"train.steps": 8, "optimizer.schedule_steps": 12}

        def run(steps: int) -> int:
            values = {**settings, "train.steps": steps}  # noqa: B023
            command = ["train.py", "--config=configs/text.py", f"--workdir={folder}"]  # noqa: B023
            command += [f"--config.{key}={value}" for key, value in values.items()]
            return launch(command, f"{folder}.log").wait(180)  # noqa: B023

        first = run(8)
        (corpus / "input.txt").rename(corpus / "gone")
        refused = run(12) and says(folder, r"task\.folder .* has no file")
        said = last_line(folder)
        (corpus / "gone").rename(corpus / "input.txt")
        resumed = run(12) == 0 and runs.last_step(folder) == 12
        yield BACK if first == 0 and refused and resumed else said


def nan_batch(lab: Lab, times: int) -> Iterator[str]:
    """A loss that is not finite"""
    for attempt in range(times):
        settings: dict[str, float | str] = {
            "optimizer.learning_rate": 1e30,
            "optimizer.clip_norm": 0.0,
            "optimizer.schedule_steps": STEPS,
        }
        if attempt % 2:
            settings |= {"train.on_nan": "skip", "train.max_skips": 10}
        folder = lab.folder()
        pattern = "not finite.*checkpoint" if attempt % 2 else "stopped being finite at step"
        yield SENTENCE if lab.refuses(folder, settings, pattern) else last_line(folder)


def two_trainers(lab: Lab, times: int) -> Iterator[str]:
    """Two trainers start in one folder at the same moment"""
    for _ in range(times):
        folder, second = lab.folder(), lab.folder()
        processes = [runs.start(folder, lab.settings, log=f"{path}.log") for path in (folder, second)]
        codes = [process.wait(180) for process in processes]
        loser = (folder, second)[codes.index(1)] if sorted(codes) == [0, 1] else folder
        refused = says(loser, "another trainer|cannot take the lock")
        runs.assert_same_run(folder, lab.whole)
        yield ONE if refused else f"{codes} {last_line(loser)}"


def pair(folder: pathlib.Path, steps: int) -> list[Script]:
    from tests.training.test_processes import ROWS, start_both

    return start_both(folder, steps, ROWS)


def lost_process(victim: int) -> Callable[[Lab, int], Iterator[str]]:
    def attempts(lab: Lab, times: int) -> Iterator[str]:
        for _ in range(times):
            folder = lab.folder()
            processes = pair(folder, 100_000)
            runs.wait_until(lambda: runs.last_step(folder) >= 8, processes[0])  # noqa: B023
            time.sleep(lab.rng.uniform(0, 0.5))
            processes[victim].kill()
            started = time.monotonic()
            processes[1 - victim].wait(150)
            seconds = time.monotonic() - started
            log = pathlib.Path(f"{folder}{'' if victim else '-second'}")
            told = re.match(f"error: process {victim} on host .* was lost", last_line(log))
            good = FAST if seconds < 1 else SLOW
            yield good if told and seconds < 30 else f"{seconds:.0f} s: {last_line(log)}"

    return attempts


def full_disk_of_two(lab: Lab, times: int) -> Iterator[str]:
    """The disk that two processes share fills up"""
    for _ in range(times):
        disk = lab.folder()
        disk.mkdir()
        size = lab.rng.randrange(200, 401, 4)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
        try:
            logs = [lab.root / f"{disk.name}-{index}" for index in range(2)]
            for log, name in zip(logs, ("run.log", "run-second.log"), strict=True):
                os.symlink(f"{log}.log", disk / name)
            codes = [process.wait(180) for process in pair(disk / "run", 1000)]
            good = codes == [1, 1] and all(says(log, "cannot write .*No space left") for log in logs)
            yield BOTH if good else f"{size} KiB: {codes} {' '.join(map(last_line, logs))}"
        finally:
            subprocess.run(["umount", "-l", disk], check=True)


def fewer_hosts(lab: Lab, times: int) -> Iterator[str]:
    """A run of two hosts restarts on one"""
    for _ in range(times):
        folder = lab.folder()
        processes = pair(folder, 1000)
        runs.wait_until(lambda: runs.last_step(folder) >= 8, processes[0])  # noqa: B023
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(60)
        last = runs.last_step(folder)
        settings = {"train.log_every": 1, "train.eval_every": 0, "train.steps": last + 4, "mesh.data": 1}
        code = runs.start(folder, {**settings, "optimizer.schedule_steps": 1000}, launch=launch).wait(180)
        said = pathlib.Path(f"{folder}.log").read_text()
        good = code == 0 and f"resuming from step {last}" in said and "results agree to rounding" in said
        yield LAYOUT if good else last_line(folder)


def clock_skew(lab: Lab, times: int) -> Iterator[str]:
    """The clock of a killed run's host was a day ahead, or behind"""
    folders = [lab.folder() for _ in range(times)]
    for attempt, folder in enumerate(folders):
        lab.stopped(folder)
        when = time.time() + (86_400 if attempt % 2 else -86_400)
        for path in [*folder.rglob("*"), folder]:
            os.utime(path, (when, when))
        # its lock is that of another host, which can be judged by its heartbeat alone
        owner = json.loads((folder / LOCK).read_text())
        (folder / LOCK).write_text(json.dumps({**owner, "boot": "elsewhere"}))
        os.utime(folder / LOCK, (when, when))
    # a minute without a heartbeat makes a lock stale: all wait at once
    waiting = [lab.start(folder) for folder in folders]
    for folder, process in zip(folders, waiting, strict=True):
        yield lab.ended(process, folder, "waiting up to")


FAULTS: dict[str, tuple[Callable[[Lab, int], Iterator[str]], str, int]] = {
    "kill": (kill_while_saving, "kill -9 at a random moment of a save", 20),
    "disk": (full_disk, "the disk is full, at 8 to 300 KiB, and then has space again", 10),
    "truncated": (damaged(truncate), "a random file of the newest checkpoint is truncated", 5),
    "flipped": (damaged(flip), "one bit of a random file of the newest checkpoint is flipped", 5),
    "empty": (empty_newest_step, "the newest step is an empty folder", 2),
    "data": (vanished_data, "the training text is gone at a restart, and then back", 2),
    "nan": (nan_batch, "the loss is not finite (abort, or skip)", 4),
    "trainers": (two_trainers, "two trainers start in one folder at once", 5),
    "host0": (lost_process(0), "kill -9 of process 0 of two", 5),
    "host1": (lost_process(1), "kill -9 of process 1 of two", 5),
    "disk2": (full_disk_of_two, "the disk that two processes share is full", 3),
    "fewer": (fewer_hosts, "two hosts, restarted on one", 2),
    "clock": (clock_skew, "the host of a killed run was a day ahead or behind", 2),
}


def write_page() -> None:
    """Writes the table of docs/reliability.md from the results."""
    results = json.loads(RESULTS.read_text())
    rows = ["| fault | tried | outcome |", "|---|---|---|"]
    for name, (_, title, _) in FAULTS.items():
        outcomes = results.get(name, {})
        shown = "; ".join(f"{count}: {outcome}" for outcome, count in outcomes.items()) or "not tried"
        rows.append(f"| {title} | {sum(outcomes.values())} | {shown} |")
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n" + "\n".join(rows) + f"\n{after}")


def main() -> int:
    """Runs the faults; returns 1 where an attempt failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("--only", choices=FAULTS, action="append", help="a fault; may be repeated (default: all)")
    parser.add_argument("--times", type=int, help="attempts per fault (default: those of the table)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments, files and bits")
    parser.add_argument("--add", action="store_true", help="add to the counts of the file; use another --seed")
    parser.add_argument("--keep", action="store_true", help="keep the folders and outputs of the runs, and print where")
    options = parser.parse_args()
    bad = 0
    root = pathlib.Path(tempfile.mkdtemp(prefix="reliability-"))
    try:
        lab = Lab(root, random.Random(options.seed))
        for name in options.only or FAULTS:
            attempts, title, times = FAULTS[name]
            outcomes: collections.Counter[str] = collections.Counter()
            try:
                outcomes.update(attempts(lab, options.times or times))
            except AssertionError as error:
                outcomes[f"failed: {str(error)[:200]}"] += 1
            print(f"{title}: {dict(outcomes)}", flush=True)
            bad += len(outcomes.keys() - GOOD)
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            if options.add:
                outcomes.update(results.get(name, {}))
            RESULTS.write_text(json.dumps({**results, name: dict(outcomes)}, indent=2) + "\n")
            write_page()
    finally:
        if options.keep:
            print(f"the runs are in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
