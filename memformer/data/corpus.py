"""Corpora of text: files and folders, and sources from Python, as documents in one order.

A document that cannot be read is a `Problem` with its file and line, which the reader of the corpus counts or raises.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from memformer.core.checks import check_at_least
from memformer.data.text_files import (
    COMPRESSED,
    PARQUET,
    Cursor,
    Part,
    Problem,
    Report,
    TextOptions,
    TextRecord,
    file_part,
    make_record,
    read_text,
    reader_of,
)
from memformer.data.tokenizer import FileTokenizer

__all__ = ["Corpus", "open_corpus", "wrap_source"]

# What a folder is searched for; a .json in a folder is more often a setting than a corpus.
SEARCHED = (".txt", ".md", ".jsonl", ".ndjson", PARQUET)


def _fail(problem: Problem) -> NoReturn:
    raise ValueError(f"{problem.place}: {problem.message}")


def _ignore(problem: Problem) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order; made by `open_corpus` or `wrap_source`.

    Attributes:
      parts: readers of the files, in their order.
      identity: name and size of each file, by which an interrupted job knows its corpus again.
      most: largest number of documents, where the files alone tell it.
    """

    parts: tuple[Part, ...]
    identity: tuple[tuple[str, int], ...]
    most: int | None = None

    def read(self, start: Cursor = (0, 0), report: Report = _fail) -> Iterator[tuple[Cursor, TextRecord]]:
        """Yields each document with the cursor behind it, from which a later call continues.

        Args:
          start: cursor of the last document to skip.
          report: called with each problem; by default it is raised.

        Raises:
          ValueError: a problem, unless `report` takes it.
        """
        for index in range(start[0], len(self.parts)):
            skipped = start[1] if index == start[0] else 0
            # problems before the start were reported by the call that reached it
            heard: list[Report] = [_ignore if skipped else report]
            records = self.parts[index](lambda problem, heard=heard: heard[0](problem))  # type: ignore[misc]
            next(itertools.islice(records, skipped - 1, skipped), None) if skipped else None
            heard[0] = report
            for number, record in enumerate(records, skipped + 1):
                yield (index, number), record

    def texts(self, report: Report = _fail) -> Iterator[str]:
        """Yields the texts of all documents, each with its prompt before it."""
        for _, record in self.read(report=report):
            yield record.prompt + record.text


def open_corpus(
    paths: Sequence[str],
    *,
    field: str = "text",
    suffix: str = "",
    separator: str = "",
    piece_bytes: int = 0,
    chat: FileTokenizer | None = None,
) -> Corpus:
    """Opens files and folders of text.

    The ending of a file's name says how it is read: .jsonl, .ndjson and .json hold a JSON object per line, .parquet
    rows, all others text; .gz and .zst (library `zstandard`) may follow. A text file is one document, unless
    `separator` or `piece_bytes` divide it. A JSON object or row without `field`, but with "prompt" and "completion", is
    a document with a prompt; so is a JSON object with "messages", of which the last is the completion.

    Args:
      paths: files, and folders that are searched with all that is below them; names that start with "." are skipped.
      field: name of the text in JSON objects and Parquet rows.
      suffix: ending of the file names that a folder is searched for; "" is .txt, .md, .jsonl, .ndjson and .parquet.
      separator: text between two documents of a text file, such as "\\n\\n" or "<|endoftext|>".
      piece_bytes: largest document of a text file; longer ones are cut at the end of a line. 0 is no limit.
      chat: tokenizer whose chat template renders "messages".

    Raises:
      ValueError: a path that does not exist, or a folder without such a file.
    """
    check_at_least("piece_bytes", piece_bytes, 0)
    files = [file for path in paths for file in _list_files(os.path.expanduser(path), suffix)]
    if not files:
        raise ValueError("paths must name at least one file or folder, got none")
    options = TextOptions(field, separator.encode(), piece_bytes, chat)
    parts = tuple(file_part(file, options) for file in files)
    whole = not separator and not piece_bytes and all(reader_of(file) is read_text for file in files)
    return Corpus(parts, tuple((file, os.path.getsize(file)) for file in files), len(files) if whole else None)


def wrap_source(source: Any, *, field: str = "text", name: str = "source") -> Corpus:
    """Makes a corpus of a source from Python: a Grain data source, a list, or any iterable that starts anew.

    Args:
      source: texts, or mappings with `field` or with "prompt" and "completion".
      field: name of the text in mappings.
      name: name in messages.

    Example:
      >>> corpus = wrap_source(["one", {"prompt": "1 + 1 =", "completion": " 2"}])
      >>> list(corpus.texts())
      ['one', '1 + 1 = 2']
    """

    def part(report: Report) -> Iterator[TextRecord]:
        items = source if hasattr(source, "__iter__") else (source[i] for i in range(len(source)))
        for number, item in enumerate(items):
            value = {field: item} if isinstance(item, str) else item
            record = make_record(value, field, f"{name}, item {number}", report)
            if record is not None:
                yield record

    size = len(source) if hasattr(source, "__len__") else -1
    return Corpus((part,), ((name, size),))


def _list_files(path: str, suffix: str) -> list[str]:
    """The files below a path, sorted."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise ValueError(f"paths must name files or folders that exist, got {path!r}")
    wanted = (suffix,) if suffix else SEARCHED
    endings = tuple(ending + packed for ending in wanted for packed in ("", *COMPRESSED))
    found, others = [], set()
    for root, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.endswith(endings):
                found.append(os.path.join(root, name))
            else:
                others.add(os.path.splitext(name)[1])
    if not found:
        seen = ", ".join(sorted(others - {""})[:8])
        raise ValueError(
            f"paths: the folder {path!r} has no file that ends in {' or '.join(wanted)}"
            + (f"; it has files that end in {seen}: name an ending with suffix" if seen else "")
        )
    return found
