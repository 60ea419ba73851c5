"""Beam search: exact against enumeration, greedy with one beam, length penalty, independent rows, user errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.models.beam import beam_search, decode, length_divisor, repeat_rows

VOCAB, STEPS, END, STARTS = 4, 4, 3, (0, 1, 2)
# Logits of the next token for each history of up to STEPS tokens after the start token.
TABLE = np.asarray(2.0 * jax.random.normal(jax.random.key(10), (VOCAB ** (STEPS + 1), VOCAB)), np.float32)


def step(tokens, state):
    """The state is a number that encodes the history, and a scalar that counts steps."""
    code = state["code"] * VOCAB + tokens
    return jnp.asarray(TABLE)[code % len(TABLE)], {"code": code, "count": state["count"] + 1}


@functools.cache
def searching(beams, penalty):
    """The jitted search, one program per number of rows for all tests."""

    def run(start):
        state = repeat_rows({"code": jnp.zeros(len(start), jnp.int32), "count": jnp.int32(0)}, beams)
        return beam_search(step, state, start=start, end=END, beams=beams, max_steps=STEPS, length_penalty=penalty)

    return jax.jit(run)


def search(beams, penalty=0.0, starts=STARTS):
    return jax.device_get(searching(beams, penalty)(np.array(starts, np.int32)))


def hypotheses(start, penalty):
    """Every sequence with its score: finished ones best first, then those of STEPS tokens without an end token."""
    others = range(VOCAB - 1)
    cut = list(itertools.product(others, repeat=STEPS))
    ended = [(*body, END) for length in range(STEPS) for body in itertools.product(others, repeat=length)]

    def score(tokens):
        code, total = start, 0.0
        for token in tokens:
            logits = TABLE[code].astype(np.float64)
            total += logits[token] - np.log(np.sum(np.exp(logits)))
            code = code * VOCAB + token
        return total / ((5 + len(tokens)) / 6) ** penalty

    order = [sorted(((score(t), t) for t in group), reverse=True) for group in (ended, cut)]
    return order[0] + order[1]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_enough_beams_find_every_sequence_in_order(penalty):
    # 40 sequences finish within four tokens and 81 stay live: all 108 last continuations are candidates.
    beams = 110
    tokens, scores = search(beams, penalty)
    for row, start in enumerate(STARTS):
        best = hypotheses(start, penalty)[:beams]
        np.testing.assert_allclose(scores[row], [score for score, _ in best], rtol=1e-4)
        want = [[*t, *[END] * (STEPS - len(t))] for _, t in best]
        np.testing.assert_array_equal(tokens[row], want)


def test_the_penalty_changes_the_order():
    plain, long = hypotheses(0, 0.0)[0][1], hypotheses(0, 2.0)[0][1]
    assert len(plain) < len(long)


def test_one_beam_is_greedy():
    for penalty in (0.0, 1.0):
        tokens, scores = search(1, penalty)
        for row, start in enumerate(STARTS):
            code, want, total = start, [], 0.0
            while len(want) < STEPS and END not in want:
                logits = TABLE[code]
                want.append(int(np.argmax(logits)))
                total += float(jax.nn.log_softmax(logits)[want[-1]])
                code = code * VOCAB + want[-1]
            np.testing.assert_array_equal(tokens[row, 0], [*want, *[END] * (STEPS - len(want))])
            np.testing.assert_allclose(scores[row, 0], total / length_divisor(len(want), penalty), rtol=1e-5)


def test_more_beams_score_no_worse_here_and_rows_are_independent():
    best = [search(beams)[1][:, 0] for beams in (1, 3, 110)]
    assert np.all(best[1] >= best[0] - 1e-6) and np.all(best[2] >= best[1] - 1e-6)
    assert np.any(best[2] > best[0] + 1e-3)
    together, alone = search(3), [search(3, starts=(start,)) for start in STARTS]
    for row, (tokens, scores) in enumerate(alone):
        np.testing.assert_array_equal(together[0][row], tokens[0])
        np.testing.assert_allclose(together[1][row], scores[0], rtol=1e-6)


def test_hypotheses_that_never_finish_are_cut():
    with np.errstate(divide="ignore"):
        never = np.log(np.array([0.5, 0.3, 0.2, 0.0], np.float32))
    stay = lambda tokens, state: (jnp.tile(never[None], (len(tokens), 1)), state)  # noqa: E731
    sizes = {"end": END, "beams": 2, "max_steps": 3, "length_penalty": 1.0}
    tokens, scores = jax.jit(lambda start: beam_search(stay, (), start=start, **sizes))(np.array([0], np.int32))
    np.testing.assert_array_equal(tokens[0], [[0, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(scores[0], np.log([0.125, 0.075]) * 6 / 8, rtol=1e-5)


def test_the_loop_stops_when_all_rows_are_done():
    calls = []

    def counting(tokens, state):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.tile(jnp.array([[0.0, 9.0]]), (len(tokens), 1)), state

    beam_search(counting, (), start=jnp.array([0, 0]), end=1, beams=1, max_steps=50)
    jax.effects_barrier()
    assert len(calls) == 1


MISTAKES = {
    "beams": ({"beams": 0}, "beams must be a positive integer, got 0"),
    "max_steps": ({"max_steps": 2.0}, "max_steps must be a positive integer, got 2.0"),
    "length_penalty": ({"length_penalty": -0.5}, "length_penalty must be a finite number of at least 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_user_errors_are_named(name):
    arguments, message = MISTAKES[name]
    same = {"start": jnp.array([0]), "end": END, "beams": 2, "max_steps": 3, **arguments}
    with pytest.raises(ValueError, match=message):
        beam_search(step, {}, **same)


def test_decode_requires_an_input():
    with pytest.raises(ValueError, match="extras must hold the input that the model starts from"):
        decode(None, start=0, end=1, max_steps=2)
