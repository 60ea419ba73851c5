"""Static configuration of a call, as far as the kernels of every chip share it.

Each chip derives its own `ScanConfig` and `AttentionConfig`, which add block sizes, and makes them in `plan_call`.
"""

import dataclasses
import math
from typing import Any, Self

from memformer.core.calls import MatrixCall
from memformer.core.similarity import Kernel
from memformer.pallas.sharding import KernelAxes, kernel_axes

__all__ = ["BaseAttentionConfig", "BaseScanConfig"]


@dataclasses.dataclass(frozen=True)
class BaseScanConfig:
    """Sizes of a call of a matrix memory.

    Attributes:
      batch, heads, groups, chunks: B, H, G and N.
      chunk, key, value: C, K and V.
      scale: factor on the read.
      beta: whether there is an erase strength (the delta rule).
      decay: whether there is a log decay.
      segments: whether sequences are packed.
      documents: P, where each document of a packed row has a state of its own and starts a chunk; else 0. `segments`
        is False then.
      axes: mesh axes of batch and heads.
    """

    batch: int
    heads: int
    groups: int
    chunks: int
    chunk: int
    key: int
    value: int
    scale: float
    beta: bool
    decay: bool
    segments: bool
    documents: int = dataclasses.field(default=0, kw_only=True)
    axes: KernelAxes = dataclasses.field(default_factory=kernel_axes, kw_only=True)

    @classmethod
    def of(cls, call: MatrixCall, chunk: int, **fields: Any) -> Self:
        """The configuration of a call in chunks of `chunk` tokens.

        Args:
          call: one write per token.
          chunk: C.
          **fields: those of the subclass, and what replaces sizes of the call.
        """
        batch, length, groups, key = call.q.shape
        heads, value = call.v.shape[2:]
        documents = call.state.shape[1] if call.document_states else 0
        sizes: dict[str, Any] = {
            "batch": batch,
            "heads": heads,
            "groups": groups,
            "chunks": -(-(length + documents * (chunk - 1)) // chunk),
            "chunk": chunk,
            "key": key,
            "value": value,
            "scale": call.scale,
            "beta": call.beta is not None,
            "decay": call.decay is not None,
            "segments": call.segments is not None and not documents,
            "documents": documents,
        }
        return cls(**(sizes | fields))

    @property
    def repeat(self) -> int:
        """R: value heads that share a query and key head."""
        return self.heads // self.groups

    @property
    def carries(self) -> bool:
        """Whether the state decays or resets within a chunk."""
        return self.decay or self.segments


@dataclasses.dataclass(frozen=True)
class BaseAttentionConfig:
    """Static settings of one read or write of attention.

    Attributes:
      similarity: the similarity kernel, its scale filled in.
      before: blocks of slots before the call's own tokens.
      own: whether queries see slots of the call, those up to their own.
      strict: whether their own slot is left out.
      segments: whether a mask of segments is needed.
      decay: whether logits or similarities decay with the time between the tokens of a pair.
      restarts: whether decays add up from 0 in each document of a row, so that no number is close to those of a block.
      causal: False where queries see later slots, too; `own` is False then, and `before` counts all blocks.
      window: how many tokens back a query sees, itself included, and without causality as many ahead; or None.
      axes: mesh axes of batch and heads.
    """

    similarity: Kernel
    before: int
    own: bool
    strict: bool
    segments: bool
    decay: bool
    restarts: bool = dataclasses.field(default=False, kw_only=True)
    causal: bool = dataclasses.field(default=True, kw_only=True)
    window: int | None = dataclasses.field(default=None, kw_only=True)
    axes: KernelAxes = dataclasses.field(default_factory=kernel_axes, kw_only=True)

    @property
    def factor(self) -> float:
        """Factor on inner products; the exponentials of a softmax are to base 2, as the chips have them."""
        scale = self.similarity.scale
        return scale * math.log2(math.e) if self.similarity.normalized else scale
