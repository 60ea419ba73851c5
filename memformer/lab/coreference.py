"""Who does "it" refer to: accuracy on held-out noun pairs and on a held-out family, twins, and where "it" looks."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from memformer.lab.study import Study, new_figure
from memformer.tasks.coreference import NOUNS, Coreference, Sentence
from memformer.training.config import RunError
from memformer.training.evaluation import LoadedRun
from memformer.training.plots import COLOURS

__all__ = ["Reading", "measure", "read_sentences"]

SENTENCES, BATCH = 2048, 128


class Reading(NamedTuple):
    """What a model made of sentences; twins follow one another.

    Attributes:
      sentences: as they were drawn.
      right: [N], is the likeliest noun the referent?
      answers: [N] the likeliest noun's number.
      weights: [N, L, H, T], attention from "it" to each word.
    """

    sentences: list[Sentence]
    right: np.ndarray
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
      task: whose sentences.
      split: which.
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


def measure(runs: Sequence[LoadedRun], study: Study) -> None:
    """Measures one finished run of configs/coreference.py."""
    tasks = [run.task for run in runs]
    if len(runs) != 1 or not isinstance(tasks[0], Coreference) or not hasattr(runs[0].module(), "attention_weights"):
        raise RunError("coreference measures one run of the task coreference by an encoder: runs/coreference.")
    run = runs[0]
    model, seed, length = run.module(), run.config["seed"], run.task.length
    readings = {
        "new noun pairs": read_sentences(model, Coreference(length), "test", seed),
        "new family": read_sentences(model, Coreference(length, "held_out"), "test", seed),
    }
    study.add_table("Accuracy, chance 50 %", [_scores(name, reading) for name, reading in readings.items()])
    reading = readings["new noun pairs"]
    study.add_table("The same by what is named first, new noun pairs", _by_order(reading))
    # The head is chosen on sentences that the figures below are not made of.
    chosen = _follows(read_sentences(model, Coreference(length), "validation", seed))
    layer, head = (int(i) for i in np.unravel_index(chosen.argmax(), chosen.shape))
    rows = _masses(reading)
    study.add_table('Attention from "it", share of 1, mean over sentences', rows)
    masses = rows[layer * chosen.shape[1] + head]
    study.values.update(masses)
    for name, one in readings.items():
        study.values[f"accuracy, {name}"] = float(one.right.mean())
        study.values[f"twin consistency, {name}"] = _twins(one)
    _plot_masses(study, rows)
    _plot_twins(study, reading, layer, head)
    study.claim = (
        'Attention finds what "it" stands for: a small encoder picks the noun that meaning demands, beyond a guess '
        "between the two, on noun pairs it has never seen together."
    )
    values = study.values
    study.outcome = (
        f"{values['accuracy, new noun pairs']:.1%} on new noun pairs, both twins right in "
        f"{values['twin consistency, new noun pairs']:.1%}; on a family left out of training, where the same words "
        f"point the other way than they do for these nouns, {values['accuracy, new family']:.1%}. "
        f'In layer {layer + 1}, head {head + 1}, "it" gives '
        f"{masses['referent']:.2f} of its attention to the referent and {masses['other noun']:.2f} to the other noun, "
        f"and looks more at the referent in both of {masses['more to the referent in both twins']} of the twins."
    )


def _twins(reading: Reading) -> float:
    """Share of twins that are both answered right."""
    return float(reading.right.reshape(-1, 2).all(axis=1).mean())


def _follows(reading: Reading) -> np.ndarray:
    """[L, H]: share of twins in which "it" attends more to the referent than to the other noun both times.

    A mean over sentences would not do: a head that always looks at the same noun is right in every second one.
    """
    more = reading.mass("referent") > reading.mass("other")
    return more.reshape(-1, 2, *more.shape[1:]).all(axis=1).mean(axis=0)


def _scores(name: str, reading: Reading) -> dict[str, Any]:
    answers = reading.answers.reshape(-1, 2)
    return {
        "sentences": name,
        "accuracy": f"{reading.right.mean():.1%}",
        "both twins right": f"{_twins(reading):.1%}",
        "answer changes with the word": f"{(answers[:, 0] != answers[:, 1]).mean():.1%}",
        "count": len(reading.right),
    }


def _by_order(reading: Reading) -> list[dict[str, Any]]:
    rows = []
    for first, later in (("referent", "other"), ("other", "referent")):
        named = np.array([getattr(s, first) < getattr(s, later) for s in reading.sentences])
        for reason_first in (False, True):
            chosen = named & np.array([(s.pronoun < s.referent) == reason_first for s in reading.sentences])
            rows.append(
                {
                    "named first": "referent" if first == "referent" else "other noun",
                    "reason": "before the nouns" if reason_first else "after the nouns",
                    "accuracy": f"{reading.right[chosen].mean():.1%}",
                    "count": int(chosen.sum()),
                }
            )
    return rows


def _masses(reading: Reading) -> list[dict[str, Any]]:
    mass = {name: reading.mass(name).mean(axis=0) for name in ("referent", "other", "reason")}
    follows = _follows(reading)
    layers, heads = follows.shape
    return [
        {
            "layer": layer + 1,
            "head": head + 1,
            "referent": float(mass["referent"][layer, head]),
            "other noun": float(mass["other"][layer, head]),
            "deciding word": float(mass["reason"][layer, head]),
            "more to the referent in both twins": f"{follows[layer, head]:.1%}",
        }
        for layer in range(layers)
        for head in range(heads)
    ]


def _plot_masses(study: Study, rows: list[dict[str, Any]]) -> None:
    figure, axes = new_figure()
    axis, width = axes[0, 0], 0.27
    at = np.arange(len(rows))
    for i, name in enumerate(("referent", "other noun", "deciding word")):
        axis.bar(at + (i - 1) * width, [row[name] for row in rows], width, color=COLOURS[i], label=name)
    axis.set_xticks(at, [f"{row['layer']}.{row['head']}" for row in rows])
    axis.set_xlabel("layer.head")
    axis.set_ylabel('attention from "it"\n(share of 1)')
    axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    study.save_figure(
        figure,
        "mass",
        'Attention from "it" to the noun it stands for, to the other noun and to the deciding word, mean over test '
        "sentences with noun pairs that no training sentence has. Both nouns are named first equally often: where they "
        "stand tells nothing.",
    )


def _plot_twins(study: Study, reading: Reading, layer: int, head: int) -> None:
    """Two twins, one bar a word."""
    pairs = [i for i in range(0, len(reading.right), 2) if reading.sentences[i].referent < reading.sentences[i].pronoun]
    figure, axes = new_figure(1, 2, height=3.6)
    for axis, number in zip(axes[0], (pairs[0], pairs[0] + 1), strict=True):
        sentence = reading.sentences[number]
        count = len(sentence.words)
        colours = ["0.75"] * count
        colours[sentence.referent], colours[sentence.other] = COLOURS[0], COLOURS[1]
        axis.barh(range(count), reading.weights[number, layer, head, :count], color=colours)
        axis.set_yticks(range(count), sentence.words)
        axis.get_yticklabels()[sentence.reason].set_fontweight("bold")
        axis.get_yticklabels()[sentence.pronoun].set_fontstyle("italic")
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_xlabel('attention from "it" (share of 1)')
    study.save_figure(
        figure,
        "twins",
        f'Two twins of the test split, and what "it" attends to in layer {layer + 1}, head {head + 1}: the referent in '
        "blue, the other noun in orange. One word (bold) differs, and attention moves to the other noun.",
    )
