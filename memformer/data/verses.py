"""Verses in English and Spanish: of two installed packages, or of the part of them that is kept here.

Both are in the public domain: the King James Version (1769 text) and the Reina-Valera of 1909, as the packages
sword-text-kjv and sword-text-sparv bring them. A SWORD module of kind zText keeps each testament in three files:
the compressed books (bzz), where each of them lies (bzs), and which part of a book each verse is (bzv). Verses
have the same numbers in both modules.
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

__all__ = ["PACKAGES", "Verse", "find_modules", "read_modules", "read_slice", "strip_markup"]

PACKAGES = ("sword-text-kjv", "sword-text-sparv")
MODULES = ("modules/texts/ztext/engKJV2006eb", "modules/texts/ztext/spaRV1909eb")
SLICE = "files/genesis_en_es.tsv"

# A note's or title's own text is no verse; one that closes itself has none.
INSETS = re.compile(r"<(note|title)\b(?:[^>]*/>|.*?</\1>)", re.DOTALL)
TAG = re.compile(r"<[^>]*>")


class Verse(NamedTuple):
    """One verse in both languages."""

    english: str
    spanish: str


def strip_markup(text: str) -> str:
    """A verse without notes, titles and tags, its spaces single.

    Example:
      >>> strip_markup('<w lemma="x">In</w> the  <note>or: at</note>beginning<title type="t"/> ')
      'In the beginning'
    """
    return " ".join(TAG.sub("", INSETS.sub("", text)).split())


def find_modules(folder: str = "") -> str | None:
    """The folder that holds both modules: `folder` or, where that is "", the first of SWORD's usual ones; or None."""
    if folder:
        places = [folder]
    else:
        data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        shared = [os.path.join(part, "sword") for part in data.split(os.pathsep) if part]
        places = [os.environ.get("SWORD_PATH", ""), os.path.expanduser("~/.sword"), *shared, "/usr/share/sword"]
    for place in places:
        if place and all(os.path.isdir(os.path.join(place, module)) for module in MODULES):
            return place
    return None


@functools.cache
def read_modules(folder: str) -> tuple[Verse, ...]:
    """All verses that have words in both languages, in the order of the modules.

    Raises:
      ValueError: files that are missing or not in the format.
    """
    try:
        english, spanish = (_read_module(Path(folder, module)) for module in MODULES)
    except (OSError, struct.error, zlib.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(
            f"task.folder {folder!r}: the verses cannot be read ({error}); install the packages "
            f"{' and '.join(PACKAGES)} anew, or set task.corpus='slice'"
        ) from error
    if len(english) != len(spanish):
        raise ValueError(
            f"task.folder {folder!r}: the modules must number the same verses, got {len(english)} in English and "
            f"{len(spanish)} in Spanish"
        )
    pairs = (Verse(strip_markup(a), strip_markup(b)) for a, b in zip(english, spanish, strict=True))
    return tuple(verse for verse in pairs if all(verse))


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
def read_slice() -> tuple[Verse, ...]:
    """The verses that are kept in this package: Genesis 1 to 20."""
    text = resources.files("memformer.data").joinpath(SLICE).read_text("utf-8")
    return tuple(_parse(text.splitlines()))


def _parse(lines: Sequence[str]) -> list[Verse]:
    return [Verse(*line.split("\t")) for line in lines if not line.startswith("#")]
