"""Beam search over any model that decodes token by token, and its compiled form for encoder-decoder models."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from memformer.core.checks import check_at_least, check_number, check_size
from memformer.core.types import Array, Float, Int
from memformer.layers.sharding import on_auto_mesh

__all__ = ["beam_search", "decode", "length_divisor", "repeat_rows"]


class _Search(NamedTuple):
    """The hypotheses of a search over B rows with K beams; empty places have score -inf.

    `steps` counts the tokens so far, and `last` [B, K] is the token to read next. `live` [B, K, S] and `live_scores`
    are the unfinished hypotheses, `finished` and `finished_scores` those with an end token, best first.
    """

    steps: Array
    state: Any
    last: Array
    live: Array
    live_scores: Array
    finished: Array
    finished_scores: Array


def length_divisor(length: int | Array, penalty: float) -> Float[Array, ""]:
    """((5 + length) / 6)^penalty, the divisor of log probabilities; 1 for penalty 0.

    Source: arXiv 1609.08144, equation 14 (without the coverage penalty).

    Example:
      >>> float(length_divisor(7, 1.0))
      2.0
    """
    return ((5 + jnp.asarray(length, jnp.float32)) / 6) ** jnp.float32(penalty)


def repeat_rows(state: Any, beams: int) -> Any:
    """Repeats each row of every array of a state `beams` times; scalars are unchanged.

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
    """Approximates the most probable sequences with `beams` = K hypotheses per row; K = 1 is greedy decoding.

        score(y) = log P(y) / ((5 + |y|) / 6)^length_penalty

    where |y| includes the end token. At each step, those of the K best continuations that are the end token finish
    their hypotheses, and the K best others stay live. A row is done once K hypotheses have finished; if more finish in
    one step, the K best by score are kept. After max_steps, remaining places are filled with the most probable live
    hypotheses, ranked behind the finished ones regardless of score. Works under jit; the loop stops when all rows are
    done.

    Args:
      step: (tokens [B * K], state) -> (logits [B * K, vocab], state); row b * K + k is hypothesis k of row b.
      state: initial state for B * K rows (see `repeat_rows`). Arrays have rows on their first axis; scalars are shared.
      start: [B], the first token to read, which is not part of the result.
      end: the token that finishes a hypothesis.
      beams: K.
      max_steps: S, maximum number of tokens of a hypothesis, including the end token.
      length_penalty: 0 ranks by probability, which favours short sequences; larger values favour longer ones.

    Returns:
      tokens [B, K, S] int32, best first, padded with `end`; scores [B, K] float32, -inf where a row has fewer
      hypotheses than places.

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
    beams, max_steps, length_penalty = _check(beams, max_steps, length_penalty)
    batch = start.shape[0]
    none = jnp.full((batch, beams), -jnp.inf, jnp.float32)
    blank = jnp.full((batch, beams, max_steps), end, jnp.int32)
    last = jnp.broadcast_to(start.astype(jnp.int32)[:, None], (batch, beams))
    # Initially all beams of a row are identical, so only one of them counts.
    first = _Search(jnp.int32(0), state, last, blank, none.at[:, 0].set(0.0), blank, none)

    def unfinished(search: _Search) -> Array:
        return (search.steps < max_steps) & ~jnp.all(_done(search.finished_scores))

    def advance(search: _Search) -> _Search:
        logits, state = step(search.last.reshape(-1), search.state)
        return _advance(search, logits, state, end, length_penalty)

    search = lax.while_loop(unfinished, advance, first)
    live_scores = search.live_scores / length_divisor(max_steps, length_penalty)
    scores = jnp.concatenate([search.finished_scores, live_scores], axis=1)
    # Both halves are sorted already: a stable sort moves the empty places to the end.
    order = jnp.argsort(scores == -jnp.inf, axis=1, stable=True)[:, :beams]
    return _pick(jnp.concatenate([search.finished, search.live], axis=1), order), _pick(scores, order)


def _check(beams: int, max_steps: int, length_penalty: float) -> tuple[int, int, float]:
    """The settings as Python numbers."""
    penalty = check_number("length_penalty", length_penalty, at_least=0)
    return check_size("beams", beams), check_size("max_steps", max_steps), penalty


def _done(finished_scores: Array) -> Array:
    return finished_scores[:, -1] > -jnp.inf


def _pick(x: Array, places: Array) -> Array:
    """x[b, places[b]] along axis 1."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)


def _advance(search: _Search, logits: Array, state: Any, end: int, penalty: float) -> _Search:
    """Extends every live hypothesis by a token."""
    batch, beams, _ = search.live.shape
    vocab = logits.shape[-1]
    scores = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beams, vocab)
    scores = (search.live_scores[..., None] + scores).reshape(batch, -1)
    # At most K of the 2 K best candidates are end tokens (one per beam), so K others are left to stay live.
    values, places = lax.top_k(scores, min(2 * beams, beams * vocab))
    parents, tokens = places // vocab, (places % vocab).astype(jnp.int32)
    grown = _pick(search.live, parents).at[:, :, search.steps].set(tokens)

    ends = tokens == end
    counted = ends & (jnp.arange(values.shape[1]) < beams)[None] & ~_done(search.finished_scores)[:, None]
    new = jnp.where(counted, values / length_divisor(search.steps + 1, penalty), -jnp.inf)
    finished_scores, order = lax.top_k(jnp.concatenate([search.finished_scores, new], axis=1), beams)
    finished = _pick(jnp.concatenate([search.finished, grown], axis=1), order)

    live_scores, order = lax.top_k(jnp.where(ends, -jnp.inf, values), beams)
    rows = (jnp.arange(batch)[:, None] * beams + _pick(parents, order)).reshape(-1)
    state = jax.tree.map(lambda x: jnp.take(x, rows, axis=0) if jnp.ndim(x) else x, state)
    last, live = _pick(tokens, order), _pick(grown, order)
    return _Search(search.steps + 1, state, last, live, live_scores, finished, finished_scores)


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
      model: in evaluation mode, with `start(..., capacity)` -> state and `model(tokens [B, 1], state=state)` ->
        ModelOutput.
      start: the first token that every row reads.
      end: the token that finishes a hypothesis.
      beams: hypotheses per row; 1 is greedy decoding.
      max_steps: maximum number of tokens of a hypothesis.
      length_penalty: see `beam_search`.
      **extras: arguments of `model.start`, rows first: source and source_segment_ids, or picture.

    Returns:
      tokens [B, beams, max_steps] int32 and scores [B, beams], best first.

    Raises:
      ValueError: a setting out of range, no extras, or a model in training mode.
    """
    beams, max_steps, length_penalty = _check(beams, max_steps, length_penalty)
    if not extras:
        raise ValueError("extras must hold the input that the model starts from, such as source=..., got none")
    if not getattr(model, "deterministic", True):
        raise ValueError("model must be in evaluation mode: call model.eval() before decode")
    graph, parameters = nnx.split(model)
    arrays = {name: jnp.asarray(x) for name, x in extras.items()}
    settings = (check_at_least("start", start, 0), check_at_least("end", end, 0), beams, max_steps, length_penalty)
    with on_auto_mesh((parameters, arrays)) as (parameters, arrays):
        tokens, scores = _decode(graph, parameters, arrays, *settings)
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
