"""What a study writes, and that docs/results.md is what the committed JSONs say."""

import csv
import json
import pathlib
import subprocess
import sys
import types

import pytest

from memformer.lab import Study
from memformer.lab.page import render_page, write_page
from memformer.lab.study import new_figure, training_seconds
from memformer.training.config import RunError

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def a_run(folder="/somewhere/else/runs/swap-x/"):
    return types.SimpleNamespace(
        folder=folder,
        task=types.SimpleNamespace(name="swap"),
        config={"seed": 3, "model": {"type": "ntm"}},
        model=types.SimpleNamespace(size=lambda: 1234),
        step=7,
    )


def a_study(folder):
    study = Study("toy", str(folder), claim="Up.", outcome="It went up by 2.")
    study.add_table("Numbers", [{"x": 1, "y": 0.123456}, {"x": 2, "y": 2.5}])
    figure, axes = new_figure()
    axes[0, 0].plot([0, 1], [0, 1])
    study.save_figure(figure, "line", "A line that rises.")
    return study


def test_a_study_writes_json_csv_and_pictures(tmp_path):
    study = a_study(tmp_path)
    content = json.loads(pathlib.Path(study.finish([a_run()], 1.5)).read_text())
    assert content["claim"] == "Up." and content["tables"][0]["rows"][1] == {"x": 2, "y": 2.5}
    assert content["runs"][0]["folder"] == "runs/swap-x" and content["runs"][0]["parameters"] == 1234
    assert content["versions"]["jax"] and "/somewhere" not in json.dumps(content)
    with open(tmp_path / "toy.csv", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["x", "y"], ["1", "0.123456"], ["2", "2.5"]]
    svg = (tmp_path / "toy-line.svg").read_text()
    a_study(tmp_path)
    assert (tmp_path / "toy-line.svg").read_text() == svg
    assert (tmp_path / "toy-line.png").stat().st_size > 1000


def test_the_page_holds_what_the_study_says(tmp_path):
    a_study(tmp_path / "results").finish([a_run()], 1.5)
    path = pathlib.Path(write_page(str(tmp_path / "results")))
    text = path.read_text()
    assert path == tmp_path / "results.md"
    for part in ("## toy", "Claim: Up.", "| 1 | 0.1235 |", "(results/toy-line.png)", "runs/swap-x", "1,234", "seed 3"):
        assert part in text, part


def test_seconds_of_a_resumed_run_are_those_of_all_its_steps(tmp_path):
    records = [
        {"kind": "train", "step": 2, "step_seconds": None},
        {"kind": "eval", "step": 2},
        {"kind": "train", "step": 6, "step_seconds": 0.5},
        {"kind": "train", "step": 7, "step_seconds": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert training_seconds(a_run(tmp_path)) == 5.0


@pytest.mark.parametrize("missing", ["claim", "outcome", "tables"])
def test_an_unfinished_study_is_refused(tmp_path, missing):
    study = a_study(tmp_path)
    setattr(study, missing, type(getattr(study, missing))())
    with pytest.raises(ValueError, match=f"must set its {missing}"):
        study.finish([a_run()], 0.0)


def test_tables_without_rows_or_of_several_shapes_are_refused(tmp_path):
    for rows in ([], [{"x": 1}, {"y": 1}]):
        with pytest.raises(ValueError, match="same columns"):
            Study("toy", str(tmp_path)).add_table("Bad", rows)


def test_no_results_no_page(tmp_path):
    with pytest.raises(RunError, match="holds no JSON"):
        render_page(str(tmp_path))


def test_results_page_is_written_from_the_committed_results():
    assert render_page(str(RESULTS)) == (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), (
        "write it with python -m memformer.lab --write"
    )


def test_every_committed_run_has_its_command():
    for path in RESULTS.glob("*.json"):
        for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
            assert f"--workdir={run['folder']}" in render_page(str(RESULTS)), (path.name, run["folder"])


def test_the_command_says_what_it_knows():
    got = subprocess.run(
        [sys.executable, "-m", "memformer.lab", "nothing", "runs/x"], cwd=ROOT, capture_output=True, text=True
    )
    assert got.returncode == 1 and "the measurement must be one of" in got.stderr
