"""The compiled step: micro-batches, the moving average, dropout, other variables of a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from memformer.models import ModelOutput
from memformer.training.config import default_config
from memformer.training.sharding import global_batch, make_mesh, mesh_scope
from memformer.training.step import init_state, make_functional, make_train_step

OPTIONS = {"accumulate": 1, "label_smoothing": 0.0, "log_every": 10, "on_nan": "abort"}


class Toy(nnx.Module):
    """A table of logits with dropout, an auxiliary loss and a count of its calls."""

    def __init__(self, rngs):
        self.table = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (4, 4)))
        self.calls = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs, *, segment_ids=None, positions=None, state=None):
        self.calls[...] += 1
        logits = self.dropout(jnp.take(self.table[...], inputs, axis=0))
        return ModelOutput(logits, None, {"pull": 0.1 * jnp.sum(self.table[...] ** 2)})


class Plain(nnx.Module):
    """The table alone."""

    def __init__(self, rngs):
        self.table = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (4, 4)))

    def __call__(self, inputs, *, segment_ids=None, positions=None, state=None):
        return ModelOutput(jnp.take(self.table[...], inputs, axis=0), None, {})


def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(4, size=(8, 6)).astype(np.int32)
    weights = rng.integers(3, size=(8, 6)).astype(np.float32)
    ones = np.ones_like(ids)
    return {
        "inputs": ids,
        "targets": ids[:, ::-1].copy(),
        "loss_weights": weights,
        "segment_ids": ones,
        "positions": ones,
    }


@functools.cache
def first_state(build, ema):
    """(mesh, model, optimizer, state) of a run, shared by the tests."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:1])
    model, tx = make_functional(build), optax.sgd(0.5)
    with mesh_scope(mesh):
        return mesh, model, tx, jax.device_get(init_state(model, tx, mesh, seed=3, ema=ema))


@functools.cache
def train_step(build, ema, options):
    """The compiled step of such a run."""
    mesh, model, tx, _ = first_state(build, ema)
    with mesh_scope(mesh):
        return make_train_step(model, tx, lambda count: jnp.float32(0.5), mesh, {**OPTIONS, **dict(options)}, ema)


def one_step(build, *, steps=1, ema=0.0, **options):
    mesh, _, _, first = first_state(build, ema)
    step = train_step(build, ema, tuple(options.items()))
    with mesh_scope(mesh):
        # copies: the step donates each array
        state = jax.device_put(first, NamedSharding(mesh, PartitionSpec()), may_alias=False)
        for _ in range(steps):
            state, report = step(state, global_batch(batch(), mesh))
    return first, jax.device_get(state), jax.device_get(report)


def by_hand(table, smoothing):
    """(mean loss, its gradient) in float64, with targets smoothed over the four classes."""
    data, table = batch(), np.float64(table)
    scores = np.exp(table[data["inputs"]])
    shares = scores / scores.sum(axis=-1, keepdims=True)
    wanted = (1 - smoothing) * np.eye(4)[data["targets"]] + smoothing / 4
    weights = data["loss_weights"][..., None] / data["loss_weights"].sum()
    gradient = np.zeros_like(table)
    np.add.at(gradient, data["inputs"], weights * (shares - wanted))
    return -np.sum(weights * wanted * np.log(shares)), gradient


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_is_gradient_descent_on_the_mean_loss(smoothing):
    first, state, report = one_step(Plain, label_smoothing=smoothing)
    table = first["params"]["table"]
    _, gradient = by_hand(table, smoothing)
    # what is reported stays the plain cross entropy
    np.testing.assert_allclose(report["loss"] / report["weight"], by_hand(table, 0.0)[0], rtol=1e-6)
    np.testing.assert_allclose(state["params"]["table"], table - 0.5 * gradient, atol=1e-6)
    np.testing.assert_allclose(report["gradient_norm"], np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(report["update_norm"], 0.5 * report["gradient_norm"], rtol=1e-5)
    assert report["tokens"] == 48 and state["step"] == 1


def test_micro_batches_give_the_gradient_of_the_whole():
    _, whole, report = one_step(Plain, label_smoothing=0.0)
    _, parts, split = one_step(Plain, accumulate=4)
    np.testing.assert_allclose(parts["params"]["table"], whole["params"]["table"], atol=1e-6)
    for name in ("loss", "weight", "correct", "tokens"):
        np.testing.assert_allclose(split[name], report[name], rtol=1e-6, err_msg=name)


class Pulled(Plain):
    def __call__(self, inputs, **kwargs):
        return super().__call__(inputs)._replace(aux={"pull": 0.1 * jnp.sum(self.table[...] ** 2)})


@pytest.mark.parametrize("parts", [1, 2])
def test_auxiliary_loss_joins_as_it_is(parts):
    first, plain, _ = one_step(Plain, label_smoothing=0.0)
    _, pulled, report = one_step(Pulled, accumulate=parts)
    np.testing.assert_allclose(
        pulled["params"]["table"], plain["params"]["table"] - 0.1 * first["params"]["table"], atol=1e-6
    )
    np.testing.assert_allclose(report["aux"], 0.1 * np.sum(first["params"]["table"] ** 2), rtol=1e-5)


def test_other_variables_are_carried_and_dropout_differs_by_step():
    first, state, report = one_step(Toy, steps=2, accumulate=2)
    assert first["rest"]["calls"] == 0 and state["rest"]["calls"] == 4
    _, once, first_report = one_step(Toy, steps=1, accumulate=2)
    _, same, _ = one_step(Toy, steps=1, accumulate=2)
    assert np.array_equal(once["params"]["table"], same["params"]["table"])
    assert report["loss"] != 2 * first_report["loss"]


def test_moving_average_is_kept_beside_the_parameters():
    first, state, _ = one_step(Plain, ema=0.5, log_every=2)
    want = 0.1 * first["params"]["table"] + 0.9 * state["params"]["table"]
    np.testing.assert_allclose(state["ema"]["table"], want, atol=1e-6)


def test_sums_start_anew_after_a_log():
    _, _, report = one_step(Plain, steps=3, ema=0.5, log_every=2)
    assert report["steps"] == 1 and report["tokens"] == 48


def test_defaults_reach_the_step():
    assert set(OPTIONS) <= set(default_config().train)
