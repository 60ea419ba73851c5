"""Group words: group axioms, labels are products, training contains all pairs."""

import itertools

import numpy as np
import pytest

from memformer.tasks import GroupWords
from memformer.tasks.group_words import GROUPS, PAIRS_EVERY, cayley_table

ORDERS = {"S3": 6, "S4": 24, "S5": 120, "A5": 60, "A4xZ5": 60, "Z60": 60}

# Number of elements by order, which distinguishes groups of equal size.
ELEMENT_ORDERS = {
    "S3": {1: 1, 2: 3, 3: 2},
    "S4": {1: 1, 2: 9, 3: 8, 4: 6},
    "S5": {1: 1, 2: 25, 3: 20, 4: 30, 5: 24, 6: 20},
    "A5": {1: 1, 2: 15, 3: 20, 5: 24},
    "A4xZ5": {1: 1, 2: 3, 3: 8, 5: 4, 10: 12, 15: 32},
    "Z60": {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 2, 10: 4, 12: 4, 15: 8, 20: 8, 30: 8, 60: 16},
}


def element_orders(table) -> dict[int, int]:
    orders = []
    for a in range(len(table)):
        power, order = a, 1
        while power != 0:
            power, order = table[power, a], order + 1
        orders.append(order)
    return {int(o): orders.count(o) for o in sorted(set(orders))}


@pytest.mark.parametrize("group", ORDERS)
def test_axioms(group):
    table = cayley_table(group)
    n = ORDERS[group]
    assert table.shape == (n, n)
    everything = np.arange(n)
    np.testing.assert_array_equal(table[0], everything)
    np.testing.assert_array_equal(table[:, 0], everything)
    # Every row and column is a permutation, so that inverses exist.
    np.testing.assert_array_equal(np.sort(table, axis=0), np.tile(everything[:, None], n))
    np.testing.assert_array_equal(np.sort(table, axis=1), np.tile(everything, (n, 1)))
    a, b, c = np.random.default_rng(0).integers(n, size=(3, 5000))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert element_orders(table) == ELEMENT_ORDERS[group]


@pytest.mark.parametrize("group", GROUPS)
def test_sizes(group):
    task = GroupWords(group=group)
    base, _, letters = group.partition("_")
    assert task.num_classes == ORDERS[base]
    assert task.vocab_size == {"swaps": 11, "two": 2, "": task.num_classes}[letters]


@pytest.mark.parametrize("group", [group for group in GROUPS if group.endswith("_two")])
def test_two_letters_reach_the_whole_group(group):
    word = GroupWords(length=4000, group=group).source("test", 0)[0]
    assert set(word["targets"].tolist()) == set(range(ORDERS[group.removesuffix("_two")]))
    table = cayley_table(group.removesuffix("_two"))
    steps = [
        (letter, int(np.flatnonzero(table[before] == after)[0]))
        for letter, before, after in zip(word["inputs"][1:], word["targets"], word["targets"][1:], strict=False)
    ]
    # A letter is the same element after every prefix.
    assert len(set(steps)) == 2


def test_labels_of_s5_are_permutations_applied_in_reading_order():
    perms = list(itertools.permutations(range(5)))
    word = GroupWords(length=50, group="S5").source("test", 0)[3]
    place = list(range(5))
    for letter, answer in zip(word["inputs"], word["targets"], strict=True):
        place = [perms[letter][p] for p in place]
        assert perms[answer] == tuple(place)


def test_letters_of_swaps_move_at_most_two():
    perms = list(itertools.permutations(range(5)))
    source = GroupWords(length=200, group="S5_swaps").source("test", 0)
    word = source[0]
    before, seen = 0, {}
    table = cayley_table("S5")
    for letter, answer in zip(word["inputs"].tolist(), word["targets"].tolist(), strict=True):
        step = int(np.flatnonzero(table[before] == answer)[0])
        assert sum(i != p for i, p in enumerate(perms[step])) == (2 if letter else 0)
        assert seen.setdefault(letter, step) == step
        before = answer
    assert len(set(seen.values())) == 11


@pytest.mark.parametrize("group, length", [("S3", 7), ("A5", 32)])
def test_training_contains_every_word_of_length_two(group, length):
    task = GroupWords(length=length, group=group)
    source, table = task.source("train", 0), cayley_table(group)
    pairs = task.vocab_size**2
    blocks = -(-pairs // (length // 2))
    seen = set()
    for block in range(blocks):
        e = source[PAIRS_EVERY * block]
        for start in range(0, length - 1, 2):
            a, b = e["inputs"][start : start + 2].tolist()
            assert e["targets"][start : start + 2].tolist() == [a, table[a, b]]
            assert e["segment_ids"][start : start + 2].tolist() == [start // 2 + 1] * 2
            assert e["positions"][start : start + 2].tolist() == [0, 1]
            seen.add((a, b))
        assert e["segment_ids"].tolist()[2 * (length // 2) :] == [0] * (length % 2)
    assert len(seen) == pairs


def test_held_out_splits_contain_whole_words_only():
    for split in ("validation", "test"):
        for index in (0, PAIRS_EVERY):
            assert set(GroupWords().source(split, 0)[index]["segment_ids"].tolist()) == {1}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"group": "S6"}, "group must be one of 'S3', 'S4', .*'A4xZ5', 'Z60', got 'S6'"),
        ({"length": 1}, "length must be an integer of at least 2, got 1"),
    ],
    ids=str,
)
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GroupWords(**settings)
