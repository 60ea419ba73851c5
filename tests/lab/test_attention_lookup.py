"""The studies coreference and lookup, on models whose answers and attention are known."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.lab import STUDIES
from memformer.lab.coreference import read_sentences
from memformer.lab.lookup import ask
from memformer.models import ModelOutput
from memformer.tasks import Coreference, Lookup
from memformer.tasks.coreference import NOUNS, WORDS
from memformer.training.config import RunError


class Finder(nnx.Module):
    """Attends to the step whose key is nearest to the last one's, or always to the first; answers what it sees."""

    def __init__(self, task, by_content):
        self.width, self.by_content, self.sharp = task.key_width, by_content, nnx.Param(jnp.float32(1000.0))

    def attention_weights(self, inputs):
        keys = inputs[..., : self.width]
        scores = jnp.einsum("btk,bsk->bts", keys, keys) * self.sharp[...]
        # A question does not look at itself.
        scores = scores - 1e6 * jnp.eye(inputs.shape[1])[None]
        first = jax.nn.one_hot(jnp.zeros(scores.shape[:2], jnp.int32), inputs.shape[1])
        return (jax.nn.softmax(scores) if self.by_content else first)[:, None, None]

    def __call__(self, inputs):
        weights = self.attention_weights(inputs)[:, 0, 0]
        return ModelOutput(weights @ inputs[..., self.width :], None, {})


class FirstNoun(nnx.Module):
    """Answers, and attends from everywhere to, the noun that is named first."""

    def __init__(self):
        self.nouns = nnx.Param(jnp.array([NOUNS.index(word) if word in NOUNS else -1 for word in WORDS]))

    def attention_weights(self, inputs, segment_ids, positions):
        named = jnp.take(self.nouns[...], inputs, axis=0) >= 0
        first = jax.nn.one_hot(jnp.argmax(named, axis=1), inputs.shape[1])
        return jnp.broadcast_to(first[:, None, None, None], (len(inputs), 2, 1, *[inputs.shape[1]] * 2))

    def __call__(self, inputs, segment_ids, positions):
        numbers = jnp.take(self.nouns[...], inputs, axis=0)
        first = jnp.take_along_axis(numbers, jnp.argmax(numbers >= 0, axis=1)[:, None], axis=1)
        return ModelOutput(jax.nn.one_hot(jnp.broadcast_to(first, inputs.shape), len(NOUNS)), None, {})


def a_run(task, model):
    return types.SimpleNamespace(task=task, module=lambda: model, config={"seed": 0}, folder="runs/x")


def test_lookup_by_content_and_by_place():
    free, bound = Lookup(), Lookup(asked="first")
    found = ask(Finder(free, True), free, 0, 256)
    assert found.correct.all() and found.mass.min() > 0.9 and len(set(found.places)) == 16
    study = STUDIES["lookup"]
    result = study.measure({"b": a_run(bound, Finder(bound, False)), "a": a_run(free, Finder(free, True))}, {})
    assert result.values["accuracy"] == [1] and result.values["least mass of a place"][0] > 0.9
    # the queried pair is the first of sixteen by chance, and other pairs share its value
    (mass,), (accuracy,) = (result.values[f"{what} of the control"] for what in ("mass", "accuracy"))
    assert abs(mass - 1 / 16) < 0.03 and accuracy < 0.2
    assert len(result.rows()) == 4 and "answers 100.0%" in study.judge(result).finding
    assert study.draw(result).axes
    with pytest.raises(RunError, match="lookup measures two runs"):
        study.measure({"a": a_run(free, Finder(free, True))}, {})


def test_coreference_of_the_first_noun():
    """Correct in half of the sentences, and in one of two twins: never in both, and no head follows both."""
    reading = read_sentences(FirstNoun(), Coreference(), "test", 0, 256)
    np.testing.assert_array_equal(reading.correct.reshape(-1, 2).sum(axis=1), 1)
    np.testing.assert_array_equal(reading.mass("referent")[:, 1, 0], reading.correct)
    np.testing.assert_array_equal(reading.mass("other")[:, 1, 0], ~reading.correct)
    study = STUDIES["coreference"]
    result = study.measure({"x": a_run(Coreference(), FirstNoun())}, {})
    assert result.values["accuracy, new noun pairs"] == [0.5] == result.values["accuracy, new family"]
    assert result.values["twin consistency, new noun pairs"] == [0]
    assert result.rows(2)[0]["more to the referent in both twins"] == "0.0%"
    assert [row["accuracy"] for row in result.rows(1)] == ["100.0%", "100.0%", "0.0%", "0.0%"]
    assert study.judge(result).kind == "refuted" and study.draw(result).axes
    with pytest.raises(RunError, match="coreference measures one run of the task coreference"):
        study.measure({"x": a_run(Lookup(), FirstNoun())}, {})
