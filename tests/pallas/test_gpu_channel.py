"""Matrix memories with a decay per key channel on GPU in Pallas' interpreter, against the recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memformer as mf
from memformer.pallas.gpu import tuning
from tests.numeric import assert_close
from tests.ops.test_ops import cast
from tests.pallas.test_gpu import interpreter, interprets  # noqa: F401
from tests.pallas.test_tpu_channel import HEADS, WIDTH, arguments, results

LENGTH = 70


# Key heads, key and value channels (100 padded to 128: two blocks of them), whether packed, dtype. Of 136 keys, padded
# to 256, scaled k and w share their blocks.
SIZES = {
    "delta": (mf.delta_rule, 1, 72, 4, True, "bfloat16"),
    "linear": (mf.linear_attention, 2, 8, 100, False, "float16"),
    "wide": (mf.delta_rule, 2, 136, 4, True, "float16"),
}


@interprets
@pytest.mark.parametrize("name", SIZES)
def test_against_recurrence(name, interpreter, monkeypatch):  # noqa: F811
    """Outputs, states and all gradients: an odd length, two chunks, shared key heads, segments, an erase vector, and
    tokens that forget everything; one of them with blocks of value columns as for many heads. float16 has three more
    digits in outputs and states.
    """
    if name == "delta":
        monkeypatch.setattr(tuning, "MULTIPROCESSORS", 0)
    op, groups, width, value, packed, dtype = SIZES[name]
    rng = np.random.default_rng(3)
    sizes = {"length": LENGTH, "width": width, "value": value}
    arrays = arguments(rng, groups, erase=op is mf.delta_rule, **sizes)
    scalars = ("decay", "beta", "alpha")
    arrays = {name: cast(x, "float32" if name in scalars else dtype) for name, x in arrays.items()}
    state = cast(rng.standard_normal((1, HEADS, width, value)), "float32")
    ids = np.repeat([1, 2, 0, 5], [11, 9, 2, LENGTH - 22])[None] if packed else None
    got = results(op, arrays, state, "pallas", ids, 64)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: cast(np.asarray(x, np.float64), "float64"), (arrays, state))
        want = results(op, *exact, "recurrent", ids, 64)
    assert_close(got, want, 5e-3)
    if dtype == "float16":
        assert_close(got[0], want[0], 5e-4)


@interprets
def test_states_beyond_float16(interpreter):  # noqa: F811
    """A state of a million, which float16 does not hold, and a decay per head."""
    rng = np.random.default_rng(5)
    arrays = {name: cast(rng.standard_normal((1, 66, 1, 8)), "float16") for name in "kv"}
    arrays |= {"q": cast(1e-3 * rng.standard_normal((1, 66, 1, 8)), "float16"), "decay": jnp.full((1, 66, 1), -0.02)}
    state = cast(1e6 * rng.standard_normal((1, 1, 8, 8)), "float32")
    got = mf.linear_attention(**arrays, initial_state=state, implementation="pallas")
    with jax.enable_x64(True):
        wide = cast(jax.tree.map(lambda x: np.asarray(x, np.float64), (arrays, state)), "float64")
        want = mf.linear_attention(**wide[0], initial_state=wide[1], implementation="recurrent")
    assert got[0].dtype == jnp.float16
    assert_close(got, jax.tree.map(np.asarray, want), 5e-4)


@interprets
def test_hard_keys(interpreter):  # noqa: F811
    """Equal keys at strength 2 for two chunks, with weak decays per channel, and the gradients."""
    rng = np.random.default_rng(4)
    length, value = 128, 4
    k = np.repeat(rng.standard_normal((1, 1, 1, WIDTH)), length, axis=1)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {"q": rng.standard_normal((1, length, 1, WIDTH)), "k": k, "v": rng.standard_normal((1, length, 1, value))}
    arrays = cast(arrays, "bfloat16") | {"beta": jnp.full((1, length, 1), 2.0, "float32")}
    arrays |= {"decay": cast(-0.01 * rng.uniform(0, 1, (1, length, 1, WIDTH)), "float32")}
    # One cotangent for both: that of a rounded output would differ by as much as the tolerance allows.
    cotangent = cast(rng.standard_normal((1, length, 1, value)), "bfloat16")

    def run(arrays, implementation):
        def loss(arrays):
            output, state = mf.delta_rule(**arrays, implementation=implementation)
            weighted = output * cotangent.astype(output.dtype)
            return jnp.sum(weighted.astype(state.dtype)) + jnp.sum(state), (output, state)

        (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return jax.tree.map(lambda x: np.asarray(x, np.float64), (outputs, gradients))

    got = run(arrays, "pallas")
    with jax.enable_x64(True):
        want = run(cast(jax.tree.map(lambda x: np.asarray(x, np.float64), arrays), "float64"), "recurrent")
    assert_close(got, want, 5e-3)
