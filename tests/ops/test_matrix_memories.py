"""Matrix memories: identities between the ops, and hard cases of keys, decays, length and devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import memformer as mf
from memformer.ops.matrix_memory import chunked
from tests.numeric import FORWARD, GRADIENT, assert_close
from tests.ops.specs import HEADS, VALUE, WIDTH, log_decay, recurrent_arrays, unit

IMPLEMENTATIONS = ("recurrent", "chunked")
BATCH, LENGTH = 2, 71


def arrays(decay=None, batch=BATCH, length=LENGTH, dtype=np.float32):
    """q, k, v, beta and perhaps decay."""
    rng = np.random.default_rng(2)
    made = {
        "q": unit(rng, batch, length, HEADS, WIDTH),
        "k": unit(rng, batch, length, HEADS, WIDTH),
        "v": rng.standard_normal((batch, length, HEADS, VALUE)),
        "beta": rng.uniform(0.0, 2.0, (batch, length, HEADS)),
    }
    if decay == "head":
        made["decay"] = log_decay(rng, batch, length, HEADS)
    if decay == "channel":
        made["decay"] = log_decay(rng, batch, length, HEADS, WIDTH)
    return {key: x.astype(dtype) for key, x in made.items()}


def loss(arrays, **options):
    """A scalar that depends on output and state, and both of them."""
    output, state = mf.delta_rule(**arrays, **options)
    return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.sin(state)), (output, state)


@functools.cache
def gradients(**options):
    """One compiled function for output, state and gradients."""
    return jax.jit(jax.grad(functools.partial(loss, **options), has_aux=True))


def in_float64(arrays):
    """The recurrence in float64 on the same numbers."""
    with jax.enable_x64(True):
        wide = {key: jnp.asarray(np.asarray(x, np.float64)) for key, x in arrays.items()}
        return jax.tree.map(np.asarray, gradients(implementation="recurrent")(wide))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numpy_scale_changes_no_dtype(implementation):
    """Under x64 NumPy's float64 would widen what it multiplies."""
    with jax.enable_x64(True):
        call = functools.partial(mf.delta_rule, **arrays(), scale=np.float64(0.5), implementation=implementation)
        assert [x.dtype for x in jax.eval_shape(call)] == ["float32"] * 2


# The recurrence runs in float64, as the reference of other tests: one program of each kind of decay.
EITHER = {
    "recurrent": lambda given: in_float64(given),
    "chunked": lambda given: gradients(implementation="chunked")(given),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_decay_is_no_decay(implementation):
    given, run = arrays(), EITHER[implementation]
    want = run(given)[1]
    for shape in (given["beta"].shape, given["k"].shape):
        assert_close(run({**given, "decay": np.zeros(shape, np.float32)})[1], want, FORWARD["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("amount", [-1e4, -np.inf])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_very_negative_decay_keeps_only_the_last_write(implementation, amount, decay):
    given = arrays(decay)
    given["decay"] = np.full_like(given["decay"], amount)
    gradient, (output, state) = jax.device_get(EITHER[implementation](given))
    written = given["beta"][..., None] * given["v"]
    want = written * np.sum(given["q"] * given["k"], axis=-1, keepdims=True) / np.sqrt(WIDTH)
    assert_close(output, want, FORWARD["float32"])
    assert_close(state, given["k"][:, -1, :, :, None] * written[:, -1, :, None, :], FORWARD["float32"])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
    assert np.all(gradient["decay"] == 0)


@pytest.mark.parametrize("amount", [-1e4, -1e7, -np.inf])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_few_very_negative_decays_among_ordinary_ones(decay, amount):
    """A token that forgets everything does not blur the decays of its neighbours, nor their gradients."""
    given = arrays(decay)
    given["decay"][:, ::9] = amount
    got, want = gradients(implementation="chunked")(given), in_float64(given)
    assert_close(got[1], want[1], FORWARD["float32"])
    assert_close(got[0], want[0], GRADIENT["float32"])


@pytest.mark.parametrize("amount", [1, 5, 30, 70])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_gradient_of_strong_decays(decay, amount):
    """It shrinks as the state does, to 1e-30, and keeps its digits: no sum in it cancels."""
    given = arrays(decay)
    strength = 1 + 0.1 * np.sin(np.arange(given["decay"].size, dtype="float32"))
    given["decay"] = (-amount * strength).astype("float32").reshape(given["decay"].shape)
    got, want = gradients(implementation="chunked")(given), in_float64(given)
    assert_close(got[0], want[0], 1e-6 if amount < 70 else 1e-5)


@pytest.mark.parametrize("chunk_size", [64, 1024])
def test_a_chunk_of_very_negative_decays(chunk_size):
    """800 tokens that forget everything in one chunk: whole numbers of the cumulative decay still add exactly."""
    rng = np.random.default_rng(8)
    shape = (1, 1024, 1, 4)
    given = {key: rng.standard_normal(shape).astype("float32") for key in "qkv"}
    given["decay"] = np.full(shape[:3], -0.6, np.float32)
    given["decay"][:, :800] = -np.inf
    got, want = (
        jax.jit(functools.partial(mf.linear_attention, implementation=name, chunk_size=chunk_size))(**given)
        for name in ("chunked", "recurrent")
    )
    assert_close(got, want, FORWARD["float32"])


@pytest.mark.parametrize("size", [16, None])
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("keys", ["identical", "cosine 0.99"])
def test_adversarial_keys(keys, beta, size):
    """Repeated tokens: the inverse must not go through powers of the scores."""
    given = arrays()
    common = np.asarray(given["k"][:, :1], np.float64)
    key = common + (0 if keys == "identical" else 0.1) * np.asarray(given["k"])
    key = np.broadcast_to(key, given["k"].shape)
    given["k"] = (key / np.linalg.norm(key, axis=-1, keepdims=True)).astype("float32")
    given["beta"] = np.full_like(given["beta"], beta)
    options = {"chunk_size": size} if size else {}
    got, want = gradients(implementation="chunked", **options)(given), in_float64(given)
    assert_close(got[1], want[1], FORWARD["float32"])
    # Measured 1.2e-4 with chunks of 64 at beta 2 and 7e-5 with 16 (the recurrence: 5e-6): sums of alternating signs
    # in the inverse grow with the chunk.
    assert_close(got[0], want[0], GRADIENT["float32"] * (2 if (beta, size) == (2.0, None) else 1))


def test_groups_of_chunks_agree(monkeypatch):
    """Groups of several chunks, as on accelerators, agree with groups of one, as on a CPU."""
    given = arrays("channel")
    want = in_float64(given)
    monkeypatch.setattr(chunked, "_group_size", lambda *_: 3)
    got = jax.jit(jax.grad(functools.partial(loss, implementation="chunked", chunk_size=8), has_aux=True))(given)
    assert_close(got[1], want[1], FORWARD["float32"])
    assert_close(got[0], want[0], GRADIENT["float32"])


def test_a_long_sequence_of_the_usual_size():
    """Rounding does not accumulate over 2,000 tokens of width 64, nor that of gradients: against loops in NumPy."""
    rng = np.random.default_rng(5)
    shape = (1, 2000, 1, 64)
    made = {"q": unit(rng, *shape), "k": unit(rng, *shape), "v": rng.standard_normal(shape)}
    made |= {"beta": rng.uniform(0.0, 2.0, shape[:3]), "decay": -np.exp(rng.uniform(-8.0, -2.0, shape[:3]))}
    given = {key: x.astype("float32") for key, x in made.items()}
    weights = rng.standard_normal(shape).astype("float32")

    def weighted(v):
        output, state = mf.delta_rule(**given | {"v": v}, implementation="chunked")
        return jnp.vdot(weights, output), (output, state)

    got = jax.jit(jax.grad(weighted, has_aux=True))(given["v"])
    q, k, v, beta, decay = (given[key][0, :, 0].astype("float64") for key in ("q", "k", "v", "beta", "decay"))
    state, slope = np.zeros((64, 64)), np.zeros((64, 64))
    output, gradient = np.zeros((2, *v.shape))
    for t in range(len(v)):
        state = np.exp(decay[t]) * state
        state = state + beta[t] * np.outer(k[t], v[t] - k[t] @ state)
        output[t] = q[t] @ state / 8
    for t in reversed(range(len(v))):
        slope = slope + np.outer(q[t], weights[0, t, 0]) / 8
        gradient[t] = beta[t] * k[t] @ slope
        slope = np.exp(decay[t]) * (slope - np.outer(k[t], gradient[t]))
    assert_close(got[1], (output[None, :, None], state[None, None]), FORWARD["float32"])
    assert_close(got[0], gradient[None, :, None], GRADIENT["float32"])


def test_product_of_one_step_is_the_delta_rule():
    given = arrays("head")
    want = gradients(implementation="chunked")(given)[1]
    steps = {key: given[key][:, :, None] for key in ("k", "v", "beta")}
    call = jax.jit(functools.partial(mf.delta_product, implementation="chunked"))
    assert_close(call(q=given["q"], decay=given["decay"], **steps), want, FORWARD["float32"])


def test_memory_is_linear_in_length():
    """Temporaries of the compiled forward and backward pass, 4096 tokens against 16384, with a decay per channel."""

    def temporaries(length):
        shapes = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in arrays("channel", 1, length).items()}
        compiled = gradients(implementation="chunked").lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16384) <= 4.6 * temporaries(4096)


def test_default_is_one_token_by_recurrence():
    """One token runs the recurrence, not a chunk."""
    given = arrays(length=1)
    text = jax.jit(mf.delta_rule).lower(**given).as_text(debug_info=True)
    assert "memformer.delta_rule.recurrent" in text
    text = jax.jit(mf.delta_rule).lower(**arrays()).as_text(debug_info=True)
    assert "memformer.delta_rule.chunked" in text


def test_under_checkpoint():
    given = arrays("head")
    want = gradients(implementation="chunked")(given)
    wrapped = jax.checkpoint(functools.partial(loss, implementation="chunked"))
    got = jax.jit(jax.grad(wrapped, has_aux=True))(given)
    assert_close(got, want, GRADIENT["float32"])


def devices(*shape):
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("data", "tensor"))


def test_inside_shard_map():
    """From the state that the op makes itself, which varies over the mesh as its arguments do."""
    by_head, of_state = P("data", None, "tensor"), P("data", "tensor")
    local = lambda arrays: mf.delta_rule(**arrays, implementation="chunked")  # noqa: E731
    mapped = jax.shard_map(local, mesh=devices(2, 2), in_specs=by_head, out_specs=(by_head, of_state))

    def total(arrays):
        output, last = mapped(arrays)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.sin(last))

    given = arrays("head")
    want = gradients(implementation="chunked")(given)[0]
    assert_close(jax.jit(jax.grad(total))(given), want, GRADIENT["float32"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_erase_vector_and_write_strength(implementation):
    """S_t = S' + k (alpha v - beta S'^T w)^T, two writes per token, against a loop, in float64."""
    rng = np.random.default_rng(11)
    rows = (BATCH, 9, 2)
    q, decay = unit(rng, *rows[:2], HEADS, WIDTH), log_decay(rng, *rows[:2], HEADS, WIDTH)
    k, w = (unit(rng, *rows, HEADS, WIDTH) for _ in range(2))
    v, start = rng.standard_normal((*rows, HEADS, VALUE)), rng.standard_normal((BATCH, HEADS, WIDTH, VALUE))
    alpha, beta = (rng.uniform(0, 2, (*rows, HEADS)) for _ in range(2))
    state, want = start.copy(), np.zeros((*rows[:2], HEADS, VALUE))
    for t in range(rows[1]):
        state = state * np.exp(decay[:, t])[..., None]
        for n in range(rows[2]):
            erased = beta[:, t, n, :, None] * np.einsum("bhk,bhkv->bhv", w[:, t, n], state)
            state = state + k[:, t, n, ..., None] * (alpha[:, t, n, :, None] * v[:, t, n] - erased)[..., None, :]
        want[:, t] = 0.5 * np.einsum("bhk,bhkv->bhv", q[:, t], state)
    with jax.enable_x64(True):
        options = {"scale": 0.5, "initial_state": start, "chunk_size": 4, "implementation": implementation}
        call = jax.jit(functools.partial(mf.delta_product, **options))
        output, last = call(q, k, v, beta, w=w, alpha=alpha, decay=decay)
        assert_close({"output": output, "state": last}, {"output": want, "state": state}, 1e-12)


def test_default_erase_vector_and_write_strength():
    """w = k and alpha = beta, given, agree with the defaults."""
    given = arrays("channel")
    got = jax.jit(mf.delta_rule)(**given, w=given["k"], alpha=given["beta"])
    assert_close(got, gradients(implementation="chunked")(given)[1], 1e-6)


OPS_OF_DOCUMENTS = {
    "delta_rule": recurrent_arrays("head", erase=True),
    "delta_product": recurrent_arrays("channel", steps=2),
    "linear_attention": recurrent_arrays("channel", beta=False, groups=1),
}
# Three and two documents with padding before, inside and behind them, and places for four.
DOCUMENTS = np.array(
    [[0] * 2 + [4] * 5 + [0] * 2 + [4] * 4 + [1] * 18 + [4] * 6 + [0] * 4, [3] * 1 + [5] * 40], np.int32
)


@functools.cache
def documents_of(name):
    """Arguments of an op and the states of its documents."""
    rng = np.random.default_rng(9)
    given = {key: x.astype("float32") for key, x in OPS_OF_DOCUMENTS[name](rng, *DOCUMENTS.shape).items()}
    return given, rng.standard_normal((2, 4, HEADS, WIDTH, VALUE)).astype("float32")


def places_of_documents():
    """[8, T] the tokens of each document, T where there are no more, and the row and place that holds each token."""
    total, rows = DOCUMENTS.shape[1], []
    held = np.zeros((2, *DOCUMENTS.shape), np.int32)
    for row, ids in enumerate(DOCUMENTS):
        tokens = np.flatnonzero(ids)
        index = np.cumsum(np.diff(ids[tokens], prepend=ids[tokens[0]]) != 0)
        for part in range(4):
            own = tokens[index == part]
            held[:, row, own] = [np.full(len(own), len(rows)), np.arange(len(own))]
            rows.append(np.concatenate([own, np.full(total - len(own), total)]))
    return np.stack(rows), held


@functools.cache
def documents_apart(name):
    """All documents as rows of one call of the recurrence, padded on the right: gradients, and output and states."""
    (given, states), (rows, held) = documents_of(name), places_of_documents()
    ids, owner = (rows < DOCUMENTS.shape[1]).astype("int32"), np.repeat(np.arange(2), 4)[:, None]

    def apart(given, states):
        alone = {key: jnp.concatenate([x, x[:, :1]], axis=1)[owner, rows] for key, x in given.items()}
        states = states.reshape(8, *states.shape[2:])
        output, last = getattr(mf, name)(**alone, segment_ids=ids, initial_state=states, implementation="recurrent")
        valid = (DOCUMENTS != 0)[..., None, None]
        whole, last = jnp.where(valid, output[held[0], held[1]], 0.0), last.reshape(2, 4, *last.shape[1:])
        return jnp.sum(jnp.sin(whole)) + jnp.sum(jnp.sin(last)), (whole, last)

    return jax.device_get(jax.jit(jax.grad(apart, argnums=(0, 1), has_aux=True))(given, states))


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("delta_product", "chunked"), ("linear_attention", "chunked"), ("delta_product", "recurrent")],
)
def test_states_per_document(name, implementation):
    """Each document agrees with a call of its own that starts from its state; the fourth place keeps its state.

    The recurrence is one function for all ops; the test on a mesh has the delta rule.
    """
    given, states = documents_of(name)
    options = {"implementation": implementation} | ({"chunk_size": 8} if implementation == "chunked" else {})

    def together(given, states):
        output, last = getattr(mf, name)(**given, segment_ids=DOCUMENTS, initial_state=states, **options)
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.sin(last)), (output, last)

    got = jax.device_get(jax.jit(jax.grad(together, argnums=(0, 1), has_aux=True))(given, states))
    want = documents_apart(name)
    assert_close(got[1], want[1], FORWARD["float32"])
    assert_close(got[0], want[0], GRADIENT["float32"])
    assert np.array_equal(got[1][1][1, 2:], states[1, 2:])


def test_states_per_document_on_a_mesh():
    """The states stay sharded over batch and heads, and nothing is gathered (the count of segments is reduced)."""
    given, states = documents_of("delta_rule")
    given = {key: np.repeat(x, 2, axis=2) if x.shape[2] == 1 else x for key, x in given.items()}

    def run(given, states, ids, implementation="chunked"):
        return mf.delta_rule(**given, segment_ids=ids, initial_state=states, implementation=implementation)

    want = jax.device_get(jax.jit(functools.partial(run, implementation="recurrent"))(given, states, DOCUMENTS))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P("data", *axes)))  # noqa: E731
    sharded = {key: place(x, None, "tensor") for key, x in given.items()}
    with jax.set_mesh(mesh):
        arguments = sharded, place(states, None, "tensor"), place(jnp.asarray(DOCUMENTS))
        program = jax.jit(run).lower(*arguments).compile()
        output, last = program(*arguments)
    assert not re.search("all-gather|all-to-all|collective-permute", program.as_text())
    assert last.sharding.is_equivalent_to(NamedSharding(mesh, P("data", None, "tensor")), 5)
    assert_close((output, last), want, FORWARD["float32"])


def test_more_documents_than_states_is_an_error():
    given, ids = arrays(length=5), np.array([[1, 1, 2, 2, 3], [1, 1, 1, 1, 2]], np.int32)
    states = np.zeros((BATCH, 2, HEADS, WIDTH, VALUE), np.float32)
    message = "initial_state has states of 2 documents per row, got 3 segments in a row"
    with pytest.raises(ValueError, match=message):
        mf.delta_rule(**given, segment_ids=ids, initial_state=states)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(jax.jit(mf.delta_rule)(**given, segment_ids=ids, initial_state=states))
    with pytest.raises(NotImplementedError, match="not one per document; .*'chunked'"):
        mf.delta_rule(**given, initial_state=states, implementation="pallas")
    with pytest.raises(ValueError, match=r"initial_state must be \[B, P, H, K, V\]"):
        mf.delta_rule(**given, initial_state=states[..., :1])
