"""Benchmark cases: one call of an op, and its inputs.

Numpy only: the processes that run PyTorch import this module too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["BOTH", "FORWARD", "PASSES", "RECURRENT", "Case", "cotangent", "from_json", "inputs", "segment_ids"]

RECURRENT = "recurrent"

FORWARD, BOTH = "forward", "forward+backward"

# Name of a pass, and whether it computes gradients.
PASSES = ((FORWARD, False), (BOTH, True))

MATRIX_OPS = ("delta_rule", "delta_product", "linear_attention")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
      op: name of the public function.
      batch, length, heads, groups, key, value: B, T, H, G, K, V. G counts the heads of q and k for matrix memories,
        and the heads of k and v for attention.
      dtype: of q, k, v and w; decay, beta and alpha are float32.
      decay: "" for none, "head" or "channel" for a log decay per head or per key channel.
      segments: number of packed sequences of equal length; 0 passes no segment_ids.
      documents: whether each of them starts from a state of its own, in matrix memories.
      causal: of softmax attention.
      window: of attention ops.
      slots: capacity of the cache that an attention op decodes over, of which all but its tokens are in use; 0 is none.
      write, read: similarities of DeltaFormer.
      steps: delta_product's writes per token.
      only_u: compute DeltaFormer's u only, without the read.
      implementations: implementations of this library that are timed; "default" lets the library choose.
      peers: names of the peers timed beside them.
    """

    op: str
    batch: int
    length: int
    heads: int
    groups: int
    key: int = 128
    value: int = 128
    dtype: str = "bfloat16"
    decay: str = ""
    segments: int = 0
    documents: bool = False
    causal: bool = True
    window: int | None = None
    slots: int = 0
    write: str = "softmax"
    read: str = "softmax"
    steps: int = 1
    only_u: bool = False
    implementations: tuple[str, ...] = ("pallas",)
    peers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The case as the tables print it."""
        what = [self.op]
        if self.op == "deltaformer":
            what += ["u"] * self.only_u + [self.write] * (self.write != "softmax")
            what += [f"{self.read} read"] * (self.read != "softmax")
        what += [{"head": "gated", "channel": "channel"}[self.decay]] if self.decay else []
        what += [f"{self.segments} {'documents' if self.documents else 'segments'}"] * bool(self.segments)
        what += [f"over {self.slots} slots"] * bool(self.slots)
        what += [f"window {self.window}"] * (self.window is not None) + ["not causal"] * (not self.causal)
        what += [self.dtype] * (self.dtype == "float16")
        heads = f"{self.groups}/{self.heads}" if self.groups != self.heads else f"{self.heads}"
        width = f"{self.key}" if self.key == self.value else f"{self.key}/{self.value}"
        return f"{' '.join(what)} [{self.batch}, {self.length}, {heads}, {width}]"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the op beside its arrays and segment_ids."""
        options: dict[str, Any] = {}
        if self.op == "deltaformer":
            options = {"write_kernel": self.write, "read_kernel": self.read, "window": self.window}
        return options | {name: getattr(self, name) for name in ("causal", "window") if self.op == "softmax_attention"}

    @property
    def is_attention(self) -> bool:
        """True for the ops whose state is a cache."""
        return self.op not in MATRIX_OPS

    @property
    def itemsize(self) -> int:
        """Bytes of one number of q, k or v."""
        return {"bfloat16": 2, "float16": 2, "float32": 4}[self.dtype]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the array arguments by name, in the order of the op's signature; segment_ids excluded."""
        time = (self.batch, self.length)
        queries, values = (self.heads, self.groups) if self.is_attention else (self.groups, self.heads)
        written = (*time, self.steps) if self.op == "delta_product" else time
        shapes = {
            "q": (*time, queries, self.key),
            "k": (*written, self.groups, self.key),
            "v": (*written, values, self.value),
        }
        if self.op == "deltaformer":
            shapes |= {"w": (*time, self.groups, self.key), "alpha": (*time, self.groups)}
        if self.op.startswith("delta"):
            shapes["beta"] = (*written, values)
        if self.decay:
            heads = self.heads if self.op == "softmax_attention" else values
            shapes["decay"] = (*time, heads, *([self.key] if self.decay == "channel" else []))
        if self.documents:
            shapes["initial_state"] = (self.batch, self.segments, self.heads, self.key, self.value)
        return shapes


def from_json(fields: Mapping[str, Any]) -> Case:
    """Rebuilds a case from the JSON of `dataclasses.asdict(case)`."""
    given: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}
    return Case(**given)


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Array arguments of the op by name, in float32.

    Keys of matrix memories and of the delta rule have unit norm. DeltaFormer's `w` and `alpha` are left out: FLA's
    DeltaFormer, which it is compared with, writes with the read queries and has no alpha.
    """
    random = _generator(case, 0)
    arrays = {}
    for name, shape in case.shapes.items():
        if name in ("q", "k", "v", "initial_state"):
            arrays[name] = random.standard_normal(shape, np.float32)
        elif name == "beta":
            arrays[name] = random.uniform(0.1, 0.9, shape).astype(np.float32)
        elif name == "decay":
            arrays[name] = random.uniform(-0.1, 0.0, shape).astype(np.float32)
    if not case.is_attention:
        # Queries too: no softmax bounds what a recurrence reads.
        for name in "qk":
            arrays[name] /= np.linalg.norm(arrays[name], axis=-1, keepdims=True)
    return arrays


def cotangent(case: Case) -> np.ndarray:
    """Weights of the output in the summed loss, in float32."""
    heads = case.groups if case.only_u else case.heads
    return _generator(case, 1).standard_normal((case.batch, case.length, heads, case.value), np.float32)


def segment_ids(case: Case) -> np.ndarray | None:
    """Segment ids [B, T] int32 of `case.segments` packed sequences of equal length, or None."""
    if not case.segments:
        return None
    ids = 1 + np.arange(case.length, dtype=np.int32) * case.segments // case.length
    return np.broadcast_to(ids, (case.batch, case.length))


def _generator(case: Case, stream: int) -> np.random.Generator:
    # The fastest of numpy's generators: at the largest shapes, drawing inputs must not dominate the run.
    return np.random.Generator(np.random.SFC64([stream, case.length, case.heads]))
