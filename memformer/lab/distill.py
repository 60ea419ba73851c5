"""Recovery of a student with another memory, made of a trained softmax teacher (configs/distill.py)."""

from typing import Any

from memformer.lab.plots import draw_lines, new_figure, point_in
from memformer.lab.runs import measure_seeds, scores_by_length, training_records
from memformer.lab.study import Result, Row, Runs, Settings, Study, Table, Verdict, grade, percent, spread
from memformer.training.config import RunError
from memformer.training.distill import start_student
from memformer.training.evaluation import LoadedRun, Scorer, parameters_of
from memformer.training.sharding import mesh_scope
from memformer.training.step import init_state, make_eval_step

__all__ = ["DISTILL"]

# What the folders are called.
TEACHER, STUDENT, SCRATCH = "teacher", "student", "scratch"
# Needed in every seed, stated before the runs: a student loses at most `LOSS` of its teacher's accuracy, and has at
# least `GAIN` more than the same model from random weights.
LOSS, GAIN = 0.02, 0.1


def _named(runs: Runs) -> dict[str, LoadedRun]:
    """The runs by part."""
    found = {part: run for part in (TEACHER, STUDENT, SCRATCH) for label, run in runs.items() if label.endswith(part)}
    if len(found) != 3 or len(runs) != 3:
        wanted = "distill_teacher, distill_student and distill_scratch"
        raise RunError(f"distill needs the runs {wanted} of each seed, got {', '.join(runs)}.")
    return found


@measure_seeds
def _measure(runs: Runs, settings: Settings) -> Result:
    named = _named(runs)
    rows: list[Row] = []
    accuracy: dict[str, float] = {}
    for part, label in ((TEACHER, "teacher, softmax attention"), (STUDENT, "student"), (SCRATCH, "from scratch")):
        run = named[part]
        ((_, scores),) = scores_by_length(run).items()
        if part == STUDENT:
            rows.append(_row("student, as converted", 0, _score_converted(run, settings["batches"])))
        rows.append(_row(label, run.step, scores))
        accuracy[part] = scores["accuracy"]
    curves: list[Row] = []
    for part in (STUDENT, SCRATCH):
        for record in training_records(named[part]):
            curves.append({"run": part, "step": record["step"], "accuracy": round(record["accuracy"], 4)})
    return Result([Table("Held-out loss and accuracy", rows), Table("Training accuracy by step", curves)], accuracy)


def _row(model: str, steps: int, scores: Row) -> Row:
    return {"model": model, "steps": steps, "loss": round(scores["loss"], 4), "accuracy": percent(scores["accuracy"])}


def _score_converted(student: LoadedRun, batches: int) -> dict[str, float]:
    """The scores of the student before its first step."""
    run, config = student.run, student.config
    with mesh_scope(run.mesh):
        state = start_student(config, init_state(run.model, run.tx, run.mesh, seed=config["seed"]))
    scorer = Scorer(make_eval_step(run.model, run.mesh), run.mesh, config["train"]["batch_size"], config["seed"])
    return scorer(parameters_of(state), student.task, split="test", batches=batches)


def _judge(result: Result) -> Verdict:
    rows = {row["model"]: row for row in result.rows()}
    teacher, student, scratch = (result.values[part] for part in (TEACHER, STUDENT, SCRATCH))
    lost = max(before - after for before, after in zip(teacher, student, strict=True))
    ahead = min(with_teacher - without for with_teacher, without in zip(student, scratch, strict=True))
    return Verdict(
        grade(lost < LOSS, ahead > GAIN),
        f"Accuracy: teacher {spread(teacher)}, student as converted {rows['student, as converted']['accuracy']}, after "
        f"{rows['student']['steps']} steps {spread(student)}; the same memory from random weights after "
        f"{rows['from scratch']['steps']} steps {spread(scratch)}. Needed in every seed: at most {100 * LOSS:.0f} "
        f"points below the teacher (it is up to {100 * lost:.1f}) and {100 * GAIN:.0f} above random weights.",
    )


def _draw(result: Result) -> Any:
    figure, axes = new_figure(1, 1, width=6.0, height=3.6)
    curves = {
        label: {row["step"]: point_in(row["accuracy"]) for row in result.rows(1, run=run)}
        for label, run in (("distilled student", STUDENT), ("from scratch", SCRATCH))
    }
    draw_lines(axes[0][0], curves)
    axes[0][0].set_xlabel("step")
    axes[0][0].set_ylabel("accuracy in training")
    return figure


DISTILL = Study(
    name="distill",
    title="Another memory from a softmax model",
    claim="A model with softmax attention, given another memory with the mapped projections, recovers its scores in a "
    "few steps of distillation, in which the same model learns little from random weights.",
    source="arXiv 2408.15237, 2410.10254, 2505.03005",
    measure=_measure,
    judge=_judge,
    draw=_draw,
    caption="Accuracy on multi-query recall (8 pairs, 128 ids) while training: gated delta rule in the place of "
    "softmax attention, with the teacher's weights and losses, and from random weights. Mean of three seeds; bands and "
    "parentheses: least to greatest.",
    reads="configs/distill.py, three seeds",
    settings={"batches": 8},
)
