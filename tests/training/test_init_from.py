"""Runs that start from a Hugging Face folder."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from memformer.models import LanguageModelConfig, MemoryLM
from memformer.pretrained import ARCHITECTURES, read_parameters, save_pretrained
from memformer.training import RunError, build_run, init_state, load_run, mesh_scope, read_run_config, start_from, train
from tests.training.small import small_config

RAW = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500.0,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("programs_kept")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors: pip install '.[hf]'")
    config = LanguageModelConfig(**ARCHITECTURES["LlamaForCausalLM"].fields(RAW))
    save_pretrained(MemoryLM(config, vocab_size=64, rngs=nnx.Rngs(5)), tmp_path / "llama", config=RAW)
    return tmp_path / "llama"


def test_config_and_weights_of_the_folder(folder):
    config = small_config(init_from=str(folder), optimizer__ema=0.9, model__remat="full")
    run = build_run(config)
    model = run.config["model"]
    assert (run.config["vocab_size"], model["memory"], model["width"], model["remat"]) == (
        64,
        "softmax_attention",
        16,
        "full",
    )
    assert model["memory_options"]["softmax_attention"]["rope_theta"] == 500.0
    with mesh_scope(run.mesh):
        state = init_state(run.model, run.tx, run.mesh, seed=0, ema=0.9)
        state = start_from(str(folder), state)
    want = dict(read_parameters(folder))
    assert state["params"].keys() == want.keys()
    assert all(np.array_equal(x, want[name]) for name, x in state["params"].items())
    assert all(np.array_equal(x, want[name]) for name, x in state["ema"].items())


def test_a_run_continues_exactly_without_the_folder(folder, tmp_path):
    config = small_config(init_from=str(folder), train__final_batches=1, optimizer__schedule_steps=8)
    train(config, str(tmp_path / "whole"))
    # As if the run had been killed after step 4.
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "8")
    shutil.rmtree(folder)
    # What the run recorded is enough, as on another machine.
    train(read_run_config(str(tmp_path / "parts")), str(tmp_path / "parts"))
    runs = [load_run(str(tmp_path / name)) for name in ("whole", "parts")]
    assert [run.step for run in runs] == [8, 8]
    assert all(np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(run.weights) for run in runs), strict=True))
    # And back: the trained model as a Hugging Face folder.
    run = runs[0]
    save_pretrained(run.run.model.module(*run.weights, jax.random.key(0)), tmp_path / "back")
    back = dict(read_parameters(tmp_path / "back"))
    assert all(np.array_equal(back[name], x) for name, x in run.weights[0].items())


MISTAKES = {
    "no folder": ({"init_from": "no/such"}, {}, "config.init_from: folder must contain config.json"),
    "another model": ({}, {"architectures": ["MambaForCausalLM"]}, "config.init_from: .* got 'MambaForCausalLM'"),
    "few ids": ({}, {"vocab_size": 5}, "config: vocab_size must be 0 or at least the task's .* got 5"),
    "scanned": ({"model__scan_layers": True}, {}, "config.init_from: model.scan_layers must be False"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors_are_named(tmp_path, mistake):
    changed, fields, message = MISTAKES[mistake]
    (tmp_path / "config.json").write_text(json.dumps(RAW | fields))
    with pytest.raises(RunError, match=message):
        build_run(small_config(**{"init_from": str(tmp_path), **changed}))
