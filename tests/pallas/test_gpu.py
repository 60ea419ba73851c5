"""GPU kernels of matrix memories in Pallas' GPU interpreter, which raises on races and fills fresh memory with NaN.

No GPU is needed. The interpreter runs these kernels from jax 0.11 on; older versions only trace the program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

import memformer as mf
from memformer.core.calls import MatrixCall
from memformer.pallas.gpu import compat, tuning
from memformer.pallas.gpu.interpreter import interpreted
from memformer.pallas.gpu.inverse import inverse_scratch, unit_lower_inverse
from memformer.pallas.gpu.matrix_memory import chunk_scan
from tests.numeric import FORWARD, GRADIENT, assert_close, relative_rms
from tests.ops import test_ops as suite
from tests.ops.specs import recurrent_arrays
from tests.pallas.gpu_interpreter import teach
from tests.pallas.test_tpu import keys

H200 = AbstractMesh((1,), ("one",), abstract_device=AbstractDevice("NVIDIA H200", 1, "cuda"))

interprets = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"),
    reason=f"jax {jax.__version__} cannot interpret GPU kernels (0.11 can): their program is traced, not run",
)

# Rows of the shared suite. Together: decay, shared heads, segments, an initial state, V + 1 columns, two writes.
# `test_hard_keys` has heads of their own (delta rule), `test_gpu_edges.test_forgetting` linear attention with decay.
ROWS = ["delta_rule_grouped", "delta_product_head_decay", "linear_attention_normalized"]


@pytest.fixture
def interpreter(monkeypatch):
    """Runs kernels in the interpreter, and leaves no state to the next test."""
    from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state

    teach(monkeypatch)
    with interpreted():
        yield
    reset_gpu_interpret_mode_state()


@interprets
@pytest.mark.parametrize("name", ROWS)
def test_packed_against_oracle(name, interpreter):
    arrays, state = suite.inputs(name)
    ids = suite.packed_ids()[0]
    got, _ = suite.evaluate(name, "pallas", suite.cast(arrays, "bfloat16"), suite.cast(state, "float32"), ids)
    assert got["output"].dtype == jnp.bfloat16
    suite.check(got, suite.oracle(name, "bfloat16"), "bfloat16", name)


# Documents of two chunks and of one, with padding before, inside and behind them, and places without one.
DOCUMENTS = np.array([[0] * 2 + [4] * 3 + [0] + [4] * 64 + [1] * 5 + [0] * 2, [3] * 77])
# Op, part of the documents, arrays, key channels (two warpgroups share 136, padded to 256, in bfloat16), dtype.
OF_DOCUMENTS = {
    "delta_rule": ("delta_rule", DOCUMENTS[:1], recurrent_arrays("channel", groups=1), 8, "bfloat16"),
    "linear_attention": ("linear_attention", DOCUMENTS, recurrent_arrays("head", beta=False), 8, "bfloat16"),
    "wide": ("delta_rule", DOCUMENTS[:1], recurrent_arrays("head", groups=1, width=136), 136, "bfloat16"),
    "wide float16": ("delta_rule", DOCUMENTS[:1, 65:], recurrent_arrays(groups=1, width=136), 136, "float16"),
}


@interprets
@pytest.mark.parametrize("case", OF_DOCUMENTS)
def test_states_per_document(case, interpreter):
    """Output, states and all gradients; a place without a document keeps its state, and its gradient passes."""
    rng, (name, ids, arrays, width, dtype) = np.random.default_rng(9), OF_DOCUMENTS[case]
    states = rng.standard_normal((len(ids), 3, 2, width, 4))
    given = arrays(rng, *ids.shape)
    given = {key: suite.cast(x, dtype if key in "qkv" else "float32") for key, x in given.items()}

    def run(given, states, implementation):
        options = {"segment_ids": ids, "initial_state": states, "implementation": implementation}
        output, last = getattr(mf, name)(**given, **options)
        output = output.astype(last.dtype)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.sin(last)), (output, last)

    graded = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True), static_argnums=2)
    got = graded(given, suite.cast(states, "float32"), "pallas")
    with jax.enable_x64(True):
        exact = suite.cast(jax.tree.map(np.asarray, (given, suite.cast(states, "float32"))), "float64")
        want = jax.tree.map(np.asarray, graded(*exact, "recurrent"))
    (_, seen), gradients = got
    assert_close(seen, want[0][1], FORWARD[dtype])
    assert_close(gradients, want[1], GRADIENT[dtype])
    assert np.array_equal(seen[1][:, 2], states[:, 2].astype("float32"))


@interprets
def test_inverse(interpreter):
    """(I + A)^-1 alone, where a power series of A would reach 1e18: operands have 16 bits, not 8."""
    rng = np.random.default_rng(3)
    k = np.stack([keys(kind, rng, 64, 128) for kind in ("identical", "close")])
    a = np.tril(2.0 * np.asarray(jnp.asarray(k @ np.swapaxes(k, 1, 2), jnp.float32)), -1)

    def kernel(a_ref, o_ref, *scratch):
        n = jax.lax.axis_index("n")
        x = compat.load(a_ref.at[n], plgpu.Layout.WGMMA, optimized=False)
        for i, side in enumerate(unit_lower_inverse(x, scratch)):
            o_ref[n, :, 32 * i : 32 * (i + 1)] = side

    got = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(a.shape, jnp.float32),
        scratch_types=inverse_scratch(),
        grid=(2,),
        grid_names=("n",),
    )(jnp.asarray(a, jnp.float32))
    assert_close(got, np.linalg.inv(np.eye(64) + a), 5e-4)


@interprets
def test_hard_keys(interpreter):
    """Three chunks of keys where a power series of A would reach 1e18; heads at beta 1 and 2, some writes at 0."""
    rng, kinds = np.random.default_rng(3), ("identical", "close")
    length, width = 192, 64
    beta = np.stack([np.stack([np.ones(length), np.full(length, 2.0)], axis=-1)] * 2)
    beta[:, [5, 100]] = 0.0
    hard = [np.stack([keys(kind, rng, length, width)] * 2, axis=1) for kind in kinds]
    arrays = {
        "q": suite.cast(rng.standard_normal((2, length, 2, width)), "bfloat16"),
        "k": suite.cast(np.stack(hard), "bfloat16"),
        "v": suite.cast(rng.standard_normal((2, length, 2, 16)), "bfloat16"),
        "beta": jnp.asarray(beta, "float32"),
    }
    # One cotangent for both: that of a rounded output would differ by as much as the tolerance allows.
    cotangent = suite.cast(rng.standard_normal((2, length, 2, 16)), "bfloat16")

    def run(arrays, implementation):
        def loss(arrays):
            output, state = mf.delta_rule(**arrays, implementation=implementation)
            weighted = output * cotangent.astype(output.dtype)
            return jnp.sum(weighted.astype(state.dtype)) + jnp.sum(state), (output, state)

        (_, (output, state)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return {"output": output, "state": jnp.swapaxes(state, 1, 2), **gradients}

    got = run(arrays, "pallas")
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, run(suite.cast(jax.tree.map(np.asarray, arrays), "float64"), "recurrent"))
    for row, kind in enumerate(kinds):
        for head in range(2):
            one = (jax.tree.map(lambda x, row=row, head=head: x[row, :, head], x) for x in (got, want))
            assert_close(*one, 2e-2, kind)


@interprets
def test_error_does_not_grow(interpreter):
    """Six chunks of nearly equal keys: the error of the last two chunks is that of the first two."""
    rng = np.random.default_rng(5)
    length = 384
    arrays = {
        "q": suite.cast(rng.standard_normal((1, length, 1, 8)), "bfloat16"),
        "k": suite.cast(keys("close", rng, length, 8)[None, :, None], "bfloat16"),
        "v": suite.cast(rng.standard_normal((1, length, 1, 8)), "bfloat16"),
        "beta": jnp.asarray(rng.uniform(0.0, 2.0, (1, length, 1)), "float32"),
    }
    got = np.asarray(mf.delta_rule(**arrays, implementation="pallas")[0], np.float64)
    with jax.enable_x64(True):
        wide = suite.cast(jax.tree.map(np.asarray, arrays), "float64")
        want = np.asarray(mf.delta_rule(**wide, implementation="recurrent")[0])
    early, late = (relative_rms(got[:, part], want[:, part]) for part in (slice(0, 128), slice(-128, None)))
    assert early <= 1e-2
    assert late <= 1.5 * early


@interprets
def test_mapped(interpreter):
    arrays, _ = suite.inputs("linear_attention")
    arrays = suite.cast({name: x[:1, :20] for name, x in arrays.items()}, "bfloat16")
    v = jnp.stack([arrays["v"], 2 * arrays["v"]])
    call = jax.vmap(lambda v: mf.linear_attention(arrays["q"], arrays["k"], v, implementation="pallas")[0])
    want = mf.linear_attention(**arrays, implementation="chunked")[0].astype(jnp.float32)
    assert_close(call(v).astype(jnp.float32), jnp.stack([want, 2 * want]), 1e-2)


@interprets
def test_interpreter_detects_races(interpreter):
    def kernel(x_ref, o_ref, block, barrier):
        plgpu.copy_gmem_to_smem(x_ref, block, barrier)
        # Read before waiting for the copy.
        o_ref[...] = block[...]
        plgpu.barrier_wait(barrier)

    x = jnp.ones((64, 64), jnp.float32)
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        grid=(1,),
        grid_names=("one",),
    )
    with pytest.raises(Exception, match="RACE"):
        jax.block_until_ready(call(x))


REFUSED = {
    "float32": ("float32", {}, "takes bfloat16 or float16 q, k and v"),
    "chunk": ("bfloat16", {"chunk_size": 32}, "takes chunk_size 64"),
    "precision": ("bfloat16", {"precision": "highest"}, "default precision only"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refusals_say_why(why):
    dtype, options, message = REFUSED[why]
    x = jnp.zeros((1, 16, 2, 4), dtype)
    for op in (
        lambda **kind: mf.delta_rule(x, x, x, x[..., 0], **kind),
        lambda **kind: mf.linear_attention(x, x, x, **kind),
    ):
        with jax.sharding.use_abstract_mesh(H200):
            with pytest.raises(NotImplementedError, match=message):
                jax.eval_shape(lambda op=op: op(implementation="pallas", **options))
            # None falls back to an implementation that serves.
            assert "memformer_" not in str(jax.make_jaxpr(lambda op=op: op(**options))())


@pytest.mark.parametrize("name", ["w", "alpha", "decay"])
def test_default_runs_the_channel_kernels(name):
    x = jnp.zeros((1, 16, 2, 4), "bfloat16")
    given = x[..., 0] if name == "alpha" else x

    def loss(given):
        return jnp.sum(mf.delta_rule(x, x, x, x[..., 0], **{name: given})[0].astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(H200):
        text = str(jax.make_jaxpr(jax.grad(loss))(given))
    for part in ("inverse", "chunk_scan", "chunk_scan_backward", "operand_gradients", "inverse_gradients"):
        assert f"memformer_delta_rule_channel_{part}" in text


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200"])
def test_other_gpus_take_the_chunked_form(kind):
    x = jnp.zeros((1, 16, 2, 4), jnp.bfloat16)
    mesh = AbstractMesh((1,), ("one",), abstract_device=AbstractDevice(kind, 1, "cuda"))
    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(NotImplementedError, match="needs an sm_90 GPU"):
            jax.eval_shape(lambda: mf.linear_attention(x, x, x, implementation="pallas"))
        assert "memformer_" not in str(jax.make_jaxpr(lambda: mf.linear_attention(x, x, x))())


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason=f"jax {jax.__version__} exports no partitioned call without devices (0.10 does): see test_gpu_compile.py",
)
def test_default_runs_the_kernels():
    """With implementation=None the program for an H200 calls the kernels, forward and backward, and has no loop."""
    wide, scalar = (1, 256, 2, 64), (1, 256, 2)

    def both(q, k, v, beta):
        a, _ = mf.delta_rule(q, k, v, beta)
        b, _ = mf.linear_attention(q, k, v)
        return sum(x.astype(jnp.float32).sum() for x in (a, b))

    function = jax.jit(jax.grad(both, argnums=(0, 1, 2, 3)))
    specs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (wide, wide, wide, scalar)]
    with jax.sharding.use_abstract_mesh(H200):
        checks = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
        text = jax.export.export(function, platforms=["cuda"], disabled_checks=checks)(*specs).mlir_module()
    for op in ("delta_rule", "linear_attention"):
        for part in ("intra_chunk", "chunk_scan_forward", "chunk_scan_backward", "intra_chunk_backward"):
            assert f"memformer_{op}_{part}" in text
    assert "while" not in text


def delta_call(q, k, v, beta, decay):
    """A call of the delta rule as the kernels receive it."""
    heads, width = v.shape[2:]
    fields = {"w": None, "alpha": None, "segments": None, "writes": 1, "scale": 1.0, "chunk_size": None}
    state = jnp.zeros((q.shape[0], heads, q.shape[3], width), jnp.float32)
    precision = jax.lax.Precision.DEFAULT
    return MatrixCall("delta_rule", q=q, k=k, v=v, beta=beta, decay=decay, state=state, precision=precision, **fields)


def test_what_is_saved():
    """With remat="inputs" the inputs and the first state alone: nothing per chunk."""
    length, heads, width = 1024, 2, 128
    wide = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16)
    scalar = jax.ShapeDtypeStruct((1, length, heads), jnp.float32)

    def saved(remat):
        def save(*arrays):
            return jax.vjp(lambda *x: chunk_scan.run(delta_call(*x), remat), *arrays)[1]

        with jax.sharding.use_abstract_mesh(H200):
            kept = jax.tree.leaves(jax.eval_shape(save, wide, wide, wide, scalar, scalar))
        return sum(x.size * x.dtype.itemsize for x in kept)

    # q, k, v in bfloat16; in float32 eight token scalars, what their gradient needs, and a state; per chunk a state and
    # three matrices of 64 x 64 in bfloat16, per token W in two parts.
    inputs = length * heads * (3 * 2 * width + 16 * 4) + heads * width * width * 4
    chunks = length // 64 * heads * 2 * (width * width + 3 * 64 * 64) + length * heads * 2 * 2 * width
    assert saved("inputs") <= inputs
    assert chunks <= saved("states") <= inputs + chunks
    with pytest.raises(ValueError, match="remat must be one of"):
        saved("nothing")


@interprets
def test_remat(interpreter):
    """The gradients do not depend on what is saved."""
    rng = np.random.default_rng(9)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 64, 1, 16)), "bfloat16") for _ in "qkv")
    beta = jnp.asarray(rng.uniform(0.0, 0.2, (1, 64, 1)), "float32")

    def gradients(remat):
        def loss(*x):
            output, state = chunk_scan.run(delta_call(*x), remat)
            return jnp.sum(jnp.sin(output.astype("float32"))) + jnp.sum(state**2)

        return jax.grad(loss, range(5))(q, k, v, beta, -beta)

    for got, want in zip(*map(gradients, ("inputs", "states")), strict=True):
        np.testing.assert_array_equal(np.asarray(got, "float32"), np.asarray(want, "float32"))


@interprets
@pytest.mark.parametrize("erases", [True, False])
def test_wide_keys(interpreter, monkeypatch, erases):
    """136 key channels, padded to 256: two warpgroups with half of them each; the gradients; a sum's chunks at once."""
    if not erases:
        # each of the two chunks is a part of the time
        monkeypatch.setattr(tuning, "PARTS", (2,))
        monkeypatch.setattr(tuning, "PART_CHUNKS", 1)
    rng = np.random.default_rng(10)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 66, 1, width)), "bfloat16") for width in (136, 136, 8))
    beta = jnp.asarray(rng.uniform(0.0, 1.0, (1, 66, 1)), "float32")
    arrays = {"q": q, "k": suite.cast(mf.l2norm(k), "bfloat16"), "v": v, "decay": -0.1 * beta}
    arrays |= {"beta": beta} if erases else {}
    op = mf.delta_rule if erases else mf.linear_attention

    def run(arrays, implementation):
        def loss(arrays):
            output, state = op(**arrays, implementation=implementation)
            return jnp.sum(jnp.sin(output.astype(state.dtype))) + jnp.sum(state**2), (output, state)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)

    got = run(arrays, "pallas")
    with jax.enable_x64(True):
        want = run(suite.cast(jax.tree.map(np.asarray, arrays), "float64"), "recurrent")
    assert_close((got[0][1], got[1]), jax.tree.map(np.asarray, (want[0][1], want[1])), 6e-3)


@interprets
def test_two_warpgroups(interpreter, monkeypatch):
    """Two computing warpgroups per program, as for many heads, give what one gives, gradients included."""
    rng = np.random.default_rng(7)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 70, 1, width)), "bfloat16") for width in (16, 16, 80))
    beta = jnp.asarray(rng.uniform(0.0, 0.2, (1, 70, 1)), "float32")

    def run():
        def loss(*x):
            output, state = chunk_scan.run(delta_call(*x))
            return jnp.sum(jnp.sin(output.astype("float32"))) + jnp.sum(state**2)

        return jax.tree.map(np.asarray, jax.value_and_grad(loss, range(5))(q, k, v, beta, -beta))

    want = run()
    monkeypatch.setattr(tuning, "MULTIPROCESSORS", 0)
    jax.tree.map(np.testing.assert_array_equal, run(), want)


@interprets
@pytest.mark.parametrize("erases", [True, False])
def test_parts_of_the_time(interpreter, monkeypatch, erases):
    """Parts that are scanned at once, as for few heads, give what one scan gives, gradients included."""
    rng = np.random.default_rng(8)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 384, 1, 16)), "bfloat16") for _ in "qkv")
    k = mf.l2norm(k)
    beta = jnp.asarray(rng.uniform(0.0, 1.0, (1, 384, 1)), "float32")

    def run():
        def loss(q, k, v, beta, decay):
            call = delta_call(q, k, v, beta if erases else None, decay)
            output, state = chunk_scan.run(call)
            return jnp.sum(jnp.sin(output.astype("float32"))) + jnp.sum(state**2), (output, state)

        wanted = range(5) if erases else (0, 1, 2, 4)
        (_, found), gradients = jax.value_and_grad(loss, wanted, has_aux=True)(q, k, v, beta, -0.02 * beta)
        return jax.tree.map(lambda x: np.asarray(x, "float32"), (found, gradients))

    want = run()
    monkeypatch.setattr(tuning, "PARTS", (3,))
    monkeypatch.setattr(tuning, "PART_CHUNKS", 1)
    assert_close(run(), want, 1e-2)
