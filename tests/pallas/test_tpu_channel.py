"""Matrix memories with a decay per key channel on TPU in Pallas' interpreter, against the recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memformer as mf
from tests.numeric import assert_close, relative_rms
from tests.ops.test_ops import cast
from tests.pallas.test_tpu import TPU

LENGTH, HEADS, WIDTH, VALUE = 37, 2, 8, 4


def arguments(rng, groups, *, erase, length=LENGTH, width=WIDTH, value=VALUE):
    """Arrays with decays down to -inf, alone, for some channels and for most of a chunk."""

    def unit(*shape):
        x = rng.standard_normal(shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    decay = -np.exp(1.5 * rng.standard_normal((1, length, HEADS, width)) - 1)
    decay[:, 3] = -np.inf
    decay[:, 9, 0, :3] = -1e7
    decay[:, 18:29, 1] = -30.0
    arrays = {
        "q": rng.standard_normal((1, length, groups, width)),
        "k": unit(1, length, groups, width),
        "v": rng.standard_normal((1, length, HEADS, value)),
        "decay": decay,
    }
    if erase:
        arrays |= {
            "beta": rng.uniform(0.0, 2.0, (1, length, HEADS)),
            "alpha": rng.uniform(0.0, 1.0, (1, length, HEADS)),
            "w": unit(1, length, groups, width),
        }
    return arrays


def results(op, arrays, state, implementation, ids, chunk_size=16):
    """Output, state and the gradients of every array and of the initial state."""

    def loss(arrays, state):
        options = {"segment_ids": ids, "implementation": implementation, "chunk_size": chunk_size}
        output, end = op(**arrays, initial_state=state, **options)
        wide = output.astype(end.dtype)
        return jnp.sum(jnp.sin(wide)) + jnp.sum(end * end), (wide, end)

    (_, seen), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(arrays, state)
    return jax.tree.map(np.asarray, (seen, gradients))


@pytest.mark.parametrize(
    ("op", "groups", "packed"), [(mf.delta_rule, 1, True), (mf.linear_attention, 2, False)], ids=["delta", "linear"]
)
def test_against_recurrence(op, groups, packed, interpreter):
    """Odd lengths, three chunks, shared key heads, segments, an erase vector, and tokens that forget everything."""
    rng = np.random.default_rng(3)
    arrays = arguments(rng, groups, erase=op is mf.delta_rule)
    state = rng.standard_normal((1, HEADS, WIDTH, VALUE))
    ids = np.repeat([1, 2, 0, 5], [11, 9, 2, 15])[None] if packed else None
    got = results(op, cast(arrays, "float32"), cast(state, "float32"), "pallas", ids)
    with jax.enable_x64(True):
        exact = cast(cast(arrays, "float32"), "float64"), cast(cast(state, "float32"), "float64")
        want = results(op, *exact, "recurrent", ids)
    assert_close(got, want, 2e-6)


def test_hard_keys(interpreter):
    """Equal keys and strength 2 over a whole chunk in bfloat16, with an erase vector of its own and decays per head."""
    rng = np.random.default_rng(4)
    length = 64
    k = np.repeat(rng.standard_normal((1, 1, 1, WIDTH)), length, axis=1)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {
        "q": rng.standard_normal((1, length, 1, WIDTH)),
        "k": k,
        "v": rng.standard_normal((1, length, 1, VALUE)),
    }
    arrays = cast(arrays, "bfloat16") | cast({"beta": np.full((1, length, 1), 2.0)}, "float32")
    arrays |= {"w": arrays["k"], "decay": jnp.asarray(-0.01 * rng.uniform(0, 1, (1, length, 1)), "float32")}

    def run(arrays, implementation):
        output, state = mf.delta_rule(**arrays, implementation=implementation, chunk_size=64)
        return output, state

    got = jax.jit(run, static_argnums=1)(arrays, "pallas")
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, jax.jit(run, static_argnums=1)(cast(arrays, "float64"), "recurrent"))
    assert relative_rms(got[0].astype("float32"), want[0]) < 5e-3
    assert relative_rms(got[1], want[1]) < 5e-3


def test_a_tpu_takes_the_kernels():
    """By default, for a decay per channel, an erase vector and a write strength, each alone."""
    x, scalar = jnp.ones((1, 32, 2, 8)), jnp.ones((1, 32, 2))
    calls = {
        "channel_linear_attention": lambda: mf.linear_attention(x, x, x, decay=-x),
        "channel_delta_rule": lambda: mf.delta_rule(x, x, x, scalar, decay=-x),
        "channel_delta_rule_forward": lambda: mf.delta_rule(x, x, x, scalar, w=x),
        "memformer_channel_delta_rule": lambda: mf.delta_rule(x, x, x, scalar, alpha=scalar, decay=-scalar),
    }
    with jax.sharding.use_abstract_mesh(TPU):
        for name, call in calls.items():
            assert name in str(jax.make_jaxpr(call)())
