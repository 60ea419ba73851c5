"""The face of a package exports every public name of its modules."""

import ast
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "memformer"
PACKAGES = ("layers", "models", "data", "tasks", "pretrained", "training", "evals")


def public_names(path: pathlib.Path) -> list[str]:
    """The literal `__all__` of a module."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} has no __all__")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_face_has_every_public_name(package):
    face = importlib.import_module(f"memformer.{package}")
    modules = {p.stem: public_names(p) for p in (ROOT / package).glob("*.py") if p.stem != "__init__"}
    names = [name for public in modules.values() for name in public]
    assert len(names) == len(set(names)), "two modules export one name"
    assert set(public_names(ROOT / package / "__init__.py")) == set(names)
    for module, public in modules.items():
        loaded = importlib.import_module(f"memformer.{package}.{module}")
        assert all(getattr(face, name) is getattr(loaded, name) for name in public)
