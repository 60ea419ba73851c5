"""Sums of a batch against plain formulas, and the scores computed from them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memformer.training import losses as library
from memformer.training.losses import means

count_batch, smoothing_loss = jax.jit(library.count_batch), jax.jit(library.smoothing_loss)


def example():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    targets = jnp.asarray(rng.integers(5, size=(3, 4)), jnp.int32)
    weights = jnp.asarray([[1, 2, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], jnp.float32)
    return logits, targets, weights


def test_sums_are_those_of_the_formulas():
    logits, targets, weights = example()
    sums = count_batch(logits, targets, weights)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = np.asarray(np.argmax(logits, -1) == targets, np.float32)
    np.testing.assert_allclose(sums["loss"], np.sum(losses * weights), rtol=1e-6)
    np.testing.assert_allclose(sums["correct"], np.sum(hits * weights))
    np.testing.assert_allclose(sums["weight"], 8.0)
    assert float(sums["sequences"]) == 2.0


def test_gradient_is_that_of_the_formula():
    logits, targets, weights = example()
    got = jax.jit(jax.grad(lambda z: count_batch(z, targets, weights)["loss"]))(logits)
    plain = lambda z: jnp.sum(optax.softmax_cross_entropy_with_integer_labels(z, targets) * weights)  # noqa: E731
    want = jax.jit(jax.grad(plain))(logits)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_row_counts_once_and_only_without_a_miss():
    logits = 9.0 * np.eye(3, dtype=np.float32)[[[0, 1], [0, 1]]]
    sums = count_batch(logits, jnp.asarray([[0, 1], [0, 2]]), jnp.ones((2, 2)))
    assert (float(sums["sequences"]), float(sums["sequences_correct"])) == (2.0, 1.0)


def test_ties_go_to_the_lowest_class_as_argmax_has_it():
    sums = count_batch(jnp.zeros((1, 3, 4)), jnp.asarray([[0, 1, 3]]), jnp.ones((1, 3)))
    assert float(sums["correct"]) == 1.0


def test_weight_zero_hides_a_target_that_is_no_class():
    logits, targets, weights = example()
    hidden = np.where(np.asarray(weights) > 0, targets, np.int32(-100))
    assert count_batch(logits, hidden, weights) == count_batch(logits, targets, weights)


def test_bits_are_counted_one_by_one():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    targets = jnp.asarray(rng.integers(2, size=(2, 3, 4)), jnp.float32)
    # a row of which the first position is right and the only one scored
    targets = targets.at[1, 0].set(jnp.where(logits[1, 0] > 0, 1.0, 0.0))
    weights = np.asarray([[1, 2, 0], [1, 0, 0]], np.float32)
    sums = count_batch(logits, targets, weights)
    losses = np.asarray(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), -1))
    wrong = np.sum((np.asarray(logits) > 0) != (np.asarray(targets) > 0.5), -1)
    np.testing.assert_allclose(sums["loss"], np.sum(losses * weights), rtol=1e-6)
    assert float(sums["errors"]) == np.sum(wrong * (weights > 0)) > 0
    assert float(sums["correct"]) == np.sum(weights[wrong == 0])
    assert (float(sums["sequences"]), float(sums["sequences_correct"])) == (2.0, 1.0)
    got = means(jax.tree.map(float, sums), ("bits_per_sequence", "bit_errors"))
    assert got["bits_per_sequence"] == pytest.approx(np.sum(losses * weights) / np.log(2) / 2, rel=1e-6)
    assert got["bit_errors"] == float(sums["errors"]) / 2


def test_smoothing_is_the_loss_against_smoothed_classes():
    logits, targets, weights = example()
    smooth = optax.smooth_labels(jax.nn.one_hot(targets, 5, dtype=jnp.float32), 0.1)
    want = jnp.sum(optax.softmax_cross_entropy(logits, smooth) * weights)
    got = 0.9 * count_batch(logits, targets, weights)["loss"] + 0.1 * smoothing_loss(logits, weights)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_means():
    sums = {"loss": 2.0, "weight": 4.0, "correct": 3.0, "sequences": 2.0, "sequences_correct": 1.0}
    got = means(sums, ("accuracy", "sequence_accuracy", "bits_per_byte", "perplexity"))
    assert got == {
        "loss": 0.5,
        "accuracy": 0.75,
        "sequence_accuracy": 0.5,
        "bits_per_byte": pytest.approx(0.72135, 1e-4),
        "perplexity": pytest.approx(1.64872, 1e-4),
    }
    assert np.isnan(means({**sums, "weight": 0.0})["loss"])
    with pytest.raises(ValueError, match="scores must be of"):
        means(sums, ("f1",))
