"""The laboratory of recurrent networks, on made-up results."""

import types

import pytest

from memformer.lab import LABS, Study
from memformer.training.config import RunError


def a_run(task, model, lengths):
    return types.SimpleNamespace(
        folder=f"runs/{task}",
        task=types.SimpleNamespace(name=task, length=8),
        config={"model": model},
        result=None if lengths is None else {"lengths": lengths},
    )


def test_tables_and_outcome_are_the_runs_scores(tmp_path):
    parity = a_run("parity", {"memory": "gru"}, {"16": {"accuracy": 0.75}, "8": {"accuracy": 1.0}})
    text = a_run("text", {"type": "recurrent_lm", "cell": "lstm"}, {"8": {"bits_per_byte": 2.5}})
    study = Study("recurrent", str(tmp_path))
    LABS["recurrent"]([text, parity], study)
    assert study.tables[0][1] == [{"model": "gru", "8 bits": "100.0%", "16 bits": "75.0%"}]
    assert study.tables[1][1] == [{"model": "lstm", "bits per byte": 2.5}]
    assert study.outcome == "Parity: gru 75.0% at 16 bits; lstm reads text at 2.50 bits per byte."
    assert (tmp_path / "recurrent-parity.png").exists()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (a_run("text", {"memory": "gru"}, {"8": {"bits_per_byte": 2.5}}), "at least one run of parity"),
        (a_run("parity", {"memory": "gru"}, None), "has no result.json yet"),
    ],
)
def test_runs_that_say_nothing_are_refused(run, message, tmp_path):
    with pytest.raises(RunError, match=message):
        LABS["recurrent"]([run], Study("recurrent", str(tmp_path)))
