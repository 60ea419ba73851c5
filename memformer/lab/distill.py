"""Recovery of a student with another memory, made of a trained softmax teacher (configs/distill.py)."""

from typing import Any

from memformer.lab.plots import draw_lines, new_figure
from memformer.lab.runs import scores_by_length, training_records
from memformer.lab.study import Result, Row, Runs, Settings, Study, Table, Verdict, grade, percent
from memformer.training.config import RunError
from memformer.training.distill import start_student
from memformer.training.evaluation import LoadedRun, Scorer, parameters_of
from memformer.training.sharding import mesh_scope
from memformer.training.step import init_state, make_eval_step

__all__ = ["DISTILL"]

# What the folders are called.
TEACHER, STUDENT, SCRATCH = "teacher", "student", "scratch"


def _named(runs: Runs) -> dict[str, LoadedRun]:
    """The runs by part."""
    found = {part: run for part in (TEACHER, STUDENT, SCRATCH) for label, run in runs.items() if label.endswith(part)}
    if len(found) != 3 or len(runs) != 3:
        wanted = "distill_teacher, distill_student and distill_scratch"
        raise RunError(f"distill needs the runs {wanted}, got {', '.join(runs)}.")
    return found


def _measure(runs: Runs, settings: Settings) -> Result:
    named = _named(runs)
    rows: list[Row] = []
    for part, label in ((TEACHER, "teacher, softmax attention"), (STUDENT, "student"), (SCRATCH, "from scratch")):
        run = named[part]
        ((_, scores),) = scores_by_length(run).items()
        if part == STUDENT:
            rows.append(_row("student, as converted", 0, _score_converted(run, settings["batches"])))
        rows.append(_row(label, run.step, scores))
    curves: list[Row] = []
    for part in (STUDENT, SCRATCH):
        for record in training_records(named[part]):
            curves.append({"run": part, "step": record["step"], "accuracy": round(record["accuracy"], 4)})
    distill = named[STUDENT].config["distill"]
    values = {name: distill[name] for name in ("memory", "logits", "outputs", "temperature")}
    return Result([Table("Held-out loss and accuracy", rows), Table("Training accuracy by step", curves)], values)


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
    teacher, converted, student, scratch = (
        rows[name] for name in ("teacher, softmax attention", "student, as converted", "student", "from scratch")
    )
    shares = [float(row["accuracy"].rstrip("%")) / 100 for row in (teacher, converted, student, scratch)]
    recovered = shares[2] > shares[0] - 0.02
    return Verdict(
        grade(recovered, shares[3] < shares[2] - 0.1),
        f"Accuracy: teacher {teacher['accuracy']}, student as converted {converted['accuracy']}, after "
        f"{student['steps']} steps {student['accuracy']}; the same memory from random weights after {scratch['steps']} "
        f"steps {scratch['accuracy']}.",
    )


def _draw(result: Result) -> Any:
    figure, axes = new_figure(1, 1, width=6.0, height=3.6)
    curves = {
        label: {row["step"]: row["accuracy"] for row in result.rows(1, run=run)}
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
    "softmax attention, with the teacher's weights and losses, and from random weights.",
    reads="configs/distill.py",
    settings={"batches": 8},
)
