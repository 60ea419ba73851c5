"""Evaluates a run from its folder alone: python eval.py --workdir=runs/x --lengths=16,64,256 --set=task.queries=True"""

from typing import Any

from absl import flags

from memformer.training.flags import define_processes, report_errors, run_command

WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest whole one.")
SPLIT = flags.DEFINE_string("split", "test", "train, validation or test.")
LENGTHS = flags.DEFINE_list("lengths", None, "Task lengths; by default the task's own list.")
BATCHES = flags.DEFINE_integer("batches", 16, "Batches per length; 0 for all.", lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Examples per batch; by default that of the run.", lower_bound=1)
SET = flags.DEFINE_multi_string("set", [], "A change to the run's config, such as task.length=64; may be repeated.")
BY_POSITION = flags.DEFINE_bool("by_position", False, "Perplexity by position in the document, of text, instead.")
BY_DISTANCE = flags.DEFINE_bool("by_distance", False, "Perplexity by distance of the target's last occurrence.")
TASK_MODULE = flags.DEFINE_string("task_module", "", "A module that registers the task; by default that of the run.")
OUT = flags.DEFINE_string("out", None, "JSON file to write; by default <workdir>/eval_<split>.json.")
PROCESSES = define_processes()


def main(_: list[str]) -> None:
    with report_errors():
        from memformer.training.config import RunError
        from memformer.training.distributed import join_processes
        from memformer.training.evaluation import evaluate_checkpoint

        if BY_POSITION.value and BY_DISTANCE.value:
            raise RunError("--by_position and --by_distance are two evaluations; give one of them.")
        by = "--by_position" if BY_POSITION.value else "--by_distance" if BY_DISTANCE.value else ""
        if by and LENGTHS.value is not None:
            raise RunError(f"{by} scores examples of the run's own length; leave --lengths out.")
        options: dict[str, Any] = {
            "step": STEP.value,
            "split": SPLIT.value,
            "batches": BATCHES.value,
            "batch_size": BATCH_SIZE.value,
            "settings": SET.value,
            "out": OUT.value,
        }
        with join_processes(**PROCESSES()):
            if by:
                from memformer.evals.positions import evaluate_distances, evaluate_positions

                evaluate = evaluate_positions if BY_POSITION.value else evaluate_distances
                evaluate(WORKDIR.value, **options)
            else:
                evaluate_checkpoint(WORKDIR.value, lengths=LENGTHS.value, **options)


def run() -> None:
    """Runs the command."""
    run_command(main)


if __name__ == "__main__":
    run()
