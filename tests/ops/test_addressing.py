"""Addressing against loops in numpy, worked examples and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.ops import addressing
from memformer.ops.addressing import Focus
from tests.numeric import FORWARD, assert_close, slopes

B, H, K, S = 2, 3, 4, 5
# One program each; eager execution compiles every operation of a step.
address, content_weights, interpolate = map(
    jax.jit, (addressing.address, addressing.content_weights, addressing.interpolate)
)
read_slots, write_slots = jax.jit(addressing.read_slots), jax.jit(addressing.write_slots)
sharpen, shift_weights = jax.jit(addressing.sharpen), jax.jit(addressing.shift_weights)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def draw(seed=0, dtype=np.float32):
    """A focus of three heads, weights, a memory, and erase and add vectors of two write heads."""
    rng = np.random.default_rng(seed)
    before = rng.dirichlet(np.ones(S), (B, H))
    focus = Focus(
        key=rng.normal(size=(B, H, K)),
        strength=rng.uniform(0, 5, (B, H)),
        gate=rng.uniform(0, 1, (B, H)),
        shifts=rng.dirichlet(np.ones(3), (B, H)),
        sharpness=1 + rng.uniform(0, 3, (B, H)),
    )
    memory = rng.normal(size=(B, K, S))
    erase, add = rng.uniform(0, 1, (B, 2, K)), rng.normal(size=(B, 2, K))
    return jax.tree.map(lambda x: x.astype(dtype), (focus, before, memory, erase, add))


# The paper's equations, one number at a time.


def by_content(key, strength, memory):
    cosines = [key @ memory[:, s] / np.linalg.norm(key) / np.linalg.norm(memory[:, s]) for s in range(S)]
    return softmax(strength * np.array(cosines))


def shifted(weights, shifts):
    return np.array([sum(shifts[j + 1] * weights[(i - j) % S] for j in (-1, 0, 1)) for i in range(S)])


def sharpened(weights, sharpness):
    return weights**sharpness / (weights**sharpness).sum()


def each_head(function, *arrays):
    arrays = [np.asarray(a, np.float64) for a in arrays]
    return np.array([[function(*(a[b, h] for a in arrays)) for h in range(H)] for b in range(B)])


def test_each_step_is_its_equation():
    focus, before, memory, _, _ = draw()
    by_head = np.broadcast_to(np.asarray(memory, np.float64)[:, None], (B, H, K, S))
    content = each_head(by_content, focus.key, focus.strength, by_head)
    assert_close(content_weights(focus.key, focus.strength, memory), content, FORWARD["float32"])
    mixed = each_head(lambda g, c, w: g * c + (1 - g) * w, focus.gate, content, before)
    assert_close(interpolate(jnp.asarray(content, jnp.float32), before, focus.gate), mixed, FORWARD["float32"])
    moved = each_head(shifted, mixed, focus.shifts)
    assert_close(shift_weights(jnp.asarray(mixed, jnp.float32), focus.shifts), moved, FORWARD["float32"])
    sharp = each_head(sharpened, moved, focus.sharpness)
    assert_close(sharpen(jnp.asarray(moved, jnp.float32), focus.sharpness), sharp, FORWARD["float32"])
    assert_close(address(focus, before, memory), sharp, FORWARD["float32"])


def test_reading_and_writing_are_their_equations():
    _, weights, memory, erase, add = draw()
    w, m, e, a = (np.asarray(x, np.float64) for x in (weights, memory, erase, add))
    reads = [[sum(w[b, h, s] * m[b, :, s] for s in range(S)) for h in range(H)] for b in range(B)]
    assert_close(read_slots(weights, memory), np.array(reads), FORWARD["float32"])
    want = m.copy()
    for b in range(B):
        for s in range(S):
            for h in range(2):
                want[b, :, s] *= 1 - w[b, h, s] * e[b, h]
            for h in range(2):
                want[b, :, s] += w[b, h, s] * a[b, h]
    assert_close(write_slots(memory, weights[:, :2], erase, add), want, FORWARD["float32"])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_all_heads_erase_before_any_adds(order):
    weights, erase = jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1))
    add = jnp.array([[[5.0], [7.0]]])[:, order]
    # If each head erased and added in turn, the second would erase the addition of the first.
    assert float(write_slots(jnp.full((1, 1, 1), 3.0), weights, erase, add)[0, 0, 0]) == 12.0


@pytest.mark.parametrize("shifts, place", [([1, 0, 0], 4), ([0, 1, 0], 0), ([0, 0, 1], 1)])
def test_shifts_wrap_around(shifts, place):
    first = jnp.eye(S)[None, :1]
    moved = shift_weights(first, jnp.array([[shifts]], jnp.float32))
    assert moved[0, 0].tolist() == [float(s == place) for s in range(S)]


@pytest.mark.parametrize("sharpness", [1.0, 21.0, 1e4])
def test_weights_of_zero_and_any_sharpness_are_finite(sharpness):
    def first(weights, sharpness):
        return sharpen(weights, sharpness)[0, 0, 0]

    weights = jnp.array([[[0.0, 0.4, 0.6]]])
    got = sharpen(weights, jnp.array([[sharpness]]))[0, 0]
    want = np.array([0.0, 0.4, 0.6]) ** min(sharpness, 700.0)
    assert_close(got, want / want.sum(), FORWARD["float32"])
    gradients = jax.jit(jax.grad(first, (0, 1)))(weights, jnp.array([[sharpness]]))
    assert all(np.isfinite(g).all() for g in gradients)


def test_content_weights_of_any_length():
    """A memory of entries near 1e20, whose squares overflow float32."""
    key, memory = jnp.asarray([[[1.0, 0.0]]]), jnp.asarray([[[3.0, 0.0], [0.0, 4.0]]])
    want = content_weights(key, jnp.ones((1, 1)), memory)
    assert_close(content_weights(1e20 * key, jnp.ones((1, 1)), 1e20 * memory), want, FORWARD["float32"])


def test_an_empty_memory_gives_uniform_content_weights():
    def total(key, memory):
        return jnp.sum(content_weights(key, jnp.full((1, 1), 3.0), memory) * jnp.arange(4.0)[None, None])

    key, memory = np.ones((1, 1, K), np.float32), np.zeros((1, K, 4), np.float32)
    weights = jax.jit(content_weights)(key, np.full((1, 1), 3.0, np.float32), memory)
    assert_close(weights, np.full((1, 1, 4), 0.25), FORWARD["float32"])
    gradient = jax.jit(jax.grad(total, (0, 1)))
    assert all(np.isfinite(g).all() for g in (*gradient(key, memory), *gradient(0 * key, memory)))


def test_gradients_are_those_of_finite_differences():
    @jax.jit
    @jax.value_and_grad
    def loss(at):
        focus, before, memory, erase, add = at
        weights = address(focus, before, memory)
        reads, after = read_slots(weights, memory), write_slots(memory, weights[:, 1:], erase, add)
        return jnp.sum(jnp.sin(reads)) + jnp.sum(jnp.cos(after))

    with jax.enable_x64(True):
        for seed in range(3):
            assert_close(*slopes(loss, draw(dtype=np.float64), seed=seed), 1e-6)
