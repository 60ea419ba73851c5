"""A run behind a URL: a memory file system stands for the bucket."""

import json

import fsspec
import jax
import pytest
from etils import epath
from etils.epath import backend

from memformer.training import build, files, lock, report
from memformer.training.checkpoint import Checkpoints
from memformer.training.config import RunError
from memformer.training.evaluation import evaluate_checkpoint
from memformer.training.files import check_folder
from memformer.training.lock import run_lock
from memformer.training.loop import train
from memformer.training.metrics import read_records
from tests.training.small import build_counting, small_config

pytestmark = pytest.mark.usefixtures("programs_kept")
RUN = "s3://bucket/runs/swap"


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    memory = fsspec.filesystem("memory")
    local = fsspec.filesystem("file")
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: memory if name == "s3" else local)
    # any package that is installed
    monkeypatch.setattr(files, "SCHEMES", {"s3": "fsspec"})
    yield memory
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture
def light(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(build, "build_model", build_counting)


def names(folder):
    return sorted(path.name for path in epath.Path(folder).iterdir())


def test_a_run(light, tmp_path, monkeypatch, capsys):
    """Trained in two parts, with a profile, then evaluated: as a run on a disk, and nothing lands on the disk here."""
    monkeypatch.chdir(tmp_path)
    config = small_config(train__steps=6, train__tensorboard=True, train__profile=(2, 2), train__checkpoint_every=2)
    config.optimizer.schedule_steps = 8
    with monkeypatch.context() as patch:
        patch.setattr(report, "plot_learning_curve", lambda *_, **__: None)
        train(config, RUN)
        whole = train(small_config(train__steps=8, train__checkpoint_every=2), str(tmp_path / "whole"))
    assert "no TensorBoard files" in capsys.readouterr().out
    config.train.steps = 8
    result = train(config, RUN)
    assert "resuming from step 6" in capsys.readouterr().out
    assert names(RUN) == ["checkpoints", "config.json", "curve.png", "metrics.jsonl", "profile", "result.json"]
    # the last two, and the best
    assert {"6", "8"} <= set(names(f"{RUN}/checkpoints")) and len(names(f"{RUN}/checkpoints")) <= 3
    assert epath.Path(f"{RUN}/curve.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads(epath.Path(f"{RUN}/result.json").read_text()) == result
    assert result["lengths"] == whole["lengths"]
    losses = [
        [record["loss"] for record in read_records(f"{folder}/metrics.jsonl")] for folder in (RUN, tmp_path / "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    scores = evaluate_checkpoint(RUN, lengths=[8], batches=2)
    assert scores["lengths"]["8"] == result["lengths"]["8"] and scores["checkpoint"] == RUN
    assert "eval_test.json" in names(RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_half_uploaded_step_is_skipped(bucket, caplog):
    """The upload of a killed run: its checksums, which come last, are missing."""
    state = {"params": {"w": jax.numpy.arange(3.0)}}
    for step in (1, 2):
        with Checkpoints(f"{RUN}/checkpoints") as checkpoints:
            checkpoints.save(step, state, {"position": step}, {}, {"loss": 1.0})
    epath.Path(f"{RUN}/checkpoints/2/state/checksums.json").unlink()
    with Checkpoints(f"{RUN}/checkpoints") as checkpoints:
        assert checkpoints.restore(jax.eval_shape(lambda: state)).data == {"position": 1}
        checkpoints.save(2, state, {"position": 3}, {}, {"loss": 1.0})
    assert "Checkpoint 2 in s3://bucket" in caplog.text
    with Checkpoints(f"{RUN}/checkpoints") as checkpoints:
        assert checkpoints.restore(jax.eval_shape(lambda: state)).data == {"position": 3}


def test_lock(monkeypatch):
    monkeypatch.setattr(lock, "STALE", 0.05)
    monkeypatch.setattr(lock, "POLL", 0.01)
    epath.Path(RUN).mkdir(parents=True)
    with run_lock(RUN):
        owner = epath.Path(f"{RUN}/lock.json").read_text()
        with pytest.raises(RunError, match="another trainer is running"), run_lock(RUN):
            pytest.fail("two owners")
    assert names(RUN) == []
    epath.Path(f"{RUN}/lock.json").write_text(json.dumps({**json.loads(owner), "host": "elsewhere"}))
    with run_lock(RUN):
        pass


def test_schemes(monkeypatch):
    monkeypatch.setattr(files, "SCHEMES", {"s3": "a_package_that_is_missing"})
    with pytest.raises(RunError, match="needs the package a_package_that_is_missing.*pip install"):
        train(small_config(), RUN)
    with pytest.raises(RunError, match="needs the package a_package_that_is_missing"):
        evaluate_checkpoint(RUN)
    with pytest.raises(RunError, match=r"a local path or a URL of s3://, got 'ftp://host/run'"):
        check_folder("ftp://host/run")
