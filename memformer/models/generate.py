"""Sampling from a language model: a compiled prefill, then a compiled loop of single-token steps."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from memformer.core.types import Array, Float, Int

__all__ = ["Sampling", "generate", "pad_prompts", "sample"]


class Sampling(NamedTuple):
    """How the next token is chosen; fields are the arguments of `generate` of the same names."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self, vocab: int) -> None:
        """Raises ValueError unless every setting is in range."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0 (0 is greedy), got {self.temperature!r}")
        if self.top_k is not None and not 1 <= self.top_k <= vocab:
            raise ValueError(f"top_k must be None or in [1, {vocab}] (the number of classes), got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be None or in (0, 1], got {self.top_p!r}")


def sample(logits: Float[Array, "B V"], key: Array | None, sampling: Sampling) -> Int[Array, "B"]:
    """Chooses one token per row.

    Logits are divided by the temperature and restricted to the top_k largest, then to the smallest set of most
    probable tokens whose probability reaches top_p (at least one token). A token is sampled from the softmax of what
    remains.

    Args:
      logits: float32.
      key: random key; with None or temperature 0 the most probable token is taken.
      sampling: the settings.

    Example:
      >>> sample(jnp.array([[0.0, 2.0, 1.0]]), None, Sampling())
      Array([1], dtype=int32)
    """
    if key is None or sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    low = jnp.asarray(-jnp.inf, logits.dtype)
    if sampling.top_k is not None:
        least = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, low, logits)
    if sampling.top_p is not None:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        chance = jax.nn.softmax(ranked, axis=-1)
        # A token is kept if those before it have not reached top_p, so the first always is.
        before = jnp.cumsum(chance, axis=-1) - chance
        ranked = jnp.where(before < sampling.top_p, ranked, low)
        rank = jnp.argsort(order, axis=-1)
        logits = jnp.take_along_axis(ranked, rank, axis=-1)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def pad_prompts(prompts: np.ndarray | Array | Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts of different lengths on the left to ids [B, T] and segment_ids [B, T].

    Raises:
      ValueError: no prompt, an empty one, or ids that are not integers.

    Example:
      >>> pad_prompts([[5, 6], [7]])[1]
      array([[1, 1],
             [0, 1]], dtype=int32)
    """
    rows = [np.asarray(row) for row in prompts]
    if not rows or any(row.ndim != 1 or not row.size or row.dtype.kind not in "iu" for row in rows):
        raise ValueError("prompts must be one or more sequences of at least one integer id each")
    ids = np.zeros((len(rows), max(row.size for row in rows)), np.int32)
    segments = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -row.size :], segments[i, -row.size :] = row, 1
    return ids, segments


def generate(
    model: Any,
    prompts: np.ndarray | Array | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    key: Array | None = None,
) -> np.ndarray:
    """Continues prompts with new tokens.

    The prompts are read in one call. Tokens then follow one by one inside a compiled loop, which ends early once
    every row has stopped. A matrix memory needs the same space at any length; a cache is allocated once, for prompt and
    new tokens. Calls with equal shapes and settings compile once.

    Args:
      model: a language model (`MemoryLM`) whose inputs and outputs are the same ids, in evaluation mode.
      prompts: [B, T] ids, or a list of id sequences of different lengths.
      max_new_tokens: number of new tokens per row.
      temperature: divides the logits before sampling; 0 takes the most probable token (greedy decoding).
      top_k: samples only from the k most probable tokens.
      top_p: samples only from the most probable tokens that together reach this probability.
      stop_token: ends a row, and fills it up to max_new_tokens.
      key: random key, required where temperature is not 0.

    Returns:
      [B, max_new_tokens] int32, without the prompts.

    Raises:
      ValueError: a setting out of range, a model without ids, or more tokens than learned positions.

    Source: top-p, arXiv 1904.09751.

    Example:
      >>> from memformer.models import MemoryLM, from_preset
      >>> model = MemoryLM(from_preset("tiny"), vocab_size=11, rngs=nnx.Rngs(0))
      >>> generate(model, [[1, 2, 3], [4]], max_new_tokens=4).shape
      (2, 4)
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check(model, sampling, max_new_tokens, stop_token, key)
    ids, segments = pad_prompts(prompts)
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise ValueError(f"prompts must hold ids in [0, {model.vocab_size}), got {ids.min()} to {ids.max()}")
    # The last new token is never read by the model.
    state = model.init_state(ids.shape[0], ids.shape[1] + max_new_tokens - 1)
    graph, parameters = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    logits, state = _prefill(graph, parameters, jnp.asarray(ids), jnp.asarray(segments), state)
    tokens = _decode(graph, parameters, logits, state, key, sampling, max_new_tokens, stop_token)
    return np.asarray(tokens)


def _check(model: Any, sampling: Sampling, max_new_tokens: int, stop_token: int | None, key: Array | None) -> None:
    if not getattr(model, "vocab_size", 0) or model.vocab_size != model.num_classes:
        raise ValueError("model must take ids and give logits over the same ids (vocab_size = num_classes > 0)")
    if not getattr(model, "deterministic", True):
        raise ValueError("model must be in evaluation mode: call model.eval() before generate")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a positive integer, got {max_new_tokens!r}")
    sampling.check(model.num_classes)
    if sampling.temperature > 0 and key is None:
        raise ValueError("key must be given where temperature is not 0, such as jax.random.key(0)")
    if stop_token is not None and not 0 <= stop_token < model.vocab_size:
        raise ValueError(f"stop_token must be None or in [0, {model.vocab_size}), got {stop_token!r}")


@functools.partial(jax.jit, static_argnames=("graph",), donate_argnames=("state",))
def _prefill(graph, parameters, ids, segment_ids, state):
    output = nnx.merge(graph, parameters)(ids, segment_ids=segment_ids, state=state)
    return output.logits[:, -1], output.state


@functools.partial(jax.jit, static_argnames=("graph", "sampling", "count", "stop_token"))
def _decode(graph, parameters, logits, state, key, sampling, count, stop_token):
    """Samples `count` tokens, each from the logits of the one before."""
    model = nnx.merge(graph, parameters)
    batch = logits.shape[0]
    stop = -1 if stop_token is None else stop_token

    def unfinished(carry):
        i, done = carry[0], carry[1]
        return (i < count) & ~jnp.all(done)

    def draw(i, done, logits, tokens):
        token = sample(logits, jax.random.fold_in(key, i), sampling)
        token = jnp.where(done, jnp.int32(stop), token)
        return token, done | (token == stop), lax.dynamic_update_slice(tokens, token[:, None], (jnp.int32(0), i))

    def step(carry):
        i, done, token, state, tokens = carry
        output = model(token[:, None], state=state)
        token, done, tokens = draw(i, done, output.logits[:, 0], tokens)
        return i + 1, done, token, output.state, tokens

    tokens = jnp.full((batch, count), stop, jnp.int32)
    token, done, tokens = draw(jnp.int32(0), jnp.zeros(batch, jnp.bool_), logits, tokens)
    return lax.while_loop(unfinished, step, (jnp.int32(1), done, token, state, tokens))[-1]
