"""Path length: the gradient by distance, its fall per step, and delayed recall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.lab import path
from memformer.lab.path import draw_recall, factor_per_step, gradients


def test_the_gradient_is_that_of_the_last_output_by_distance():
    weights = jnp.array([0.0, 0.5, 2.0])

    def layer(x):
        # x_(T-d) reaches the last output times 2, 0.5, 0
        return x * 0 + jnp.sum(weights[None, :, None] * x, axis=1, keepdims=True), None

    found = jax.jit(gradients, static_argnums=0)(layer, jnp.ones((64, 3, 16)), jax.random.key(0))
    np.testing.assert_allclose(found, 4 * weights[::-1], rtol=0.1)


def test_factor_of_a_power():
    falls = np.tile(0.8 ** np.arange(40.0), (2, 1))
    assert factor_per_step(falls, 4, 24) == pytest.approx(0.8)


def test_one_symbol_lies_at_the_delay_asked_for():
    tokens = np.asarray(jax.jit(draw_recall, static_argnums=(1, 2, 3))(jax.random.key(0), (1, 20), 64, 24))
    symbols = tokens < 8
    assert symbols.sum(axis=1).tolist() == [1] * 64 and set(tokens[:, -1]) == {16}
    delays = 22 - symbols.argmax(axis=1)
    assert delays.min() >= 1 and delays.max() <= 20 and len(set(delays)) > 8


def test_the_quick_study(measure_quickly, monkeypatch):
    # training, its gradient and recall share the shapes of one batch, and the gradient that of the start
    monkeypatch.setattr(path, "ASKED", path.BATCH)
    smaller = {"batch": path.BATCH, "longest": 63, "steps": 40}
    result = measure_quickly("path", trained=("softmax_attention",), seeds=1, **smaller)
    rows = {row["memory"]: row for row in result.rows()}
    assert rows["rnn"]["factor per step"] == pytest.approx(rows["rnn"]["theory"], abs=0.05)
    assert rows["delta_rule"]["factor per step"] == pytest.approx(rows["delta_rule"]["theory"], abs=0.02)
    assert rows["rnn"]["factor per step"] < rows["lstm"]["factor per step"] < 0.9
    assert rows["softmax_attention"]["factor per step"] > 0.98 < rows["deltaformer"]["factor per step"]
    (recalled,) = result.rows(1)
    assert all(recalled[f"delay {2**e}"].startswith("100%") for e in range(1, 7))
