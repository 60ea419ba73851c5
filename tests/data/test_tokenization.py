"""Tokenizing a corpus: every document once, splits by content, interruptions, processes, the command line."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from memformer.data import shards
from memformer.data.__main__ import main
from memformer.data.corpus import open_corpus, wrap_source
from memformer.data.source import SPLITS
from memformer.data.splits import split_by_hash
from memformer.data.token_store import TokenStore
from memformer.data.tokenization import tokenize_corpus, training_texts
from memformer.data.tokenizer import ByteTokenizer, train_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = [f"document {i}: " + "größe " * (i % 7) for i in range(300)]
BYTES = ByteTokenizer()


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents(store: TokenStore, split: str) -> list[list[int]]:
    """Token ids of the documents of a split, read as the module's docstring says."""
    found = []
    for shard in store.manifest["splits"][split]:
        tokens = np.load(store.path / split / f"{shard['name']}.tokens.npy", mmap_mode="r")
        ends = np.load(store.path / split / f"{shard['name']}.ends.npy", mmap_mode="r")
        found += [tokens[a:b].tolist() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    return found


@pytest.fixture
def lines(tmp_path) -> str:
    """A file of JSON lines, two of which are no document."""
    path = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"text": text}) for text in TEXTS]
    path.write_text("\n".join([*rows[:100], "{", *rows[100:250], '{"body": 1}', *rows[250:]]))
    return str(path)


def test_every_document_is_in_the_split_of_its_content(lines, tmp_path):
    log: list[str] = []
    store = tokenize_corpus(open_corpus([lines]), tmp_path / "store", shard_bytes=1000, log=log.append)
    for split in SPLITS:
        want = [text for text in TEXTS if split_by_hash(text.encode(), test=5, validation=5) == split]
        assert documents(store, split) == [[*BYTES.encode(text), 256] for text in want]
        part = store.split(split)
        assert part.count("bytes") == sum(len(text.encode()) for text in want)
        assert part.count("scored") == part.count("tokens") == part.count("bytes") + len(want)
        tokens = [i for ids in documents(store, split) for i in ids]
        assert part.read(0, len(tokens)).tolist() == tokens
        assert part.read(7, 23).tolist() == tokens[7:23]
    assert len(store.manifest["splits"]["train"]) > 5 and store.manifest["dtype"] == "uint16"
    assert store.manifest["problems"] == {"not JSON": 1, "no text": 1}
    assert [line.split(": ")[1] for line in log if line.startswith("left out")] == [f"{lines}:101", f"{lines}:252"]
    assert "left out: 1 document or file, not JSON" in store.summary()
    assert not (tmp_path / "store" / "progress").exists()


def test_errors_can_be_fatal(lines, tmp_path):
    with pytest.raises(ValueError, match=r"corpus.jsonl:101: the line is no JSON"):
        tokenize_corpus(open_corpus([lines]), tmp_path / "store", on_error="fail")


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_an_interrupted_job_gives_the_same_bytes(lines, tmp_path, monkeypatch, stop):
    options = {"shard_bytes": 1000}
    tokenize_corpus(open_corpus([lines]), tmp_path / "whole", **options)
    write = shards.write_unit

    def interrupt(store, unit):
        if unit.number >= stop:
            raise KeyboardInterrupt
        return write(store, unit)

    monkeypatch.setattr(shards, "write_unit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(open_corpus([lines]), tmp_path / "store", **options)
    with pytest.raises(ValueError, match="is not finished: run the command that writes it again, which resumes"):
        TokenStore(tmp_path / "store")
    with pytest.raises(ValueError, match="part of one, with another shard_bytes; choose another folder"):
        tokenize_corpus(open_corpus([lines]), tmp_path / "store")
    written = []
    monkeypatch.setattr(shards, "write_unit", lambda store, unit: (written.append(unit.number), write(store, unit))[1])
    # a half-written file of a process that was killed
    (tmp_path / "store" / "train" / f"{stop:05d}.tokens.npy").write_bytes(b"half")
    # a later unit that another process had finished
    later = tmp_path / "store" / "progress" / f"{stop + 2:05d}.json"
    log: list[str] = []
    tokenize_corpus(open_corpus([lines]), tmp_path / "store", log=log.append, **options)
    assert not later.exists() and written == list(range(stop, written[-1] + 1))
    assert any(line == f"resuming behind {stop} finished shards" for line in log) == (stop > 0)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    # a finished store stays as it is
    tokenize_corpus(open_corpus([lines]), tmp_path / "store", **options)
    assert written == list(range(stop, written[-1] + 1))


def test_a_job_that_is_killed_resumes_in_several_processes(lines, tmp_path):
    tokenize_corpus(open_corpus([lines]), tmp_path / "whole", shard_bytes=500)
    out = tmp_path / "store"
    command = [sys.executable, "-m", "memformer.data", "tokenize", lines, f"--out={out}", "--shard_bytes=500"]
    job = subprocess.Popen([*command, "--processes=2"], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "progress" / "00003.json").exists() and not (out / "manifest.json").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.wait()
    # the workers end with their parent; what one still writes is whole or absent
    tokenize_corpus(open_corpus([lines]), out, shard_bytes=500)
    assert contents(out) == contents(tmp_path / "whole")


def test_prompts_are_stored_apart(tmp_path):
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(100)]
    store = tokenize_corpus(wrap_source(rows), tmp_path / "store")
    found, prompts = [], []
    for split in SPLITS:
        for _, ends, sizes in store.split(split).documents():
            prompts += sizes.tolist()
            assert len(sizes) == len(ends)
        found += documents(store, split)
    assert sorted(BYTES.decode(ids[:size]) for ids, size in zip(found, prompts, strict=True)) == sorted(
        row["prompt"] for row in rows
    )
    counts = {what: sum(store.split(s).count(what) for s in SPLITS) for what in ("tokens", "scored", "bytes")}
    assert counts["tokens"] - counts["scored"] == sum(len(row["prompt"]) for row in rows)
    assert counts["bytes"] == sum(len(row["completion"]) for row in rows) == counts["scored"] - 100


def test_own_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    train_tokenizer(TEXTS, tmp_path / "tokenizer", vocab_size=300)
    store = tokenize_corpus(wrap_source(TEXTS), tmp_path / "store", tokenizer=str(tmp_path / "tokenizer"))
    own = store.tokenizer()
    assert own.fingerprint == store.manifest["tokenizer"]["fingerprint"] and store.start == own.end_of_text == 0
    texts = [own.decode(ids) for split in SPLITS for ids in documents(store, split)]
    assert sorted(texts) == sorted(TEXTS) and store.vocab_size == own.vocab_size
    with pytest.raises(ValueError, match="with another tokenizer; choose another folder, or delete"):
        tokenize_corpus(wrap_source(TEXTS), tmp_path / "store")


def test_few_documents_reach_every_split(tmp_path):
    for count in (3, 5, 20):
        store = tokenize_corpus(wrap_source(TEXTS[:count]), tmp_path / f"{count}")
        assert all(store.split(split).count("documents") for split in SPLITS)
    # copies stay together
    store = tokenize_corpus(wrap_source(TEXTS[:3] * 4), tmp_path / "copies")
    assert [store.split(split).count("documents") for split in SPLITS] == [4, 4, 4]


@pytest.mark.parametrize("count, options", [(2, {}), (1, {"test": 0}), (0, {"test": 0, "validation": 0})])
def test_a_corpus_that_is_too_small_is_told_before_it_is_read(tmp_path, count, options):
    for i in range(count):
        (tmp_path / f"{i}.txt").write_text("".join(f"text {i} {line}\n" for line in range(50)))
    names = [str(tmp_path / f"{i}.txt") for i in range(count)]
    problem = (
        rf"too small: it has {count or 'no'} .*need a document.*separator.* or piece_bytes.* or give validation = 0"
    )
    with pytest.raises(ValueError, match=problem):
        tokenize_corpus(open_corpus(names) if names else wrap_source([]), tmp_path / "store", **options)
    with pytest.raises(ValueError, match="it has 1 different document, and the splits train, validation, test"):
        tokenize_corpus(wrap_source(["same", "same"]), tmp_path / "other")
    if names:
        assert not (tmp_path / "store").exists()
        pieces = open_corpus(names, piece_bytes=50)
        assert tokenize_corpus(pieces, tmp_path / "store").split("test").count("documents")


def test_documents_too_few_for_later_splits_are_told_at_the_end(tmp_path):
    corpus = wrap_source([f"{i}" * 100 for i in range(4)])
    with pytest.raises(ValueError, match="too small: of 4 documents none is in"):
        tokenize_corpus(corpus, tmp_path / "store", shard_bytes=100)


def test_a_tokenizer_without_a_training_document_is_told_why():
    # the hash of this text is that of the validation or test split
    corpus = wrap_source(["one line of text"])
    with pytest.raises(ValueError, match="too small: of 1 document none is in train.* or give validation = 0"):
        list(training_texts(corpus))
    assert list(training_texts(corpus, validation=0, test=0)) == ["one line of text"]


def test_splits_far_from_their_share_are_told(tmp_path):
    log: list[str] = []
    tokenize_corpus(wrap_source(["a", "b", "c" * 1000]), tmp_path / "store", log=log.append)
    assert any("of the text instead of" in line for line in log)


def test_without_held_out_splits(tmp_path):
    store = tokenize_corpus(wrap_source(["only one"]), tmp_path / "store", validation=0, test=0)
    assert store.split("train").count("documents") == 1 and store.split("test").count("documents") == 0


OPTIONS = {
    "processes": (0, "processes must be a positive integer, got 0"),
    "shard_bytes": (0, "shard_bytes must be a positive integer"),
    "validation": (95, r"validation \+ test must be below 100 percent, got 100"),
    "test": (-1, "test must be an integer of at least 0"),
    "on_error": ("stop", "on_error must be one of 'skip', 'fail', got 'stop'"),
    "tokenizer": ("nothing", "tokenizer must be 'bytes', a tokenizer.json"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_out_of_range(tmp_path, name):
    value, problem = OPTIONS[name]
    with pytest.raises(ValueError, match=problem):
        tokenize_corpus(wrap_source(TEXTS), tmp_path / "store", **{name: value})


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or empty folder, or hold a token store; it holds something"):
        tokenize_corpus(wrap_source(TEXTS), tmp_path)
    assert contents(tmp_path) == {"mine.txt": b"mine"}
    with pytest.raises(ValueError, match="out must be a folder that can be made, got .*mine.txt': Not a directory"):
        tokenize_corpus(wrap_source(TEXTS), tmp_path / "mine.txt")


def test_stores_that_cannot_be_read(tmp_path):
    path = tmp_path / "store"
    with pytest.raises(ValueError, match="there is no token store .*python -m memformer.data tokenize TEXT --out="):
        TokenStore(path)
    store = tokenize_corpus(wrap_source(TEXTS), path)
    shard = path / "train" / "00000.tokens.npy"
    whole = shard.read_bytes()
    store.check()
    for damaged in (whole[:-1], b""):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match="the token store is damaged: .*00000.tokens.npy cannot be read"):
            store.split("train").read(0, 5)
        with pytest.raises(ValueError, match=r"damaged: .*tokens.npy must hold \d+ numbers of 2 bytes, got a file of"):
            store.check()
    np.save(shard, np.zeros(3, np.uint16))
    with pytest.raises(ValueError, match=r"damaged: .*00000.tokens.npy must hold \d+ numbers, got \(3,\)"):
        store.split("train").read(0, 5)
    shard.unlink()
    with pytest.raises(ValueError, match="damaged: .*No such file"):
        store.split("train").read(0, 5)
    for content, problem in (("{", "cannot be read as the manifest"), ('{"format": "x"}', "must have the format")):
        (path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=problem):
            TokenStore(path)
    with pytest.raises(ValueError, match=r"store/train is not a token store: it has no manifest.json; write a store"):
        TokenStore(path / "train")


def test_commands(lines, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    folder, store = str(tmp_path / "tokenizer"), str(tmp_path / "store")
    assert main(["train_tokenizer", lines, f"--out={folder}", "--vocab_size=290"]) == 0
    assert "ids from 2" in capsys.readouterr().out
    assert main(["tokenize", lines, f"--out={store}", f"--tokenizer={folder}", "--processes=1"]) == 0
    shown = capsys.readouterr().out
    assert main(["summary", store]) == 0
    table = capsys.readouterr().out
    assert table in shown and [line.split()[0] for line in table.splitlines()[1:4]] == list(SPLITS)
    assert main(["tokenize", lines, f"--out={store}", f"--tokenizer={folder}", "--processes=1"]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert main(["tokenize", lines, f"--out={tmp_path / 'o'}", "--on_error=fail", "--processes=1"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {lines}:101: the line is no JSON")
    with pytest.raises(SystemExit):
        main([])


def test_separators_on_the_command_line(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("\n\n".join(f"paragraph {i}" for i in range(60)))
    store = tmp_path / "store"
    assert main(["tokenize", str(tmp_path / "book.txt"), f"--out={store}", "--processes=1"]) == 1
    error = capsys.readouterr().err
    assert "it has 1 text file, each one document" in error and "--piece_bytes=500 cuts at line ends" in error
    command = ["tokenize", str(tmp_path / "book.txt"), f"--out={store}", "--processes=1", "--separator=\\n\\n"]
    assert main(command) == 0
    assert sum(TokenStore(store).split(split).count("documents") for split in SPLITS) == 60
