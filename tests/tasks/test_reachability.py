"""Reachability: labels against a graph search, structure of the graph, options."""

import numpy as np
import pytest

from memformer.tasks import Reachability

SIZES = [(32, 128), (4, 5), (10, 16)]


def search(rows: np.ndarray) -> np.ndarray:
    """1 for the nodes reachable from the first one."""
    reached, todo = {0}, [0]
    while todo:
        for other in np.flatnonzero(rows[todo.pop()]):
            if int(other) not in reached:
                reached.add(int(other))
                todo.append(int(other))
    return np.isin(np.arange(len(rows)), sorted(reached)).astype(np.int32)


@pytest.mark.parametrize("length, width", SIZES)
def test_labels_match_a_search(length, width):
    source = Reachability(length=length, width=width).source("train", 0)
    for i in range(50):
        e = source[i]
        rows = e["inputs"][:, :length]
        np.testing.assert_array_equal(e["targets"], search(rows))
        assert e["targets"].sum() == length // 2
        np.testing.assert_array_equal(rows, rows.T)
        assert np.all(np.diag(rows) == 1) and set(np.unique(rows)) <= {0.0, 1.0}
        # Two trees: each has one edge fewer than nodes, and all nodes but two have one earlier neighbour.
        assert rows.sum() == length + 2 * (length - 2)
        assert sorted(np.tril(rows, -1).sum(axis=1).tolist()) == [0, 0] + [1] * (length - 2)
        np.testing.assert_array_equal(e["inputs"][:, length], np.arange(length) == 0)
        assert not e["inputs"][:, length + 1 :].any()
        assert np.all(e["loss_weights"] == 1)


def test_parents_are_uniform():
    source = Reachability().source("train", 0)
    ranks = []
    for i in range(2000):
        rows, half = source[i]["inputs"][:, :32], source[i]["targets"] == 1
        nodes = np.flatnonzero(half)
        ranks.append(int(np.searchsorted(nodes, np.flatnonzero(rows[nodes[8], : nodes[8]])[0])))
    share = np.bincount(ranks, minlength=8) / len(ranks)
    assert len(share) == 8 and np.all(np.abs(share - 1 / 8) < 0.04)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"length": 31}, r"length must be even \(two halves of the nodes\), got 31"),
        ({"length": 2}, "length must be an integer of at least 4, got 2"),
        ({"width": 32}, r"width must be at least length \+ 1 = 33, got 32"),
    ],
    ids=str,
)
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Reachability(**settings)


def test_eval_lengths_fit_the_width():
    assert Reachability(width=64).eval_lengths == (8, 16, 32)
    with pytest.raises(ValueError, match="width must be at least length"):
        Reachability(width=64).with_length(64)
