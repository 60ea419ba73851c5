"""A byte-level language model on real text that is always there: the Python standard library's sources."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from memformer.data.source import SPLITS, Example, Task, check_at_least, check_choice

__all__ = ["Text"]

# The id before a file's first byte; ids 0...255 are the bytes.
START = 256

# Folders that differ between installations of one Python, or hold what pip installed.
SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"})

# Of a hundred files, by hash of the path: test below the first number, validation below the second.
TEST_SHARE, VALIDATION_SHARE = 5, 10


@dataclasses.dataclass(frozen=True)
class Text(Task):
    """Predict every byte of a folder of text files from the bytes of that file before it.

    Files belong to a split by the hash of their relative path: about 90% train, 5% validation, 5%
    test, disjoint by file, and the same wherever the path is the same. A file of n bytes takes n time steps: inputs
    are the start token and its bytes but the last, targets its bytes, so that each byte is scored
    exactly once. A split is its files one after another in the order of their paths, cut into
    windows of `length` steps; a new file starts a new segment, positions count from 0 in each, and
    the last window is padded.

    Attributes:
      length: time steps of a window.
      folder: where files are looked for, with all folders below; "" is the standard library's.
        Folders of tests and of installed packages are left out: whether they are there differs
        between installations.
      suffix: ending of the files' names.

    Raises:
      ValueError: a setting out of range, named; from `source`, a folder that is not there, holds no
        such file, or cannot be read.

    Example:
      >>> task = Text(length=128)
      >>> task.source("test", 0)[0]["inputs"].shape, task.scores
      ((128,), ('bits_per_byte',))
    """

    name = "text"
    scores = ("bits_per_byte",)

    length: int = 512
    folder: str = ""
    suffix: str = ".py"

    def __post_init__(self):
        check_at_least("length", self.length, 1)
        for name in ("folder", "suffix"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r}")

    @property
    def eval_lengths(self) -> tuple[int, ...]:
        """Lengths that an evaluation by length visits."""
        return (256, 512, 1024, 2048)

    @property
    def vocab_size(self) -> int:
        """The bytes and the start token."""
        return START + 1

    @property
    def num_classes(self) -> int:
        """The bytes."""
        return START

    @property
    def chance(self) -> None:
        """None: accuracy is not what text is scored by."""
        return None

    def files(self, split: str) -> list[str]:
        """Paths of a split's files, relative to the folder, in order."""
        check_choice("split", split, SPLITS)
        return [path for path in _list_files(self._root(), self.suffix) if _split_of(path) == split]

    def source(self, split: str, seed: int) -> "_Windows":
        """Windows of one split; the seed plays no part."""
        check_choice("split", split, SPLITS)
        return _Windows(*_read_split(self._root(), self.suffix, split), self.length)

    def _root(self) -> str:
        return self.folder or os.path.dirname(os.__file__)


class _Windows:
    """Fixed windows over the bytes of a split."""

    endless = False

    def __init__(self, text: np.ndarray, starts: np.ndarray, length: int):
        self._text = text
        self._starts = starts
        self._length = length

    def __len__(self) -> int:
        return -(-len(self._text) // self._length)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"window number must be in [0, {len(self)}), got {index}")
        first = index * self._length
        targets = self._text[first : first + self._length].astype(np.int32)
        used = len(targets)
        # Where files begin, counted from the window's first step.
        begins = self._starts[slice(*np.searchsorted(self._starts, [first, first + used]))] - first
        inputs = np.empty(used, np.int32)
        inputs[1:] = targets[:-1]
        inputs[0] = self._text[first - 1]
        inputs[begins] = START
        time = np.arange(used, dtype=np.int32)
        newest = np.zeros(used, np.int32)
        newest[begins] = begins
        newest = np.maximum.accumulate(newest)
        segments = 1 + np.searchsorted(begins[begins > 0], time, side="right")
        padding = (0, self._length - used)
        return {
            "inputs": np.pad(inputs, padding),
            "targets": np.pad(targets, padding),
            "loss_weights": np.pad(np.ones(used, np.float32), padding),
            "segment_ids": np.pad(segments.astype(np.int32), padding),
            "positions": np.pad(time - newest, padding),
        }


def _split_of(path: str) -> str:
    number = int.from_bytes(hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()[:8], "big") % 100
    return "test" if number < TEST_SHARE else "validation" if number < VALIDATION_SHARE else "train"


@functools.cache
def _list_files(root: str, suffix: str) -> tuple[str, ...]:
    """Relative paths with forward slashes, sorted; at least one."""
    if not os.path.isdir(root):
        raise ValueError(f"task.folder must be a folder of text files, got {root!r}, which is not there")

    def refuse(error: OSError) -> NoReturn:
        raise ValueError(f"task.folder {root!r} cannot be read: {error}") from error

    found = []
    for folder, inner, names in os.walk(root, onerror=refuse):
        inner[:] = [name for name in inner if name not in SKIPPED_FOLDERS]
        paths = (Path(folder, name) for name in names if name.endswith(suffix))
        found += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    if not found:
        raise ValueError(
            f"task.folder {root!r} holds no file that ends in {suffix!r}; set task.folder to a folder of text"
            " (a Python whose library is zipped or stripped of its sources has none)"
        )
    return tuple(sorted(found))


# One split of the standard library is 15 MB at most.
@functools.lru_cache(maxsize=6)
def _read_split(root: str, suffix: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All bytes of a split's files, and where each file starts; empty files are left out."""
    texts = []
    for path in _list_files(root, suffix):
        if _split_of(path) != split:
            continue
        try:
            texts.append(Path(root, path).read_bytes())
        except OSError as error:
            raise ValueError(f"task.folder {root!r}: {path} cannot be read: {error}") from error
    return np.frombuffer(b"".join(texts), np.uint8), _starts(texts)


def _starts(texts: Sequence[bytes]) -> np.ndarray:
    sizes = np.array([len(text) for text in texts if text], np.int64)
    return np.cumsum(sizes) - sizes
