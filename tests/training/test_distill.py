"""Runs that distil a teacher: the student's config, weights and losses, exact resume, user errors."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from memformer.models import LanguageModelConfig, MemoryLM
from memformer.pretrained import ARCHITECTURES, Student, save_pretrained
from memformer.training import RunError, build_run, load_run, read_records, read_run_config, train
from tests.training.small import small_config

RAW = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("programs_kept")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def test_a_run_distils_and_resumes_exactly_without_the_folder(tmp_path):
    pytest.importorskip("safetensors", reason="needs safetensors: pip install '.[hf]'")
    config = LanguageModelConfig(**ARCHITECTURES["LlamaForCausalLM"].fields(RAW))
    teacher = MemoryLM(config, vocab_size=64, rngs=nnx.Rngs(5))
    save_pretrained(teacher, tmp_path / "llama", config=RAW)
    changed = {"train__steps": 4, "train__eval_every": 0, "train__final_batches": 1, "optimizer__schedule_steps": 4}
    config = small_config(distill__teacher=str(tmp_path / "llama"), distill__memory="retnet", **changed)
    train(config, str(tmp_path / "whole"))
    config.train.steps = 2
    train(config, str(tmp_path / "parts"))
    shutil.rmtree(tmp_path / "llama")
    config = read_run_config(str(tmp_path / "parts"))
    assert config["model"]["memory"] == "retnet" and config["vocab_size"] == 64
    config["train"]["steps"] = 4
    train(config, str(tmp_path / "parts"))
    runs = [load_run(str(tmp_path / name)) for name in ("whole", "parts")]
    assert [run.step for run in runs] == [4, 4]
    assert all(np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(run.weights) for run in runs), strict=True))
    # the teacher has not changed
    held = {name.removeprefix("teacher."): x for name, x in runs[0].weights[1].items()}
    for path, variable in nnx.to_flat_state(nnx.state(teacher)):
        np.testing.assert_array_equal(held[".".join(map(str, path))], variable.get_value())
    records = read_records(str(tmp_path / "whole" / "metrics.jsonl"))
    assert all(record["auxiliary_loss"] > 0 for record in records if record["kind"] == "train")
    module = runs[0].module()
    assert isinstance(module, Student) and not module.teacher and module.config.memory == "retnet"


def test_a_run_as_the_teacher(tmp_path):
    """Its config is read from the folder; layers may be chosen."""
    teacher = build_run(small_config("softmax_attention", model__key_width=4, model__depth=2)).config
    (tmp_path / "config.json").write_text(json.dumps(teacher))
    run = build_run(small_config(distill__teacher=str(tmp_path), distill__layers=(1,), distill__logits=0.5))
    model = run.config["model"]
    assert (model["memory"], model["key_width"]) == ("softmax_attention,gated_delta_rule", 4)
    assert run.model.params["blocks.1.memory.beta.weights.bias"].shape == (2,)
    assert json.loads(run.config["distill"]["teacher_config"])["memory"] == "softmax_attention"


MISTAKES = {
    "no folder": ({}, "config.distill: folder must contain config.json"),
    "two folders": ({"init_from": "other", "vocab_size": 64}, "config.distill: init_from must be empty"),
    "weight": ({"distill__outputs": -1.0}, "config.distill: outputs must be a finite number of at least 0, got -1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors(tmp_path, mistake):
    changed, message = MISTAKES[mistake]
    with pytest.raises(RunError, match=message):
        build_run(small_config(distill__teacher=str(tmp_path), **changed))
