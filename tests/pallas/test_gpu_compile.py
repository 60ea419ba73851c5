"""The GPU kernels through the real compiler down to ptxas, from the CUDA plugin wheels; no GPU is needed."""

import importlib.util
import shutil

import pytest

from benchmarks import gpu

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None or shutil.which("ptxas") is None,
    reason="jax-cuda13-plugin or ptxas is not installed here: no GPU kernel is compiled",
)

# The ones that need most registers, and the plainest.
CASES = [
    gpu.Case(op, 256, 2, 1, key, 128, True, True) for op in ("delta_rule", "linear_attention") for key in (64, 128)
]
CASES.append(gpu.Case("delta_rule", 256, 2, 1, 128, 128, False, False))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_no_spill_no_serialized_product(case):
    rows = gpu.static((case,))
    assert {row["kernel"] for row in rows} >= {f"memformer_{case.op}_{way}" for way in ("forward", "backward")}
    assert all(row["spills"] == 0 and row["serialized"] == 0 and row["registers"] <= 255 for row in rows), rows
