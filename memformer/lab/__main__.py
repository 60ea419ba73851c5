"""python -m memformer.lab NAME [RUN_FOLDER...] [--quick] [--out FOLDER]; --write writes docs/results.md."""

import argparse
import time

from memformer.lab import LABS, SIMULATIONS, Study
from memformer.lab.page import write_page
from memformer.training.config import RunError, report_errors
from memformer.training.evaluation import load_run
from memformer.training.metrics import say

NAMES = (*SIMULATIONS, *LABS)


def main() -> None:
    """Reads the command line and does what it asks."""
    parser = argparse.ArgumentParser(prog="python -m memformer.lab", description=__doc__)
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("runs", nargs="*", metavar="RUN_FOLDER", help="folders of finished runs of train.py")
    parser.add_argument("--quick", action="store_true", help="a small version, under a minute (simulations)")
    parser.add_argument("--out", default="docs/results", help="folder of the results (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write the page of all results beside that folder")
    arguments = parser.parse_args()
    with report_errors():
        if arguments.name is not None:
            _measure(arguments.name, arguments.runs, arguments.out, arguments.quick)
        elif not arguments.write:
            raise RunError(f"name a measurement: one of {', '.join(NAMES)}; or give --write.")
        if arguments.write:
            say(f"written: {write_page(arguments.out)}")


def _measure(name: str, folders: list[str], out: str, quick: bool) -> None:
    if name not in NAMES:
        raise RunError(f"the measurement must be one of {', '.join(NAMES)}, got {name!r}.")
    if name in LABS and not folders:
        raise RunError(f"{name} measures finished runs: name their folders, such as runs/x (see docs/results.md).")
    if name in SIMULATIONS and folders:
        raise RunError(f"{name} needs no runs, got {', '.join(folders)}.")
    if name in LABS and quick:
        raise RunError(f"--quick is for simulations ({', '.join(SIMULATIONS)}); {name} measures the runs it is given.")
    started = time.monotonic()
    runs = [load_run(folder) for folder in folders]
    study = Study(name, out)
    if name in LABS:
        LABS[name](runs, study)
    else:
        SIMULATIONS[name](study, quick=quick)
    study.finish(runs, time.monotonic() - started)


if __name__ == "__main__":
    main()
