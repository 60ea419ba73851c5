"""MQAR: a dictionary answers every query; gaps follow the power law; published settings."""

import numpy as np
import pytest

from memformer.tasks import MQAR

SETTINGS = [(8192, 64, 4), (8192, 128, 8), (8192, 256, 16), (256, 128, 32)]


@pytest.mark.parametrize("vocab_size, length, pairs", SETTINGS)
def test_a_dictionary_answers(vocab_size, length, pairs):
    source = MQAR(length=length, pairs=pairs, vocab_size=vocab_size).source("train", 0)
    for i in range(50):
        e = source[i]
        keys, values = e["inputs"][0 : 2 * pairs : 2], e["inputs"][1 : 2 * pairs : 2]
        assert keys.min() >= 1 and keys.max() < vocab_size // 2 <= values.min()
        assert len(set(keys.tolist())) == len(set(values.tolist())) == pairs
        stored = dict(zip(keys.tolist(), values.tolist(), strict=True))
        queried = np.flatnonzero(e["loss_weights"])
        assert len(queried) == pairs and queried.min() >= 2 * pairs and not np.any(queried % 2)
        assert sorted(e["inputs"][queried].tolist()) == sorted(stored)
        assert [stored[key] for key in e["inputs"][queried].tolist()] == e["targets"][queried].tolist()


def test_keys_and_values_reach_the_ends_of_their_ranges():
    source = MQAR(length=16, pairs=3, vocab_size=8).source("train", 0)
    seen = np.stack([source[i]["inputs"][:6] for i in range(200)])
    assert sorted(set(seen[:, 0::2].ravel().tolist())) == [1, 2, 3]
    assert sorted(set(seen[:, 1::2].ravel().tolist())) == [4, 5, 6, 7]


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gaps_follow_the_power_law(power):
    # With a single pair, the gap is one draw of the law without exclusions.
    task = MQAR(length=64, pairs=1, power=power)
    source = task.source("train", 0)
    count = 2000
    gaps = [(int(np.flatnonzero(source[i]["loss_weights"])[0]) - 2) // 2 for i in range(count)]
    share = np.bincount(gaps, minlength=31) / count
    want = np.arange(1.0, 32.0) ** (power - 1)
    want /= want.sum()
    assert np.all(np.abs(share - want) < 5 * np.sqrt(want / count))


def test_other_tokens_are_uniform_over_the_vocabulary():
    source = MQAR(length=256, pairs=1, vocab_size=16).source("train", 0)
    rest = []
    for i in range(200):
        e = source[i]
        rest += e["inputs"][2:][e["loss_weights"][2:] == 0].tolist()
    share = np.bincount(rest, minlength=16) / len(rest)
    assert np.all(np.abs(share - 1 / 16) < 0.01)


def test_eval_lengths_leave_room_for_the_queries():
    assert MQAR().eval_lengths == (64, 128, 256, 512, 1024)
    task = MQAR(length=128, pairs=32)
    assert task.eval_lengths == (128, 256, 512, 1024)
    with pytest.raises(ValueError, match=r"length must be at least 4 \* pairs = 128, got 64"):
        task.with_length(64)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pairs": 17}, r"length must be at least 4 \* pairs = 68, got 64"),
        ({"vocab_size": 255}, "vocab_size must be even and above 2 . pairs = 8, got 255"),
        ({"vocab_size": 8}, "vocab_size must be even and above 2 . pairs = 8, got 8"),
        ({"power": 0}, "power must be a finite number above 0, got 0"),
        ({"power": float("nan")}, "power must be a finite number above 0, got nan"),
        ({"power": float("inf")}, "power must be a finite number above 0, got inf"),
        ({"power": "a"}, "power must be a finite number above 0, got 'a'"),
        ({"pairs": 0}, "pairs must be an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MQAR(**settings)
