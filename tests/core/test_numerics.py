"""Shared numerics against numpy in float64, and edge cases: zero vectors, empty rows, large scores."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from memformer.core.numerics import accumulation_dtype, l2norm, masked_softmax, matmul_precision, repeat_heads
from tests.numeric import assert_close

RANDOM = np.random.default_rng(0)
# one program each instead of one per operation
NORMALIZE, SOFTMAX = jax.jit(l2norm), jax.jit(masked_softmax)
F32, BF16 = jnp.zeros(1, jnp.float32), jnp.zeros(1, jnp.bfloat16)


def test_accumulation_dtype():
    assert accumulation_dtype(BF16, F32) == jnp.float32
    assert accumulation_dtype(F32, None) == jnp.float32
    with jax.enable_x64(True):
        assert accumulation_dtype(F32, jnp.zeros(1, jnp.float64)) == jnp.float64


PRECISIONS = {
    "none, all wide": (None, (F32, F32), lax.Precision.HIGHEST),
    "none, one narrow": (None, (F32, BF16), lax.Precision.DEFAULT),
    "none, absent argument": (None, (F32, None), lax.Precision.HIGHEST),
    "name": ("high", (F32,), lax.Precision.HIGH),
    "name in capitals": ("DEFAULT", (F32,), lax.Precision.DEFAULT),
    "enum": (lax.Precision.HIGHEST, (BF16,), lax.Precision.HIGHEST),
}


@pytest.mark.parametrize("case", PRECISIONS)
def test_matmul_precision(case):
    precision, arrays, want = PRECISIONS[case]
    assert matmul_precision(precision, *arrays) == want


@pytest.mark.parametrize("precision", ["best", 3, "bf16"])
def test_matmul_precision_refuses(precision):
    with pytest.raises(ValueError, match=f"precision must be None, .* got {precision!r}"):
        matmul_precision(precision, F32)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_l2norm(dtype, tolerance):
    x = jnp.asarray(RANDOM.normal(size=(3, 5)), dtype)
    wide = np.asarray(x, np.float64)
    out = NORMALIZE(x)
    assert out.dtype == dtype
    assert_close(out, wide / np.linalg.norm(wide, axis=-1, keepdims=True), tolerance)


def test_l2norm_at_zero_is_zero_with_a_finite_gradient():
    x = jnp.zeros((2, 4))
    np.testing.assert_array_equal(NORMALIZE(x), np.zeros((2, 4)))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(l2norm(x))))(x)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([3.0, 4.0], "x must be an array of floating dtype, got list"),
        (np.array([3, 4]), "x must be an array of floating dtype, got int64"),
        (np.float32(3), "x must have an axis -1 that is not empty, got shape ()"),
        (np.zeros((2, 0), np.float32), "x must have an axis -1 that is not empty, got shape (2, 0)"),
    ],
)
def test_l2norm_refuses(x, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        l2norm(x)


def test_l2norm_in_bfloat16_sums_in_float32():
    # 512 squares of 1: a bfloat16 sum would stop at 256
    assert_close(NORMALIZE(jnp.ones((512,), jnp.bfloat16)), np.full(512, 512**-0.5), 5e-3)


def test_masked_softmax():
    scores = RANDOM.normal(size=(4, 6)).astype(np.float32)
    mask = RANDOM.random((4, 6)) < 0.6
    mask[0], mask[1] = True, False
    weights = np.where(mask, np.exp(scores.astype(np.float64)), 0)
    total = weights.sum(-1, keepdims=True)
    want = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    got = SOFTMAX(scores, mask)
    assert_close(got, want, 1e-6)
    np.testing.assert_array_equal(got[1], np.zeros(6))


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_masked_softmax_of_large_scores(offset):
    scores = np.array([[0.0, 1.0, 2.0]], np.float32)
    got = SOFTMAX(scores + np.float32(offset), np.array([[True, True, False]]))
    assert_close(got, np.array([[1 / (1 + np.e), np.e / (1 + np.e), 0.0]]), 1e-3)


def test_masked_softmax_has_no_gradient_through_masked_entries():
    mask = np.array([[True, True, False], [False, False, False]])
    # Masked entries may be infinite: they must reach neither the result nor the gradient.
    scores = np.array([[0.5, -0.5, np.inf], [np.inf, 1.0, -np.inf]], np.float32)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(masked_softmax(s, mask)[:, 0])))(scores)
    half = 1 / (1 + np.exp(-1.0))
    assert_close(gradient, np.array([[half * (1 - half), -half * (1 - half), 0], [0, 0, 0]]), 1e-6)


def test_repeat_heads():
    x = np.arange(2 * 3 * 2 * 4, dtype=np.float32).reshape(2, 3, 2, 4)
    out = np.asarray(repeat_heads(jnp.asarray(x), 3))
    assert out.shape == (2, 3, 6, 4)
    for head in range(6):
        np.testing.assert_array_equal(out[:, :, head], x[:, :, head // 3])
    assert repeat_heads(x, 1) is x


JACOBIAN = jax.jit(jax.jacrev(l2norm))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e-6, 1.0, 1e20, 3e38])
def test_l2norm_of_any_length(size):
    """Values and gradients against float64; squares of 1e20 overflow float32, squares of 1e-30 underflow."""
    x = np.array([0.75 * size, -size, 0.0], "float32")
    wide = np.asarray(x, np.float64)
    length = np.sqrt(np.sum(wide**2) + 1e-12)
    np.testing.assert_allclose(NORMALIZE(x), wide / length, rtol=1e-6)
    want = np.eye(3) / length - np.outer(wide, wide) / length**3
    np.testing.assert_allclose(JACOBIAN(x), want, rtol=1e-6, atol=1e-6 / length + 1e-38)
