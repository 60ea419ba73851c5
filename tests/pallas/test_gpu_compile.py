"""The GPU kernels compiled down to ptxas by the CUDA plugin wheels; no GPU is needed."""

import importlib.util

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks.cases import Case
from benchmarks.gpu import static
from memformer.pallas.decoding import MOST_TOKENS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or static.find_ptxas() is None,
    reason="jax-cuda13-plugin or ptxas is not installed here (extra gpu-compiler): no GPU kernel is compiled",
)

# The cases that need most registers; python -m benchmarks.gpu --static has all. Few heads are scanned in parts of the
# time, many by two warpgroups per program.
CASES = [
    Case("delta_rule", 1, 4096, 8, 1, decay="head", segments=2),
    Case("delta_rule", 1, 4096, 4, 1, 256, decay="head", segments=2),
    Case("linear_attention", 4, 256, 32, 1, decay="head", segments=2),
    Case("softmax_attention", 1, 256, 2, 1, decay="head", segments=2),
    Case("deltaformer", 1, 2048, 2, 1, decay="head", segments=2),
    Case("delta_rule", 1, 256, 2, 1, decay="channel", segments=2),
    Case("linear_attention", 1, 256, 2, 1, decay="channel", segments=2, documents=True),
    Case("delta_rule", 1, 256, 2, 1, 256, 64, "float16", decay="channel", segments=2),
    Case("delta_rule", 64, 8, 4, 2, decay="channel", segments=2),
    Case("softmax_attention", 4, 8, 4, 2, 256, 256, decay="head", window=9, slots=128),
    Case("deltaformer", 4, 8, 4, 2, write="linear", decay="head", slots=136),
]

# Beginnings of the names of an op's own kernels.
KERNELS = {"deltaformer": ("write_forward", "write_backward")}
KERNELS |= {"softmax_attention": ("attention_forward", "attention_backward")}
KERNELS |= {op: (f"{op}_chunk_scan_forward", f"{op}_chunk_scan_backward") for op in ("delta_rule", "linear_attention")}
KERNELS["delta_rule"] += ("delta_rule_chunk_scan_states", "delta_rule_chunk_scan_state_gradients")
CHANNEL = {"linear_attention": ("scores", "chunk_scan", "chunk_scan_backward", "operand_gradients", "score_gradients")}
CHANNEL |= {"delta_rule": (*CHANNEL["linear_attention"], "inverse", "inverse_gradients")}


@pytest.fixture(scope="module")
def rows():
    """Reports of all cases, compiled by one process."""
    return list(static.report(CASES))


@pytest.mark.parametrize("case", CASES, ids=[f"{case.op}-{case.decay}-{case.length}" for case in CASES])
def test_no_spill_no_serialized_product(case, rows):
    of = [row for row in rows if row["case"] == case.name]
    assert all(row["fault"] is None and row["registers"] <= 255 for row in of), of
    names = KERNELS[case.op]
    if case.decay == "channel":
        names = tuple(f"{case.op}_channel_{name}" for name in CHANNEL[case.op])
    if case.length <= MOST_TOKENS:
        names = ("attention_decode" if case.slots else f"{case.op}_decode",)
    for name in names:
        assert any(row["kernel"].startswith(f"memformer_{name}") for row in of), name


@pytest.mark.parametrize("op", ["linear_attention", "softmax_attention"])
def test_warpgroup_semantics(op, monkeypatch):
    """Kernels without an inverse compile under warpgroup semantics too, should JAX give up lane semantics."""
    params, used = plgpu.CompilerParams, []

    def warpgroup(**options):
        used.append(options["lowering_semantics"])
        return params(**options | {"lowering_semantics": plgpu.LoweringSemantics.Warpgroup})

    monkeypatch.setattr(plgpu, "CompilerParams", warpgroup)
    static.compile_for_h200(Case(op, 1, 256, 2, 1, 64, 64))
    assert set(used) == {plgpu.LoweringSemantics.Lane}
