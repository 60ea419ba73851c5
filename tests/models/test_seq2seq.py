"""Sequence to sequence: packing, padding, decoding, gradients, a NumPy loop as oracle, beam search, user errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.models.beam import decode
from memformer.models.seq2seq import Seq2Seq, Seq2SeqConfig
from tests.modules import draws_random_bits, random_module
from tests.numeric import FORWARD, assert_close, slopes

VOCAB, WIDTH = 9, 6
# Two pairs (source, inputs): unpacked in two rows, packed in one with padding between and after them.
PAIRS = [([4, 5, 6], [1, 7, 8, 3]), ([8, 2], [1, 5, 4])]
ROWS = {
    "source": [[4, 5, 6, 0, 0, 0, 0], [8, 2, 0, 0, 0, 0, 0]],
    "source_segment_ids": [[1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]],
    "inputs": [[1, 7, 8, 3, 0, 0, 0, 0], [1, 5, 4, 0, 0, 0, 0, 0]],
    "segment_ids": [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]],
}
PACKED = {
    "source": [[4, 5, 6, 0, 8, 2, 0], [8, 2, 4, 5, 6, 0, 0]],
    "source_segment_ids": [[1, 1, 1, 0, 2, 2, 0], [5, 5, 3, 3, 3, 0, 0]],
    "inputs": [[1, 7, 8, 3, 1, 5, 4, 0], [0, 1, 5, 4, 1, 7, 8, 3]],
    "segment_ids": [[1, 1, 1, 1, 2, 2, 2, 0], [0, 5, 5, 5, 3, 3, 3, 3]],
}


def make(attention="additive", depth=2, dtype="float32", dropout=0.0):
    sizes = {"width": WIDTH, "depth": depth, "dtype": dtype, "param_dtype": dtype, "dropout": dropout}
    return Seq2Seq(Seq2SeqConfig(attention=attention, **sizes), vocab_size=VOCAB, rngs=nnx.Rngs(0, dropout=1))


@functools.cache
def build(attention="additive", depth=2, dtype="float32"):
    return random_module(lambda: make(attention, depth, dtype))


@functools.cache
def compiled(attention):
    graph, parameters = nnx.split(build(attention))
    call = jax.jit(lambda parameters, **batch: nnx.merge(graph, parameters)(**batch))

    def run(**batch):
        return call(parameters, **{k: v if k == "state" else np.asarray(v, np.int32) for k, v in batch.items()})

    return run


def reference(model, source, inputs):
    """Logits and weights of one pair, step by step in NumPy without masks."""
    get = lambda x: np.asarray(x[...], np.float64)  # noqa: E731
    table, width = get(model.embedding.table), model.config.width

    def lstm(layer, x, state):
        gates = x @ get(layer.w_in) + state[0] @ get(layer.w_state) + get(layer.bias)
        i, f, g, o = np.split(gates, 4)
        sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
        c = sigmoid(f) * state[1] + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    def read(layer, xs):
        state, out = (np.zeros(width), np.zeros(width)), []
        for x in xs:
            state = lstm(layer, x, state)
            out.append(state[0])
        return out

    states = [table[i] * width**0.5 for i in source]
    for i in range(model.config.depth):
        ahead = read(model.encoder.forward[i], states)
        back = read(model.encoder.backward[i], states[::-1])[::-1] if model.attention is not None else None
        states = ahead if back is None else [np.concatenate(pair) for pair in zip(ahead, back, strict=True)]
    whole = states[-1] if model.attention is None else states[0][width:]
    parts = np.split(np.tanh(whole @ get(model.first.kernel) + get(model.first.bias)), 2 * model.config.depth)
    now = [tuple(parts[2 * i : 2 * i + 2]) for i in range(model.config.depth)]
    logits, weights, states = [], [], np.stack(states)
    for token in inputs:
        word, seen = table[token] * width**0.5, []
        if model.attention is not None:
            a = model.attention
            keys = states @ get(a.key.kernel) + get(a.key.bias)
            scores = np.tanh(now[-1][0] @ get(a.query.kernel) + keys) @ get(a.score)
            weights.append(np.exp(scores) / np.exp(scores).sum())
            seen = [weights[-1] @ states]
        x = np.concatenate([word, *seen])
        for i, layer in enumerate(model.decoder.forward):
            now[i] = lstm(layer, x, now[i])
            x = now[i][0]
        out = np.tanh(np.concatenate([word, x, *seen]) @ get(model.out.kernel) + get(model.out.bias))
        logits.append(table @ out)
    return np.stack(logits), np.array(weights)


@pytest.mark.parametrize("attention", ["none", "additive"])
def test_packed_padded_and_plain_rows_equal_the_loop(attention):
    padded = np.asarray(compiled(attention)(**ROWS).logits)
    packed = np.asarray(compiled(attention)(**PACKED).logits)
    for i, (source, inputs) in enumerate(PAIRS):
        want, _ = reference(build(attention), source, inputs)
        assert_close(padded[i, : len(inputs)], want, FORWARD["float32"], f"pair {i}, padded")
    for row, starts in enumerate([(0, 4), (4, 1)]):
        for i, start in enumerate(starts):
            length = len(PAIRS[i][1])
            got = packed[row, start : start + length]
            assert_close(got, padded[i, :length], FORWARD["float32"], f"pair {i}, packed in row {row}")
    assert padded.dtype == jnp.float32


def test_alignments_are_the_weights_and_stay_in_their_pair():
    model = build()
    graph, parameters = nnx.split(model)
    look = jax.jit(lambda parameters, batch: nnx.merge(graph, parameters).alignments(**batch))
    weights = np.asarray(look(parameters, {key: np.asarray(value, np.int32) for key, value in PACKED.items()}))
    assert weights.shape == (2, 1, 1, 8, 7) and weights.dtype == jnp.float32
    targets, sources = np.asarray(PACKED["segment_ids"]), np.asarray(PACKED["source_segment_ids"])
    visible = (targets[:, :, None] == sources[:, None, :]) & (targets != 0)[:, :, None]
    assert not np.any(np.asarray(weights[:, 0, 0])[~visible])
    np.testing.assert_allclose(np.sum(weights[:, 0, 0], -1), targets != 0, atol=1e-6)
    assert_close(weights[0, 0, 0, :4, :3], reference(model, *PAIRS[0])[1], FORWARD["float32"])


@pytest.mark.parametrize("attention", ["none", "additive"])
def test_decoding_equals_one_call(attention):
    call, model = compiled(attention), build(attention)
    want = jax.device_get(call(**ROWS))
    source, segments = np.asarray(ROWS["source"], np.int32), np.asarray(ROWS["source_segment_ids"], np.int32)
    state = jax.jit(lambda source, segments: model.start(source, segments, capacity=8))(source, segments)
    logits = []
    for t in range(8):
        where = {key: np.asarray(ROWS[key])[:, t : t + 1] for key in ("inputs", "segment_ids")}
        output = call(**where, state=state)
        logits.append(np.asarray(output.logits)[:, 0])
        state = output.state
    valid = np.asarray(ROWS["segment_ids"]) != 0
    assert_close(np.stack(logits, 1)[valid], want.logits[valid], FORWARD["float32"])
    assert_close(state["decoder"], want.state["decoder"], FORWARD["float32"])
    np.testing.assert_array_equal(state["segment"], [1, 1])


def test_without_attention_only_the_last_state_is_kept():
    sizes = {}
    for name in ("none", "additive"):
        state = jax.eval_shape(build(name).start, jax.ShapeDtypeStruct((1, 50), jnp.int32))
        sizes[name] = sum(x.size for x in jax.tree.leaves(state))
    assert sizes["none"] == 2 * 2 * WIDTH + 1 and sizes["additive"] > 50 * WIDTH


@pytest.mark.parametrize("attention", ["none", "additive"])
def test_gradients_equal_finite_differences(attention):
    with jax.enable_x64(True):
        graph, parameters = nnx.split(build(attention, 1, "float64"))
        batch = {key: np.asarray(value, np.int32) for key, value in PACKED.items()}
        goal = np.random.default_rng(0).normal(size=(2, 8, VOCAB))

        @jax.jit
        @jax.value_and_grad
        def run(parameters):
            return jnp.sum(nnx.merge(graph, parameters)(**batch).logits * goal)

        gradients = run(parameters)[1]
        for seed in range(3):
            assert_close(*slopes(run, parameters, seed=seed, step=1e-5), 1e-6)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
            assert np.any(leaf), jax.tree_util.keystr(path)


def test_beam_scores_equal_one_call(attention="additive"):
    source = {key: np.asarray(ROWS[key], np.int32) for key in ("source", "source_segment_ids")}
    tokens, scores = decode(build(attention), start=1, end=2, beams=3, max_steps=7, length_penalty=0.5, **source)
    assert tokens.shape == (2, 3, 7) and np.all(np.diff(scores) <= 0)
    best = tokens[:, 0]
    length = np.where(np.any(best == 2, 1), np.argmax(best == 2, 1) + 1, 7)
    inputs = np.concatenate([np.ones((2, 1), int), best, np.zeros((2, 0), int)], 1)
    where = {"inputs": inputs, "segment_ids": np.ones_like(inputs)}
    logits = np.asarray(compiled(attention)(**source, **where).logits, np.float64)
    logits -= np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    for row in range(2):
        total = sum(logits[row, t, best[row, t]] for t in range(length[row]))
        np.testing.assert_allclose(scores[row, 0], total / ((5 + length[row]) / 6) ** 0.5, rtol=1e-4)


def test_dropout_applies_in_training_only():
    batch = {key: np.asarray(value, np.int32) for key, value in ROWS.items()}
    for training in (False, True):
        dropped = functools.partial(make, "none", 1, dropout=0.5)
        assert draws_random_bits(dropped, lambda model: model(**batch).logits, training) == training


MISTAKES = {
    "neither": ({}, "give either source, to start targets, or state, .* got neither"),
    "inputs": ({"inputs": jnp.zeros((1, 2)), "source": jnp.ones((1, 3), int)}, "inputs must have an integer dtype"),
    "rows": ({"source": jnp.ones((2, 3), int)}, r"source must be \[B, S\] with B = 1"),
    "segments": ({"source": jnp.ones((1, 3), int), "segment_ids": jnp.ones((1, 3), int)}, "segment_ids must be"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_user_errors_of_calls_are_named(name):
    arguments, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        build()(**{"inputs": jnp.ones((1, 2), int), **arguments})


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"features": 3}, "features must be 0"),
        ({"num_classes": 4}, "num_classes must be vocab_size = 9"),
    ],
)
def test_user_errors_of_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        Seq2Seq(Seq2SeqConfig(), vocab_size=VOCAB, rngs=nnx.Rngs(0), **sizes)


def test_user_errors_of_configs_are_named():
    for fields, message in (
        ({"attention": "dot"}, "attention must be one of"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"width": 0}, "width must be a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            Seq2SeqConfig(**fields)
    with pytest.raises(ValueError, match="alignments require a model with attention"):
        build("none").alignments(jnp.ones((1, 2), int), source=jnp.ones((1, 2), int))
