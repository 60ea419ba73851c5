"""The fast tier names tests that exist, and touches every room of the library."""

import ast
import pathlib

import pytest

from tests.tiers import FAST, FAST_ROWS, LONGEST, SUITES, is_fast

TESTS = pathlib.Path(__file__).parent
ROOMS = sorted(path.name for path in (TESTS.parent / "memformer").iterdir() if (path / "__init__.py").exists())


def functions(place: str) -> list[tuple[str, str]]:
    """The file and name of each test function of a file or folder."""
    path = TESTS / place
    files = sorted(path.glob("test_*.py")) if path.is_dir() else [path]
    return [
        (str(file.relative_to(TESTS)), node.name)
        for file in files
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_fast_tests(room):
    assert any(is_fast(*function) for function in functions(room))


@pytest.mark.parametrize("place", FAST)
def test_every_row_names_tests(place):
    assert any(is_fast(*function) for function in functions(place))


def test_rows_of_the_suites():
    assert set(SUITES) <= set(FAST)
    assert is_fast("ops/test_ops.py", "test_odd_lengths", "softmax_attention") and "softmax_attention" in FAST_ROWS
    assert not is_fast("ops/test_ops.py", "test_odd_lengths", "delta_product")
    assert not is_fast("ops/test_ops.py", "test_vmap", "softmax_attention")
    assert not is_fast("training/test_crash.py", "test_killed_then_terminated_then_damaged")


@pytest.mark.parametrize("place", LONGEST)
def test_the_longest_files_are_there(place):
    assert (TESTS / place).is_file()
