"""The whole way of a translation: a small run on kept verses learns them, and the laboratory measures it."""

import jax
import pytest

from memformer.lab import LABS, Study
from memformer.lab.translation import group_lengths
from memformer.training.config import RunError, default_config
from memformer.training.evaluation import load_run
from memformer.training.loop import train
from memformer.training.metrics import read_records

STEPS, LOSS = 50, 1.5


@pytest.fixture(scope="module")
def alone():
    """One of the virtual devices: a small run is slower over eight."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, alone):
    folder = tmp_path_factory.mktemp("runs") / "translation-attention"
    config = default_config("seq2seq")
    config.task = {"name": "translation", "corpus": "slice", "length": 24, "vocab_size": 1000, "folder": ""}
    config.model.width = 48
    config.optimizer.learning_rate = 1e-2
    config.train.update({"steps": STEPS, "batch_size": 16, "eval_every": 0, "eval_batches": 1, "checkpoint_every": 0})
    config.train.update({"final_batches": 1, "tensorboard": False, "progress": False})
    train(config.to_dict(), str(folder))
    return str(folder)


def test_a_small_run_learns_its_verses(run):
    losses = [record["loss"] for record in read_records(f"{run}/metrics.jsonl") if record["kind"] == "train"]
    # ln 1000 = 6.9 before the first step; the mean of ten steps is logged
    assert losses[0] > 4.5 and losses[-1] < LOSS, losses


def test_the_laboratory_says_what_came_out(run, tmp_path):
    pytest.importorskip("sacrebleu", reason="sacrebleu (the extra test) is not installed")
    runs = [load_run(run)]
    study = Study("translation", str(tmp_path))
    LABS["translation"](runs, study)
    study.finish(runs, 1.0)
    rows, whole = study.tables[0][1], study.tables[1][1]
    assert {row["model"] for row in rows} == {"LSTM, attention"} and all(0 <= row["BLEU"] <= 100 for row in rows)
    assert sum(row["verses"] for row in rows) == study.values["test verses"] == len(runs[0].task.pairs("test"))
    assert whole[0]["parameters"] == runs[0].model.size() and "LSTM, attention: BLEU" in study.outcome
    assert "514 verses of Genesis" in study.outcome
    for label in ("bleu", "alignment"):
        assert 0 < (tmp_path / f"translation-{label}.png").stat().st_size < 150_000


def test_groups_hold_every_length_once():
    lengths = [7, 7, 7, 7, 9, 10, 11, 30]
    groups = group_lengths(lengths, 3)
    assert groups[0][0] == 7 and groups[-1][1] == 30
    assert all(sum(first <= n <= last for first, last in groups) == 1 for n in range(7, 31))
    assert group_lengths([5, 5, 5], 4) == [(5, 5)]


def test_a_run_of_another_task_is_refused(tmp_path):
    class Other:
        folder, task = "runs/swap", type("Task", (), {"name": "swap"})()

    with pytest.raises(RunError, match="translation measures runs of configs/translation.py, runs/swap is of swap"):
        LABS["translation"]([Other()], Study("translation", str(tmp_path)))
