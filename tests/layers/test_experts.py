"""The chosen experts alone, on one device and shared out over devices: values, gradients, weights held, work done."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from memformer.layers import Dtypes, MixtureOfExperts
from memformer.layers.experts import _block_rows, _blocks, apply_experts
from memformer.layers.sharding import RULES, partition_spec
from memformer.training.program import read_program
from tests.modules import random_module
from tests.numeric import FORWARD, assert_close

B, T, D, F, EXPERTS, ACTIVE = 8, 12, 16, 24, 8, 3
X = np.random.default_rng(1).standard_normal((B, T, D)).astype("float32")
# Axes of the mesh and their sizes: tokens exchanged, with weights gathered, with time and hidden units divided too.
MESHES = [
    ({"data": 2, "expert": 4}, AxisType.Explicit),
    ({"fsdp": 2, "expert": 2, "tensor": 2}, AxisType.Explicit),
    ({"expert": 2, "context": 2, "tensor": 2}, AxisType.Auto),
]


def build(dispatch):
    options = {"experts": EXPERTS, "active": ACTIVE, "hidden": F, "shared_hidden": 8, "dispatch": dispatch}
    return nnx.split(random_module(lambda: MixtureOfExperts(D, **options, dtypes=Dtypes(), rngs=nnx.Rngs(0))))


@functools.cache
def call(dispatch):
    """Parameters, and the jitted output and gradients of loss and router loss by parameters and inputs."""
    graph, parameters = build(dispatch)

    def loss(parameters, x):
        y, aux = nnx.merge(graph, parameters)(x)
        return jnp.mean(jnp.sin(y)) + aux["moe_balance"], (y, aux)

    return parameters, jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@functools.cache
def expected():
    parameters, gradients = call("dense")
    return gradients(parameters, X)


def test_equal_to_every_expert():
    """An expert without tokens, and experts with several blocks."""
    parameters, gradients = call("ragged")
    assert_close(gradients(parameters, X), expected(), 1e-5)

    @jax.jit
    def parts(chosen):
        blocks = _blocks(chosen, 3, 16)
        return blocks.count, blocks.last, blocks[3]

    count, last, (expert, token, _, here) = parts(np.array([[0, 2]] * 20, np.int32))
    assert int(count) == 4 and last.tolist() == [2, 2, 4]
    assert expert == 2 and token[:4].tolist() == [16, 17, 18, 19] and here[:, 0].tolist() == [True] * 4 + [False] * 12


def test_padding_and_forward_mode():
    """A token of NaN reaches no other; forward mode takes the form that computes every expert."""
    layers = [nnx.merge(*build(dispatch)) for dispatch in ("ragged", "dense")]

    @jax.jit
    def run(x):
        tangents = [jax.jvp(lambda x, layer=layer: layer(x)[0], (x,), (jnp.ones_like(x),))[1] for layer in layers]
        return layers[0](jnp.asarray(x).at[0, 0].set(jnp.nan))[0], tangents

    y, (ragged, dense) = run(X[:1])
    assert np.isnan(y[0, 0]).all() and not np.isnan(y[0, 1:]).any()
    assert_close(ragged, dense, FORWARD["float32"])


@pytest.mark.parametrize(("sizes", "kind"), MESHES, ids=[" ".join(sizes) for sizes, _ in MESHES])
def test_experts_over_devices(sizes, kind):
    """Each device holds its share of the experts, and gathers no weights of the others."""
    parameters, gradients = call("ragged")
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))

    def place(x, names):
        return jax.device_put(x, NamedSharding(mesh, partition_spec(names, x.shape, mesh)))

    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        placed = jax.tree.map(
            lambda v: v.replace(place(v.get_value(), v.get_metadata().get("out_sharding"))),
            parameters,
            is_leaf=lambda v: isinstance(v, nnx.Variable),
        )
        x = place(X, ("activation_batch", "activation_time", None))
        program = gradients.lower(placed, x).compile()
        assert_close(program(placed, x), expected(), 1e-5)
    held, text = EXPERTS // sizes["expert"], program.as_text()
    assert f"f32[{held},{D // sizes.get('fsdp', 1)},{F // sizes.get('tensor', 1)}]" in text
    assert f"f32[{EXPERTS},{D},{F}]" not in text and f"f32[{EXPERTS},{D},{F // sizes.get('tensor', 1)}]" not in text


def test_work_and_bytes():
    """The program multiplies blocks of rows of one expert; tokens are gathered and results scattered once."""
    mesh = jax.make_mesh((4,), ("expert",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    tokens, active = 4096, 2
    sides = [(4, tokens // 4, D), *((4, tokens // 4, active),) * 2, *((EXPERTS, D, F),) * 2, (EXPERTS, F, D)]
    dtypes = [jnp.float32, jnp.int32, *(jnp.float32,) * 4]
    place = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, jax.P("expert")))
    arrays = [place(*each) for each in zip(sides, dtypes, strict=True)]
    with jax.set_mesh(mesh):
        program = read_program(jax.jit(apply_experts).lower(*arrays).compile().as_text(), mesh)
    rows = _block_rows(tokens * active, EXPERTS)
    # the loop over blocks, whose length depends on the routing, is counted once
    assert program.flops == 3 * 2 * rows * D * F
    chosen = np.random.default_rng(0).integers(0, EXPERTS, (tokens, 1), np.int32)
    both = np.concatenate([chosen, (chosen + 1) % EXPERTS], axis=1)
    count = jax.jit(lambda both: _blocks(both, EXPERTS, rows).count)(both)
    assert int(count) * rows <= 1.2 * tokens * active
    found = {c.kind: c.bytes for c in program.collectives}
    # tokens with their choices and weights, and the results
    assert found["all-gather"] == 4 * tokens * (D + 2 * active)
    assert sum(found.values()) - found["all-gather"] == 4 * tokens * D
