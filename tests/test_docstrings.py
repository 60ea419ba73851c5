"""Docstrings are documentation that runs: every public function says what it does, shows an example, and is right."""

import ast
import doctest
import functools
import importlib
import inspect
import pathlib
import re

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


FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


# Results that are the same for all values of arrays: shapes, keys, settings.
WITHOUT_VALUES = re.compile(r"shape|sorted\(|\.config\.")


def shows_shapes(test: doctest.DocTest) -> bool:
    """Whether each line with a result shows a shape or another fact that needs nothing computed."""
    shown = [example.source for example in test.examples if example.want]
    return bool(shown) and all(WITHOUT_VALUES.search(source) for source in shown)


def in_one_program(function):
    """The function, compiled as a whole: each operation by itself would be a program of its own."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = {place: x for place, x in enumerate(leaves) if isinstance(x, jax.Array)}

        def run(arrays):
            args, kwargs = tree.unflatten([arrays.get(place, x) for place, x in enumerate(leaves)])
            return function(*args, **kwargs)

        try:
            return jax.jit(run)(arrays) if arrays else run({})
        except TypeError:
            # it returns something else than arrays, or needs their values
            return function(*args, **kwargs)

    return call


# Modules whose functions take and return arrays.
OF_ARRAYS = (
    *("core.numerics", "core.segments", "core.triangular", "ops.", "layers.convolution", "layers.positions"),
    *("models.encoder", "models.captioner", "training.losses", "lab.path", "pretrained.distill"),
)


def of_ops(module: str, names: dict) -> dict:
    """The names of an example, with the functions of a module of ops compiled."""
    if not module.startswith(tuple(f"memformer.{place}" for place in OF_ARRAYS)):
        return names
    own = {name: x for name, x in names.items() if inspect.isfunction(x) and x.__module__ == module}
    return names | {name: in_one_program(x) for name, x in own.items() if name in names["__all__"]}


def passes(test: doctest.DocTest, traced: bool) -> bool:
    """Runs an example; traced, its arrays have shapes and dtypes, and no values."""
    found = []

    def run():
        here = doctest.DocTest(test.examples, dict(test.globs), test.name, test.filename, test.lineno, test.docstring)
        silent = {"out": lambda _: None} if traced else {}
        found.append(doctest.DocTestRunner(optionflags=FLAGS).run(here, **silent).failed == 0)

    if traced:
        jax.eval_shape(run)
    else:
        run()
    return found[0]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module, monkeypatch):
    """An example of shapes alone is traced, in a tenth of the time of running it, or else it runs as the others do.

    The smallest preset has the simplest memory, except where presets are shown.
    """
    loaded = importlib.import_module(module)
    if module != "memformer.models.presets":
        presets = importlib.import_module("memformer.models.presets").PRESETS
        small = {"memory": "linear_attention", "feedforward": None}
        monkeypatch.setitem(presets, "tiny", presets["tiny"] | small)
    for test in doctest.DocTestFinder(exclude_empty=True).find(loaded, module, extraglobs=GLOBALS):
        if shows_shapes(test) and passes(test, traced=True):
            continue
        test.globs = of_ops(module, test.globs)
        assert passes(test, traced=False), test.name


@pytest.mark.parametrize("traced", [True, False])
def test_a_wrong_example_fails(traced):
    for shape, right in (("(2, 3)", True), ("(2, 4)", False)):
        text = f">>> jnp.ones((2, 3)).shape\n{shape}\n"
        example = doctest.DocTestParser().get_doctest(text, GLOBALS, "example", None, None)
        assert shows_shapes(example) and passes(example, traced) == right


# Public names of the package, and the parts that their docstrings must have.
NAMES = sorted(name for name in mf.__all__ if callable(getattr(mf, name)))
MATRIX = ["delta_product", "delta_rule", "linear_attention", "log_linear_attention", "mesa"]
OPS = [*MATRIX, "deltaformer", "gru", "lstm", "rnn", "softmax_attention"]
PARTS = ["Args:", "Returns:", "Raises:", "Example:", "Source"]


def test_the_package_exports_its_faces():
    faces = {"Kernel", "l2norm", "KVCache", "DeltaCache", "init_cache"}
    assert faces | set(OPS) <= set(mf.__all__)
    assert all(hasattr(mf, name) for name in mf.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_public_names_have_an_example(name):
    assert ">>>" in (getattr(mf, name).__doc__ or ""), f"memformer.{name} has no example"


@pytest.mark.parametrize("name", [*OPS, "init_cache"])
@pytest.mark.parametrize("section", PARTS)
def test_functions_have_a_page_of_reference(name, section):
    if (name, section) != ("init_cache", "Source"):
        assert section in getattr(mf, name).__doc__, f"memformer.{name} has no part '{section}'"


@pytest.mark.parametrize("name", [*OPS, "init_cache"])
def test_arguments_are_documented(name):
    """Each parameter is named in Args; what all ops share is documented once, in memformer.ops."""
    function = getattr(mf, name)
    page = function.__doc__.split("Args:")[1].split("Returns:")[0]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^ +([a-z_]+, )*{parameter}(, [a-z_]+)*:", page, re.MULTILINE), f"{name}: {parameter}"
    if "memformer.ops`" in page:
        contract = importlib.import_module("memformer.ops").__doc__
        for shared in ("segment_ids", "initial_state", "chunk_size", "precision", "implementation"):
            assert f"`{shared}`" in contract


@pytest.mark.parametrize("name", sorted(set(OPS) - {"gru", "lstm", "rnn"}))
def test_documented_implementations_are_those_of_the_table(name):
    documented = getattr(mf, name).__doc__.split("implementation:")[1].split("\n\n")[0]
    table = importlib.import_module(f"memformer.ops.{name}").IMPLEMENTATIONS
    assert re.findall(r'"(\w+)"', documented) == list(table)
