"""Cumulative decays against float64 sums: tokens that forget everything, and many of them."""

import jax
import numpy as np
import pytest

from memformer.core.decay import CumulativeDecay, cumulative_decay, running_decay

ADD = jax.jit(lambda decay: cumulative_decay(decay, axis=0))


@pytest.mark.parametrize("strong", [-1e4, -1e7, -np.inf])
def test_differences_next_to_a_strong_decay(strong):
    decay = -np.random.default_rng(0).uniform(0.01, 3, 64).astype(np.float32)
    decay[5] = strong
    total = CumulativeDecay(*map(np.asarray, ADD(decay)))
    got = total[-1:].since(total[6:])
    want = np.cumsum(decay[:6:-1].astype(np.float64))[::-1]
    np.testing.assert_allclose(got[:-1], want, atol=2e-6)
    # exp of the gap over the strong token is 0 in float64 too.
    assert np.exp(np.float64(total[6:7].since(total[4:5])[0])) == 0


def test_whole_numbers_add_exactly():
    decay = np.where(np.arange(4096) < 3000, -np.inf, -0.6).astype("float32")
    total = CumulativeDecay(*map(np.asarray, ADD(decay)))
    np.testing.assert_allclose(total[-1:].since(total[2999:3000]), [-0.6 * 1096], rtol=1e-6)


def test_running_sums_keep_the_digits_of_neighbours():
    """After 100,000 tokens of -0.3 a plain float32 sum has a spacing of 0.002."""
    decay = np.full((1, 100_000, 1), -0.3, np.float32)
    decay[0, 5] = -np.inf
    total = CumulativeDecay(*map(np.asarray, jax.jit(running_decay)(decay)))
    gap = total[:, -1000:].since(total[:, -1001:-1000])
    np.testing.assert_allclose(gap[0, :, 0], -0.3 * np.arange(1, 1001), rtol=1e-6, atol=2e-6)
    assert total.whole[0, 5, 0] < -8000
    more = CumulativeDecay(*map(np.asarray, jax.jit(running_decay)(decay[:, :3], total[:, -1:])))
    np.testing.assert_allclose(more.since(total[:, -1:])[0, :, 0], [-0.3, -0.6, -0.9], rtol=1e-6)


def test_gradient_is_that_of_the_sum_and_0_where_everything_is_forgotten():
    decay = np.array([-0.5, -np.inf, -1e7, -2.0], np.float32)
    gradient = jax.jit(jax.grad(lambda x: cumulative_decay(x, axis=0).total()[-1]))(decay)
    assert gradient.tolist() == [1.0, 0.0, 0.0, 1.0]
