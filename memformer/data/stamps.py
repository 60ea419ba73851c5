"""Real pictures with captions: the stamps of Tux Paint, read from the folder of Debian's package.

The stamps are under the GPL: they are read in place, and this project contains none of them. A stamp is NAME.png with
NAME.txt, whose first line is the English caption, and optionally NAME.dat with its options.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memformer.data.source import SPLITS
from memformer.data.splits import split_items

__all__ = ["STAMPS_FOLDER", "STAMPS_PACKAGE", "Stamp", "clean_caption", "list_stamps", "read_pictures", "split_stamps"]

STAMPS_PACKAGE = "tuxpaint-stamps-default"
STAMPS_FOLDER = "/usr/share/tuxpaint/stamps"

# Percentages of the pictures.
TEST, VALIDATION = 10, 10


class Stamp(NamedTuple):
    """A picture and its caption.

    Attributes:
      path: path of the PNG, relative to the folder, with forward slashes.
      words: words of the cleaned caption.
      mirrors: True where the picture may be mirrored (letters and signs may not).
    """

    path: str
    words: tuple[str, ...]
    mirrors: bool


def clean_caption(caption: str) -> tuple[str, ...]:
    """Words of a caption's first sentence, in lower case, without text in brackets.

    Example:
      >>> clean_caption("An inukshuk (or inuksuk), a landmark. It was used as a milestone.")
      ('an', 'inukshuk', 'a', 'landmark')
    """
    plain = re.sub(r"\([^)]*\)", " ", caption.replace("’", "'").lower())
    # A full stop or mark before a space ends the sentence; "no. 5" and "f.22" do not occur.
    sentences = re.split(r"(?<=[.!?])\s", plain.strip())
    return tuple(re.findall(r"[^\W_]+(?:['-][^\W_]+)*", sentences[0]))


@functools.cache
def list_stamps(folder: str) -> tuple[Stamp, ...]:
    """All pictures with a caption below `folder`, sorted by path.

    Raises:
      ValueError: the folder does not exist, has no captioned picture, or has a caption that cannot be read.
    """
    root = Path(folder)
    found = []
    for picture in root.rglob("*.png"):
        text, options = picture.with_suffix(".txt"), picture.with_suffix(".dat")
        if not text.is_file():
            continue
        # The other lines are translations.
        words = clean_caption((_read_text(text, folder).splitlines() or [""])[0])
        if words:
            fixed = options.is_file() and "nomirror" in _read_text(options, folder).split()
            found.append(Stamp(picture.relative_to(root).as_posix(), words, not fixed))
    if not found:
        state = "has no PNG with a caption" if root.is_dir() else "does not exist"
        raise ValueError(
            f"task.folder {folder!r} {state}: task.pictures='stamps' reads the stamps of Debian's package "
            f"{STAMPS_PACKAGE}. Install it (apt-get install {STAMPS_PACKAGE}) or set task.folder to the folder of its "
            "stamps; task.pictures='shapes' needs no files"
        )
    return tuple(sorted(found))


def _read_text(path: Path, folder: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"task.folder {folder!r}: {path.name} cannot be read: {error}") from error


@functools.cache
def split_stamps(folder: str) -> dict[str, tuple[Stamp, ...]]:
    """Stamps of each split: about 80% train, 10% validation and 10% test, by the hash of a picture's path.

    A picture is in one split only, but a near-duplicate may be in another: letters come filled and outlined, many
    things as a photograph and as a drawing. This inflates held-out scores; the scores on pictures whose caption no
    training picture has measure more than the recognition of near-duplicates.

    Raises:
      ValueError: see `list_stamps`.
    """
    parts: dict[str, list[Stamp]] = {split: [] for split in SPLITS}
    stamps = list_stamps(folder)
    splits = split_items([stamp.path.encode() for stamp in stamps], test=TEST, validation=VALIDATION)
    for stamp, split in zip(stamps, splits, strict=True):
        parts[split].append(stamp)
    return {split: tuple(stamps) for split, stamps in parts.items()}


# The whole package at 64 x 64 is 12 MB.
@functools.lru_cache(maxsize=6)
def read_pictures(folder: str, stamps: Sequence[Stamp], size: int) -> np.ndarray:
    """Reads pictures on a white background, fitted into a square: uint8 [stamps, size, size, 3].

    Args:
      folder: root of the pictures' paths.
      stamps: the pictures, as a tuple.
      size: side of the square in pixels; the longer side of a picture is scaled to it.

    Raises:
      ValueError: a file that cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    pictures = np.full((len(stamps), size, size, 3), 255, np.uint8)
    for number, stamp in enumerate(stamps):
        try:
            with Image.open(Path(folder, stamp.path)) as file:
                opened = file.convert("RGBA")
        # Pillow raises SyntaxError and ValueError too for damaged chunks of a PNG.
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
            raise ValueError(f"task.folder {folder!r}: {stamp.path} cannot be read: {error}") from error
        white = Image.new("RGBA", opened.size, "white")
        scaled = ImageOps.pad(Image.alpha_composite(white, opened).convert("RGB"), (size, size), color="white")
        pictures[number] = np.asarray(scaled)
    return pictures
