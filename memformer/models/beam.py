"""Beam search over any model that steps a token at a time, and the compiled form for encoder-decoder models."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from memformer.core.types import Array, Float, Int

__all__ = ["beam_search", "decode", "length_divisor", "repeat_rows"]


class _Search(NamedTuple):
    """Hypotheses of B rows with K beams each; scores of places not taken are -inf.

    `last` [B, K] is the token to read next, `live` and `live_scores` the hypotheses that go on,
    `ended` and `ended_scores` those with an end token, best first.
    """

    taken: Array
    state: Any
    last: Array
    live: Array
    live_scores: Array
    ended: Array
    ended_scores: Array


def length_divisor(length: int | Array, penalty: float) -> Float[Array, ""]:
    """((5 + length) / 6)^penalty, by which log probabilities are divided; 1 where the penalty is 0.

    Source: arXiv 1609.08144, equation 14 (without the coverage term).

    Example:
      >>> float(length_divisor(7, 1.0))
      2.0
    """
    return ((5 + jnp.asarray(length, jnp.float32)) / 6) ** jnp.float32(penalty)


def repeat_rows(state: Any, beams: int) -> Any:
    """Every array of a state with axes, each row `beams` times; scalars stay.

    Example:
      >>> repeat_rows({"h": jnp.array([[1.0], [2.0]])}, 2)["h"][:, 0]
      Array([1., 1., 2., 2.], dtype=float32)
    """
    return jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0) if jnp.ndim(x) else x, state)


def beam_search(
    step: Callable[[Array, Any], tuple[Array, Any]],
    state: Any,
    *,
    start: Int[Array, "B"],
    end: int,
    beams: int,
    max_steps: int,
    length_penalty: float = 0.0,
) -> tuple[Int[Array, "B K S"], Float[Array, "B K"]]:
    """The likeliest sequences by a search that keeps `beams` = K hypotheses a row; K = 1 is greedy.

        score(y) = log P(y) / ((5 + |y|) / 6)^length_penalty

    where |y| counts the end token. At each step the K best continuations are looked at: those with the end token
    have ended, and the K best without it go on. A row is done once K hypotheses have ended; of more than K the
    best by score stay. After max_steps the places left are filled by the likeliest hypotheses that did not end, which
    come after those that did, whatever their scores. Works under jit; the loop ends when all rows are done.

    Args:
      step: (tokens [B * K], state) -> (logits [B * K, vocab], state); row b * K + k is hypothesis k of row b.
      state: the first state, for B * K rows (`repeat_rows`); each array with axes has the rows first, scalars
        are shared by all.
      start: [B], the token that each row reads first; it is not part of the result.
      end: the token that ends a hypothesis.
      beams: K.
      max_steps: S, tokens a hypothesis may have, the end token counted.
      length_penalty: 0 prefers short sequences as probability does; larger ones lengthen.

    Returns:
      tokens [B, K, S] int32, best first, `end` repeated behind the end; scores [B, K] float32 (-inf where there
      are fewer hypotheses than places).

    Raises:
      ValueError: beams or max_steps below 1, or a negative length penalty.

    Source: arXiv 1609.08144, section 7.

    Example:
      >>> always = lambda tokens, state: (jnp.log(jnp.tile(jnp.array([[0.3, 0.1, 0.6]]), (len(tokens), 1))), state)
      >>> tokens, scores = beam_search(always, (), start=jnp.array([0]), end=2, beams=2, max_steps=3)
      >>> tokens[0]
      Array([[2, 2, 2],
             [0, 2, 2]], dtype=int32)
    """
    _check(beams, max_steps, length_penalty)
    batch = start.shape[0]
    none = jnp.full((batch, beams), -jnp.inf, jnp.float32)
    blank = jnp.full((batch, beams, max_steps), end, jnp.int32)
    last = jnp.broadcast_to(start.astype(jnp.int32)[:, None], (batch, beams))
    # all beams are equal at first: one of them counts
    first = _Search(jnp.int32(0), state, last, blank, none.at[:, 0].set(0.0), blank, none)

    def going(search: _Search) -> Array:
        return (search.taken < max_steps) & ~jnp.all(_done(search.ended_scores))

    def advance(search: _Search) -> _Search:
        logits, state = step(search.last.reshape(-1), search.state)
        return _advance(search, logits, state, end, length_penalty)

    search = lax.while_loop(going, advance, first)
    scores = jnp.concatenate(
        [search.ended_scores, search.live_scores / length_divisor(max_steps, length_penalty)], axis=1
    )
    # ended ones first, then those that go on; both are in order already
    order = jnp.argsort(scores == -jnp.inf, axis=1, stable=True)[:, :beams]
    return _pick(jnp.concatenate([search.ended, search.live], axis=1), order), _pick(scores, order)


def _check(beams: int, max_steps: int, length_penalty: float) -> None:
    for name, value in (("beams", beams), ("max_steps", max_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if not length_penalty >= 0:
        raise ValueError(f"length_penalty must be at least 0 (0 is none), got {length_penalty!r}")


def _done(ended_scores: Array) -> Array:
    return ended_scores[:, -1] > -jnp.inf


def _pick(x: Array, places: Array) -> Array:
    """x[b, places[b]] along axis 1."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)


def _advance(search: _Search, logits: Array, state: Any, end: int, penalty: float) -> _Search:
    """One token more for every hypothesis that goes on."""
    batch, beams, _ = search.live.shape
    vocab = logits.shape[-1]
    scores = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beams, vocab)
    scores = (search.live_scores[..., None] + scores).reshape(batch, -1)
    # every beam has one end token, so 2 K candidates hold K that go on
    values, places = lax.top_k(scores, min(2 * beams, beams * vocab))
    parents, tokens = places // vocab, (places % vocab).astype(jnp.int32)
    grown = _pick(search.live, parents).at[:, :, search.taken].set(tokens)

    ends = tokens == end
    counted = ends & (jnp.arange(values.shape[1]) < beams)[None] & ~_done(search.ended_scores)[:, None]
    new = jnp.where(counted, values / length_divisor(search.taken + 1, penalty), -jnp.inf)
    ended_scores, order = lax.top_k(jnp.concatenate([search.ended_scores, new], axis=1), beams)
    ended = _pick(jnp.concatenate([search.ended, grown], axis=1), order)

    live_scores, order = lax.top_k(jnp.where(ends, -jnp.inf, values), beams)
    rows = (jnp.arange(batch)[:, None] * beams + _pick(parents, order)).reshape(-1)
    state = jax.tree.map(lambda x: jnp.take(x, rows, axis=0) if jnp.ndim(x) else x, state)
    return _Search(search.taken + 1, state, _pick(tokens, order), _pick(grown, order), live_scores, ended, ended_scores)


def decode(
    model: Any,
    *,
    start: int,
    end: int,
    beams: int = 4,
    max_steps: int,
    length_penalty: float = 0.6,
    **extras: np.ndarray | Array,
) -> tuple[np.ndarray, np.ndarray]:
    """Beam search with an encoder-decoder model, compiled once for equal shapes and settings.

    Args:
      model: has `start(..., capacity)` -> state and `model(tokens [B, 1], state=state)` -> ModelOutput; in
        evaluation mode.
      start: the token that every row reads first.
      end: the token that ends a hypothesis.
      beams: hypotheses a row; 1 is greedy.
      max_steps: tokens a hypothesis may have.
      length_penalty: see `beam_search`.
      **extras: what `model.start` reads, with rows first: source and source_segment_ids, or picture.

    Returns:
      tokens [B, beams, max_steps] int32 and scores [B, beams], best first.

    Raises:
      ValueError: a setting out of range, no extras, or a model in training mode.
    """
    _check(beams, max_steps, length_penalty)
    if not extras:
        raise ValueError("extras must hold what the model starts from, such as source=..., got none")
    if not getattr(model, "deterministic", True):
        raise ValueError("model must be in evaluation mode: call model.eval() before decode")
    graph, parameters = nnx.split(model)
    arrays = {name: jnp.asarray(x) for name, x in extras.items()}
    tokens, scores = _decode(graph, parameters, arrays, start, end, beams, max_steps, float(length_penalty))
    return np.asarray(tokens), np.asarray(scores)


@functools.partial(jax.jit, static_argnames=("graph", "start", "end", "beams", "max_steps", "length_penalty"))
def _decode(graph, parameters, extras, start, end, beams, max_steps, length_penalty):
    model = nnx.merge(graph, parameters)
    state = repeat_rows(model.start(**extras, capacity=max_steps), beams)
    batch = next(iter(extras.values())).shape[0]

    def step(tokens, state):
        output = model(tokens[:, None], state=state)
        return output.logits[:, 0], output.state

    return beam_search(
        step,
        state,
        start=jnp.full(batch, start, jnp.int32),
        end=end,
        beams=beams,
        max_steps=max_steps,
        length_penalty=length_penalty,
    )
