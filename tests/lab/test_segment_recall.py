"""The study of memories between segments, on untrained models."""

import json
import types

import jax
import numpy as np
import pytest

from memformer.lab import STUDIES, segment_recall
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
    config = {"seed": 0, "model": {"type": shape["type"], "correction": shape.get("correction", True)}}
    return types.SimpleNamespace(
        folder=str(folder),
        task=task,
        config=config,
        model=model,
        weights=(params, rest),
        module=lambda: model.module(params, rest, jax.random.key(0)),
    )


def test_it_asks_one_question_and_tabulates_the_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_recall, "ROWS", 16)
    few = make_task({"name": "remember", "length": 4, "key_size": 1, "symbols": 5, "queries": 3})
    runs = [a_run(tmp_path / "a", few, SHAPES["ARMT"], (2,)), a_run(tmp_path / "b", few, SHAPES["RMT"], (2, 4))]
    study = STUDIES["segment_recall"]
    result = study.measure({run.folder: run for run in runs}, {})
    ((_, rows),) = result.tables
    # five keys: no more than five pairs
    assert [list(row) for row in rows] == [["task", "model", "trained on", "2 pairs", "5 pairs"]] * 2
    assert [(row["model"], row["trained on"]) for row in rows] == [("ARMT", 2), ("RMT", 4)]
    assert list(result.values) == ["remember ARMT", "remember RMT"]
    assert all(0 <= share <= 1 for shares in result.values.values() for share in shares.values())
    assert study.judge(result).finding.startswith("Exact match after 5 pairs: remember ARMT ")
    assert study.draw(result).axes


def test_runs_of_other_tasks_are_named(tmp_path):
    run = a_run(tmp_path / "a", make_task({"name": "parity"}), SHAPES["ARMT without gamma"], (3,))
    with pytest.raises(RunError, match="segment_recall measures runs of remember and rewrite, got .*a of parity"):
        STUDIES["segment_recall"].measure({"a": run}, {})
