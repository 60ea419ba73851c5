"""How answers move: the update that softmax is, slopes, and recovery after a change."""

import numpy as np
import pytest

from memformer.lab import SIMULATIONS, Study
from memformer.lab.convergence import READERS, answers, recovery, slope


def test_slope_is_that_of_a_power():
    times = np.arange(4, 64)
    assert slope(times, 3.0 * times**-1.5) == pytest.approx(-1.5)


def test_softmax_starts_at_the_first_value_and_moves_by_its_share():
    outputs = answers("softmax", steps=8, heads=1, batch=2)
    assert outputs.shape == (2, 8, 64)
    # what comes later does not change what was answered
    np.testing.assert_allclose(
        answers("softmax", steps=8, heads=1, batch=2, change=5)[:, :5], outputs[:, :5], atol=1e-6
    )


def test_softmax_recovers_ever_more_slowly_and_delta_does_not():
    sizes = {"steps": 512, "heads": 1, "batch": 8}
    softmax = [recovery("softmax", change, **sizes) for change in (32, 128)]
    delta = [recovery("delta", change, **sizes) for change in (32, 128)]
    assert softmax[1] > 2 * softmax[0]
    assert delta[1] < 2 * delta[0]


def test_the_quick_measurement_says_what_came_out(tmp_path):
    study = Study("convergence", str(tmp_path))
    SIMULATIONS["convergence"](study, quick=True)
    study.finish([], 1.0)
    rows = {(row["memory"], row["heads"]): row for row in study.tables[0][1]}
    assert {name for name, _ in rows} == set(READERS)
    assert rows["softmax", 1]["slope of moves"] == pytest.approx(-1, abs=0.25)
    assert rows["delta", 1]["slope of moves"] == pytest.approx(0, abs=0.15)
    assert study.tables[1][1][0]["slope"] == pytest.approx(-0.5, abs=0.2)
