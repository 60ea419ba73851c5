"""ruff and mypy are clean, and the house's own limits hold."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CHECKS = {
    "ruff check": ["ruff", "check", "--no-cache", "."],
    "ruff format": ["ruff", "format", "--no-cache", "--check", "."],
    "mypy": ["mypy", "--no-incremental"],
}


@pytest.mark.parametrize("check", CHECKS)
def test_tool_is_clean(check):
    run = subprocess.run([sys.executable, "-m", *CHECKS[check]], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def faults(source: str, kernel: bool) -> list[str]:
    """What one library file has that the house does not want, one line each."""
    found = []
    lines, longest = (700, 120) if kernel else (400, 70)
    if source.count("\n") > lines:
        found.append(f"{source.count(chr(10))} lines, at most {lines}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.body[0].end_lineno if ast.get_docstring(node) else 0
            length = length or node.end_lineno - node.lineno + 1
            if length > longest:
                found.append(f"{node.lineno}: {node.name} has {length} lines, at most {longest}")
        elif isinstance(node, ast.Assert):
            found.append(f"{node.lineno}: assert; a caller's mistake is a ValueError")
        elif isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) == "Exception"):
            found.append(f"{node.lineno}: catches everything")
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in ("print", "nan_to_num") and not (isinstance(node, ast.Attribute) and name == "print"):
                found.append(f"{node.lineno}: {name}")
    return found


FILES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "memformer").rglob("*.py"))]


@pytest.mark.parametrize("file", FILES)
def test_library_file(file):
    assert faults((ROOT / file).read_text(), kernel="/pallas/" in file) == []


# source, how many faults
SYNTHETIC = {
    "clean": ("def f(x):\n    return x\n", 0),
    "assert": ("assert True\n", 1),
    "print": ("print(1)\n", 1),
    "nan_to_num": ("import jax.numpy as jnp\njnp.nan_to_num(1)\n", 1),
    "bare except": ("try:\n    pass\nexcept:\n    pass\n", 1),
    "except Exception": ("try:\n    pass\nexcept Exception:\n    pass\n", 1),
    "long function": ("def f():\n" + "    x = 1\n" * 71, 1),
    "long file": ("x = 1\n" * 401, 1),
}


@pytest.mark.parametrize("case", SYNTHETIC)
def test_the_check_sees(case):
    source, count = SYNTHETIC[case]
    assert len(faults(source, kernel=False)) == count
