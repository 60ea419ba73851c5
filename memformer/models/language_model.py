"""MemoryLM: embedding, blocks around any memories, read-out."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from memformer.core.checks import check_array, check_options, check_size
from memformer.core.segments import find_segments
from memformer.core.types import Array, Float, Int
from memformer.layers.base import State
from memformer.layers.basic import Embedding, constrain, constrain_residual, dropout, linear, stochastic_keys
from memformer.layers.feedforward import FEEDFORWARDS, SwiGLU, feedforward_keys
from memformer.layers.memory import build_memory
from memformer.layers.positions import count_positions, next_position
from memformer.layers.sharding import auto_axes
from memformer.models.config import POSITIONS, REMAT, LanguageModelConfig, check_input

__all__ = ["Block", "MemoryLM", "ModelOutput", "check_sizes", "take_places"]


class ModelOutput(NamedTuple):
    """The result of a model.

    Attributes:
      logits: [B, T, classes] float32.
      state: pytree that continues the sequences in a later call.
      aux: scalar losses by name, already weighted; {} if none.
    """

    logits: Float[Array, "B T classes"]
    state: Any
    aux: Mapping[str, Float[Array, ""]]


class Block(nnx.Module):
    """x + memory(norm(x)), then x + feedforward(norm(x)) if the config has a feedforward layer.

    Args:
      config: config of the model.
      memory: name of the memory of this layer.
      dense: the feedforward layer is a SwiGLU of the config's dense_hidden.
      norm_place: "pre" as above, or "output": x + norm(memory(x)), then x + norm(feedforward(x)).
      rngs: random streams.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        memory: str,
        *,
        dense: bool = False,
        norm_place: str = "pre",
        rngs: nnx.Rngs,
    ):
        same: dict[str, Any] = {"dtypes": config.dtypes, "rngs": rngs}
        sizes: dict[str, Any] = {key: getattr(config, key) for key in ("heads", "key_width", "value_width")}
        self.norm = config.build_norm(rngs)
        self.memory = build_memory(memory, config.width, options=config.options_of(memory), **sizes, **same)
        self.feedforward: Any = nnx.data(None)
        self.feedforward_norm: Any = nnx.data(None)
        self.dropout, self.norm_place = config.dropout, norm_place
        if config.feedforward is not None and not dense:
            self.feedforward_norm = config.build_norm(rngs)
            layer = FEEDFORWARDS[config.feedforward]
            known = feedforward_keys(config.feedforward)
            check_options(f"feedforward_options of {config.feedforward!r}", config.feedforward_options, known)
            self.feedforward = layer(config.width, **config.feedforward_options, **same)
        if dense:
            self.feedforward_norm = config.build_norm(rngs)
            self.feedforward = SwiGLU(config.width, hidden=config.dense_hidden, **same)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: State | None,
        key: Array | None,
        *,
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "B T"] | None,
    ) -> tuple[Array, State, dict[str, Array]]:
        """Returns (x, state, aux)."""
        _, y, state = self.read(x, state, segment_ids=segment_ids, positions=positions)
        x, aux = self.add(x, y, key, segment_ids=segment_ids)
        return x, state, aux

    def read(
        self,
        x: Float[Array, "B T D"],
        state: State | None,
        *,
        segment_ids: Int[Array, "B T"] | None,
        positions: Int[Array, "B T"] | None,
    ) -> tuple[Array, Array, State]:
        """Returns the memory's input, its output and its state."""
        h = self.norm(x) if self.norm_place == "pre" else x
        return h, *self.memory(h, segment_ids=segment_ids, positions=positions, state=state)

    def add(
        self,
        x: Float[Array, "B T D"],
        y: Float[Array, "B T D"],
        key: Array | None,
        *,
        segment_ids: Int[Array, "B T"] | None,
    ) -> tuple[Array, dict[str, Array]]:
        """Adds the memory's output y to x, then the feedforward layer's; returns (x, aux)."""
        keys = (None, None) if key is None else jax.random.split(key, 2)
        pre = self.norm_place == "pre"
        x, aux = constrain_residual(x + dropout(y if pre else self.norm(y), self.dropout, keys[0])), {}
        if self.feedforward is not None:
            valid = None if segment_ids is None else segment_ids != 0
            y, aux = self.feedforward(self.feedforward_norm(x) if pre else x, valid)
            y = constrain_residual(y)
            x = constrain_residual(x + dropout(y if pre else self.feedforward_norm(y), self.dropout, keys[1]))
        return x, aux


class MemoryLM(nnx.Module):
    """A causal sequence model: ids or feature vectors in, logits at each position out.

    Args:
      config: config of the model.
      vocab_size: number of input ids; 0 where inputs are feature vectors.
      num_classes: number of logits; None is vocab_size.
      features: F of float inputs [B, T, F]; 0 where inputs are ids.
      rngs: random streams: "params", and "dropout" if the config has dropout.

    Raises:
      ValueError: sizes that do not fit each other.

    Example:
      >>> config = LanguageModelConfig(memory="delta_rule", width=16, depth=2, heads=2)
      >>> model = MemoryLM(config, vocab_size=7, rngs=nnx.Rngs(0))
      >>> model(jnp.array([[1, 2, 3]])).logits.shape
      (1, 3, 7)
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        vocab_size: int,
        num_classes: int | None = None,
        features: int = 0,
        rngs: nnx.Rngs,
    ):
        num_classes = vocab_size if num_classes is None else num_classes
        check_sizes(config, vocab_size, num_classes, features)
        self.config, self.vocab_size, self.num_classes, self.features = config, vocab_size, num_classes, features
        same: dict[str, Any] = {"dtypes": config.dtypes, "rngs": rngs}
        width = config.width
        self.embedding: Any
        if features:
            self.embedding = linear(features, width, (None, "embed"), bias=True, **same)
        else:
            self.embedding = Embedding(vocab_size, width, scale=config.scale_embeddings, **same)
        self.positions: Any = nnx.data(None)
        if config.positions is not None:
            self.positions = POSITIONS[config.positions](width, config.max_length, **same)
        self.blocks = _build_blocks(config, rngs)
        self.norm = config.build_norm(rngs)
        self.head: Any = nnx.data(None)
        if not config.tie_embeddings:
            self.head = linear(width, num_classes, ("embed", "vocab"), **same)
            self.head.preferred_element_type = config.dtypes.wide
        # Set by model.train() and model.eval().
        self.deterministic = True
        self.dropout_stream: Any = rngs.dropout.fork() if config.dropout else nnx.data(None)

    def init_state(self, batch: int, capacity: int, dtype: Any = None) -> State:
        """The state before the first token; caches have room for `capacity` tokens.

        Raises:
          ValueError: a batch or capacity that is not a positive integer, or a capacity above the learned positions.
        """
        batch, capacity = check_size("batch", batch), check_size("capacity", capacity)
        if self.config.positions == "learned" and capacity > self.config.max_length:
            raise ValueError(f"capacity must be at most max_length = {self.config.max_length}, got {capacity}")
        states = tuple(block.memory.init_state(batch, capacity, dtype) for block in self.blocks)
        if self.config.scan_layers:
            groups = self.config.depth // len(self.config.pattern)
            states = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (groups, *x.shape)), states)
        return {"layers": states, "position": jnp.zeros(batch, jnp.int32)}

    @auto_axes
    def __call__(
        self,
        inputs: Int[Array, "B T"] | Float[Array, "B T F"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
        read_at: Int[Array, "B"] | None = None,
    ) -> ModelOutput:
        """Logits at each position; a call with the returned state continues the sequences.

        Args:
          inputs: ids, or float features.
          segment_ids: packed sequences, 0 = padding; see `memformer.core.segments`.
          positions: None counts within each segment, continuing from the state.
          state: from the previous call or from `init_state`; None starts a sequence.
          read_at: the place in each row whose logits are wanted; they are then [B, 1, classes].

        Raises:
          ValueError: an array of wrong shape or dtype, or more tokens than learned positions.
        """
        dims = {"F": self.features} if self.features else {}
        kind = jnp.floating if self.features else jnp.integer
        inputs = check_array("inputs", inputs, "B T F" if self.features else "B T", dims, kind=kind)
        segments = find_segments(segment_ids, dims)
        if positions is None:
            positions = count_positions(segments, (dims["B"], dims["T"]), None if state is None else state["position"])
        positions = check_array("positions", positions, "B T", dims, kind=jnp.integer)
        if self.config.positions == "learned" and dims["T"] > self.config.max_length:
            raise ValueError(f"inputs must have at most max_length = {self.config.max_length} tokens, got {dims['T']}")
        keys = self._keys()
        x = self.embed(inputs, positions, None if keys is None else keys[-1])
        layers = None if state is None else state["layers"]
        run = self._scan if self.config.scan_layers else self._unroll
        x, layers, aux = run(x, layers, None if keys is None else keys[:-1], segment_ids, positions)
        state = {"layers": layers, "position": next_position(positions, segments)}
        return ModelOutput(self.read_out(take_places(x, read_at)), state, aux)

    def embed(
        self, inputs: Int[Array, "B T"] | Float[Array, "B T F"], positions: Int[Array, "B T"], key: Array | None
    ) -> Float[Array, "B T D"]:
        """The input of the first block; `key` is the random key of dropout."""
        x = self.embedding(inputs.astype(self.config.dtypes.compute) if self.features else inputs)
        if self.positions is not None:
            x = self.positions(x, positions)
        x = dropout(x, self.config.dropout, key)
        return constrain_residual(x)

    def read_out(self, x: Float[Array, "B T D"]) -> Float[Array, "B T classes"]:
        """The logits from the output of the last block."""
        x = self.norm(x)
        logits = self.embedding.attend(x) if self.head is None else self.head(x)
        return constrain(logits, "activation_batch", "activation_time", "activation_vocab")

    def state_letters(self, state: State) -> Any:
        """The letters of the arrays of a state; L is the axis of scanned groups of layers."""
        layers = state["layers"]
        if self.config.scan_layers:
            layers = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), layers)
        letters = tuple(block.memory.state_letters(layer) for block, layer in zip(self.blocks, layers, strict=True))
        if self.config.scan_layers:
            letters = jax.tree.map(lambda each: f"L {each}", letters)
        return {"layers": letters, "position": "B"}

    def _keys(self) -> Array | None:
        """Dropout keys, one per layer and one for the embedding; None without dropout."""
        if self.deterministic or not self.config.dropout:
            return None
        return stochastic_keys(self.dropout_stream(), self.config.depth + 1)

    def _scan(self, x, states, keys, segment_ids, positions):
        """Scans the repeating group of blocks; parameters, states and keys have a leading axis of groups."""
        graph, parameters = nnx.split(self.blocks)
        size = len(self.config.pattern)
        keys = None if keys is None else keys.reshape(-1, size)
        run = _checkpointed(_run_block, self.config.remat, prevent_cse=False)

        def group(x, xs):
            parameters, states, keys = xs
            blocks, after, aux = nnx.merge(graph, parameters), [], []
            for i, block in enumerate(blocks):
                last, key = None if states is None else states[i], None if keys is None else keys[i]
                x, new, losses = run(*nnx.split(block), x, last, key, segment_ids, positions)
                after.append(new)
                aux.append(losses)
            return x, (tuple(after), jax.tree.map(lambda *a: sum(a[1:], start=a[0]), *aux))

        x, (states, aux) = lax.scan(group, x, (parameters, states, keys))
        return x, states, jax.tree.map(lambda a: jnp.sum(a) / self.config.depth, aux)

    def _unroll(self, x, states, keys, segment_ids, positions):
        """Runs the blocks one by one, each as its own part of the program."""
        run = _checkpointed(_run_block, self.config.remat, prevent_cse=True)
        after, aux = [], []
        for i, block in enumerate(self.blocks):
            last, key = None if states is None else states[i], None if keys is None else keys[i]
            x, new, losses = run(*nnx.split(block), x, last, key, segment_ids, positions)
            after.append(new)
            aux.append(losses)
        # First layers that are dense have no such losses.
        sparse = aux[self.config.dense_layers :]
        return x, tuple(after), jax.tree.map(lambda *a: sum(a[1:], start=a[0]) / len(a), *sparse) if sparse else {}


def take_places(x: Float[Array, "B T D"], places: Int[Array, "B"] | None) -> Float[Array, "B N D"]:
    """One time step of each row, [B, 1, D]; all of them where `places` is None.

    Example:
      >>> take_places(jnp.arange(6.0).reshape(2, 3, 1), jnp.array([0, 2]))[..., 0]
      Array([[0.],
             [5.]], dtype=float32)
    """
    return x if places is None else jnp.take_along_axis(x, places[:, None, None], axis=1)


def check_sizes(config: LanguageModelConfig, vocab_size: int, num_classes: int, features: int) -> None:
    """Raises ValueError unless a model of this config can have such inputs and outputs."""
    check_input(vocab_size, features)
    check_size("num_classes", num_classes)
    if config.tie_embeddings and (features or num_classes != vocab_size):
        raise ValueError(
            f"tie_embeddings requires ids in and the same ids out, got vocab_size = {vocab_size}, num_classes = "
            f"{num_classes}, features = {features}; set tie_embeddings to False"
        )


def _build_blocks(config: LanguageModelConfig, rngs: nnx.Rngs) -> nnx.List:
    """Builds a block per entry of the pattern, stacked over groups, or one per layer; the parameters are the same."""
    size = len(config.pattern)
    groups = config.depth // size
    keys = jax.random.split(rngs.params(), config.depth).reshape(groups, size)

    def build(key: Array, place: int, dense: bool = False) -> Block:
        name, norm_place = config.pattern[place], config.norm_places[place]
        return Block(config, name, dense=dense, norm_place=norm_place, rngs=nnx.Rngs(params=key))

    if not config.scan_layers:
        depth, dense = config.depth, config.dense_layers
        return nnx.List([build(keys[i // size, i % size], i % size, i < dense) for i in range(depth)])
    names = {nnx.PARTITION_NAME: "layers"}

    def stack(place: int) -> Any:
        each = functools.partial(build, place=place)
        return nnx.vmap(each, in_axes=0, out_axes=0, axis_size=groups, transform_metadata=names)(keys[:, place])

    return nnx.List([stack(place) for place in range(size)])


def _run_block(graph, parameters, x, state, key, segment_ids, positions):
    return nnx.merge(graph, parameters)(x, state, key, segment_ids=segment_ids, positions=positions)


def _checkpointed(function: Any, remat: str | None, *, prevent_cse: bool) -> Any:
    if remat is None:
        return function
    return jax.checkpoint(function, policy=REMAT[remat], prevent_cse=prevent_cse, static_argnums=(0,))
