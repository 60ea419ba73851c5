"""Schedules at named steps, the mask of weight decay, clipping, the moving average."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memformer.layers.memory import MEMORIES
from memformer.models import build_model
from memformer.training.config import default_config
from memformer.training.optimizer import decay_mask, make_optimizer, make_schedule, update_ema
from memformer.training.step import make_functional

# options, steps of the run, {step: learning rate}
SCHEDULES = {
    "constant": ({"schedule": "constant"}, 100, {0: 1.0, 99: 1.0}),
    "constant after warm-up": ({"schedule": "constant", "warmup_steps": 10}, 100, {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
    "cosine": (
        {"schedule": "cosine", "warmup_steps": 20, "end_factor": 0.1},
        120,
        {10: 0.5, 20: 1.0, 70: 0.55, 120: 0.1},
    ),
    "warm-up, stable, decay": (
        {"schedule": "warmup_stable_decay", "warmup_steps": 10, "decay_fraction": 0.2, "end_factor": 0.0},
        100,
        {5: 0.5, 10: 1.0, 80: 1.0, 90: 0.5, 100: 0.0},
    ),
    "rsqrt": ({"schedule": "rsqrt", "warmup_steps": 25}, 100, {25: 1.0, 100: 0.5}),
    "exponential": (
        {"schedule": "exponential", "step_factor": 0.7, "step_every": 500},
        2000,
        {0: 1.0, 499: 1.0, 500: 0.7, 1000: 0.49},
    ),
}


def options(**changed):
    return {**default_config().optimizer.to_dict(), "learning_rate": 1.0, **changed}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    changed, steps, rates = SCHEDULES[name]
    schedule = make_schedule(options(**changed), steps)
    for step, rate in rates.items():
        np.testing.assert_allclose(float(schedule(jnp.int32(step))), rate, atol=1e-6, err_msg=f"step {step}")


def test_unknown_schedule():
    with pytest.raises(ValueError, match="not known"):
        make_schedule(options(schedule="linear"), 10)


def test_decay_spares_norms_biases_and_decay_rates():
    matrix, stacked = jnp.ones((4, 4)), jnp.ones((2, 4))
    params = {
        "blocks.0.memory.projections.query.kernel": matrix,
        "embedding.table": matrix,
        "blocks.norm.scale": stacked,
        "blocks.memory.out.bias": stacked,
        "blocks.memory.decay.a_log": stacked,
        "blocks.0.memory.norm.scale": jnp.ones(4),
    }
    assert [name for name, decays in decay_mask(params).items() if decays] == list(params)[:2]
    tx, _ = make_optimizer(options(schedule="constant", weight_decay=0.5), 10)
    updates, _ = tx.update({n: jnp.zeros_like(x) for n, x in params.items()}, tx.init(params), params)
    assert {n: float(jnp.max(jnp.abs(x))) for n, x in updates.items()} == {
        n: 0.5 if i < 2 else 0.0 for i, n in enumerate(params)
    }


# options that add parameters to a memory beyond its defaults
MORE = {
    "linear_attention": {"skip": True, "decay": "log_sigmoid"},
    "delta_product": {"decay": "step"},
    "deltaformer": {"alpha": "sigmoid", "write_query": True, "conv_width": 2, "output_norm": True},
    "softmax_attention": {"conv_width": 2, "output_norm": True, "output_gate": "silu"},
}


def parameters(options):
    """{path without layer numbers: shapes} of a model."""
    model = make_functional(lambda rngs: build_model(options, vocab_size=8, rngs=rngs))
    shapes = {}
    for path, x in model.params.items():
        shapes.setdefault(re.sub(r"\.\d+", "", path), []).append(x)
    return shapes


@pytest.mark.parametrize("memory", MEMORIES)
def test_decay_of_every_memory_is_the_same_scanned_and_not(memory):
    """Of one layer, vectors are exempt, and arrays of more axes decay."""
    norm, feedforward = ("layer", "mlp") if memory == "deltaformer" else ("rms", "swiglu")
    model = {"memory": memory, "memory_options": MORE.get(memory, {}), "width": 8, "heads": 2, "depth": 2}
    model |= {"norm": norm, "feedforward": feedforward, "positions": "learned", "max_length": 4}
    plain, scanned = parameters({**model, "scan_layers": False}), parameters({**model, "scan_layers": True})
    assert plain.keys() == scanned.keys() and len(plain) > 5
    assert decay_mask(scanned) == decay_mask(plain) == {name: xs[0].ndim > 1 for name, xs in plain.items()}
    stacked = [name for name, decays in decay_mask(scanned).items() if not decays and scanned[name][0].ndim > 1]
    assert stacked


@pytest.mark.parametrize("kind", ["armt", "rmt", "encoder", "transformer", "seq2seq", "recurrent_lm", "ntm"])
def test_decay_of_other_models(kind):
    own = {"encoder": {"token_types": 2}, "ntm": {"initial_focus": "learned", "slots": 4}}
    shapes = parameters({"type": kind, **own.get(kind, {})})
    # these stack the parameters of their blocks
    stacked = ".blocks." if kind in ("encoder", "transformer") else "no such part"
    vectors = {name for name, xs in shapes.items() if xs[0].ndim - (stacked in name) < 2}
    # an initial state, one row per head
    vectors |= {"initial_weights"} & shapes.keys()
    assert {name for name, decays in decay_mask(shapes).items() if not decays} == vectors


def test_clipping_comes_first():
    params = {"kernel": jnp.ones((2, 2))}
    grads = {"kernel": jnp.full((2, 2), 1e3)}
    clipped, _ = make_optimizer(options(schedule="constant", clip_norm=1e-9, eps=1.0, weight_decay=0.0), 10)
    free, _ = make_optimizer(options(schedule="constant", clip_norm=0.0, eps=1.0, weight_decay=0.0), 10)
    small = optax.tree.norm(clipped.update(grads, clipped.init(params), params)[0])
    large = optax.tree.norm(free.update(grads, free.init(params), params)[0])
    assert float(small) < 1e-8 and float(large) > 1.9


def test_moving_average():
    ema, params = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    # at step 0 the average holds a tenth of the start
    np.testing.assert_allclose(update_ema(ema, params, 0.99, jnp.int32(0))["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(update_ema(ema, params, 0.99, jnp.int32(10**6))["w"], 0.01, rtol=1e-4)
