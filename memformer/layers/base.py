"""What every memory layer shares: projections, short convolution, positions, gate, norm, state."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check_array
from memformer.core.numerics import l2norm
from memformer.core.segments import find_segments
from memformer.core.types import Array, Float, Int
from memformer.layers.basic import Dtypes, RMSNorm, constrain, linear
from memformer.layers.convolution import ShortConvolution
from memformer.layers.positions import count_positions, next_position, rotate

__all__ = ["GATES", "MemoryLayer", "State", "check_choice", "check_groups", "check_size"]

State = Mapping[str, Any]
GATES = {"silu": nnx.silu, "sigmoid": nnx.sigmoid}


def check_choice(what: str, value: Any, known: tuple) -> None:
    """Raises ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(repr(k) for k in known)}, got {value!r}")


def check_size(what: str, value: Any) -> None:
    """Raises ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a positive integer, got {value!r}")


def check_groups(heads: int, groups: int | None) -> int:
    """The number of key/value heads (None is all), which must divide `heads`."""
    check_size("heads", heads)
    groups = heads if groups is None else groups
    check_size("groups", groups)
    if heads % groups:
        raise ValueError(f"groups must divide heads, got groups = {groups} and heads = {heads}")
    return groups


class MemoryLayer(nnx.Module):
    """Queries, keys and values of x, written to and read from a memory by one op.

        q, k, v = W x        (short convolution, rotary positions, unit length where asked for)
        o, state = op(q, k, v, ...)
        y = Wo (norm(o) * gate(x))

    A subclass says which op: `_recall` calls it, `_init_memory` gives its empty state.

    Args:
      width: D.
      heads: H.
      key_width: K; None is D // H.
      value_width: V; None is K.
      conv_width: width of the short convolution on q, k and v; 0 for none.
      unit_keys: keys (and write queries) are divided by their length.
      unit_queries: queries are divided by their length.
      rotary: rotary positions on q and k.
      output_norm: RMSNorm of each head's output.
      output_gate: None, "silu" or "sigmoid" of a projection of x, times the output.
      dtypes: the dtype policy.
      rngs: random streams.
      head_counts: heads of q, k and v where they are not all H (set by subclasses).
      writes: pairs (k, v) a token, None for one and no axis for them (set by subclasses).

    Raises:
      ValueError: a width not divisible by heads where key_width is None, rotary positions on an odd key_width, or an
        unknown choice.
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
        for name, size in (("width", width), ("heads", heads)):
            check_size(name, size)
        if key_width is None and width % heads:
            raise ValueError(f"width must be a multiple of heads where key_width is None, got {width} and {heads}")
        check_choice("output_gate", output_gate, (None, *GATES))
        self.width, self.heads, self.dtypes, self.writes = width, heads, dtypes, writes
        self.key_width = width // heads if key_width is None else key_width
        self.value_width = self.key_width if value_width is None else value_width
        check_size("key_width", self.key_width)
        check_size("value_width", self.value_width)
        if rotary and self.key_width % 2:
            raise ValueError(f"rotary positions need an even key_width, got {self.key_width}")
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

    def _recall(self, x: Array, parts: dict[str, Array], segment_ids: Array | None, memory: Any) -> tuple:
        """Calls the op on parts q, k, v (and w): (o [B, T, H, V], memory)."""
        raise NotImplementedError(f"{type(self).__name__} has no op")

    def _init_memory(self, batch: int, capacity: int, dtype: jnp.dtype) -> Any:
        """The op's empty state; of a fixed matrix by default."""
        return jnp.zeros((batch, self.heads, self.key_width, self.value_width), self.dtypes.wide)

    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> State:
        """The state before the first token.

        Args:
          batch: B.
          capacity: tokens that an attention-like memory has room for; a fixed state needs none.
          dtype: of an attention-like memory's cache; None is the compute dtype.

        Raises:
          ValueError: a batch or capacity that is no positive integer.
        """
        check_size("batch", batch)
        check_size("capacity", capacity)
        dtype = self.dtypes.compute if dtype is None else jnp.dtype(dtype)
        state = {"memory": self._init_memory(batch, capacity, dtype)}
        if self.convolutions is not None:
            state["convolution"] = {name: c.init_state(batch) for name, c in self.convolutions.items()}
        if self.rotary:
            state["position"] = jnp.zeros(batch, jnp.int32)
        return state

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
          x: the layer's input.
          segment_ids: 0 = padding; the rule of `memformer.core.segments`.
          positions: for rotary positions; None counts within each segment.
          state: of the last call, or of `init_state`.

        Raises:
          ValueError: an array of another shape or dtype.
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
        o, after["memory"] = self._recall(x, parts, segment_ids, before.get("memory"))
        return self._output(x, o), after

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
        """Heads apart: q [B, T, H, K]; k, v and w too, or [B, T, N, H, K] for N writes a token."""
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
        # Heads outermost in the fused axis, so that sharding it shards heads.
        x = jnp.moveaxis(x.reshape(*x.shape[:2], heads, writes, width), 3, 2)
        return constrain(x, "activation_batch", "activation_time", None, "activation_heads", None)

    def _output(self, x: Array, o: Array) -> Array:
        o = o if self.norm is None else self.norm(o)
        o = o.reshape(*o.shape[:2], -1)
        if self.output_gate is not None:
            o = o * GATES[self.output_gate](self.gate(x))
        y = self.out(o)
        return constrain(y, "activation_batch", "activation_time", "activation_embed")
