"""Attention layers, whose state is a cache: softmax attention and DeltaFormer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import (
    check,
    check_at_least,
    check_choice,
    check_flags,
    check_groups,
    check_number,
    check_options,
    check_positive,
    check_size,
)
from memformer.core.similarity import Kernel, resolve_kernel
from memformer.core.types import Array, Float
from memformer.layers.base import MemoryLayer
from memformer.layers.basic import RMSNorm, linear, named
from memformer.layers.gates import DECAYS, SigmoidGate
from memformer.ops.attention.cache import init_cache
from memformer.ops.deltaformer import deltaformer
from memformer.ops.softmax_attention import softmax_attention

__all__ = ["DeltaFormer", "Latent", "SoftmaxAttention"]


class SoftmaxAttention(MemoryLayer):
    """Softmax attention with optional grouped key/value heads, sliding window and rotary positions.

    Args:
      width: D.
      heads: H.
      groups: G, number of key/value heads; None is H.
      window: number of most recent tokens that a query sees, itself included; None for all.
      decay: log decay per head of what is older, "forget", "step" or "fixed" of `DECAYS`; None for none.
      decay_time: of "forget", how slowly its heads forget at first: `time` of `ForgetDecay`.
      sinks: a learned logit per head of a slot that holds nothing.
      latent_rank: keys and values are projected from one latent vector of this width per token (`Latent`); None for
        projections of x. The cache holds the keys and values of all heads.
      shared_key_width: last channels of a key that all heads share.
      rngs: random streams.
      **options: of `MemoryLayer`.

    Source: arXiv 2405.04434 section 2.1.2 (latents).
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        groups: int | None = None,
        window: int | None = None,
        decay: str | None = None,
        decay_time: tuple[float, float] | None = None,
        sinks: bool = False,
        latent_rank: int | None = None,
        shared_key_width: int = 0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.groups, self.window = check_groups(heads, groups), check_positive("window", window)
        self.latent_rank = check_positive("latent_rank", latent_rank)
        check_flags(sinks=sinks)
        counts = (heads, self.groups, self.groups)
        super().__init__(width, heads=heads, head_counts=counts, rngs=rngs, **options)
        self.decay = _head_decay(decay, decay_time, self, heads, rngs)
        self.sink_bias = nnx.data(None)
        if sinks:
            self.sink_bias = nnx.Param(
                named(nnx.initializers.zeros, "heads")(rngs.params(), (heads,), self.dtypes.param)
            )
        self.latent: Any = nnx.data(None)
        shared_key_width = check_at_least("shared_key_width", shared_key_width, 0)
        if latent_rank is not None:
            self.latent = Latent(self, latent_rank, shared_key_width, rngs=rngs)
        else:
            check(shared_key_width == 0, "shared_key_width", "0 without a latent_rank", shared_key_width)

    def _sizes(self):
        sizes = super()._sizes()
        return sizes if self.latent_rank is None else {"query": sizes["query"]}

    def _project(self, x, segments, state):
        parts, convolved = super()._project(x, segments, state)
        return (parts if self.latent is None else {**parts, **self.latent(x)}), convolved

    def _apply_op(self, x, parts, segment_ids, memory):
        decay = None if self.decay is None else self.decay(x)[0]
        sinks = None if self.sink_bias is None else self.sink_bias[...]
        how: dict[str, Any] = {"window": self.window, "decay": decay, "sinks": sinks}
        return softmax_attention(**parts, **how, segment_ids=segment_ids, initial_state=memory)

    def _init_memory(self, batch, capacity, dtype):
        sizes: dict[str, Any] = {"groups": self.groups, "key_width": self.key_width, "value_width": self.value_width}
        sizes["decay_heads"] = None if self.decay is None else self.heads
        return init_cache("softmax_attention", batch=batch, capacity=capacity, dtype=dtype, **sizes)


class Latent(nnx.Module):
    """Keys and values of all heads from one latent vector per token, and a part of the keys that all heads share.

        [c, s] = Wd x;   [k_h, v_h] = Wu rms(c);   key of head h = [k_h, s]

    Args:
      layer: the attention layer, for its sizes.
      rank: width of c.
      shared: width of s.
      rngs: random streams.

    Raises:
      ValueError: a shared part that is not narrower than the keys.
    """

    def __init__(self, layer: MemoryLayer, rank: int, shared: int, *, rngs: nnx.Rngs):
        check(shared < layer.key_width, "shared_key_width", f"below key_width = {layer.key_width}", shared)
        same: dict[str, Any] = {"dtypes": layer.dtypes, "rngs": rngs}
        self.groups, self.rank, self.own = layer.head_counts[1], rank, layer.key_width - shared
        self.down = linear(layer.width, rank + shared, ("embed", None), **same)
        self.norm = RMSNorm(rank, epsilon=layer.norm_epsilon, **same)
        self.up = linear(rank, self.groups * (self.own + layer.value_width), (None, "heads"), **same)

    def __call__(self, x: Float[Array, "B T D"]) -> dict[str, Array]:
        """Keys and values, heads side by side: [B, T, G K] and [B, T, G V]."""
        latent, shared = jnp.split(self.down(x), (self.rank,), axis=-1)
        parts = self.up(self.norm(latent)).reshape(*x.shape[:2], self.groups, -1)
        own, value = jnp.split(parts, (self.own,), axis=-1)
        shared = jnp.broadcast_to(shared[:, :, None], (*own.shape[:3], shared.shape[-1]))
        key = jnp.concatenate([own, shared], axis=-1)
        return {"key": key.reshape(*x.shape[:2], -1), "value": value.reshape(*x.shape[:2], -1)}


class DeltaFormer(MemoryLayer):
    """The delta rule with any similarity, whose state is a cache.

    Args:
      width: D.
      heads: H.
      groups: G, number of key/value heads; None is H.
      steps: N, writes per token in order, each with its own key, value, w, alpha and beta; the token reads after the
        last. The cache has N slots per token.
      write_kernel: similarity of writes: a `Kernel`, its name, or a mapping of its fields such as
        {"name": "round", "decimals": 2}.
      read_kernel: similarity of reads, likewise.
      write_query: w has its own projection; False is w = k.
      alpha: "sigmoid" for a learned alpha in (0, 1); None for 1.
      beta_limit: beta is beta_limit * sigmoid(.); None for 1.
      decay, decay_time: log decay per key/value head of earlier writes, as in `SoftmaxAttention`.
      window: number of most recent tokens that a token writes and reads, itself included; None for all, which several
        steps require.
      rngs: random streams.
      **options: of `MemoryLayer`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        groups: int | None = None,
        steps: int = 1,
        write_kernel: Any = "softmax",
        read_kernel: Any = "softmax",
        write_query: bool = False,
        alpha: str | None = None,
        beta_limit: float | None = None,
        decay: str | None = None,
        decay_time: tuple[float, float] | None = None,
        window: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        check_choice("alpha", alpha, (None, "sigmoid"))
        check_flags(write_query=write_query)
        self.groups, self.write_query = check_groups(heads, groups), write_query
        self.write_kernel = _kernel("write_kernel", write_kernel)
        self.read_kernel = _kernel("read_kernel", read_kernel)
        counts = (heads, self.groups, self.groups)
        self.steps = check_size("steps", steps)
        writes = self.steps if self.steps > 1 else None
        super().__init__(width, heads=heads, head_counts=counts, writes=writes, rngs=rngs, **options)
        self.window = check_positive("window", window)
        check(self.window is None or self.steps == 1, "window", f"None with {self.steps} steps", window)
        self.decay = _head_decay(decay, decay_time, self, self.groups, rngs)
        self.alpha, self.beta = nnx.data(None), nnx.data(None)
        if alpha is not None:
            self.alpha = SigmoidGate(width, self.steps * self.groups, 1.0, dtypes=self.dtypes, rngs=rngs)
        if beta_limit is not None:
            beta_limit = check_number("beta_limit", beta_limit, above=0)
            self.beta = SigmoidGate(width, self.steps * self.groups, beta_limit, dtypes=self.dtypes, rngs=rngs)

    def _sizes(self):
        sizes = super()._sizes()
        return {**sizes, "write_query": sizes["key"]} if self.write_query else sizes

    def _apply_op(self, x, parts, segment_ids, memory):
        gates = {"alpha": self.alpha, "beta": self.beta}
        scalars: dict[str, Any] = {name: gate(x) for name, gate in gates.items() if gate is not None}
        if self.decay is not None:
            scalars["decay"] = self.decay(x)[0]
        if self.steps > 1:
            parts, scalars, segment_ids = self._one_write_per_row(parts, scalars, segment_ids)
        o, memory = deltaformer(
            **parts,
            **scalars,
            window=self.window,
            write_kernel=self.write_kernel,
            read_kernel=self.read_kernel,
            segment_ids=segment_ids,
            initial_state=memory,
        )
        return o[:, self.steps - 1 :: self.steps], memory

    def _one_write_per_row(self, parts, scalars, segment_ids):
        """Rows of time for the op, N per token; the query stands in all of them, the decay in the first."""
        n, tokens = self.steps, parts["q"].shape[:2]
        rows = (tokens[0], tokens[1] * n)
        parts = {name: x if name == "q" else x.reshape(*rows, *x.shape[3:]) for name, x in parts.items()}
        parts["q"] = jnp.repeat(parts["q"], n, axis=1)
        scalars = {name: x if name == "decay" else x.reshape(*rows, self.groups) for name, x in scalars.items()}
        if "decay" in scalars:
            decay = scalars["decay"][:, :, None]
            later = jnp.zeros((*tokens, n - 1, self.groups), decay.dtype)
            scalars["decay"] = jnp.concatenate([decay, later], axis=2).reshape(*rows, self.groups)
        return parts, scalars, None if segment_ids is None else jnp.repeat(jnp.asarray(segment_ids), n, axis=1)

    def _init_memory(self, batch, capacity, dtype):
        sizes: dict[str, Any] = {"groups": self.groups, "key_width": self.key_width, "value_width": self.value_width}
        sizes["decay_heads"] = None if self.decay is None else self.groups
        return init_cache("deltaformer", batch=batch, capacity=capacity * self.steps, dtype=dtype, **sizes)


def _head_decay(decay: str | None, time: Sequence[float] | None, layer: MemoryLayer, heads: int, rngs: nnx.Rngs) -> Any:
    """Builds a decay module with one decay per head; None for no decay."""
    check_choice("decay", decay, (None, "forget", "step", "fixed"))
    extra: dict[str, Any] = {}
    if time is not None:
        check(decay == "forget", "decay_time", f"None for decay {decay!r}", time)
        expected = "two numbers of tokens above 0, the smaller one first"
        check(isinstance(time, Sequence) and len(time) == 2, "decay_time", expected, time)
        extra["time"] = tuple(check_number("each of decay_time", tokens, above=0) for tokens in time)
        check(time[0] <= time[1], "decay_time", expected, time)
    if decay is None:
        return nnx.data(None)
    return DECAYS[decay](layer.width, heads, layer.key_width, None, dtypes=layer.dtypes, rngs=rngs, **extra)


def _kernel(name: str, kernel: Any) -> Kernel:
    if isinstance(kernel, Mapping):
        check_options(name, kernel, [field.name for field in dataclasses.fields(Kernel)])
        check("name" in kernel, name, "a mapping with a name", dict(kernel))
        return Kernel(**kernel)
    return resolve_kernel(name, kernel)
