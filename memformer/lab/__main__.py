"""python -m memformer.lab NAME RUN_FOLDER... [--out FOLDER], or --write to write docs/results.md from its JSONs."""

import argparse
import time

from memformer.lab import LABS, Study
from memformer.lab.page import write_page
from memformer.training.config import RunError, report_errors
from memformer.training.evaluation import load_run
from memformer.training.metrics import say


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m memformer.lab", description=__doc__)
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(LABS)}")
    parser.add_argument("runs", nargs="*", metavar="RUN_FOLDER", help="folders of finished runs of train.py")
    parser.add_argument("--out", default="docs/results", help="folder of the results (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write the page of all results beside that folder")
    arguments = parser.parse_args()
    with report_errors():
        if arguments.name is not None:
            _measure(arguments.name, arguments.runs, arguments.out)
        elif not arguments.write:
            raise RunError(f"name a measurement: one of {', '.join(LABS)}; or give --write.")
        if arguments.write:
            say(f"written: {write_page(arguments.out)}")


def _measure(name: str, folders: list[str], out: str) -> None:
    if name not in LABS:
        raise RunError(f"the measurement must be one of {', '.join(LABS)}, got {name!r}.")
    if not folders:
        raise RunError(f"{name} measures finished runs: name their folders, such as runs/x (see docs/results.md).")
    started = time.monotonic()
    runs = [load_run(folder) for folder in folders]
    study = Study(name, out)
    LABS[name](runs, study)
    study.finish(runs, time.monotonic() - started)


if __name__ == "__main__":
    main()
