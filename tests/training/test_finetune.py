"""Fine-tuning of a pretrained folder: the commands of docs/pretrained.md, frozen parameters, low-rank changes."""

import pathlib
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from memformer.data import ByteTokenizer
from memformer.data.__main__ import main
from memformer.layers import is_lora
from memformer.models import LanguageModelConfig, MemoryLM
from memformer.pretrained import ARCHITECTURES, load_pretrained, read_parameters, save_pretrained
from memformer.training import (
    RunError,
    abstract_state,
    build_run,
    dry_run,
    evaluate_checkpoint,
    load_run,
    mesh_scope,
    read_config,
    read_records,
    set_values,
    step_flops,
    train,
)
from tests.numeric import assert_close
from tests.training.runs import assert_same_run

ROOT = pathlib.Path(__file__).parents[2]
RAW = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
SMALL = [
    "task.length=32", "optimizer.warmup_steps=2", "optimizer.learning_rate=1e-2", "train.batch_size=8",
    "train.steps=24", "train.accumulate=1", "train.log_every=2", "train.eval_every=0", "train.checkpoint_every=12",
    "train.eval_batches=1", "train.final_batches=1", "train.progress=False", "train.tensorboard=False", "mesh.data=1",
]  # fmt: skip


def options(words):
    return dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))


pytestmark = pytest.mark.usefixtures("programs_kept", "no_curves")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The commands of the page by the name of the run, with a small model and text in place of its files."""
    pytest.importorskip("safetensors", reason="needs safetensors: pip install '.[hf]'")
    folder = tmp_path_factory.mktemp("finetune")
    config = LanguageModelConfig(**ARCHITECTURES["LlamaForCausalLM"].fields(RAW))
    model = MemoryLM(config, vocab_size=264, rngs=nnx.Rngs(5))
    save_pretrained(model, folder / "llama", config=RAW, tokenizer=ByteTokenizer())
    (folder / "books").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(["sea", "ship", "whale", "captain", "storm", "harbour"], 60)
        (folder / "books" / f"{i}.txt").write_text(" ".join(words) + f" {i}\n")
    page = (ROOT / "docs" / "pretrained.md").read_text()
    (block,) = re.findall(r"^```bash\n(python -m memformer.data tokenize .*?)^```$", page, re.MULTILINE | re.DOTALL)
    for name, path in {"books/": f"{folder}/books", "runs/": f"{folder}/", "path/to/folder": f"{folder}/llama"}.items():
        block = block.replace(name, path)
    found = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line]
    assert main([*found[0][3:], "--processes=1"]) == 0
    assert all(words[:2] == ["python", "train.py"] for words in found[1:])
    return folder, {pathlib.Path(options(words)["workdir"]).name: options(words) for words in found[1:]}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def config_of(commands, name, *changed):
    chosen = commands[1][name]
    config = read_config(str(ROOT / chosen["config"]))
    given = [f"{key.removeprefix('config.')}={value}" for key, value in chosen.items() if key.startswith("config.")]
    set_values(config, [*given, *SMALL, *changed])
    return config


def losses(folder):
    return [record["loss"] for record in read_records(f"{folder}/metrics.jsonl") if record["kind"] == "train"]


def test_the_commands_of_the_page(commands):
    assert set(commands[1]) == {"full", "top", "lora"}


def test_full_fine_tuning(commands, tmp_path):
    train(config_of(commands, "full"), str(tmp_path))
    found = losses(tmp_path)
    assert found[-1] < found[0] - 1


def test_frozen_parameters_have_no_optimizer_state(commands):
    run = build_run(config_of(commands, "top"))
    names, frozen = run.model.params.keys(), run.model.frozen
    assert {name.split(".")[0] for name in frozen} == {"embedding", "blocks"} and 0 < len(frozen) < len(names)
    with mesh_scope(run.mesh):
        state = abstract_state(run.model, run.tx, run.mesh, run.config["optimizer"]["ema"])
    held = {getattr(path[-1], "key", None) for path, _ in jax.tree_util.tree_leaves_with_path(state["opt_state"])}
    assert names & held == state["ema"].keys() == names - frozen


def test_low_rank_changes(commands, tmp_path):
    """Loss falls; a resumed run ends with the same bits; evaluation and export see the same function."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config_of(commands, "lora"), str(whole))
    found = losses(whole)
    assert found[-1] < found[0] - 0.3
    # As if the run had been killed after step 12.
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "24")
    train(config_of(commands, "lora"), str(parts))
    assert_same_run(parts, whole)

    run, before = load_run(str(whole)), dict(read_parameters(commands[0] / "llama"))
    trained = {name for name in run.weights[0] if is_lora(name)}
    assert trained and all(np.array_equal(run.weights[0][name], x) for name, x in before.items())
    assert run.model.frozen == before.keys() and run.weights[0].keys() == before.keys() | trained
    assert evaluate_checkpoint(str(whole), batches=1)["lengths"]["32"]["loss"] < found[0]
    model = run.module()
    save_pretrained(model, tmp_path / "merged", config=RAW)
    merged = load_pretrained(tmp_path / "merged")[0]
    ids = np.arange(20, dtype=np.int32)[None] + 97
    call = nnx.jit(lambda model, ids: model(ids).logits)
    want = call(model, ids)
    assert_close(call(merged, ids), want, 1e-6)


def test_a_dry_run_plans_no_memory_for_frozen_parameters(commands):
    changed = ("train.batch_size=1", "task.length=8")
    plan = dry_run(config_of(commands, "lora", *changed))
    full = build_run(config_of(commands, "full", *changed))
    # AdamW's moments and the moving average of all weights would take three times their bytes.
    assert plan.bytes["optimizer"] < plan.bytes["weights"] and plan.flops < step_flops(full)
    assert plan.parameters > full.model.size()


MISTAKES = {
    "unmatched": ("optimizer.freeze=embeding", "config: optimizer.freeze has the pattern 'embeding', .*: embedding"),
    "everything": ("optimizer.freeze=.", "config: optimizer.freeze must leave parameters to train, got '.'"),
    "target": ("lora.targets=valu[ex], qeury", "config.lora: targets has the pattern 'qeury', .*projections.query"),
    "rank": ("lora.rank=-1", "config.lora.rank must be an integer of at least 0, got -1"),
    "alpha": ("lora.alpha=0.0", "config.lora.alpha must be above 0 and finite, got 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors(commands, mistake):
    changed, message = MISTAKES[mistake]
    with pytest.raises(RunError, match=message):
        build_run(config_of(commands, "full" if "freeze" in changed else "lora", changed))
