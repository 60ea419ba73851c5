"""Text: every byte is scored once, splits are disjoint, segments never cross files."""

import os
import pathlib

import numpy as np
import pytest

from memformer.data.source import SPLITS
from memformer.tasks import Text
from memformer.tasks.text import START

FILES = {
    **{f"a/f{i}.py": (f"# file {i}\n" * (i + 1)).encode() for i in range(60)},
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
        assert texts == [KEPT[name] for name in task.files(split) if KEPT[name]]
        assert all(e["inputs"].shape == (length,) for e in examples)


def test_splits_are_disjoint_and_complete(folder):
    parts = [set(Text(folder=str(folder)).files(split)) for split in SPLITS]
    assert set.union(*parts) == set(KEPT)
    assert sum(map(len, parts)) == len(KEPT)


def test_a_file_keeps_its_split_when_others_come_and_go(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "a").mkdir()
    for i in range(0, 60, 2):
        (other / f"a/f{i}.py").write_bytes(b"new content")
    for split in SPLITS:
        assert set(Text(folder=str(other)).files(split)) <= set(Text(folder=str(folder)).files(split))


def test_suffix(folder):
    task = Text(length=8, folder=str(folder), suffix=".txt")
    assert sum((task.files(split) for split in SPLITS), []) == ["notes.txt"]


def test_the_standard_library_is_large_enough():
    task = Text()
    parts = {split: task.files(split) for split in SPLITS}
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
