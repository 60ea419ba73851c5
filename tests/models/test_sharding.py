"""Models on Auto and Explicit meshes of eight devices: values, gradients, shardings, decoding, nothing gathered."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from memformer.models import build_model, generate
from tests.modules import random_module
from tests.numeric import FORWARD, GRADIENT, assert_close

VOCAB, ROWS, TIME = 8, 4, 6
IDS = np.random.default_rng(5).integers(0, VOCAB, (ROWS, TIME), np.int32)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0]] * ROWS, np.int32)
RULES = (("layers", None), ("embed", None), ("heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor"))
HEADS = jax.P("data", "tensor")

# A matrix memory, both kinds of cache and a recurrent cell, and the sharding of their states. Each op on both kinds of
# mesh: tests/ops/test_meshes.py. Mamba-3 of tests/layers/test_sharding.py is a linear attention.
FAMILIES = {
    "gated_delta_rule": {"memory": HEADS, "convolution.key": jax.P("data", None, "tensor")},
    "softmax_attention": {"memory.k": jax.P("data", None, "tensor"), "position": jax.P("data")},
    "deltaformer": {"memory.u": jax.P("data", None, "tensor")},
    "gru": {"memory": jax.P("data")},
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


@functools.cache
def built(memory):
    """Graph and parameters of a model, and its jitted call with gradients."""
    config = {"memory": memory, "width": 16, "heads": 2, "feedforward": None}
    if memory == "softmax_attention":
        config |= {"feedforward": "mlp", "feedforward_options": {"hidden": 16}}
    graph, parameters = nnx.split(random_module(lambda: build_model(config, vocab_size=VOCAB, rngs=nnx.Rngs(0))))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def call(parameters, ids, state=None):
        # the convolutions and the op of the first family are packed
        packed = SEGMENTS if memory == "gated_delta_rule" else None
        output = nnx.merge(graph, parameters)(ids, state=state, segment_ids=packed)
        return jnp.mean(jnp.square(output.logits)), output

    return graph, parameters, call, call(parameters, IDS)


def place(kind, parameters, ids=IDS):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(KINDS[kind],) * 2)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        placed = jax.device_put(parameters, nnx.get_named_sharding(parameters, mesh))
    return mesh, placed, jax.device_put(ids, jax.NamedSharding(mesh, jax.P("data")))


@pytest.mark.parametrize(
    ("memory", "kind"),
    [*((memory, "explicit") for memory in FAMILIES), ("gated_delta_rule", "auto")],
)
def test_a_model_on_a_mesh(memory, kind):
    """Every family on an Explicit mesh; one on an Auto mesh, where tests/ops/test_ops.py has every op."""
    _, parameters, call, (gradients, want) = built(memory)
    mesh, placed, rows = place(kind, parameters)
    with jax.set_mesh(mesh):
        program = call.lower(placed, rows).compile()
        by_parameter, got = program(placed, rows)
    assert_close(got, want, FORWARD["float32"])
    assert_close(by_parameter, gradients, GRADIENT["float32"])
    assert "all-gather" not in program.as_text()
    if kind == "auto":
        # Shardings of results are the compiler's choice there.
        return
    assert got.logits.sharding.spec == jax.P("data", None, "tensor")
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), by_parameter, placed)
    assert all(jax.tree.leaves(same))
    state = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(got.state["layers"][0])
    }
    for name, spec in FAMILIES[memory].items():
        assert state[name].sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), state[name].ndim)


def decoder():
    """A model of two scanned periods, and its logits of IDS on one device."""
    config = {"memory": "delta_rule,softmax_attention", "width": 16, "heads": 2, "depth": 4, "scan_layers": True}
    model = random_module(lambda: build_model({**config, "feedforward": None}, vocab_size=VOCAB, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(model)
    return model, jax.jit(lambda parameters, ids: nnx.merge(graph, parameters)(ids).logits)(parameters, IDS)


def test_decoding_on_a_mesh():
    """Token by token with the returned state; heads and rows stay sharded. `generate` decodes on an Auto mesh too."""
    model, want = decoder()
    graph, parameters = nnx.split(model)
    mesh, placed, rows = place("explicit", parameters)
    with jax.set_mesh(mesh):
        step = jax.jit(lambda parameters, ids, state: nnx.merge(graph, parameters)(ids, state=state))
        state, logits = model.init_state(ROWS, TIME), []
        for t in range(TIME):
            output = step(placed, rows[:, t : t + 1], state)
            state = output.state
            logits.append(output.logits)
    assert_close(np.concatenate(logits, axis=1), want, FORWARD["float32"])
    memory, cache = state["layers"][0]["memory"], state["layers"][1]["memory"]
    assert memory.sharding.spec[:3] == (None, "data", "tensor")
    assert cache.k.sharding.spec[:4] == (None, "data", None, "tensor")


GENERATE = {"max_new_tokens": 3, "temperature": 1.0}


@functools.cache
def generated():
    """A model, and tokens that it generates on one device."""
    config = {"memory": "softmax_attention", "width": 16, "heads": 2, "feedforward": None}
    model = random_module(lambda: build_model(config, vocab_size=VOCAB, rngs=nnx.Rngs(0)))
    return model, generate(model, IDS, key=jax.random.key(0), **GENERATE)


@pytest.mark.parametrize(
    ("kind", "scope", "listed"),
    [("auto", True, False), ("explicit", False, True)],
)
def test_generate_on_a_mesh(kind, scope, listed):
    """The mesh set or that of the arrays, prompts on it or lists with a key on it: each choice once."""
    model, want = generated()
    graph, parameters = nnx.split(model)
    mesh, placed, rows = place(kind, parameters)
    prompts = IDS.tolist() if listed else rows
    with jax.set_mesh(mesh):
        on_mesh = jax.random.key(0)
    with jax.set_mesh(mesh) if scope else contextlib.nullcontext():
        # A key made where an Explicit mesh is set lies on that mesh.
        key = on_mesh if listed else jax.random.key(0)
        got = generate(nnx.merge(graph, placed), prompts, key=key, **GENERATE)
    np.testing.assert_array_equal(got, want)


def test_dropout_on_an_explicit_mesh_advances():
    config = {"memory": "linear_attention", "width": 8, "heads": 2, "feedforward": None, "dropout": 0.5}
    model = random_module(lambda: build_model(config, vocab_size=VOCAB, rngs=nnx.Rngs(0)))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    with jax.set_mesh(mesh):
        rows = jax.device_put(IDS, jax.P("data"))
        model.train()
        call = nnx.jit(lambda model, ids: model(ids).logits)
        first, second = call(model, rows), call(model, rows)
        assert np.abs(np.asarray(first) - np.asarray(second)).max() > 1e-3
        assert int(model.dropout_stream.count[...]) == 2
