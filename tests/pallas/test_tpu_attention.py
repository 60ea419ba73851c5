"""Attention on TPU in Pallas' interpreter, with race detection, NaN in fresh memory and bounds checks.

The shared suite of the ops runs with implementation="pallas"; other cases are compared with the recurrence.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import memformer as mf
from memformer.pallas.tpu import tuning
from memformer.pallas.tpu.interpreter import interpreted
from tests.numeric import FORWARD, GRADIENT, assert_close, relative_rms
from tests.ops import test_ops as suite
from tests.pallas.test_tpu import exported, keys, spoil_padding

# Row of the shared suite, dtype of the inputs, rows of a block, tokens.
CASES = [("deltaformer_decay", "bfloat16", 32, 39), ("softmax_attention", "float32", 48, 55)]


@pytest.mark.parametrize(("name", "dtype", "chunk_size", "length"), CASES, ids=[case[0] for case in CASES])
def test_packed_against_oracle(name, dtype, chunk_size, length, interpreter):
    """Padding and the slots of the cache that no query sees hold NaN (infinity in bfloat16)."""
    (arrays, state), ids = suite.inputs(name), suite.packed_ids()[0][:, :length]
    arrays = {key: x[:, :length] for key, x in arrays.items()}
    value = np.inf if dtype == "bfloat16" else np.nan
    seen = state.valid[:, :, None, None]
    fields = {field: np.where(seen, getattr(state, field), value) for field in ("k", "v", "u") if hasattr(state, field)}
    arrays = suite.cast(spoil_padding(arrays, ids, value), dtype)
    state = suite.cast(dataclasses.replace(state, **fields), "float32")
    got, _ = suite.evaluate(name, "pallas", arrays, state, ids, chunk_size=chunk_size)
    assert got["output"].dtype == jnp.dtype(dtype)
    suite.check(got, suite.first_tokens(suite.oracle(name, dtype, packed=True, used=length), length), dtype, name)


def given(length, heads=(1, 1), width=8, value=4, dtype="float32", seed=2, decay=False):
    """Arguments of DeltaFormer; keys and w have length 1. With a decay, some tokens hide all before them."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    arrays = {
        "q": normal((1, length, heads[0], width)),
        "k": normal((1, length, heads[1], width)),
        "v": normal((1, length, heads[1], value)),
        "w": normal((1, length, heads[1], width)),
        "alpha": rng.uniform(0.5, 1.5, (1, length, heads[1])),
        "beta": rng.uniform(0.0, 1.0, (1, length, heads[1])),
    }
    for name in ("k", "w"):
        arrays[name] /= np.linalg.norm(arrays[name], axis=-1, keepdims=True)
    if decay:
        arrays["decay"] = -np.exp(normal((1, length, heads[1])) - 1)
        arrays["decay"][:, 4, 0], arrays["decay"][:, length - 3] = -np.inf, -5000
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


def graded(implementation, options):
    """A compiled call: output, u and gradients of all arrays through a weighted sum of both."""

    def loss(arrays, ids):
        output, cache = mf.deltaformer(**arrays, segment_ids=ids, implementation=implementation, **dict(options))
        rng = np.random.default_rng(9)
        weights = (jnp.asarray(rng.standard_normal(x.shape), cache.u.dtype) for x in (output, cache.u))
        parts = (
            jnp.sum(weight * x.astype(cache.u.dtype)) for weight, x in zip(weights, (output, cache.u), strict=True)
        )
        return sum(parts), (output, cache.u)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


# kernels are traced anew for each test, for tests change their block sizes
recurrence = functools.cache(functools.partial(graded, "recurrent"))


def evaluate(arrays, implementation, segment_ids=None, **options):
    """Output, u and gradients of all arrays."""
    options = tuple(options.items())
    call = recurrence(options) if implementation == "recurrent" else graded(implementation, options)
    (_, seen), gradients = call(arrays, segment_ids)
    return seen, gradients


def oracle(arrays, **options):
    """The result of `evaluate` by the recurrence in float64."""
    with jax.enable_x64(True):
        exact = suite.cast(jax.tree.map(np.asarray, arrays), "float64")
        return jax.tree.map(np.asarray, evaluate(exact, "recurrent", **options))


@pytest.mark.parametrize(
    ("write", "read", "heads"),
    [("softmax", "relu", 2), (mf.Kernel("round", decimals=2), mf.Kernel("exp", scale=0.5), 1)],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_kernels(write, read, heads, interpreter):
    """Every similarity, one row more than a block, a boundary of segments; once two heads per program with a decay.

    `test_hard_keys` writes and reads with a linear one, `test_a_call_too_long_for_vmem` reads with softmax.
    """
    arrays = given(17, heads=(heads, heads), decay=heads == 2)
    options = {"write_kernel": write, "read_kernel": read}
    options["segment_ids"] = jnp.asarray(np.repeat([3, 1], [6, 11])[None], jnp.int32)
    got, gradients = evaluate(arrays, "pallas", chunk_size=16, **options)
    want, want_gradients = oracle(arrays, **options)
    assert_close(got, want, FORWARD["float32"], "output and u")
    assert_close(gradients, want_gradients, GRADIENT["float32"], "gradient")


def test_a_call_too_long_for_vmem(interpreter, monkeypatch):
    """Two spans of one block each: the slots before one are read by softmax attention's kernel. With decay, sinks."""
    monkeypatch.setattr(tuning, "RESIDENT", 1)
    arrays = given(17, heads=(2, 1), decay=True) | {"sinks": jnp.array([-0.5, 0.5])}
    got, gradients = evaluate(arrays, "pallas", chunk_size=16)
    want, want_gradients = oracle(arrays)
    assert_close(got, want, FORWARD["float32"], "output and u")
    assert_close(gradients, want_gradients, GRADIENT["float32"], "gradient")


def forgetting_attention(length, dtype):
    """Softmax attention with decay and sinks, packed sequences whose padding sees nothing, and heads that share keys.

    Returns:
      Arguments, the cache, and a function of both and of an implementation to the output and all gradients.
    """
    state = jax.tree.map(lambda x: x[:1] if x.ndim else x, suite.inputs("softmax_attention_decay")[1])
    ids = jnp.asarray(np.repeat([3, 0, 1], [9, 4, length - 13])[None], jnp.int32)
    arrays = {name: x for name, x in given(length, heads=(2, 1), dtype=dtype).items() if name in "qkv"}
    arrays["decay"] = given(length, heads=(2, 2), decay=True)["decay"]
    arrays["sinks"] = jnp.array([-0.5, 0.5])

    def run(arrays, state, implementation, **options):
        def loss(arrays, fraction):
            start = dataclasses.replace(state, decay_fraction=fraction)
            names = ("q", "k", "v", "decay", "sinks")
            call = functools.partial(mf.softmax_attention, *(arrays[name] for name in names[:3]), **options)
            output, _ = call(
                **{name: arrays[name] for name in names[3:]},
                segment_ids=ids,
                initial_state=start,
                implementation=implementation,
            )
            return jnp.sum(jnp.sin(output.astype(fraction.dtype))), output

        (_, output), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(arrays, state.decay_fraction)
        return jax.tree.map(np.asarray, (output, gradients))

    return arrays, state, run


def test_forgetting_attention(interpreter):
    """Decay and sinks over a cache."""
    arrays, state, run = forgetting_attention(25, "float32")
    got = run(arrays, suite.cast(state, "float32"), "pallas", chunk_size=16)
    with jax.enable_x64(True):
        want = run(suite.cast(jax.tree.map(np.asarray, arrays), "float64"), suite.cast(state, "float64"), "recurrent")
    assert_close(got[0], want[0], FORWARD["float32"], "output")
    assert_close(got[1], want[1], GRADIENT["float32"], "gradient")


# Whether causal, the window, runs of segment numbers (0 is padding) or None, and slots of a cache.
WINDOWS = {
    "over a cache": (True, 20, [(3, 9), (0, 4), (1, 28)], 5),
    "longer than a block": (True, 18, None, 0),
    "of an encoder": (False, 3, [(3, 9), (0, 4), (1, 28)], 0),
    "none in an encoder": (False, None, None, 0),
}


def test_decays_of_documents_with_caches_of_their_own(interpreter):
    """Blocks hold slots and tokens of two documents, of which one has forgotten everything eight times more.

    Sums of its decays, of 65,536, leave float32 no more than two digits of a fraction.
    """
    rng, slots, ids = np.random.default_rng(5), 10, jnp.asarray(np.repeat([1, 2], [10, 14])[None], jnp.int32)
    arrays, fill = ({name: x for name, x in given(n, seed=n).items() if name in "qkv"} for n in (24, 2 * slots))
    arrays["decay"] = jnp.asarray(rng.uniform(-0.3, 0, (1, 24, 1)), jnp.float32).at[:, 1:9].set(-np.inf)
    held = jnp.asarray(rng.uniform(-0.3, 0, (2, slots, 1)), jnp.float32).at[1, :8].set(-np.inf)
    start = [fill[name].reshape(2, slots, 1, -1) for name in "qkv"]
    cache = jax.jit(lambda held: mf.softmax_attention(*start, decay=held, implementation="recurrent")[1])(held)
    state = jax.tree.map(lambda x: x[None] if x.ndim else x, cache)

    def run(arrays, state, implementation):
        def loss(arrays):
            extra = {"segment_ids": ids, "initial_state": state, "implementation": implementation, "chunk_size": 16}
            output = mf.softmax_attention(**arrays, **extra)[0]
            weights = jnp.asarray(np.random.default_rng(8).standard_normal(output.shape), output.dtype)
            return jnp.sum(weights * output), output

        gradients, output = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(arrays))
        gradients["decay"] = np.where(np.isinf(arrays["decay"]), 0, gradients["decay"])
        return output, gradients

    got, gradients = run(arrays, state, "pallas")
    with jax.enable_x64(True):
        exact = [suite.cast(jax.tree.map(np.asarray, x), "float64") for x in (arrays, state)]
        want, want_gradients = run(*exact, "recurrent")
    assert_close(got, want, FORWARD["float32"], "output")
    assert_close(gradients, want_gradients, GRADIENT["float32"], "gradient")


def windowed(case, dtype, scale=1):
    """Softmax attention with sinks over 41 tokens, window, runs and tokens times `scale`.

    Returns:
      Arguments, keys and values of the cache (or None), and a function of both and of an implementation to the output
      and all gradients.
    """
    causal, window, runs, slots = WINDOWS[case]
    slots, options = slots * scale, {"causal": causal, "window": window and window * scale}
    if runs:
        numbers, counts = zip(*runs, strict=True)
        options["segment_ids"] = jnp.asarray(np.repeat(numbers, np.array(counts) * scale)[None], jnp.int32)
    arrays = {name: x for name, x in given(41 * scale, heads=(2, 1), dtype=dtype).items() if name in "qkv"}
    arrays["sinks"] = jnp.array([-0.5, 0.5])
    held = None
    if slots:
        held = [given(slots, heads=(2, 1), dtype=dtype, seed=4)[name] for name in "kv"]

    def run(arrays, held, implementation, **more):
        def loss(arrays, held):
            state = held
            if held is not None:
                state = mf.KVCache(*held, valid=jnp.arange(slots)[None] != 2, length=jnp.int32(slots))
            qkv, sinks = [arrays[name] for name in "qkv"], arrays["sinks"]
            call = functools.partial(mf.softmax_attention, *qkv, sinks=sinks, initial_state=state, **options, **more)
            output, _ = call(implementation=implementation)
            return jnp.sum(jnp.sin(output.astype(sinks.dtype))), output

        (_, output), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(arrays, held)
        return jax.tree.map(np.asarray, (output, gradients))

    return arrays, held, run


@pytest.mark.parametrize("case", [case for case in WINDOWS if case != "longer than a block"])
def test_windows_and_encoders(case, interpreter, monkeypatch):
    """A window and later tokens, in tiles that are partly or wholly out of sight; one block in VMEM.

    The window over a cache is longer than a block, too.
    """
    monkeypatch.setattr(tuning, "RESIDENT", 1)
    arrays, held, run = windowed(case, "float32")
    got = run(arrays, held, "pallas", chunk_size=16)
    with jax.enable_x64(True):
        want = run(*suite.cast(jax.tree.map(np.asarray, (arrays, held)), "float64"), "recurrent")
    assert_close(got[0], want[0], FORWARD["float32"], "output")
    assert_close(got[1], want[1], GRADIENT["float32"], "gradient")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_hard_keys(dtype, tolerance, interpreter, monkeypatch):
    """A linear write with equal or nearly equal keys, in blocks of full size; a power series of A would reach 1e30.

    With beta 2, u grows to 87. The read is linear too, because a softmax over equal keys does not depend on q.
    """
    monkeypatch.setitem(tuning.TILES, "interpreter", (128, 128, ((128, 128),) * 2, 128))
    length, options = 144, {"write_kernel": "linear", "read_kernel": "linear"}
    arrays = {name: jnp.concatenate([x, x]) for name, x in given(length, width=32, value=16, dtype=dtype).items()}
    kinds = [keys(kind, np.random.default_rng(3), length, 32)[:, None] for kind in ("identical", "close")]
    arrays["k"] = suite.cast(np.stack(kinds), dtype)
    del arrays["w"], arrays["alpha"]
    arrays["beta"] = jnp.full((2, length, 1), 2.0, "float32")
    got, want = evaluate(arrays, "pallas", **options), oracle(arrays, **options)
    for row, kind in enumerate(("identical", "close")):
        assert_close(*(jax.tree.map(lambda x, row=row: x[row], x) for x in (got, want)), tolerance, kind)


def test_long_write(interpreter, monkeypatch):
    """The error of u does not grow over 4096 tokens.

    The relative error of the output does: a mean over n values shrinks as 1 / sqrt(n), by sqrt(7) from the first
    quarter to the last (measured for the chunked form: 2.3).
    """
    monkeypatch.setitem(tuning.TILES, "interpreter", (512, 512, ((512, 512),) * 2, 512))
    arrays = given(4096)
    call = jax.jit(mf.deltaformer, static_argnames="implementation")
    output, cache = call(**arrays, implementation="pallas")
    with jax.enable_x64(True):
        exact = suite.cast(jax.tree.map(np.asarray, arrays), "float64")
        want, want_cache = call(**exact, implementation="chunked")
        pairs = jax.tree.map(np.asarray, ((output, want), (cache.u, want_cache.u)))
    for (got, want), growth in zip(pairs, (3, 2), strict=True):
        early, late = (relative_rms(got[:, part], want[:, part]) for part in (slice(0, 1024), slice(-1024, None)))
        assert late < 1e-6 and late < growth * early


@functools.partial(jax.jit, static_argnames=("implementation", "op"))
def slopes(arrays, implementation, op="deltaformer"):
    """Gradients of q, k and v through DeltaFormer and its cache, or through softmax attention."""

    def loss(q, k, v):
        if op == "softmax_attention":
            return jnp.sum(jnp.sin(mf.softmax_attention(q, k, v, implementation=implementation)[0]))
        rest = {name: x for name, x in arrays.items() if name not in "qkv"}
        seen, cache = mf.deltaformer(q, k, v, **rest, implementation=implementation)
        return sum(jnp.sum(jnp.sin(x)) for x in (seen, cache.u))

    return jax.grad(loss, argnums=(0, 1, 2))(*(arrays[name] for name in "qkv"))


def test_mapped(interpreter):
    """vmap folds its axis into the batch; unmapped arguments are broadcast. Both ops pass through one wrapper."""
    arrays, op = given(16, heads=(2, 1)), "softmax_attention"
    mapped = {name: jnp.concatenate([arrays[name], 2 * arrays[name]]) for name in ("q", "v")}
    axes = {name: 0 if name in mapped else None for name in arrays}
    two = arrays | {name: x[:, None] for name, x in mapped.items()}
    got = jax.vmap(lambda arrays: slopes(arrays, "pallas", op), in_axes=(axes,))(two)
    for row in range(2):
        want = slopes(arrays | {name: x[row : row + 1] for name, x in mapped.items()}, "chunked", op)
        assert_close(jax.tree.map(lambda x, row=row: x[row], got), want, GRADIENT["float32"], f"row {row}")


@pytest.mark.parametrize(
    ("kind", "op"),
    [(AxisType.Auto, "softmax_attention"), (AxisType.Explicit, "deltaformer")],
    ids=["auto-softmax_attention", "explicit-deltaformer"],
)
def test_split_over_devices(kind, op, interpreter):
    """Under a mesh every device calls the kernels for its own shard of batch and heads; nothing is gathered.

    DeltaFormer reads with the kernels of attention, and both pass through the same wrapper of shards.
    """
    arrays = given(16, heads=(4, 2))
    arrays = {name: jnp.concatenate([x, 2 * x]) if name in "qv" else jnp.repeat(x, 2, 0) for name, x in arrays.items()}
    want = slopes(arrays, "chunked", op)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), (kind,) * 2, devices=jax.devices()[:4])
    place = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    sharded = {name: jax.device_put(x, place) for name, x in arrays.items()}
    with jax.set_mesh(mesh):
        compiled = slopes.lower(sharded, "pallas", op).compile()
        got = compiled(sharded)
    assert_close(got, want, GRADIENT["float32"], "gradient")
    assert all(x.sharding.is_equivalent_to(place, x.ndim) for x in got)
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))


def test_what_is_saved():
    """Saved are inputs, output, u and one log-sum-exp per row, nothing that grows with the square of the length."""

    def backward(arrays):
        return jax.vjp(lambda a: mf.deltaformer(**a, implementation="pallas")[0], arrays)[1]

    def saved(length):
        arrays = {name: jax.ShapeDtypeStruct(x.shape, "bfloat16") for name, x in given(length).items()}
        with interpreted():
            leaves = jax.tree.leaves(jax.eval_shape(backward, arrays))
        return sum(x.size * x.dtype.itemsize for x in leaves) / length

    # Bytes per token: k, w, q, v and the output in bfloat16; alpha, beta, the lse of write and read, and u in float32.
    floor = 2 * (3 * 8 + 2 * 4) + 4 * (4 + 4)
    assert saved(4096) <= 1.1 * floor
    assert saved(8192) == saved(4096)


def test_the_program_calls_the_kernels():
    """The program for a TPU calls the kernels by name, forward and backward, and has no T x T array.

    Equal calls share one lowered kernel: here DeltaFormer's read and softmax attention.
    """
    length = 4096

    def both(q, k, v):
        a, _ = mf.deltaformer(q, k, v)
        b, _ = mf.softmax_attention(q, k, v)
        return jnp.sum(a.astype("float32")) + jnp.sum(b.astype("float32"))

    few, many = (1, length, 1, 128), (1, length, 2, 128)
    text = exported(jax.grad(both, argnums=(0, 1, 2)), many, few, few)
    for name in ("write_forward", "write_backward", "attention_forward", "attention_backward"):
        assert f"memformer_{name}" in text
    assert text.count("tpu_custom_call") == 4
    assert f"{length}x{length}" not in text and "while" not in text


REFUSED = {
    "chunk": (lambda x: mf.deltaformer(x, x, x, chunk_size=24, implementation="pallas"), "chunk_size"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refusals_say_why(why):
    call, message = REFUSED[why]
    with interpreted(), pytest.raises(NotImplementedError, match=message):
        call(jnp.zeros((1, 8, 2, 4)))


def test_tuning_fits():
    """Every row of the table gives blocks that divide each other, for any call."""
    for kind in tuning.TILES:
        for length, width, itemsize in ((1, 16, 2), (100, 128, 4), (8192, 256, 2)):
            size, sub, tile, back, most = tuning.choose_tiles(kind, length, width, width, itemsize)
            assert most >= 1 and size % sub == 0 and back % sub == 0
            assert all(size % side == 0 for side in (*tile[0], *tile[1], back))
