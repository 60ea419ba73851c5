"""Imports run one way, and `import memformer` pays for jax alone."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# A room may import itself and the rooms in its row.
MAY_IMPORT = {
    "core": (),
    "pallas": ("core",),
    "ops": ("core", "pallas"),
    "layers": ("core", "pallas", "ops"),
    "data": ("core",),
    "models": ("core", "pallas", "ops", "layers", "data"),
    "tasks": ("core", "pallas", "ops", "layers", "models", "data"),
    "pretrained": ("core", "pallas", "ops", "layers", "models", "data"),
    "training": ("core", "pallas", "ops", "layers", "models", "data", "tasks", "pretrained"),
    "evals": ("core", "pallas", "ops", "layers", "models", "data", "tasks", "pretrained", "training"),
    "lab": ("core", "pallas", "ops", "layers", "models", "data", "tasks", "pretrained", "training", "evals"),
    # memformer/__init__.py
    "memformer": ("core", "pallas", "ops"),
}

# Outside packages that a room may use; rooms not named here may use all that setup.cfg lists.
PURE = {"jax", "jaxtyping", "numpy"}
PURE_ROOMS = ("core", "pallas", "ops", "memformer")

# What `import memformer` must not load.
HEAVY = {
    "absl.app", "flax", "grain", "matplotlib", "ml_collections", "optax", "orbax", "tensorboardX", "tensorflow",
    "tensorstore", "torch", "tqdm",
}  # fmt: skip


def imported(source: str, module: str):
    """Yields (line, dotted name) of each import in a module, wherever it stands; relative ones made absolute."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, node.module] if node.module else base)
            # `from memformer import ops` imports memformer.ops
            for alias in node.names:
                yield node.lineno, f"{name}.{alias.name}"


def room_of(dotted: str) -> str:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "memformer"


def faults(source: str, module: str) -> list[str]:
    """Imports of a module that the layout forbids, one line each."""
    room, found = room_of(module), []
    for line, name in imported(source, module):
        top = name.split(".")[0]
        if top == "memformer":
            target = room_of(name)
            if target != room and target not in MAY_IMPORT[room]:
                found.append(f"{module}:{line}: {room} imports {name}")
        elif room in PURE_ROOMS and top not in PURE and top not in sys.stdlib_module_names:
            found.append(f"{module}:{line}: {room} imports {name}; it may import {', '.join(sorted(PURE))} only")
    return found


# A package keeps its __init__ in the name, so that one dot in an import means the package itself.
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted((ROOT / "memformer").rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert module.split(".")[1] in (*MAY_IMPORT, "__init__"), f"{module}: a room that the layout does not know"
    assert faults(MODULES[module].read_text(), module) == []


# module, its source, what must be found
SYNTHETIC = {
    "down": ("memformer.layers.memory", "from memformer.ops import delta_rule\nimport flax", 0),
    "own room": ("memformer.ops.delta_rule", "from memformer.ops.shapes import f\nfrom . import shapes", 0),
    "back": ("memformer.ops.delta_rule", "from memformer.layers.basic import Norm", 1),
    "back, plain": ("memformer.core.types", "import memformer.ops.delta_rule", 1),
    "back, from the top": ("memformer.core.types", "from memformer import ops", 1),
    "back, relative": ("memformer.core.types", "from ..ops import delta_rule", 1),
    "back, inside a function": ("memformer.tasks.swap", "def f():\n    from memformer.training import loop", 1),
    "the top from inside": ("memformer.layers.memory", "import memformer as mf", 1),
    "the top's names from inside": ("memformer.layers.memory", "from memformer import delta_rule", 1),
    "two": ("memformer.core.types", "import memformer.ops, memformer.lab", 2),
    "flax in ops": ("memformer.ops.delta_rule", "from flax import nnx", 1),
    "standard library in ops": ("memformer.ops.delta_rule", "import functools\nfrom collections.abc import Mapping", 0),
    "the top takes layers": ("memformer.__init__", "from memformer.layers import memory", 1),
    "the top takes ops": ("memformer.__init__", "from memformer.ops.delta_rule import delta_rule", 0),
}


@pytest.mark.parametrize("case", SYNTHETIC)
def test_the_check_sees(case):
    module, source, count = SYNTHETIC[case]
    assert len(faults(source, module)) == count


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_is_light():
    assert loaded_by("import memformer") & HEAVY == set()


def test_the_light_check_sees():
    assert "tqdm" in loaded_by("import tqdm") & HEAVY
