"""Functions without rows in specs.py on Explicit meshes of eight devices; meshes of mixed kinds and shard_map.

tests/models/test_sharding.py has the GRU.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import memformer as mf
from memformer.core.sharding import keep_shardings, mesh_axes
from memformer.core.types import Array, Float
from memformer.ops import addressing, associative
from tests.numeric import assert_close

B, T, D = 4, 5, 6


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype("float32")


def cell(op, gates, *rest):
    return lambda x, ids: op(x, random(D, gates * D), random(D, gates * D), random(gates * D), *rest, segment_ids=ids)[
        0
    ]


def neural_turing_step(x, ids):
    weights, memory = jax.nn.softmax(x[:, :2]), jnp.sin(random(B, D, D) + x[:, :1])
    heads = jnp.mean(x[:, :2], axis=-1)
    focus = addressing.Focus(x[:, 2:4], heads, jax.nn.sigmoid(heads), jax.nn.softmax(x[:, :2, :3]), 1 + heads**2)
    weights = addressing.address(focus, weights, memory)
    erase, add = jax.nn.sigmoid(x[:, 2:4]), x[:, 3:5]
    return addressing.read_slots(weights, addressing.write_slots(memory, weights, erase, add))


def associative_step(x, ids):
    phi = associative.dpfp(x)
    memory = associative.AssociativeMemory(jnp.zeros((B, 6 * D, D)), jnp.zeros((B, 6 * D)))
    memory = associative.associative_write(memory, phi, x, jax.nn.sigmoid(x[..., 0]))
    return associative.associative_read(memory, jnp.flip(phi, 1))


def decode(x, ids):
    """Two calls with a fixed cache, the first of several tokens."""
    q, cache = x.reshape(B, T, 2, D // 2), None
    sizes = {"batch": B, "capacity": 8, "groups": 2, "key_width": D // 2, "value_width": D // 2}
    cache = mf.init_cache("softmax_attention", **sizes)
    outputs = []
    for part in (slice(0, 4), slice(4, 5)):
        output, cache = mf.softmax_attention(q[:, part], q[:, part], q[:, part], initial_state=cache)
        outputs.append(output)
    return jnp.concatenate(outputs, axis=1)


def prefill(x, ids):
    """A packed call from caches per document."""
    q = x.reshape(B, T, 2, D // 2)
    sizes = {"batch": B, "capacity": 4, "groups": 2, "key_width": D // 2, "value_width": D // 2}
    cache = mf.init_cache("softmax_attention", documents=2, decay_heads=2, **sizes)
    given = {"segment_ids": ids, "decay": -(x[..., :2] ** 2), "initial_state": cache}
    output, cache = mf.softmax_attention(q, q, q, **given)
    return output + jnp.sum(cache.v, (1, 2))[:, None]


FUNCTIONS = {
    "rnn": cell(mf.rnn, 1),
    "lstm": cell(mf.lstm, 4),
    "addressing": neural_turing_step,
    "associative": associative_step,
    "fixed cache": decode,
    "caches per document": prefill,
}


IDS = np.array([[1, 1, 0, 2, 2]] * B, np.int32)


def run(name, x, ids):
    """Output and gradient of a function."""
    loss = lambda x: (jnp.sum(jnp.sin(output := FUNCTIONS[name](x, ids))), output)  # noqa: E731
    (_, output), gradient = jax.value_and_grad(loss, has_aux=True)(x)
    return output, gradient


@functools.cache
def on_one_device(name):
    return jax.device_get(jax.jit(functools.partial(run, name))(random(B, T, D), jnp.asarray(IDS)))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, AxisType.Explicit) for name in FUNCTIONS),
        *((name, AxisType.Auto) for name in ("lstm", "fixed cache")),
    ],
)
def test_batch_stays_sharded(name, kind):
    """Every function on an Explicit mesh, a cell and a cache on an Auto mesh too."""
    x, ids = random(B, T, D), jnp.asarray(IDS)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        program = jax.jit(functools.partial(run, name)).lower(*jax.device_put((x, ids), P("data"))).compile()
        got = program(*jax.device_put((x, ids), P("data")))
    assert not re.search(r"all-gather|all-to-all|collective-permute", program.as_text())
    assert_close(got, on_one_device(name), 2e-6, name)
    assert all(y.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), y.ndim) for y in got)


def call(q):
    return mf.delta_rule(q, mf.l2norm(q), q, jnp.full_like(q[..., 0], 0.5), decay=-jnp.ones_like(q[..., 0]))


def gradient(q):
    return jax.grad(lambda q: jnp.sum(jnp.sin(call(q)[0])))(q)


@functools.cache
def of_one_device():
    """Output, state and gradient of `call`."""
    return jax.device_get(jax.jit(lambda q: (*call(q), gradient(q)))(random(B, T, 2, D)))


@pytest.mark.parametrize("kinds", [("Auto", "Explicit"), ("Explicit", "Auto")])
def test_mesh_of_both_kinds(kinds):
    q = random(B, T, 2, D)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=tuple(AxisType[kind] for kind in kinds))
    with jax.set_mesh(mesh):
        output, state = jax.jit(call)(jax.device_put(q, NamedSharding(mesh, P("data", None, "tensor"))))
    assert_close((output, state), of_one_device()[:2], 2e-6)
    assert output.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "tensor")), 4)
    assert state.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "tensor")), 4)


@pytest.mark.parametrize("manual", [{"data"}, {"data", "tensor"}])
def test_inside_shard_map_on_an_explicit_mesh(manual):
    """Other axes than the manual ones stay Explicit."""
    q = random(B, T, 2, D)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    heads = "tensor" if "tensor" in manual else None
    with jax.set_mesh(mesh):
        sharded = jax.device_put(q, P("data", None, "tensor"))
        spec = P("data", None, heads)
        got = jax.jit(jax.shard_map(gradient, in_specs=spec, out_specs=spec, axis_names=manual))(sharded)
    assert_close(got, of_one_device()[2], 2e-6)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "tensor")), 4)


def test_letters_take_the_axes_of_the_first_sharded_argument():
    seen = []

    @keep_shardings
    def function(
        x: Float[Array, "B T"], y: Float[Array, "B H"] | None = None
    ) -> tuple[Float[Array, "T B"], Float[Array, "B H"]]:
        seen.append((mesh_axes("B"), mesh_axes("H"), jax.typeof(x).sharding.mesh.are_all_axes_auto))
        return x.T, jnp.zeros((x.shape[0], 2))

    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    with jax.set_mesh(mesh):
        x, y = jax.device_put(jnp.ones((4, 3)), P()), jax.device_put(jnp.ones((4, 2)), P("data", "tensor"))
        results = jax.jit(function)(x, y)
    assert [z.sharding.spec for z in results] == [P(None, "data"), P("data", "tensor")]
    assert seen == [("data", "tensor", True)]
    assert mesh_axes("B") is None
    assert function(jnp.ones((4, 3)))[0].shape == (3, 4)
