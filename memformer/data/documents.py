"""Text documents: the files of a folder, as bytes, and their splits."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from memformer.data.source import SPLITS
from memformer.data.splits import split_by_hash

__all__ = ["Document", "list_documents", "read_documents", "split_documents", "standard_library"]

# Folders that differ between installations of one Python, or hold installed packages.
SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"})

# Percentages of the documents, or of the bytes of a document that is cut.
SHARES = {"train": 90, "validation": 5, "test": 5}


class Document(NamedTuple):
    """A text file, or a part of one.

    Attributes:
      path: relative to the folder, with forward slashes.
      text: the content.
    """

    path: str
    text: bytes


def standard_library() -> str:
    """The folder of the Python standard library's sources, a corpus that is always installed."""
    return os.path.dirname(os.__file__)


@functools.cache
def list_documents(folder: str, suffix: str) -> tuple[str, ...]:
    """Paths of the files below a folder, relative to it, with forward slashes, sorted.

    Folders of tests and of installed packages are skipped: their content differs between installations.

    Args:
      folder: root of the search.
      suffix: ending of the file names.

    Raises:
      ValueError: the folder does not exist, cannot be read, or has no such file.
    """
    if not os.path.isdir(folder):
        problem = "is a file: name its folder" if os.path.exists(folder) else "does not exist"
        raise ValueError(f"task.folder must be a folder of text files, got {folder!r}, which {problem}")

    def fail(error: OSError) -> NoReturn:
        raise ValueError(f"task.folder {folder!r} cannot be read: {error}") from error

    found = []
    for root, inner, names in os.walk(folder, onerror=fail):
        inner[:] = [name for name in inner if name not in SKIPPED_FOLDERS]
        paths = (Path(root, name) for name in names if name.endswith(suffix))
        found += [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    if not found:
        raise ValueError(
            f"task.folder {folder!r} has no file that ends in {suffix!r}; set task.folder to a folder of text files"
            " (a Python whose library is zipped or stripped of its sources has none)"
        )
    return tuple(sorted(found))


def read_documents(folder: str, suffix: str) -> list[Document]:
    """Reads the files below a folder; empty ones are left out.

    Raises:
      ValueError: a file that cannot be read, besides the errors of `list_documents`.
    """
    found = []
    for path in list_documents(folder, suffix):
        try:
            found.append(Document(path, Path(folder, path).read_bytes()))
        except OSError as error:
            raise ValueError(f"task.folder {folder!r}: {path} cannot be read: {error}") from error
    return [document for document in found if document.text]


def split_documents(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Splits documents into about 90% train, 5% validation and 5% test, disjoint and deterministic.

    A document belongs to a split by the hash of its content, so that copies stay together and adding documents never
    moves others. Where that gives a split less than half of its share of the bytes, as for a single file or a few, each
    document is cut instead: its beginning is train, its end validation and test.

    Example:
      >>> parts = split_documents([Document("all.txt", bytes(100))])
      >>> {split: sum(len(document.text) for document in part) for split, part in parts.items()}
      {'train': 90, 'validation': 5, 'test': 5}
    """
    parts: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        split = split_by_hash(document.text, test=SHARES["test"], validation=SHARES["validation"])
        parts[split].append(document)
    total = _count_bytes(documents)
    if any(200 * _count_bytes(parts[split]) < share * total for split, share in SHARES.items()):
        pieces = [_cut(document) for document in documents]
        parts = {split: [piece[split] for piece in pieces if piece[split].text] for split in SPLITS}
    return parts


def _count_bytes(documents: Sequence[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _cut(document: Document) -> dict[str, Document]:
    """Cuts a document into contiguous parts, one per split, between characters of UTF-8."""
    pieces, start, share = {}, 0, 0
    for split in SPLITS:
        share += SHARES[split]
        end = len(document.text) * share // 100
        # At most three continuation bytes belong to the character before the cut.
        for _ in range(3):
            end += end < len(document.text) and document.text[end] & 0xC0 == 0x80
        pieces[split] = Document(document.path, document.text[start:end])
        start = end
    return pieces
