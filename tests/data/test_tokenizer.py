"""Tokenizers: bytes, tokenizer.json files, chat templates, training."""

import json

import pytest

from memformer.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    FileTokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat", "the dog ate the cat's hat", "Größe: 3 µm\n", "naïve \U0001f600 東京"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'god' %}{{ raise_exception('no god') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizer") / "new"
    train_tokenizer(TEXTS * 3, folder, vocab_size=300)
    return folder


@pytest.mark.parametrize("text", [*TEXTS, "", "\x00\x7f", "a" * 1000])
def test_bytes(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text
    # a cut character is shown as one that cannot be decoded
    assert tokenizer.decode([0xC3]) == "\ufffd"


@pytest.mark.parametrize("wrong", [-1, 257])
def test_an_id_that_is_none(wrong):
    with pytest.raises(ValueError, match=rf"ids must be in \[0, 257\), got {wrong}"):
        ByteTokenizer().decode([65, wrong])


def test_trained_tokenizers_restore_every_text(folder):
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, FileTokenizer) and 257 < tokenizer.vocab_size <= 300
    assert tokenizer.end_of_text == 0
    for text in [*TEXTS, "", "\x00", "unseen Ω"]:
        ids = tokenizer.encode(text)
        assert all(0 < i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])
    with pytest.raises(ValueError, match="ids must be in"):
        tokenizer.decode([tokenizer.vocab_size])


def test_the_library_reads_what_is_written(folder):
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert plain.encode(TEXTS[1]).ids == load_tokenizer(str(folder)).encode(TEXTS[1])


def test_truncation_and_special_tokens_of_a_file_are_ignored(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.enable_truncation(3)
    plain.enable_padding(length=64)
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT[0]} $A", special_tokens=[(END_OF_TEXT[0], 0)]
    )
    plain.save(str(tmp_path / "other.json"))
    tokenizer = load_tokenizer(str(tmp_path / "other.json"))
    assert tokenizer.encode(TEXTS[0]) == load_tokenizer(str(folder)).encode(TEXTS[0])


def test_fingerprints_follow_the_content(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder))
    save_tokenizer(tokenizer, tmp_path / "copy")
    copy = load_tokenizer(str(tmp_path / "copy"))
    assert copy.fingerprint == tokenizer.fingerprint != ByteTokenizer.fingerprint
    (tmp_path / "copy" / "tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    changed = load_tokenizer(str(tmp_path / "copy"))
    assert changed.end_of_text == tokenizer.encode("a")[0]
    assert changed.fingerprint != tokenizer.fingerprint
    save_tokenizer(ByteTokenizer(), tmp_path / "bytes")
    assert isinstance(load_tokenizer(str(tmp_path / "bytes")), ByteTokenizer)
    with pytest.raises(ValueError, match="to be saved, got None"):
        save_tokenizer(None, tmp_path / "none")


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_templates(folder, tmp_path, place):
    pytest.importorskip("jinja2")
    save_tokenizer(load_tokenizer(str(folder)), tmp_path)
    settings = json.dumps({"eos_token": END_OF_TEXT[0], "chat_template": TEMPLATE})
    (tmp_path / place).write_text(TEMPLATE if place.endswith("jinja") else settings)
    tokenizer = load_tokenizer(str(tmp_path))
    messages = [{"role": "user", "content": "the cat?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<user>the cat?<|endoftext|><assistant>"
    # the names of special tokens become their ids
    assert tokenizer.encode(text).count(tokenizer.end_of_text) == 1
    with pytest.raises(ValueError, match="chat template of tokenizer .* failed: no god"):
        tokenizer.apply_chat_template([{"role": "god", "content": ""}])
    # a copy keeps the template
    save_tokenizer(tokenizer, tmp_path / "copy")
    assert load_tokenizer(str(tmp_path / "copy")).apply_chat_template(messages) == "<user>the cat?<|endoftext|>"


def test_no_chat_template(folder):
    with pytest.raises(ValueError, match="has no chat template: neither chat_template.jinja nor"):
        load_tokenizer(str(folder)).apply_chat_template([])


@pytest.mark.parametrize("spec", ["", "nowhere/tokenizer.json", "byte"])
def test_no_such_tokenizer(spec):
    with pytest.raises(ValueError, match="tokenizer must be 'bytes', a tokenizer.json or a folder that holds one, got"):
        load_tokenizer(spec)


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="or a folder that holds one, got"):
        load_tokenizer(str(tmp_path))
    pytest.importorskip("tokenizers")
    for content in ("{", "{}", "[1]", "words"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="cannot be read as a tokenizer.json: "):
            load_tokenizer(str(tmp_path))


def test_settings_that_are_no_json(folder, tmp_path):
    save_tokenizer(load_tokenizer(str(folder)), tmp_path)
    for content, problem in (("{", "must be JSON"), ("[]", "must hold a JSON object, got list")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=problem):
            load_tokenizer(str(tmp_path))


def test_a_vocabulary_without_room_for_the_bytes(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be an integer of at least 257, got 256"):
        train_tokenizer([], tmp_path, vocab_size=256)


def test_no_text_to_train_on(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="texts must hold at least one text to train a tokenizer on, got none"):
        train_tokenizer(iter([]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ImportError, match=r"package tokenizers is needed .* pip install 'memformer-jax\[text\]'"):
        load_tokenizer(str(tmp_path))
