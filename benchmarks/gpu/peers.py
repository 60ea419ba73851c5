"""GPU implementations of other projects, in PyTorch and Triton; benchmarks.gpu sends them requests.

The requests are those of benchmarks/torch_peers.py.
"""

from collections.abc import Callable
from typing import Any

from benchmarks import torch_peers
from benchmarks.cases import Case
from benchmarks.gpu.cases import FLA, SDPA
from benchmarks.torch_peers import Arrays, TorchBench, device
from benchmarks.workers import serve


def delta_rule(case: Case) -> Callable[[Arrays], Any]:
    """FLA's chunk_gated_delta_rule, or chunk_delta_rule without a decay; q and k may have fewer heads."""
    if not case.decay:
        from fla.ops.delta_rule import chunk_delta_rule  # type: ignore[import-not-found, unused-ignore]

        return lambda x: chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"])[0]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found, unused-ignore]

    return lambda x: chunk_gated_delta_rule(x["q"], x["k"], x["v"], g=x["decay"], beta=x["beta"])[0]


def linear_attention(case: Case) -> Callable[[Arrays], Any]:
    """FLA's chunk_linear_attn, or chunk_simple_gla with a decay."""
    if case.decay:
        from fla.ops.simple_gla import chunk_simple_gla  # type: ignore[import-not-found, unused-ignore]

        return lambda x: chunk_simple_gla(x["q"], x["k"], x["v"], g=x["decay"])[0]
    from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found, unused-ignore]

    return lambda x: chunk_linear_attn(x["q"], x["k"], x["v"], normalize=False)[0]


def deltaformer(case: Case) -> Callable[[Arrays], Any]:
    """FLA's DeltaFormer: u alone, or u and its read.

    Its public function reads with the package flash-attn; where that is not installed, PyTorch's causal attention,
    also a flash attention, takes its place.
    """
    from fla.ops.deltaformer import parallel  # type: ignore[import-not-found, unused-ignore]

    if case.only_u:
        size = min(parallel.BLOCK_SIZE_C, case.length)
        apply = parallel.ParallelDeltaformerFunction.apply
        return lambda x: apply(x["q"], x["k"], x["v"], x["beta"], size, None)
    if parallel.flash_attn_func is None:
        attend = torch_peers.scaled_dot_product_attention(case)

        def flash_attention(q: Any, k: Any, v: Any, causal: bool, window_size: tuple[int, int]) -> Any:
            assert causal and window_size == (-1, -1)
            return attend({"q": q, "k": k, "v": v})

        parallel.flash_attn_func = flash_attention
    return lambda x: parallel.deltaformer_attn(x["q"], x["k"], x["v"], x["beta"])


def softmax_attention(case: Case) -> Callable[[Arrays], Any]:
    """FLA's parallel_attn, causal; segments as lengths of packed sequences."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    from fla.ops.attn import parallel_attn  # type: ignore[import-not-found, unused-ignore]

    ends = None
    if case.segments:
        step = case.length // case.segments
        ends = torch.arange(0, case.length + 1, step, dtype=torch.long, device=device())
    return lambda x: parallel_attn(x["q"], x["k"], x["v"], cu_seqlens=ends)


TRITON = ("torch", "triton", "einops", "fla")

PEERS = {
    ("delta_rule", FLA): (TRITON, delta_rule),
    ("linear_attention", FLA): (TRITON, linear_attention),
    ("deltaformer", FLA): (TRITON, deltaformer),
    ("softmax_attention", FLA): (TRITON, softmax_attention),
    ("softmax_attention", SDPA): (("torch",), torch_peers.scaled_dot_product_attention),
}


if __name__ == "__main__":
    serve(TorchBench(PEERS).actions())
