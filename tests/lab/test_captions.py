"""A small captioner learns to attend within seconds, and the measures of the study."""

import os

import numpy as np
import pytest

from memformer.lab import STUDIES, captions
from memformer.lab.bleu import measure_bleu
from memformer.tasks import Captions
from memformer.training.config import RunError, default_config
from memformer.training.evaluation import load_run
from memformer.training.loop import train
from memformer.training.metrics import read_records

pytestmark = pytest.mark.usefixtures("programs_kept", "no_curves")
# Nats per word of a caption without the picture: one of 24 pairs twice and one of 4 relations in 9 words
# (3 scenes of 4), one pair in 4 words and the number of shapes.
BLIND = (0.75 * (2 * np.log(24) + np.log(4)) + 0.25 * np.log(24) + 0.56) / (0.75 * 9 + 0.25 * 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_device):
    folder = str(tmp_path_factory.mktemp("runs") / "captions")
    config = default_config("captioner")
    config.task = {"name": "captions", "size": 16, "length": 9, "pictures": "shapes", "folder": ""}
    config.model.update({"channels": (8, 16), "width": 32})
    config.optimizer.update({"learning_rate": 1e-2, "warmup_steps": 20, "schedule": "constant"})
    config.train.update({"steps": 150, "batch_size": 16, "log_every": 50, "eval_every": 0, "eval_batches": 4})
    config.train.update({"final_batches": 4, "tensorboard": False, "checkpoint_every": 0})
    with one_device():
        train(config, folder)
        return load_run(folder)


def test_a_small_run_learns_to_attend(run):
    records = read_records(os.path.join(run.folder, "metrics.jsonl"))
    loss = [record["loss"] for record in records if record["kind"] == "eval"][-1]
    assert loss < 0.85 * BLIND, (loss, BLIND)


def test_the_study_of_a_run(run, monkeypatch):
    # two batches, the second of six pictures
    monkeypatch.setattr(captions, "PICTURES", 22)
    monkeypatch.setattr(captions, "ROWS", 16)
    study = STUDIES["captions"]
    result = study.measure({"captions": run}, {})
    scores, masses = result.rows(), result.rows(1)
    assert [row["count"] for row in scores] == [22, 22] and len(masses) == 4
    new, pairs = (float(row["correct words"].rstrip("%")) for row in scores)
    assert new > 30 and pairs > 20
    for row in masses:
        assert 0 < row["on the named shape"] < 1 and 0.02 < row["its share of the grid"] < 0.4
    assert study.draw(result).axes and list(study.examples({"captions": run})) == ["maps-lstm-shapes"]


def test_other_runs_are_refused(run):
    with pytest.raises(RunError, match="is none"):
        other = type("Other", (), {"task": None, "folder": "runs/x", "config": {"seed": 0}})()
        STUDIES["captions"].measure({"a": run, "b": other}, {})
    with pytest.raises(RunError, match="captions needs a run on generated shapes"):
        STUDIES["captions"].measure({}, {})


def test_shares_of_regions():
    task = Captions()
    number = next(i for i in range(20) if len(task.regions("test", 0, i)) == 2)
    regions = task.regions("test", 0, number)
    even = np.full((1, 8, 8), 1 / 64)
    # all attention on the middle of each shape in turn
    for this, other in ((0, 1), (1, 0)):
        centre = np.argwhere(regions[this] > 0.5).mean(0).astype(int) // 4
        maps = np.zeros((1, 8, 8))
        maps[0, centre[0], centre[1]] = 1
        assert captions.region_shares(maps, regions[this])[0] == 1
        assert captions.region_shares(maps, regions[other])[0] == 0
        shares, chance = captions.region_shares(even, regions[this])
        assert shares == pytest.approx(chance) and 1 / 64 <= chance < 0.4


WORDS = [
    ("a red ring", "a red ring", (3, 3)),
    ("a red ring", "a red ring above a blue cross", (3, 7)),
    ("a red ring above it", "a blue ring", (2, 5)),
    ("", "a ring", (0, 2)),
]


@pytest.mark.parametrize("words, reference, counts", WORDS)
def test_correct_words(words, reference, counts):
    assert captions.correct_words(words.split(), reference.split()) == counts


def test_bleu():
    pytest.importorskip("sacrebleu", reason="needs sacrebleu, of the extra test")
    same = ["a red ring above a blue cross", "a green square"]
    assert measure_bleu(same, same, tokenize="none").score == pytest.approx(100)
    other = measure_bleu(["a red ring below a blue cross", "a green circle"], same, tokenize="none")
    assert 20 < other.score < 80 and "tok:none" in other.signature
    with pytest.raises(ValueError, match="equally many sentences"):
        measure_bleu(["a"], same)


def test_without_sacrebleu(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    assert measure_bleu(["a"], ["a"]) is None
