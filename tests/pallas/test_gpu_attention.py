"""DeltaFormer's and attention's GPU kernels in Pallas' GPU interpreter: races are errors, fresh memory is NaN.

As in test_gpu.py: before jax 0.11 the program made for a GPU is looked at only.
"""

import jax.numpy as jnp
import pytest

import memformer as mf
from memformer.pallas.gpu import tuning
from tests.numeric import assert_close
from tests.ops import test_ops as suite
from tests.pallas.test_gpu import interpreter, interprets
from tests.pallas.test_tpu_attention import evaluate, given, oracle

__all__ = ["interpreter"]


@interprets
@pytest.mark.parametrize("name", ["deltaformer_linear_softmax", "softmax_attention"])
def test_packed_against_oracle(name, interpreter):
    arrays, state = suite.inputs(name)
    got, _ = suite.evaluate(
        name, "pallas", suite.cast(arrays, "bfloat16"), suite.cast(state, "float32"), suite.packed_ids()[0]
    )
    assert got["output"].dtype == jnp.bfloat16
    suite.check(got, suite.oracle(name, "bfloat16"), "bfloat16", name)


@interprets
@pytest.mark.parametrize(
    ("write", "read"),
    [("softmax", "relu"), ("relu", mf.Kernel("exp", scale=0.5)), (mf.Kernel("round", decimals=2), "linear")],
    ids=lambda kernel: getattr(kernel, "name", kernel),
)
def test_kernels(write, read, interpreter, monkeypatch):
    """Each kernel in each place, two parts of one block each, two warpgroups; the last rows are padding."""
    monkeypatch.setattr(tuning, "PART", 128)
    arrays, options = given(130, dtype="bfloat16"), {"write_kernel": write, "read_kernel": read}
    got, gradients = evaluate(arrays, "pallas", **options)
    want, want_gradients = oracle(arrays, **options)
    assert_close(got, want, 2e-2, "output and u")
    assert_close(gradients, want_gradients, 6e-2, "gradient")
