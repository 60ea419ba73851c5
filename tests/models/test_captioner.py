"""Captioners: equations, gradients, masks, packing, decoding. tests/lab/test_captions.py trains one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.core.segments import find_segments
from memformer.models import MODELS, build_model
from memformer.models.beam import decode
from memformer.models.captioner import CaptionerConfig, doubly_stochastic
from memformer.models.picture import ConvGrid, PatchGrid, add_places
from tests.modules import draws_random_bits, random_module
from tests.numeric import FORWARD, assert_close, relative_rms, slopes

VOCAB, B, T = 11, 2, 7

# Weight of the doubly stochastic loss: not 1, so that a missing factor shows.
WEIGHT = 2.0

# Name: options of the model, and sides of the grid of a 16 x 16 picture.
SPECS = {
    "lstm": ({"channels": (6, 8), "doubly_stochastic": WEIGHT}, (8, 8)),
    "transformer": (
        {"decoder": "transformer", "grid": "patches", "encoder_depth": 1, "doubly_stochastic": WEIGHT},
        (4, 4),
    ),
}


def make(name, **changed):
    keys = {"type": "captioner", "width": 16, "heads": 2, **SPECS[name][0], **changed}
    return build_model(keys, vocab_size=VOCAB, rngs=nnx.Rngs(params=0, dropout=1))


@functools.cache
def build(name, **changed):
    return random_module(lambda: make(name, **changed))


@functools.cache
def compiled(name):
    """(words, segment_ids, picture) -> (logits, aux, maps), compiled once for all tests of a row."""
    graph, params = nnx.split(build(name))

    @jax.jit
    def call(words, segment_ids, picture):
        model = nnx.merge(graph, params)
        output = model(words, segment_ids=segment_ids, picture=picture)
        return output.logits, output.aux, model.alignments(words, segment_ids=segment_ids, picture=picture)

    return call


def call(name, words, picture, segments=None):
    segments = np.ones((B, T)) if segments is None else [segments] * B
    return jax.device_get(compiled(name)(words, np.asarray(segments, np.int32), picture))


def draw(seed=0):
    rng = np.random.default_rng(seed)
    words = rng.integers(3, VOCAB, (B, T), np.int32)
    return words, rng.random((B, 16, 16, 3)).astype(np.float32)


def spread(maps):
    """The doubly stochastic loss of one caption per row, in NumPy."""
    return WEIGHT * np.mean((1 - np.asarray(maps, np.float64).sum(1)) ** 2)


@pytest.mark.parametrize("name", SPECS)
def test_shapes_dtypes_and_maps(name):
    words, picture = draw()
    logits, aux, maps = call(name, words, picture)
    assert logits.shape == (B, T, VOCAB) and logits.dtype == jnp.float32
    assert set(aux) == {"doubly_stochastic"}
    assert_close(aux["doubly_stochastic"], spread(maps), FORWARD["float32"])
    assert maps.shape == (B, T, *SPECS[name][1]) and maps.dtype == jnp.float32
    np.testing.assert_allclose(maps.sum((2, 3)), 1, rtol=1e-5)
    # The maps differ between words.
    assert np.max(np.abs(maps[:, 1:] - maps[:, :-1])) > 1e-4


@pytest.mark.parametrize("name", SPECS)
def test_bfloat16_compute_gives_float32_logits(name):
    words, picture = draw()
    model = build(name, dtype="bfloat16")
    run = jax.jit(lambda words, picture: model(words, picture=picture).logits)
    assert jax.eval_shape(run, words, picture).dtype == jnp.float32
    if name == "transformer":
        # the values of its blocks: test_transformer.py
        return
    logits = run(words, picture)
    assert 1e-5 < relative_rms(logits, call(name, words, picture)[0]) < 5e-2


@pytest.mark.parametrize("name", SPECS)
def test_gradient_by_finite_differences(name):
    """Through image encoder, attention, gate, decoder and read-out, over all steps, in float64."""
    # The norms of flax promote float64 with float32, which strict promotion refuses.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        keys = {"type": "captioner", "width": 8, "heads": 2, "depth": 1, **SPECS[name][0]}
        keys.update(dtype="float64", param_dtype="float64")
        graph, params = nnx.split(random_module(lambda: build_model(keys, vocab_size=VOCAB, rngs=nnx.Rngs(0))))
        words, picture = draw()
        segments = np.asarray([[1] * T, [1] * 4 + [0] * 3], np.int32)

        def loss(arrays):
            params, picture = arrays
            output = nnx.merge(graph, params)(words, segment_ids=segments, picture=picture)
            chance = jax.nn.log_softmax(output.logits)[:, :, 3] * (segments > 0)
            return output.aux["doubly_stochastic"] - jnp.mean(chance)

        at = (params, picture.astype(np.float64))
        both = jax.jit(jax.value_and_grad(loss))
        slope = both(at)[1]
        for part in range(2):
            # Along the parameters, then along the picture.
            def of_part(x, part=part):
                value, gradient = both((x, at[1]) if part == 0 else (at[0], x))
                return value, gradient[part]

            got, want = slopes(of_part, at[part], seed=part)
            assert abs(want) > 1e-5
            assert abs(got - want) < 1e-5 * abs(want) + 1e-8
        # Every parameter has a gradient except a bias shared by all keys of a softmax.
        dead = [path for path, g in nnx.to_flat_state(slope[0]) if np.abs(g.get_value()).max() < 1e-14]
        assert all("key" in path and "bias" in path for path in dead), dead


@pytest.mark.parametrize("name", SPECS)
def test_padding_changes_nothing(name):
    words, picture = draw()
    logits, _, maps = call(name, words, picture)
    # After the caption.
    padded, aux, seen = call(name, words * (np.arange(T) < 4).astype(np.int32), picture, [1] * 4 + [0] * 3)
    assert_close(padded[:, :4], logits[:, :4], FORWARD["float32"])
    assert_close(seen[:, :4], maps[:, :4], FORWARD["float32"])
    np.testing.assert_array_equal(seen[:, 4:], 0)
    assert_close(aux["doubly_stochastic"], spread(maps[:, :4]), FORWARD["float32"])
    # Inside the caption.
    between = words[:, [0, 1, 5, 5, 2, 3, 5]]
    padded, aux, _ = call(name, between, picture, [1, 1, 0, 0, 1, 1, 0])
    assert_close(padded[:, [0, 1, 4, 5]], logits[:, :4], FORWARD["float32"])
    assert_close(aux["doubly_stochastic"], spread(maps[:, :4]), FORWARD["float32"])


@pytest.mark.parametrize("name", SPECS)
def test_packed_captions_are_captions_of_one_picture(name):
    words, picture = draw()
    packed, aux, _ = call(name, words, picture, [1] * 3 + [2] * 4)
    first, _, maps = call(name, words, picture)
    second, _, later = call(name, np.roll(words, -3, axis=1), picture)
    assert_close(packed, np.concatenate([first[:, :3], second[:, :4]], 1), FORWARD["float32"])
    both = (spread(maps[:, :3]) + spread(later[:, :4])) / 2
    assert_close(aux["doubly_stochastic"], both, FORWARD["float32"])


@pytest.mark.parametrize("name", SPECS)
def test_decoding_with_state_is_the_full_pass(name):
    words, picture = draw()
    graph, params = nnx.split(build(name))
    step = jax.jit(lambda word, state: nnx.merge(graph, params)(word, state=state))
    state, logits = jax.jit(lambda picture: nnx.merge(graph, params).start(picture, T))(picture), []
    for t in range(T):
        output = step(words[:, t : t + 1], state)
        assert output.aux == {}
        state = output.state
        logits.append(output.logits)
    assert_close(np.concatenate(logits, 1), call(name, words, picture)[0], FORWARD["float32"])


@pytest.mark.parametrize("name", SPECS)
def test_greedy_search_takes_the_most_probable_words(name):
    _, picture = draw()
    tokens, _ = decode(build(name), start=1, end=2, beams=1, max_steps=T, length_penalty=0.0, picture=picture)
    read = np.ones((B, T), np.int32)
    for t in range(T):
        best = call(name, read, picture)[0][:, t].argmax(-1)
        ended = t > 0 and read[:, t] == 2
        said = np.where(ended, 2, best)
        np.testing.assert_array_equal(tokens[:, 0, t], said)
        if t + 1 < T:
            read[:, t + 1] = said


@pytest.mark.parametrize("name", SPECS)
def test_words_depend_on_their_picture_and_on_the_past_only(name):
    words, picture = draw()
    logits = call(name, words, picture)[0]
    later = call(name, np.where(np.arange(T) < 5, words, np.int32(3)), picture)[0]
    assert_close(later[:, :5], logits[:, :5], FORWARD["float32"])
    assert relative_rms(later[:, 5:], logits[:, 5:]) > 1e-3
    other = call(name, words, np.stack([picture[0], 1 - picture[1]]))[0]
    assert_close(other[0], logits[0], FORWARD["float32"])
    assert relative_rms(other[1], logits[1]) > 1e-3


def test_lstm_decoder_against_plain_loops():
    """Section 3.1.2 of arXiv 1502.03044 in NumPy, with the weights of the model."""
    words, picture = draw()
    model = build("lstm")
    d, table = model.decoder, np.asarray(model.embedding.table[...], np.float64)

    def apply(layer, x):
        bias = 0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
        return x @ np.asarray(layer.kernel[...], np.float64) + bias

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    a = np.asarray(nnx.jit(lambda grid, x: grid(x))(model.grid, picture), np.float64).reshape(B, -1, model.grid.width)
    h, c = np.split(np.tanh(apply(d.first, a.mean(1))), 2, -1)
    logits, maps = [], []
    for t in range(T):
        e = np.tanh(apply(d.attention.query, h)[:, None] + apply(d.attention.key, a))
        alpha = np.exp(e @ np.asarray(d.attention.score[...], np.float64))
        alpha /= alpha.sum(1, keepdims=True)
        z = sigmoid(apply(d.gate, h)) * np.einsum("bs,bsf->bf", alpha, a)
        y = table[np.asarray(words[:, t])] * 16**0.5
        entering = np.concatenate([y, z], -1) @ np.asarray(d.lstm.w_in[...], np.float64)
        i, f, g, o = np.split(entering + h @ np.asarray(d.lstm.w_state[...]) + np.asarray(d.lstm.bias[...]), 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        logits.append(apply(model.head, y + apply(d.from_state, h) + apply(d.from_read, z)))
        maps.append(alpha)
    got, _, seen = call("lstm", words, picture)
    assert_close(got, np.stack(logits, 1), FORWARD["float32"])
    assert_close(seen, np.stack(maps, 1).reshape(seen.shape), FORWARD["float32"])


def test_doubly_stochastic_against_plain_loops():
    rng = np.random.default_rng(0)
    weights = rng.random((3, 6, 5)).astype(np.float32)
    ids = np.array([[1, 1, 2, 2, 2, 0], [0, 4, 0, 4, 4, 4], [0] * 6])
    parts = []
    for b, i in ((0, 1), (0, 2), (1, 4)):
        visits = weights[b][ids[b] == i].sum(0)
        parts.append(np.mean((1 - visits) ** 2))

    @jax.jit
    def both(weights, ids):
        return doubly_stochastic(weights, find_segments(ids, {})), doubly_stochastic(weights)

    assert_close(both(weights, ids), (np.mean(parts), spread(weights) / WEIGHT), FORWARD["float32"])


def test_no_doubly_stochastic_loss():
    model = build("transformer", doubly_stochastic=0.0)
    assert jax.eval_shape(lambda words, picture: model(words, picture=picture).aux, *draw()) == {}


def test_dropout_applies_in_training_only(name="transformer"):
    words, picture = draw()
    for training in (False, True):
        call = lambda model: model(words, picture=picture).logits  # noqa: E731
        assert draws_random_bits(lambda: make(name, dropout=0.5), call, training) == training


def test_positions_of_the_grid_differ():
    places = np.asarray(jax.jit(add_places)(np.zeros((1, 8, 8, 16), np.float32))).reshape(64, 16)
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    assert distances[~np.eye(64, dtype=bool)].min() > 0.3


def test_patches_are_local():
    """Before the blocks, a change inside a patch changes only the vector of that patch."""
    model = build("transformer")
    blocks, model.grid.blocks = model.grid.blocks, nnx.List([])
    picture = draw()[1][:1]
    changed = picture.copy()
    changed[0, 5, 14] += 0.3
    call = nnx.jit(lambda grid, x: grid(x))
    moved = np.any(np.asarray(call(model.grid, changed)) != np.asarray(call(model.grid, picture)), axis=-1)[0]
    model.grid.blocks = blocks
    assert moved.sum() == 1 and moved[1, 3]


CASES = {
    "both": ({"state": {}}, "give either picture, to start captions, or state, .* got both"),
    "neither": ({"picture": None}, "give either picture, .* got neither"),
    "channels": ({"picture": np.ones((B, 16, 16, 4), np.float32)}, "picture must be .B, Y, X, channels."),
    "ints": ({"picture": np.ones((B, 16, 16, 3), np.int32)}, "picture must have a floating dtype"),
    "rows": ({"picture": np.ones((3, 16, 16, 3), np.float32)}, "picture must have as many rows as inputs, 2, got 3"),
    "patches": ({"picture": np.ones((B, 16, 18, 3), np.float32)}, "sides that patch = 4 divides"),
    "words": ({"inputs": np.ones((B, T), np.float32)}, "inputs must have an integer dtype"),
}


@pytest.mark.parametrize("case", CASES)
def test_user_errors_of_calls_are_named(case):
    words, picture = draw()
    arguments, message = CASES[case]
    arguments = {"inputs": words, "picture": picture, **arguments}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(build("transformer"), arguments.pop("inputs"), **arguments)


CONFIGS = [
    ({"decoder": "gru"}, "decoder must be one of 'lstm', 'transformer', got 'gru'"),
    ({"grid": "vgg"}, "grid must be one of 'conv', 'patches', got 'vgg'"),
    ({"width": 0}, "width must be a positive integer, got 0"),
    ({"dropout": 1.0}, "dropout must be in"),
    ({"doubly_stochastic": -1}, "doubly_stochastic must be a finite number of at least 0"),
    ({"channels": (8, 10)}, "the last of channels must be a multiple of 4"),
    ({"channels": ()}, "channels must have at least one entry"),
    ({"grid": "patches", "width": 6, "heads": 2}, "width must be a multiple of 4"),
    ({"size": 3}, "model 'captioner' has no key 'size'"),
]


@pytest.mark.parametrize("keys, message", CONFIGS)
def test_user_errors_of_configs_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        build_model({"type": "captioner", **keys}, vocab_size=VOCAB, rngs=nnx.Rngs(0))
    assert MODELS["captioner"][0] is CaptionerConfig and ConvGrid.__doc__ and PatchGrid.__doc__


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="features must be 0 .*, got 3"):
        build_model({"type": "captioner"}, vocab_size=4, features=3, rngs=nnx.Rngs(0))
