"""Encoder-decoder Transformer: variants, masks, packing, cached decoding, gradients, user errors, training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.layers.stack import TransformerShape
from memformer.layers.transformer import CrossAttention
from memformer.models import build_model
from memformer.models.stacks import TransformerDecoder, TransformerEncoder
from tests.models.learning import cross_entropy, learn
from tests.modules import compiled, draws_random_bits, random_module
from tests.numeric import FORWARD, assert_close, relative_rms, slopes

VOCAB, SOURCE, TIME = 9, 6, 5
SMALL = {"type": "transformer", "width": 8, "heads": 2, "hidden": 12}
FORMS = {
    "pre, sinusoidal, tied": {},
    "post, learned, three tables": {
        "norm_place": "post",
        "positions": "learned",
        "tie_embeddings": False,
        "decoder_depth": 1,
    },
    "pre, rotary, gelu": {"positions": "rotary", "activation": "gelu_exact", "encoder_depth": 1, "decoder_depth": 1},
}
RANDOM = np.random.default_rng(3)
IDS = RANDOM.integers(1, VOCAB, (2, TIME), np.int32)
SOURCES = RANDOM.integers(1, VOCAB, (2, SOURCE), np.int32)
WHOLE = {"segment_ids": np.ones((2, TIME), np.int32), "source_segment_ids": np.ones((2, SOURCE), np.int32)}
# The second source is shorter.
MASK = np.array([[1] * SOURCE, [1] * (SOURCE - 2) + [0] * 2], np.int32)


def build(seed=0, vocab_size=VOCAB, num_classes=None, features=0, **config):
    sizes = {"vocab_size": vocab_size, "num_classes": num_classes, "features": features}
    return build_model({**SMALL, **config}, rngs=nnx.Rngs(seed, dropout=seed + 1), **sizes)


@functools.cache
def built(form):
    """A model variant and its jitted call."""
    model = random_module(lambda: build(**FORMS[form]))
    return model, compiled(model)


@pytest.mark.parametrize("name", FORMS)
def test_logits_have_shape_and_dtype(name):
    output = built(name)[1](IDS, source=SOURCES, **WHOLE)
    assert output.logits.shape == (2, TIME, VOCAB) and output.logits.dtype == jnp.float32
    assert dict(output.aux) == {}
    assert np.std(np.asarray(output.logits)) > 0.1


@pytest.mark.parametrize("name", FORMS)
def test_decoding_equals_the_whole_sequence(name):
    model, call = built(name)
    want = call(IDS, source=SOURCES, segment_ids=WHOLE["segment_ids"], source_segment_ids=MASK).logits
    state, got = compiled(model, "start", capacity=TIME)(SOURCES, MASK), []
    for leaf in jax.tree.leaves(state):
        # A beam search gathers rows: they come first, and scalars are shared.
        assert leaf.ndim == 0 or leaf.shape[0] == 2
    for t in range(TIME):
        output = call(IDS[:, t : t + 1], state=state)
        state = output.state
        got.append(output.logits)
    assert_close(np.concatenate(got, axis=1), want, FORWARD["float32"])


def test_a_first_call_returns_a_state_that_continues():
    _, call = built("pre, sinusoidal, tied")
    want = call(IDS, source=SOURCES, **WHOLE).logits
    first = call(IDS[:, :2], source=SOURCES)
    second = call(IDS[:, 2:], state=first.state)
    assert_close(np.concatenate([first.logits, second.logits], axis=1), want, FORWARD["float32"])


@pytest.mark.parametrize("name", FORMS)
def test_padding_of_the_source_changes_nothing(name):
    _, call = built(name)
    mask = WHOLE["source_segment_ids"] * (np.arange(SOURCE) < SOURCE - 2)
    one = call(IDS, source=SOURCES, segment_ids=WHOLE["segment_ids"], source_segment_ids=mask).logits
    other = np.where(mask == 0, (SOURCES + 3) % VOCAB, SOURCES)
    two = call(IDS, source=other, segment_ids=WHOLE["segment_ids"], source_segment_ids=mask).logits
    assert np.array_equal(one, two)
    whole = call(IDS, source=SOURCES, **WHOLE).logits
    assert relative_rms(one, whole) > 1e-3


@pytest.mark.parametrize("name", FORMS)
def test_packed_pairs_equal_pairs_alone(name):
    _, call = built(name)
    # Row 0 packs a pair of 3 source and 2 target tokens with one of 3 and 3, with padding in both.
    source_ids = np.array([[7, 7, 7, 4, 4, 0], [2] * SOURCE], np.int32)
    target_ids = np.array([[7, 7, 4, 4, 0], [2] * TIME], np.int32)
    packed = np.asarray(call(IDS, source=SOURCES, segment_ids=target_ids, source_segment_ids=source_ids).logits)
    for segment, source_place, place in [(7, slice(0, 3), slice(0, 2)), (4, slice(3, 5), slice(2, 4))]:
        source, ids = np.zeros_like(SOURCES), np.zeros_like(IDS)
        source_mask, mask = np.zeros_like(SOURCES), np.zeros_like(IDS)
        width, length = source_place.stop - source_place.start, place.stop - place.start
        source[0, :width], source_mask[0, :width] = SOURCES[0, source_place], segment
        ids[0, :length], mask[0, :length] = IDS[0, place], segment
        alone = call(ids, source=source, segment_ids=mask, source_segment_ids=source_mask).logits
        assert_close(packed[0, place], np.asarray(alone)[0, :length], FORWARD["float32"])


def test_visible_memory():
    _, call = built("post, learned, three tables")
    want = np.asarray(call(IDS, source=SOURCES, **WHOLE).logits)
    for t in range(TIME):
        changed = call(np.where(np.arange(TIME) == t, (IDS + 1) % VOCAB, IDS), source=SOURCES, **WHOLE).logits
        moved = np.abs(changed - want).max(axis=(0, 2)) > 0
        assert moved.tolist() == [place >= t for place in range(TIME)]
    for s in range(SOURCE):
        source = np.where(np.arange(SOURCE) == s, (SOURCES + 1) % VOCAB, SOURCES)
        changed = call(IDS, source=source, **WHOLE).logits
        assert np.all(np.abs(changed - want).max(axis=(0, 2)) > 0)


def test_alignments_are_the_weights_over_the_source():
    model, _ = built("pre, sinusoidal, tied")
    weights = np.asarray(compiled(model, "alignments")(IDS, source=SOURCES, source_segment_ids=MASK))
    assert weights.shape == (2, 2, 2, TIME, SOURCE) and weights.dtype == jnp.float32
    assert_close(weights.sum(axis=-1), np.ones((2, 2, 2, TIME)), 1e-6)
    assert np.all(weights[1, ..., -2:] == 0) and np.all(weights[0] > 0)


def test_cross_attention_reads_with_the_weights_that_it_returns():
    layer = random_module(lambda: CrossAttention(TransformerShape(width=8, heads=2), rngs=nnx.Rngs(0)))
    layer.out.kernel.set_value(np.eye(8, dtype=np.float32))
    layer.out.bias.set_value(np.zeros(8, np.float32))
    # Each value is its own slot index, so the read is the mean index.
    place = np.arange(SOURCE, dtype=np.float32)
    values = np.broadcast_to(place[None, :, None, None], (2, SOURCE, 2, 4))
    visible = np.broadcast_to(place < SOURCE - 1, (2, TIME, SOURCE))
    x, keys = (np.random.default_rng(0).standard_normal(s).astype("float32") for s in ((2, TIME, 8), values.shape))
    y, weights = jax.device_get(compiled(layer)(x, {"k": keys, "v": values}, visible))
    mean = np.einsum("bhts,s->bth", weights, place)
    assert_close(y.reshape(2, TIME, 2, 4), np.broadcast_to(mean[..., None], (2, TIME, 2, 4)), FORWARD["float32"])
    assert np.all(weights[..., -1] == 0)


def test_gradients_equal_finite_differences():
    """Of the form that has every kind of parameter."""
    # The norms of flax promote dtypes implicitly.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        config = {**FORMS["post, learned, three tables"], "activation": "gelu", "encoder_depth": 1}
        config |= {"dtype": "float64", "param_dtype": "float64", "max_length": SOURCE}
        graph, parameters = nnx.split(random_module(lambda: build(**config)))

        @jax.jit
        @jax.value_and_grad
        def loss(parameters):
            logits = nnx.merge(graph, parameters)(IDS, source=SOURCES, source_segment_ids=MASK).logits
            return -jnp.mean(jax.nn.log_softmax(logits)[:, :, 1])

        value, gradient = loss(parameters)
        assert value.dtype == jnp.float64
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
            # Adding a constant to all scores of a query changes no weight.
            name = jax.tree_util.keystr(path)
            assert np.any(leaf) or ("key" in name and "bias" in name), name
        assert_close(*slopes(loss, parameters, step=1e-5), 1e-7)


def test_bfloat16_keeps_parameters_and_logits_wide():
    model = random_module(lambda: build(dtype="bfloat16"))
    logits = compiled(model)(IDS, source=SOURCES, **WHOLE).logits
    assert logits.dtype == jnp.float32
    assert jax.eval_shape(model.encode, SOURCES).dtype == jnp.bfloat16
    assert model.decoder.embedding.table[...].dtype == jnp.float32
    want = built("pre, sinusoidal, tied")[1](IDS, source=SOURCES, **WHOLE).logits
    assert relative_rms(logits, want) < 3e-2


def test_encoder_and_decoder_separately():
    """As in a captioner: an encoder over given vectors, and a decoder that attends to them."""
    shape = TransformerShape(width=8, heads=2, positions="learned", max_length=SOURCE)
    encoder = random_module(lambda: TransformerEncoder(shape, 1, embedding_norm=True, rngs=nnx.Rngs(0)))
    sizes = {"vocab_size": VOCAB, "num_classes": 4, "tie_embeddings": False}
    decoder = random_module(lambda: TransformerDecoder(shape, 1, **sizes, rngs=nnx.Rngs(1)))
    x = np.random.default_rng(0).standard_normal((2, SOURCE, 8)).astype("float32")
    memory, read = np.array(compiled(encoder)(x)), compiled(decoder)
    mask = np.array([[1] * SOURCE, [1] * 3 + [0] * 3], np.int32)
    one = read(IDS, memory=memory, memory_segment_ids=mask).logits
    assert one.shape == (2, TIME, 4)
    spoiled = np.where((mask == 0)[..., None], np.float32(7.0), memory)
    two = read(IDS, memory=spoiled, memory_segment_ids=mask).logits
    whole = read(IDS, memory=memory, memory_segment_ids=np.ones_like(mask)).logits
    one, whole = np.asarray(one), np.asarray(whole)
    assert np.array_equal(one, two) and relative_rms(one[1], whole[1]) > 1e-3
    output = read(IDS[:, :2], state=compiled(decoder, "start")(memory, mask))
    assert_close(output.logits, one[:, :2], FORWARD["float32"])


def learned():
    """A model with 512 learned positions."""
    return built("post, learned, three tables")[0]


# Invalid config, call or sizes, and the error message.
MISTAKES = {
    "heads": (lambda: build(heads=3), "multiple of heads"),
    "activation": (lambda: build(activation="tanh"), "activation must be one of"),
    "norm_place": (lambda: build(norm_place="both"), "norm_place must be one of 'pre', 'post'"),
    "positions": (lambda: build(positions="alibi"), "positions must be one of"),
    "depth": (lambda: build(encoder_depth=0), "encoder_depth must be a positive integer"),
    "key": (lambda: build(depth=2), "has no key 'depth'"),
    "dropout": (lambda: build(dropout=1.0), "dropout must be in"),
    "tied": (lambda: build(num_classes=3), "tie_embeddings requires the same ids"),
    "features": (lambda: build(vocab_size=0, features=3), "features must be 0"),
    "no source": (lambda: built("pre, sinusoidal, tied")[0](IDS), "got neither"),
    "no array": (lambda: built("pre, sinusoidal, tied")[0](IDS, source=[[1]]), "source must be an array"),
    "rows": (lambda: built("pre, sinusoidal, tied")[1](IDS, source=SOURCES[:1]), "memory must be"),
    "long source": (lambda: learned().encode(jnp.ones((1, 513), jnp.int32)), "at most max_length = 512"),
    "long target": (
        lambda: learned().decoder.start(jnp.ones((1, 2, 8)), capacity=513),
        "capacity must be at most max_length = 512",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_user_errors_are_named(case):
    make, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_source_and_state_together_are_a_mistake():
    model, _ = built("pre, sinusoidal, tied")
    with pytest.raises(ValueError, match="got both"):
        jax.eval_shape(lambda: model(IDS[:, :1], source=SOURCES, state=model.start(SOURCES)))


def test_dropout_applies_in_training_only():
    make = functools.partial(build, dropout=0.5, encoder_depth=1, decoder_depth=1)
    for training in (False, True):
        assert draws_random_bits(make, lambda model: model(IDS, source=SOURCES).logits, training) == training


def test_training_learns_to_reverse_the_source():
    """Four letters of four; chance is log 4 = 1.39."""
    source = np.random.default_rng(0).integers(2, 6, (100, 32, 4), np.int32)
    targets = np.ascontiguousarray(source[..., ::-1])
    inputs = np.concatenate([np.ones_like(targets[..., :1]), targets[..., :-1]], axis=-1)
    batches = {"inputs": inputs, "source": source, "targets": targets, "loss_weights": np.ones_like(targets, "float32")}
    model = build(vocab_size=6, width=16, hidden=32, encoder_depth=1, decoder_depth=1)

    def loss(model, batch):
        return cross_entropy(model(batch["inputs"], source=batch["source"]).logits, batch)

    losses = learn(model, loss, batches, rate=1e-2)
    assert losses[0] > 1.2 and np.mean(losses[-10:]) < 0.4, losses[::10]
