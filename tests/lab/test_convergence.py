"""Convergence of answers: the moves of softmax, slopes, and recovery after a change."""

import numpy as np
import pytest

from memformer.lab.convergence import READERS, answers, slope

# of the quick study: one program of each reader serves both tests
SIZES = {"steps": 256, "heads": 1, "batch": 8}


def test_slope_is_that_of_a_power():
    times = np.arange(4, 64)
    assert slope(times, 3.0 * times**-1.5) == pytest.approx(-1.5)


def test_softmax_starts_at_the_first_value_and_moves_by_its_share():
    outputs = answers("softmax", **SIZES)
    assert outputs.shape == (8, 256, 64)
    # later pairs do not change earlier answers
    np.testing.assert_allclose(answers("softmax", **SIZES, change=5)[:, :5], outputs[:, :5], atol=1e-6)


def test_the_quick_study(measure_quickly):
    """Softmax recovers ever more slowly, and the delta rule does not."""
    result = measure_quickly("convergence", steps=256, changes=(16, 64))
    rows = {(row["memory"], row["heads"]): row for row in result.rows()}
    assert {name for name, _ in rows} == set(READERS)
    assert rows["softmax", 1]["slope of moves"] == pytest.approx(-1, abs=0.25)
    assert rows["delta", 1]["slope of moves"] == pytest.approx(0, abs=0.15)
    assert result.rows(1)[0]["slope"] == pytest.approx(-0.5, abs=0.2)
    early, late = ({name: rows[name, 1][f"recovery, change at {change}"] for name in READERS} for change in (16, 64))
    assert late["softmax"] > 2 * early["softmax"] and late["delta"] < 2 * early["delta"]
