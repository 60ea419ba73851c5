"""Declarations and what a run of them writes; docs/results.md and its figures are those of the committed JSONs."""

import dataclasses
import json
import pathlib
import types

import pytest

from memformer.lab import STUDIES, Result, Study, Table, Verdict
from memformer.lab.page import _command, render_page, write_page
from memformer.lab.plots import Bars
from memformer.lab.runner import read_result, run_study, write_result
from memformer.lab.runs import training_seconds
from memformer.lab.study import numbers_in
from memformer.training.config import RunError
from tests.processes import run_script

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
JSONS = sorted(RESULTS.glob("*.json"))


def a_run(folder="/somewhere/else/runs/swap-x/"):
    return types.SimpleNamespace(
        folder=folder,
        task=types.SimpleNamespace(name="swap"),
        config={"seed": 3, "model": {"type": "ntm"}},
        model=types.SimpleNamespace(size=lambda: 1234),
        step=7,
    )


RESULT = Result([Table("Numbers", [{"x": 1, "y": 0.123456}, {"x": 2, "y": 2.5}])], {"rise": 2.4})
TOY = Study(
    name="toy",
    title="A toy, drawn",
    claim="It goes up.",
    source="arXiv 0000.00000",
    measure=lambda runs, settings: RESULT,
    judge=lambda result: Verdict("confirmed", "It went up by 2."),
    draw=Bars(index=("x",), columns=("y",), label="y"),
    caption="A line that rises.",
)


def test_a_study_writes_one_json_and_one_picture(tmp_path):
    path = write_result(TOY, RESULT, TOY.judge(RESULT), [a_run()], out=str(tmp_path), seconds=1.5)
    content = json.loads(pathlib.Path(path).read_text())
    assert content["verdict"] == {"kind": "confirmed", "finding": "It went up by 2."}
    assert content["tables"][0]["rows"][1] == {"x": 2, "y": 2.5}
    assert content["runs"][0]["folder"] == "runs/swap-x" and content["runs"][0]["parameters"] == 1234
    assert content["versions"]["jax"] and "/somewhere" not in json.dumps(content)
    assert read_result(content) == Result([Table(*table) for table in RESULT.tables], RESULT.values)
    assert {file.name for file in tmp_path.iterdir()} == {"toy.json", "toy.png"}
    picture = (tmp_path / "toy.png").read_bytes()
    write_result(TOY, RESULT, TOY.judge(RESULT), [a_run()], out=str(tmp_path), seconds=1.5)
    assert (tmp_path / "toy.png").read_bytes() == picture and len(picture) > 1000


def test_the_page_holds_the_study(tmp_path):
    write_result(TOY, RESULT, TOY.judge(RESULT), [a_run()], out=str(tmp_path / "results"), seconds=1.5)
    path = pathlib.Path(write_page(str(tmp_path / "results"), {"toy": TOY}))
    text = path.read_text()
    assert path == tmp_path / "results.md"
    for part in (
        "- [A toy, drawn](#a-toy-drawn): confirmed",
        "Claim: It goes up. (arXiv 0000.00000)",
        "| 1 | 0.1235 |",
    ):
        assert part in text, part
    for part in ("**Confirmed.** It went up by 2.", "(results/toy.png)", "runs/swap-x", "1,234", "seed 3"):
        assert part in text, part
    with pytest.raises(RunError, match="holds results of no study: toy"):
        render_page(str(tmp_path / "results"))


def test_a_run_of_another_seed_has_the_command_of_its_config():
    train = "python train.py --config=configs/x.py"
    commands = {
        "runs/x": f"{train} --workdir=runs/x",
        "runs/z": f"{train} --config.distill.teacher=runs/x --config.train.steps=2 --workdir=runs/z",
    }
    folders = ["runs/x", "runs/z", "runs/x_seed2", "runs/z_seed2"]
    assert _command("runs/x", folders, commands) == commands["runs/x"]
    assert _command("runs/x_seed2", folders, commands) == f"{train} --config.seed=2 --workdir=runs/x_seed2"
    # the run that another starts from is of the same seed, where the study has it
    started = "--config.train.steps=2 --config.seed=2 --workdir=runs/z_seed2"
    for teacher, given in (("runs/x_seed2", folders), ("runs/x", ["runs/z", "runs/z_seed2"])):
        assert _command("runs/z_seed2", given, commands) == f"{train} --config.distill.teacher={teacher} {started}"
    assert _command("runs/y_seed2", folders, commands) == "runs/y_seed2"


def test_long_tables_are_folded(tmp_path):
    long = Result([Table("Numbers", [{"x": x, "y": x} for x in range(11)])])
    write_result(TOY, long, TOY.judge(long), [], out=str(tmp_path / "results"), seconds=1.5)
    shown, folded = render_page(str(tmp_path / "results"), {"toy": TOY}).split("<details>")
    assert "| x | y |" in folded and "| x | y |" not in shown


def test_seconds_of_a_resumed_run_are_those_of_all_its_steps(tmp_path):
    records = [
        {"kind": "train", "step": 2, "step_seconds": None},
        {"kind": "eval", "step": 2},
        {"kind": "train", "step": 6, "step_seconds": 0.5},
        {"kind": "train", "step": 7, "step_seconds": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert training_seconds(a_run(tmp_path)) == 5.0


@pytest.mark.parametrize("missing", ["claim", "source", "caption"])
def test_an_incomplete_declaration_is_refused(missing):
    with pytest.raises(ValueError, match=f"must state its {missing}"):
        dataclasses.replace(TOY, **{missing: ""})


def test_a_study_has_a_seed():
    with pytest.raises(ValueError, match="seeds"):
        dataclasses.replace(TOY, seeds=0)


def test_tables_without_rows_or_of_several_shapes_are_refused():
    for rows in ([], [{"x": 1}, {"y": 1}]):
        with pytest.raises(ValueError, match="same columns"):
            Result([Table("Bad", rows)])
    with pytest.raises(ValueError, match="at least one table"):
        Result([])


@pytest.mark.parametrize(
    ("name", "folders", "quick", "message"),
    [
        ("ntm", [], False, "ntm measures finished runs"),
        ("snr", ["runs/x"], False, "snr needs no runs, got runs/x"),
        ("ntm", ["runs/x"], True, "has no quick version"),
    ],
)
def test_runs_and_quick_are_for_the_studies_that_have_them(tmp_path, name, folders, quick, message):
    with pytest.raises(RunError, match=message):
        run_study(STUDIES[name], folders, out=str(tmp_path), quick=quick)


def test_studies_are_listed_by_their_names():
    assert all(name == study.name for name, study in STUDIES.items())
    kinds = {name: (bool(study.reads), study.quick is not None) for name, study in STUDIES.items()}
    assert all(kind in ((True, False), (False, True)) for kind in kinds.values()), kinds
    assert len({study.title for study in STUDIES.values()}) == len(STUDIES)


def test_no_results_no_page(tmp_path):
    with pytest.raises(RunError, match="holds no JSON"):
        render_page(str(tmp_path))


def test_results_page_is_written_from_the_committed_results():
    assert render_page(str(RESULTS)) == (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), (
        "write it with python -m memformer.lab --write"
    )


def test_one_picture_and_one_json_for_each_study():
    assert {path.name for path in RESULTS.iterdir()} == {f"{name}.{end}" for name in STUDIES for end in ("json", "png")}


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_the_verdict_follows_from_the_committed_numbers(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    study, result = STUDIES[content["name"]], read_result(content)
    assert study.judge(result)._asdict() == content["verdict"]
    assert study.summary is None or 0 < len(study.summary(result)) <= 10


def test_every_committed_run_has_its_command():
    page = render_page(str(RESULTS))
    for path in JSONS:
        for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
            assert f"--workdir={run['folder']}" in page, (path.name, run["folder"])


@pytest.mark.parametrize(
    ("cell", "numbers"),
    [("2 (1-3)", [2, 1, 3]), ("1.1e+03 (0.0021 to 1.5e+08)", [1100, 0.0021, 1.5e8]), (0.5, [0.5]), ("never", [])],
)
def test_numbers_in_a_cell(cell, numbers):
    assert numbers_in(cell) == pytest.approx(numbers)


def test_the_command_names_the_studies():
    got = run_script("memformer.lab", "nothing", "runs/x")
    assert got.returncode == 1 and "the study must be one of" in got.stderr
