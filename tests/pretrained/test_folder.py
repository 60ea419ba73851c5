"""Folders in and out without PyTorch: round trips, shards of a mesh, memory, plans, and what is said of bad folders."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.data import ByteTokenizer
from memformer.layers.sharding import partition_spec
from memformer.models import LanguageModelConfig, MemoryLM
from memformer.pretrained import ARCHITECTURES, load_pretrained, match_architecture, plan_loading, save_pretrained
from tests.modules import random_module

SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
WIDE = {**SMALL, "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024}
NEXT = {
    **SMALL, "architectures": ["Qwen3_5ForCausalLM"], "num_hidden_layers": 4, "head_dim": 8,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 8,
}  # fmt: skip


def random_model(raw, **options):
    row = ARCHITECTURES[raw["architectures"][0]]
    config = LanguageModelConfig(**row.fields(raw), **options)
    return random_module(lambda: MemoryLM(config, vocab_size=raw["vocab_size"], rngs=nnx.Rngs(0)))


def parameters(model):
    return {".".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def same(got, want):
    got, want = parameters(got), parameters(want)
    return got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)


@pytest.fixture(scope="module")
def safetensors():
    return pytest.importorskip("safetensors.numpy", reason="needs safetensors: pip install '.[hf]'")


@pytest.fixture(scope="module")
def saved(safetensors, tmp_path_factory):
    """(model, its folder)."""
    folder = tmp_path_factory.mktemp("llama")
    model = random_model(SMALL)
    save_pretrained(model, folder, config={**SMALL, "bos_token_id": 3}, tokenizer=ByteTokenizer())
    return model, folder


def test_a_round_trip(saved, tmp_path):
    model, folder = saved
    got, tokenizer, raw = load_pretrained(folder)
    assert same(got, model) and got.config.dtype == "float32"
    assert isinstance(tokenizer, ByteTokenizer)
    assert raw["bos_token_id"] == 3 and raw["model_type"] == "llama" and raw["head_dim"] == 4
    # Into the folder that the arrays came from, in files of another size.
    save_pretrained(got, tmp_path, shard_bytes=4000)
    files = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors.index.json" in files and "model.safetensors" not in files
    again = load_pretrained(tmp_path)[0]
    save_pretrained(again, tmp_path)
    assert same(load_pretrained(tmp_path)[0], model)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_scanned_model(safetensors, tmp_path):
    model = random_model(SMALL, scan_layers=True)
    save_pretrained(model, tmp_path)
    got, stacked = parameters(load_pretrained(tmp_path)[0]), parameters(model)
    assert len(got) == 2 * (len(stacked) - 3) + 3
    for i in range(2):
        up = "feedforward.up.kernel"
        assert np.array_equal(got[f"blocks.{i}.{up}"], stacked[f"blocks.0.{up}"][i])


def test_dtypes(saved):
    model, folder = saved
    got = load_pretrained(folder, dtype="bfloat16")[0]
    assert {x.dtype.name for x in parameters(got).values()} == {"bfloat16"}
    got = load_pretrained(folder, dtype="bfloat16", param_dtype="float32")[0]
    assert same(got, model) and got.config.dtype == "bfloat16"


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
def test_shards_of_a_mesh(saved, kind):
    model, folder = saved
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    got = load_pretrained(folder, mesh=mesh)[0]
    assert same(got, model)
    for path, variable in nnx.to_flat_state(nnx.state(got, nnx.Param)):
        want = partition_spec(variable.get_metadata().get("out_sharding"), variable.shape, mesh)
        assert variable.get_value().sharding.spec == want, path
    up = got.blocks[0].feedforward.up.kernel.get_value()
    assert {shard.data.shape for shard in up.addressable_shards} == {(8, 12)}
    plan = plan_loading(folder, mesh=mesh, devices_per_host=1)
    held = sum(x.addressable_shards[0].data.nbytes for x in parameters(got).values())
    assert plan.held == held and plan.read == held
    assert plan_loading(folder, mesh=mesh).read == plan.checkpoint == sum(x.nbytes for x in parameters(got).values())


def test_there_are_never_two_copies(safetensors, tmp_path):
    model = random_model(WIDE)
    save_pretrained(model, tmp_path, shard_bytes=4_000_000)
    plan = plan_loading(tmp_path)
    assert plan.checkpoint > 20e6 and plan.largest == 8192 * 256 * 4
    tracemalloc.start()
    got = load_pretrained(tmp_path)[0]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert same(got, model)
    assert peak < plan.checkpoint + plan.largest


QWEN_27B = {
    **NEXT, "vocab_size": 248320, "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64,
    "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256, "linear_num_value_heads": 48,
    "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "dtype": "bfloat16",
}  # fmt: skip


def test_a_plan_of_27_billion_parameters_needs_no_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_27B))
    mesh = jax.sharding.AbstractMesh((16, 4), ("fsdp", "tensor"))
    plan = plan_loading(tmp_path, mesh=mesh, devices_per_host=8)
    assert 26e9 < plan.parameters < 28e9 and plan.checkpoint == 2 * plan.parameters
    assert plan.parameters * 2 / 64 < plan.held < 1.1 * plan.parameters * 2 / 64
    assert plan.held * 8 * 0.9 < plan.read <= plan.held * 8
    assert plan.largest == 248320 * 5120 * 2
    # Parameters in float32 take twice the space, and as much reading, at any depth.
    (tmp_path / "config.json").write_text(json.dumps(QWEN_27B | {"num_hidden_layers": 4}))
    plan, wide = (
        plan_loading(tmp_path, param_dtype=dtype, mesh=mesh, devices_per_host=8) for dtype in ("bfloat16", "float32")
    )
    assert wide.held == 2 * plan.held and wide.read == plan.read


def rewrite(saved, tmp_path, safetensors, change, config=None):
    """A folder with changed tensors and fields."""
    tensors = dict(safetensors.load_file(saved[1] / "model.safetensors"))
    tensors = change(tensors) or tensors
    safetensors.save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / "model.safetensors"
    )
    raw = json.loads((saved[1] / "config.json").read_text()) | (config or {})
    (tmp_path / "config.json").write_text(json.dumps(raw))


UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
# What is changed of the tensors, and the error message.
FAULTS = {
    "missing": (lambda x: x.pop(UP) is None, f"1 missing \\({UP}\\)"),
    "unexpected": (lambda x: x.update(extra=x[UP]), r"a llama as config.json describes it, got 1 unexpected \(extra\)"),
    "both": (lambda x: x.update(extra=x.pop(DOWN)), f"1 missing \\({DOWN}\\) and 1 unexpected \\(extra\\)"),
    "misshapen": (lambda x: x.update({UP: x[UP].T}), rf"shapes of .*, got {UP} \(16, 24\) instead of \(24, 16\)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_tensors_are_listed_by_name(saved, safetensors, tmp_path, fault):
    change, message = FAULTS[fault]
    rewrite(saved, tmp_path, safetensors, lambda x: change(x) and None)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_a_checkpoint_of_the_bare_model(saved, safetensors, tmp_path):
    rewrite(saved, tmp_path, safetensors, lambda x: {name.removeprefix("model."): value for name, value in x.items()})
    assert same(load_pretrained(tmp_path)[0], saved[0])


def test_the_language_model_of_one_that_also_sees(safetensors, tmp_path):
    model = random_model(NEXT)
    save_pretrained(model, tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    prefix = "model.language_model."
    tensors = {name.replace("model.", prefix) if name != "lm_head.weight" else name: x for name, x in tensors.items()}
    tensors |= {"model.visual.patch": np.zeros(3, np.float32), "mtp.fc.weight": np.zeros(3, np.float32)}
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    raw = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": NEXT}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    got, _, raw = load_pretrained(tmp_path)
    assert same(got, model)
    # It is saved as what it is: a language model.
    save_pretrained(got, tmp_path, config=raw)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3_5ForCausalLM"]
    assert same(load_pretrained(tmp_path)[0], model)


# Fields of config.json, and the error message.
CONFIGS = {
    "architecture": (
        {"architectures": ["MambaForCausalLM"]},
        "an architecture of LlamaForCausalLM, .* got 'MambaForCa",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act must be one of 'silu', got 'gelu'"),
    "rope": ({"rope_scaling": {"type": "dynamic"}}, "rope_type must be one of 'default', 'llama3', got 'dynamic'"),
    "window": ({"layer_types": ["sliding_attention"]}, "layer_types must be 'full_attention' in every layer, got 'sli"),
    "bias": ({"mlp_bias": True}, "mlp_bias must be one of False, got True"),
    "field": ({"hidden_size": None}, "config.json must have the field 'hidden_size'"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_configs_that_cannot_be_expressed_are_refused(tmp_path, fault):
    fields, message = CONFIGS[fault]
    raw = {key: value for key, value in (SMALL | fields).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_folders_without_weights(saved, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(ValueError, match="must contain model.safetensors or model.safetensors.index.json"):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="only pytorch_model.bin, which must be converted to safetensors first"):
        load_pretrained(tmp_path)
    save_pretrained(saved[0], tmp_path, shard_bytes=4000)
    lost = sorted(tmp_path.glob("model-*"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"names files that .* lacks: {lost.name}"):
        load_pretrained(tmp_path)


def test_models_that_no_architecture_describes():
    config = LanguageModelConfig(memory="deltaformer", width=8, heads=2)
    with pytest.raises(ValueError, match="one that an architecture describes; all differ: LlamaForCausalLM: "):
        match_architecture(random_module(lambda: MemoryLM(config, vocab_size=5, rngs=nnx.Rngs(0))))
    model = random_model(SMALL | {"hidden_size": 32})
    assert match_architecture(model)[0] == "LlamaForCausalLM"


def test_logits_do_not_depend_on_the_mesh(saved):
    model, folder = saved
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), devices=jax.devices()[:4])
    ids = jnp.array([[1, 2, 3], [4, 5, 6]])
    got = nnx.jit(lambda model, ids: model(ids).logits)(load_pretrained(folder, mesh=mesh)[0], ids)
    assert np.allclose(got, model(ids).logits, atol=1e-5)
