"""Schedules at named steps, the mask of weight decay, clipping, the moving average."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.layers.table import MEMORIES
from memformer.models import build_model
from memformer.training.build import build_run
from memformer.training.checkpoint import Checkpoints
from memformer.training.config import RunError, default_config
from memformer.training.optimizer import decay_mask, make_optimizer, make_schedule, parse_rate_factors, update_ema
from memformer.training.sharding import mesh_scope
from memformer.training.step import abstract_state, init_state, make_functional

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
    updates = first_update(params, {n: np.zeros_like(x) for n, x in params.items()}, weight_decay=0.5)
    assert {n: np.abs(x).max() for n, x in updates.items()} == {n: 0.5 if i < 2 else 0.0 for i, n in enumerate(params)}


# options that add parameters to a memory beyond its defaults
MORE = {
    "linear_attention": {"skip": True, "decay": "log_sigmoid"},
    "delta_product": {"decay": "step"},
    "deltaformer": {"alpha": "sigmoid", "write_query": True, "conv_width": 2, "output_norm": True},
    "softmax_attention": {"conv_width": 2, "output_norm": True, "output_gate": "silu", "sinks": True},
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
    plain = parameters({**model, "scan_layers": False, "depth": 1})
    scanned = parameters({**model, "scan_layers": True})
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


def first_update(params, grads, **changed):
    tx, _ = make_optimizer(options(**{"schedule": "constant", "clip_norm": 0.0, "weight_decay": 0.0, **changed}), 10)
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params)


def test_clipping_comes_first():
    params = {"kernel": jnp.ones((2, 2))}
    grads = {"kernel": jnp.full((2, 2), 1e3)}
    small, large = (first_update(params, grads, clip_norm=norm, eps=1.0)["kernel"] for norm in (1e-9, 0.0))
    assert np.linalg.norm(small) < 1e-8 and np.linalg.norm(large) > 1.9


def test_moving_average():
    ema, params = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    # at step 0 the average holds a tenth of the start
    np.testing.assert_allclose(update_ema(ema, params, 0.99, jnp.int32(0))["w"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(update_ema(ema, params, 0.99, jnp.int32(10**6))["w"], 0.01, rtol=1e-4)


def test_muon_orthogonalizes_matrices_and_leaves_the_rest_to_adamw():
    rng = np.random.default_rng(0)
    shapes = {
        "blocks.0.memory.out.kernel": (6, 12),
        "embedding.table": (6, 12),
        "head.kernel": (6, 12),
        "blocks.0.memory.convolutions.key.weights": (4, 6),
        "norm.scale": (6,),
    }
    params = {n: jnp.ones(shape) for n, shape in shapes.items()}
    grads = {n: jnp.asarray(rng.normal(size=shape), jnp.float32) for n, shape in shapes.items()}
    update = first_update(params, grads, name="muon")
    (matrix, *others) = shapes
    # the orthogonal factor of the gradient, at the size of an update of AdamW: 0.2 sqrt(12) per singular value
    u, _, v = np.linalg.svd(np.asarray(grads[matrix]), full_matrices=False)
    values = np.linalg.svd(np.asarray(update[matrix]), compute_uv=False) / (0.2 * np.sqrt(12))
    assert np.all((values > 0.6) & (values < 1.3))
    cosine = -np.sum((u @ v) * np.asarray(update[matrix])) / np.linalg.norm(u @ v) / np.linalg.norm(update[matrix])
    assert cosine > 0.97
    # a first step of Adam is the sign of the gradient
    for name in others:
        np.testing.assert_allclose(update[name], -np.sign(grads[name]), atol=1e-4)


def test_muon_of_stacked_layers_is_that_of_each():
    grads = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 8)), jnp.float32)
    stacked = first_update({"blocks.up.kernel": grads}, {"blocks.up.kernel": grads}, name="muon")["blocks.up.kernel"]
    each = {f"blocks.{layer}.up.kernel": grads[layer] for layer in range(3)}
    for one, alone in zip(stacked, first_update(each, each, name="muon").values(), strict=True):
        np.testing.assert_allclose(one, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learning_rates_by_group(name):
    params = {"embedding.table": jnp.ones((4, 4)), "blocks.0.up.kernel": jnp.eye(4), "blocks.0.up.bias": jnp.ones(4)}
    grads = {n: x + 0.1 for n, x in params.items()}
    plain = first_update(params, grads, name=name)
    scaled = first_update(params, grads, name=name, rate_factors="embedding:0.5, bias:0")
    for key, factor in {"embedding.table": 0.5, "blocks.0.up.kernel": 1.0, "blocks.0.up.bias": 0.0}.items():
        np.testing.assert_allclose(scaled[key], factor * plain[key], rtol=1e-6)


@pytest.mark.parametrize("text", ["embedding", "embedding:", ":2", "embedding:x", "embedding:nan", "embedding:-1"])
def test_rate_factors_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="optimizer.rate_factors must be"):
        parse_rate_factors(text)


def test_a_group_that_the_model_does_not_have():
    config = default_config().to_dict()
    config["optimizer"]["rate_factors"] = "embeding:2"
    with pytest.raises(RunError, match="names 'embeding', which is in no parameter's path; .*blocks, .*embedding"):
        build_run(config)


def test_checkpoints_hold_the_state_of_muon(tmp_path):
    config = default_config().to_dict()
    config["model"] |= {"memory": "linear_attention", "width": 8, "depth": 1, "heads": 1}
    config["optimizer"] |= {"name": "muon", "rate_factors": "embedding:0.5"}
    run = build_run(config, devices=jax.devices()[:1])
    with mesh_scope(run.mesh), Checkpoints(str(tmp_path)) as checkpoints:
        state = init_state(run.model, run.tx, run.mesh, seed=0)
        checkpoints.save(1, state, {}, run.config, {})
        checkpoints.wait()
        found = checkpoints.restore(abstract_state(run.model, run.tx, run.mesh)).state
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    # one momentum for a matrix, two moments for the rest
    names = [getattr(path[-1], "key", None) for path, _ in jax.tree_util.tree_leaves_with_path(state["opt_state"])]
    counts = collections.Counter(names)
    assert counts["blocks.0.feedforward.up.kernel"] == 1 and counts["embedding.table"] == counts["head.kernel"] == 2
