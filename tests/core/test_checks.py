"""core.checks: accepted values, and the messages of refused ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.core import checks
from memformer.core.checks import check_array, check_multiple, check_positive

X = np.zeros((2, 8, 4), np.float32)

# case: argument, letters, known sizes, kind, expected message
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
    "floats for integers": (X, "B T H", {}, jnp.integer, "x must have an integer dtype, got float32"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_check_array_messages(case):
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


@pytest.mark.parametrize("value", [2**31, -(2**40)])
def test_check_array_refuses_integers_that_would_wrap(value):
    ids = np.array([[1, value]])
    with pytest.raises(ValueError, match=rf"ids must have values of int32 \(jax_enable_x64 is off\), got {value}"):
        check_array("ids", ids, "B T", {}, kind=jnp.integer)


def test_check_multiple():
    assert check_multiple("H", "G", {"H": 6, "G": 2}, "heads") == 3
    assert check_multiple("H", "G", {"H": 6, "G": 6}, "heads") == 1
    with pytest.raises(ValueError, match="heads must divide: got H = 6, G = 4"):
        check_multiple("H", "G", {"H": 6, "G": 4}, "heads must divide")


@pytest.mark.parametrize("value", [None, 1, 64, np.int64(3)])
def test_check_positive_accepts(value):
    check_positive("chunk_size", value)


@pytest.mark.parametrize("value", [0, -3, 2.0, "8", True])
def test_check_positive_refuses(value):
    with pytest.raises(ValueError, match=f"chunk_size must be a positive integer or None, got {value!r}"):
        check_positive("chunk_size", value)


REFUSED = {
    "size": (lambda: checks.check_size("width", None), "width must be a positive integer, got None"),
    "bool": (lambda: checks.check_size("width", True), "width must be a positive integer, got True"),
    "at least": (lambda: checks.check_at_least("pairs", 1, 2), "pairs must be an integer of at least 2, got 1"),
    "choice": (
        lambda: checks.check_choice("norm", "b", ("rms", "layer")),
        "norm must be one of 'rms', 'layer', got 'b'",
    ),
    "unhashable": (lambda: checks.check_choice("norm", ["b"], {"rms": 1}), r"norm must be one of 'rms', got \['b'\]"),
    "flag": (lambda: checks.check_flags(causal=None), "causal must be True or False, got None"),
    "options": (lambda: checks.check_options("opts", {"a": 1}, ()), "opts has no key 'a'; known keys: none"),
    "groups": (lambda: checks.check_groups(4, 3), "groups must divide heads, got groups = 3 and heads = 4"),
    "plain": (lambda: checks.check(False, "rate", "in [0, 1)", 2), r"rate must be in \[0, 1\), got 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_checks_name_argument_expectation_and_value(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_checks_of_integers_return_python_integers():
    for value in (checks.check_size("n", np.int32(3)), checks.check_at_least("n", np.int64(3), 0)):
        assert type(value) is int and value == 3
    assert checks.check_positive("n", None) is None
    assert checks.check_groups(8, None) == 8 and checks.check_groups(8, 2) == 2
    checks.check_choice("n", 1, (0, 1))
    checks.check_options("n", ("a",), ("a", "b"))


def test_check_number_refuses_a_traced_one():
    with pytest.raises(ValueError, match="scale must be a finite number, got JitTracer"):
        jax.eval_shape(lambda x: checks.check_number("scale", x), 1.0)
