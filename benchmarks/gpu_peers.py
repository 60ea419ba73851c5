"""Other people's GPU implementations, in PyTorch and Triton, in a process of their own; benchmarks.gpu asks it.

Requests and answers are those of gpu_worker.py (load, time, drop), and

    {"do": "about"}     {"torch": "2.11.0", "triton": ..., "fla-core": ...}

It imports no JAX. What is not installed is an error in the answer, and so a row of the benchmark that says so.
"""

import importlib.metadata
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import gpu_cases
from benchmarks.gpu_cases import FLA, SDPA, Case
from benchmarks.workers import serve

Arrays = Mapping[str, Any]

# Packages that a peer may want, and what they are on an index.
PACKAGES = {"torch": "torch", "triton": "triton", "einops": "einops", "fla": "fla-core and flash-linear-attention"}


def gated_delta_rule(case: Case) -> Callable[[Arrays], Any]:
    """FLA's chunk_gated_delta_rule, or chunk_delta_rule where there is no decay; q and k may have fewer heads."""
    if not case.decay:
        from fla.ops.delta_rule import chunk_delta_rule  # type: ignore[import-not-found, unused-ignore]

        return lambda x: chunk_delta_rule(x["q"], x["k"], x["v"], x["beta"])[0]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found, unused-ignore]

    return lambda x: chunk_gated_delta_rule(x["q"], x["k"], x["v"], g=x["decay"], beta=x["beta"])[0]


def linear_attention(case: Case) -> Callable[[Arrays], Any]:
    """FLA's chunk_linear_attn, or chunk_simple_gla where there is a decay."""
    if case.decay:
        from fla.ops.simple_gla import chunk_simple_gla  # type: ignore[import-not-found, unused-ignore]

        return lambda x: chunk_simple_gla(x["q"], x["k"], x["v"], g=x["decay"])[0]
    from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found, unused-ignore]

    return lambda x: chunk_linear_attn(x["q"], x["k"], x["v"], normalize=False)[0]


def deltaformer(case: Case) -> Callable[[Arrays], Any]:
    """FLA's DeltaFormer: u alone, or u and its read.

    Its public function reads by the package flash-attn; where that is not installed PyTorch's own causal attention,
    a flash attention too, takes that place.
    """
    from fla.ops.deltaformer import parallel  # type: ignore[import-not-found, unused-ignore]

    if case.only_u:
        size = min(parallel.BLOCK_SIZE_C, case.length)
        apply = parallel.ParallelDeltaformerFunction.apply
        return lambda x: apply(x["q"], x["k"], x["v"], x["beta"], size, None)
    if parallel.flash_attn_func is None:
        parallel.flash_attn_func = _flash_attention
    return lambda x: parallel.deltaformer_attn(x["q"], x["k"], x["v"], x["beta"])


def _flash_attention(q: Any, k: Any, v: Any, causal: bool, window_size: tuple[int, int]) -> Any:
    assert causal and window_size == (-1, -1)
    return _attend(q, k, v)


def _attend(q: Any, k: Any, v: Any) -> Any:
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def sdpa(case: Case) -> Callable[[Arrays], Any]:
    """PyTorch's causal attention."""
    return lambda x: _attend(x["q"], x["k"], x["v"])


def fla_attention(case: Case) -> Callable[[Arrays], Any]:
    """FLA's parallel_attn, causal; segments as lengths of packed sequences."""
    import torch
    from fla.ops.attn import parallel_attn  # type: ignore[import-not-found, unused-ignore]

    ends = None
    if case.segments:
        step = case.length // case.segments
        ends = torch.arange(0, case.length + 1, step, dtype=torch.long, device=device())
    return lambda x: parallel_attn(x["q"], x["k"], x["v"], cu_seqlens=ends)


PEERS = {
    ("delta_rule", FLA): gated_delta_rule,
    ("linear_attention", FLA): linear_attention,
    ("deltaformer", FLA): deltaformer,
    ("softmax_attention", FLA): fla_attention,
    ("softmax_attention", SDPA): sdpa,
}


def device() -> str:
    """The GPU, or the CPU where there is none."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def need(modules: tuple[str, ...]) -> None:
    """Raises ModuleNotFoundError that names every package that is missing."""
    missing = [PACKAGES[module] for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f"not installed: {', '.join(missing)}")


class Bench:
    """What is loaded: inputs of the case in hand, and its peers."""

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> dict[str, Any]:
        """Forgets all arrays and peers."""
        self.case: Case | None = None
        self.sets: list[dict[str, Any]] = []
        self.weight: Any = None
        self.calls: dict[str, Callable[[int], Any]] = {}
        if "torch" in sys.modules:
            # Other processes want the memory.
            sys.modules["torch"].cuda.empty_cache()
        return {}

    def prepare(self, case: Case) -> None:
        """Puts inputs on the device: gates in float32, all else in bfloat16, as FLA's layers have them."""
        import torch

        if self.case == case:
            return
        self.drop()
        where = device()
        first = {name: torch.from_numpy(x).to(where) for name, x in gpu_cases.inputs(case).items()}
        first = {name: x if name == "decay" else x.bfloat16() for name, x in first.items()}
        size = sum(x.numel() * x.element_size() for x in first.values())
        count = min(gpu_cases.MOST_SETS, math.ceil(gpu_cases.ROTATED / size))
        self.sets = [first, *({name: x.clone() for name, x in first.items()} for _ in range(count - 1))]
        self.weight = torch.from_numpy(gpu_cases.cotangent(case)).to(where).bfloat16()
        self.case = case

    def load(self, case: dict[str, Any], gradient: bool, name: str) -> dict[str, Any]:
        """Compiles and runs one peer."""
        need(("torch",) if name == SDPA else tuple(PACKAGES))
        import torch

        wanted = gpu_cases.from_json(case)
        self.prepare(wanted)
        function = PEERS[wanted.op, name](wanted)
        for arrays in self.sets:
            for x in arrays.values():
                x.requires_grad_(gradient)

        def call(i: int) -> dict[str, Any]:
            arrays = self.sets[i % len(self.sets)]
            if not gradient:
                with torch.no_grad():
                    return {"output": function(arrays)}
            gradients = torch.autograd.grad(function(arrays), list(arrays.values()), self.weight)
            return dict(zip(arrays, gradients, strict=True))

        start = time.perf_counter()
        call(0)
        synchronize()
        first = time.perf_counter() - start
        given = [*self.sets[0].values(), *[self.weight] * gradient]
        memory = measured(lambda: call(0), sum(x.numel() * x.element_size() for x in given))
        self.calls[name] = call
        probe = {key: thin(x) for key, x in call(0).items()}
        return {"memory": memory, "first": first, "probe": probe}

    def time(self, name: str, seconds: float) -> dict[str, Any]:
        """Samples of a peer."""
        return gpu_cases.run_calls(self.calls[name], lambda _: synchronize(), seconds)


def thin(x: Any) -> list[float]:
    """Numbers of a tensor, evenly spread, the same ones for every contestant."""
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.shape[0] // gpu_cases.PROBE)][: gpu_cases.PROBE].double().tolist()


def synchronize() -> None:
    """Waits for the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured(call: Callable[[], Any], given: int) -> int | None:
    """Most bytes of device memory in use at once for a call, with its inputs' `given` bytes; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    return int(torch.cuda.max_memory_allocated() - before + given)


def about() -> dict[str, Any]:
    """What is installed of the packages that hold peers."""
    found = {}
    for package in ("torch", "triton", "fla-core", "flash-linear-attention", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    bench = Bench()
    serve({"load": bench.load, "time": bench.time, "drop": bench.drop, "about": about})
