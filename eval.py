"""Evaluates a run from its folder alone: python eval.py --workdir=runs/x --lengths=16,64,256 --set=task.queries=True"""

from absl import app, flags

from memformer.training.flags import parse_flags, report_errors

WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
STEP = flags.DEFINE_integer("step", None, "The checkpoint; by default the newest that is whole.")
SPLIT = flags.DEFINE_string("split", "test", "train, validation or test.")
LENGTHS = flags.DEFINE_list("lengths", None, "Lengths of the task; by default the task's own list.")
BATCHES = flags.DEFINE_integer("batches", 16, "Batches a length.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Examples a batch; by default the run's.", lower_bound=1)
SET = flags.DEFINE_multi_string("set", [], "A key of the run's config to change, such as task.length=64; repeatable.")
OUT = flags.DEFINE_string("out", None, "JSON file to write; by default <workdir>/eval_<split>.json.")


def main(_: list[str]) -> None:
    with report_errors():
        from memformer.training.evaluation import evaluate_checkpoint

        evaluate_checkpoint(
            WORKDIR.value,
            step=STEP.value,
            split=SPLIT.value,
            lengths=LENGTHS.value,
            batches=BATCHES.value,
            batch_size=BATCH_SIZE.value,
            settings=SET.value,
            out=OUT.value,
        )


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
