"""The study of recurrent networks, on made-up results."""

import types

import pytest

from memformer.lab import STUDIES
from memformer.training.config import RunError


def a_run(task, model, lengths):
    return types.SimpleNamespace(
        folder=f"runs/{task}",
        task=types.SimpleNamespace(name=task, length=8),
        config={"model": model, "seed": 0},
        result=None if lengths is None else {"lengths": lengths},
    )


def test_tables_and_verdict_are_the_runs_scores():
    parity = a_run("parity", {"memory": "gru"}, {"16": {"accuracy": 0.75}, "8": {"accuracy": 1.0}})
    text = a_run("text", {"type": "recurrent_lm", "cell": "lstm"}, {"8": {"bits_per_byte": 2.5}})
    study = STUDIES["recurrent"]
    result = study.measure({"text": text, "parity": parity}, {})
    assert result.rows() == [{"model": "gru", "8 bits": "100.0%", "16 bits": "75.0%"}]
    assert result.rows(1) == [{"model": "lstm", "bits per byte": 2.5}]
    kind, finding = study.judge(result)
    assert kind == "refuted" and finding.startswith("Accuracy on strings of 16 bits: gru 75.0%. Needed: 99.9%")
    assert study.draw(result).axes


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (a_run("text", {"memory": "gru"}, {"8": {"bits_per_byte": 2.5}}), "at least one run of parity"),
        (a_run("parity", {"memory": "gru"}, None), "has no result.json yet"),
    ],
)
def test_runs_without_parity_or_result_are_refused(run, message):
    with pytest.raises(RunError, match=message):
        STUDIES["recurrent"].measure({"x": run}, {})
