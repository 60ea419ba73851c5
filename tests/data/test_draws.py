"""Draws for batches equal NumPy's Generator bit for bit; rejected words are reported."""

import numpy as np
import pytest

from memformer.data import SyntheticSource, bounded_integers, sample_integers, split_words64, unit_floats
from memformer.tasks import MQAR, Swap, mqar

KEYS = range(20)


def words(count):
    return np.stack([np.random.Philox(key=key).random_raw(count) for key in KEYS])


def drawn(draw):
    return np.stack([draw(np.random.Generator(np.random.Philox(key=key))) for key in KEYS])


@pytest.mark.parametrize("bound", [2, 3, 8192, 10**9 + 7, 2**31])
def test_integers(bound):
    want = drawn(lambda rng: rng.integers(bound, size=60))
    got, rejected = bounded_integers(split_words64(words(30)), bound)
    assert rejected.any() == (bound == 10**9 + 7)
    np.testing.assert_array_equal(got[~rejected], want[~rejected], strict=True)


def test_a_rejected_word_is_reported():
    # 2**32 = 4 modulo 6: NumPy rejects a product whose low half is below 4
    got, rejected = bounded_integers(np.array([[7, 0], [7, 1]], np.uint32), 6)
    assert rejected.tolist() == [True, False] and got[1].tolist() == [0, 0]


@pytest.mark.parametrize("population, size", [(5, 4), (33, 32), (4095, 4), (100_000, 100), (9, 1)])
def test_samples(population, size):
    want = drawn(lambda rng: rng.choice(population, size, replace=False))
    got, rejected = sample_integers(split_words64(words(size))[:, : 2 * size - 1], population, size)
    assert not rejected.any()
    np.testing.assert_array_equal(got, want, strict=True)


def test_floats():
    np.testing.assert_array_equal(unit_floats(words(5)), drawn(lambda rng: rng.random(5)), strict=True)


TASKS = [
    Swap(),
    Swap(objects=3, length=7, queries=True, encoding="positions"),
    Swap(objects=512, length=5, start="none"),
    MQAR(),
    MQAR(length=57, pairs=14, vocab_size=32, power=2.0),
    # all gaps are drawn
    MQAR(length=128, pairs=32, vocab_size=256),
    # as many keys as there are: drawn one at a time
    MQAR(length=16, pairs=3, vocab_size=8),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_a_batch_is_the_examples(task):
    source, numbers = task.source("test", 3), [5, *range(60), 2**40]
    batch, examples = source.batch(numbers), [source[number] for number in numbers]
    assert sorted(batch) == sorted(examples[0])
    for name, array in batch.items():
        np.testing.assert_array_equal(array, np.stack([e[name] for e in examples]), err_msg=name, strict=True)


def test_gaps_that_need_more_words():
    """A row whose gaps collide too often is drawn by the Generator."""
    task = MQAR(length=128, pairs=32, vocab_size=256)
    gaps, used, short = mqar._sample_gaps(unit_floats(words(60)), task._gap_probabilities, 32)
    assert 0 < short.sum() < len(KEYS) and used[~short].max() <= 60
    want = drawn(lambda rng: rng.choice(32, 32, replace=False, p=task._gap_probabilities))
    np.testing.assert_array_equal(gaps[~short], want[~short])


def test_rows_that_cannot_be_drawn_together():
    def draw_batch(words):
        first = words(1)
        return {"x": (first % np.uint64(2)).astype(np.int64)}, np.array([False, True, False])

    source = SyntheticSource(lambda rng, i: {"x": np.array([i])}, "train", 0, draw_batch)
    assert source.batch([7, 8, 9])["x"][1].tolist() == [8] and set(source.batch([7, 8, 9])["x"][[0, 2], 0]) <= {0, 1}
    with pytest.raises(IndexError, match="example number must be in"):
        source.batch([1, 2, -1])
