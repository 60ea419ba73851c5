"""Layers on an Explicit mesh of eight devices: values, gradients by inputs and parameters, shardings of results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.core.segments import find_segments
from memformer.layers import (
    AdditiveAttention,
    DecoderBlock,
    Dtypes,
    Embedding,
    LayerNorm,
    LearnedPositions,
    MixtureOfExperts,
    RecurrentStack,
    RMSNorm,
    ShortConvolution,
    TransformerShape,
    build_memory,
)
from tests.modules import random_module
from tests.numeric import FORWARD, assert_close

B, T, D = 4, 6, 8
IDS = np.array([[1, 1, 1, 2, 2, 0]] * B, np.int32)
RULES = (("embed", None), ("mlp", "tensor"), ("heads", "tensor"), ("vocab", "tensor"), ("experts", None))
ACTIVATIONS = (("activation_batch", "data"), ("activation_mlp", "tensor"))


def same():
    return {"dtypes": Dtypes(), "rngs": nnx.Rngs(0)}


def attend(layer, x):
    return layer(x[:, 0], x, layer.prepare(x))


def decode(block, x):
    """Two calls: the cache of the first is an argument of the second."""
    _, state, _ = block(x[:, :3], block.start(x, capacity=T))
    return block(x[:, 3:], state)


# A function that makes the module (collecting tests must not compile), its use, and the sharding of the first result.
# tests/models/test_sharding.py packs a delta rule.
LAYERS = {
    "packed Mamba-3": (
        lambda: build_memory("mamba3", D, heads=2, rngs=nnx.Rngs(0)),
        lambda layer, x: layer(x, segment_ids=IDS),
        ("data",),
    ),
    "grouped attention": (
        lambda: build_memory("softmax_attention", D, heads=4, options={"groups": 2}, rngs=nnx.Rngs(0)),
        lambda layer, x: layer(x[:, 3:], state=layer(x[:, :3])[1]),
        ("data",),
    ),
    "convolution": (
        lambda: ShortConvolution(D, 3, **same()),
        lambda layer, x: layer(x, segments=find_segments(IDS, {})),
        ("data", None, "tensor"),
    ),
    "experts": (
        lambda: MixtureOfExperts(D, experts=3, active=2, hidden=4, **same()),
        lambda layer, x: layer(x),
        ("data",),
    ),
    "recurrent": (
        lambda: RecurrentStack("lstm", D, 4, bidirectional=True, rngs=nnx.Rngs(0)),
        lambda layer, x: layer(x, segment_ids=IDS),
        ("data",),
    ),
    "additive attention": (lambda: AdditiveAttention(D, D, 4, **same()), attend, ("data",)),
    "decoder block": (lambda: DecoderBlock(TransformerShape(width=D, heads=2), rngs=nnx.Rngs(0)), decode, ("data",)),
    "embedding": (
        lambda: Embedding(D, D, **same()),
        lambda layer, x: layer.attend(layer(IDS) + x),
        ("data", None, "tensor"),
    ),
    "positions": (lambda: LearnedPositions(D, 9, **same()), lambda layer, x: layer(x, IDS), ("data",)),
    "norms": (
        lambda: nnx.List([RMSNorm(D, **same()), LayerNorm(D, **same())]),
        lambda norms, x: norms[0](norms[1](x)),
        ("data",),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_an_explicit_mesh(name):
    make, use, spec = LAYERS[name]
    graph, parameters = nnx.split(random_module(make))
    x = np.random.default_rng(1).standard_normal((B, T, D)).astype("float32")

    def run(parameters, x):
        results = jax.tree.leaves(use(nnx.merge(graph, parameters), x))
        return jnp.sum(jnp.sin(results[0])), results[0]

    call = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))
    gradients, want = call(parameters, x)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    rules = (*RULES, *ACTIVATIONS) if name == "experts" else RULES
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        placed, rows = (
            jax.device_put(parameters, nnx.get_named_sharding(parameters, mesh)),
            jax.device_put(x, jax.P("data")),
        )
        program = call.lower(placed, rows).compile()
        got_gradients, got = program(placed, rows)
    if name == "experts":
        # The compiler gathers the operand of lax.top_k from all devices.
        assert "all-gather" not in program.as_text()
    assert_close(got, want, FORWARD["float32"])
    # An absolute bound, because the gradient by a bias that all keys share is zero but for rounding.
    for one, other in zip(jax.tree.leaves(got_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
    assert got.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P(*spec)), got.ndim)
    assert got_gradients[1].sharding.spec[0] == "data"
