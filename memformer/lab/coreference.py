"""Coreference of "it": accuracy on held-out noun pairs and on a held-out family, twins, and attention from "it"."""

from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from memformer.lab.plots import Bars
from memformer.lab.runs import measure_seeds
from memformer.lab.study import (
    Result,
    Row,
    Runs,
    Settings,
    Study,
    Table,
    Verdict,
    grade,
    percent,
    spread,
    spread_numbers,
)
from memformer.tasks.coreference import NOUNS, Coreference, Sentence
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun

__all__ = ["COREFERENCE", "Reading", "read_sentences"]

SENTENCES, BATCH = 2048, 128
# Stated before the runs: the accuracy of every seed on new noun pairs, and on a new family.
LEAST = 0.9


class Reading(NamedTuple):
    """Answers and attention of a model on sentences; twins are adjacent.

    Attributes:
      sentences: in the order of the split.
      correct: [N], whether the likeliest noun is the referent.
      answers: [N], the number of the likeliest noun.
      weights: [N, L, H, T], attention from "it" to each word.
    """

    sentences: list[Sentence]
    correct: np.ndarray
    answers: np.ndarray
    weights: np.ndarray

    def mass(self, word: str) -> np.ndarray:
        """Attention from "it" to that word of each sentence ("referent", "other" or "reason"), [N, L, H]."""
        places = np.array([getattr(sentence, word) for sentence in self.sentences])
        return np.take_along_axis(self.weights, places[:, None, None, None], axis=3)[..., 0]


def read_sentences(model: Any, task: Coreference, split: str, seed: int, count: int = SENTENCES) -> Reading:
    """Answers and attention on `count` sentences of a split.

    Args:
      model: an encoder with `attention_weights`.
      task: of the sentences.
      split: of the task.
      seed: of the source.
      count: an even number of sentences.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def call(inputs, segment_ids, positions):
        module = nnx.merge(graph, state)
        where = {"segment_ids": segment_ids, "positions": positions}
        return module(inputs, **where).logits, module.attention_weights(inputs, **where)

    source = task.source(split, seed)
    sentences = [source.sentence(i) for i in range(count)]
    pronoun = np.array([sentence.pronoun for sentence in sentences])
    answers, weights = [], []
    for first in range(0, count, BATCH):
        rows = range(first, min(first + BATCH, count))
        examples = [source[i] for i in rows]
        batch = [np.stack([e[name] for e in examples]) for name in ("inputs", "segment_ids", "positions")]
        logits, attention = call(*batch)
        at = np.arange(len(examples)), pronoun[rows.start : rows.stop]
        answers.append(np.asarray(logits)[at].argmax(axis=-1))
        weights.append(np.moveaxis(np.asarray(attention), 3, 1)[at])
    answered = np.concatenate(answers)
    wanted = np.array([NOUNS.index(sentence.words[sentence.referent]) for sentence in sentences])
    return Reading(sentences, answered == wanted, answered, np.concatenate(weights))


@measure_seeds
def _measure(runs: Runs, settings: Settings) -> Result:
    run = _one(runs)
    model, seed, length = run.module(), run.config["seed"], run.task.length
    readings = {
        "new noun pairs": read_sentences(model, Coreference(length), "test", seed),
        "new family": read_sentences(model, Coreference(length, "held_out"), "test", seed),
    }
    # on sentences that no table uses
    follows = _follows(read_sentences(model, Coreference(length), "validation", seed))
    masses = _masses(readings["new noun pairs"], np.argsort(-follows, axis=1, kind="stable"))
    values = dict(masses[int(follows.max(axis=1).argmax()) * follows.shape[1]])
    for name, one in readings.items():
        values[f"accuracy, {name}"] = float(one.correct.mean())
        values[f"twin consistency, {name}"] = _twins(one)
    return Result(
        [
            Table("Accuracy, chance 50 %", [_scores(name, reading) for name, reading in readings.items()]),
            Table("Accuracy by the noun named first, new noun pairs", _by_order(readings["new noun pairs"])),
            Table('Attention from "it", share of 1, mean over sentences; heads of a layer by how they follow', masses),
        ],
        values,
    )


def _one(runs: Runs) -> LoadedRun:
    found = list(runs.values())
    if (
        len(found) != 1
        or not isinstance(found[0].task, Coreference)
        or not hasattr(found[0].module(), "attention_weights")
    ):
        raise RunError("coreference measures one run of the task coreference by an encoder per seed.")
    return found[0]


def _twins(reading: Reading) -> float:
    """Share of twins that are both answered correctly."""
    return float(reading.correct.reshape(-1, 2).all(axis=1).mean())


def _follows(reading: Reading) -> np.ndarray:
    """[L, H]: share of twins in which "it" attends more to the referent than to the other noun both times.

    A mean over sentences would not do: a head that always attends to the same noun passes in every second one.
    """
    more = reading.mass("referent") > reading.mass("other")
    return more.reshape(-1, 2, *more.shape[1:]).all(axis=1).mean(axis=0)


def _scores(name: str, reading: Reading) -> Row:
    answers = reading.answers.reshape(-1, 2)
    return {
        "sentences": name,
        "accuracy": f"{reading.correct.mean():.1%}",
        "both twins correct": f"{_twins(reading):.1%}",
        "answer changes with the word": f"{(answers[:, 0] != answers[:, 1]).mean():.1%}",
        "count": len(reading.correct),
    }


def _by_order(reading: Reading) -> list[Row]:
    rows = []
    for first, later in (("referent", "other"), ("other", "referent")):
        named = np.array([getattr(s, first) < getattr(s, later) for s in reading.sentences])
        for reason_first in (False, True):
            chosen = named & np.array([(s.pronoun < s.referent) == reason_first for s in reading.sentences])
            rows.append(
                {
                    "named first": "referent" if first == "referent" else "other noun",
                    "reason": "before the nouns" if reason_first else "after the nouns",
                    "accuracy": f"{reading.correct[chosen].mean():.1%}",
                    "count": int(chosen.sum()),
                }
            )
    return rows


def _masses(reading: Reading, order: np.ndarray) -> list[Row]:
    """A row per head; those of a layer in the given order [L, H], since heads of several seeds have no common one."""
    mass = {name: reading.mass(name).mean(axis=0) for name in ("referent", "other", "reason")}
    follows = _follows(reading)
    return [
        {
            "layer": layer + 1,
            "head": rank + 1,
            "referent": float(mass["referent"][layer, head]),
            "other noun": float(mass["other"][layer, head]),
            "deciding word": float(mass["reason"][layer, head]),
            "more to the referent in both twins": f"{follows[layer, head]:.1%}",
        }
        for layer in range(len(order))
        for rank, head in enumerate(order[layer])
    ]


def _judge(result: Result) -> Verdict:
    values = result.values
    new, family = values["accuracy, new noun pairs"], values["accuracy, new family"]
    return Verdict(
        grade(min(new) > LEAST, min(family) > LEAST),
        f"{spread(new)} on new noun pairs, where the head that follows best (by seed in layer "
        f"{', '.join(map(str, values['layer']))}) gives the referent {spread_numbers(values['referent'])} of its "
        f"attention; on a family left out of training, where the same words point the other way, {spread(family)}. "
        f"Needed of both: {percent(LEAST, 0)} in every seed.",
    )


COREFERENCE = Study(
    name="coreference",
    title='Coreference of "it"',
    claim='Attention resolves the pronoun "it": a small encoder picks the noun that meaning demands, better than '
    "chance between the two, on noun pairs it has never seen together.",
    source="the attention maps of arXiv 1706.03762, made a test",
    measure=_measure,
    judge=_judge,
    draw=Bars(
        index=("layer", "head"),
        columns=("referent", "other noun", "deciding word"),
        label='attention from "it"',
        table=2,
        flat=False,
        joint=".",
    ),
    caption='Attention from "it" per head to the referent, to the other noun and to the deciding word, mean over test '
    "sentences with noun pairs that no training sentence has and over three seeds (lines: least to greatest). Heads of "
    "a layer stand in the order in which they follow the referent on other sentences.",
    reads="configs/coreference.py, three seeds",
)
