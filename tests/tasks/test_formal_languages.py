"""Formal languages: answers against Python, lengths, options."""

import dataclasses

import numpy as np
import pytest

from memformer.tasks import (
    BracketArithmetic,
    CycleNavigation,
    EvenPairs,
    ModularArithmetic,
    Parity,
    ReverseString,
    StackManipulation,
    make_task,
    scaled_accuracy,
)


def answer(e) -> tuple[int, int]:
    """(time, class) of the only scored step."""
    (time,) = np.flatnonzero(e["loss_weights"])
    assert e["loss_weights"][time] == 1
    assert time == e["segment_ids"].sum() - 1
    return int(time), int(e["targets"][time])


def test_parity():
    source = Parity().source("train", 0)
    for i in range(200):
        time, odd = answer(source[i])
        assert odd == source[i]["inputs"][: time + 1].sum() % 2
        assert not source[i]["inputs"][time + 1 :].any()


@pytest.mark.parametrize("modulus", [5, 7])
def test_values_match_python(modulus):
    task = ModularArithmetic(modulus=modulus)
    source = task.source("train", 1)
    letters = [*map(str, range(modulus)), "+", "-", "*", "="]
    for i in range(200):
        time, value = answer(source[i])
        text = " ".join(letters[token] for token in source[i]["inputs"][: time + 1])
        assert text.endswith(" =")
        assert value == eval(text[:-1]) % modulus, text


@pytest.mark.parametrize("modulus", [5, 7])
def test_brackets_match_python(modulus):
    source = BracketArithmetic(modulus=modulus, length=24, min_length=1, prefixes=True).source("train", 1)
    letters = [*map(str, range(modulus)), "+", "-", "*", "(", ")", "="]
    for i in range(200):
        e = source[i]
        text = "".join(letters[token] for token in e["inputs"][: e["segment_ids"].sum()])
        assert text.endswith("=") and text.index("=") == len(text) - 1
        opened = []
        for time, letter in enumerate(text):
            if letter == "(":
                opened.append(time)
            scored = letter in ")="
            assert e["loss_weights"][time] == scored
            if scored:
                part = text[opened.pop() : time + 1] if letter == ")" else text[:-1]
                assert e["targets"][time] == eval(part) % modulus, text


def test_pairs_are_counted():
    source = EvenPairs().source("train", 0)
    for i in range(200):
        time, even = answer(source[i])
        bits = source[i]["inputs"][: time + 1]
        assert even == ((bits[1:] != bits[:-1]).sum() % 2 == 0)


def test_cycle_navigation():
    source = CycleNavigation(places=7).source("train", 0)
    for i in range(200):
        time, place = answer(source[i])
        here = 0
        for move in source[i]["inputs"][: time + 1]:
            here = (here + (0, 1, -1)[move]) % 7
        assert place == here


# answer of a whole string, by task
ANSWERS = {
    Parity: lambda bits: sum(bits) % 2,
    EvenPairs: lambda bits: int(bits[0] == bits[-1]),
    CycleNavigation: lambda moves: (moves.count(1) - moves.count(2)) % 5,
    ModularArithmetic: lambda tokens: eval(" ".join("01234+-*"[token] for token in tokens if token < 8)) % 5,
}


@pytest.mark.parametrize("task", ANSWERS, ids=lambda task: task.name)
def test_prefixes_are_answered_in_training_only(task):
    options = {"length": 12, "min_length": 5}
    plain = task(**options).source("train", 0)
    train, test = (task(**options, prefixes=True).source(split, 0) for split in ("train", "test"))
    for i in range(50):
        e = train[i]
        assert (e["inputs"] == plain[i]["inputs"]).all()
        inputs, used = e["inputs"].tolist(), e["segment_ids"].sum()
        # operators end no string
        ends = [t for t in range(used) if task is not ModularArithmetic or inputs[t] < 5 or inputs[t] == 8]
        assert np.flatnonzero(e["loss_weights"]).tolist() == ends
        assert [int(e["targets"][t]) for t in ends] == [ANSWERS[task](inputs[: t + 1]) for t in ends]
        assert test[i]["loss_weights"].sum() == 1


def test_moves_and_operators_drift_in_training_only():
    for task in (CycleNavigation, ModularArithmetic):
        plain, drift = task(), task(drift=True)
        for i in range(20):
            assert (drift.source("test", 0)[i]["inputs"] == plain.source("test", 0)[i]["inputs"]).all()
    operators = [
        e["inputs"][(e["inputs"] >= 5) & (e["inputs"] < 8)]
        for e in map(drift.source("train", 0).__getitem__, range(400))
    ]
    shares = [np.mean(one == 5) for one in operators if len(one) >= 15]
    # uniform on the simplex: a share has a variance of 1/18, and 20 uniform ones of 1/90
    assert np.std(shares) > 0.2
    drift = CycleNavigation(drift=True)
    # p(forward) - p(back) has a variance of 1/6 over the simplex: 40 moves lead as far as 430 unbiased ones
    train = dataclasses.replace(drift, min_length=40).source("train", 0)
    ends = [sum((0, 1, -1)[move] for move in train[i]["inputs"]) for i in range(400)]
    assert np.std(ends) == pytest.approx(np.sqrt(40**2 / 6 + 40 / 2), rel=0.1)


def strings(e, blank: int) -> tuple[list[int], int, list[int]]:
    """(question, number of blanks, answer); scoring starts at the first blank."""
    inputs, scored = e["inputs"][: e["segment_ids"].sum()].tolist(), np.flatnonzero(e["loss_weights"])
    question = inputs.index(blank)
    assert inputs[question:] == [blank] * (len(inputs) - question)
    assert scored.tolist() == list(range(question, question + len(scored)))
    return inputs[:question], len(inputs) - question, e["targets"][scored].tolist()


def test_strings_are_reversed():
    source = ReverseString().source("train", 0)
    for i in range(200):
        question, blanks, answer = strings(source[i], 2)
        assert answer == question[::-1] and blanks == len(question) and 3 <= blanks <= 40


def test_stack_manipulation():
    source, emptied = StackManipulation(length=12).source("train", 0), 0
    for i in range(300):
        question, blanks, answer = strings(source[i], 5)
        stack = []
        for token in question:
            if token == 2:
                stack = stack[:-1]
            else:
                stack.append(token % 3 if token < 2 else token - 3)
        assert answer == [*reversed(stack), 2] and blanks == len(question) + 1
        # actions come after all bits
        assert sorted(question, key=lambda token: token > 1) == question
        emptied += not stack
    assert emptied


# task, lengths in use (tokens before the answer)
LENGTHS = [
    (Parity(), range(3, 41)),
    (Parity().with_length(64), [64]),
    (Parity(length=50, min_length=40).with_length(50), range(40, 51)),
    (Parity(length=5, min_length=1), range(1, 6)),
    (Parity().up_to(5), range(3, 6)),
    (EvenPairs(), range(3, 41)),
    (CycleNavigation().with_length(64), [64]),
    (ModularArithmetic(), range(3, 41, 2)),
    (ModularArithmetic(length=6, min_length=4), [5]),
    (ModularArithmetic(length=2, min_length=1), [1]),
    (ModularArithmetic().with_length(64), [63]),
    (BracketArithmetic(), range(3, 41)),
    (BracketArithmetic(min_length=1).up_to(4), range(1, 5)),
    (BracketArithmetic().with_length(256), [256]),
]


@pytest.mark.parametrize("task, lengths", LENGTHS, ids=str)
def test_lengths_in_use(task, lengths):
    source = task.source("train", 0)
    extra = isinstance(task, ModularArithmetic | BracketArithmetic)
    used = [int(source[i]["segment_ids"].sum()) - extra for i in range(26 * len(lengths))]
    assert sorted(set(used)) == list(lengths)
    share = np.bincount(used)[list(lengths)] / len(used) * len(lengths)
    assert np.all(np.abs(share - 1) < 0.75)


@pytest.mark.parametrize(
    "task",
    [Parity(), EvenPairs(), CycleNavigation(), ModularArithmetic(), BracketArithmetic()],
    ids=lambda task: task.name,
)
def test_answers_are_near_chance(task):
    source = task.source("train", 0)
    classes = np.bincount([answer(source[i])[1] for i in range(1000)], minlength=task.num_classes) / 1000
    # A product that contains a zero is zero, which makes 0 the most frequent value.
    assert task.chance - 0.05 < classes.max() < task.chance + 0.15


def test_scaled_accuracy():
    assert scaled_accuracy(1.0, 0.2) == 1.0
    assert scaled_accuracy(0.2, 0.2) == 0.0
    assert scaled_accuracy(0.6, 0.2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "parity", "length": 2}, "length must be an integer of at least 3, got 2"),
        ({"name": "parity", "min_length": 0}, "min_length must be an integer of at least 1, got 0"),
        ({"name": "cycle_navigation", "places": 1}, "places must be an integer of at least 2, got 1"),
        ({"name": "modular_arithmetic", "modulus": 1}, "modulus must be an integer of at least 2, got 1"),
        ({"name": "bracket_arithmetic", "modulus": 1}, "modulus must be an integer of at least 2, got 1"),
    ],
    ids=str,
)
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(settings)
