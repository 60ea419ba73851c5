"""Image captioning with attention over a grid: an LSTM decoder with soft attention, or a Transformer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from memformer.core.checks import check_array, check_choice, check_number, check_size
from memformer.core.context import refuse_sharded_time
from memformer.core.segments import Segments, find_segments
from memformer.core.types import Array, Dims, Float, Int
from memformer.layers.additive import AdditiveAttention
from memformer.layers.base import State
from memformer.layers.basic import Embedding, LayerNorm, constrain, dropout, linear, stochastic_keys
from memformer.layers.config import BaseConfig
from memformer.layers.positions import count_positions, next_position, sinusoid
from memformer.layers.recurrent import LSTM
from memformer.layers.sharding import auto_axes
from memformer.layers.stack import TransformerShape
from memformer.layers.transformer import DecoderBlock
from memformer.models.language_model import ModelOutput
from memformer.models.picture import ConvGrid, PatchGrid
from memformer.ops.recurrent_cells import LSTMState

__all__ = ["Captioner", "CaptionerConfig", "doubly_stochastic"]


@dataclasses.dataclass(frozen=True)
class CaptionerConfig(BaseConfig):
    """Config of a Captioner.

    Attributes:
      decoder: "lstm" with soft attention, or "transformer".
      grid: encoder of the picture: "conv" or "patches" (with Transformer encoder blocks).
      channels: of the convolutions; all but the last halve the picture.
      patch: side of a patch in pixels.
      encoder_depth: number of Transformer blocks over the patches.
      width: D: of word embeddings, of the LSTM and its attention network, and of Transformer blocks.
      depth: number of Transformer blocks of the decoder.
      heads: of Transformer blocks.
      doubly_stochastic: weight of the loss that encourages the attention to cover the picture; 0 is none.
      dropout: rate before the read-out and inside Transformer blocks; active after `model.train()`.

    Raises:
      ValueError: a value that does not fit; names the field, what was expected and what was given.

    Example:
      >>> CaptionerConfig(decoder="transformer", grid="patches", width=64).blocks.key_width
      16
    """

    decoder: str = "lstm"
    grid: str = "conv"
    channels: tuple[int, ...] = (32, 64, 64)
    patch: int = 4
    encoder_depth: int = 2
    width: int = 128
    depth: int = 2
    heads: int = 4
    doubly_stochastic: float = 1.0
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_choice("decoder", self.decoder, ("lstm", "transformer"))
        check_choice("grid", self.grid, ("conv", "patches"))
        self.check_sizes("patch", "encoder_depth", "width", "depth", "heads")
        check_number("doubly_stochastic", self.doubly_stochastic, at_least=0)

    @property
    def blocks(self) -> TransformerShape:
        """Config of the Transformer blocks; positions are added before them."""
        return TransformerShape(
            width=self.width,
            heads=self.heads,
            positions=None,
            dropout=self.dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )


def doubly_stochastic(weights: Float[Array, "B T S"], segments: Segments | None = None) -> Float[Array, ""]:
    """A loss that is 0 where the attention of a caption visits every cell of the grid once in total.

        mean over captions and cells i of (1 - sum_t a_ti)^2

    Args:
      weights: attention a over S cells at each step; padding steps do not count.
      segments: of packed captions (`memformer.core.segments.find_segments`); None is one caption per row.

    Source: arXiv 1502.03044 equation 14, with a mean over cells instead of a sum.

    Example:
      >>> float(doubly_stochastic(jnp.full((1, 2, 4), 0.25)))
      0.25
    """
    one = jnp.ones((), weights.dtype)
    if segments is None:
        return jnp.mean(jnp.square(one - jnp.sum(weights, axis=1)))
    # [B, T, captions]: a row has at most one caption per step.
    belongs = segments.index[:, :, None] == jnp.arange(weights.shape[1], dtype=jnp.int32)[None, None]
    belongs = (belongs & segments.valid[:, :, None]).astype(weights.dtype)
    visits = jnp.einsum("bts,btn->bns", weights, belongs, precision=lax.Precision.HIGHEST)
    present = jnp.max(belongs, axis=1)
    missed = jnp.mean(jnp.square(one - visits), axis=-1)
    return jnp.sum(missed * present) / jnp.maximum(jnp.sum(present), one)


class _LSTMDecoder(nnx.Module):
    """The decoder of arXiv 1502.03044, section 3.1.2.

    (h_0, c_0) = tanh(W mean_i a_i);  read_t = attention(h_{t-1}, a);  z_t = sigmoid(w . h_{t-1}) read_t
    (h_t, c_t) = LSTM([E y_{t-1}; z_t], h_{t-1}, c_{t-1});  logits_t = L (E y_{t-1} + L_h h_t + L_z z_t)
    """

    def __init__(self, config: CaptionerConfig, memory_width: int, *, rngs: nnx.Rngs):
        same: dict[str, Any] = {"dtypes": config.dtypes, "rngs": rngs}
        width = config.width
        self.first = linear(memory_width, 2 * width, ("embed", None), bias=True, wide=True, **same)
        self.attention = AdditiveAttention(width, memory_width, width, **same)
        self.gate = linear(width, 1, ("embed", None), bias=True, wide=True, **same)
        self.lstm = LSTM(width + memory_width, width, **same)
        self.from_state = linear(width, width, ("embed", None), bias=True, **same)
        self.from_read = linear(memory_width, width, ("embed", None), **same)

    def start(self, memory: Float[Array, "B S F"], capacity: int | None) -> State:
        h, c = jnp.split(jnp.tanh(self.first(jnp.mean(memory, axis=1))), 2, axis=-1)
        first = LSTMState(h, c)
        return {"memory": memory, "keys": self.attention.prepare(memory), "first": first, "now": first}

    def __call__(self, x, state, keys, *, segment_ids, segments, positions) -> tuple[Array, State, Array]:
        """Returns (x [B, T, D] before the read-out, state, weights [B, T, S])."""
        refuse_sharded_time("the captioner's LSTM", x.shape[1])
        flags = None
        if segments is not None:
            starts = jnp.diff(segments.index, axis=1, prepend=jnp.zeros_like(segments.index[:, :1])) != 0
            flags = starts.T[..., None], segments.valid.T[..., None]

        def step(now: LSTMState, inputs: tuple) -> tuple[LSTMState, tuple]:
            word, flags = inputs
            if flags is not None:
                now = jax.tree.map(lambda first, now: jnp.where(flags[0], first, now), state["first"], now)
            read, weights = self.attention(now.h.astype(word.dtype), state["memory"], state["keys"])
            read = nnx.sigmoid(self.gate(now.h)).astype(word.dtype) * read
            h, after = self.lstm.step(jnp.concatenate([word, read], axis=-1), now)
            if flags is not None:
                after = jax.tree.map(lambda new, old: jnp.where(flags[1], new, old), after, now)
                weights = jnp.where(flags[1], weights, jnp.zeros_like(weights))
            return after, (h, read, weights)

        now, outputs = lax.scan(step, state["now"], (jnp.swapaxes(x, 0, 1), flags))
        h, read, weights = (jnp.swapaxes(part, 0, 1) for part in outputs)
        return x + self.from_state(h) + self.from_read(read), {**state, "now": now}, weights


class _TransformerDecoder(nnx.Module):
    """Causal blocks that attend to the grid; the reported attention is the mean over heads of the last block."""

    def __init__(self, config: CaptionerConfig, memory_width: int, *, rngs: nnx.Rngs):
        same: dict[str, Any] = {"dtypes": config.dtypes, "rngs": rngs}
        self.enter = linear(memory_width, config.width, (None, "embed"), bias=True, **same)
        self.blocks = nnx.List([DecoderBlock(config.blocks, rngs=rngs) for _ in range(config.depth)])
        self.norm = LayerNorm(config.width, **same)

    def start(self, memory: Float[Array, "B S F"], capacity: int | None) -> State:
        memory = self.enter(memory)
        layers = tuple(block.start(memory, capacity) for block in self.blocks)
        return {"layers": layers, "position": jnp.zeros(memory.shape[0], jnp.int32)}

    def __call__(self, x, state, keys, *, segment_ids, segments, positions) -> tuple[Array, State, Array]:
        """Returns (x [B, T, D] before the read-out, state, weights [B, T, S])."""
        if positions is None:
            positions = count_positions(segments, x.shape[:2], state["position"])
        positions = check_array("positions", positions, "B T", {"B": x.shape[0], "T": x.shape[1]}, kind=jnp.integer)
        x, layers = x + sinusoid(positions, x.shape[-1]).astype(x.dtype), []
        for i, block in enumerate(self.blocks):
            key = None if keys is None else keys[i]
            x, new, weights = block(x, state["layers"][i], key, segment_ids=segment_ids, positions=positions)
            layers.append(new)
        weights = jnp.mean(weights, axis=1)
        if segments is not None:
            weights = jnp.where(segments.valid[..., None], weights, jnp.zeros_like(weights))
        return self.norm(x), {"layers": tuple(layers), "position": next_position(positions, segments)}, weights


class Captioner(nnx.Module):
    """Generates a caption of a picture word by word, with attention over the picture.

    Args:
      config: config of the model.
      vocab_size: number of words.
      num_classes: number of logits; None is vocab_size.
      features: must be 0: inputs are words.
      rngs: random streams: "params", and "dropout" if the config has dropout.

    Raises:
      ValueError: sizes that do not fit each other.

    Source: arXiv 1502.03044; over patches with a Transformer, arXiv 2101.10804.

    Example:
      >>> model = Captioner(CaptionerConfig(channels=(8, 16), width=16), vocab_size=7, rngs=nnx.Rngs(0))
      >>> picture, words = jnp.ones((1, 16, 16, 3)), jnp.array([[1, 4, 5]])
      >>> model(words, picture=picture).logits.shape, model.alignments(words, picture=picture).shape
      ((1, 3, 7), (1, 3, 8, 8))
    """

    def __init__(
        self,
        config: CaptionerConfig,
        *,
        vocab_size: int,
        num_classes: int | None = None,
        features: int = 0,
        rngs: nnx.Rngs,
    ):
        num_classes = vocab_size if num_classes is None else num_classes
        check_size("vocab_size", vocab_size)
        check_size("num_classes", num_classes)
        if features:
            raise ValueError(f"features must be 0 (the inputs of a captioner are words), got {features}")
        self.config, self.vocab_size, self.num_classes = config, vocab_size, num_classes
        same: dict[str, Any] = {"dtypes": config.dtypes, "rngs": rngs}
        self.grid: Any
        if config.grid == "conv":
            self.grid = ConvGrid(config.channels, **same)
        else:
            self.grid = PatchGrid(config.blocks, patch=config.patch, depth=config.encoder_depth, rngs=rngs)
        self.embedding = Embedding(vocab_size, config.width, **same)
        decoder = _LSTMDecoder if config.decoder == "lstm" else _TransformerDecoder
        self.decoder: Any = decoder(config, self.grid.width, rngs=rngs)
        self.head = linear(config.width, num_classes, ("embed", "vocab"), bias=True, wide=True, **same)
        # Set by model.train() and model.eval().
        self.deterministic = True
        self.dropout_stream: Any = rngs.dropout.fork() if config.dropout else nnx.data(None)

    @auto_axes
    def start(self, picture: Float[Array, "B Y X 3"], capacity: int | None = None) -> State:
        """The state before the first word: the encoded picture, and the cache of a Transformer for `capacity` words.

        Raises:
          ValueError: a picture of wrong shape or dtype, or too small for its grid.
        """
        return self.decoder.start(self._encode(picture, None)[0], capacity)

    @auto_axes
    def __call__(
        self,
        inputs: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
        picture: Float[Array, "B Y X 3"] | None = None,
    ) -> ModelOutput:
        """Logits of the word after each input; a call with the returned state continues the captions.

        All packed captions of a row describe the one picture of that row.

        Args:
          inputs: words, beginning with the start token.
          segment_ids: packed captions, 0 = padding; see `memformer.core.segments`.
          positions: used by the Transformer only; None counts within each segment, continuing from the state.
          state: from the previous call or from `start`; if None, `picture` is required.
          picture: in [0, 1]; None if there is a state.

        Raises:
          ValueError: an array of wrong shape or dtype, or both or neither of state and picture.
        """
        output, weights, segments, _ = self._run(inputs, segment_ids, positions, state, picture)
        if state is not None or not self.config.doubly_stochastic:
            return output
        loss = doubly_stochastic(weights, segments)
        return output._replace(aux={"doubly_stochastic": loss * jnp.asarray(self.config.doubly_stochastic, loss.dtype)})

    @auto_axes
    def alignments(
        self,
        inputs: Int[Array, "B T"],
        *,
        picture: Float[Array, "B Y X 3"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T R C"]:
        """Attention over the rows R and columns C of the grid for the prediction of the word after each input.

        Each map sums to 1, that of padding to 0. For a Transformer it is the mean over heads of the last block.
        """
        _, weights, _, sides = self._run(inputs, segment_ids, None, None, picture)
        return weights.reshape(*weights.shape[:2], *sides)

    def _encode(self, picture: Array, key: Array | None) -> tuple[Array, tuple[int, int]]:
        picture = check_array("picture", picture, "B Y X channels", {"channels": 3})
        grid = self.grid(picture, key)
        batch, rows, columns, width = grid.shape
        return grid.reshape(batch, rows * columns, width), (rows, columns)

    def _run(self, inputs, segment_ids, positions, state, picture) -> tuple:
        """Returns (output without aux, weights [B, T, S], segments, sides of the grid or None)."""
        if (state is None) == (picture is None):
            given = "neither" if picture is None else "both"
            raise ValueError(f"give either picture, to start captions, or state, to continue them; got {given}")
        dims: Dims = {}
        inputs = check_array("inputs", inputs, "B T", dims, kind=jnp.integer)
        segments = find_segments(segment_ids, dims)
        dropping = self.config.dropout and not self.deterministic
        keys = stochastic_keys(self.dropout_stream() if dropping else None, self.config.depth + 2)
        sides = None
        if picture is not None:
            memory, sides = self._encode(picture, None if keys is None else keys[-1])
            if memory.shape[0] != dims["B"]:
                raise ValueError(f"picture must have as many rows as inputs, {dims['B']}, got {memory.shape[0]}")
            state = self.decoder.start(memory, None)
        where = {"segment_ids": segment_ids, "segments": segments, "positions": positions}
        x, state, weights = self.decoder(self.embedding(inputs), state, keys, **where)
        x = dropout(x, self.config.dropout, None if keys is None else keys[-2])
        logits = constrain(self.head(x), "activation_batch", "activation_time", "activation_vocab")
        return ModelOutput(logits, state, {}), weights, segments, sides
