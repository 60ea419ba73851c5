"""The study of memories between segments, on untrained models."""

import json
import types

import jax
import numpy as np
import pytest

from memformer.lab import STUDIES, segment_recall
from memformer.lab.study import Result, Table
from memformer.models import build_model
from memformer.tasks import make_task
from memformer.training.config import RunError
from memformer.training.step import make_functional

SHAPES = {
    "ARMT": {"type": "armt", "key_width": 2},
    "ARMT without gamma": {"type": "armt", "key_width": 2, "correction": False},
    "RMT": {"type": "rmt"},
}


def a_run(folder, task, shape, lengths):
    """The part of a loaded run that the study reads."""
    folder.mkdir()
    records = [{"kind": "train", "step": n, "length": length} for n, length in enumerate(lengths)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    size = {"segment_length": getattr(task, "segment_length", 4), "width": 4, "depth": 1, "heads": 1}
    shape = {**size, "memory_tokens": 1, "feedforward": None, **shape}
    model = make_functional(lambda rngs: build_model(shape, vocab_size=103, rngs=rngs))
    # drawn without compiling
    draw, rest = np.random.default_rng(0), {}
    params = {name: jax.device_put(draw.normal(size=x.shape).astype(x.dtype)) for name, x in model.params.items()}
    described = {"type": shape["type"], "correction": shape.get("correction", True), "depth": shape["depth"]}
    config = {"seed": 0, "model": described}
    return types.SimpleNamespace(
        folder=str(folder),
        task=task,
        config=config,
        model=model,
        weights=(params, rest),
        module=lambda: model.module(params, rest, jax.random.key(0)),
    )


def test_it_asks_one_question_and_tabulates_the_answers(tmp_path, monkeypatch):
    for name, value in {"ROWS": 16, "WIDTHS": (2, 8), "PAIRS": (1, 9), "BETAS": (1.0,)}.items():
        monkeypatch.setattr(segment_recall, name, value)
    few = make_task({"name": "remember", "length": 4, "key_size": 1, "symbols": 5, "queries": 3})
    given = {"a": (SHAPES["ARMT"], (2,)), "b": (SHAPES["RMT"], (2, 4)), "c": (SHAPES["ARMT"], (2, 4))}
    runs = {name: a_run(tmp_path / name, few, shape, lengths) for name, (shape, lengths) in given.items()}
    study = STUDIES["segment_recall"]
    result = study.measure(runs, {})
    (_, rows), (_, layers), (_, (narrow, wide)) = result.tables
    # five keys: no more than five pairs
    assert [list(row) for row in rows] == [["task", "model", "seeds at the last length", "2 pairs", "5 pairs"]] * 2
    names = [("ARMT", "1 of 2"), ("RMT", "1 of 1")]
    assert [(row["model"], row["seeds at the last length"]) for row in rows] == names
    assert list(result.values) == ["remember ARMT", "remember RMT"]
    assert all(0 <= share <= 1 for scores in result.values.values() for shares in scores.values() for share in shares)
    # one pair is always read, nine by more of the wider keys
    assert narrow["1 pairs"] == wide["1 pairs"] == "100.0%"
    assert float(narrow["9 pairs"][:-1]) < float(wide["9 pairs"][:-1])
    # RMT has no memory in its layers; an untrained ARMT that reads nothing cannot answer
    ((task, model, layer, *norms_and_answers),) = (row.values() for row in layers)
    assert (task, model, layer) == ("remember", "ARMT", 1) and float(norms_and_answers[1]) > 0
    assert study.judge(result).finding.startswith("Exact match after 5 pairs: remember ARMT ")
    assert study.draw(result).axes


def test_questions_ask_the_latest_value():
    """Two keys, the first written twice: both are asked, each with what was written last."""
    task = make_task({"name": "rewrite", "length": 3, "symbols": 4})
    written = np.array([[[1, 100, 2, 102], [3, 100, 0, 102], [1, 100, 3, 102]]] * 16)
    asked = segment_recall._question(np.random.default_rng(0), written, task)
    assert {tuple(row) for row in asked.tolist()} == {(1, 101, 3, 102), (3, 101, 0, 102)}


@pytest.mark.parametrize("exact, without, kind", [(1.0, 0.2, "confirmed"), (0.9, 0.2, "partly"), (0.9, 0.6, "refuted")])
def test_verdict(exact, without, kind):
    values = {"rewrite ARMT": {"2": [1.0], "500": [exact, 1.0]}}
    values["rewrite ARMT without gamma"] = {"500": [0.1, without]}
    result = Result([Table("", [{"x": 1}])], values)
    assert STUDIES["segment_recall"].judge(result).kind.startswith(kind)


def test_runs_of_other_tasks_are_named(tmp_path):
    run = a_run(tmp_path / "a", make_task({"name": "parity"}), SHAPES["ARMT without gamma"], (3,))
    with pytest.raises(RunError, match="segment_recall measures runs of remember and rewrite, got .*a of parity"):
        STUDIES["segment_recall"].measure({"a": run}, {})
