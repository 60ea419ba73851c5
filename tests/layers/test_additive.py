"""Additive attention against its formula in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.layers.additive import AdditiveAttention
from memformer.layers.basic import Dtypes
from tests.numeric import FORWARD, assert_close

B, S, D, F, A = 2, 5, 4, 6, 8


def layer():
    return AdditiveAttention(D, F, A, dtypes=Dtypes(), rngs=nnx.Rngs(0))


def draw():
    rng = np.random.default_rng(0)
    return (rng.normal(size=shape).astype("float32") for shape in ((B, D), (B, S, F)))


def reference(attention, state, memory, visible):
    w, u = np.asarray(attention.query.kernel[...]), np.asarray(attention.key.kernel[...])
    v = np.asarray(attention.score[...])
    reads, weights = np.zeros((B, F)), np.zeros((B, S))
    for b in range(B):
        scores = [float(v @ np.tanh(state[b] @ w + memory[b, i] @ u)) for i in range(S)]
        exponents = np.where(visible[b], np.exp(scores), 0)
        if exponents.sum():
            weights[b] = exponents / exponents.sum()
        reads[b] = weights[b] @ memory[b]
    return reads, weights


@pytest.mark.parametrize("masked", [False, True])
def test_formula(masked):
    attention = layer()
    state, memory = draw()
    visible = np.array([[True, False, True, True, False], [False] * S]) if masked else np.ones((B, S), bool)
    call = nnx.jit(lambda layer, state, memory, visible: layer(state, memory, layer.prepare(memory), visible))
    read, weights = call(attention, state, memory, visible if masked else None)
    want = reference(attention, np.asarray(state), np.asarray(memory), visible)
    assert_close((read, weights), want, FORWARD["float32"])


def test_gradient_is_finite_where_nothing_is_visible():
    attention = layer()
    state, memory = draw()

    def total(memory):
        read, _ = attention(state, memory, attention.prepare(memory), jnp.zeros((B, S), bool))
        return jnp.sum(read)

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(memory), 0)


def test_bad_size():
    with pytest.raises(ValueError, match="memory_width must be a positive integer, got 0"):
        AdditiveAttention(D, 0, A, dtypes=Dtypes(), rngs=nnx.Rngs(0))
