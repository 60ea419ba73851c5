"""The base class of memory layers: projections, short convolution, positions, gate, norm, state."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from memformer.core.checks import check_array, check_choice, check_flags, check_number, check_positive, check_size
from memformer.core.numerics import l2norm
from memformer.core.segments import find_segments
from memformer.core.types import Array, Float, Int
from memformer.layers.basic import Dtypes, GroupRMSNorm, RMSNorm, constrain, constrain_residual, linear
from memformer.layers.convolution import ShortConvolution
from memformer.layers.positions import check_rotary, count_positions, next_position, rotate
from memformer.layers.sharding import auto_axes, state_letters

__all__ = ["GATES", "MemoryLayer", "State"]

State = Mapping[str, Any]
GATES = {"silu": nnx.silu, "sigmoid": nnx.sigmoid}
QK_NORMS = (None, "head", "width")


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
      conv_bias: adds biases to the short convolution (Mamba-2).
      unit_keys: keys (and erase vectors) are normalized to unit length.
      unit_queries: queries are normalized to unit length.
      l2norm_epsilon: of unit length, x / sqrt(|x|^2 + l2norm_epsilon^2); 1e-3 is FLA's and Qwen3-Next's convention.
      qk_norm: None, or RMSNorm of queries and keys, before they are rotated: of each "head" (Qwen3), or over the
        "width" of all heads (OLMo 2).
      norm_epsilon: added to the mean square in the norms of this layer.
      zero_centered_norm: the norms of `qk_norm` multiply by 1 + scale (Qwen3-Next).
      qkv_bias: adds biases to the projections to q, k and v (Qwen2).
      out_bias: adds a bias to the output projection (GPT-2).
      rotary: rotary positions on q and k.
      rope_theta: base of the rotary rates.
      partial_rotary_factor: fraction of the key width that is rotated, the first channels (Qwen3-Next).
      rope_scaling: None, or a mapping with rope_type "llama3" and its fields, as in Hugging Face configs.
      output_norm: True for RMSNorm of the output per head, with one scale for all; "group" for RMSNorm over the heads
        that share a key, each channel with its own scale (Mamba-2).
      output_gate: None, "silu" or "sigmoid": activation of a projection of x that multiplies the output.
      output_gate_rank: of that projection, as a product of two matrices (Kimi Linear); None for one matrix.
      output_gate_bias: adds a bias to that projection (KDA).
      norm_before_gate: False multiplies by the gate first, and then normalises (Mamba-2).
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
        conv_bias: bool = False,
        unit_keys: bool = False,
        unit_queries: bool = False,
        l2norm_epsilon: float = 1e-6,
        qk_norm: str | None = None,
        norm_epsilon: float = 1e-6,
        zero_centered_norm: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = False,
        rotary: bool = False,
        rope_theta: float = 1e4,
        partial_rotary_factor: float = 1.0,
        rope_scaling: Mapping[str, Any] | None = None,
        output_norm: bool | str = False,
        output_gate: str | None = None,
        output_gate_rank: int | None = None,
        output_gate_bias: bool = False,
        norm_before_gate: bool = True,
        dtypes: Dtypes | None = None,
        rngs: nnx.Rngs,
        head_counts: tuple[int, int, int] | None = None,
        writes: int | None = None,
    ):
        dtypes = Dtypes() if dtypes is None else dtypes
        check_flags(conv_bias=conv_bias, unit_keys=unit_keys, unit_queries=unit_queries, rotary=rotary)
        check_flags(zero_centered_norm=zero_centered_norm, qkv_bias=qkv_bias, out_bias=out_bias)
        check_flags(output_gate_bias=output_gate_bias, norm_before_gate=norm_before_gate)
        width, heads = check_size("width", width), check_size("heads", heads)
        if key_width is None and width % heads:
            raise ValueError(f"width must be a multiple of heads where key_width is None, got {width} and {heads}")
        check_choice("output_gate", output_gate, (None, *GATES))
        self.width, self.heads, self.dtypes, self.writes = width, heads, dtypes, writes
        self.key_width = width // heads if key_width is None else check_size("key_width", key_width)
        self.value_width = self.key_width if value_width is None else check_size("value_width", value_width)
        self.head_counts = (heads, heads, heads) if head_counts is None else head_counts
        self.unit_keys, self.unit_queries, self.rotary = unit_keys, unit_queries, rotary
        self.l2norm_epsilon = check_number("l2norm_epsilon", l2norm_epsilon, above=0)
        self.norm_epsilon = check_number("norm_epsilon", norm_epsilon, above=0)
        self.rope_theta, self.rotated = rope_theta, 0
        self.rope_scaling: FrozenDict[str, Any] | None = None
        if rotary:
            self.rotated = check_rotary(self.key_width, rope_theta, partial_rotary_factor, rope_scaling)
            self.rope_scaling = None if rope_scaling is None else FrozenDict(rope_scaling)
        sizes = self._sizes()
        same: dict[str, Any] = {"dtypes": dtypes, "rngs": rngs}
        self.projections = nnx.Dict(
            {name: linear(width, sizes[name], ("embed", "heads"), bias=qkv_bias, **same) for name in sizes}
        )
        self.qk_norms = self._build_qk_norms(qk_norm, zero_centered_norm, rngs)
        self.convolutions: Any = nnx.data(None)
        if conv_width:
            self.convolutions = nnx.Dict(
                {name: ShortConvolution(sizes[name], conv_width, bias=conv_bias, **same) for name in sizes}
            )
        self.out = linear(heads * self.value_width, width, ("heads", "embed"), bias=out_bias, **same)
        self.norm = self._build_output_norm(output_norm, rngs)
        self.output_gate, self.norm_before_gate = output_gate, norm_before_gate
        self.gate, self.gate_down = self._build_gate(output_gate_rank, output_gate_bias, rngs)

    def _sizes(self) -> dict[str, int]:
        query, key, value = self.head_counts
        writes = self.writes or 1
        return {
            "query": query * self.key_width,
            "key": key * writes * self.key_width,
            "value": value * writes * self.value_width,
        }

    def _build_qk_norms(self, qk_norm: str | None, zero_centered: bool, rngs: nnx.Rngs) -> Any:
        """Norms of the projections to queries and keys, by name of the projection."""
        check_choice("qk_norm", qk_norm, QK_NORMS)
        self.qk_norm = qk_norm
        if qk_norm is None:
            return nnx.data(None)
        sizes = {name: size for name, size in self._sizes().items() if name != "value"}
        if qk_norm == "head":
            sizes = dict.fromkeys(sizes, self.key_width)
        same: dict[str, Any] = {"epsilon": self.norm_epsilon, "dtypes": self.dtypes, "rngs": rngs}
        return nnx.Dict({name: RMSNorm(size, zero_centered=zero_centered, **same) for name, size in sizes.items()})

    def _build_output_norm(self, output_norm: bool | str, rngs: nnx.Rngs) -> Any:
        check_choice("output_norm", output_norm, (False, True, "group"))
        self.output_norm = output_norm
        same: dict[str, Any] = {"epsilon": self.norm_epsilon, "dtypes": self.dtypes, "rngs": rngs}
        if output_norm == "group":
            return GroupRMSNorm(self.heads * self.value_width, self.head_counts[1], **same)
        return RMSNorm(self.value_width, **same) if output_norm else nnx.data(None)

    def _build_gate(self, rank: int | None, bias: bool, rngs: nnx.Rngs) -> tuple[Any, Any]:
        """The projections of the output gate: (up, down), where down is None without a rank."""
        rank = check_positive("output_gate_rank", rank)
        if self.output_gate is None:
            return nnx.data(None), nnx.data(None)
        size = self.heads * self.value_width
        same: dict[str, Any] = {"dtypes": self.dtypes, "rngs": rngs}
        if rank is None:
            return linear(self.width, size, ("embed", "heads"), bias=bias, **same), nnx.data(None)
        return linear(rank, size, (None, "heads"), bias=bias, **same), linear(self.width, rank, ("embed", None), **same)

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
        # Also of the gradient, which would otherwise enter the op as the tokens lie between layers.
        o = constrain(o, "activation_batch", "activation_time", "activation_heads", None)
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
            if self.qk_norm == "width" and name in self.qk_norms:
                parts[name] = self.qk_norms[name](parts[name])
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
        for name, projection in (("q", "query"), ("k", "key"), ("w", "write_query")):
            if name not in parts:
                continue
            if self.qk_norm == "head":
                parts[name] = self.qk_norms[projection](parts[name])
            if self.unit_queries if name == "q" else self.unit_keys:
                parts[name] = l2norm(parts[name], self.l2norm_epsilon)
            if positions is not None and self.rotary:
                parts[name] = rotate(
                    parts[name], positions, self.rope_theta, rotated=self.rotated, scaling=self.rope_scaling
                )
        return parts

    def _heads(self, x: Array, heads: int, writes: int | None, width: int) -> Array:
        if writes is None:
            x = x.reshape(*x.shape[:2], heads, width)
            return constrain(x, "activation_batch", "activation_time", "activation_heads", None)
        # Heads are outermost in the fused axis, so that sharding the axis shards heads.
        x = jnp.moveaxis(x.reshape(*x.shape[:2], heads, writes, width), 3, 2)
        return constrain(x, "activation_batch", "activation_time", None, "activation_heads", None)

    def _output(self, x: Array, o: Array) -> Array:
        gate = None
        if self.output_gate is not None:
            gate = GATES[self.output_gate](self.gate(x if self.gate_down is None else self.gate_down(x)))
        if gate is not None and not self.norm_before_gate:
            o = o * gate.reshape(o.shape)
        if self.norm is not None and self.output_norm != "group":
            o = self.norm(o)
        o = o.reshape(*o.shape[:2], -1)
        if self.output_norm == "group":
            o = self.norm(o)
        if gate is not None and self.norm_before_gate:
            o = o * gate
        return constrain_residual(self.out(o))
