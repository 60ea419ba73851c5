"""Coreference: twins differ in one word and the referent; order, distance and nouns carry no information."""

import collections
import functools

import numpy as np
import pytest

from memformer.tasks import Coreference
from memformer.tasks.coreference import FAMILIES, HELD_OUT, NOUNS, REASON, WORDS

COUNT = 4000


@functools.cache
def drawn(split="train", families="trained", count=COUNT):
    source = Coreference(families=families).source(split, 0)
    return [source.sentence(i) for i in range(count)]


SPOKEN = {name: {w for pair in f.frames for frame in pair for w in frame.split()} for name, f in FAMILIES.items()}
OWN = {name: own.difference(REASON.split(), *(SPOKEN[o] for o in SPOKEN if o != name)) for name, own in SPOKEN.items()}


def family_of(sentence):
    """The family, by a word that only its main clauses contain."""
    (name,) = [name for name in FAMILIES if OWN[name] & set(sentence.words)]
    return name


def test_twins_differ_in_one_word_and_in_the_referent():
    sentences = drawn(count=400)
    for one, other in zip(sentences[::2], sentences[1::2], strict=True):
        assert [i for i, (a, b) in enumerate(zip(one.words, other.words, strict=True)) if a != b] == [one.reason]
        assert (one.referent, one.other) == (other.other, other.referent)
        assert one.words[one.pronoun] == "it" and one.words[one.referent] != one.words[one.other]
        assert {one.words[one.referent], one.words[one.other]} <= set(NOUNS)
        reasons = FAMILIES[family_of(one)].reasons
        assert {one.words[one.reason], other.words[one.reason]} in [set(pair) for pair in reasons]


def test_the_referent_follows_from_the_meaning():
    """Written by hand for one frame of each family and order: (first noun, second noun, word, referent)."""
    cases = {
        ("does not fit in", "big"): 0,
        ("does not fit in", "small"): 1,
        ("can not hold", "big"): 1,
        ("can not hold", "small"): 0,
        ("is not lifted by", "heavy"): 0,
        ("is not lifted by", "weak"): 1,
        ("can not catch", "slow"): 0,
        ("escapes", "slow"): 1,
        ("escapes", "fast"): 0,
    }
    seen = collections.Counter()
    for s in drawn():
        first, second = sorted((s.referent, s.other))
        key = (" ".join(s.words[first + 1 : second - 1]), s.words[s.reason])
        if key in cases:
            assert (s.referent == second) == cases[key], s.words
            seen[key] += 1
    assert set(seen) == set(cases)


@pytest.mark.parametrize(
    "shortcut",
    {
        "order of the nouns": lambda s: s.referent < s.other,
        "distance": lambda s: abs(s.referent - s.pronoun) < abs(s.other - s.pronoun),
        "noun": lambda s: s.words[s.referent] < s.words[s.other],
    }.items(),
    ids=lambda item: item[0],
)
def test_shortcuts_carry_no_information(shortcut):
    share = np.mean([shortcut[1](s) for s in drawn()])
    assert abs(share - 0.5) < 4 * 0.5 / COUNT**0.5


def test_held_out_sentences():
    def pairs(split):
        return {(family_of(s), frozenset((s.words[s.referent], s.words[s.other]))) for s in drawn(split)}

    train, test = pairs("train"), pairs("test")
    assert not train & test and test == pairs("validation")
    assert 0.15 < len(test) / len(train | test) < 0.25
    assert {name for name, _ in train} == set(FAMILIES) - {HELD_OUT} == {name for name, _ in test}
    assert {family_of(s) for s in drawn("test", "held_out", 100)} == {HELD_OUT}
    # Every noun and every deciding word of the held-out family is in training sentences.
    known = {word for s in drawn() for word in s.words}
    assert {word for pair in FAMILIES[HELD_OUT].reasons for word in pair} | set(NOUNS) <= known


def test_arrays_encode_the_sentence():
    task = Coreference()
    source = task.source("validation", 3)
    for i in range(50):
        e, s = source[i], task.sentence("validation", 3, i)
        used = len(s.words)
        assert [WORDS[j] for j in e["inputs"][:used]] == list(s.words) and not np.any(e["inputs"][used:])
        assert e["segment_ids"].tolist() == [1] * used + [0] * (task.length - used)
        assert np.flatnonzero(e["loss_weights"]).tolist() == [s.pronoun]
        assert NOUNS[e["targets"][s.pronoun]] == s.words[s.referent]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"length": 12}, "length must be an integer of at least 15, got 12"),
        ({"families": "new"}, "families must be one of 'trained', 'held_out', got 'new'"),
    ],
    ids=str,
)
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Coreference(**settings)
