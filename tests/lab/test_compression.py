"""The compressed cache: keys of theorem 1, exact tracking with round, drift without it."""

import numpy as np
import pytest

from memformer.lab.compression import COHERENCE, codes, place_keys, track


def test_keys_are_unit_and_nearly_orthogonal_in_fewer_dimensions():
    keys = place_keys(32, 27)
    gram = keys @ keys.T
    np.testing.assert_allclose(np.diag(gram), 1, atol=1e-6)
    assert np.abs(gram - np.diag(np.diag(gram))).max() <= COHERENCE + 1e-6
    # below Welch's bound there are none
    assert place_keys(32, 16, rounds=20) is None


def test_codes_distinguish_the_objects():
    assert codes(6).shape == (6, 3) and len(np.unique(codes(6), axis=0)) == 6


@pytest.mark.parametrize(("kernel", "exact"), [("round", True), ("linear", False)])
def test_swaps_are_tracked(kernel, exact):
    keys = place_keys(16, 15)
    rng = np.random.default_rng(1)
    swaps = np.stack([rng.choice(16, 2, replace=False) for _ in range(96)])
    errors, wrong, slots = track(keys, swaps, kernel=kernel, between=32)
    assert slots == 48 and errors.shape == wrong.shape == (3,)
    assert np.all(errors == 0) == exact
    assert (wrong[-1] == 0) == exact


def test_orthogonal_keys_need_no_rounding():
    swaps = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3], [0, 1], [2, 3]])
    errors, wrong, _ = track(np.eye(4, dtype=np.float32), swaps, kernel="linear", between=8)
    assert errors.max() < 1e-5 and wrong[-1] == 0


def test_the_quick_study(measure_quickly):
    by_size = {row["n"]: row for row in measure_quickly("compression").rows()}
    assert by_size[24]["round: largest error"] == 0 and by_size[24]["K"] < 24
    assert by_size[24]["linear: wrong places at the end"] > 0
