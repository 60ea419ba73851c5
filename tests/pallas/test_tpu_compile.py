"""The TPU kernels compiled by the real TPU compiler of the libtpu wheel; no TPU is needed."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import memformer as mf
from benchmarks.cases import Case
from benchmarks.tpu import static, train_step
from benchmarks.tpu.compile import kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed here (extra tpu-compiler): no kernel is compiled",
)

# Together: odd sizes, shared heads, segments, windows, decay, both dtypes, every write kernel, and every chip.
SMALL = {
    "delta odd": ("v5e:2x2", static.CASES["delta odd"]),
    "delta float32": ("v5p:2x2x1", Case("delta_rule", 1, 100, 1, 1, 64, 96, "float32", decay="head")),
    "delta shared heads": ("v6e:2x2", Case("delta_rule", 1, 256, 2, 1, 128, 128, segments=2)),
    "delta product": ("v5p:2x2x1", Case("delta_product", 1, 100, 1, 1, 64, 64, decay="head", steps=2)),
    "delta channel": ("v6e:2x2", Case("delta_rule", 1, 100, 2, 1, 64, 96, decay="channel", segments=2)),
    "linear channel": ("v5e:2x2", Case("linear_attention", 1, 256, 1, 1, 128, 128, "float32", decay="channel")),
    "delta decode": ("tpu7x:2x2x1", Case("delta_rule", 4, 1, 4, 2, 128, 128, decay="channel")),
    "product decode": (
        "v5e:2x2",
        Case("delta_product", 3, 3, 2, 2, 64, 96, "float32", decay="head", steps=2, segments=2),
    ),
    "linear odd": ("tpu7x:2x2x1", static.CASES["linear odd"]),
    "linear documents": (
        "tpu7x:2x2x1",
        Case("linear_attention", 2, 100, 2, 1, 64, 96, decay="head", segments=2, documents=True),
    ),
    "linear float32": ("v5e:2x2", Case("linear_attention", 1, 256, 2, 1, 128, 128, "float32")),
    "deltaformer odd": ("v5e:2x2", Case("deltaformer", 1, 200, 3, 3, 64, 96, write="softmax", window=70)),
    "deltaformer float32": (
        "v5p:2x2x1",
        Case("deltaformer", 1, 100, 1, 1, 64, 96, "float32", write="linear"),
    ),
    "deltaformer shared heads": (
        "tpu7x:2x2x1",
        Case("deltaformer", 1, 256, 2, 1, 128, 128, segments=2, write="relu", decay="head"),
    ),
    "deltaformer round": ("v6e:2x2", Case("deltaformer", 1, 128, 1, 1, 128, 128, write="round")),
    "softmax odd": ("v6e:2x2", Case("softmax_attention", 1, 200, 4, 2, 64, 96, segments=2, window=70, decay="head")),
    "softmax float32": (
        "v5e:2x2",
        Case("softmax_attention", 1, 300, 1, 1, 128, 128, "float32", causal=False, window=9),
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_compiles(name):
    """The kernels compile (VMEM, layouts, lowerings), and the program calls them."""
    topology, case = SMALL[name]
    static.prepare_compiler()
    text = static.compile_case(case, topology).as_text()
    assert all(name in text for name in kernels(case))


@pytest.mark.parametrize("op", ["delta_rule", "deltaformer"])
def test_split_over_chips(op):
    """On a mesh every chip runs the kernels on its own rows and heads, and nothing is transferred."""
    static.prepare_compiler()
    case = Case(op, 2, 256, 4, 2, 128, 128)
    text = static.compile_case(case, "v5e:2x2", split=(2, 2)).as_text()
    assert all(name in text for name in kernels(case)) and "bf16[1,2,256,128]" in text
    # Only the loss is reduced over chips.
    for transfer in ("all-gather", "all-to-all", "collective-permute"):
        assert transfer not in text


CACHED = {
    "v5e:2x2": ("softmax_attention", 8, {"window": 100}),
    "v5p:2x2x1": ("deltaformer", 8, {"write_kernel": "linear"}),
    "v6e:2x2": ("softmax_attention", 2, {}),
    "tpu7x:2x2x1": ("deltaformer", 4, {"write_kernel": "round", "read_kernel": "linear"}),
}


@pytest.mark.parametrize("topology", CACHED)
def test_attention_over_a_cache(topology):
    """The kernel reads the cache as it lies there: nothing of its size is copied."""
    static.prepare_compiler()
    mesh, (op, groups, options) = static.make_mesh(topology), CACHED[topology]
    decays = {"decay_heads": groups if op == "deltaformer" else 16}
    sizes = {"batch": 2, "capacity": 512, "groups": groups, "key_width": 128, "value_width": 128}
    cache = mf.init_cache(op, **sizes, **decays, dtype="bfloat16")
    arrays = {"q": jnp.zeros((2, 3, 16, 128), "bfloat16"), "decay": jnp.zeros((2, 3, decays["decay_heads"]))}
    arrays |= dict.fromkeys("kv", jnp.zeros((2, 3, groups, 128), "bfloat16"))
    place = NamedSharding(mesh, PartitionSpec())
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (arrays, cache))
    with jax.set_mesh(mesh):
        run = lambda arrays, cache: getattr(mf, op)(**arrays, **options, initial_state=cache)  # noqa: E731
        text = jax.jit(run, donate_argnums=1).lower(*given).compile().as_text()
    assert "memformer_attention_decode" in text
    assert not re.search(rf"= \w+\[2,(512,{groups}|{512 * groups}),128\]\S* (copy|transpose|reshape|convert)\(", text)


def test_train_step():
    """On a (data, fsdp, tensor) mesh the step calls the kernels and gathers nothing but its rows' tokens.

    The memory whose kernels compile fastest; `python -m benchmarks.tpu.train_step` has all.
    """
    static.prepare_compiler()
    model = {"width": 256, "heads": 4, "depth": 2, "remat": "full", "dtype": "bfloat16", "scan_layers": True}
    config = train_step.step_config("linear_attention", (2, 2, 2), 448, **model)
    step = train_step.compile_step(config, "v5p:2x2x2")
    assert step.kernels == ("memformer_linear_attention_backward", "memformer_linear_attention_forward")
    assert not step.gathers
