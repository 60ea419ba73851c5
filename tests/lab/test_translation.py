"""Translation from end to end: a small run on kept verses learns them, and the study measures it."""

import pytest

from memformer.lab import STUDIES
from memformer.lab.translation import group_lengths
from memformer.training import loop
from memformer.training.config import RunError, default_config
from memformer.training.evaluation import load_run
from memformer.training.loop import train
from memformer.training.metrics import read_records
from tests.lab.test_trained import half_right

pytestmark = pytest.mark.usefixtures("programs_kept", "no_curves")
STEPS, LOSS = 50, 1.5


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    folder = tmp_path_factory.mktemp("runs") / "translation-attention"
    config = default_config("seq2seq")
    config.task = {"name": "translation", "corpus": "slice", "length": 24, "vocab_size": 1000, "folder": ""}
    config.model.width = 48
    config.optimizer.learning_rate = 1e-2
    config.train.update({"steps": STEPS, "batch_size": 16, "eval_every": 0, "eval_batches": 1, "checkpoint_every": 0})
    config.train.update({"final_batches": 1, "tensorboard": False, "progress": False})
    with one_device(), pytest.MonkeyPatch.context() as patch:
        # the losses are those of training
        patch.setattr(loop, "make_eval_step", lambda *_: half_right)
        train(config.to_dict(), str(folder))
    return str(folder)


def test_a_small_run_learns_its_verses(run):
    losses = [record["loss"] for record in read_records(f"{run}/metrics.jsonl") if record["kind"] == "train"]
    # ln 1000 = 6.9 before the first step; the mean of ten steps is logged
    assert losses[0] > 4.5 and losses[-1] < LOSS, losses


def test_the_study_of_a_run(run, one_device):
    pytest.importorskip("sacrebleu", reason="sacrebleu (the extra test) is not installed")
    study = STUDIES["translation"]
    with one_device():
        runs = {"attention": load_run(run)}
    result = study.measure(runs, {})
    whole, rows = result.rows(), result.rows(1)
    (one,) = runs.values()
    assert {row["model"] for row in rows} == {"LSTM, attention"} and all(0 <= row["BLEU"] <= 100 for row in rows)
    assert sum(row["verses"] for row in rows) == result.values["test verses"] == len(one.task.pairs("test"))
    assert whole[0]["parameters"] == one.model.size() and "LSTM, attention" in study.judge(result).finding
    assert "514 verses of Genesis" in result.values["verses"]
    assert study.draw(result).axes and list(study.examples(runs)) == ["alignment"]


def test_groups_hold_every_length_once():
    lengths = [7, 7, 7, 7, 9, 10, 11, 30]
    groups = group_lengths(lengths, 3)
    assert groups[0][0] == 7 and groups[-1][1] == 30
    assert all(sum(first <= n <= last for first, last in groups) == 1 for n in range(7, 31))
    assert group_lengths([5, 5, 5], 4) == [(5, 5)]


def test_a_run_of_another_task_is_refused():
    class Other:
        folder, task = "runs/swap", type("Task", (), {"name": "swap"})()

    with pytest.raises(RunError, match="translation measures runs of configs/translation.py, runs/swap is of swap"):
        STUDIES["translation"].measure({"x": Other()}, {})
