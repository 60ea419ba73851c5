"""GPU kernels of DeltaFormer and softmax attention in Pallas' GPU interpreter; see test_gpu.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import memformer as mf
from memformer.pallas.gpu import tuning
from tests.numeric import assert_close
from tests.ops import test_ops as suite
from tests.pallas.test_gpu import H200, interpreter, interprets
from tests.pallas.test_gpu_decoding import on_explicit_mesh
from tests.pallas.test_tpu import keys
from tests.pallas.test_tpu_attention import WINDOWS, evaluate, forgetting_attention, given, oracle, windowed

__all__ = ["interpreter"]


@interprets
@pytest.mark.parametrize("name", ["deltaformer_decay", "softmax_attention"])
def test_packed_against_oracle(name, interpreter):
    arrays, state = suite.inputs(name)
    got, _ = suite.evaluate(
        name, "pallas", suite.cast(arrays, "bfloat16"), suite.cast(state, "float32"), suite.packed_ids()[0]
    )
    assert got["output"].dtype == jnp.bfloat16
    suite.check(got, suite.oracle(name, "bfloat16"), "bfloat16", name)


# Kernels of write and read, tokens (two spans of two tiles of rows with padding, or one), query heads, dtype, options,
# and channels of keys and of values. The window leaves out a tile; a segment lies in both spans. A softmax read has a
# sink.
KERNELS = [
    ("softmax", "softmax", 130, 1, "bfloat16", {}, (136, 4)),
    ("softmax", "softmax", 135, 1, "bfloat16", {"segment_ids": np.repeat([1, 0, 2], [50, 5, 80])[None]}, (72, 4)),
    ("softmax", "softmax", 130, 1, "float16", {}, (8, 4)),
    ("relu", mf.Kernel("exp", scale=0.5), 40, 2, "bfloat16", {}, (8, 4)),
    (mf.Kernel("round", decimals=2), "softmax", 200, 1, "bfloat16", {"window": 60}, (8, 4)),
    ("linear", mf.Kernel("exp", scale=0.5), 70, 1, "float16", {}, (136, 160)),
]


@interprets
@pytest.mark.parametrize(
    ("write", "read", "length", "heads", "dtype", "options", "widths"),
    KERNELS,
    ids=["softmax", "segments", "float16", "relu", "round", "float16 sums"],
)
def test_kernels(write, read, length, heads, dtype, options, widths, interpreter, monkeypatch):
    """Similarity kernels of every kind, as write and as read kernel, with a decay; float16 has three more digits."""
    monkeypatch.setattr(tuning, "SPANS", ((None, 128),))
    arrays = given(length, (heads, 1), *widths, dtype=dtype, decay=True)
    most = 2e-2 if dtype == "bfloat16" else 2e-3
    options = {"write_kernel": write, "read_kernel": read, **options}
    if read == "softmax":
        arrays["sinks"] = jnp.array([0.5])
    got, gradients = evaluate(arrays, "pallas", **options)
    want, want_gradients = oracle(arrays, **options)
    assert_close(got, want, most, "output and u")
    assert_close(gradients, want_gradients, most, "gradient")


@interprets
def test_forgetting_attention(interpreter):
    """Decay and sinks over a cache: two blocks of two tiles of rows."""
    arrays, state, run = forgetting_attention(150, "bfloat16")
    got = run(arrays, suite.cast(state, "float32"), "pallas")
    with jax.enable_x64(True):
        want = run(suite.cast(jax.tree.map(np.asarray, arrays), "float64"), suite.cast(state, "float64"), "recurrent")
    assert_close(got[0], want[0], 1e-2, "output")
    assert_close(got[1], want[1], 2e-2, "gradient")


# The case of `WINDOWS` that runs in float16.
FLOAT16 = "over a cache"


@interprets
@pytest.mark.parametrize("case", WINDOWS)
def test_windows_and_encoders(case, interpreter):
    """A window and later tokens, in tiles that are partly or wholly out of sight; float16 has three more digits."""
    dtype, most = ("float16", 2e-3) if case == FLOAT16 else ("bfloat16", 1e-2)
    arrays, held, run = windowed(case, dtype, scale=4)
    got = run(arrays, held, "pallas")
    with jax.enable_x64(True):
        want = run(*suite.cast(jax.tree.map(np.asarray, (arrays, held)), "float64"), "recurrent")
    assert_close(got[0], want[0], most, "output")
    assert_close(got[1], want[1], 2 * most, "gradient")


@interprets
def test_spans_by_heads(interpreter, monkeypatch):
    """Few heads have larger spans, and the same results."""
    assert [tuning.span_length(heads) for heads in (1, 4, 16, 17, 256)] == [1024, 1024, 1024, 512, 512]
    results = []
    for tokens in (128, 256):
        monkeypatch.setattr(tuning, "SPANS", ((None, tokens),))
        output, cache = mf.deltaformer(**given(130, dtype="bfloat16"), read_kernel="relu", implementation="pallas")
        results.append((output.astype("float32"), cache.u))
    assert_close(*results, 5e-3)


@pytest.mark.parametrize("mesh_of", ["arrays", "shard_map"])
def test_spans_on_several_devices(mesh_of, monkeypatch):
    """Every device writes its own rows span by span, both ways, also inside the caller's shard_map."""
    monkeypatch.setattr(tuning, "SPANS", ((None, 128),))
    mesh, arrays = on_explicit_mesh(**dict.fromkeys(("q", "k", "v"), (2, 130, 2, 64)))

    def run(arrays):
        return mf.deltaformer(**arrays, implementation="pallas")[0]

    if mesh_of == "shard_map":
        spec = jax.P("x", None, "y")
        run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(jax.grad(lambda arrays: jnp.sum(run(arrays).astype("float32"))))(arrays)
    assert [x.shape for x in program.out_avals] == [(2, 130, 2, 64)] * 3
    assert all(name in str(program) for name in ("memformer_write_forward", "memformer_write_backward"))


@interprets
def test_hard_keys(interpreter):
    """A linear write of 128 equal or nearly equal keys at beta 2, where a power series of A would reach 1e30."""
    length, options, kinds = 128, {"write_kernel": "linear", "read_kernel": "linear"}, ("identical", "close")
    one = given(length, width=32, value=16, dtype="bfloat16")
    arrays = {name: jnp.concatenate([x, x]) for name, x in one.items()}
    hard = [keys(kind, np.random.default_rng(3), length, 32)[:, None] for kind in kinds]
    arrays["k"] = suite.cast(np.stack(hard), "bfloat16")
    del arrays["w"], arrays["alpha"]
    arrays["beta"] = jnp.full((2, length, 1), 2.0, "float32")
    got, want = evaluate(arrays, "pallas", **options), oracle(arrays, **options)
    for row, kind in enumerate(kinds):
        assert_close(*(jax.tree.map(lambda x, row=row: x[row], x) for x in (got, want)), 2e-2, kind)


REFUSED = {
    "float32": ("float32", {}, "takes bfloat16"),
    "chunk": ("bfloat16", {"chunk_size": 32}, "takes chunk_size 64"),
    "precision": ("bfloat16", {"precision": "highest"}, "default precision only"),
    "width": ("bfloat16", {}, "at most 256 key channels"),
}


@pytest.mark.parametrize("op", [mf.softmax_attention, mf.deltaformer])
@pytest.mark.parametrize("why", REFUSED)
def test_refusals_say_why(why, op):
    dtype, options, message = REFUSED[why]
    x = jnp.zeros((1, 8, 2, 320 if why == "width" else 4), dtype)
    with jax.sharding.use_abstract_mesh(H200):
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(lambda: op(x, x, x, implementation="pallas", **options))
        # None falls back to an implementation that serves.
        assert "memformer_" not in str(jax.make_jaxpr(lambda: op(x, x, x, **options))())


def test_saved_for_backward():
    """Inputs, output, u in two parts and one log-sum-exp per row: nothing grows with the square of the length."""

    def saved(length):
        arrays = {name: jax.ShapeDtypeStruct(x.shape, "bfloat16") for name, x in given(length).items()}
        with jax.sharding.use_abstract_mesh(H200):
            leaves = jax.tree.leaves(
                jax.eval_shape(
                    lambda a: jax.vjp(lambda a: mf.deltaformer(**a, implementation="pallas")[0], a)[1], arrays
                )
            )
        return sum(x.size * x.dtype.itemsize for x in leaves) / length

    assert saved(8192) <= saved(4096)


# Calls, and what runs them on an H200 with implementation=None: cuDNN, our kernel, or the chunked form.
CUDNN, OURS = ("dot_product_attention_fwd", "dot_product_attention_bwd"), ("memformer_attention_",)
LIBRARY = {
    "causal": ({}, CUDNN),
    "encoder": ({"causal": False}, CUDNN),
    "window": ({"window": 7}, CUDNN),
    "segments": ({"segment_ids": np.ones((1, 192), np.int32)}, OURS),
    "sinks": ({"sinks": np.zeros(4, np.float32)}, OURS),
    "decay": ({"decay": np.zeros((1, 192, 4), np.float32)}, OURS),
    "window with a decay": ({"window": 7, "decay": np.zeros((1, 192, 4), np.float32)}, OURS),
    "chunk_size": ({"chunk_size": 64}, OURS),
    "precision": ({"precision": "highest"}, ()),
    "window of an encoder": ({"window": 7, "causal": False}, OURS),
    "no cuDNN": ({}, OURS),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_default_prefers_cudnn(name, monkeypatch):
    """cuDNN runs what it supports, forward and backward."""
    options, runs = LIBRARY[name]

    def version():
        if name == "no cuDNN":
            raise RuntimeError("cuDNN is not detected.")
        return 91000

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", version)

    def loss(q, k, v):
        return jnp.sum(mf.softmax_attention(q, k, v, **options)[0].astype("float32"))

    q, k, v = (jax.ShapeDtypeStruct((1, 192, heads, 64), "bfloat16") for heads in (4, 2, 2))
    with jax.sharding.use_abstract_mesh(H200):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, v)
        # Since 0.11 jax lowers a call of cuDNN only on a machine with devices.
        lowers = runs == CUDNN and jax.__version_info__ < (0, 11)
        lowered = lowers and traced.lower(lowering_platforms=("cuda",)).as_text()
    for part in CUDNN + OURS:
        assert (part in str(traced.jaxpr)) == (part in runs)
    for target in ("__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("):
        assert not lowered or target in lowered


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason=f"jax {jax.__version__} exports no partitioned call without devices (0.10 does): see test_gpu_compile.py",
)
def test_default_runs_the_kernels():
    """With implementation=None the program for an H200 calls the kernels, both ways, and has no T x T array."""
    length = 1024

    def both(q, k, v):
        a, _ = mf.deltaformer(q, k, v)
        b, _ = mf.softmax_attention(q, k, v)
        return jnp.sum(a.astype("float32")) + jnp.sum(b.astype("float32"))

    few, many = ((1, length, heads, 64) for heads in (1, 2))
    specs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (many, few, few)]
    with jax.sharding.use_abstract_mesh(H200):
        checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
        exported = jax.export.export(
            jax.jit(jax.grad(both, argnums=(0, 1, 2))), platforms=["cuda"], disabled_checks=checks
        )
        text = exported(*specs).mlir_module()
    for name in ("write_forward", "write_backward", "attention_forward", "attention_backward_queries"):
        assert f"memformer_{name}" in text
    assert f"{length}x{length}" not in text
