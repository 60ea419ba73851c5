"""Lookup: the nearest key answers in any order; the noise of the query has the given norm."""

import numpy as np
import pytest

from memformer.tasks import Lookup

COUNT = 200


def examples(**settings):
    task = Lookup(**settings)
    source = task.source("train", 0)
    return task, [source[i] for i in range(COUNT)]


@pytest.mark.parametrize("settings", [{}, {"length": 33, "noise": 0.0}, {"key_width": 32, "values": 4}], ids=str)
def test_the_nearest_key_answers(settings):
    task, drawn = examples(**settings)
    for e in drawn:
        keys, values = e["inputs"][:, : task.key_width], e["inputs"][:, task.key_width :]
        place = task.asked_place(e["inputs"])
        assert np.argmax(values[place]) == e["targets"][-1]
        np.testing.assert_allclose(np.linalg.norm(keys[:-1], axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(keys[-1] - keys[place]), task.noise, rtol=1e-3, atol=1e-6)
        assert np.all(values[:-1].sum(axis=1) == 1) and not np.any(values[-1])
        assert np.flatnonzero(e["loss_weights"]).tolist() == [task.length - 1]


def test_queries_are_uniform_over_positions():
    task, drawn = examples(length=5)
    places = np.bincount([task.asked_place(e["inputs"]) for e in drawn], minlength=4)
    assert len(places) == 4 and np.all(np.abs(places / COUNT - 1 / 4) < 0.13)
    task, drawn = examples(length=5, asked="first")
    assert {task.asked_place(e["inputs"]) for e in drawn} == {0}


def test_keys_are_drawn_anew():
    _, drawn = examples()
    keys = np.concatenate([e["inputs"][:-1, :16] for e in drawn])
    assert len(np.unique(keys, axis=0)) == len(keys)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"length": 1}, "length must be an integer of at least 2, got 1"),
        ({"values": 1}, "values must be an integer of at least 2, got 1"),
        ({"key_width": 0}, "key_width must be an integer of at least 1, got 0"),
        ({"asked": "last"}, "asked must be one of 'anywhere', 'first', got 'last'"),
        ({"noise": -0.1}, "noise must be a finite number of at least 0, got -0.1"),
        ({"noise": float("nan")}, "noise must be a finite number of at least 0, got nan"),
        ({"noise": True}, "noise must be a finite number of at least 0, got True"),
    ],
    ids=str,
)
def test_bad_options_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Lookup(**settings)
