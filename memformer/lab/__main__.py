"""python -m memformer.lab NAME [RUN_FOLDER...] [--quick] [--out FOLDER]; --write draws the figures and the page."""

import argparse

from memformer.lab import STUDIES
from memformer.lab.page import write_page
from memformer.lab.runner import run_study
from memformer.training.config import RunError
from memformer.training.flags import report_errors
from memformer.training.metrics import log


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m memformer.lab", description=__doc__)
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(STUDIES)}")
    parser.add_argument("runs", nargs="*", metavar="RUN_FOLDER", help="folders of finished runs of train.py")
    parser.add_argument("--quick", action="store_true", help="a small version, under a minute (no runs needed)")
    parser.add_argument("--out", help="folder of the results (default: docs/results; of quick runs runs/lab-quick)")
    parser.add_argument("--write", action="store_true", help="draw all figures again and write the page of results")
    arguments = parser.parse_args()
    # a quick run does not replace a measurement
    out = arguments.out or ("runs/lab-quick" if arguments.quick else "docs/results")
    with report_errors():
        if arguments.name is not None:
            if arguments.name not in STUDIES:
                raise RunError(f"the study must be one of {', '.join(STUDIES)}, got {arguments.name!r}.")
            run_study(STUDIES[arguments.name], arguments.runs, out=out, quick=arguments.quick)
        elif not arguments.write:
            lines = [f"  {name:<18}{study.title}" for name, study in STUDIES.items()]
            log("\n".join(["name a study, or give --write:", *lines]))
        if arguments.write:
            log(f"written: {write_page(out)}")


if __name__ == "__main__":
    main()
