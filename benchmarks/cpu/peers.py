"""CPU implementations of other projects, in PyTorch; benchmarks.cpu sends them requests.

The requests are those of benchmarks/torch_peers.py; the python that runs this module needs torch, transformers and
flash-linear-attention, none of which this project depends on.
"""

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

from benchmarks import torch_peers
from benchmarks.cases import Case
from benchmarks.cpu.cases import NAIVE, SDPA, TORCH
from benchmarks.torch_peers import Arrays, TorchBench
from benchmarks.workers import serve

THREADS = 2


def gated_delta_rule(case: Case) -> Callable[[Arrays], Any]:
    """The chunked PyTorch fallback of transformers' Qwen3-Next."""
    from transformers.models.qwen3_next import modeling_qwen3_next  # type: ignore[import-not-found, unused-ignore]

    function = modeling_qwen3_next.torch_chunk_gated_delta_rule
    # Newer versions wrap it in a lookup of faster kernels; the PyTorch code is the one timed.
    function = getattr(function, "__wrapped__", function)
    return lambda x: function(x["q"], x["k"], x["v"], g=x["decay"], beta=x["beta"], output_final_state=True)[0]


def naive_deltaformer(case: Case) -> Callable[[Arrays], Any]:
    """FLA's naive DeltaFormer; its write queries are q."""
    package = importlib.util.find_spec("fla")
    assert package is not None and package.submodule_search_locations is not None
    # Loaded from its file: the package's own __init__ imports Triton, which this file does not need.
    path = pathlib.Path(package.submodule_search_locations[0], "ops", "deltaformer", "naive.py")
    spec = importlib.util.spec_from_file_location("naive_deltaformer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda x: module.naive_deltaformer_attn(x["q"], x["k"], x["v"], x["beta"])


PEERS = {
    ("delta_rule", TORCH): (("torch", "transformers"), gated_delta_rule),
    ("softmax_attention", SDPA): (("torch",), torch_peers.scaled_dot_product_attention),
    ("deltaformer", NAIVE): (("torch", "fla"), naive_deltaformer),
}


if __name__ == "__main__":
    serve(TorchBench(PEERS, THREADS).actions())
