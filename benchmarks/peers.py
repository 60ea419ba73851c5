"""Other people's implementations, in PyTorch, in an environment of their own.

A program that `benchmarks.run` starts with the python of `--peer-python` (torch, transformers and
flash-linear-attention installed there; none is a dependency of ours). One JSON object a line on
stdin, one answer a line on stdout:

    {"do": "load", "name": ..., "inputs": FILE.npz, "gradient": true}   {"ok": true}
    {"do": "save", "to": FILE.npz}                                      {"ok": true}
    {"do": "time", "calls": 3}                                          {"seconds": 0.012}
    {"do": "versions"}                                                  {"torch": "2.13.0", ...}

It imports nothing of ours and no JAX.
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found, unused-ignore]

THREADS = 2


def gated_delta_rule() -> Callable[..., Any]:
    """The chunked PyTorch fallback of transformers' Qwen3-Next."""
    from transformers.models.qwen3_next import modeling_qwen3_next  # type: ignore[import-not-found, unused-ignore]

    function = modeling_qwen3_next.torch_chunk_gated_delta_rule
    # Newer versions wrap it in a look for a faster kernel; the PyTorch code is what is timed.
    function = getattr(function, "__wrapped__", function)
    return lambda q, k, v, beta, decay: function(q, k, v, g=decay, beta=beta, output_final_state=True)[0]


def softmax_attention() -> Callable[..., Any]:
    """PyTorch's own causal attention."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def run(q, k, v):
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)

    return run


def naive_deltaformer() -> Callable[..., Any]:
    """FLA's naive DeltaFormer; its write queries are q."""
    package = importlib.util.find_spec("fla")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("flash-linear-attention is not installed for this python")
    # Loaded by its file: the package's own __init__ wants Triton, which this file does not.
    path = pathlib.Path(package.submodule_search_locations[0], "ops", "deltaformer", "naive.py")
    spec = importlib.util.spec_from_file_location("naive_deltaformer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda q, k, v, beta: module.naive_deltaformer_attn(q, k, v, beta)


PEERS = {
    "torch chunked (transformers)": gated_delta_rule,
    "torch sdpa": softmax_attention,
    "FLA naive": naive_deltaformer,
}


class Loaded:
    """A peer with its inputs, ready to run.

    Attributes:
      outputs: name to array, of the last run.
    """

    def __init__(self, name: str, inputs: str, gradient: bool):
        arrays = {key: torch.from_numpy(value) for key, value in np.load(inputs).items()}
        self.cotangent = arrays.pop("cotangent")
        self.function = PEERS[name]()
        self.arguments = {key: value.requires_grad_(gradient) for key, value in arrays.items()}
        self.gradient = gradient
        self.outputs: dict[str, Any] = {}

    def run(self) -> None:
        """Forward, or forward and backward of sum(output * cotangent) to every argument."""
        if not self.gradient:
            with torch.no_grad():
                self.outputs = {"output": self.function(**self.arguments)}
            return
        for value in self.arguments.values():
            value.grad = None
        (self.function(**self.arguments) * self.cotangent).sum().backward()
        self.outputs = {key: value.grad for key, value in self.arguments.items()}


def versions() -> dict[str, str]:
    """What is installed here of the packages that hold peers."""
    found = {}
    for package in ("torch", "transformers", "flash-linear-attention"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def answer(request: dict[str, Any], loaded: Loaded | None) -> tuple[dict[str, Any], Loaded | None]:
    """Does one request; returns its answer and what is loaded afterwards."""
    if request["do"] == "versions":
        return versions(), loaded
    if request["do"] == "load":
        return {"ok": True}, Loaded(request["name"], request["inputs"], request["gradient"])
    assert loaded is not None, "load first"
    if request["do"] == "save":
        loaded.run()
        np.savez(request["to"], **{key: value.detach().numpy() for key, value in loaded.outputs.items()})
        return {"ok": True}, loaded
    start = time.perf_counter()
    for _ in range(request["calls"]):
        loaded.run()
    return {"seconds": (time.perf_counter() - start) / request["calls"]}, loaded


def main() -> None:
    """Answers requests until stdin ends."""
    torch.set_num_threads(THREADS)
    loaded = None
    for line in sys.stdin:
        reply, loaded = answer(json.loads(line), loaded)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
