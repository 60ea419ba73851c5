"""Text: every byte is scored once, splits are disjoint, segments never cross files."""

import os
import pathlib

import numpy as np
import pytest

from memformer.data.documents import SHARES, Document, split_documents
from memformer.data.source import SPLITS
from memformer.tasks import Text
from memformer.tasks.text import START

FILES = {
    **{f"a/f{i}.py": (f"# file {i}\n" * (i + 1)).encode() for i in range(24)},
    "b.py": b"x",
    "empty.py": b"",
    "latin.py": bytes(range(256)),
    "a/__pycache__/f1.py": b"compiled",
    "tests/t.py": b"test",
    "site-packages/other.py": b"other",
    "notes.txt": b"notes",
    "a/f1.pyc": b"compiled",
}
KEPT = {name: text for name, text in FILES.items() if name.endswith(".py") and not name.startswith(("tests", "site"))}
del KEPT["a/__pycache__/f1.py"]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return tmp_path


def read(task: Text, split: str) -> tuple[list[bytes], list[dict]]:
    """Pieces of files, cut at segments and windows, and all examples."""
    source = task.source(split, 0)
    examples = [source[i] for i in range(len(source))]
    pieces = []
    for e in examples:
        for segment in range(1, e["segment_ids"].max() + 1):
            here = e["segment_ids"] == segment
            assert here.any()
            assert e["positions"][here].tolist() == list(range(here.sum()))
            inputs, targets = e["inputs"][here], e["targets"][here]
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            pieces.append((int(inputs[0]), bytes(targets.astype(np.uint8))))
        np.testing.assert_array_equal(e["loss_weights"] == 1, e["segment_ids"] > 0)
    texts: list[bytes] = []
    for first, piece in pieces:
        if first == START:
            texts.append(piece)
        else:
            assert texts[-1][-1] == first
            texts[-1] += piece
    return texts, examples


@pytest.mark.parametrize("length", [1, 7, 64, 10_000])
def test_every_byte_is_scored_once_and_files_stay_whole(folder, length):
    task = Text(length=length, folder=str(folder))
    for split in SPLITS:
        texts, examples = read(task, split)
        assert texts == [document.text for document in task.documents(split)]
        assert all(e["inputs"].shape == (length,) for e in examples)


def test_splits_are_disjoint_and_complete(folder):
    parts = {split: Text(folder=str(folder)).documents(split) for split in SPLITS}
    for name, text in KEPT.items():
        # A few files: each is cut, in this order.
        pieces = [document.text for split in SPLITS for document in parts[split] if document.path == name]
        assert b"".join(pieces) == text
    assert {document.path for part in parts.values() for document in part} == {name for name in KEPT if KEPT[name]}


def test_suffix(folder):
    task = Text(length=8, folder=str(folder), suffix=".txt")
    assert {document.path for split in SPLITS for document in task.documents(split)} == {"notes.txt"}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_corpus_of_a_few_files_has_all_splits(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i}.txt").write_text("".join(f"é {i} {line}\n" for line in range(400)))
    task = Text(length=32, folder=str(tmp_path), suffix=".txt")
    task.check_data()
    sizes = {split: sum(len(document.text) for document in task.documents(split)) for split in SPLITS}
    assert sum(sizes.values()) == sum(path.stat().st_size for path in tmp_path.iterdir())
    for split, share in SHARES.items():
        assert abs(100 * sizes[split] / sum(sizes.values()) - share) < 1
        # No character is cut.
        assert all(document.text.decode() for document in task.documents(split))


def test_many_documents_are_split_by_content():
    documents = [Document(f"{i}.txt", f"document {i}\n".encode() * 20) for i in range(2000)]
    parts = split_documents(documents)
    assert sorted(document for part in parts.values() for document in part) == sorted(documents)
    moved = [Document(f"copy of {document.path}", document.text) for document in documents]
    assert {split: [d.text for d in part] for split, part in split_documents(moved).items()} == {
        split: [d.text for d in part] for split, part in parts.items()
    }
    fewer = split_documents(documents[::2])
    assert all(set(fewer[split]) <= set(parts[split]) for split in SPLITS)


def test_one_large_document_among_small_ones_leaves_text_to_every_split():
    for large in range(20):
        documents = [Document("large", bytes([large]) * 10**5), *(Document(str(i), str(i).encode()) for i in range(30))]
        parts = split_documents(documents)
        assert [sum(len(d.text) for d in parts[split]) // 10**3 for split in SPLITS] == [90, 5, 5]


@pytest.mark.parametrize("size, length", [(0, 1), (1, 1), (3, 1), (100, 91)])
def test_a_corpus_that_is_too_small_is_refused(tmp_path, size, length):
    (tmp_path / "one.txt").write_bytes(b"x" * size)
    task = Text(length=length, folder=str(tmp_path), suffix=".txt")
    with pytest.raises(ValueError, match=r"too little text in files that end in '.txt': \d+ bytes train, .*lower task"):
        task.check_data()


def test_held_out_splits_shorter_than_a_window_are_logged(tmp_path, caplog):
    (tmp_path / "one.txt").write_bytes(b"x" * 100)
    Text(length=90, folder=str(tmp_path), suffix=".txt").check_data()
    assert "the validation split has 5 bytes, less than a window of 90" in caplog.text


def test_the_standard_library_is_large_enough():
    task = Text()
    parts = {split: [document.path for document in task.documents(split)] for split in SPLITS}
    everything = sum(parts.values(), [])
    assert "ast.py" in everything and len(everything) == len(set(everything)) > 300
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")[:-1]) for name in everything)
    sizes = {split: len(task.source(split, 0)) * task.length for split in SPLITS}
    assert sizes["train"] > 5e6 and min(sizes.values()) > 1e5
    assert 0.85 < len(parts["train"]) / len(everything) < 0.95
    root = os.path.dirname(os.__file__)
    want = b"".join(pathlib.Path(root, name).read_bytes() for name in parts["validation"])
    source = task.source("validation", 0)
    got = b"".join(
        bytes(source[i]["targets"][source[i]["segment_ids"] > 0].astype(np.uint8)) for i in range(len(source))
    )
    assert got == want


def test_a_folder_below_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    task = Text(folder=f"~/{folder.name}")
    assert task.documents("train") == Text(folder=str(folder)).documents("train")


def test_a_file_instead_of_its_folder(folder):
    with pytest.raises(ValueError, match="which is a file: name its folder"):
        Text(folder=str(folder / "b.py")).source("train", 0)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="task.folder must be a folder of text files, got .*nowhere.*does not exist"):
        Text(folder=str(tmp_path / "nowhere")).source("train", 0)


def test_folder_without_sources(tmp_path):
    (tmp_path / "only.pyc").write_bytes(b"compiled")
    with pytest.raises(ValueError, match="has no file that ends in '.py'; set task.folder"):
        Text(folder=str(tmp_path)).source("train", 0)


def test_file_that_cannot_be_read(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match="cannot be read: .*Permission denied"):
        Text(folder=str(folder)).source("train", 0)


def test_folder_that_cannot_be_listed(folder, monkeypatch):
    def refuse(top, onerror):
        onerror(PermissionError(13, "Permission denied", str(top)))
        return iter(())

    monkeypatch.setattr(os, "walk", refuse)
    with pytest.raises(ValueError, match="task.folder .* cannot be read: .*Permission denied"):
        Text(folder=str(folder)).source("train", 0)
