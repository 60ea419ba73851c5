"""Verses in English and Spanish and chapters in English, from Debian packages or the excerpt of this package.

All texts are in the public domain: the King James Version (1769 text) and the Reina-Valera of 1909, of the packages
sword-text-kjv and sword-text-sparv, and the World English Bible of sword-text-web. A SWORD module of kind zText stores
each testament in three files: the compressed books (bzz), the offset and size of each book (bzs), and the book, offset
and size of each verse (bzv). Verses of the first two modules have the same numbers.
"""

import functools
import os
import re
import struct
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from memformer.data.splits import split_items

__all__ = [
    "CHAPTERS_PACKAGE",
    "VERSES_PACKAGES",
    "Verse",
    "find_chapters",
    "find_verses",
    "read_chapters",
    "read_verse_slice",
    "read_verses",
    "split_verses",
    "strip_markup",
]

VERSES_PACKAGES = ("sword-text-kjv", "sword-text-sparv")
MODULES = ("modules/texts/ztext/engKJV2006eb", "modules/texts/ztext/spaRV1909eb")
CHAPTERS_PACKAGE = "sword-text-web"
CHAPTERS = "modules/texts/ztext/engWEB2015eb"
SLICE = "files/genesis_en_es.tsv"

# Percentages of the English verses.
TEST, VALIDATION = 6, 6

# The text of notes and titles is not part of the verse; self-closing ones have none.
INSETS = re.compile(r"<(note|title)\b(?:[^>]*/>|.*?</\1>)", re.DOTALL)
TAG = re.compile(r"<[^>]*>")
# Where a book and a chapter of it begin; both also have tags that end them, with eID for sID.
BOOK = re.compile(r'<div [^>]*sID="[^"]*" type="book"/>')
CHAPTER = re.compile(r'<chapter [^>]*osisID="(\w+)\.\d+" sID="[^"]*"/>')
BEFORE_MARK = re.compile(r" (?=[,.;:!?\u2019\u201d])")
UNREADABLE = (OSError, struct.error, zlib.error, IndexError, UnicodeDecodeError)
# Esther and Daniel are in the Bible twice: translated from the Hebrew, and from the Greek
TWICE = ("EsthGr", "DanGr")


class Verse(NamedTuple):
    """One verse in both languages."""

    english: str
    spanish: str


def strip_markup(text: str) -> str:
    """Removes notes, titles and tags from a verse, and collapses its spaces.

    Example:
      >>> strip_markup('<w lemma="x">In</w> the  <note>or: at</note>beginning<title type="t"/> ')
      'In the beginning'
    """
    return " ".join(TAG.sub("", INSETS.sub("", text)).split())


def find_verses(folder: str = "") -> str | None:
    """The folder that holds both modules, or None.

    Args:
      folder: the only folder to search; "" searches the usual folders of SWORD modules.
    """
    return _find_modules(MODULES, folder)


def find_chapters(folder: str = "") -> str | None:
    """The folder that holds the module of the World English Bible, or None; `folder` as in `find_verses`."""
    return _find_modules((CHAPTERS,), folder)


def _find_modules(modules: Sequence[str], folder: str) -> str | None:
    if folder:
        places = [folder]
    else:
        data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        shared = [os.path.join(part, "sword") for part in data.split(os.pathsep) if part]
        places = [os.environ.get("SWORD_PATH", ""), os.path.expanduser("~/.sword"), *shared, "/usr/share/sword"]
    for place in places:
        if place and all(os.path.isdir(os.path.join(place, module)) for module in modules):
            return place
    return None


@functools.cache
def read_verses(folder: str) -> tuple[Verse, ...]:
    """All verses that have words in both languages, in the order of the modules.

    Raises:
      ValueError: files that are missing or damaged.
    """
    try:
        english, spanish = (_read_module(Path(folder, module)) for module in MODULES)
    except UNREADABLE as error:
        raise ValueError(
            f"task.folder {folder!r}: the verses cannot be read ({error}); install the packages "
            f"{' and '.join(VERSES_PACKAGES)} again, or set task.corpus='slice'"
        ) from error
    if len(english) != len(spanish):
        raise ValueError(
            f"task.folder {folder!r}: the modules must number the same verses, got {len(english)} in English and "
            f"{len(spanish)} in Spanish"
        )
    pairs = (Verse(strip_markup(a), strip_markup(b)) for a, b in zip(english, spanish, strict=True))
    return tuple(verse for verse in pairs if all(verse))


def read_chapters(folder: str) -> tuple[str, ...]:
    """All chapters of the World English Bible, a line per verse, without titles and the introductions of books.

    Args:
      folder: from `find_chapters`.

    Raises:
      ValueError: files that are missing or damaged.
    """
    try:
        rows = _read_module(Path(folder, CHAPTERS))
    except UNREADABLE as error:
        raise ValueError(
            f"folder {folder!r}: the chapters cannot be read ({error}); install the package {CHAPTERS_PACKAGE} again"
        ) from error
    chapters: list[list[str]] = []
    # what stands before the first chapter of a book
    skipped: list[str] = []
    lines = skipped
    for row in rows:
        if BOOK.search(row):
            lines = skipped
        begin = CHAPTER.search(row)
        if begin is not None:
            _add_line(lines, row[: begin.start()])
            lines = [] if begin[1] not in TWICE else skipped
            chapters += [lines] if lines is not skipped else []
        _add_line(lines, row[begin.end() :] if begin else row)
    return tuple("\n".join(lines) for lines in chapters if lines)


def _add_line(lines: list[str], text: str) -> None:
    """Adds the words of a verse; a note may be the only space between two words, or stand before a comma."""
    words = " ".join(TAG.sub("", INSETS.sub(" ", text)).split())
    if words:
        lines.append(BEFORE_MARK.sub("", words))


def _read_module(folder: Path) -> list[str]:
    verses = []
    for testament in ("ot", "nt"):
        packed = (folder / f"{testament}.bzz").read_bytes()
        places = struct.iter_unpack("<III", (folder / f"{testament}.bzs").read_bytes())
        books = [zlib.decompress(packed[start : start + size]) for start, size, _ in places]
        for book, start, size in struct.iter_unpack("<IIH", (folder / f"{testament}.bzv").read_bytes()):
            verses.append(books[book][start : start + size].decode() if size else "")
    return verses


@functools.cache
def read_verse_slice() -> tuple[Verse, ...]:
    """The verses that this package contains: Genesis 1 to 20."""
    text = resources.files("memformer.data").joinpath(SLICE).read_text("utf-8")
    return tuple(_parse(text.splitlines()))


@functools.cache
def split_verses(folder: str, split: str) -> tuple[Verse, ...]:
    """Verses of one split: about 88% train, 6% validation and 6% test, by the hash of the English verse.

    The same English verse is never in two splits.

    Args:
      folder: folder of the modules; "" is the excerpt of this package.
      split: "train", "validation" or "test".
    """
    verses = read_verses(folder) if folder else read_verse_slice()
    splits = split_items([verse.english.encode() for verse in verses], test=TEST, validation=VALIDATION)
    return tuple(verse for verse, chosen in zip(verses, splits, strict=True) if chosen == split)


def _parse(lines: Sequence[str]) -> list[Verse]:
    return [Verse(*line.split("\t")) for line in lines if not line.startswith("#")]
