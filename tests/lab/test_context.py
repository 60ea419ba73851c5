"""Regression in context: the sequences, the best answer, and that a short training gets below a guess."""

import functools

import jax
import numpy as np

from memformer.lab import context
from memformer.lab.context import draw_regression, draw_test, ridge_error

draw = functools.partial(jax.jit, static_argnums=(1, 2, 3))(draw_regression)


def test_sequences_are_questions_and_pairs_in_turn():
    tokens, answers, maps = (np.asarray(part) for part in draw(jax.random.key(0), 6, 512, 3))
    questions, pairs = tokens[:, ::2], tokens[:, 1::2]
    np.testing.assert_array_equal(questions[..., :4], pairs[..., :4])
    np.testing.assert_array_equal(pairs[..., 4], answers)
    assert (questions[..., 4] == 0).all() and (questions[..., 5] == 1).all() and (pairs[..., 5] == 0).all()
    rest = answers - np.einsum("bni,nbi->bn", pairs[..., :4], maps[np.array([0, 0, 0, 1, 1, 1])])
    np.testing.assert_allclose(rest.std(), 0.1, rtol=0.1)


def test_questions_are_independent_of_the_maps(monkeypatch):
    monkeypatch.setattr(context, "draw_regression", draw)
    tokens, asked, maps = draw_test(jax.random.key(2), 4, 2048)
    moved, again, _ = draw_test(jax.random.key(2), 4, 2048, change=2)
    truth = np.sum(maps[0] * asked, axis=1)
    # x* and W of unit length: the squared answer has mean 1, of parallel ones 6
    assert abs(np.mean(truth)) < 0.15 and 0.7 < np.mean(truth**2) < 1.4
    np.testing.assert_array_equal(asked, again)
    np.testing.assert_array_equal(tokens[:, :4], moved[:, :4])


def test_ridge_finds_the_map():
    tokens, _, maps = (np.asarray(part) for part in draw(jax.random.key(1), 40, 256, None))
    asked = np.random.default_rng(0).standard_normal((256, 4))
    truth = np.sum(maps[0] * asked, axis=1)
    errors = ridge_error(tokens, asked, truth, np.array([0, 2, 40]))
    np.testing.assert_allclose(errors[0], np.mean(truth**2))
    assert errors[0] > errors[1] > 0.1 > 0.01 > errors[2]


def test_the_quick_study(measure_quickly):
    # with 8 pairs every question of the test is asked in one compiled shape
    smaller = {"memories": ("delta",), "steps": 60, "pairs": 8}
    rows = {row["memory"]: row for row in measure_quickly("context", **smaller).rows()}
    first, last = (float(rows["delta"][f"error after {t} pairs (best)"].split(" ")[0]) for t in (4, 8))
    assert last < first < 1.2 and last < 0.6
