"""docs/memories.md contains the table of memories that the code generates.

`python tests/layers/test_table.py` regenerates it.
"""

import pathlib

from memformer.layers.table import MEMORIES, memories_table

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "memories.md"


def test_the_page_is_up_to_date():
    assert memories_table() in PAGE.read_text(), "run: python tests/layers/test_table.py"


def test_the_table_has_every_memory():
    lines = memories_table().splitlines()
    assert len(lines) == len(MEMORIES) + 2
    assert {line.count(" | ") for line in lines} == {8}


if __name__ == "__main__":
    text = PAGE.read_text()
    start = text.index("| memory |")
    end = text.index("\n\n", start) + 1
    PAGE.write_text(text[:start] + memories_table() + text[end:])
