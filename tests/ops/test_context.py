"""Every op with time divided over devices: values, gradients, and what the compiled program costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memformer as mf
from memformer.core.context import time_shards
from memformer.core.segments import find_segments
from memformer.layers import ShortConvolution
from memformer.layers.basic import Dtypes
from memformer.training.program import read_program
from tests.numeric import assert_close
from tests.ops.specs import SPECS
from tests.programs import collectives_in_loops

ROWS = {spec.name: spec for spec in SPECS}
B, T = 4, 16
# Segments across borders of shards, shards of padding alone, and a segment that continues behind padding.
IDS = np.array(
    [
        [1, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2],
        [0, 0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 0, 0, 0],
        [1] * 16,
        [1, 2, 2, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 0, 0],
    ],
    np.int32,
)


def in_float32(tree):
    """float64 leaves in float32, all others unchanged."""
    leaf = lambda x: np.asarray(x, np.float32) if np.asarray(x).dtype == np.float64 else x  # noqa: E731
    return jax.device_put(jax.tree.map(leaf, tree))


def mesh_over_time(kind, *sizes):
    """A mesh (data, time), and the name of its time axis: any where it is Explicit."""
    time = "context" if kind == "Auto" else "seq"
    return jax.make_mesh(sizes, ("data", time), axis_types=(AxisType[kind],) * 2), time


def results_and_gradients(spec, implementation, arrays, state, ids):
    """Output, observed state, and gradients of all float arguments, the initial state included."""

    def loss(arrays, state):
        call = {"initial_state": state, "segment_ids": ids, "implementation": implementation}
        output, after = spec.op(**arrays, **call, **spec.options)
        seen = output, spec.observe(after)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(seen)), seen

    (_, seen), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True, allow_int=True)(arrays, state)
    return seen, [x for x in jax.tree.leaves(gradients) if x.dtype == jnp.float32]


CASES = [
    # `test_heads_and_time` has the delta rule's chunks
    ("delta_rule_grouped", "recurrent", "Explicit"),
    ("delta_product_channel_decay_erase", "chunked", "Auto"),
    ("linear_attention_normalized", "chunked", "Explicit"),
    # `test_sinks` has softmax attention on an Auto mesh
    ("softmax_attention_decay", "chunked", "Explicit"),
    ("deltaformer_linear_softmax", "chunked", "Explicit"),
]


@pytest.mark.parametrize(("name", "implementation", "kind"), CASES)
def test_equals_one_device(name, implementation, kind):
    """Packed, from a state, with gradients, against the recurrence."""
    spec, rng = ROWS[name], np.random.default_rng(0)
    arrays, state = in_float32((spec.arrays(rng, B, T), spec.initial_state(rng, B)))
    run = functools.partial(results_and_gradients, spec, implementation)
    alone = functools.partial(results_and_gradients, spec, "recurrent")
    want = jax.jit(alone)(arrays, state, jnp.asarray(IDS))
    mesh, time = mesh_over_time(kind, 2, 4)
    with jax.set_mesh(mesh):
        arrays, ids = jax.device_put((arrays, jnp.asarray(IDS)), P("data", time))
        state = jax.tree.map(lambda x: jax.device_put(x, P("data") if x.ndim else P()), state)
        got = jax.jit(run)(arrays, state, ids)
    assert_close(jax.device_get(got), jax.device_get(want), 1e-5, name)
    assert got[0][0].sharding.is_equivalent_to(NamedSharding(mesh, P("data", time)), 4)


def test_sinks():
    """Logits per head: each device takes those of its rows. The key head is repeated to share rows out."""
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, heads, 8)), "float32") for heads in (4, 1, 1))

    def loss(q, k, v, sinks):
        output = mf.softmax_attention(q, k, v, sinks=sinks, segment_ids=jnp.asarray(IDS), implementation="chunked")[0]
        return jnp.sum(jnp.sin(output)), output

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    sinks = jnp.asarray([-1.0, 0.0, 1.0, 2.0])
    want = run(q, k, v, sinks)
    with jax.set_mesh(mesh_over_time("Auto", 2, 4)[0]):
        program = run.lower(*(jax.device_put(x, P("data", "context")) for x in (q, k, v)), sinks).compile()
        got = program(*(jax.device_put(x, P("data", "context")) for x in (q, k, v)), sinks)
    assert_close(jax.device_get(got), want, 1e-5)
    assert "all-to-all" in program.as_text() and not collectives_in_loops(program.as_text())


def test_heads_and_time():
    """Heads over devices too; one value head per device, and one key head for both."""
    rng = np.random.default_rng(1)
    q, v = (rng.standard_normal(shape).astype("float32") for shape in ((B, T, 1, 8), (B, T, 2, 8)))
    call = lambda q, v: mf.delta_rule(q, mf.l2norm(q), v, jnp.full((B, T, 2), 0.5))  # noqa: E731
    want = jax.device_get(jax.jit(call)(q, v))
    mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        q, v = jax.device_put(q, P("data", "context")), jax.device_put(v, P("data", "context", "tensor"))
        output, state = jax.jit(call)(q, v)
    assert_close(jax.device_get((output, state)), want, 1e-5)
    assert output.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "context", "tensor")), 4)
    assert state.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "tensor")), 4)


def test_convolution():
    """Shards of two tokens hold fewer than the three before them that a window of four needs."""
    rng = np.random.default_rng(2)
    x, state = (jnp.asarray(rng.standard_normal((B, n, 3)), "float32") for n in (T, 3))
    layer = ShortConvolution(3, 4, dtypes=Dtypes(), rngs=nnx.Rngs(0))

    def run(x, state, ids):
        def loss(x, state):
            y, after = layer(x, segments=find_segments(ids, {}), state=state)
            # What stands at padding is anything.
            y = jnp.where((ids != 0)[..., None], y, 0.0)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(after)), (y, after)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, state)

    ids = jnp.asarray(IDS)
    want = jax.jit(run)(x, state, ids)
    mesh, time = mesh_over_time("Auto", 1, 8)
    with jax.set_mesh(mesh):
        got = jax.jit(run)(jax.device_put(x, P(None, time)), state, ids)
    assert_close(jax.device_get(got), jax.device_get(want), 1e-5)


# Work of n devices over that of one, at most; a delta rule's transitions cost as much as its forward pass.
COSTS = {
    "delta_rule": (mf.delta_rule, ("decay", "beta"), 1.8),
    "linear_attention": (mf.linear_attention, ("decay",), 1.25),
    "softmax_attention": (mf.softmax_attention, (), 1.02),
    "deltaformer": (mf.deltaformer, ("beta",), 1.02),
}


@pytest.mark.parametrize("name", COSTS)
def test_cost_of_the_program(name):
    """Work and memory per device fall with the devices; no collective runs inside a loop; nothing is gathered."""
    op, scalars, most = COSTS[name]
    tokens, devices = 2048, 4
    shapes = dict.fromkeys("qkv", (1, tokens, 4, 32)) | dict.fromkeys(scalars, (1, tokens, 4))
    gradient = jax.grad(lambda arrays: jnp.sum(jnp.sin(op(**arrays)[0])))
    mesh = jax.make_mesh((devices,), ("context",), (AxisType.Auto,), devices=jax.devices()[:devices])
    found = []
    for place in (None, NamedSharding(mesh, P(None, "context"))):
        arrays = {name: jax.ShapeDtypeStruct(shape, "float32", sharding=place) for name, shape in shapes.items()}
        with jax.set_mesh(mesh) if place is not None else jax.named_scope("one"):
            program = jax.jit(gradient).lower(arrays).compile()
        found.append((program.as_text(), program.memory_analysis().temp_size_in_bytes))
    (one, held), (many, held_by_each) = found
    before, after = (read_program(text, mesh) for text in (one, many))
    assert before.flops / devices <= after.flops <= most * before.flops / devices
    assert held_by_each <= 1.5 * held / devices
    assert not collectives_in_loops(many)
    assert {"all-gather"} & {c.kind for c in after.collectives} == set()


@pytest.mark.parametrize("op", [mf.delta_rule, mf.linear_attention, mf.softmax_attention, mf.deltaformer])
def test_kernels_run_on_each_shard(op):
    """A program for TPUs calls the kernels with the tokens, or the heads, of one device."""
    mesh = AbstractMesh(
        (4,), ("context",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice("TPU v5p", 1, "tpu")
    )
    x = jax.ShapeDtypeStruct((1, 256, 4, 128), "bfloat16", sharding=NamedSharding(mesh, P(None, "context")))
    more = () if op is not mf.delta_rule else (jax.ShapeDtypeStruct((1, 256, 4), "bfloat16", sharding=x.sharding),)

    def gradient(*arrays):
        return jax.grad(lambda *arrays: jnp.sum(op(*arrays)[0].astype("float32")), argnums=(0, 1, 2))(*arrays)

    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(gradient)(x, x, x, *more))
    assert text.count("pallas_call[") >= 2
    assert ("all_to_all" in text) == (op in (mf.softmax_attention, mf.deltaformer))


def test_where_time_is_divided():
    seen = []
    mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        seen += [time_shards(8), time_shards(6)]
        inner = lambda x: (seen.append(time_shards(8)), x)[1]  # noqa: E731
        jax.jit(jax.shard_map(inner, in_specs=P("context"), out_specs=P("context"))).lower(jnp.ones(4))
    assert seen == [(("context",), 4), None, None]
    # On an Explicit mesh the name says nothing: time is divided where the arguments have it.
    with jax.set_mesh(jax.make_mesh((2, 4), ("seq", "context"))):
        for spec in (P("context"), P(None, "seq")):
            q = jax.device_put(jnp.ones((4, 8, 1, 4)), spec)
            text = jax.jit(lambda q: mf.linear_attention(q, q, q)[0]).lower(q).as_text()
            assert ("collective_permute" in text) == (spec[0] is None)
    assert time_shards(8) is None


def test_refusals():
    mesh, time = mesh_over_time("Auto", 2, 4)
    x, w = jnp.ones((4, 8, 2)), jnp.ones((2, 2))
    with (
        jax.set_mesh(mesh),
        pytest.raises(NotImplementedError, match="rnn cannot divide time .* 4 devices .*'context'"),
    ):
        mf.rnn(x, w, w, jnp.ones(2))
    with jax.set_mesh(mesh):
        # A step of decoding is not divided.
        assert mf.rnn(x[:, :1], w, w, jnp.ones(2))[0].shape == (4, 1, 2)
