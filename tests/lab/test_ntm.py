"""The study of the Neural Turing Machine, on untrained runs."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.lab import STUDIES
from memformer.lab.ntm import BITS, OPTIMUM, WRONG
from memformer.lab.study import Result, Table, numbers_in
from memformer.models import build_model
from memformer.tasks import make_task
from memformer.tasks.ntm import optimal_bits
from memformer.training.config import RunError

SHAPES = {
    "ntm": {"type": "ntm", "controller": "lstm", "width": 4, "slots": 8, "slot_width": 3},
    "lstm": {"type": "recurrent_lm", "cell": "lstm", "width": 4},
}


def a_run(folder, task, shape, lengths, finished=True, wrong=0.5):
    """The part of a loaded run that the study reads."""
    folder.mkdir()
    records = [{"kind": "train", "step": n, "bits_per_sequence": 10.0 - n, "step_seconds": 2.0} for n in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    scores = {str(n): {"bits_per_sequence": float(n), "bit_errors": n * wrong} for n in lengths}
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


def test_tables_verdict_and_figures(tmp_path):
    copy, grams = make_task({"name": "copy", "length": 3}), make_task({"name": "dynamic_ngrams", "length": 20})
    runs = [
        a_run(tmp_path / "a", copy, SHAPES["ntm"], (2, 3, 7)),
        a_run(tmp_path / "a_seed1", copy, SHAPES["ntm"], (2, 3, 7), wrong=1.0),
        a_run(tmp_path / "b", copy, SHAPES["lstm"], (2, 3, 7)),
        a_run(tmp_path / "c", grams, SHAPES["ntm"], (20,)),
    ]
    study = STUDIES["ntm"]
    named = {run.folder: run for run in runs}
    result = study.measure(named, {})
    first, second = (rows for _, rows in result.tables)
    assert [(row["model"], row["seeds"], row["wrong bits per sequence"], row["sequences"]) for row in first] == [
        ("NTM, LSTM controller", 2, "2.25 (1.5 to 3)", 6),
        ("LSTM", 1, 1.5, 6),
        ("NTM, LSTM controller", 1, 10.0, 6),
    ]
    assert first[1]["seconds"] == 6
    # the length of training is a mixture of lengths, and stands in the first table alone
    assert [row["length"] for row in second] == [2, 7, 2, 7]
    assert result.values["copy: NTM, LSTM controller"]["wrong bits per sequence"] == [1.5, 3.0]
    source = grams.source("test", 0)
    costs = [optimal_bits(np.append(source[i]["inputs"][:, 0], source[i]["targets"][-1, 0])) for i in range(6)]
    assert result.values["optimal bits of dynamic n-grams"] == {"sequences": 6, "bits": round(float(np.mean(costs)), 2)}
    verdict = study.judge(result)
    assert verdict.kind == "not reproduced" and "copy of 7 vectors: LSTM 3.5 wrong bits, NTM 5.25" in verdict.finding
    assert "not reproduced: copy (2.2 wrong bits, the LSTM has 1.5), n-grams" in verdict.finding
    assert f"n-grams (20.0 bits, the optimum has {np.mean(costs):.1f})." in verdict.finding
    assert study.summary(result)[1] == {
        "bits per sequence": "dynamic_ngrams",
        "NTM, LSTM controller": 20.0,
        "LSTM": "",
    }
    assert study.draw(result).axes and list(study.examples(named)) == ["heads"]


@pytest.mark.parametrize(
    ("ntm", "lstm", "bits", "kind"),
    [
        ([0.0, 0.1, 3.0], [9.0], 12.0, "confirmed"),
        ([0.0, 0.2, 3.0], [9.0], 12.0, "not reproduced"),
        ([0.0, 0.1, 3.0], [0.0], 12.0, "not reproduced"),
        ([0.0, 0.1, 3.0], [9.0], 15.1, "partly confirmed"),
    ],
)
def test_most_seeds_must_have_learnt(ntm, lstm, bits, kind):
    scores = {
        "copy: NTM, LSTM controller": {WRONG: ntm},
        "copy: LSTM": {WRONG: lstm},
        "dynamic_ngrams: NTM, LSTM controller": {BITS: [bits]},
        OPTIMUM: {"bits": 10.0},
    }
    tables = [Table(title, [{"task": "recall"}]) for title in ("all", "by length")]
    verdict = STUDIES["ntm"].judge(Result(tables, scores))
    assert verdict.kind == kind
    assert ("copy (2 of 3 seeds)" in verdict.finding) == (ntm[1] == 0.1)


def test_a_sort_is_scored_where_priorities_differ(tmp_path, monkeypatch):
    """A model that answers the sorted vectors, in the order of priorities rounded to 0.01."""
    task = make_task({"name": "priority_sort", "length": 5, "answers": 3, "bits": 4})
    runs = {
        name: a_run(tmp_path / name, task, SHAPES[name], (5, 6), wrong=0.2 if name == "ntm" else 2.0) for name in SHAPES
    }

    def answer(inputs):
        order = jnp.argsort(-jnp.round(inputs[:, :5, -1] / 0.01), axis=1, stable=True)[:, :3, None]
        logits = jnp.full((*inputs.shape[:2], 4), -1.0)
        best = jnp.take_along_axis(inputs[:, :5, :4], order, axis=1)
        return types.SimpleNamespace(logits=logits.at[:, 6:9].set(2 * best - 1))

    monkeypatch.setattr(runs["ntm"], "module", lambda: answer)
    monkeypatch.setattr(
        runs["lstm"], "module", lambda: lambda x: types.SimpleNamespace(logits=-jnp.ones((*x.shape[:2], 4)))
    )
    result = STUDIES["ntm"].measure(runs, {"sorted": 2000})
    (ntm, lstm) = result.rows(2)
    assert list(ntm)[1:] == ["below 0.002", "0.002 to 0.005", "0.005 to 0.01", "0.01 to 0.02", "at least 0.02"]
    assert 0.4 < numbers_in(ntm["below 0.002"])[0] < 0.8 and ntm["at least 0.02"] == "100.0%"
    assert numbers_in(lstm["at least 0.02"])[0] < 0.05
    assert STUDIES["ntm"].judge(result).finding.startswith("The NTM learns priority sort (one seed)")


def test_runs_that_cannot_be_compared_are_named(tmp_path):
    copy, text = make_task({"name": "copy", "length": 3}), make_task({"name": "parity"})
    unfinished = a_run(tmp_path / "a", copy, SHAPES["lstm"], (3,), finished=False)
    with pytest.raises(RunError, match="a is unfinished; rerun its train.py command"):
        STUDIES["ntm"].measure({"a": unfinished}, {})
    unfinished.task = text
    with pytest.raises(RunError, match="must be a run of model ntm or recurrent_lm on one of copy, .*on parity"):
        STUDIES["ntm"].measure({"a": unfinished}, {})
