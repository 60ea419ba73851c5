"""Matrix memories with a decay per key channel on GPU in Pallas' interpreter, against the recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memformer as mf
from tests.numeric import assert_close
from tests.ops.test_ops import cast
from tests.pallas.test_gpu import interpreter, interprets  # noqa: F401
from tests.pallas.test_tpu_channel import HEADS, VALUE, WIDTH, arguments, results

LENGTH = 70


@interprets
@pytest.mark.parametrize(
    ("op", "groups", "packed"), [(mf.delta_rule, 1, True), (mf.linear_attention, 2, False)], ids=["delta", "linear"]
)
def test_against_recurrence(op, groups, packed, interpreter):  # noqa: F811
    """An odd length, two chunks, shared key heads, segments, an erase vector, and tokens that forget everything."""
    rng = np.random.default_rng(3)
    arrays = arguments(rng, groups, erase=op is mf.delta_rule, length=LENGTH)
    scalars = ("decay", "beta", "alpha")
    arrays = {name: cast(x, "float32" if name in scalars else "bfloat16") for name, x in arrays.items()}
    state = cast(rng.standard_normal((1, HEADS, WIDTH, VALUE)), "float32")
    ids = np.repeat([1, 2, 0, 5], [11, 9, 2, LENGTH - 22])[None] if packed else None
    got = results(op, arrays, state, "pallas", ids, 64)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: cast(np.asarray(x, np.float64), "float64"), (arrays, state))
        want = results(op, *exact, "recurrent", ids, 64)
    assert_close(got, want, 1e-2)


@interprets
def test_hard_keys(interpreter):  # noqa: F811
    """Equal keys at strength 2 for two chunks, with weak decays per channel."""
    rng = np.random.default_rng(4)
    length = 128
    k = np.repeat(rng.standard_normal((1, 1, 1, WIDTH)), length, axis=1)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {"q": rng.standard_normal((1, length, 1, WIDTH)), "k": k, "v": rng.standard_normal((1, length, 1, VALUE))}
    arrays = cast(arrays, "bfloat16") | {"beta": jnp.full((1, length, 1), 2.0, "float32")}
    arrays |= {"decay": cast(-0.01 * rng.uniform(0, 1, (1, length, 1, WIDTH)), "float32")}
    got = mf.delta_rule(**arrays, implementation="pallas")
    with jax.enable_x64(True):
        wide = cast(jax.tree.map(lambda x: np.asarray(x, np.float64), arrays), "float64")
        want = jax.tree.map(np.asarray, mf.delta_rule(**wide, implementation="recurrent"))
    assert_close(jax.tree.map(lambda x: np.asarray(x, np.float64), got), want, 5e-3)
