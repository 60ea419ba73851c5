"""Text documents: the files of a folder, read as bytes and assigned to splits."""

import functools
import os
from pathlib import Path
from typing import NoReturn

from memformer.data.splits import split_by_hash

__all__ = ["list_documents", "read_documents", "split_documents", "standard_library"]

# Folders that differ between installations of one Python, or hold installed packages.
SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"})

# Percentages of the documents.
TEST, VALIDATION = 5, 5


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
      ValueError: the folder does not exist, cannot be read, or holds no such file.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"task.folder must be a folder of text files, got {folder!r}, which does not exist")

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


def split_documents(folder: str, suffix: str, split: str) -> list[str]:
    """Paths of one split, in order: about 90% train, 5% validation and 5% test, by the hash of a path."""
    keys = {path: path.encode("utf-8", "surrogateescape") for path in list_documents(folder, suffix)}
    return [path for path, key in keys.items() if split_by_hash(key, test=TEST, validation=VALIDATION) == split]


def read_documents(folder: str, suffix: str, split: str) -> list[bytes]:
    """Contents of the documents of one split, empty ones left out.

    Raises:
      ValueError: a file that cannot be read, besides the errors of `list_documents`.
    """
    texts = []
    for path in split_documents(folder, suffix, split):
        try:
            texts.append(Path(folder, path).read_bytes())
        except OSError as error:
            raise ValueError(f"task.folder {folder!r}: {path} cannot be read: {error}") from error
    return [text for text in texts if text]
