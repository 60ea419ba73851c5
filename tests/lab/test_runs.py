"""Runs of a study: built from a table, trained once, then read."""

import os
import types

import pytest

from memformer.lab import Quick, Result, Study, Table, Verdict
from memformer.lab.plots import Lines
from memformer.lab.runner import run_study
from memformer.lab.runs import (
    accuracies_by_seed,
    accuracy_by_length,
    make_config,
    measure_seeds,
    runs_by_row,
    spread_by_length,
    train_runs,
    trained_table,
)
from memformer.lab.study import percent
from memformer.training import build
from memformer.training.config import RunError
from memformer.training.metrics import read_records
from tests.training.small import build_counting

pytestmark = pytest.mark.usefixtures("programs_kept", "no_curves")


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """A model that compiles fast: what is tested is the same for any."""
    monkeypatch.setattr(build, "build_model", build_counting)


BASE = {
    "task": {"name": "swap", "objects": 3, "length": 4},
    "model": {"memory": "softmax_attention", "width": 8, "heads": 1, "feedforward": None},
    "train.steps": 2,
    "train.batch_size": 8,
    "train.final_batches": 1,
    "train.final_lengths": (8,),
}


def test_the_last_change_of_a_key_holds():
    config = make_config(BASE, {"task.length": 6, "model.memory_options": {"rnn": {}}}, {"train.steps": 9})
    assert (config.task.name, config.task.objects, config.task.length) == ("swap", 3, 6)
    assert (config.train.steps, config.train.batch_size, config.model.width) == (9, 8, 8)
    assert make_config({"model.type": "ntm"}).model.type == "ntm"


@pytest.mark.parametrize("key", ["train.step", "optimiser.name", "model.wdith"])
def test_an_unknown_key_is_named(key):
    with pytest.raises(RunError, match=r"no key .*\(from config.*\); did you mean"):
        make_config({key: 1})


def test_a_finished_run_is_read_and_a_fresh_one_trained_again(tmp_path, one_device):
    with one_device():
        check_runs(tmp_path)


def check_runs(tmp_path):
    folder = str(tmp_path / "runs")
    rows = {"one": {}, "two": {"seed": 1}}
    first, earlier = train_runs(folder, rows, base=BASE)
    assert list(first) == ["one", "two"] and first["two"].config["seed"] == 1
    assert list(accuracy_by_length(first["one"])) == [4, 8]
    assert [row["steps"] for row in trained_table(first).rows] == [2, 2]
    assert earlier == 0
    stamp = os.path.getmtime(tmp_path / "runs" / "one" / "result.json")
    _, earlier = train_runs(folder, {"one": {}}, base=BASE)
    assert os.path.getmtime(tmp_path / "runs" / "one" / "result.json") == stamp
    assert earlier > 0
    # more steps: the same run resumes
    longer = train_runs(folder, {"one": {"train.steps": 3}}, base=BASE)[0]["one"]
    assert longer.step == 3
    steps = [r["step"] for r in read_records(os.path.join(longer.folder, "metrics.jsonl")) if r["kind"] == "train"]
    assert steps == [2, 3]
    with pytest.raises(RunError, match="model.width"):
        train_runs(folder, {"one": {"model.width": 16}}, base=BASE)
    fresh = train_runs(folder, {"one": {}}, base=BASE, changes={"train.steps": 1}, fresh=True)[0]["one"]
    assert fresh.step == 1


def test_a_mistake_in_the_last_row_is_reported_before_the_first_is_trained(tmp_path):
    with pytest.raises(RunError, match="lenght"):
        train_runs(str(tmp_path / "runs"), {"one": {}, "two": {"task.lenght": 4}}, base=BASE)
    assert not (tmp_path / "runs").exists()


def test_runs_of_each_seed_are_measured_apart():
    def run(seed, score):
        return types.SimpleNamespace(config={"seed": seed}, score=score)

    @measure_seeds
    def measure(runs, settings):
        rows = [{"run": label, "share": percent(run.score), "score": run.score} for label, run in runs.items()]
        return Result([Table("Scores", rows)], {"best": max(run.score for run in runs.values())})

    runs = {"a_seed1": run(1, 0.75), "b_seed1": run(1, 0.5), "a": run(0, 0.25), "b": run(0, 0.5)}
    result = measure(runs, {})
    assert result.values == {"best": [0.5, 0.75]}
    assert result.tables[0].title == "Scores: mean of 2 seeds (least to most)"
    assert result.rows() == [
        {"run": "a", "share": "50.0% (25.0% to 75.0%)", "score": "0.5 (0.25 to 0.75)"},
        {"run": "b", "share": "50.0%", "score": 0.5},
    ]
    assert measure({"a": runs["a"]}, {}).rows() == [{"run": "a", "share": "25.0%", "score": 0.25}]
    with pytest.raises(RunError, match="missing: b seed 0"):
        measure({label: runs[label] for label in ("a", "a_seed1", "b_seed1")}, {})
    with pytest.raises(RunError, match="'a' must differ in their seed, got 0, 0"):
        measure({"a": runs["a"], "a_seed1": runs["a"]}, {})


def test_a_study_trains_each_row_with_every_seed(tmp_path, one_device):
    def measure(runs, settings):
        rows = [{"run": label, **spread_by_length(row, "at {}")} for label, row in runs_by_row(runs).items()]
        return Result([Table("Accuracy", rows)], accuracies_by_seed(runs))

    study = Study(
        name="seeds",
        title="Seeds",
        claim="None.",
        source="none",
        measure=measure,
        judge=lambda result: Verdict("confirmed", "None."),
        draw=Lines(line="run", points="at {}", x="length", y="accuracy"),
        caption="Lines.",
        base=BASE,
        rows={"one": {}, "two": {"train.steps": 1}},
        seeds=2,
        quick=Quick({"one": {}}),
    )
    with one_device():
        result = run_study(study, out=str(tmp_path / "out"), runs_folder=str(tmp_path / "runs"))
    trained = result.rows(-1)
    assert [row["run"] for row in trained] == ["one seed 0", "two seed 0", "one seed 1", "two seed 1"]
    assert [row["seed"] for row in trained] == [0, 0, 1, 1]
    assert [len(values) for values in result.values["two"].values()] == [2, 2]
    assert [row["run"] for row in result.rows()] == ["one", "two"]
    least, most = sorted(result.values["one"]["4"])
    assert least < most and f"({100 * least:.1f}% to {100 * most:.1f}%)" in result.rows()[0]["at 4"]
    # a band where seeds differ
    assert study.draw(result).axes[0].collections
