"""Names chosen by patterns, with errors that say which names are near."""

import difflib
import re
from collections.abc import Collection

__all__ = ["match_names"]

# Names that one message lists.
MOST_NEAR = 5


def match_names(what: str, patterns: str, names: Collection[str]) -> tuple[str, ...]:
    """The names in which one of several regular expressions is found, anywhere.

    Args:
      what: name of the argument, for messages.
      patterns: separated by commas; "" matches nothing.
      names: dotted paths.

    Raises:
      ValueError: a pattern that is no regular expression, or that is found in no name; the message lists near names.

    Example:
      >>> names = ("embedding.table", "blocks.0.norm.scale", "blocks.1.norm.scale")
      >>> match_names("freeze", r"embedding, blocks\\.0", names)
      ('embedding.table', 'blocks.0.norm.scale')
      >>> match_names("freeze", "embeding", names)
      Traceback (most recent call last):
      ...
      ValueError: freeze has the pattern 'embeding', which is found in no name; near ones: embedding.table
    """
    found: set[str] = set()
    for pattern in (part.strip() for part in patterns.split(",")):
        if not pattern:
            continue
        try:
            matched = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise ValueError(
                f"{what} must be regular expressions separated by commas, got {pattern!r}: {error}"
            ) from None
        if not matched:
            near = ", ".join(_near(pattern, names)) or "none"
            raise ValueError(f"{what} has the pattern {pattern!r}, which is found in no name; near ones: {near}")
        found.update(matched)
    return tuple(name for name in names if name in found)


def _near(pattern: str, names: Collection[str]) -> list[str]:
    """The names that have a part as long as the pattern which resembles it most; else the first of all names."""
    text = pattern.replace("\\", "")
    size = text.count(".") + 1
    parts: dict[str, str] = {}
    for name in names:
        words = name.split(".")
        for i in range(len(words) - size + 1):
            parts.setdefault(".".join(words[i : i + size]), name)
    close = difflib.get_close_matches(text, parts, MOST_NEAR, 0.5)
    return list(dict.fromkeys(parts[part] for part in close)) or list(names)[:MOST_NEAR]
