"""The laboratory of memories between segments, on models that were never trained."""

import json
import types

import jax
import pytest

from memformer.lab import LABS, Study
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
    """What `load_run` gives of a run, as far as the laboratory looks at it."""
    folder.mkdir()
    records = [{"kind": "train", "step": n, "length": length} for n, length in enumerate(lengths)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    size = {"segment_length": getattr(task, "segment_length", 4), "width": 4, "depth": 1, "heads": 1}
    shape = {**size, "memory_tokens": 1, "feedforward": None, **shape}
    model = make_functional(lambda rngs: build_model(shape, vocab_size=103, rngs=rngs))
    params, rest = model.init(jax.random.key(0))
    config = {"seed": 0, "model": {"type": shape["type"], "correction": shape.get("correction", True)}}
    return types.SimpleNamespace(
        folder=str(folder),
        task=task,
        config=config,
        model=model,
        weights=(params, rest),
        module=lambda: model.module(params, rest, jax.random.key(0)),
    )


def test_it_asks_one_question_and_tells_tables_a_figure_and_an_outcome(tmp_path):
    few = make_task({"name": "remember", "length": 4, "key_size": 1, "symbols": 5, "queries": 3})
    runs = [a_run(tmp_path / "a", few, SHAPES["ARMT"], (2,)), a_run(tmp_path / "b", few, SHAPES["RMT"], (2, 4))]
    study = Study("segments", str(tmp_path / "out"))
    LABS["segments"](runs, study)
    ((_, rows),) = study.tables
    # five keys: no more than five pairs
    assert [list(row) for row in rows] == [["task", "model", "trained on", "2 pairs", "5 pairs"]] * 2
    assert [(row["model"], row["trained on"]) for row in rows] == [("ARMT", 2), ("RMT", 4)]
    assert list(study.values) == ["remember ARMT", "remember RMT"]
    assert all(0 <= share <= 1 for shares in study.values.values() for share in shares.values())
    assert study.outcome.startswith("remember: ARMT, trained to 2 pairs, ") and " at 5; remember: RMT" in study.outcome
    assert (tmp_path / "out" / "segments-pairs.png").stat().st_size > 1000


def test_runs_of_other_tasks_are_named(tmp_path):
    run = a_run(tmp_path / "a", make_task({"name": "parity"}), SHAPES["ARMT without gamma"], (3,))
    with pytest.raises(RunError, match="segments measures runs of remember and rewrite, got .*a of parity"):
        LABS["segments"]([run], Study("segments", str(tmp_path)))
