"""Exported models: run by a process without memformer, the tokens of `generate`; shapes of states; user errors."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from memformer.models import LanguageModelConfig, MemoryLM, export_model, generate
from tests.modules import random_module

# Batches of two sizes and two lengths: within a chunk of the matrix memories, and beyond one.
BATCHES = [[[5, 3, 8]], [[1, 2, 3], list(range(18))]]
NEW = (1, 4)
MODELS = {
    # a matrix memory, and DeltaFormer with decays, whose read is softmax attention
    "hybrid": ("gated_delta_rule", "gated_deltaformer"),
    # no array with a capacity
    "fixed": ("linear_attention",),
}
PLATFORMS = {"hybrid": ["cpu"], "fixed": ["cpu", "cuda", "tpu"]}
# memformer and flax may be installed where the tests run, so their import is made to fail.
SERVE = """
import json, sys
sys.modules.update(memformer=None, flax=None)
batches, counts = json.loads(sys.argv[1])
from serve import ServedModel
model = ServedModel(".")
found = [model.generate(rows, count).tolist() for rows, count in zip(batches, counts)]
try:
    import memformer
except ImportError:
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def models():
    def build(memory):
        config = LanguageModelConfig(memory=memory, width=8, depth=len(memory), heads=2, feedforward=None)
        return random_module(lambda: MemoryLM(config, vocab_size=19, rngs=nnx.Rngs(3)))

    return {name: build(memory) for name, memory in MODELS.items()}


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    pytest.importorskip("flatbuffers", reason="needs flatbuffers: pip install '.[export]'")
    folder = tmp_path_factory.mktemp("exported")
    for name, model in models.items():
        export_model(model, folder / name, platforms=PLATFORMS[name])
    return folder


def test_a_process_without_memformer_generates_the_same(models, folder):
    command = [sys.executable, "-c", SERVE, json.dumps([BATCHES, NEW])]
    done = subprocess.run(command, cwd=folder / "hybrid", capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr
    # each row is what it is alone
    expected = generate(models["hybrid"], [row for rows in BATCHES for row in rows], max_new_tokens=NEW[1])
    first, second = json.loads(done.stdout)
    np.testing.assert_array_equal(first, expected[:1, : NEW[0]])
    np.testing.assert_array_equal(second, expected[1:])


@pytest.mark.parametrize("name", MODELS)
def test_the_manifest_has_the_shapes_of_weights_and_state(models, folder, name):
    manifest = json.loads((folder / name / "manifest.json").read_text())
    sizes = {"b": 3, "c": 7}
    state = jax.tree.leaves(models[name].init_state(3, 7))
    assert len(state) == len(manifest["state"])
    for x, written in zip(state, manifest["state"].values(), strict=True):
        assert x.shape == tuple(sizes.get(n, n) for n in written["shape"]) and x.dtype.name == written["dtype"]
        # what `ServedModel.start` makes
        assert not np.any(x)
    with np.load(folder / name / "weights.npz") as weights:
        shapes = {key: list(x.shape) for key, x in weights.items()}
    assert shapes == {key: x["shape"] for key, x in manifest["weights"].items()}
    assert manifest["platforms"] == PLATFORMS[name]
    assert any("c" in x["shape"] for x in manifest["state"].values()) == (name == "hybrid")


def test_user_errors(models, tmp_path):
    model = models["hybrid"]
    with pytest.raises(ValueError, match="platforms must be one of 'cpu', 'cuda', 'rocm', 'tpu', got 'gpu'"):
        export_model(model, tmp_path, platforms=("cpu", "gpu"))
    with pytest.raises(ValueError, match="platforms must be a sequence of names, got 'cpu'"):
        export_model(model, tmp_path, platforms="cpu")
    with pytest.raises(ValueError, match="model must be a MemoryLM, got 'int'"):
        export_model(3, tmp_path)
    assert not list(tmp_path.iterdir())
