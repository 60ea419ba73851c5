"""Models of flash-linear-attention: logits by their equations, the way back, and the package's own recurrences."""

import importlib.util
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.models import LanguageModelConfig
from memformer.pretrained import ARCHITECTURES, load_pretrained, save_pretrained
from memformer.pretrained.architectures.fields import explicit
from tests.numeric import assert_close
from tests.pretrained.fla_reference import (
    MODELS,
    architecture,
    logits,
    random_tensors,
    recurrence,
    retention_decay,
)

IDS = np.random.default_rng(1).integers(0, 61, size=(2, 19))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_the_way_back(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors: pip install '.[hf]'")
    config = {**MODELS[name], "architectures": [architecture(name)], "eos_token_id": 2}
    tensors = random_tensors(name, config)
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _, raw = load_pretrained(tmp_path)
    want = logits(name, config, tensors, IDS)
    assert np.std(want) > 0.5, "logits hardly depend on the input"
    assert_close(nnx.jit(lambda model, ids: model(ids).logits)(model, jnp.asarray(IDS)), want, 1e-5)
    # Bit for bit, with a config.json that is written from the model alone.
    save_pretrained(model, tmp_path / "back", config={"architectures": raw["architectures"]})
    back = safetensors.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(np.array_equal(back[key], x) for key, x in tensors.items())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    fields = ARCHITECTURES[architecture(name)].fields
    assert written["architectures"] == [architecture(name)] and fields(written) == fields(config)


VARIANTS = [
    ("DeltaNet", {"use_gate": True, "hidden_ratio": 4, "intermediate_size": None}, "g_proj.weight"),
    ("GatedDeltaNet", {"use_gate": False, "num_v_heads": None}, None),
    ("GLA", {"use_short_conv": True, "conv_size": 3}, "v_conv1d.weight"),
]


@pytest.mark.parametrize(("name", "changed", "key"), VARIANTS, ids=lambda x: x if isinstance(x, str) else None)
def test_configs_of_variants_come_back(name, changed, key):
    row = ARCHITECTURES[architecture(name)]
    fields = row.fields({**MODELS[name], **changed})
    config = LanguageModelConfig(**fields)
    assert explicit(LanguageModelConfig(**row.fields(row.config(config, 61)))) == explicit(config)
    keys = {key.rpartition("attn.")[2] for rule in row.rules(config) for key in rule.keys}
    assert key in keys if key else "g_proj.weight" not in keys


def naive(path, function):
    """A function of a file of the package, whose other modules need Triton."""
    pytest.importorskip("torch", reason="needs PyTorch: pip install '.[peers]'")
    pytest.importorskip("einops", reason="needs einops: pip install '.[peers]'")
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the sources of flash-linear-attention: pip install --no-deps fla-core")
    file = pathlib.Path(package.submodule_search_locations[0], "ops", path, "naive.py")
    spec = importlib.util.spec_from_file_location(f"naive_{path}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["delta_rule", "gated_delta_rule", "gla", "retention", "kda"])
def test_recurrences_are_those_of_the_package(kind):
    names = {
        "delta_rule": "delta_rule_recurrence", "gated_delta_rule": "naive_recurrent_gated_delta_rule",
        "gla": "naive_recurrent_gla", "retention": "naive_retention", "kda": "naive_recurrent_kda",
    }  # fmt: skip
    function = naive(kind, names[kind])
    import torch

    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(2, 11, heads, width)) for heads, width in ((3, 4), (3, 4), (3, 5)))
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    beta, decay = draw.uniform(size=(2, 11, 3)), -draw.uniform(size=(2, 11, 3, 4))
    if kind in ("delta_rule", "retention"):
        # heads before time
        decay = None if kind == "delta_rule" else retention_decay(3, q)
        beta = beta if kind == "delta_rule" else None
        swapped = [torch.tensor(np.swapaxes(x, 1, 2)) for x in (q, k, v, *(() if beta is None else (beta,)))]
        got = function(*swapped)
        got = np.swapaxes((got[0] if kind == "delta_rule" else got).numpy(), 1, 2)
    else:
        decay = decay[..., 0] if kind == "gated_delta_rule" else decay
        beta = None if kind == "gla" else beta
        tensors = {"q": q, "k": k, "v": v, "beta": beta, "gk" if kind == "gla" else "g": decay}
        got = function(**{key: torch.tensor(x) for key, x in tensors.items() if x is not None})[0].numpy()
    assert_close(got, recurrence(q, k, v, beta, decay), 1e-6)


REFUSED = {
    "hybrid": ("GLA", {"attn": {"layers": [1]}}, "config.json's attn must be null, got {'layers': \\[1\\]}"),
    "grouped": ("RetNet", {"num_kv_heads": 1}, "num_kv_heads must be null or num_heads, got 1"),
    "bounded": ("KDA", {"lower_bound": -5.0}, "lower_bound must be null, got -5.0"),
    "norm": ("DeltaNet", {"qk_norm": "sum"}, "qk_norm must be one of 'l2', got 'sum'"),
    "heads": ("GLA", {"expand_k": 0.9}, "expand_k x hidden_size must be a multiple of num_heads = 4, got 14"),
    "gate": ("GatedDeltaNet", {"output_gate_activation": "relu"}, "must be one of 'swish', .* got 'relu'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_configs_that_cannot_be_expressed_are_refused(fault):
    name, changed, message = REFUSED[fault]
    config = {**MODELS[name], **({"num_heads": 4} if fault == "heads" else {}), **changed}
    with pytest.raises(ValueError, match=message):
        ARCHITECTURES[architecture(name)].fields(config)
