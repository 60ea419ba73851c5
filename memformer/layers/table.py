"""The table of memories as Markdown, for the documentation."""

from memformer.layers.memory import MEMORIES

__all__ = ["memories_table"]

_HEADER = ("memory", "similarity", "write", "erase", "forget", "state", "call", "equation", "source")
_CODE = ("call", "equation")


def memories_table() -> str:
    """One row per entry of `MEMORIES`: its choices, the call of its op, equation and source.

    Example:
      >>> memories_table().splitlines()[0]
      '| memory | similarity | write | erase | forget | state | call | equation | source |'
    """
    rows = [_HEADER, ("---",) * len(_HEADER)]
    for name, row in MEMORIES.items():
        cells = ((column, getattr(row, column)) for column in _HEADER[1:])
        rows.append((f"`{name}`", *(f"`{cell}`" if column in _CODE else cell for column, cell in cells)))
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows) + "\n"
