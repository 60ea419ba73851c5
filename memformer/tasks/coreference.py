"""Coreference of "it": pairs of sentences in which one word decides between two nouns."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memformer.core.checks import check_at_least, check_choice
from memformer.data.source import Example, SyntheticSource, make_example
from memformer.tasks.task import Task

__all__ = ["Coreference", "Sentence"]


class Family(NamedTuple):
    """Templates of sentences about one relation between A and B.

    Attributes:
      nouns: nouns for A and B.
      frames: pairs of main clauses with the same meaning, with A or with B first.
      reasons: pairs of words, of which the first makes "it" refer to A and the second to B.
    """

    nouns: Sequence[str]
    frames: Sequence[tuple[str, str]]
    reasons: Sequence[tuple[str, str]]


CONTAINERS = ("box", "bag", "basket", "suitcase", "crate", "drawer", "chest", "case", "bucket", "jar")
MOVERS = ("dog", "horse", "robot", "monkey", "crane", "mule", "bear", "truck", "elephant", "tractor")

FAMILIES: dict[str, Family] = {
    "fit": Family(
        CONTAINERS,
        (
            ("the A does not fit in the B", "the B can not hold the A"),
            ("the A stays out of the B", "the B has no room for the A"),
        ),
        (("big", "small"), ("large", "little"), ("wide", "narrow"), ("tall", "short"), ("thick", "thin")),
    ),
    "lift": Family(
        MOVERS,
        (
            ("the A can not lift the B", "the B is not lifted by the A"),
            ("the A fails to move the B", "the B is not moved by the A"),
        ),
        (("weak", "heavy"), ("small", "big"), ("little", "large"), ("tired", "wide"), ("thin", "thick")),
    ),
    "catch": Family(
        MOVERS,
        (
            ("the A can not catch the B", "the B escapes the A"),
            ("the A loses against the B", "the B wins against the A"),
        ),
        (("slow", "fast"), ("tired", "quick"), ("heavy", "light"), ("weak", "strong"), ("old", "young")),
    ),
    "behind": Family(
        CONTAINERS,
        (("the A can not be seen behind the B", "the B hides the A"),),
        (("small", "large"), ("little", "big"), ("short", "tall"), ("narrow", "wide"), ("thin", "thick")),
    ),
}

# Family of task.families="held_out"; no sentence of it is in "trained".
HELD_OUT = "behind"

NOUNS = (*CONTAINERS, *MOVERS)
PRONOUN = "it"
REASON = "because it is too"


class Sentence(NamedTuple):
    """A sentence and the positions of its key words.

    Attributes:
      words: words in order.
      pronoun: position of "it".
      referent: position of the noun that "it" refers to.
      other: position of the other noun.
      reason: position of the deciding word.
    """

    words: tuple[str, ...]
    pronoun: int
    referent: int
    other: int
    reason: int


def write_sentence(
    pair: tuple[str, str], frame: str, reasons: tuple[str, str], twin: int, reason_first: bool
) -> Sentence:
    """Builds a sentence.

    Args:
      pair: the nouns (A, B).
      frame: the main clause, with A and B for the nouns.
      reasons: the words that make "it" refer to A or to B.
      twin: index of the reason, 0 or 1.
      reason_first: True puts the reason before the main clause: "because it is too big , the ...".
    """
    clause = [*frame.split()]
    reason = [*REASON.split(), reasons[twin]]
    words = [*reason, ",", *clause] if reason_first else [*clause, *reason]
    places = (words.index("A"), words.index("B"))
    named = [pair["AB".index(word)] if word in ("A", "B") else word for word in words]
    where = len(clause) if not reason_first else 0
    return Sentence(
        tuple(named), where + reason.index(PRONOUN), places[twin], places[1 - twin], where + len(reason) - 1
    )


def _all_words() -> tuple[str, ...]:
    found = {*NOUNS, *REASON.split(), ","}
    for family in FAMILIES.values():
        found.update(word for frames in family.frames for frame in frames for word in frame.split())
        found.update(word for pair in family.reasons for word in pair)
    return tuple(sorted(found - {"A", "B"}))


# Id 0 is padding.
WORDS = ("", *_all_words())
_IDS = {word: number for number, word in enumerate(WORDS)}
_LONGEST = max(
    len(frame.split()) + len(REASON.split()) + 2 for f in FAMILIES.values() for frames in f.frames for frame in frames
)


@dataclasses.dataclass(frozen=True)
class Coreference(Task):
    """Name the noun that "it" refers to. Scored at "it"; the classes are the nouns.

    "the box does not fit in the bag because it is too big" has a twin, "... too small", in which "it" refers to the
    other noun. Examples 2 i and 2 i + 1 are twins. Either noun may come first ("the bag can not hold the box ..."), the
    reason may come first, and any noun can play either role, so that order, distance and the nouns themselves carry no
    information: the answer depends on the roles and on the deciding word.

    One noun pair in five, per family, is in no training sentence; validation and test draw from these pairs only. The
    family "behind" is in no split unless `families` is "held_out".

    Attributes:
      length: time steps; shorter sentences are padded.
      families: "trained" (fit, lift, catch) or "held_out" (behind).

    Raises:
      ValueError: an option out of range.

    Source: after Levesque et al. 2012, "The Winograd schema challenge".

    Example:
      >>> task = Coreference()
      >>> " ".join(task.sentence("test", 0, 0).words)
      'because it is too little , the elephant fails to move the robot'
      >>> e = task.source("test", 0)[0]
      >>> NOUNS[int(e["targets"].sum())]
      'elephant'
    """

    name = "coreference"

    length: int = 16
    families: str = "trained"

    def __post_init__(self):
        check_at_least("length", self.length, _LONGEST)
        check_choice("families", self.families, ("trained", "held_out"))

    @property
    def vocab_size(self) -> int:
        """Words and padding."""
        return len(WORDS)

    @property
    def num_classes(self) -> int:
        """Nouns."""
        return len(NOUNS)

    @property
    def chance(self) -> float:
        """Accuracy of guessing between the two nouns of the sentence."""
        return 0.5

    def source(self, split: str, seed: int) -> "_Sentences":
        """Examples of one split, by number."""
        return _Sentences(self, split, seed)

    def sentence(self, split: str, seed: int, number: int) -> Sentence:
        """The sentence of example `number`."""
        return self.source(split, seed).sentence(number)


class _Sentences:
    """Sentences by number; 2 i and 2 i + 1 share a draw."""

    endless = True

    def __init__(self, task: Coreference, split: str, seed: int):
        self._length = task.length
        self._families = [name for name in FAMILIES if (name == HELD_OUT) == (task.families == "held_out")]
        self._new_pairs = split != "train"
        self._draws = SyntheticSource(self._choose, split, seed)

    def __len__(self) -> int:
        return len(self._draws)

    def sentence(self, number: int) -> Sentence:
        choices = {name: int(value) for name, value in self._draws[number // 2].items()}
        family = FAMILIES[self._families[choices["family"]]]
        return write_sentence(
            (family.nouns[choices["first"]], family.nouns[choices["second"]]),
            family.frames[choices["frame"]][choices["order"]],
            family.reasons[choices["reason"]],
            (choices["twin"] + number) % 2,
            bool(choices["reason_first"]),
        )

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example number must be in [0, {len(self)}), got {index}")
        sentence = self.sentence(index)
        used = len(sentence.words)
        inputs = np.zeros(self._length, np.int32)
        inputs[:used] = [_IDS[word] for word in sentence.words]
        targets, weights = np.zeros(self._length), np.zeros(self._length)
        targets[sentence.pronoun], weights[sentence.pronoun] = NOUNS.index(sentence.words[sentence.referent]), 1
        return make_example(inputs, targets, weights, used)

    def _choose(self, rng: np.random.Generator, index: int) -> Example:
        """Draws the choices of a sentence: uniform over families, and over the sentences of a family."""
        which = int(rng.integers(len(self._families)))
        family = FAMILIES[self._families[which]]
        pairs = [
            (i, j)
            for i in range(len(family.nouns))
            for j in range(len(family.nouns))
            if i != j and ((i + j) % 5 == 0) == self._new_pairs
        ]
        first, second = pairs[rng.integers(len(pairs))]
        chosen = {"family": which, "first": first, "second": second}
        for key, count in (("frame", len(family.frames)), ("reason", len(family.reasons))):
            chosen[key] = int(rng.integers(count))
        chosen.update({key: int(rng.integers(2)) for key in ("order", "twin", "reason_first")})
        return {key: np.asarray(value) for key, value in chosen.items()}
