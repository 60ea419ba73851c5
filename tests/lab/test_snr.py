"""Signal to noise: simulation against the formulas, and what the formulas do not cover."""

import numpy as np
import pytest

from memformer.lab import SIMULATIONS, Study
from memformer.lab.snr import SIMILARITIES, inverse_snr, width_needed


def median(name, keys, width, pairs):
    return np.median([inverse_snr(SIMILARITIES[name], keys, width, pairs, seed) for seed in range(4)])


@pytest.mark.parametrize(
    ("name", "factor"), [("linear", 1.25), ("relu", 1.25), ("exp, tau = sqrt d", 2.0), ("softmax", 2.0)]
)
def test_gaussian_keys_follow_theory(name, factor):
    for width, pairs in ((32, 256), (64, 1024)):
        ratio = median(name, "gaussian", width, pairs) / SIMILARITIES[name].inverse(width, pairs)
        assert 1 / factor < ratio < factor, (width, pairs, ratio)


def test_one_read_is_the_sum_of_what_the_keys_answer():
    rng = np.random.default_rng((0, 16, 8))
    keys, values = rng.standard_normal((8, 16), np.float32), rng.standard_normal((8, 32), np.float32)
    memory = keys.T @ values
    want = []
    for key, value in zip(keys, values, strict=True):
        signal = (key @ key) * value
        want.append(np.sum((key @ memory - signal) ** 2) / np.sum(signal**2))
    np.testing.assert_allclose(inverse_snr(SIMILARITIES["linear"], "gaussian", 16, 8, 0), want, rtol=1e-4)


def test_rounding_is_exact_on_unit_keys_and_exp_needs_long_ones():
    assert median("round", "unit", 128, 256) == 0 < median("linear", "unit", 128, 256)
    assert (
        median("exp, tau = sqrt d", "unit", 128, 256) > 100 > 1e-2 > median("exp, tau = sqrt d", "gaussian", 128, 256)
    )


def test_the_width_a_linear_memory_needs_grows_with_its_pairs():
    grid = (16, 32, 64, 128, 256, 512)
    found = [width_needed(SIMILARITIES["linear"], pairs, grid, 3) for pairs in (48, 96, 192)]
    assert found == [64, 128, 256]
    assert width_needed(SIMILARITIES["linear"], 512, (16, 32), 3) is None


def test_the_quick_measurement_says_what_came_out(tmp_path):
    study = Study("snr", str(tmp_path))
    SIMULATIONS["snr"](study, quick=True)
    study.finish([], 1.0)
    rows = {(row["kernel"], row["d"]): row for row in study.tables[0][1]}
    assert rows["linear", 64]["gaussian"] == pytest.approx(rows["linear", 64]["theory"], rel=0.25)
    widths = {row["N"]: row for row in study.tables[1][1]}
    assert widths[512]["linear"] > 6 * widths[64]["linear"] and widths[512]["exp, tau = sqrt d"] < 32
    assert {path.name for path in tmp_path.iterdir()} >= {"snr.json", "snr.csv", "snr-pairs.png", "snr-width.svg"}
