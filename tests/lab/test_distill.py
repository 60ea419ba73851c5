"""The study of a converted student: its tables from three runs, its verdict, and the folders it needs."""

import json
import types

import pytest

from memformer.lab import distill
from memformer.lab.study import numbers_in
from memformer.training import RunError


def finished(folder, accuracy, seed):
    """The parts of a finished run that the study reads."""
    folder.mkdir()
    records = [{"kind": "train", "step": step, "accuracy": accuracy * step / 20} for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = {"lengths": {"64": {"loss": 1 - accuracy, "accuracy": accuracy}}}
    return types.SimpleNamespace(folder=str(folder), result=result, step=20, config={"seed": seed})


@pytest.mark.parametrize(
    ("student", "scratch", "kind"),
    [(0.99, 0.1, "confirmed"), (0.99, 0.95, "partly confirmed"), (0.5, 0.45, "refuted")],
)
def test_tables_and_verdict(tmp_path, monkeypatch, student, scratch, kind):
    seeds = {"": (0.99, 0.1), "_seed1": (student, scratch)}  # all is recovered in the first
    runs = {}
    for seed, (suffix, (taught, untaught)) in enumerate(seeds.items()):
        for part, accuracy in {"teacher": 1.0, "student": taught, "scratch": untaught}.items():
            runs[f"distill_{part}{suffix}"] = finished(tmp_path / f"{part}{suffix}", accuracy, seed)
    monkeypatch.setattr(distill, "_score_converted", lambda run, batches: {"loss": 3.0, "accuracy": 0.02})
    result = distill.DISTILL.measure(runs, distill.DISTILL.settings)
    assert [(row["model"], row["steps"]) for row in result.rows()] == [
        ("teacher, softmax attention", 20), ("student, as converted", 0), ("student", 20), ("from scratch", 20)
    ]  # fmt: skip
    found = [numbers_in(row["accuracy"]) for row in result.rows(1, run="student")]
    assert {found[1][0], found[1][-1]} == {(0.99 + student) / 2, max(0.99, student)}
    assert result.values == {"teacher": [1.0, 1.0], "student": [0.99, student], "scratch": [0.1, scratch]}
    assert distill.DISTILL.judge(result).kind == kind
    assert distill.DISTILL.draw(result).axes


def test_it_needs_three_runs():
    with pytest.raises(RunError, match="distill_teacher, distill_student and distill_scratch of each seed, got runs"):
        distill.DISTILL.measure({"runs": types.SimpleNamespace(config={"seed": 0})}, {})
