"""Docstrings are documentation that runs: every public function says what it does, shows an example, and is right."""

import ast
import doctest
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memformer as mf

ROOT = pathlib.Path(__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "memformer").rglob("*.py"))
]

# What an example may use without importing it.
GLOBALS = {"jax": jax, "jnp": jnp, "np": np, "mf": mf}


def undocumented(source: str) -> list[str]:
    """Public modules, functions, classes and methods without a docstring, by name."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) or not tree.body else ["the module"]

    def walk(node, prefix):
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            # Private names, dunders (a class says how it is built and called) and overloads need none.
            if child.name.startswith("_"):
                continue
            if not ast.get_docstring(child):
                missing.append(prefix + child.name)
            if isinstance(child, ast.ClassDef):
                walk(child, prefix + child.name + ".")

    walk(tree, "")
    return missing


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_documented(module):
    path = ROOT / pathlib.Path(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert undocumented(source.read_text()) == []


def test_the_check_sees():
    assert undocumented("def f():\n    pass") == ["the module", "f"]
    assert undocumented('"""m"""\nclass A:\n    """a"""\n    def b(self):\n        pass') == ["A.b"]
    assert (
        undocumented('"""m"""\ndef _f():\n    pass\nclass A:\n    """a"""\n    def __call__(self):\n        pass') == []
    )


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    loaded = importlib.import_module(module)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(loaded, extraglobs=GLOBALS, optionflags=flags)
    assert result.failed == 0


# Public functions of the package, and the words that a page of reference must have.
FUNCTIONS = sorted(name for name in mf.__all__ if callable(getattr(mf, name)))


def test_the_package_says_what_is_public():
    ops = {"softmax_attention", "linear_attention", "delta_rule", "delta_product", "deltaformer"}
    assert ops | {"Kernel", "l2norm"} <= set(mf.__all__)
    assert all(hasattr(mf, name) for name in mf.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_have_an_example(name):
    assert ">>>" in (getattr(mf, name).__doc__ or ""), f"memformer.{name} has no example"


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"Kernel", "l2norm"}))
@pytest.mark.parametrize("section", ["Args:", "Returns:", "Raises:", "Example:", "Source"])
def test_ops_have_a_page_of_reference(name, section):
    assert section in getattr(mf, name).__doc__, f"memformer.{name} has no part '{section}'"
