"""docs/tour.ipynb runs, in the order of its cells, with public names only, and shows what its text says."""

import ast
import importlib
import json
import pathlib

import jax
import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
NOTEBOOK = json.loads((pathlib.Path(__file__).parents[1] / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
OTHERS = {"jax", "jax.numpy", "numpy", "matplotlib.pyplot", "flax"}


def private_names(source: str) -> list[str]:
    """Names that a cell uses and memformer does not export, and its imports from elsewhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name not in OTHERS | {"memformer"}]
        elif isinstance(node, ast.ImportFrom) and node.module not in OTHERS:
            public = importlib.import_module(node.module).__all__ if node.module.startswith("memformer") else ()
            found += [f"{node.module}.{a.name}" for a in node.names if a.name not in public]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mf":
            found += [] if node.attr in importlib.import_module("memformer").__all__ else [f"mf.{node.attr}"]
    return found


def test_ten_cells_with_text_before_each_and_no_outputs():
    kinds = [cell["cell_type"] for cell in NOTEBOOK["cells"]]
    assert kinds == ["markdown", "code"] * 10
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in NOTEBOOK["cells"])


@pytest.mark.parametrize("number", range(10))
def test_public_names_only(number):
    assert private_names(CELLS[number]) == []


def test_the_check_sees():
    assert private_names("import memformer as mf\nmf.ops") == ["mf.ops"]
    assert private_names("from memformer.ops.delta_rule import _recurrent\nimport os") == [
        "memformer.ops.delta_rule._recurrent",
        "os",
    ]


def test_it_runs_and_shows_what_it_says():
    import matplotlib.pyplot as plt

    names: dict = {}
    # as in a notebook of anyone's
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for number, source in enumerate(CELLS, start=1):
            exec(compile(source, f"tour.ipynb, cell {number}", "exec"), names)
            assert plt.gca().has_data() and plt.gca().get_xlabel() and plt.gca().get_ylabel(), f"cell {number}"
            plt.close("all")
    assert names["falls"]["rnn"][64] < names["falls"]["lstm"][64] < 1e-2 * names["falls"]["lstm"][0]
    weights = np.asarray(names["weights"])[0, :, 0]
    assert (weights.argmax(axis=1) == np.arange(16) // 2).all()
    np.testing.assert_allclose(names["linear"][1:], np.array(names["counts"][1:]) / 64, rtol=0.2)
    assert names["sharp"][8.0][-1] < 0.05 * names["linear"][-1]
    assert names["added"][0, -1, 0, 0] == 6 and names["replaced"][0, -1, 0, 0] == 3
    assert names["kept"][0.0][64] > names["kept"][-0.02][64] > names["kept"][-0.1][64]
    assert names["followed"]["delta rule"][-1] > 0.9 > 0.7 > names["followed"]["softmax attention"][-1]
    assert names["drift"]["round"].max() == 0 < 0.1 < names["drift"]["linear"].max()
    assert names["gap"].max() < 1e-5 > names["packed_gap"].max()
    assert names["floats"]["rnn"][0] == names["floats"]["rnn"][-1] < names["floats"]["deltaformer"][-1]
