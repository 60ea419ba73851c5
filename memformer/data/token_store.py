"""Token stores: tokenized documents in memory-mapped shards, with a manifest.

A store is a folder:

    manifest.json            tokenizer, dtype, counts, and the shards of each split
    tokenizer/               the tokenizer, as `load_tokenizer` reads it
    train/00000.tokens.npy   uint16 or uint32 [tokens]: the documents one after another, each with its end of text
    train/00000.ends.npy     int64 [documents]: where each document ends
    train/00000.prompts.npy  int32 [documents]: tokens at its beginning that are not scored; absent where all are 0
    validation/..., test/... the same

NumPy reads document d > 0 of a shard in three lines:

    tokens = np.load("store/train/00000.tokens.npy", mmap_mode="r")
    ends = np.load("store/train/00000.ends.npy", mmap_mode="r")
    document = tokens[ends[d - 1] : ends[d]]
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from memformer.core.checks import check_choice
from memformer.data.source import SPLITS
from memformer.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Shard", "TokenSplit", "TokenStore"]

MANIFEST = "manifest.json"
FORMAT = "memformer tokens 1"
# Of NumPy's format, for arrays of one axis.
HEADER_BYTES = 128
# Shards that stay mapped; a mapping costs a file handle and no memory.
MAPPED_SHARDS = 256


class Shard(NamedTuple):
    """The arrays of one shard, mapped.

    Attributes:
      tokens: ids [tokens].
      ends: where each document ends [documents].
      prompts: tokens at the beginning of each document that are not scored [documents]; None where all are 0.
    """

    tokens: np.ndarray
    ends: np.ndarray
    prompts: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """The documents of one split of a store, as one sequence of tokens that is read in parts.

    Attributes:
      folder: holds the shards.
      shards: name, tokens, documents, bytes, scored tokens and prompts of each shard, from the manifest.
    """

    folder: pathlib.Path
    shards: tuple[Mapping[str, Any], ...]

    def __getstate__(self) -> dict[str, Any]:
        # maps are opened anew in each process that reads
        return {"folder": self.folder, "shards": self.shards}

    def count(self, what: str) -> int:
        """Sum over the shards of "tokens", "documents", "bytes" (of text that is scored) or "scored" (tokens)."""
        return sum(shard[what] for shard in self.shards)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """First token of each shard, and the number of all tokens [shards + 1]."""
        return np.cumsum([0, *(shard["tokens"] for shard in self.shards)])

    @functools.cached_property
    def _open(self) -> Any:
        return functools.lru_cache(MAPPED_SHARDS)(self._open_shard)

    def _open_shard(self, index: int) -> Shard:
        found = self.shards[index]
        arrays = {}
        for name, size in (("tokens", "tokens"), ("ends", "documents"), ("prompts", "documents")):
            path = self.folder / f"{found['name']}.{name}.npy"
            if name == "prompts" and not found["prompts"]:
                continue
            try:
                # a plain view of the map: each slice of a memmap is an object with attributes of its own
                arrays[name] = np.load(path, mmap_mode="r").view(np.ndarray)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"the token store is damaged: {path} cannot be read: {error}") from error
            if arrays[name].shape != (found[size],):
                raise ValueError(
                    f"the token store is damaged: {path} must hold {found[size]} numbers, got {arrays[name].shape}"
                )
        return Shard(arrays["tokens"], arrays["ends"], arrays.get("prompts"))

    def read(self, first: int, stop: int) -> np.ndarray:
        """Tokens [first, stop) of the split."""
        parts = [shard.tokens[a - at : b - at] for shard, at, a, b in self.overlaps(first, stop)]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint16)

    def overlaps(self, first: int, stop: int) -> Iterator[tuple[Shard, int, int, int]]:
        """Yields each shard with a part of tokens [first, stop), its first token, and that part in the split."""
        starts = self.starts
        # the last shard that starts at or before `first`; empty shards share a start
        index = int(np.searchsorted(starts, first, side="right")) - 1
        while index < len(self.shards) and starts[index] < stop:
            at, end = int(starts[index]), int(starts[index + 1])
            if max(first, at) < min(stop, end):
                yield self._open(index), at, max(first, at), min(stop, end)
            index += 1

    def documents(self) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """Yields, per shard, its first token, and `ends` and `prompts` of its documents."""
        for index in range(len(self.shards)):
            shard = self._open(index)
            yield int(self.starts[index]), shard.ends, shard.prompts


class TokenStore:
    """A store of tokenized documents, which `tokenize_corpus` writes.

    Args:
      path: the folder.

    Attributes:
      manifest: the content of manifest.json.

    Raises:
      ValueError: a folder that holds no store, or one that is not finished.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path).expanduser()
        file = self.path / MANIFEST
        if not file.is_file():
            raise ValueError(f"{_what_is_there(self.path)}; write a store with: {_command(self.path)}")
        try:
            self.manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            known = self.manifest["format"] == FORMAT
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} cannot be read as the manifest of a token store: {error!r}") from error
        if not known:
            raise ValueError(f"{file} must have the format {FORMAT!r}, got {self.manifest['format']!r}")

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer and the documents."""
        return self.manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        """Number of ids of the tokenizer."""
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def start(self) -> int:
        """The id before the first token of a document: the end of text, or else one behind the vocabulary."""
        end = self.manifest["tokenizer"]["end_of_text"]
        return self.vocab_size if end is None else end

    def check(self) -> None:
        """Checks that all files of all splits are there, in their sizes; contents are not read.

        Raises:
          ValueError: a file that is missing or has another size, named.
        """
        widths = {"tokens": np.dtype(self.manifest["dtype"]).itemsize, "ends": 8, "prompts": 4}
        for name in SPLITS:
            for shard in self.manifest["splits"][name]:
                for array, width in widths.items():
                    if array == "prompts" and not shard["prompts"]:
                        continue
                    path = self.path / name / f"{shard['name']}.{array}.npy"
                    count = shard["tokens" if array == "tokens" else "documents"]
                    size = path.stat().st_size if path.is_file() else 0
                    if size != HEADER_BYTES + count * width:
                        raise ValueError(
                            f"the token store is damaged: {path} must hold {count} numbers of {width} bytes, got a "
                            f"file of {size} bytes; delete the store and write it again"
                        )

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer of the store."""
        return load_tokenizer(str(self.path / "tokenizer"))

    def split(self, name: str) -> TokenSplit:
        """One of the splits "train", "validation" and "test"."""
        check_choice("split", name, SPLITS)
        return TokenSplit(self.path / name, tuple(self.manifest["splits"][name]))

    def summary(self) -> str:
        """A table of the splits, and the problems of the corpus."""
        rows: list[Sequence[str]] = [("split", "documents", "tokens", "bytes", "share", "bytes/token")]
        whole = sum(self.split(name).count("bytes") for name in SPLITS)
        for name in SPLITS:
            part = self.split(name)
            size, scored = part.count("bytes"), part.count("scored")
            counts = [f"{part.count(what):,}" for what in ("documents", "tokens", "bytes")]
            rows.append((name, *counts, f"{100 * size / max(whole, 1):.1f}%", f"{size / max(scored, 1):.2f}"))
        lines = _align(rows)
        for kind, count in self.manifest["problems"].items():
            lines.append(f"left out: {count} {'document or file' if count == 1 else 'documents or files'}, {kind}")
        return "\n".join(lines)


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _command(path: pathlib.Path) -> str:
    source = path if path.exists() and not (path / "progress").is_dir() else "TEXT"
    out = "STORE" if source == path else path
    return f"python -m memformer.data tokenize {source} --out={out}"


def _what_is_there(path: pathlib.Path) -> str:
    if (path / "progress").is_dir():
        return f"the token store {path} is not finished: run the command that writes it again, which resumes"
    if path.exists():
        return f"{path} is not a token store: it has no {MANIFEST}"
    return f"there is no token store {path}"
