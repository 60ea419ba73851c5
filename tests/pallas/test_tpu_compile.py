"""The TPU kernels through the real TPU compiler, which the libtpu wheel holds; no TPU is needed."""

import importlib.util

import pytest

from benchmarks import tpu_static, tpu_train_step
from benchmarks.tpu_compile import kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed here (extra tpu-compiler): no kernel is compiled",
)

# Together: odd sizes, shared heads, segments, decay, both dtypes, every write kernel, and every chip.
SMALL = {
    "delta odd": ("v5e:2x2", tpu_static.CASES["delta odd"]),
    "delta float32": ("v5p:2x2x1", tpu_static.Case("delta_rule", 1, 100, 1, 1, 64, 96, "float32", decay=True)),
    "delta shared heads": ("v6e:2x2", tpu_static.Case("delta_rule", 1, 256, 2, 1, 128, 128, segments=True)),
    "delta product": ("v5p:2x2x1", tpu_static.Case("delta_product", 1, 100, 1, 1, 64, 64, decay=True, steps=2)),
    "linear odd": ("tpu7x:2x2x1", tpu_static.CASES["linear odd"]),
    "linear float32": ("v5e:2x2", tpu_static.Case("linear_attention", 1, 256, 2, 1, 128, 128, "float32")),
    "deltaformer odd": ("v5e:2x2", tpu_static.Case("deltaformer", 1, 200, 3, 3, 64, 96, write="softmax")),
    "deltaformer float32": (
        "v5p:2x2x1",
        tpu_static.Case("deltaformer", 1, 100, 1, 1, 64, 96, "float32", write="linear"),
    ),
    "deltaformer shared heads": (
        "tpu7x:2x2x1",
        tpu_static.Case("deltaformer", 1, 256, 2, 1, 128, 128, segments=True, write="relu"),
    ),
    "deltaformer round": ("v6e:2x2", tpu_static.Case("deltaformer", 1, 128, 1, 1, 128, 128, write="round")),
    "softmax odd": ("v6e:2x2", tpu_static.Case("softmax_attention", 1, 200, 4, 2, 64, 96, segments=True)),
    "softmax float32": ("v5e:2x2", tpu_static.Case("softmax_attention", 1, 256, 1, 1, 128, 128, "float32")),
}


@pytest.mark.parametrize("name", SMALL)
def test_compiles(name):
    """VMEM, layouts, lowerings: the compiler takes it, and what it makes calls the kernels."""
    topology, case = SMALL[name]
    tpu_static.prepare_compiler()
    text = tpu_static.compile_case(case, topology).as_text()
    assert all(name in text for name in kernels(case.op))


@pytest.mark.parametrize("op", ["delta_rule", "deltaformer"])
def test_split_over_chips(op):
    """On a mesh of chips each calls the kernels for its own rows and heads, and nothing moves between them."""
    tpu_static.prepare_compiler()
    case = tpu_static.Case(op, 2, 256, 4, 2, 128, 128)
    text = tpu_static.compile_case(case, "v5e:2x2", split=(2, 2)).as_text()
    assert all(name in text for name in kernels(op)) and "bf16[1,2,256,128]" in text
    # The loss is a sum over all chips; arrays stay.
    for transfer in ("all-gather", "all-to-all", "collective-permute"):
        assert transfer not in text


@pytest.mark.parametrize("memory", ["gated_delta_rule", "linear_attention"])
def test_train_step(memory):
    """Under a (data, fsdp, tensor) mesh the step calls the kernels, and no activation is gathered for them."""
    tpu_static.prepare_compiler()
    model = {"width": 256, "heads": 4, "depth": 2, "remat": "full", "dtype": "bfloat16", "scan_layers": True}
    config = tpu_train_step.step_config(memory, (2, 2, 2), 448, **model)
    step = tpu_train_step.compile_step(config, "v5p:2x2x2")
    kernel = {"gated_delta_rule": "delta_rule"}.get(memory, memory)
    assert step.kernels == (f"memformer_{kernel}_backward", f"memformer_{kernel}_forward")
    assert not step.gathers
