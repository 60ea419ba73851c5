"""Peers in PyTorch, in a process of their own: the requests that a benchmark sends them.

    {"do": "load", "case": {...}, "gradient": true, "name": ...}   {"memory": bytes, "first": seconds, "probe": {...}}
    {"do": "time", "name": ..., "seconds": 0.1}                    {"samples": [ms, ...], "host": share}
    {"do": "calls", "name": ..., "calls": 3}                       {"seconds": seconds per call}
    {"do": "drop"}                                                 {}
    {"do": "about"}                                                {"torch": "2.11.0", "triton": ..., ...}

The process imports no JAX, and torch only when a peer is loaded. A package that is not installed is an error in the
answer, and so a row of the benchmark.
"""

import importlib.metadata
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import cases, timing
from benchmarks.cases import Case

__all__ = ["Arrays", "Peer", "TorchBench", "about", "device", "require", "scaled_dot_product_attention"]

Arrays = Mapping[str, Any]

# Builds the peer of a case: a function from its arrays to its output.
Peer = Callable[[Case], Callable[[Arrays], Any]]

# Modules a peer may need, and the packages that hold them.
PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "einops": "einops",
    "fla": "fla-core and flash-linear-attention",
    "transformers": "transformers",
}

# Total size of inputs that exceeds the caches of any chip, and the maximum number of copies that reach it.
ROTATED, MAX_COPIES = 256e6, 4


def device() -> str:
    """The GPU, or the CPU where there is none."""
    import torch  # type: ignore[import-not-found, unused-ignore]

    return "cuda" if torch.cuda.is_available() else "cpu"


def require(modules: tuple[str, ...]) -> None:
    """Raises ModuleNotFoundError naming every package that is missing."""
    missing = [PACKAGES[module] for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f"not installed: {', '.join(missing)}")


def about() -> dict[str, Any]:
    """Versions of the installed packages that hold peers."""
    found = {}
    for package in ("torch", "triton", "fla-core", "flash-linear-attention", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def scaled_dot_product_attention(case: Case) -> Callable[[Arrays], Any]:
    """PyTorch's causal attention."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention

    def run(x: Arrays) -> Any:
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        return attend(q, k, v, is_causal=True).transpose(1, 2)

    return run


class TorchBench:
    """The loaded case: its inputs and its peers.

    Args:
      peers: by op and name: the modules it needs, and its builder.
      threads: CPU threads; None keeps PyTorch's default.
    """

    def __init__(self, peers: Mapping[tuple[str, str], tuple[tuple[str, ...], Peer]], threads: int | None = None):
        self.peers, self.threads = peers, threads
        self.drop()

    def actions(self) -> dict[str, Callable[..., dict[str, Any]]]:
        """The requests, for `workers.serve`."""
        return {
            "load": self.load,
            "time": self.time,
            "calls": self.time_calls,
            "drop": self.drop,
            "about": about,
        }

    def drop(self) -> dict[str, Any]:
        """Releases all arrays and peers."""
        self.case: Case | None = None
        self.sets: list[dict[str, Any]] = []
        self.cotangent: Any = None
        self.calls: dict[str, Callable[[int], Any]] = {}
        if "torch" in sys.modules:
            # Other processes need the memory.
            sys.modules["torch"].cuda.empty_cache()
        return {}

    def prepare(self, case: Case) -> None:
        """Moves inputs to the device: decay in float32, the rest in the case's dtype, as FLA's layers do."""
        import torch

        if self.case == case:
            return
        self.drop()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        where, dtype = device(), getattr(torch, case.dtype)
        first = {name: torch.from_numpy(x).to(where) for name, x in cases.inputs(case).items()}
        first = {name: x if name == "decay" else x.to(dtype) for name, x in first.items()}
        size = sum(x.numel() * x.element_size() for x in first.values())
        count = min(MAX_COPIES, math.ceil(ROTATED / size)) if where == "cuda" else 1
        self.sets = [first, *({name: x.clone() for name, x in first.items()} for _ in range(count - 1))]
        self.cotangent = torch.from_numpy(cases.cotangent(case)).to(where).to(dtype)
        self.case = case

    def load(self, case: dict[str, Any], gradient: bool, name: str) -> dict[str, Any]:
        """Builds, compiles and runs one peer."""
        wanted = cases.from_json(case)
        modules, build = self.peers[wanted.op, name]
        require(modules)
        import torch

        self.prepare(wanted)
        function = build(wanted)
        for arrays in self.sets:
            for x in arrays.values():
                x.requires_grad_(gradient)

        def call(i: int) -> dict[str, Any]:
            arrays = self.sets[i % len(self.sets)]
            if not gradient:
                with torch.no_grad():
                    return {"output": function(arrays)}
            gradients = torch.autograd.grad(function(arrays), list(arrays.values()), self.cotangent)
            return dict(zip(arrays, gradients, strict=True))

        start = time.perf_counter()
        call(0)
        _synchronize()
        first = time.perf_counter() - start
        given = [*self.sets[0].values(), *[self.cotangent] * gradient]
        memory = _peak_memory(lambda: call(0), sum(x.numel() * x.element_size() for x in given))
        self.calls[name] = call
        probes = {key: timing.probe(x.detach()).double().tolist() for key, x in call(0).items()}
        return {"memory": memory, "first": first, "probe": probes}

    def time(self, name: str, seconds: float) -> dict[str, Any]:
        """Samples one peer for about `seconds`."""
        return timing.run_calls(self.calls[name], lambda _: _synchronize(), seconds)

    def time_calls(self, name: str, calls: int) -> dict[str, Any]:
        """Mean seconds per call over `calls` calls."""
        start = time.perf_counter()
        for _ in range(calls):
            self.calls[name](0)
        _synchronize()
        return {"seconds": (time.perf_counter() - start) / calls}


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory(call: Callable[[], Any], given: int) -> int | None:
    """Peak bytes of device memory during a call, its inputs' `given` bytes included; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    _synchronize()
    return int(torch.cuda.max_memory_allocated() - before + given)
