"""Trackers: one's own, Weights & Biases by a stand-in, what is missing."""

import math
import sys
import types

import pytest

from memformer.training.config import RunError
from memformer.training.metrics import RunLog, read_records
from memformer.training.trackers import EventFile, make_trackers
from memformer.training.validate import validate
from tests.training.small import small_config


class Seen:
    """A tracker, and a run of Weights & Biases."""

    def __init__(self, **options):
        self.options, self.values, self.closed = options, [], False

    def write(self, values, step):
        self.values.append((step, dict(values)))

    def log(self, values, step):
        self.write(values, step)

    def close(self):
        self.closed = True

    finish = close


def config(**train):
    plain = small_config().to_dict()
    return {**plain, "train": {**plain["train"], **train}}


def test_a_tracker_sees_the_numbers_of_each_record(tmp_path):
    mine = Seen()
    log = RunLog(str(tmp_path), step=0, total=4, trackers=[mine], progress=False)
    log.write("train", 2, {"loss": 1.5, "length": 8, "name": "no number", "rate": math.nan})
    log.write("eval", 2, {"accuracy": 0.5})
    assert not mine.closed
    log.close()
    assert mine.closed and len(read_records(str(tmp_path / "metrics.jsonl"))) == 2
    assert mine.values == [(2, {"train/loss": 1.5, "train/length": 8}), (2, {"eval/accuracy": 0.5})]


def test_weights_and_biases_continues_a_run(tmp_path, monkeypatch):
    runs: list[Seen] = []
    module = types.ModuleType("wandb")
    module.init = lambda **options: runs.append(Seen(**options)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    chosen = config(wandb="mine", tensorboard=True)
    for step in (0, 4):
        board, tracker = make_trackers(str(tmp_path), step, chosen)
        assert isinstance(board, EventFile)
        tracker.write({"train/loss": 0.5}, step + 1)
        tracker.close()
        board.close()
    first, second = runs
    assert first.options["project"] == "mine" and first.options["config"]["task"]["name"] == "swap"
    assert first.options["id"] == second.options["id"] and second.options["resume"] == "allow"
    assert second.values == [(5, {"train/loss": 0.5})] and second.closed
    (other,) = make_trackers(str(tmp_path / ".."), 0, config(wandb="mine", tensorboard=False))
    assert runs[-1].options["id"] != first.options["id"]
    (tmp_path / ".." / "wandb_id").unlink()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunError, match="config.train.wandb needs the package wandb, .*pip install wandb"):
        make_trackers(str(tmp_path), 0, config(wandb="mine", tensorboard=False))


def test_a_project_is_a_name():
    with pytest.raises(RunError, match="train.wandb must be the name of a project, or '', got True"):
        validate(config(wandb=True))
