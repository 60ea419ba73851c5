"""Remember and rewrite: a dictionary answers, in the paper's layout; lengths, queries, options."""

import numpy as np
import pytest

from memformer.tasks import Remember, Rewrite

SETTINGS = [
    Remember(),
    Remember(length=16, key_size=1, value_size=2, queries=5),
    Remember(length=500),
    Rewrite(length=3, queries=1),
    Rewrite(length=200, value_size=3, queries=40),
    Rewrite(length=30, key_size=2, symbols=3, queries=4),
]


@pytest.mark.parametrize("task", SETTINGS, ids=str)
def test_a_dictionary_answers(task):
    source, size = task.source("train", 0), task.key_size
    for i in range(20):
        e = source[i]
        assert len(e["inputs"]) == task.steps == (task.length + task.queries) * (size + task.value_size + 2)
        assert np.all(e["segment_ids"] == 1) and np.all(e["positions"] == np.arange(task.steps))
        parts = {name: e[name].reshape(-1, task.segment_length) for name in ("inputs", "targets", "loss_weights")}
        stored, written, queried = {}, 0, 0
        for inputs, targets, weights in zip(*parts.values(), strict=True):
            key, mark, value = tuple(inputs[:size]), inputs[size], inputs[size + 1 : -1]
            assert inputs[-1] == 102 and max(*key, *value) < task.symbols
            if mark == 100:
                assert isinstance(task, Rewrite) or key not in stored
                stored[key], written = tuple(value), written + 1
                assert not weights.any()
                continue
            assert mark == 101 and tuple(value) == stored[key]
            queried += 1
            # Each symbol of the value is scored at the token before it.
            assert weights.tolist() == [0] * size + [1] * task.value_size + [0, 0]
            assert tuple(targets[size : size + task.value_size]) == stored[key]
        assert (written, queried) == (task.length, task.queries)
        assert inputs[size] == 101, "the last segment is a question"


def test_queries_are_for_any_key_after_any_number_of_pairs():
    task = Remember(length=4, key_size=1, queries=3)
    source, before, ages = task.source("train", 0), [], []
    for i in range(2000):
        rows = source[i]["inputs"].reshape(-1, 4)
        seen = []
        for key, mark, *_ in rows:
            if mark == 100:
                seen.append(key)
            else:
                before.append(len(seen))
                ages.append(seen.index(key) if len(seen) == 4 else 0)
    share = np.bincount(before, minlength=5)[1:] / len(before)
    # Two of the three queries are spread over 1 to 4, the third follows all pairs.
    assert np.all(np.abs(share - [1 / 6, 1 / 6, 1 / 6, 1 / 2]) < 0.03)
    queried = np.bincount([age for age, count in zip(ages, before, strict=True) if count == 4]) / (len(before) / 2)
    assert np.all(np.abs(queried - 1 / 4) < 0.04)


def test_rewritten_keys_are_queried_with_equal_probability():
    source = Rewrite(length=30).source("train", 0)
    share = np.bincount([source[i]["inputs"][-4] for i in range(2000)], minlength=16) / 2000
    assert np.all(np.abs(share - 1 / 16) < 0.02)


def test_lengths():
    assert Remember().eval_lengths == (2, 5, 10, 20, 50, 100, 200, 500)
    assert Remember(length=10, key_size=1).eval_lengths == (2, 5, 10)
    assert Rewrite().eval_lengths[-1] == 500
    with pytest.raises(ValueError, match=r"length must be at most symbols \*\* key_size = 256, got 500"):
        Remember(key_size=2).with_length(500)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"key_size": 16}, "key_size must be such that .* is below 2.63, got 16"),
        ({"key_size": 0}, "key_size must be an integer of at least 1, got 0"),
        ({"value_size": 1.5}, "value_size must be an integer of at least 1, got 1.5"),
        ({"symbols": 1}, "symbols must be an integer of at least 2, got 1"),
        ({"symbols": 101}, "symbols must be at most 100, the id of the first marker, got 101"),
        ({"queries": 0}, "queries must be an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Rewrite(**settings)
