"""Blocks read stream by stream: a probe attends to its past alone, and the quick study."""

import numpy as np
import pytest

from memformer.lab.convergence_deep import MEMORIES, _stack, halfway, probe


def test_a_probe_sees_what_came_before_it_only():
    rng = np.random.default_rng(0)
    stream, asked = rng.standard_normal((1, 12, 64), np.float32), rng.standard_normal((1, 64), np.float32)
    changed = stream.copy()
    changed[:, 6:] += 1
    rows, times = np.concatenate([stream, changed, stream]), np.array([5, 5, 6])
    found = probe(_stack("softmax", 8, 0)[:2], rows, times, np.repeat(asked, 3, axis=0))
    assert found.shape == (2, 3, 64)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    assert np.abs(found[:, 0] - found[:, 2]).max() > 1e-3


def test_halfway_is_between_offsets_or_never():
    assert halfway(np.array([1, 2]), np.array([0.7, 0.9])) == 1
    assert np.isnan(halfway(np.array([1, 2]), np.array([0.1, 0.2])))


def test_the_quick_study(measure_quickly):
    found = measure_quickly("convergence_deep", seeds=1).rows()
    rows = {(row["memory"], row["depth"]): float(row["slope of moves"].split(" ")[0]) for row in found}
    assert set(rows) == {(name, depth) for name in ("softmax", "delta") for depth in (1, 2, 3, 4)}
    assert set(MEMORIES) >= {"softmax", "delta"}
    for depth in (1, 2, 3, 4):
        # few streams: wide of -1 and 0, and far from one another
        assert rows["softmax", depth] < -0.5 and rows["delta", depth] == pytest.approx(0, abs=0.25)
