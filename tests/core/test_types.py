"""check_array, check_groups, check_positive: what passes, and the words of what does not."""

import jax.numpy as jnp
import numpy as np
import pytest

from memformer.core.types import check_array, check_groups, check_positive

X = np.zeros((2, 8, 4), np.float32)

# name of the case, argument, letters, sizes known, kind, what the message must say
BAD_ARRAYS = {
    "no array": ([1.0, 2.0], "B T H", {}, jnp.floating, "x must be an array, got list"),
    "none": (None, "B T H", {}, jnp.floating, "x must be an array, got NoneType"),
    "rank": (X, "B T", {}, jnp.floating, r"x must be \[B, T\], got \(2, 8, 4\)"),
    "known sizes": (
        X,
        "B T H",
        {"B": 2, "T": 8, "H": 3},
        jnp.floating,
        r"x must be \[B, T, H\] = \(2, 8, 3\), got \(2, 8, 4\)",
    ),
    "one size known": (X, "B T H", {"T": 9}, jnp.floating, r"x must be \[B, T, H\] with T = 9, got \(2, 8, 4\)"),
    "empty": (X[:, :0], "B T H", {}, jnp.floating, r"no empty dimension, got \(2, 0, 4\)"),
    "integers for floats": (X.astype(np.int32), "B T H", {}, jnp.floating, "x must have a floating dtype, got int32"),
    "floats for integers": (X, "B T H", {}, jnp.integer, "x must have a integer dtype, got float32"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_check_array_says_what_is_wrong(case):
    x, letters, dims, kind, message = BAD_ARRAYS[case]
    before = dict(dims)
    with pytest.raises(ValueError, match=message):
        check_array("x", x, letters, dims, kind=kind)
    assert dims == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_check_array_binds_letters(dtype):
    dims = {"B": 2}
    out = check_array("x", jnp.asarray(X, dtype), "B T H", dims)
    assert out.dtype == dtype and out.shape == (2, 8, 4)
    assert dims == {"B": 2, "T": 8, "H": 4}


def test_check_array_takes_numpy_integers():
    assert check_array("ids", np.ones((2, 3), np.int32), "B T", {}, kind=jnp.integer).shape == (2, 3)


def test_check_groups():
    assert check_groups("H", "G", {"H": 6, "G": 2}, "heads") == 3
    assert check_groups("H", "G", {"H": 6, "G": 6}, "heads") == 1
    with pytest.raises(ValueError, match="heads must divide: got H = 6, G = 4"):
        check_groups("H", "G", {"H": 6, "G": 4}, "heads must divide")


@pytest.mark.parametrize("value", [None, 1, 64])
def test_check_positive_accepts(value):
    check_positive("chunk_size", value)


@pytest.mark.parametrize("value", [0, -3, 2.0, "8", True])
def test_check_positive_refuses(value):
    with pytest.raises(ValueError, match=f"chunk_size must be a positive integer or None, got {value!r}"):
        check_positive("chunk_size", value)
