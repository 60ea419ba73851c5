"""Call objects: the checked arguments of one call of an op, in one layout for all implementations.

The public function checks its arguments and builds the call once; `dispatch` passes it to `run(call)` of an
implementation. Nothing downstream checks shapes again, resolves the precision again or undoes the layout.
"""

import dataclasses
from typing import Any

from jax import lax

from memformer.core.decay import CumulativeDecay
from memformer.core.mask import Mask
from memformer.core.segments import Segments
from memformer.core.similarity import Kernel
from memformer.core.types import Array

__all__ = ["AttentionCall", "MatrixCall"]


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixCall:
    """A call of a matrix memory.

        S' = exp(decay_t) S_{t-1};  S_t = S' + k_t (alpha_t v_t - beta_t S'^T w_t)^T;  o_t = scale S_t^T q_t

    W = T N counts writes: N per token (1 except in delta_product), in the order in which they happen. A token
    decays the state before its first write and reads after its last. At padding q, k, v, w, alpha, beta and decay
    are 0, so that it neither reads, writes nor forgets.

    Attributes:
      op: name of the public function, for messages.
      q: [B, T, G, K].
      k: [B, W, G, K].
      v: [B, W, H, V].
      w: erase vector [B, W, G, K]; None is k.
      alpha: write strength [B, W, H]; None is beta.
      beta: erase strength [B, W, H]; None where writes only add, without w and alpha.
      decay: log decay [B, T, H] or, per key channel, [B, T, H, K]; None is 0.
      segments: from `find_segments`, or None where nothing is packed.
      state: [B, H, K, V] in the accumulation dtype, or [B, P, H, K, V] with one of each document, P per row.
      writes: N.
      scale: factor on the read.
      precision: of matrix products.
      chunk_size: tokens per chunk, or None where the implementation chooses.
    """

    op: str
    q: Array
    k: Array
    v: Array
    w: Array | None
    alpha: Array | None
    beta: Array | None
    decay: Array | None
    segments: Segments | None
    state: Array
    writes: int
    scale: float
    precision: lax.Precision
    chunk_size: int | None

    @property
    def decay_per_channel(self) -> bool:
        """Whether each key channel has a decay of its own."""
        return self.decay is not None and self.decay.ndim == 4

    @property
    def document_states(self) -> bool:
        """Whether each document of a packed row has a state of its own."""
        return self.state.ndim == 5


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionCall:
    """A call of an attention op: softmax attention, or DeltaFormer where `write_kernel` is set.

        u_t = alpha_t v_t - beta_t sum_{i < t} kappa1(k_i, w_t) u_i;  o_t = sum_{i <= t} kappa2(k_i, q_t) u_i

    With a cumulative decay G, G_t - G_i is added to the logits of a softmax, and exp(G_t - G_i) multiplies the other
    kernels.

    For softmax attention u = v. Kernels have their scale filled in.

    Attributes:
      op: name of the public function, for messages.
      q: [B, T, H, K].
      k: [B, T, G, K].
      v: [B, T, G, V].
      w: erase vector [B, T, G, K]; None is k. DeltaFormer only, as alpha and beta.
      alpha: write strength [B, T, G]; None is 1.
      beta: erase strength [B, T, G]; None is 1.
      decay: cumulative log decay, from `running_decay`, of the tokens; those of the slots are in the cache. [B, T, H],
        or [B, T, G] in DeltaFormer; None is 0. With a cache per document it starts from 0 in each, and slots of the
        cache have what lies between them and the last one in use.
      sinks: logit per head of a slot with value 0 that every query sees, [H] or [B, H]; None is no such slot.
      write_kernel: kappa1; None for softmax attention.
      read_kernel: kappa2.
      mask: segments and ranks of cached slots and of tokens.
      causal: whether a query sees only slots up to its own.
      window: how many tokens back a query sees, itself included, or None.
      cache: state before the call, or None; `.k` and `.values` are [B, S, G, K] and [B, S, G, V].
      documents: whether the slots are those of several documents per row, each with its own cache.
      precision: of matrix products.
      chunk_size: side of a tile, or None where the implementation chooses.
    """

    op: str
    q: Array
    k: Array
    v: Array
    w: Array | None
    alpha: Array | None
    beta: Array | None
    decay: CumulativeDecay | None
    sinks: Array | None
    write_kernel: Kernel | None
    read_kernel: Kernel
    mask: Mask
    causal: bool
    window: int | None
    cache: Any
    documents: bool
    precision: lax.Precision
    chunk_size: int | None
