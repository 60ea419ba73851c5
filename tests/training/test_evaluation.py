"""Evaluation from a run's folder alone: lengths, variants, files, errors."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest

from memformer.data.source import FiniteSource
from memformer.training import build
from memformer.training.checkpoint import Checkpoints
from memformer.training.config import RunError
from memformer.training.evaluation import Scorer, evaluate_checkpoint, load_run
from memformer.training.loop import train
from memformer.training.step import make_eval_step
from tests.processes import run_script
from tests.training.small import build_counting, small_config

pytestmark = pytest.mark.usefixtures("programs_kept", "no_curves")


@pytest.fixture(autouse=True, scope="module")
def light():
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        patch.setattr(build, "build_model", build_counting)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, light):
    folder = str(tmp_path_factory.mktemp("run"))
    return folder, train(small_config(optimizer__ema=0.5, train__steps=4), folder)


def test_scores_are_those_the_run_reported(run):
    folder, result = run
    got = evaluate_checkpoint(folder, lengths=["8"], batches=2)
    assert got["lengths"] == {"8": result["lengths"]["8"]} and got["step"] == 4


def test_files(run, tmp_path, capsys):
    folder, _ = run
    got = evaluate_checkpoint(folder, lengths=[4, 8], batches=1, out=str(tmp_path / "scores.json"))
    assert json.loads((tmp_path / "scores.json").read_text()) == got
    assert (tmp_path / "scores.png").read_bytes()[:4] == b"\x89PNG"
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert rows[0] == ["length", "loss", "accuracy"] and [r[0] for r in rows[1:]] == ["4", "8"]


def test_splits_steps_and_variants(run):
    folder, _ = run
    test = evaluate_checkpoint(folder, lengths=[8], batches=1)["lengths"]
    assert evaluate_checkpoint(folder, split="validation", lengths=[8], batches=1)["lengths"] != test
    assert evaluate_checkpoint(folder, step=4, lengths=[8], batches=1)["lengths"] == test
    other_examples = evaluate_checkpoint(folder, lengths=[8], batches=1, settings=["seed=5"])
    assert other_examples["lengths"] != test
    longer = evaluate_checkpoint(folder, batches=1, settings=["task.length=16"], lengths=[16])
    assert set(longer["lengths"]) == {"16"}


ERRORS = [
    ({"split": "dev"}, "--split must be one of train, validation, test, got 'dev'"),
    ({"settings": ["task.objects=4"]}, "built for vocab_size = 6, but this task has 10"),
    ({"settings": ["task.lenght=4"]}, "config.task has no key lenght .*did you mean length"),
    ({"settings": ["trian.steps=4"]}, "did you mean train"),
    ({"lengths": ["0"]}, "--lengths: length must be an integer of at least 1"),
    ({"step": 3}, "no checkpoint of step 3"),
    ({"out": "nowhere/scores.json"}, "--out=nowhere/scores.json: there is no folder nowhere"),
]


@pytest.mark.parametrize(("arguments", "says"), ERRORS, ids=[says[:20] for _, says in ERRORS])
def test_errors(run, arguments, says):
    with pytest.raises(RunError, match=says):
        evaluate_checkpoint(run[0], batches=1, **arguments)


def test_missing_and_damaged_checkpoints(run, tmp_path):
    with pytest.raises(RunError, match="no checkpoint to evaluate: .*there is no folder"):
        evaluate_checkpoint(str(tmp_path))
    os.mkdir(tmp_path / "checkpoints")
    with pytest.raises(RunError, match="no checkpoint to evaluate: .* holds no step"):
        evaluate_checkpoint(str(tmp_path))
    copy = str(tmp_path / "copy")
    shutil.copytree(run[0], copy)
    for root, _, names in os.walk(os.path.join(copy, "checkpoints", "4", "state", "d")):
        for name in names:
            os.truncate(os.path.join(root, name), 1)
    with pytest.raises(RunError, match="is damaged"):
        evaluate_checkpoint(copy, batches=1)


def test_a_running_trainer_deletes_the_step_that_is_read(run, tmp_path, monkeypatch):
    """The newest remaining step is read; a step requested by number is an error that names it."""
    whole = str(tmp_path / "run")
    shutil.copytree(run[0], whole)
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = 4
    shutil.copytree(checkpoints / "4", checkpoints / "3")
    restore = Checkpoints.restore_parts

    def delete_first(self, target, step):
        if step == newest:
            shutil.rmtree(checkpoints / str(newest))
        return restore(self, target, step)

    monkeypatch.setattr(Checkpoints, "restore_parts", delete_first)
    assert load_run(whole).step == 3
    shutil.copytree(checkpoints / "3", checkpoints / "4")
    with pytest.raises(RunError, match=f"running trainer deleted step {newest} .*keep_last"):
        load_run(whole, step=newest)


def test_batches_add_up(run):
    """Scores of two batches equal those of their union."""
    pieces = build.build_run(small_config(mesh__data=1).to_dict())
    params, rest = pieces.model.init(jax.random.key(0))
    step = make_eval_step(pieces.model, pieces.mesh)
    both = Scorer(step, pieces.mesh, 4, 0)((params, rest), pieces.task, batches=2)
    whole = Scorer(step, pieces.mesh, 8, 0)((params, rest), pieces.task, batches=1)
    np.testing.assert_allclose(list(both.values()), list(whole.values()), rtol=1e-6)


def test_command_lines_end_with_one_paragraph():
    commands = {
        "has no key write_kernle": [
            "train.py",
            "--config=configs/swap.py",
            "--config.model.memory_options.deltaformer.write_kernle=relu",
        ],
        "no checkpoint to evaluate": ["eval.py", "--workdir=nowhere"],
    }
    for says, command in commands.items():
        done = run_script(*command)
        error = done.stderr
        assert done.returncode == 1 and error.startswith("error: ") and error.count("\n") == 1, error
        assert says in error, error


def test_a_whole_split_is_scored_once(run):
    """One pass over a stored split, whatever the batch size: the sums of its examples."""
    pieces = build.build_run(small_config(mesh__data=1).to_dict())
    params, rest = pieces.model.init(jax.random.key(0))
    step = make_eval_step(pieces.model, pieces.mesh)

    class Stored(type(pieces.task)):
        def source(self, split, seed):
            endless = super().source(split, seed)
            return FiniteSource(lambda i: endless[i], 8)

    task = Stored(**dataclasses.asdict(pieces.task))
    eight = Scorer(step, pieces.mesh, 8, 0)((params, rest), task, batches=1)
    for size in (8, 4):
        whole = Scorer(step, pieces.mesh, size, 0)((params, rest), task, batches=0)
        np.testing.assert_allclose(list(whole.values()), list(eight.values()), rtol=1e-6)
    with pytest.raises(RunError, match="--batches: task 'swap' has an endless source, .* give a number of batches"):
        evaluate_checkpoint(run[0], lengths=[8], batches=0)
