"""Matrix memories on TPU in Pallas' interpreter, with race detection, NaN in fresh memory and bounds checks.

Rows, oracle and tolerances are those of the shared suite of the ops, run with implementation="pallas".
"""

import functools
import itertools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

import memformer as mf
from memformer.core.calls import MatrixCall
from memformer.pallas.sharding import kernel_axes, split_batch_and_heads
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.interleave import interleave
from memformer.pallas.tpu.interpreter import interpreted
from memformer.pallas.tpu.inverse import fold_diagonal, unit_lower_inverses
from memformer.pallas.tpu.matrix_memory import delta_rule, staged_inverse
from memformer.pallas.tpu.matrix_memory.config import CHUNKS, plan_call
from tests.numeric import assert_close, relative_rms
from tests.ops import test_ops as suite
from tests.ops.specs import recurrent_arrays

KIND = "TPU v5"
TPU = AbstractMesh((1,), ("one",), abstract_device=AbstractDevice(KIND, 1, "tpu"))

# Row of the shared suite, dtype of the inputs. Heads of their own without decay are in `test_hard_keys` (delta rule)
# and, with one more column of values, in the normalized row (linear attention).
LENGTH = 39
CASES = [
    ("delta_rule_grouped", "bfloat16"),
    ("delta_product_head_decay", "float32"),
    ("linear_attention_head_decay", "bfloat16"),
    ("linear_attention_normalized", "float32"),
]


def spoil_padding(arrays, ids, value):
    """The arrays with `value` at padding."""
    return {
        name: np.where((ids == 0).reshape(*ids.shape, *(1,) * (x.ndim - 2)), value, x) for name, x in arrays.items()
    }


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=["-".join(case) for case in CASES])
def test_packed_against_oracle(name, dtype, interpreter):
    """Every array holds NaN (infinity in bfloat16) at padding; T = 2 C + 7."""
    (arrays, state), ids = suite.inputs(name), suite.packed_ids()[0][:, :LENGTH]
    arrays = {key: x[:, :LENGTH] for key, x in arrays.items()}
    arrays = spoil_padding(arrays, ids, np.inf if dtype == "bfloat16" else np.nan)
    got, _ = suite.evaluate(name, "pallas", suite.cast(arrays, dtype), suite.cast(state, "float32"), ids)
    assert got["output"].dtype == jnp.dtype(dtype)
    suite.check(got, suite.first_tokens(suite.oracle(name, dtype, packed=True, used=LENGTH), LENGTH), dtype, name)


# Two rows of documents with padding before, inside and behind them, one without tokens in each; T = 22 of 5 chunks.
DOCUMENTS = np.array([[0] * 2 + [4] * 2 + [0] + [4] * 2 + [1] * 14 + [0], [3] * 4 + [1] * 18])
OF_DOCUMENTS = {
    "delta_product": recurrent_arrays("channel", steps=2, erase=True, groups=1),
    "linear_attention": recurrent_arrays("head", beta=False),
}


@pytest.mark.parametrize("name", OF_DOCUMENTS)
def test_states_per_document(name, interpreter):
    """Output, states and all gradients; a place without a document keeps its state, and its gradient passes."""
    rng = np.random.default_rng(9)
    given, states = OF_DOCUMENTS[name](rng, *DOCUMENTS.shape), rng.standard_normal((2, 3, 2, 8, 4))

    def run(given, states, implementation):
        options = {"segment_ids": DOCUMENTS, "implementation": implementation}
        options |= {"chunk_size": 16} if implementation == "pallas" else {}
        output, last = getattr(mf, name)(**given, initial_state=states, **options)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.sin(last)), (output, last)

    graded = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True), static_argnums=2)
    got = graded(*suite.cast((given, states), "float32"), "pallas")
    with jax.enable_x64(True):
        exact = suite.cast(suite.cast((given, states), "float32"), "float64")
        want = jax.tree.map(np.asarray, graded(*exact, "recurrent"))
    assert_close(got, want, 5e-6)
    assert np.array_equal(got[0][1][1][:, 2], states[:, 2].astype("float32"))


def delta_call(q, k, v, beta, decay, state):
    """A call of the delta rule as the kernel receives it."""
    return MatrixCall(
        op="delta_rule",
        q=q,
        k=k,
        v=v,
        w=None,
        alpha=None,
        beta=beta,
        decay=decay,
        segments=None,
        state=state,
        writes=1,
        scale=1.0,
        precision=jax.lax.Precision.HIGHEST if q.dtype == "float32" else jax.lax.Precision.DEFAULT,
        chunk_size=None,
    )


def test_sizes_by_argument(interpreter):
    """Results do not depend on blocks of value columns, an odd number of heads, or on what is saved."""
    sizes = tuning.Tuning(16, 3, 8, "inputs")
    rng = np.random.default_rng(7)
    wide, beta = jnp.asarray(rng.standard_normal((3, 1, 24, 3, 16)), "float32"), jnp.full((1, 24, 3), 0.5)
    keys = wide[1] / jnp.linalg.norm(wide[1], axis=-1, keepdims=True)
    state = jnp.asarray(rng.standard_normal((1, 3, 16, 16)), "float32")

    def run(q, k, v, beta, state, by_kernel):
        if by_kernel:
            o, end = delta_rule.run(delta_call(q, k, v, beta, -0.1 * beta, state), sizes)
        else:
            decay, call = -0.1 * beta, functools.partial(mf.delta_rule, implementation="recurrent")
            o, end = call(q, k, v, beta, decay=decay, scale=1.0, initial_state=state)
        return jnp.sum(jnp.sin(o)) + jnp.sum(end * end), (o, end)

    arguments = (wide[0], keys, wide[2], beta, state)
    (got, want) = (
        jax.jit(jax.value_and_grad(functools.partial(run, by_kernel=by_kernel), range(5), has_aux=True))(*arguments)
        for by_kernel in (True, False)
    )
    assert_close(got, want, 1e-5)
    # three heads do not divide into programs of two
    call = delta_call(*arguments[:4], None, state)
    assert plan_call(call, tuning.Tuning(16, 2, 16)).program_heads == 1


def saved_bytes(sizes, length, heads, width):
    """Bytes that are saved for the backward pass."""
    wide = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16)
    scalar = jax.ShapeDtypeStruct((1, length, heads), jnp.float32)

    def save(q, k, v, beta, decay):
        state = jnp.zeros((1, heads, width, width))
        return jax.vjp(lambda *x: delta_rule.run(delta_call(*x, state), sizes), q, k, v, beta, decay)[1]

    with jax.sharding.use_abstract_mesh(TPU):
        kept = jax.tree.leaves(jax.eval_shape(save, wide, wide, wide, scalar, scalar))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in kept)


def test_what_is_saved():
    """Saved are at most inputs, outputs and one state per chunk; with remat="inputs" the inputs alone."""
    length, heads, width = 1024, 2, 128
    # q, k, v, o in bfloat16, beta and decay in float32.
    arrays, numbers = 4 * 2 * width, 4 * 2
    # Products of one pass round the states to bfloat16 anyway.
    states = 2 * width * width / 128
    bound = length * heads * (arrays + numbers + states)
    assert length * heads * states < saved_bytes(tuning.Tuning(128, 2, 128), length, heads, width) <= bound
    assert saved_bytes(tuning.Tuning(128, 2, 128, "inputs"), length, heads, width) <= bound - length * heads * states
    with pytest.raises(ValueError, match="remat must be one of"):
        tuning.Tuning(128, 2, 128, "nothing")


def test_the_interpreter_sees_a_race(capfd):
    def kernel(o_ref):
        o_ref[...] = jnp.ones_like(o_ref)

    # Two programs that may run at once write one block.
    params = pltpu.CompilerParams(dimension_semantics=("parallel",))
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    block = pl.BlockSpec((8, 128), lambda i: (0, 0))
    seen = ""
    with interpreted():
        call = pl.pallas_call(kernel, grid=(2,), out_specs=block, out_shape=shape, compiler_params=params)
        try:
            jax.block_until_ready(call())
        except jax.errors.JaxRuntimeError as error:
            # Since jax 0.12 a race is an error, before it is printed.
            seen = str(error)
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE" in seen + capfd.readouterr().out


def test_mapped(interpreter):
    """vmap folds its axis into the batch; unmapped arguments are broadcast."""
    arrays, _ = suite.inputs("linear_attention_channel_decay")
    arrays = suite.cast({name: x[:, :20] for name, x in arrays.items() if name != "decay"}, "float32")

    def call(v, rest):
        return jax.grad(lambda v: mf.linear_attention(v=v, **rest, implementation="pallas")[0].sum())(v)

    rest = {name: x for name, x in arrays.items() if name != "v"}
    v = jnp.stack([arrays["v"], 2 * arrays["v"]])
    got = jax.jit(jax.vmap(call, in_axes=(0, None)))(v, rest)
    want = jax.grad(lambda v: mf.linear_attention(v=v, **rest, implementation="chunked")[0].sum())
    want = jax.jit(want)(arrays["v"])
    assert_close(got, jnp.stack([want, want]), 1e-5)


def keys(kind, rng, length, width):
    """Keys for which (I + A)^-1 is hard to compute."""
    if kind == "identical":
        k = np.repeat(rng.standard_normal((1, width)), length, axis=0)
    else:
        k = 0.9 * rng.standard_normal(width) + 0.1 * rng.standard_normal((length, width))
    return k / np.linalg.norm(k, axis=-1, keepdims=True)


@functools.cache
def graded_delta_rule(implementation, chunk_size):
    """A compiled call: output and state with the gradients of a weighted sum; the oracle serves inputs of any dtype."""

    def loss(arrays, cotangent):
        output, state = mf.delta_rule(**arrays, implementation=implementation, chunk_size=chunk_size)
        seen = output * cotangent.astype(output.dtype)
        return jnp.sum(seen.astype(state.dtype)) + jnp.sum(state), (output, state)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_hard_keys(dtype, tolerance, interpreter):
    """Chunks of full length, where a power series of A would reach 1e30; rows with beta 1, then with beta 2."""
    rng, kinds = np.random.default_rng(4), ("identical", "close")
    length, width = 144, 32
    chunk = tuning.choose(KIND, "delta_rule", length, width, width, jnp.dtype(dtype).itemsize).chunk
    hard = [keys(kind, rng, length, width)[:, None] for kind in kinds]
    # one head: a program computes its heads one beside the other, and two would take twice as long to compile
    arrays = {
        "q": suite.cast(rng.standard_normal((4, length, 1, width)), dtype),
        "k": suite.cast(np.stack(hard * 2), dtype),
        "v": suite.cast(rng.standard_normal((4, length, 1, 16)), dtype),
        "beta": jnp.asarray(np.repeat([1.0, 2.0], 2)[:, None, None] * np.ones((4, length, 1)), "float32"),
    }
    # The same cotangent for both: rounding the output would change it by as much as the tolerance allows.
    cotangent = suite.cast(rng.standard_normal((4, length, 1, 16)), "bfloat16")

    def run(arrays, implementation):
        call = graded_delta_rule(implementation, chunk if implementation == "pallas" else None)
        (_, seen), gradients = call(arrays, cotangent)
        return *seen, gradients

    got = run(arrays, "pallas")
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, run(suite.cast(jax.tree.map(np.asarray, arrays), "float64"), "recurrent"))
    for row, kind in enumerate(kinds * 2):
        assert_close(*(jax.tree.map(lambda x, row=row: x[row], x) for x in (got, want)), tolerance, kind)


@pytest.mark.parametrize("heads", [1, 2])
def test_inverse_in_a_kernel(heads, interpreter):
    """Inverts one matrix, and two whose blocks share products."""

    def kernel(a_ref, x_ref):
        for h, x in enumerate(interleave([unit_lower_inverses([a_ref.at[h] for h in range(heads)], 6)])[0]):
            x_ref[h] = x

    a = np.tril(np.random.default_rng(0).uniform(-1, 1, (heads, 64, 64)), -1)
    got = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(a.shape, jnp.float32))(jnp.asarray(a, "float32"))
    assert relative_rms(got, np.linalg.inv(np.eye(64) + a)) < 1e-5


@pytest.mark.parametrize("chunk", [16, 256])
def test_inverse_in_stages(chunk, interpreter):
    """A chunk without joined blocks, and one whose blocks are joined twice before the last time."""
    config = types.SimpleNamespace(chunk=chunk, passes=6, stacked=None)

    def kernel(a_ref, *refs):
        heads = [[ref.at[h] for ref in refs] for h in range(2)]
        refs[0][...] = a_ref[...]
        interleave([staged_inverse.first_stage(config, [fold_diagonal(a_ref[h], 0) for h in range(2)], heads)])
        interleave([staged_inverse.second_stage(config, heads)])

    a = np.tril(np.random.default_rng(0).uniform(-0.1, 0.1, (2, chunk, chunk)), -1)
    scratch = [jax.ShapeDtypeStruct((2, *shape), dtype) for shape, dtype in staged_inverse.inverse_scratch(config)]
    *_, got = pl.pallas_call(kernel, out_shape=scratch)(jnp.asarray(a, "float32"))
    assert relative_rms(got, np.linalg.inv(np.eye(chunk) + a)) < 1e-5


def test_long_state(interpreter):
    """The error of a float32 state does not grow over 8192 tokens."""
    rng = np.random.default_rng(5)
    length, width = 8192, 8
    k = rng.standard_normal((1, length, 1, width))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {"q": k, "k": k, "v": rng.standard_normal((1, length, 1, width)), "beta": np.ones((1, length, 1))}
    call = jax.jit(mf.delta_rule, static_argnames=("implementation", "chunk_size"))
    got, _ = call(**suite.cast(arrays, "float32"), implementation="pallas", chunk_size=128)
    with jax.enable_x64(True):
        exact = suite.cast(suite.cast(arrays, "float32"), "float64")
        want, _ = call(**exact, implementation="recurrent")
        want = np.asarray(want)
    early, late = (relative_rms(got[:, part], want[:, part]) for part in (slice(0, 2048), slice(-2048, None)))
    assert late < 2e-6 and late < 2 * early


def test_forgetting(interpreter):
    """Tokens that forget everything, alone and most of a chunk, leave the decays of their neighbours exact."""
    rng = np.random.default_rng(6)
    length, rows, width = 32, 4, 8
    q, k, v = rng.standard_normal((3, rows, length, 1, width))
    decay = np.full((rows, length, 1), -0.05)
    for row, (stop, strong) in enumerate([(6, -1e7), (6, -np.inf), (25, -1e7), (25, -np.inf)]):
        decay[row, 5:stop] = strong
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = {"q": q, "k": k, "v": v, "beta": np.full((rows, length, 1), 0.7), "decay": decay}

    def run(arrays, implementation):
        def loss(arrays):
            output, state = mf.delta_rule(**arrays, implementation=implementation, chunk_size=16)
            return jnp.sum(jnp.sin(output)) + jnp.sum(state * state), (output, state)

        (_, results), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return *results, gradients

    got = run(suite.cast(arrays, "float32"), "pallas")
    with jax.enable_x64(True):
        exact = suite.cast(suite.cast(arrays, "float32"), "float64")
        want = jax.tree.map(np.asarray, run(exact, "recurrent"))
    assert_close(got, want, 2e-6)


REFUSED = {
    "no TPU": ({}, "needs a TPU"),
    "chunk": ({"chunk_size": 48}, "chunk_size among"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refusals_say_why(why):
    options, message = REFUSED[why]
    x = jnp.zeros((1, 16, 2, 4))
    for op in (
        lambda **kind: mf.delta_rule(x, x, x, x[..., 0], **kind),
        lambda **kind: mf.linear_attention(x, x, x, **kind),
    ):
        with interpreted() if why != "no TPU" else jax.named_scope("here"):
            with pytest.raises(NotImplementedError, match=message):
                op(implementation="pallas", **options)
            # The library's own choice goes to what serves; a refusal is raised while tracing.
            jax.eval_shape(op)


def exported(function, *shapes):
    """The program for a TPU, by jax.export, which needs neither a TPU nor its compiler."""
    specs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    with jax.sharding.use_abstract_mesh(TPU):
        return jax.export.export(jax.jit(function), platforms=["tpu"])(*specs).mlir_module()


def test_the_program_calls_the_kernels():
    """The program for a TPU calls the kernels by name, forward and backward, also by default.

    Equal calls share one lowered kernel: here delta_product, with one write per token, those of delta_rule.
    """
    wide, scalar = (1, 256, 2, 128), (1, 256, 2)

    def both(q, k, v, beta):
        a, _ = mf.delta_rule(q, k, v, beta)
        b, _ = mf.linear_attention(q, k, v)
        c, _ = mf.delta_product(q, k[:, :, None], v[:, :, None], beta[:, :, None])
        return sum(x.astype(jnp.float32).sum() for x in (a, b, c))

    text = exported(jax.grad(both, argnums=(0, 1, 2, 3)), wide, wide, wide, scalar)
    assert text.count("tpu_custom_call") == 4
    for name in ("delta_rule_forward", "delta_rule_backward", "linear_attention_forward", "linear_attention_backward"):
        assert f"memformer_{name}" in text
    assert "while" not in text


def test_split_over_devices():
    """Under a mesh every device calls the kernel for its own shard of batch and heads; nothing is moved."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    held = []

    def local(scale, q, k, v):
        held.append((q.shape, v.shape))
        return q * scale, v + jnp.repeat(k, v.shape[1] // k.shape[1], axis=1)

    call = split_batch_and_heads(local, (2.0,), kernel_axes(), results=2)
    few, many = np.ones((4, 2, 8, 4), np.float32), np.ones((4, 4, 8, 4), np.float32)
    place = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    arrays = [jax.device_put(x, place) for x in (few, few, many)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda *x: tuple(call(*x))).lower(*arrays).compile()
    assert held == [((2, 1, 8, 4), (2, 2, 8, 4))]
    assert "all-" not in compiled.as_text() and "collective" not in compiled.as_text()
    assert all(s.is_equivalent_to(place, 4) for s in compiled.output_shardings)
    doubled, added = compiled(*arrays)
    assert np.array_equal(doubled, 2 * few) and np.array_equal(added, 2 * many)


@pytest.mark.parametrize("set_mesh", [True, False])
def test_explicit_mesh(set_mesh, interpreter):
    """On an Explicit mesh nothing is gathered: set, forward and backward on four devices; not set, forward on eight.

    The first with the delta rule, the second with linear attention.
    """
    rng = np.random.default_rng(8)
    spare = 1 if set_mesh else 2
    sizes, devices = (2, 2, spare), jax.devices()[: 4 * spare]
    mesh = jax.make_mesh(sizes, ("rows", "columns", "spare"), (AxisType.Explicit,) * 3, devices=devices)
    wide, few, scalar = (2, 16, 4, 8), (2, 16, 2, 8), (2, 16, 4)
    shapes = {"q": few, "k": few, "v": wide, "beta": scalar}
    arrays = {name: jnp.asarray(rng.uniform(-0.5, 0.0, shape), "float32") for name, shape in shapes.items()}
    op = mf.delta_rule if set_mesh else mf.linear_attention
    if not set_mesh:
        del arrays["beta"]
    places = {name: NamedSharding(mesh, PartitionSpec("rows", None, "columns")) for name in arrays}

    def run(arrays, implementation):
        def loss(arrays):
            output, state = op(**arrays, implementation=implementation)
            return jnp.sum(jnp.sin(output)) + jnp.sum(state * state), (output, state)

        if not set_mesh:
            return *loss(arrays)[1], {}
        (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
        return *results, gradients

    want = jax.jit(functools.partial(run, implementation="chunked"))(arrays)
    sharded = jax.device_put(arrays, places)
    with jax.set_mesh(mesh) if set_mesh else jax.named_scope("no mesh"):
        compiled = jax.jit(functools.partial(run, implementation="pallas")).lower(sharded).compile()
        got = compiled(sharded)
    assert_close(got, want, 1e-5)
    output, state, gradients = got
    assert output.sharding.is_equivalent_to(places["v"], 4)
    assert state.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("rows", "columns")), 4)
    assert all(x.sharding.is_equivalent_to(places[name], x.ndim) for name, x in gradients.items())
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))


def test_second_derivatives_name_what_has_them():
    """A named implementation fails with a sentence; by default an implementation that has them is used."""

    def curvature(op, arrays, implementation):
        def first(q):
            return jax.grad(lambda q: jnp.sum(op(q, *arrays[1:], implementation=implementation)[0]))(q)

        return jax.eval_shape(jax.grad(lambda q: jnp.sum(first(q) ** 2)), arrays[0])

    x = jnp.ones((1, 16, 2, 8))
    with jax.sharding.use_abstract_mesh(TPU):
        calls = {
            mf.delta_rule: (x, x, x, x[..., 0]),
            mf.linear_attention: (x, x, x),
            mf.softmax_attention: (x, x, x),
            mf.deltaformer: (x, x, x),
        }
        for op, arrays in calls.items():
            with pytest.raises(NotImplementedError, match="implementation='recurrent' has higher derivatives"):
                curvature(op, arrays, "pallas")
        for op in (mf.delta_rule, mf.linear_attention):
            assert curvature(op, calls[op], None).shape == x.shape


def test_tuning_fits():
    """Every row of the table gives a chunk size that kernels have, and at least one head per program."""
    for kind, kernel in itertools.product(tuning.TABLE, tuning.KERNELS):
        for length, width in ((1, 16), (100, 128), (8192, 256), (8192, 1024)):
            sizes = tuning.choose(kind, kernel, length, width, width, 4)
            assert sizes.chunk in CHUNKS and sizes.heads >= 1
            assert sizes.chunk < 2 * length or sizes.chunk == 16
