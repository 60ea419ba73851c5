"""Docstrings for the API pages of the site: a griffe extension that mkdocs.yml names."""

import re

from griffe import Extension, Object

__all__ = ["HouseStyle", "for_pages"]


class HouseStyle(Extension):
    """Rewrites docstrings of the house into what griffe's Google parser knows, and names in backticks into links."""

    def on_object(self, *, obj: Object, **_) -> None:
        """Rewrites one docstring."""
        if obj.docstring:
            obj.docstring.value = for_pages(obj.docstring.value)


def for_pages(text: str) -> str:
    r"""Docstring with examples as a section, one argument per line, and links from dotted names.

    Example:
      >>> for_pages("Args:\n  a, b: see T.")
      'Args:\n  a: see T.\n  b: see T.'
    """
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"^( +)((?:\w+, )+\w+): (.*(?:\n\1 .*)*)", _one_per_line, text, flags=re.MULTILINE)
    return re.sub(r"(?<!\[)`(memformer\.[\w.]+)`", r'<autoref identifier="\1" optional><code>\1</code></autoref>', text)


def _one_per_line(match: re.Match) -> str:
    indent, names, rest = match.groups()
    return "\n".join(f"{indent}{name}: {rest}" for name in names.split(", "))
