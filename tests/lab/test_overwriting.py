"""Overwriting in an untrained ARMT memory: the latest value of a key, and the quick study."""

from memformer.lab import STUDIES
from memformer.lab.overwriting import latest_recalled
from memformer.lab.runner import run_study

# One shape for the tests below.
SMALL = {"writes": (20, 50), "rows": 4}


def test_the_latest_value_is_read_with_gamma_alone():
    shares, total = latest_recalled("disjoint", 16, 0.0, True, **SMALL)
    # a key that was not written has z . phi = 0
    assert shares == {20: 1.0, 50: 1.0} and 0.9 < total < 1.001
    # features that overlap hold a little of the others' values
    shares, total = latest_recalled("orthogonal", 16, 0.0, True, **SMALL)
    assert 0.9 < min(shares.values()) < 1 and 1 < total < 2
    # all writes stay in the normaliser: after 50 each replaces a small part of what is stored
    shares, total = latest_recalled("disjoint", 16, 0.0, False, **SMALL)
    assert shares[50] < 0.8 and abs(total - 50 / 16) < 1e-3


def test_the_quick_study_has_a_row_for_each_kind(tmp_path):
    result = run_study(STUDIES["overwriting"], out=str(tmp_path), quick=True)
    assert [row["memory"] for row in result.rows()] == ["disjoint features", "disjoint features, without gamma"]
    assert (tmp_path / "overwriting.png").exists()
