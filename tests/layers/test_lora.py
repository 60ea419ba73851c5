"""Low-rank changes of linear maps: the function at first, merged weights, metadata, and user errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memformer.layers import add_lora, is_lora, merge_lora
from memformer.layers.sharding import partition_spec
from memformer.models import LanguageModelConfig, MemoryLM
from tests.modules import random_module
from tests.numeric import assert_close

IDS = jnp.array([[1, 2, 3, 4, 5]])


def model(**options):
    config = LanguageModelConfig(**{"memory": "softmax_attention", "width": 16, "depth": 2, "heads": 2, **options})
    return random_module(lambda: MemoryLM(config, vocab_size=7, rngs=nnx.Rngs(0)))


def parameters(module):
    return {".".join(map(str, path)): x for path, x in nnx.to_flat_state(nnx.state(module, nnx.Param))}


# one function, so that modules of equal structure share a program
CALL = nnx.jit(lambda module, ids: module(ids).logits)


def logits(module):
    return CALL(module, IDS)


@pytest.mark.parametrize("scan", [False, True], ids=["layers", "scanned"])
def test_a_merged_model_computes_the_same(scan):
    module = model(scan_layers=scan, depth=2 if scan else 1)
    before = {name: np.asarray(x.get_value()) for name, x in parameters(module).items()}
    first = logits(module)
    changed = add_lora(module, rank=3, alpha=6.0, targets="query, feedforward, head", rngs=nnx.Rngs(1))
    assert len(changed) == 5 and "head" in changed
    np.testing.assert_array_equal(logits(module), first)
    rng = np.random.default_rng(0)
    for name, x in parameters(module).items():
        if name.endswith("lora_b"):
            x.set_value(rng.standard_normal(x.get_value().shape).astype("float32"))
    want = logits(module)
    assert np.abs(np.asarray(want) - np.asarray(first)).max() > 0.1
    merged = merge_lora(module)
    assert_close(logits(merged), want, 1e-6)
    assert parameters(merged).keys() == before.keys()
    # The changed model keeps its own weights.
    for name, x in before.items():
        np.testing.assert_array_equal(parameters(module)[name].get_value(), x)
    name = changed[-1]
    a, b = (np.asarray(parameters(module)[f"{name}.{part}"].get_value(), np.float64) for part in ("lora_a", "lora_b"))
    np.testing.assert_allclose(
        parameters(merged)[f"{name}.kernel"].get_value(), before[f"{name}.kernel"] + 2 * a @ b, rtol=1e-5, atol=1e-6
    )


def test_dtypes_and_axes():
    module = model(dtype="bfloat16", param_dtype="bfloat16", scan_layers=True)
    add_lora(module, rank=3, alpha=6.0, targets="value", rngs=nnx.Rngs(1))
    found = {name: x for name, x in parameters(module).items() if is_lora(name)}
    mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
    specs = {
        name.rpartition(".")[2]: tuple(partition_spec(x.get_metadata()["out_sharding"], x.shape, mesh))
        for name, x in found.items()
    }
    assert specs == {"lora_a": (None, "fsdp", None), "lora_b": (None, None, "tensor")}
    assert {x.get_value().dtype.name for x in found.values()} == {"float32"}
    assert nnx.eval_shape(lambda: module(IDS).logits).dtype == jnp.float32
    merged = parameters(merge_lora(module))
    assert {x.get_value().dtype.name for x in merged.values()} == {"bfloat16"}


MISTAKES = {
    "an unknown target": ({"targets": "querry"}, "targets has the pattern 'querry', .* near ones: blocks.0.memory"),
    "no expression": ({"targets": "query("}, "targets must be regular expressions separated by commas, got 'query\\('"),
    "rank": ({"rank": 0}, "rank must be a positive integer, got 0"),
    "alpha": ({"alpha": 0.0}, "alpha must be a finite number above 0, got 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_user_errors(mistake):
    changed, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        add_lora(model(), **{"rank": 2, "alpha": 1.0, "targets": "query", "rngs": nnx.Rngs(0), **changed})
