"""The tasks of the Neural Turing Machine: questions, answers, the cost of guessing and of the optimal predictor."""

import dataclasses

import numpy as np
import pytest

from memformer.tasks import Copy, DynamicNGrams, PrioritySort, make_task
from memformer.tasks.ntm import optimal_bits


def draw(settings, count, split="train"):
    task = make_task(settings)
    source = task.source(split, 0)
    return task, [source[i] for i in range(count)]


def parts(example):
    """(question, answer) of an example; checks that inputs are zero during the answer, and that only it is scored."""
    used = int(example["segment_ids"].sum())
    scored = np.flatnonzero(example["loss_weights"])
    first = scored[0]
    assert scored.tolist() == list(range(first, used))
    assert not example["inputs"][first:].any() and not example["targets"][:first].any()
    assert not example["targets"][used:].any()
    return example["inputs"][:first], example["targets"][first:used]


def test_copy():
    task, examples = draw({"name": "copy", "length": 6}, 200)
    sizes = set()
    for one in examples:
        question, answer = parts(one)
        np.testing.assert_array_equal(question[:-1, :8], answer)
        assert question[-1].tolist() == [0.0] * 8 + [1.0] and not question[:-1, 8].any()
        sizes.add(len(answer))
    assert sizes == set(range(1, 7)) and task.with_length(9).min_length == 9


def test_repeat_copy():
    task, examples = draw({"name": "repeat_copy", "length": 4, "repeats": 5, "bits": 3}, 200)
    sizes, counts = set(), []
    for one in examples:
        question, answer = parts(one)
        vectors = question[:-1, :3]
        assert question[-1, 3] == 1 and not question[:-1, 3:].any() and not question[-1, :3].any()
        copies = (len(answer) - 1) // len(vectors)
        np.testing.assert_array_equal(answer[:-1, :3], np.tile(vectors, (copies, 1)))
        assert answer[-1].tolist() == [0, 0, 0, 1] and not answer[:-1, 3].any()
        assert question[-1, 4] == pytest.approx((copies - 3) / np.sqrt(2))
        sizes.add(len(vectors))
        counts.append(copies)
    assert sizes == {1, 2, 3, 4} and set(counts) == {1, 2, 3, 4, 5}
    assert max(len(one["inputs"]) for one in examples) == task.steps == 26


def test_associative_recall():
    task, examples = draw({"name": "associative_recall", "length": 5}, 200)
    sizes = set()
    for one in examples:
        question, answer = parts(one)
        assert question[-1].tolist() == [0.0] * 7 + [1.0]
        blocks = question[:-1].reshape(-1, 4, 8)
        marks = [[0.0] * 6 + [1.0, 0.0]] * (len(blocks) - 1) + [[0.0] * 7 + [1.0]]
        assert blocks[:, 0].tolist() == marks and not blocks[:, 1:, 6:].any()
        items = blocks[:, 1:, :6]
        queried = [i for i in range(len(items) - 2) if (items[i] == items[-1]).all()]
        assert any((items[i + 1] == answer).all() for i in queried)
        sizes.add(len(items) - 1)
    assert sizes == {2, 3, 4, 5} and task.steps == 28


def test_priority_sort():
    task, examples = draw({"name": "priority_sort", "length": 7, "answers": 5}, 100)
    for one in examples:
        question, answer = parts(one)
        assert question[-1].tolist() == [0.0] * 8 + [1.0, 0.0] and not question[:-1, 8].any()
        priorities = question[:-1, 9]
        assert (np.abs(priorities) < 1).all()
        best = sorted(range(7), key=lambda i: -priorities[i])[:5]
        np.testing.assert_array_equal(answer, question[best, :8])
    assert task.steps == 13
    with pytest.raises(ValueError, match="length must be an integer of at least 5, got 4"):
        task.with_length(4)


def test_dynamic_ngrams_draw_by_their_contexts():
    _, examples = draw({"name": "dynamic_ngrams", "length": 4000, "context": 2}, 30)
    for one in examples:
        np.testing.assert_array_equal(one["inputs"][1:], one["targets"][:-1])
        assert one["loss_weights"].tolist() == [0.0] + [1.0] * 3998
    # With Beta(1/2, 1/2) probabilities, the share of ones after a context has variance 1/8, with fair coins about 0.
    shares = []
    for one in examples:
        bits = np.append(one["inputs"][:, 0], one["targets"][-1, 0]).astype(int)
        contexts = 2 * bits[:-2] + bits[1:-1]
        shares += [bits[2:][contexts == c].mean() for c in range(4) if (contexts == c).sum() > 100]
    assert 0.08 < np.var(shares) < 0.17 and abs(np.mean(shares) - 0.5) < 0.12


def test_the_optimal_prediction_costs_127_bits():
    """The figure of the paper: 127.7 bits per sequence of 200, over the 195 predicted; a second count agrees."""
    source = DynamicNGrams().source("test", 0)
    costs = []
    for i in range(500):
        one = source[i]
        costs.append(optimal_bits(np.append(one["inputs"][:, 0], one["targets"][-1, 0])))
    # The standard deviation of one sequence is 36 bits.
    assert abs(np.mean(costs) - 127.7) < 3 * 36 / np.sqrt(len(costs))
    ones, zeros, cost = {}, {}, 0.0
    bits = [0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1]
    for t in range(2, len(bits)):
        c = tuple(bits[t - 2 : t])
        n1, n0 = ones.get(c, 0), zeros.get(c, 0)
        p = (n1 + 0.5) / (n0 + n1 + 1)
        cost -= np.log2(p if bits[t] else 1 - p)
        (ones if bits[t] else zeros)[c] = (n1 if bits[t] else n0) + 1
    assert optimal_bits(np.array(bits), context=2) == pytest.approx(cost)


def test_guessing_a_copy_costs_84_bits():
    task, examples = draw({"name": "copy"}, 2000)
    # log2(2) per bit of each scored position; the standard deviation of lengths is 5.8 vectors.
    counted = 8 * np.mean([one["loss_weights"].sum() for one in examples])
    assert task.guessing_bits == 84 and abs(counted - 84) < 3 * 8 * 5.8 / np.sqrt(2000)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "copy", "min_length": 21}, "length must be an integer of at least 21, got 20"),
        ({"name": "copy", "bits": 0}, "bits must be an integer of at least 1, got 0"),
        ({"name": "repeat_copy", "repeats": 1}, "repeats must be an integer of at least 2, got 1"),
        ({"name": "associative_recall", "min_length": 1}, "min_length must be an integer of at least 2, got 1"),
        ({"name": "associative_recall", "rows": 0}, "rows must be an integer of at least 1, got 0"),
        ({"name": "dynamic_ngrams", "length": 5}, "length must be an integer of at least 6, got 5"),
        ({"name": "dynamic_ngrams", "context": 64}, "context must be at most 20 .*, got 64"),
        ({"name": "priority_sort", "answers": 0}, "answers must be an integer of at least 1, got 0"),
    ],
)
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(settings)


def test_lengths_stay_within_their_bounds():
    assert Copy().with_length(20) == Copy() and Copy().with_length(120) == Copy(length=120, min_length=120)
    assert Copy().up_to(5) == Copy(length=5) and PrioritySort().up_to(30) == PrioritySort().with_length(30)
    assert dataclasses.replace(PrioritySort(), length=30) == PrioritySort().with_length(30)
