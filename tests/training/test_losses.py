"""Sums of a batch against plain formulas, and what is made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memformer.training.losses import count_batch, means


def example():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    targets = jnp.asarray(rng.integers(5, size=(3, 4)), jnp.int32)
    weights = jnp.asarray([[1, 2, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], jnp.float32)
    return logits, targets, weights


def test_sums_are_those_of_the_formulas():
    logits, targets, weights = example()
    sums = jax.jit(count_batch)(logits, targets, weights)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = np.asarray(np.argmax(logits, -1) == targets, np.float32)
    np.testing.assert_allclose(sums["loss"], np.sum(losses * weights), rtol=1e-6)
    np.testing.assert_allclose(sums["correct"], np.sum(hits * weights))
    np.testing.assert_allclose(sums["weight"], 8.0)
    assert float(sums["sequences"]) == 2.0


def test_gradient_is_that_of_the_formula():
    logits, targets, weights = example()
    got = jax.grad(lambda z: count_batch(z, targets, weights)["loss"])(logits)
    want = jax.grad(lambda z: jnp.sum(optax.softmax_cross_entropy_with_integer_labels(z, targets) * weights))(logits)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_row_counts_once_and_only_without_a_miss():
    logits = 9.0 * jax.nn.one_hot(jnp.asarray([[0, 1], [0, 1]]), 3, dtype=jnp.float32)
    sums = count_batch(logits, jnp.asarray([[0, 1], [0, 2]]), jnp.ones((2, 2)))
    assert (float(sums["sequences"]), float(sums["sequences_correct"])) == (2.0, 1.0)


def test_ties_go_to_the_lowest_class_as_argmax_has_it():
    sums = count_batch(jnp.zeros((1, 3, 4)), jnp.asarray([[0, 1, 3]]), jnp.ones((1, 3)))
    assert float(sums["correct"]) == 1.0


def test_weight_zero_hides_a_target_that_is_no_class():
    logits, targets, weights = example()
    hidden = jnp.where(weights > 0, targets, -100)
    assert count_batch(logits, hidden, weights) == count_batch(logits, targets, weights)


def test_means():
    sums = {"loss": 2.0, "weight": 4.0, "correct": 3.0, "sequences": 2.0, "sequences_correct": 1.0}
    got = means(sums, ("accuracy", "sequence_accuracy", "bits_per_byte"))
    assert got == {
        "loss": 0.5,
        "accuracy": 0.75,
        "sequence_accuracy": 0.5,
        "bits_per_byte": pytest.approx(0.72135, 1e-4),
    }
    assert np.isnan(means({**sums, "weight": 0.0})["loss"])
    with pytest.raises(ValueError, match="scores must be of"):
        means(sums, ("f1",))
