"""Signal to noise: simulation against the formulas, and keys that the formulas do not cover."""

import numpy as np
import pytest

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


def test_one_read_is_the_sum_of_the_answers_of_the_keys():
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


def test_the_quick_study(measure_quickly):
    result = measure_quickly("snr")
    rows = {(row["kernel"], row["d"]): row for row in result.rows()}
    assert rows["linear", 64]["gaussian"] == pytest.approx(rows["linear", 64]["theory"], rel=0.25)
    widths = {row["N"]: row for row in result.rows(1)}
    assert widths[512]["linear"] > 6 * widths[64]["linear"] and widths[512]["exp, tau = sqrt d"] < 32
    assert max(result.values["worst factor to theory"].values()) < 2
