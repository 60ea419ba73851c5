"""The base class of memory layers: projections, short convolution, positions, gate, norm, state."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check_array, check_choice, check_size
from memformer.core.numerics import l2norm
from memformer.core.segments import find_segments
from memformer.core.types import Array, Float, Int
from memformer.layers.basic import Dtypes, RMSNorm, constrain, linear
from memformer.layers.convolution import ShortConvolution
from memformer.layers.positions import count_positions, next_position, rotate
from memformer.layers.sharding import auto_axes, state_letters

__all__ = ["GATES", "MemoryLayer", "State"]

State = Mapping[str, Any]
GATES = {"silu": nnx.silu, "sigmoid": nnx.sigmoid}


class MemoryLayer(nnx.Module):
    """Projects x to queries, keys and values, and passes them through the op of a memory.

        q, k, v = W x        (optionally: short convolution, rotary positions, unit length)
        o, state = op(q, k, v, ...)
        y = Wo (norm(o) * gate(x))

    A subclass chooses the op: `_apply_op` calls it, and `_init_memory` returns its empty state.

    Args:
      width: D.
      heads: H.
      key_width: K; None is D // H.
      value_width: V; None is K.
      conv_width: width of the short convolution on q, k and v; 0 for none.
      unit_keys: keys (and erase vectors) are normalized to unit length.
      unit_queries: queries are normalized to unit length.
      rotary: rotary positions on q and k.
      output_norm: RMSNorm of the output, per head.
      output_gate: None, "silu" or "sigmoid": activation of a projection of x that multiplies the output.
      dtypes: the dtype policy.
      rngs: random streams.
      head_counts: number of heads of q, k and v where not all are H (set by subclasses).
      writes: N, writes per token; None for a single one, without an axis (set by subclasses).

    Raises:
      ValueError: a width that heads does not divide where key_width is None, rotary positions on an odd key_width, or
        an unknown choice.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        key_width: int | None = None,
        value_width: int | None = None,
        conv_width: int = 0,
        unit_keys: bool = False,
        unit_queries: bool = False,
        rotary: bool = False,
        output_norm: bool = False,
        output_gate: str | None = None,
        dtypes: Dtypes | None = None,
        rngs: nnx.Rngs,
        head_counts: tuple[int, int, int] | None = None,
        writes: int | None = None,
    ):
        dtypes = Dtypes() if dtypes is None else dtypes
        width, heads = check_size("width", width), check_size("heads", heads)
        if key_width is None and width % heads:
            raise ValueError(f"width must be a multiple of heads where key_width is None, got {width} and {heads}")
        check_choice("output_gate", output_gate, (None, *GATES))
        self.width, self.heads, self.dtypes, self.writes = width, heads, dtypes, writes
        self.key_width = width // heads if key_width is None else check_size("key_width", key_width)
        self.value_width = self.key_width if value_width is None else check_size("value_width", value_width)
        if rotary and self.key_width % 2:
            raise ValueError(f"rotary positions require an even key_width, got {self.key_width}")
        self.head_counts = (heads, heads, heads) if head_counts is None else head_counts
        self.unit_keys, self.unit_queries, self.rotary = unit_keys, unit_queries, rotary
        sizes = self._sizes()
        self.projections = nnx.Dict(
            {name: linear(width, sizes[name], ("embed", "heads"), dtypes=dtypes, rngs=rngs) for name in sizes}
        )
        self.convolutions: Any = nnx.data(None)
        if conv_width:
            self.convolutions = nnx.Dict(
                {name: ShortConvolution(sizes[name], conv_width, dtypes=dtypes, rngs=rngs) for name in sizes}
            )
        size = heads * self.value_width
        self.out = linear(size, width, ("heads", "embed"), dtypes=dtypes, rngs=rngs)
        self.norm = RMSNorm(self.value_width, dtypes=dtypes, rngs=rngs) if output_norm else nnx.data(None)
        self.output_gate = output_gate
        self.gate: Any = nnx.data(None)
        if output_gate is not None:
            self.gate = linear(width, size, ("embed", "heads"), dtypes=dtypes, rngs=rngs)

    def _sizes(self) -> dict[str, int]:
        query, key, value = self.head_counts
        writes = self.writes or 1
        return {
            "query": query * self.key_width,
            "key": key * writes * self.key_width,
            "value": value * writes * self.value_width,
        }

    def _apply_op(self, x: Array, parts: dict[str, Array], segment_ids: Array | None, memory: Any) -> tuple:
        """Calls the op on parts q, k, v (and w); returns (o [B, T, H, V], memory)."""
        raise NotImplementedError(f"{type(self).__name__} has no op")

    def _init_memory(self, batch: int, capacity: int, dtype: jnp.dtype) -> Any:
        """The empty state of the op; by default a K x V matrix per head."""
        return jnp.zeros((batch, self.heads, self.key_width, self.value_width), self.dtypes.wide)

    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> State:
        """The state before the first token.

        Args:
          batch: B.
          capacity: number of tokens that a cache has room for; a fixed state ignores it.
          dtype: of the cache; None is the compute dtype.

        Raises:
          ValueError: a batch or capacity that is not a positive integer.
        """
        batch, capacity = check_size("batch", batch), check_size("capacity", capacity)
        dtype = self.dtypes.compute if dtype is None else jnp.dtype(dtype)
        state = {"memory": self._init_memory(batch, capacity, dtype)}
        if self.convolutions is not None:
            state["convolution"] = {name: c.init_state(batch) for name, c in self.convolutions.items()}
        if self.rotary:
            state["position"] = jnp.zeros(batch, jnp.int32)
        return state

    @auto_axes
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Returns (y, state); a call with that state continues the last segment.

        Args:
          x: input.
          segment_ids: packed sequences, 0 = padding; see `memformer.core.segments`.
          positions: for rotary positions; None counts within each segment.
          state: from the previous call or from `init_state`; None is the empty memory.

        Raises:
          ValueError: an array of wrong shape or dtype.
        """
        dims = {"D": self.width}
        x = check_array("x", x, "B T D", dims)
        segments = find_segments(segment_ids, dims)
        before = {} if state is None else state
        after: dict[str, Any] = {}
        if self.rotary:
            if positions is None:
                positions = count_positions(segments, (dims["B"], dims["T"]), before.get("position"))
            positions = check_array("positions", positions, "B T", dims, kind=jnp.integer)
            after["position"] = next_position(positions, segments)
        parts, convolved = self._project(x, segments, before.get("convolution"))
        if convolved:
            after["convolution"] = convolved
        parts = self._shape(parts, positions)
        o, after["memory"] = self._apply_op(x, parts, segment_ids, before.get("memory"))
        return self._output(x, o), after

    def state_letters(self, state: State) -> Any:
        """The letters of the arrays of a state."""
        letters = state_letters(state)
        if isinstance(letters["memory"], str):
            letters["memory"] = "B H K V"
        if "convolution" in letters:
            letters["convolution"] = dict.fromkeys(letters["convolution"], "B W C")
        return letters

    def _project(self, x: Array, segments: Any, state: State | None) -> tuple[dict, dict]:
        parts: dict[str, Array] = {}
        convolved: dict[str, Array] = {}
        for name, projection in self.projections.items():
            parts[name] = projection(x)
            if self.convolutions is not None:
                last = None if state is None else state[name]
                convolution = self.convolutions[name]
                parts[name], convolved[name] = convolution(parts[name], segments=segments, state=last)
        return parts, convolved

    def _shape(self, projected: dict[str, Array], positions: Array | None) -> dict[str, Array]:
        """Splits heads: q is [B, T, H, K]; k, v and w are too, or [B, T, N, H, K] for N writes per token."""
        query, key, value = self.head_counts
        parts = {
            "q": self._heads(projected["query"], query, None, self.key_width),
            "k": self._heads(projected["key"], key, self.writes, self.key_width),
            "v": self._heads(projected["value"], value, self.writes, self.value_width),
        }
        if "write_query" in projected:
            parts["w"] = self._heads(projected["write_query"], key, self.writes, self.key_width)
        for name in ("q", "k", "w"):
            if name not in parts:
                continue
            if self.unit_queries if name == "q" else self.unit_keys:
                parts[name] = l2norm(parts[name])
            if positions is not None and self.rotary:
                parts[name] = rotate(parts[name], positions)
        return parts

    def _heads(self, x: Array, heads: int, writes: int | None, width: int) -> Array:
        if writes is None:
            x = x.reshape(*x.shape[:2], heads, width)
            return constrain(x, "activation_batch", "activation_time", "activation_heads", None)
        # Heads are outermost in the fused axis, so that sharding the axis shards heads.
        x = jnp.moveaxis(x.reshape(*x.shape[:2], heads, writes, width), 3, 2)
        return constrain(x, "activation_batch", "activation_time", None, "activation_heads", None)

    def _output(self, x: Array, o: Array) -> Array:
        o = o if self.norm is None else self.norm(o)
        o = o.reshape(*o.shape[:2], -1)
        if self.output_gate is not None:
            o = o * GATES[self.output_gate](self.gate(x))
        y = self.out(o)
        return constrain(y, "activation_batch", "activation_time", "activation_embed")
