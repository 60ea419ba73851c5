"""Real pictures with captions: the stamps of Tux Paint, read where Debian's package installs them.

The stamps are under the GPL: they are read from their folder and nothing of them is kept in this project. Each
is NAME.png with NAME.txt, whose first line is the English caption, and where it has options NAME.dat.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memformer.data.source import SPLITS

__all__ = ["FOLDER", "PACKAGE", "Stamp", "clean", "list_stamps", "read_pictures", "split_stamps"]

PACKAGE = "tuxpaint-stamps-default"
FOLDER = "/usr/share/tuxpaint/stamps"

# Of a hundred pictures, by hash of the path: test below the first number, validation below the second.
TEST_SHARE, VALIDATION_SHARE = 10, 20


class Stamp(NamedTuple):
    """One picture and what is said of it.

    Attributes:
      path: of the PNG, relative to the folder, with forward slashes.
      words: of the cleaned caption.
      mirrors: it may be mirrored (letters and signs may not).
    """

    path: str
    words: tuple[str, ...]
    mirrors: bool


def clean(caption: str) -> tuple[str, ...]:
    """The words of a caption's first sentence in lower case, without what stands in brackets.

    Example:
      >>> clean("An inukshuk (or inuksuk), a landmark. It was used as a milestone.")
      ('an', 'inukshuk', 'a', 'landmark')
    """
    plain = re.sub(r"\([^)]*\)", " ", caption.replace("’", "'").lower())
    # A stop or mark that a space follows ends the sentence; "no. 5" and "f.22" do not occur.
    sentences = re.split(r"(?<=[.!?])\s", plain.strip())
    return tuple(re.findall(r"[^\W_]+(?:['-][^\W_]+)*", sentences[0]))


@functools.cache
def list_stamps(folder: str) -> tuple[Stamp, ...]:
    """All pictures with a caption below `folder`, in the order of their paths.

    Raises:
      ValueError: the folder is not there, or holds no such pair of files.
    """
    root = Path(folder)
    found = []
    for picture in root.rglob("*.png"):
        text, options = picture.with_suffix(".txt"), picture.with_suffix(".dat")
        if not text.is_file():
            continue
        # The other lines are the caption in other languages.
        words = clean((text.read_text("utf-8").splitlines() or [""])[0])
        if words:
            fixed = options.is_file() and "nomirror" in options.read_text("utf-8").split()
            found.append(Stamp(picture.relative_to(root).as_posix(), words, not fixed))
    if not found:
        state = "holds no PNG with a caption" if root.is_dir() else "is not there"
        raise ValueError(
            f"task.folder {folder!r} {state}: task.pictures='stamps' reads the stamps of Debian's package {PACKAGE}. "
            f"Install it (apt-get install {PACKAGE}) or set task.folder to where its stamps lie; without it, "
            "task.pictures='shapes' runs on pictures that are generated"
        )
    return tuple(sorted(found))


@functools.cache
def split_stamps(folder: str) -> dict[str, tuple[Stamp, ...]]:
    """The stamps of each split: about 80% train, 10% validation, 10% test, by the hash of a picture's path.

    A picture is in one split only, but its like may be in another: the letters come filled and outlined, many
    things both as a photograph and as a drawing. Held-out scores are flattered by that; those of pictures whose
    caption no training picture has are the ones that measure more than recognition of a near-duplicate.

    Raises:
      ValueError: see `list_stamps`.
    """
    parts: dict[str, list[Stamp]] = {split: [] for split in SPLITS}
    for stamp in list_stamps(folder):
        number = int.from_bytes(hashlib.sha256(stamp.path.encode()).digest()[:8], "big") % 100
        parts["test" if number < TEST_SHARE else "validation" if number < VALIDATION_SHARE else "train"].append(stamp)
    return {split: tuple(stamps) for split, stamps in parts.items()}


# The whole package at 64 x 64 is 12 MB.
@functools.lru_cache(maxsize=6)
def read_pictures(folder: str, stamps: Sequence[Stamp], size: int) -> np.ndarray:
    """The pictures on white, fitted into a square: uint8 [stamps, size, size, 3].

    Args:
      folder: where their paths begin.
      stamps: a tuple of which pictures.
      size: side of the square in pixels; a picture is scaled until its longer side fills it.

    Raises:
      ValueError: a file that cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    pictures = np.full((len(stamps), size, size, 3), 255, np.uint8)
    for number, stamp in enumerate(stamps):
        try:
            with Image.open(Path(folder, stamp.path)) as file:
                opened = file.convert("RGBA")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"task.folder {folder!r}: {stamp.path} cannot be read: {error}") from error
        white = Image.new("RGBA", opened.size, "white")
        scaled = ImageOps.pad(Image.alpha_composite(white, opened).convert("RGB"), (size, size), color="white")
        pictures[number] = np.asarray(scaled)
    return pictures
