"""Text generation: padding, compilation counts, streams of whole characters, stop strings, the summary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import memformer as mf
from memformer.data import ByteTokenizer, load_tokenizer
from memformer.models import MemoryLM, TextStream, TokenStream, bucket_length, generate, generate_text
from memformer.models.config import LanguageModelConfig
from memformer.models.generate import _start, _step
from memformer.models.generate_text import _Row
from memformer.models.sampling import Sampling, sample
from tests.modules import random_module

BYTES = ByteTokenizer()
SIZES = {"width": 8, "heads": 2, "feedforward": None}


def build(memory, vocab_size=9, classes=None, **config):
    config = LanguageModelConfig(memory=memory, **{**SIZES, "depth": 2, **config})
    return random_module(lambda: MemoryLM(config, vocab_size=vocab_size, num_classes=classes, rngs=nnx.Rngs(1)))


@pytest.fixture(scope="module")
def model():
    return build("gated_delta_rule", vocab_size=257, classes=256, tie_embeddings=False, depth=1)


@pytest.fixture(scope="module")
def attention():
    return build("softmax_attention", depth=1)


def test_padding_on_either_side_changes_nothing():
    """Of a cache with a decay, written by a delta rule, and of a matrix with the last inputs of convolutions.

    tests/layers/test_memory.py packs, pads on either side and continues every class of memories; prompts with padding
    behind them are compared with full passes in test_generate.py.
    """
    model = build(("gated_deltaformer", "gated_delta_rule"))
    prompt, count = [3, 1, 4, 1, 5], 3
    # Padding may hold any id, also one that the model does not have.
    ids = np.full((3, 8), 10**6)
    valid = np.zeros(ids.shape, np.int32)
    for row, start in enumerate((0, 2, 3)):
        ids[row, start : start + 5], valid[row, start : start + 5] = prompt, 1
    got = generate(model, ids, segment_ids=valid, max_new_tokens=count)
    np.testing.assert_array_equal(got, got[:1].repeat(3, axis=0))


def test_a_stream_gives_what_generate_gives(attention):
    prompts = [[1, 2, 3, 4], [5, 6]]
    want = generate(attention, prompts, max_new_tokens=5)
    stream = TokenStream(attention, prompts, max_new_tokens=5)
    np.testing.assert_array_equal(np.stack(list(stream), axis=1), want)


def test_one_prefill_per_bucket_and_one_step(attention):
    """With a cache, whose capacity is part of the shapes of the step."""
    before = np.array([_start._cache_size(), _step._cache_size()])
    for length in (3, 9, 16, 17, 30):
        list(TokenStream(attention, [[1] * length], max_new_tokens=3, capacity=64))
    prefills, steps = np.array([_start._cache_size(), _step._cache_size()]) - before
    assert (prefills, steps) == (2, 1)
    assert [bucket_length(length) for length in (1, 16, 17, 33)] == [16, 16, 32, 64]


def test_learned_positions_bound_the_bucket():
    model = build("linear_attention", positions="learned", max_length=21, depth=1)
    tokens = list(TokenStream(model, [[1] * 17], max_new_tokens=5))
    assert len(tokens) == 5
    with pytest.raises(ValueError, match="max_new_tokens must be at most 5 for a prompt of 17 tokens, .* got 6"):
        TokenStream(model, [[1] * 17], max_new_tokens=6)


def test_the_size_of_the_state(model, attention):
    fixed = [TokenStream(model, [[1]], max_new_tokens=n) for n in (2, 200)]
    assert fixed[0].state_bytes == fixed[1].state_bytes and fixed[0].slot_bytes == 0
    growing = [TokenStream(attention, [[1]], max_new_tokens=n) for n in (2, 200)]
    # A key and a value of two heads of four channels, in float32, and whether the slot is valid.
    assert growing[0].slot_bytes == 2 * 2 * 4 * 4 + 1
    # The bucket of 16 slots and new tokens, rounded up.
    slots = [stream.capacity for stream in growing]
    assert slots == [32, 256]
    assert growing[1].state_bytes - growing[0].state_bytes == (slots[1] - slots[0]) * growing[0].slot_bytes


def test_a_batch_of_texts_is_what_each_is_alone(model):
    prompts, options = ["ab", "a longer prompt", ""], {"max_new_tokens": 6}
    found = generate_text(model, BYTES, prompts, **options)
    assert found.reasons == ("length",) * 3 and found.new_tokens == 18
    assert found.prompt_tokens == sum(map(len, prompts)) + 3
    for prompt, text in zip(prompts, found.texts, strict=True):
        assert generate_text(model, BYTES, prompt, **options).texts == (text,)
    summary = found.describe()
    assert "20 prompt tokens, 18 new tokens" in summary and summary.endswith(
        "bytes per sequence, the same at any length"
    )


def test_the_text_is_the_tokens_behind_the_start_of_a_document(model):
    ids = [256, *b"ab"]
    want = [int(token[0]) for token in TokenStream(model, [ids], max_new_tokens=6)]
    stream = TextStream(model, BYTES, "ab", max_new_tokens=6)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == BYTES.decode(want) == stream.result.texts[0]
    assert [piece.reason for piece in pieces if piece.reason] == ["length"]
    plain = [int(token[0]) for token in TokenStream(model, [ids[1:]], max_new_tokens=6)]
    assert generate_text(model, BYTES, "ab", max_new_tokens=6, document_start=False).texts == (BYTES.decode(plain),)


def test_a_seed_gives_the_same_text(model):
    def draw(seed):
        options = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 50}
        return generate_text(model, BYTES, ["ab", "c"], seed=seed, **options).texts

    assert draw(0) == draw(0) != draw(1)


def test_the_face_of_the_package_has_it():
    assert mf.generate_text is generate_text
    with pytest.raises(AttributeError, match="no attribute 'generate_texts'"):
        mf.generate_texts  # noqa: B018


class Scripted:
    """A stream of given tokens in place of a model's."""

    state_bytes, slot_bytes, capacity = 0, 0, 1

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(np.asarray(self.rows).T)


def scripted(model, rows, **options):
    """The pieces of a text stream in which the model gives these tokens."""
    stream = TextStream(model, BYTES, ["a"] * len(rows), max_new_tokens=len(rows[0]), **options)
    stream._tokens = Scripted(rows)
    return list(stream), stream.result


def test_pieces_end_at_whole_characters(model):
    text = "naïve — 🦜!"
    pieces, result = scripted(model, [list(text.encode())])
    assert [piece.text for piece in pieces] == [*text] and result.texts == (text,)


def test_a_character_that_stays_broken_is_given_at_the_end(model):
    pieces, result = scripted(model, [[*b"ab", 0xF0, 0x9F]])
    assert result.texts == ("ab\ufffd",) and pieces[-1] == (0, "\ufffd", "length")


def test_random_bytes_are_given_as_the_decoder_reads_them_whole():
    random = np.random.default_rng(0)
    for _ in range(50):
        parts = [random.integers(0, 256, 3).tolist() if random.random() < 0.5 else list("é—🦜a"[i % 4].encode())
                 for i in random.integers(0, 4, 12)]  # fmt: skip
        ids = sum(parts, [])
        row = _Row(BYTES, [256], ())
        text = "".join(row.push(token, None)[0] for token in ids) + row.flush()
        assert text == BYTES.decode(ids)


@pytest.mark.parametrize("library", ["byte_level", "byte_fallback"])
def test_tokenizers_of_files_stream_the_same_text(library, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    models, decoders = tokenizers.models, tokenizers.decoders
    if library == "byte_level":
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocab = {letter: i for i, letter in enumerate([*alphabet, "Ġt", "he"])}
        made = tokenizers.Tokenizer(models.BPE(vocab, [("Ġ", "t"), ("h", "e")]))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    else:
        vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁": 256, "▁t": 257, "h": 258, "e": 259}
        made = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "t")] if "t" in vocab else [], byte_fallback=True))
        made.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    text = "the 🦜 éhé the—the"
    ids = made.encode(text).ids
    assert made.decode(ids) == text

    made.save(str(tmp_path / "tokenizer.json"))
    row = _Row(load_tokenizer(str(tmp_path)), ids[:2], ())
    pieces = [row.push(token, None)[0] for token in ids[2:]] + [row.flush()]
    assert made.decode(ids[:2]) + "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) and sum(map(bool, pieces)) > 10


def test_stop_strings(model):
    rows = [list(b"one, two. x"), list(b"on-two.twox"), list(b"aaaaaaaaaab")]
    pieces, result = scripted(model, rows, stop=("two.", ". x", "aab"))
    assert result.texts == ("one, ", "on-", "aaaaaaaa") and result.reasons == ("stop",) * 3
    # What may begin a stop string is held back, and given as soon as it cannot.
    assert all("t" not in piece.text for piece in pieces)
    assert [piece.text for piece in pieces if piece.row == 0] == ["o", "n", "e", ",", " ", ""]
    held, result = scripted(model, [list(b"a tw")], stop="two.")
    assert result.texts == ("a tw",) and held[-1] == (0, "tw", "length")


def test_the_end_of_the_text_ends_a_row(model):
    pieces, result = scripted(model, [[*b"ab", 256, *b"xyz"], [*b"abcdef"]])
    assert result.texts == ("ab", "abcdef") and result.reasons == ("end_of_text", "length")
    # a row that has ended counts no further tokens
    assert result.new_tokens == 3 + 6


LOGITS = np.log(np.array([0.1, 0.5, 0.25, 0.15], np.float32))
# Settings, tokens seen, and the expected probability of each token.
DRAWS = {
    "min_p": (Sampling(1.0, min_p=0.4), (), [0, 2 / 3, 1 / 3, 0]),
    "min_p keeps the most probable": (Sampling(1.0, min_p=1.0), (), [0, 1, 0, 0]),
    "min_p after the temperature": (Sampling(0.5, min_p=0.2), (), [0, 0.8, 0.2, 0]),
    "penalty": (Sampling(1.0, repetition_penalty=2.0), (1,), np.array([0.1, 0.25, 0.25, 0.15]) / 0.75),
    "greedy penalty": (Sampling(repetition_penalty=4.0), (1,), [0, 0, 1, 0]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_sample_follows_its_settings(name):
    sampling, tokens, want = DRAWS[name]
    count = 4000
    seen = jnp.zeros((count, 4), bool).at[:, jnp.array(tokens, jnp.int32)].set(True)
    drawn = sample(jnp.broadcast_to(LOGITS[None], (count, 4)), jax.random.key(0), sampling, seen)
    got = np.bincount(np.asarray(drawn), minlength=4) / count
    np.testing.assert_allclose(got, want, atol=4 * 0.5 / np.sqrt(count))
    assert not np.any(got[np.asarray(want) == 0])


def test_the_penalty_counts_the_prompt_and_what_was_generated(model):
    prompts = ["abcabc", "x"]
    free = generate_text(model, BYTES, prompts, max_new_tokens=12, repetition_penalty=1e9)
    stream = TokenStream(model, [[256, *prompt.encode()] for prompt in prompts], max_new_tokens=12, sampling=Sampling(
        repetition_penalty=1e9))  # fmt: skip
    tokens = np.stack(list(stream), axis=1)
    for prompt, row, text in zip(prompts, tokens, free.texts, strict=True):
        assert len({*row}) == 12 and not {*row} & {*prompt.encode()}
        assert text == BYTES.decode(row)


# Arguments, and the error message.
MISTAKES = {
    "prompt": ({"prompts": ["a", 3]}, r"prompts\[1\] must be a string, got 3"),
    "no prompt": ({"prompts": []}, "prompts must be one or more sequences"),
    "no token": ({"prompts": "", "document_start": False}, r"prompts\[0\] must have a token, got ''"),
    "stop": ({"stop": ["x", ""]}, "stop must be strings that are not empty, got ''"),
    "seed": ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    "count": ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
    "min_p": ({"min_p": 1.5}, r"min_p must be None or in \(0, 1\], got 1.5"),
    "penalty": ({"repetition_penalty": 0}, "repetition_penalty must be a finite number above 0, got 0"),
    "top_k": ({"top_k": 257}, r"top_k must be None or in \[1, 256\]"),
    "capacity": ({"capacity": 4}, r"capacity must be at least 260 \(prompt of 5 tokens, 256 new ones\), got 4"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors_are_named(model, mistake):
    arguments, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        generate_text(model, BYTES, **{"prompts": "text", **arguments})


def test_ids_that_the_model_does_not_have_are_named(attention):
    with pytest.raises(ValueError, match=r"prompts must have ids in \[0, 9\), got 97 to 256"):
        generate_text(attention, BYTES, "a")


def test_segments_are_checked(attention):
    ids = np.ones((2, 3), np.int32)
    with pytest.raises(ValueError, match="segment_ids must have a token that is no padding in every row, .* row 1"):
        generate(attention, ids, segment_ids=np.array([[0, 1, 1], [0, 0, 0]]), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"segment_ids must be \[B, T\] = \(2, 3\), got \(2, 2\)"):
        generate(attention, ids, segment_ids=ids[:, :2], max_new_tokens=1)
