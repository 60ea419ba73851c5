"""Contents of memories after the same writes: against sums and a loop in NumPy, and the quick study."""

import numpy as np

from memformer.lab.held import held
from tests.numeric import assert_close

WRITES, REPLACED, WIDTH = 16, 4, 64


def keys():
    keys = np.random.default_rng(0).standard_normal((WRITES - REPLACED, WIDTH))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    return np.concatenate([keys, keys[:REPLACED]])


def test_shares_are_those_of_the_recurrence():
    """The last token reads every key; the value of write i is the i-th unit vector."""
    k = keys()
    sums, erased = np.zeros((WIDTH, WRITES)), np.zeros((WIDTH, WRITES))
    for t, value in enumerate(np.eye(WRITES)):
        sums += np.outer(k[t], value)
        erased += np.outer(k[t], value - erased.T @ k[t])
    for name, state in (("linear attention", sums), ("delta rule", erased)):
        assert_close(held(name, writes=WRITES, replaced=REPLACED, width=WIDTH), k @ state, 1e-6)


def test_the_quick_study(measure_quickly):
    rows = {row["memory"]: row for row in measure_quickly("held").rows()}
    assert rows["linear attention"]["replaced values"] == 1
    assert abs(rows["delta rule"]["replaced values"]) < 0.1 < 0.9 < rows["delta rule"]["new values"]
    assert 0.4 < rows["softmax attention"]["replaced values"] < 0.5
    assert rows["delta rule"]["error"] < rows["softmax attention"]["error"] < rows["linear attention"]["error"]
