"""Splits: by hash, by rank for a few items, the same for equal keys."""

import collections

import pytest

from memformer.data.splits import split_by_hash, split_items


def test_shares_of_the_hash():
    counts = collections.Counter(split_by_hash(str(i).encode(), test=6, validation=12) for i in range(20_000))
    assert abs(counts["test"] - 1200) < 150 and abs(counts["validation"] - 2400) < 200


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 39])
def test_a_few_items_reach_every_split(count):
    keys = [str(i).encode() for i in range(count)]
    splits = split_items(keys, test=5, validation=5)
    assert len(splits) == count and (count < 3 or set(splits) == {"train", "validation", "test"})
    assert count < 3 or splits.count("train") >= splits.count("test")
    # The order of the items has no effect, and copies stay together.
    again = split_items([*keys[::-1], *keys], test=5, validation=5)
    assert again == [*splits[::-1], *splits]


def test_many_items_are_split_by_their_hash_alone():
    keys = [str(i).encode() for i in range(2000)]
    assert split_items(keys, test=5, validation=5) == [split_by_hash(key, test=5, validation=5) for key in keys]
