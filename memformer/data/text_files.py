"""Readers of text files, JSON lines and Parquet, compressed or not: one document after another, or a problem."""

import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from memformer.data.tokenizer import FileTokenizer

__all__ = ["Cursor", "Problem", "TextRecord"]

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"
COMPRESSED = (".gz", ".zst")
BLOCK = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TextRecord(NamedTuple):
    """A document.

    Attributes:
      text: what a model learns to write.
      prompt: what comes before it, which a model reads and is not scored on; "" for none.
      place: file and line, or row, for messages.
    """

    text: str
    prompt: str = ""
    place: str = ""


class Problem(NamedTuple):
    """A document or file that cannot be used.

    Attributes:
      place: file and line.
      kind: "broken UTF-8", "empty", "not JSON", "no text" or "unreadable file".
      message: what is wrong.
    """

    place: str
    kind: str
    message: str


# Index of a part of a corpus, and the number of documents already read from it.
Cursor: TypeAlias = tuple[int, int]
Report: TypeAlias = Callable[[Problem], None]
Part: TypeAlias = Callable[[Report], Iterator[TextRecord]]


class TextOptions(NamedTuple):
    """Options of `open_corpus` that readers need."""

    field: str
    separator: bytes
    piece_bytes: int
    chat: FileTokenizer | None


def reader_of(path: str) -> Callable[[BinaryIO, str, TextOptions, Report], Iterator[TextRecord]]:
    """The reader of a file, by the ending of its name."""
    name, packed = os.path.splitext(path.lower())
    kind = os.path.splitext(name)[1] if packed in COMPRESSED else packed
    return _read_json_lines if kind in JSON_LINES else _read_parquet if kind == PARQUET else read_text


def file_part(path: str, options: TextOptions) -> Part:
    """The part of a corpus that one file is."""
    reader = reader_of(path)

    def part(report: Report) -> Iterator[TextRecord]:
        try:
            with _open(path) as stream:
                yield from reader(stream, path, options, report)
        except (OSError, EOFError, zlib.error, _DamagedError) as error:
            report(Problem(path, "unreadable file", f"the file cannot be read: {error}"))

    return part


class _DamagedError(Exception):
    """An error of an optional library that reads a format."""


def _open(path: str) -> Any:
    """A binary stream of the decompressed file."""
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        return io.BufferedReader(_Zstandard(path, _import("zstandard", path)))
    return open(path, "rb")


class _Zstandard(io.RawIOBase):
    """A decompressed .zst; unlike the library's own reader, it does not take a file that is cut for its end."""

    def __init__(self, path: str, library: Any):
        self._library = library
        self._file = open(path, "rb")  # noqa: SIM115
        self._frame: Any = None
        self._rest = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            block = self._rest or self._file.read(BLOCK)
            if not block and self._frame is None:
                return 0
            if not block:
                raise EOFError("the file ends inside of its compressed data")
            self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(block))
            except self._library.ZstdError as error:
                raise _DamagedError(error) from error
            self._rest = b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _import(package: str, path: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.partition(".")[0]
        message = f"{path} needs the Python package {top}, which is not installed: pip install {top}"
        raise ImportError(message) from error


def read_text(stream: BinaryIO, path: str, options: TextOptions, report: Report) -> Iterator[TextRecord]:
    """The documents of a text file."""
    anything = False
    for piece, line in _divide(stream, options):
        if not piece.strip():
            continue
        anything = True
        try:
            yield TextRecord(piece.decode(), place=f"{path}:{line}")
        except UnicodeDecodeError as error:
            at = line + piece.count(b"\n", 0, error.start)
            report(_broken(f"{path}:{at}", error))
    if not anything:
        report(Problem(path, "empty", "the file has no text"))


def _broken(place: str, error: UnicodeDecodeError) -> Problem:
    byte = error.object[error.start]
    return Problem(place, "broken UTF-8", f"byte 0x{byte:02x} is no UTF-8 ({error.reason}); save the text as UTF-8")


def _divide(stream: BinaryIO, options: TextOptions) -> Iterator[tuple[bytes, int]]:
    """Yields the documents of a text file, each with the number of its first line."""
    separator, limit = options.separator, options.piece_bytes
    if not separator and not limit:
        yield stream.read().removeprefix(BYTE_ORDER_MARK), 1
        return
    buffer, line, searched = bytearray(stream.read(BLOCK).removeprefix(BYTE_ORDER_MARK)), 1, 0
    separator = _match_line_ends(separator, buffer, stream)
    more = True
    while more:
        block = stream.read(BLOCK)
        more = bool(block)
        buffer += block
        while (cut := _find_cut(buffer, searched, separator, limit)) is not None:
            yield bytes(buffer[: cut[0]]), line
            line += buffer.count(b"\n", 0, cut[1])
            del buffer[: cut[1]]
            searched = 0
        # a separator may lie across two blocks
        searched = max(0, len(buffer) - len(separator))
    yield bytes(buffer), line


def _match_line_ends(separator: bytes, buffer: bytearray, stream: BinaryIO) -> bytes:
    """The separator with the line ends of a file, which its first line shows; `buffer` grows up to that line's end."""
    if b"\n" not in separator or b"\r" in separator:
        return separator
    while b"\n" not in buffer and (block := stream.read(BLOCK)):
        buffer += block
    end = buffer.find(b"\n")
    return separator.replace(b"\n", b"\r\n") if end > 0 and buffer[end - 1] == ord("\r") else separator


def _find_cut(buffer: bytearray, searched: int, separator: bytes, limit: int) -> tuple[int, int] | None:
    """End of the first document in a buffer, and the start of the next one; None where it has no end yet."""
    found = buffer.find(separator, searched) if separator else -1
    if found >= 0 and (not limit or found <= limit):
        return found, found + len(separator)
    if not limit or len(buffer) <= limit:
        return None
    end = buffer.rfind(b"\n", 0, limit) + 1 or limit
    # not inside a character; three bytes at most belong to its rest
    for _ in range(3):
        end -= end > 1 and buffer[end] & 0xC0 == 0x80
    return end, end


def _read_json_lines(stream: BinaryIO, path: str, options: TextOptions, report: Report) -> Iterator[TextRecord]:
    anything = False
    for number, line in enumerate(stream, 1):
        content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if not content.strip():
            continue
        anything, place = True, f"{path}:{number}"
        try:
            value = json.loads(content.decode())
        except UnicodeDecodeError as error:
            report(_broken(place, error))
            continue
        except (ValueError, RecursionError) as error:
            report(Problem(place, "not JSON", f"the line is no JSON: {error}"))
            continue
        record = make_record(value, options.field, place, report, options.chat)
        if record is not None:
            yield record
    if not anything:
        report(Problem(path, "empty", "the file has no line"))


def _read_parquet(stream: BinaryIO, path: str, options: TextOptions, report: Report) -> Iterator[TextRecord]:
    arrow, parquet = _import("pyarrow", path), _import("pyarrow.parquet", path)
    try:
        # pyarrow seeks, so compressed files are read whole
        file = parquet.ParquetFile(path if not path.lower().endswith(COMPRESSED) else io.BytesIO(stream.read()))
        names = file.schema_arrow.names
        columns = [options.field] if options.field in names else ["prompt", "completion"]
        if not set(columns) <= set(names):
            report(Problem(path, "no text", _missing_field(options.field, names)))
            return
        for name in columns:
            kind = file.schema_arrow.field(name).type
            kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_binary(kind)):
                report(Problem(path, "no text", f"column {name!r} must hold strings, got {kind}"))
                return
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            # bytes, because one broken string would spoil its batch
            values = [column.cast(arrow.large_binary()).to_pylist() for column in batch.columns]
            for row in zip(*values, strict=True):
                number += 1
                place = f"{path}, row {number}"
                try:
                    texts = [value.decode() if value is not None else None for value in row]
                except UnicodeDecodeError as error:
                    report(_broken(place, error))
                    continue
                record = make_record(dict(zip(columns, texts, strict=True)), options.field, place, report)
                if record is not None:
                    yield record
        if not number:
            report(Problem(path, "empty", "the file has no row"))
    except arrow.ArrowException as error:
        raise _DamagedError(error) from error


def make_record(
    value: Any, field: str, place: str, report: Report, chat: FileTokenizer | None = None
) -> TextRecord | None:
    """The document of a JSON object or row; None, after a report, where it has none."""
    if not isinstance(value, Mapping):
        report(Problem(place, "no text", f"expected an object with {field!r}, got {type(value).__name__}"))
        return None
    if field not in value and "messages" in value:
        try:
            value = _render(value["messages"], chat)
        except ValueError as error:
            report(Problem(place, "no text", f"'messages' {error}"))
            return None
    names = (field,) if field in value else ("prompt", "completion")
    if not set(names) <= set(value):
        report(Problem(place, "no text", _missing_field(field, list(value))))
        return None
    for name in names:
        text = value[name]
        if not isinstance(text, str):
            report(Problem(place, "no text", f"{name!r} must be a string, got {type(text).__name__}"))
            return None
        if not _has_utf8(text):
            report(Problem(place, "broken UTF-8", f"{name!r} holds half of a surrogate pair"))
            return None
    if not value[names[-1]].strip():
        report(Problem(place, "empty", f"{names[-1]!r} is empty"))
        return None
    return TextRecord(value[names[-1]], value["prompt"] if len(names) == 2 else "", place)


def _render(messages: Any, chat: FileTokenizer | None) -> dict[str, str]:
    """A conversation as a prompt, and the last answer as its completion.

    Raises:
      ValueError: no chat template, one that fails, or messages that do not end with an answer.
    """
    if chat is None or chat.chat_template is None:
        raise ValueError("need a tokenizer with a chat template")
    valid = isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages)
    if not valid or not messages or messages[-1].get("role") != "assistant":
        raise ValueError("must be a list of messages of which the last has the role 'assistant'")
    whole = chat.apply_chat_template(messages)
    prompt = chat.apply_chat_template(messages[:-1], add_generation_prompt=True)
    if not whole.startswith(prompt):
        raise ValueError("are rendered with another beginning than without their answer, which cannot be scored alone")
    return {"prompt": prompt, "completion": whole.removeprefix(prompt)}


def _has_utf8(text: str) -> bool:
    """False for half of a surrogate pair, which JSON may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _missing_field(field: str, names: Sequence[str]) -> str:
    return f"has no {field!r}, nor prompt and completion; it has {', '.join(map(str, names)) or 'nothing'}"
