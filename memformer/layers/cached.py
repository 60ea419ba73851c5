"""Attention layers, whose state is a cache: softmax attention and DeltaFormer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from memformer.core.checks import check_choice, check_groups, check_options, check_positive
from memformer.core.similarity import Kernel, resolve_kernel
from memformer.layers.base import MemoryLayer
from memformer.layers.basic import named
from memformer.layers.gates import DECAYS, SigmoidGate
from memformer.ops.attention.cache import init_cache
from memformer.ops.deltaformer import deltaformer
from memformer.ops.softmax_attention import softmax_attention

__all__ = ["DeltaFormer", "SoftmaxAttention"]


class SoftmaxAttention(MemoryLayer):
    """Softmax attention with optional grouped key/value heads, sliding window and rotary positions.

    Args:
      width: D.
      heads: H.
      groups: G, number of key/value heads; None is H.
      window: number of most recent tokens that a query sees, itself included; None for all.
      decay: log decay per head of what is older, "forget", "step" or "fixed" of `DECAYS`; None for none.
      sinks: a learned logit per head of a slot that holds nothing.
      rngs: random streams.
      **options: of `MemoryLayer`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        groups: int | None = None,
        window: int | None = None,
        decay: str | None = None,
        sinks: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.groups, self.window = check_groups(heads, groups), check_positive("window", window)
        counts = (heads, self.groups, self.groups)
        super().__init__(width, heads=heads, head_counts=counts, rngs=rngs, **options)
        self.decay = _head_decay(decay, self, heads, rngs)
        self.sink_bias = nnx.data(None)
        if sinks:
            self.sink_bias = nnx.Param(
                named(nnx.initializers.zeros, "heads")(rngs.params(), (heads,), self.dtypes.param)
            )

    def _apply_op(self, x, parts, segment_ids, memory):
        decay = None if self.decay is None else self.decay(x)[0]
        sinks = None if self.sink_bias is None else self.sink_bias[...]
        how: dict[str, Any] = {"window": self.window, "decay": decay, "sinks": sinks}
        return softmax_attention(**parts, **how, segment_ids=segment_ids, initial_state=memory)

    def _init_memory(self, batch, capacity, dtype):
        sizes: dict[str, Any] = {"groups": self.groups, "key_width": self.key_width, "value_width": self.value_width}
        sizes["decay_heads"] = None if self.decay is None else self.heads
        return init_cache("softmax_attention", batch=batch, capacity=capacity, dtype=dtype, **sizes)


class DeltaFormer(MemoryLayer):
    """The delta rule with any similarity, whose state is a cache.

    Args:
      width: D.
      heads: H.
      groups: G, number of key/value heads; None is H.
      write_kernel: similarity of writes: a `Kernel`, its name, or a mapping of its fields such as
        {"name": "round", "decimals": 2}.
      read_kernel: similarity of reads, likewise.
      write_query: w has its own projection; False is w = k.
      alpha: "sigmoid" for a learned alpha in (0, 1); None for 1.
      beta_limit: beta is beta_limit * sigmoid(.); None for 1.
      decay: log decay per key/value head of earlier writes, as in `SoftmaxAttention`.
      window: number of most recent tokens that a token writes and reads, itself included; None for all.
      rngs: random streams.
      **options: of `MemoryLayer`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        groups: int | None = None,
        write_kernel: Any = "softmax",
        read_kernel: Any = "softmax",
        write_query: bool = False,
        alpha: str | None = None,
        beta_limit: float | None = None,
        decay: str | None = None,
        window: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_choice("alpha", alpha, (None, "sigmoid"))
        self.groups, self.write_query = check_groups(heads, groups), write_query
        self.write_kernel = _kernel("write_kernel", write_kernel)
        self.read_kernel = _kernel("read_kernel", read_kernel)
        counts = (heads, self.groups, self.groups)
        super().__init__(width, heads=heads, head_counts=counts, rngs=rngs, **options)
        self.window, self.decay = check_positive("window", window), _head_decay(decay, self, self.groups, rngs)
        self.alpha, self.beta = nnx.data(None), nnx.data(None)
        if alpha is not None:
            self.alpha = SigmoidGate(width, self.groups, 1.0, dtypes=self.dtypes, rngs=rngs)
        if beta_limit is not None:
            self.beta = SigmoidGate(width, self.groups, beta_limit, dtypes=self.dtypes, rngs=rngs)

    def _sizes(self):
        sizes = super()._sizes()
        return {**sizes, "write_query": sizes["key"]} if self.write_query else sizes

    def _apply_op(self, x, parts, segment_ids, memory):
        return deltaformer(
            **parts,
            alpha=None if self.alpha is None else self.alpha(x),
            beta=None if self.beta is None else self.beta(x),
            decay=None if self.decay is None else self.decay(x)[0],
            window=self.window,
            write_kernel=self.write_kernel,
            read_kernel=self.read_kernel,
            segment_ids=segment_ids,
            initial_state=memory,
        )

    def _init_memory(self, batch, capacity, dtype):
        sizes: dict[str, Any] = {"groups": self.groups, "key_width": self.key_width, "value_width": self.value_width}
        sizes["decay_heads"] = None if self.decay is None else self.groups
        return init_cache("deltaformer", batch=batch, capacity=capacity, dtype=dtype, **sizes)


def _head_decay(decay: str | None, layer: MemoryLayer, heads: int, rngs: nnx.Rngs) -> Any:
    """Builds a decay module with one decay per head; None for no decay."""
    check_choice("decay", decay, (None, "forget", "step", "fixed"))
    if decay is None:
        return nnx.data(None)
    return DECAYS[decay](layer.width, heads, layer.key_width, None, dtypes=layer.dtypes, rngs=rngs)


def _kernel(name: str, kernel: Any) -> Kernel:
    if isinstance(kernel, Mapping):
        check_options(name, kernel, [field.name for field in dataclasses.fields(Kernel)])
        return Kernel(**kernel)
    return resolve_kernel(name, kernel)
