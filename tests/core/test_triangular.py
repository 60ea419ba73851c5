"""The triangular inverse against numpy in float64: any size, and the keys that break power series."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.core.triangular import unit_lower_inverse
from tests.numeric import GRADIENT, assert_close

# Largest error relative to the largest entry, float32.
ADVERSARIAL = {
    ("random", 1.0): 1e-6,
    ("cosine 0.99", 1.0): 5e-6,
    ("cosine 0.99", 2.0): 2e-4,
    ("identical", 1.0): 0.0,
    ("identical", 2.0): 0.0,
}


def matrix(kind, beta, size, seed=0):
    """beta k_r . k_i for unit keys, i < r."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((3, size, 64))
    common = rng.standard_normal((3, 1, 64))
    keys = {"random": keys, "cosine 0.99": 0.9 * common + 0.1 * keys, "identical": common + 0 * keys}[kind]
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    scores = np.round(keys @ keys.swapaxes(-1, -2), 12)
    return np.tril(beta * scores, -1).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 31, 128])
def test_any_size(size):
    a = matrix("random", 1.0, size)
    want = np.linalg.inv(np.eye(size) + np.float64(a))
    got = jax.jit(unit_lower_inverse)(a)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.all(np.triu(got, 1) == 0)


@pytest.mark.parametrize(("kind", "beta"), list(ADVERSARIAL))
@pytest.mark.parametrize("size", [64, 128])
def test_adversarial_keys(kind, beta, size):
    a = matrix(kind, beta, size)
    want = np.linalg.inv(np.eye(size) + np.float64(a))
    error = np.max(np.abs(jax.jit(unit_lower_inverse)(a) - want)) / np.max(np.abs(want))
    assert error <= ADVERSARIAL[kind, beta]


def test_entries_above_the_diagonal_are_ignored():
    a = matrix("random", 1.0, 16)
    noise = np.triu(np.ones((16, 16), np.float32))[None]
    inverse = jax.jit(unit_lower_inverse)
    np.testing.assert_array_equal(inverse(a + noise), inverse(a))


def test_gradient_both_modes():
    a = jnp.asarray(matrix("cosine 0.99", 1.0, 11))
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(a.shape), a.dtype)
    identity = jnp.broadcast_to(jnp.eye(11), a.shape)

    def ours(a):
        return jnp.sum(weight * unit_lower_inverse(a))

    def theirs(a):
        return jnp.sum(weight * jnp.linalg.inv(identity + jnp.tril(a, -1)))

    @jax.jit
    def both_modes(a):
        return [(jax.grad(f)(a), jax.jvp(f, (a,), (weight,))[1]) for f in (ours, theirs)]

    for got, want in zip(*both_modes(a), strict=True):
        assert_close(got, want, GRADIENT["float32"])
