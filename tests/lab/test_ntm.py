"""The laboratory of the Neural Turing Machine, on runs of a moment that were never trained."""

import json
import types

import jax
import numpy as np
import pytest
from flax import nnx

from memformer.lab import LABS, Study
from memformer.models import build_model
from memformer.tasks import make_task
from memformer.tasks.ntm import optimal_bits
from memformer.training.config import RunError

SHAPES = {
    "ntm": {"type": "ntm", "controller": "lstm", "width": 4, "slots": 8, "slot_width": 3},
    "lstm": {"type": "recurrent_lm", "cell": "lstm", "width": 4},
}


def a_run(folder, task, shape, lengths, finished=True):
    """What `load_run` gives of a run, as far as the laboratory looks at it."""
    folder.mkdir()
    records = [{"kind": "train", "step": n, "bits_per_sequence": 10.0 - n, "step_seconds": 2.0} for n in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    scores = {str(n): {"bits_per_sequence": float(n), "bit_errors": n / 2} for n in lengths}
    model = build_model(shape, vocab_size=0, num_classes=task.num_classes, features=task.features, rngs=nnx.Rngs(0))
    return types.SimpleNamespace(
        folder=str(folder),
        task=task,
        config={"seed": 0, "model": shape, "train": {"batch_size": 2, "final_batches": 3}},
        model=types.SimpleNamespace(size=lambda: 12),
        step=3,
        result={"seconds": 1.0, "finished": finished, "lengths": scores},
        module=lambda: model,
    )


def test_it_tells_tables_figures_and_an_outcome(tmp_path):
    copy, grams = make_task({"name": "copy", "length": 3}), make_task({"name": "dynamic_ngrams", "length": 20})
    runs = [
        a_run(tmp_path / "a", copy, SHAPES["ntm"], (2, 3, 7)),
        a_run(tmp_path / "b", copy, SHAPES["lstm"], (2, 3, 7)),
        a_run(tmp_path / "c", grams, SHAPES["ntm"], (20,)),
    ]
    study = Study("ntm", str(tmp_path / "out"))
    LABS["ntm"](runs, study)
    first, second = (rows for _, rows in study.tables)
    assert [(row["model"], row["bits a sequence"], row["sequences"]) for row in first] == [
        ("NTM, LSTM controller", 3.0, 6),
        ("LSTM", 3.0, 6),
        ("NTM, LSTM controller", 20.0, 6),
    ]
    assert first[0]["seconds"] == 6
    # the length of training is a mixture of lengths, and stands in the first table alone
    assert [row["length"] for row in second] == [2, 7, 2, 7]
    source = grams.source("test", 0)
    costs = [optimal_bits(np.append(source[i]["inputs"][:, 0], source[i]["targets"][-1, 0])) for i in range(6)]
    assert study.values["optimal bits of dynamic n-grams"] == {"sequences": 6, "bits": round(float(np.mean(costs)), 2)}
    assert "copy 1.5 (NTM, LSTM controller), 1.5 (LSTM), at 7 vectors 3.5 (NTM" in study.outcome
    assert f"dynamic ngrams 20 (NTM, LSTM controller) bits against {np.mean(costs):.1f} of" in study.outcome
    assert study.outcome.endswith("Not learnt in these runs: copy (NTM, LSTM controller), copy (LSTM).")
    assert study.values["wrong bits of the copy shown"]["length"] == 4
    for label in ("learning", "lengths", "heads"):
        assert (tmp_path / "out" / f"ntm-{label}.png").stat().st_size > 1000
    jax.clear_caches()


def test_runs_that_cannot_be_compared_are_named(tmp_path):
    copy, text = make_task({"name": "copy", "length": 3}), make_task({"name": "parity"})
    unfinished = a_run(tmp_path / "a", copy, SHAPES["lstm"], (3,), finished=False)
    with pytest.raises(RunError, match="a has not ended; give train.py the same command"):
        LABS["ntm"]([unfinished], Study("ntm", str(tmp_path)))
    unfinished.task = text
    with pytest.raises(RunError, match="must be a run of model ntm or recurrent_lm on one of copy, .*on parity"):
        LABS["ntm"]([unfinished], Study("ntm", str(tmp_path)))
