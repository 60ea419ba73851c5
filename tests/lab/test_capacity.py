"""Capacity of untrained memories: the writes, exact recall, and the quick study."""

import numpy as np
import pytest

from memformer.lab.capacity import NUMBER, RECALLERS, capacity, draw_writes, recalled, theory

# V = 4 bits; the shapes are those of the quick study, whose programs serve all tests
BITS, CACHED = 4, 48


def key_width(name, size=4096):
    """K of a memory of so many bytes; of a cache the wider one of the quick study."""
    return CACHED if RECALLERS[name].slots else size // (NUMBER * RECALLERS[name].floats(1, BITS))


def sizes_of(name, size=4096):
    return {"value_width": BITS, "most": 64 if RECALLERS[name].slots else size // (2 * NUMBER * BITS)}


def test_the_latest_value_of_each_pair_is_its_answer():
    writes = draw_writes(5, 2, tokens=16, most=8, value_width=4, seed=3)
    assert writes.valid.sum() == 10 and not writes.valid[10:].any()
    assert np.bincount(writes.order[:10], minlength=8).tolist() == [2] * 5 + [0] * 3
    for pair in range(5):
        last = max(t for t in range(10) if writes.order[t] == pair)
        assert np.array_equal(writes.answers[pair], writes.values[last])
    assert set(np.unique(writes.values)) == {-1.0, 1.0}


@pytest.mark.parametrize("name", RECALLERS)
def test_a_few_pairs_are_recalled_and_rewritten_ones_by_a_delta_rule_alone(name):
    sizes = sizes_of(name)
    once, twice = (draw_writes(2, times, tokens=2 * sizes["most"], seed=1, **sizes) for times in (1, 2))
    assert recalled(name, once, key_width(name), 0) == 1
    # a memory that forgets nothing answers with the sum of both values
    assert (recalled(name, twice, key_width(name), 0) == 1) == (name not in ("linear attention", "softmax attention"))


def test_capacity_is_where_recall_ends():
    name, sizes = "linear attention", sizes_of("linear attention", 1024)
    width, most = key_width(name, 1024), sizes["most"]
    found = capacity(name, width, times=1, seed=0, **sizes)
    shares = [recalled(name, draw_writes(n, 1, tokens=2 * most, seed=0, **sizes), width, 0) for n in (found, found + 1)]
    assert 0 < found < most and shares[0] == 1 and shares[1] < 0.99
    # more than the limit is not looked for
    assert capacity("delta rule", 128, times=1, seed=0, value_width=BITS, most=8) == 8


def test_theory_is_the_formula_of_the_docstring():
    # z = 2.806 for four bits: 1 + K / z^2 with K = 256
    assert theory(False, 4096, 4) == pytest.approx(1 + 256 / 2.806**2, rel=1e-3)
    # slots bound a cache from above: at K = 1 there would be 4096 / 20 of them
    assert 30 < theory(True, 4096, 4) < 4096 / 20
    assert theory(True, 8192, 4) > 1.5 * theory(True, 4096, 4)


def test_the_quick_study(measure_quickly):
    rows = {
        (row["written"], row["memory"]): row for row in measure_quickly("capacity", seeds=1, widths=(16, CACHED)).rows()
    }

    def median(written, memory, size=4096):
        return float(rows[written, memory][f"{size} bytes"].split()[0])

    expected = theory(False, 4096, 4)
    assert 0.7 * expected < median("once", "linear attention") < 1.5 * expected
    assert median("once", "linear attention", 1024) < 0.5 * median("once", "linear attention")
    assert median("once", "softmax attention") > 0.6 * theory(True, 4096, 4)
    for name in ("linear attention", "softmax attention"):
        assert median("rewritten", name) == 0
    # the delta product is the delta rule with two writes per token
    for written in ("once", "rewritten"):
        assert rows[written, "delta product"] == {**rows[written, "delta rule"], "memory": "delta product"}
    assert median("once", "delta rule") > 0.7 * expected and median("rewritten", "delta rule") > 0.3 * expected
    # a rewrite takes a second slot
    assert 0 < median("rewritten", "DeltaFormer (round)") <= 4096 // (4 * (48 + 4)) // 2
