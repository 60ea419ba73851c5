"""The table of memories as Markdown, for the documentation."""

from memformer.layers.memory import MEMORIES

__all__ = ["memories_table"]

_HEADER = ("memory", "similarity", "update", "state", "equation", "source")


def memories_table() -> str:
    """One row per entry of `MEMORIES`: its three choices, equation and source.

    Example:
      >>> memories_table().splitlines()[0]
      '| memory | similarity | update | state | equation | source |'
    """
    rows = [_HEADER, ("---",) * len(_HEADER)]
    for name, row in MEMORIES.items():
        rows.append((f"`{name}`", row.similarity, row.update, row.state, f"`{row.equation}`", row.source))
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows) + "\n"
