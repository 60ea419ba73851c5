"""Kernels for a few tokens of a matrix memory on TPU in Pallas' interpreter, against the recurrence in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import memformer as mf
from memformer.models import MemoryLM, from_preset
from memformer.pallas.tpu.attention import decoding as attention_decoding
from memformer.pallas.tpu.matrix_memory import decoding
from tests.numeric import assert_close
from tests.ops.test_ops import cast
from tests.pallas import cached_steps
from tests.pallas.test_tpu import TPU

BATCH, TOKENS = 3, 3

# Starts in a row, padding, and a sequence that starts in front.
IDS = np.array([[1, 1, 2], [0, 1, 1], [1, 0, 3]], np.int32)


def arguments(
    rng, *, key=8, value=4, heads=3, groups=1, writes=None, decay="", erase=False, beta=True, tokens=TOKENS, equal=False
):
    """Arrays of a call; some decays forget everything. With `equal`, one key and strength 2."""

    def unit(*shape):
        x = rng.standard_normal(shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    time = (BATCH, tokens)
    written = time if writes is None else (*time, writes)
    arrays = {
        "q": rng.standard_normal((*time, groups, key)),
        "k": unit(*written, groups, key),
        "v": rng.standard_normal((*written, heads, value)),
    }
    if beta:
        arrays["beta"] = rng.uniform(0.0, 2.0, (*written, heads))
    if erase:
        arrays |= {"w": unit(*written, groups, key), "alpha": rng.uniform(0.0, 1.0, (*written, heads))}
    if equal:
        arrays["k"] = np.broadcast_to(arrays["k"][:, :1], arrays["k"].shape)
        arrays["beta"] = np.full_like(arrays["beta"], 2.0)
    if decay:
        arrays["decay"] = -rng.uniform(0.0, 2.0, (*time, heads, *([key] if decay == "channel" else [])))
        arrays["decay"][1, -1, 0] = -np.inf
    return arrays


def compare(op, arrays, dtype, tolerance, ids=None, implementation="pallas", state=None):
    """A call with a state to start from against the recurrence; numbers per head are in float32."""
    arrays = {name: cast(x, "float32" if name in ("beta", "alpha", "decay") else dtype) for name, x in arrays.items()}
    heads, value = arrays["v"].shape[-2:]
    start = np.random.default_rng(1).standard_normal((BATCH, heads, arrays["q"].shape[-1], value))
    state = cast(start, "float32") if state is None else state
    run = jax.jit(functools.partial(op, segment_ids=ids, implementation=implementation))
    got = run(**arrays, initial_state=state)
    with jax.enable_x64(True):
        exact = cast(jax.tree.map(lambda x: np.asarray(x, np.float64), (arrays, state)), "float64")
        reference = jax.jit(functools.partial(op, segment_ids=ids, implementation="recurrent"))
        want = jax.tree.map(np.asarray, reference(**exact[0], initial_state=exact[1]))
    assert got[0].dtype == jnp.dtype(dtype) and got[1].dtype == jnp.float32
    # An output in bfloat16 is rounded once; the state is not.
    assert_close(got[0], want[0], max(tolerance, 3e-3 if dtype == "bfloat16" else 0), "output")
    assert_close(got[1], want[1], tolerance, "state")


CASES = {
    "product": (mf.delta_product, {"groups": 3, "writes": 2, "decay": "head"}, "float32", True),
    "erase": (mf.delta_rule, {"decay": "channel", "erase": True}, "bfloat16", True),
    "one token": (mf.delta_rule, {"decay": "head", "tokens": 1}, "float32", False),
    "linear": (mf.linear_attention, {"beta": False, "decay": "channel", "tokens": 1}, "bfloat16", False),
    "one erase": (
        mf.delta_rule,
        {"decay": "channel", "erase": True, "tokens": 1, "key": 12, "value": 130},
        "float32",
        True,
    ),
    "equal keys": (mf.delta_rule, {"tokens": 8, "value": 130, "equal": True}, "bfloat16", False),
}


@pytest.mark.parametrize("name", CASES)
def test_against_recurrence(name, interpreter, monkeypatch):
    """Shared heads, several writes, packed sequences, decays of -inf; three blocks of heads.

    One key in all tokens, at strength 2, is where rounded products lose most.
    """
    op, kind, dtype, packed = CASES[name]
    monkeypatch.setattr(decoding, "BLOCKS", 2)
    tokens = kind.get("tokens", TOKENS)
    compare(op, arguments(np.random.default_rng(3), **kind), dtype, 2e-6, IDS[:, -tokens:] if packed else None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("name", ["q", "k"])
def test_what_is_not_finite_stays_in_its_example(name, tokens, packed, interpreter, monkeypatch):
    """Heads share products, also those of other sequences of the batch; a query does not reach the state.

    Nor is such a key taken for padding.
    """
    monkeypatch.setattr(decoding, "BLOCKS", 1)
    arrays = cast(arguments(np.random.default_rng(6), tokens=tokens), "float32")
    ids = IDS[:, -tokens:] if packed else None
    run = jax.jit(functools.partial(mf.delta_rule, segment_ids=ids, implementation="pallas"))
    right = run(**arrays)
    bad = np.array(arrays[name])
    bad[1, -1] = np.nan
    output, state = run(**{**arrays, name: jnp.asarray(bad)})
    assert np.isnan(output[1, -1]).all() and np.isnan(state[1]).all() == (name == "k")
    np.testing.assert_array_equal(output[1, : tokens - 1], right[0][1, : tokens - 1])
    for got, want in zip((output, state), right, strict=True):
        np.testing.assert_array_equal(np.delete(got, 1, 0), np.delete(want, 1, 0))


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_infinity_stays_in_its_sequence(decay, interpreter):
    """Infinity that a sequence leaves in the state never reaches the next one of a packed row."""
    arrays = cast(arguments(np.random.default_rng(5), decay=decay), "float32")
    state = np.full((BATCH, 3, 8, 4), np.inf, np.float32)
    run = functools.partial(mf.delta_rule, segment_ids=IDS[:1].repeat(BATCH, 0), implementation="pallas")
    run = jax.jit(run)
    output, end = run(**arrays, initial_state=state)
    _, want = run(**arrays, initial_state=np.zeros_like(state))
    assert not np.isfinite(output[:, 0]).any()
    np.testing.assert_array_equal(end, want)


def test_derivatives_are_those_of_the_recurrence(interpreter):
    """First and second ones, under vmap too, and forward mode, also where jit hides it."""
    arrays = cast(arguments(np.random.default_rng(6), decay="head", tokens=2), "float32")
    arrays["decay"] = jnp.maximum(arrays["decay"], -5.0)

    @functools.partial(jax.jit, static_argnames="implementation")
    def derivatives(arrays, implementation):
        call = functools.partial(mf.delta_rule, implementation=implementation)
        v = arrays["v"]

        def loss(arrays):
            output, state = call(**arrays)
            return jnp.sum(jnp.sin(output)) + jnp.sum(state * state)

        def push(run):
            return jax.jvp(run(lambda v: loss(arrays | {"v": v})), (v,), (v,))

        second = jax.grad(lambda arrays: jnp.vdot(jax.grad(loss)(arrays)["v"], arrays["v"]))(arrays)["q"]
        mapped = jax.vmap(jax.jit(lambda v: call(**arrays | {"v": v})[0]))(jnp.stack([v, 2 * v]))
        return jax.grad(loss)(arrays), second, mapped, push(lambda f: f), push(jax.jit)

    assert_close(derivatives(arrays, "pallas"), derivatives(arrays, "recurrent"), 1e-6)


def test_explicit_mesh(interpreter):
    """Every device decodes its own rows and heads; nothing is gathered."""
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    rng = np.random.default_rng(8)
    shapes = {"q": (2, 1, 2, 8), "k": (2, 1, 2, 8), "v": (2, 1, 4, 4), "beta": (2, 1, 4)}
    arrays = {name: jnp.asarray(rng.uniform(0.0, 0.5, shape), "float32") for name, shape in shapes.items()}
    state = jnp.asarray(rng.standard_normal((2, 4, 8, 4)), "float32")
    run = jax.jit(mf.delta_rule, static_argnames="implementation")
    want = run(**arrays, initial_state=state, implementation="recurrent")
    places = dict.fromkeys(arrays, NamedSharding(mesh, PartitionSpec("rows", None, "columns")))
    sharded = jax.device_put(arrays, places)
    start = jax.device_put(state, NamedSharding(mesh, PartitionSpec("rows", "columns")))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda arrays, state: mf.delta_rule(**arrays, initial_state=state, implementation="pallas"))
        compiled = run.lower(sharded, start).compile()
        got = compiled(sharded, start)
    assert_close(got, want, 1e-6)
    assert got[1].sharding.is_equivalent_to(start.sharding, 4)
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))


def step_program(config, mesh, capacity=16):
    """The program of one step of decoding by a model, for the chip of an abstract mesh."""
    model = nnx.eval_shape(lambda: MemoryLM(config, vocab_size=11, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(model)

    def step(parameters, token, state):
        output = nnx.merge(graph, parameters)(token, state=state)
        return output.logits, output.state

    arrays = parameters, jnp.zeros((2, 1), jnp.int32), model.init_state(2, capacity)
    with jax.sharding.use_abstract_mesh(mesh):
        return str(jax.make_jaxpr(step)(*arrays))


@pytest.mark.parametrize("memory", ["kda", "linear_attention"])
def test_generation_takes_them(memory):
    """By default, and in place: a step of a model calls one kernel per layer."""
    config = from_preset("tiny", memory=memory)
    text = step_program(config, TPU)
    op = "linear_attention" if memory == "linear_attention" else "delta_rule"
    assert text.count(f"name=memformer_{op}_decode") == config.depth
    assert "input_output_aliases=((2, 1),)" in text and "while" not in text


def test_others_take_the_recurrence():
    """Calls that no kernel serves: more writes than it unrolls, and a state per document."""
    x, scalar = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 2))
    wide, many = (jnp.broadcast_to(x[:, :, None], (1, 4, 9, *x.shape[2:])) for x in (x, scalar))
    calls = {
        "at most 32 writes": lambda **kind: mf.delta_product(x, wide, wide, many, **kind),
        "one initial_state per row": functools.partial(
            mf.delta_rule, x, x, x, scalar, initial_state=jnp.zeros((1, 2, 2, 8, 8))
        ),
    }
    for message, call in calls.items():
        with jax.sharding.use_abstract_mesh(TPU):
            with pytest.raises(NotImplementedError, match=message):
                jax.eval_shape(lambda call=call: call(implementation="pallas"))
            assert "pallas_call" not in str(jax.make_jaxpr(call)())


CACHED = {"attention": "bfloat16", "forgetting": "float32", "linear write": "float32"}


@pytest.mark.parametrize("name", CACHED)
def test_attention_over_a_cache(name, interpreter, monkeypatch):
    """Shared heads, padding, three blocks of 128 slots, of which the last is cut off and not in use.

    One token and then three packed ones, or these alone.
    """
    monkeypatch.setattr(attention_decoding, "KEYS", 128)
    tolerance = 5e-6 if CACHED[name] == "float32" else 1e-2
    sizes = {"heads": 8, "groups": 4, "width": 8, "capacity": 300, "prompt": 130}
    cached_steps.check(name, CACHED[name], tolerance, **sizes, alone=name == "attention")


@pytest.mark.parametrize("memory", ["softmax_attention", "gated_deltaformer"])
def test_generation_reads_the_cache(memory):
    """By default a step of a model with a cache calls one kernel per layer."""
    config = from_preset("tiny", memory=memory, width=256, heads=2)
    text = step_program(config, TPU)
    assert text.count("name=memformer_attention_decode") == config.depth and "while" not in text


def test_narrow_heads_take_the_recurrence():
    x = jnp.ones((1, 1, 2, 64))
    cache = mf.init_cache("softmax_attention", batch=1, capacity=16, groups=2, key_width=64, value_width=64)
    with jax.sharding.use_abstract_mesh(TPU):
        assert "pallas_call" not in str(jax.make_jaxpr(lambda x: mf.softmax_attention(x, x, x, initial_state=cache))(x))
        with pytest.raises(NotImplementedError, match="channels in multiples of 128"):
            jax.eval_shape(lambda x: mf.softmax_attention(x, x, x, initial_state=cache, implementation="pallas"), x)


@pytest.mark.parametrize("op", ["softmax_attention", "deltaformer"])
def test_hidden_forward_mode_over_a_cache(op, interpreter):
    """Forward mode is the recurrence's, also where jit hides the tangents from the call."""
    rng = np.random.default_rng(4)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 2, heads, 8)), "float32") for heads in (2, 1, 1))
    cache = mf.init_cache(op, batch=1, capacity=3, groups=1, key_width=8, value_width=8)

    @functools.partial(jax.jit, static_argnames="implementation")
    def push(v, implementation):
        call = functools.partial(getattr(mf, op), initial_state=cache, implementation=implementation)
        read = jax.jit(lambda v: call(q, k, v)[0])
        return jax.jvp(read, (v,), (k,)), jax.jacfwd(lambda x: jnp.sum(read(x * v)))(jnp.float32(1))

    assert_close(push(v, "pallas"), push(v, "recurrent"), 1e-6)
