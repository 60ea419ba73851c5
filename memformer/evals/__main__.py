"""python -m memformer.evals my_task.yaml --workdir=runs/lm: evaluates a model with the evaluation harness."""

import argparse
import json
from collections.abc import Sequence

from memformer.evals.harness import run_harness
from memformer.evals.scoring import TextScorer
from memformer.training.config import RunError
from memformer.training.files import check_out, replace_file
from memformer.training.flags import report_errors
from memformer.training.generation import load_text_model, text_errors
from memformer.training.metrics import format_table, log

# the command is the interface
__all__ = []


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m memformer.evals", description=__doc__)
    parser.add_argument("tasks", nargs="+", help="YAML files of tasks, or names that the harness knows")
    parser.add_argument("--workdir", default="", help="folder of a run on text")
    parser.add_argument("--pretrained", default="", help="folder of a pretrained model, instead of --workdir")
    parser.add_argument("--step", type=int, help="step of the checkpoint; by default the newest whole one")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per batch (default: 8)")
    parser.add_argument("--max_length", type=int, help="most tokens that the model reads at once (default: all)")
    parser.add_argument("--num_fewshot", type=int, help="examples before each question; by default those of the task")
    parser.add_argument("--limit", type=int, help="questions per task; by default all")
    parser.add_argument("--out", default="", help="JSON file to write")
    options = parser.parse_args(arguments)
    with report_errors():
        check_out(options.out)
        loaded = load_text_model(options.workdir, pretrained=options.pretrained, step=options.step)
        with text_errors("evaluation"):
            scorer = TextScorer(
                loaded.model,
                loaded.tokenizer,
                document_start=loaded.document_start,
                batch_size=options.batch_size,
                max_length=options.max_length,
            )
            found = run_harness(scorer, options.tasks, num_fewshot=options.num_fewshot, limit=options.limit)
        rows = [
            (task, metric.removesuffix(",none"), f"{value:.4f}")
            for task, metrics in found["results"].items()
            for metric, value in metrics.items()
            if isinstance(value, float)
        ]
        if not rows:
            raise RunError("the harness returned no metrics.")
        log(format_table(("task", "metric", "value"), rows))
        if options.out:
            with replace_file(options.out) as file:
                json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
