"""The encoder and the decoder of a Transformer as separate modules."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from memformer.core.checks import check_array, check_size
from memformer.core.segments import find_segments
from memformer.core.types import Array, Dims, Float, Int
from memformer.layers.base import State
from memformer.layers.basic import Embedding, constrain, constrain_residual, dropout, linear, stochastic_keys
from memformer.layers.positions import count_positions, next_position
from memformer.layers.sharding import auto_axes
from memformer.layers.stack import TransformerShape, build_stack, layer_of, run_stack
from memformer.layers.transformer import DecoderBlock, EncoderBlock, visible_memory
from memformer.models.config import POSITIONS
from memformer.models.language_model import ModelOutput

__all__ = ["TransformerDecoder", "TransformerEncoder"]


class _Stack(nnx.Module):
    """Base of encoder and decoder: positions, dropout, blocks and the final norm."""

    def __init__(self, shape: TransformerShape, depth: int, block: Any, *, rngs: nnx.Rngs):
        check_size("depth", depth)
        self.shape, self.depth = shape, depth
        self.positions: Any = nnx.data(None)
        if shape.positions in POSITIONS:
            self.positions = POSITIONS[shape.positions](shape.width, shape.max_length, dtypes=shape.dtypes, rngs=rngs)
        self.blocks = build_stack(block, shape, depth, rngs=rngs)
        # Post-norm blocks end with a norm of their own.
        self.norm: Any = shape.norm(rngs) if shape.norm_place == "pre" else nnx.data(None)
        # Set by model.train() and model.eval().
        self.deterministic = True
        self.dropout_stream: Any = rngs.dropout.fork() if shape.dropout else nnx.data(None)

    def _keys(self) -> Array | None:
        """Dropout keys, one per block and one for the input; None without dropout."""
        if self.deterministic or not self.shape.dropout:
            return None
        return stochastic_keys(self.dropout_stream(), self.depth + 1)

    def _place(self, x: Array, positions: Array) -> Array:
        return x if self.positions is None else self.positions(x, positions)

    def _drop(self, x: Array, keys: Array | None) -> Array:
        x = dropout(x, self.shape.dropout, None if keys is None else keys[-1])
        return constrain_residual(x)

    def _finish(self, x: Array) -> Array:
        return x if self.norm is None else self.norm(x)

    def _check_length(self, what: str, length: int) -> None:
        if self.shape.positions == "learned" and length > self.shape.max_length:
            raise ValueError(
                f"{what} must be at most max_length = {self.shape.max_length} (learned positions), got {length}"
            )


class TransformerEncoder(_Stack):
    """A stack of bidirectional blocks: vectors in, vectors out, with attention within each segment.

    Args:
      shape: config of the blocks.
      depth: number of blocks.
      embedding_norm: a layer norm after the positions, as in BERT.
      rngs: random streams: "params", and "dropout" if the config has dropout.

    Example:
      >>> encoder = TransformerEncoder(TransformerShape(width=8, heads=2), 2, rngs=nnx.Rngs(0))
      >>> encoder(jnp.ones((1, 5, 8))).shape
      (1, 5, 8)
    """

    def __init__(self, shape: TransformerShape, depth: int, *, embedding_norm: bool = False, rngs: nnx.Rngs):
        super().__init__(shape, depth, EncoderBlock, rngs=rngs)
        self.embedding_norm: Any = shape.norm(rngs) if embedding_norm else nnx.data(None)

    @auto_axes
    def __call__(
        self,
        x: Float[Array, "B S D"],
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B S D"]:
        """The output of the encoder.

        Args:
          x: vectors.
          segment_ids: packed sequences, 0 = padding; outputs at padding are unspecified and affect no other token.
          positions: None counts within each segment.

        Raises:
          ValueError: an array of wrong shape or dtype, or more tokens than learned positions.
        """
        x, keys, where = self._prepare(x, segment_ids, positions)

        def step(block: EncoderBlock, x: Array, key: Array | None) -> tuple[Array, None]:
            return block(x, key, **where), None

        x, _ = run_stack(self.blocks, step, x, None if keys is None else keys[:-1])
        return self._finish(x)

    @auto_axes
    def weights(
        self,
        x: Float[Array, "B S D"],
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B L H S S"]:
        """Attention weights of the L blocks, [layer, head, query, key] in float32, with the arguments of a call."""
        x, keys, where = self._prepare(x, segment_ids, positions)

        def step(block: EncoderBlock, x: Array, key: Array | None) -> tuple[Array, Array]:
            return block(x, key, **where), block.weights(x, **where)

        _, weights = run_stack(self.blocks, step, x, None if keys is None else keys[:-1])
        return jnp.moveaxis(weights, 0, 1)

    def _prepare(
        self, x: Array, segment_ids: Array | None, positions: Array | None
    ) -> tuple[Array, Array | None, dict[str, Any]]:
        """Returns (input of the first block, dropout keys, keyword arguments of the blocks)."""
        dims: Dims = {"D": self.shape.width}
        x = check_array("x", x, "B S D", dims)
        self._check_length("the source's length", dims["S"])
        segments = find_segments(segment_ids, {"B": dims["B"], "T": dims["S"]})
        if positions is None:
            positions = count_positions(segments, (dims["B"], dims["S"]))
        positions = check_array("positions", positions, "B S", dims, kind=jnp.integer)
        x, keys = self._place(x, positions), self._keys()
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        return self._drop(x, keys), keys, {"segment_ids": segment_ids, "positions": positions}


class TransformerDecoder(_Stack):
    """A stack of causal blocks with cross-attention to a memory [B, S, D]: ids in, logits of the next ids out.

    The state contains, per block, keys and values of the memory and a cache of the tokens so far. Every array has the
    batch on its first axis (scalars are shared), so that a beam search can gather rows.

    Args:
      shape: config of the blocks; the memory has their width.
      depth: number of blocks.
      vocab_size: number of ids.
      num_classes: number of logits; None is vocab_size.
      tie_embeddings: the read-out shares the embedding table.
      rngs: random streams: "params", and "dropout" if the config has dropout.

    Raises:
      ValueError: sizes that do not fit each other.

    Example:
      >>> shape = TransformerShape(width=8, heads=2)
      >>> decoder = TransformerDecoder(shape, 2, vocab_size=7, rngs=nnx.Rngs(0))
      >>> memory = jnp.ones((1, 5, 8))
      >>> decoder(jnp.array([[1, 2, 3]]), memory=memory).logits.shape
      (1, 3, 7)
      >>> state = decoder.start(memory, capacity=3)
      >>> decoder(jnp.array([[1]]), state=state).logits.shape
      (1, 1, 7)
    """

    def __init__(
        self,
        shape: TransformerShape,
        depth: int,
        *,
        vocab_size: int,
        num_classes: int | None = None,
        tie_embeddings: bool = True,
        rngs: nnx.Rngs,
    ):
        num_classes = vocab_size if num_classes is None else num_classes
        check_size("vocab_size", vocab_size)
        check_size("num_classes", num_classes)
        if tie_embeddings and num_classes != vocab_size:
            raise ValueError(
                f"tie_embeddings requires the same ids in and out, got vocab_size = {vocab_size} and num_classes = "
                f"{num_classes}; set tie_embeddings to False (train.py: --config.model.tie_embeddings=False)"
            )
        super().__init__(shape, depth, DecoderBlock, rngs=rngs)
        self.vocab_size, self.num_classes = vocab_size, num_classes
        self.embedding = Embedding(vocab_size, shape.width, dtypes=shape.dtypes, rngs=rngs)
        self.head: Any = nnx.data(None)
        if not tie_embeddings:
            self.head = linear(shape.width, num_classes, ("embed", "vocab"), dtypes=shape.dtypes, rngs=rngs)
            self.head.preferred_element_type = shape.dtypes.wide

    @auto_axes
    def start(
        self,
        memory: Float[Array, "B S D"],
        memory_segment_ids: Int[Array, "B S"] | None = None,
        *,
        capacity: int | None = None,
    ) -> State:
        """The state before the first token, with everything that depends only on the memory.

        Args:
          memory: for the blocks to attend to.
          memory_segment_ids: 0 = padding; None for no padding.
          capacity: number of tokens that the caches have room for (decoding then compiles once); with None they grow
            with each call.

        Raises:
          ValueError: an array of wrong shape or dtype, or a capacity above the learned positions.
        """
        dims: Dims = {"D": self.shape.width}
        memory = check_array("memory", memory, "B S D", dims).astype(self.shape.dtypes.compute)
        if memory_segment_ids is not None:
            memory_segment_ids = check_array("memory_segment_ids", memory_segment_ids, "B S", dims, kind=jnp.integer)
        if capacity is not None:
            check_size("capacity", capacity)
            self._check_length("capacity", capacity)
        blocks = [layer_of(self.blocks, index) for index in range(self.depth)]
        return {
            "layers": tuple(block.start(memory, capacity) for block in blocks),
            "memory_segment_ids": memory_segment_ids,
            "position": jnp.zeros(dims["B"], jnp.int32),
        }

    @auto_axes
    def __call__(
        self,
        inputs: Int[Array, "B T"],
        *,
        memory: Float[Array, "B S D"] | None = None,
        memory_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
    ) -> ModelOutput:
        """Logits at each position; a call with the returned state continues the sequences.

        Args:
          inputs: ids; position t sees ids up to t.
          memory: for the first call (state None); later calls have it in their state.
          memory_segment_ids: of the memory, 0 = padding. If there are segment_ids too, a token sees the slots of its
            own id; otherwise all slots that are not padding.
          segment_ids: packed sequences, 0 = padding.
          positions: None counts within each segment, continuing from the state.
          state: from the previous call or from `start`.

        Raises:
          ValueError: both or neither of memory and state, an array of wrong shape or dtype, or more tokens than
            learned positions.
        """
        x, state, _ = self._run(inputs, memory, memory_segment_ids, segment_ids, positions, state)
        logits = self.embedding.attend(x) if self.head is None else self.head(x)
        return ModelOutput(constrain(logits, "activation_batch", "activation_time", "activation_vocab"), state, {})

    @auto_axes
    def alignments(
        self,
        inputs: Int[Array, "B T"],
        *,
        memory: Float[Array, "B S D"],
        memory_segment_ids: Int[Array, "B S"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B L H T S"]:
        """Cross-attention weights, [layer, head, token, slot] in float32; each row sums to 1.

        Row t belongs to the prediction of the id after inputs[t].
        """
        _, _, weights = self._run(inputs, memory, memory_segment_ids, segment_ids, None, None)
        return weights

    def _run(self, inputs, memory, memory_segment_ids, segment_ids, positions, state):
        """Returns (normalised output of the blocks, state, cross-attention weights)."""
        if (memory is None) == (state is None):
            raise ValueError(
                "give either memory (or source), to start targets, or state, to continue them; got "
                + ("neither" if memory is None else "both")
            )
        dims: Dims = {}
        inputs = check_array("inputs", inputs, "B T", dims, kind=jnp.integer)
        self._check_length("the inputs' length", dims["T"])
        segments = find_segments(segment_ids, dims)
        if positions is None:
            positions = count_positions(segments, (dims["B"], dims["T"]), None if state is None else state["position"])
        positions = check_array("positions", positions, "B T", dims, kind=jnp.integer)
        if state is not None:
            memory_segment_ids = state["memory_segment_ids"]
        where = {
            "visible": visible_memory(segment_ids, memory_segment_ids, dims["T"]),
            "segment_ids": segment_ids,
            "positions": positions,
        }
        keys = self._keys()
        x = self._drop(self._place(self.embedding(inputs), positions), keys)
        if state is None:
            x, layers, weights = self._first(x, memory, memory_segment_ids, keys, where)
        else:
            x, layers, weights = self._next(x, state["layers"], keys, where)
        state = {
            "layers": layers,
            "memory_segment_ids": memory_segment_ids,
            "position": next_position(positions, segments),
        }
        return self._finish(x), state, weights

    def _first(self, x, memory, memory_segment_ids, keys, where):
        """Runs all blocks in one scan; the states are split per block afterwards."""
        dims: Dims = {"B": x.shape[0], "D": self.shape.width}
        memory = check_array("memory", memory, "B S D", dims).astype(x.dtype)
        if memory_segment_ids is not None:
            check_array("memory_segment_ids", memory_segment_ids, "B S", dims, kind=jnp.integer)

        def step(block: DecoderBlock, x: Array, key: Array | None) -> tuple[Array, Any]:
            x, state, weights = block(x, block.start(memory), key, **where)
            return x, (state, weights)

        x, (states, weights) = run_stack(self.blocks, step, x, None if keys is None else keys[:-1])
        layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(self.depth))
        return x, layers, jnp.moveaxis(weights, 0, 1)

    def _next(self, x, layers, keys, where):
        """Runs the blocks one by one: each state stays an array with the batch first, updated in place."""
        after, weights = [], []
        for index, state in enumerate(layers):
            key = None if keys is None else keys[index]
            x, state, weight = layer_of(self.blocks, index)(x, state, key, **where)
            after.append(state)
            weights.append(weight)
        return x, tuple(after), jnp.stack(weights, axis=1)
