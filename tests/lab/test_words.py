"""The argument behind the study of words: which letters one layer can track, with weights written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memformer.lab.reflections import FAILS, REACHES, REFLECTIONS, SETS, TRACKS
from memformer.lab.study import Result, Table
from memformer.ops.delta_product import delta_product


def transition(beta, k, w):
    return np.eye(len(k)) - beta * np.outer(k, w)


def test_one_write_has_real_eigenvalues_and_two_can_turn_by_a_third():
    rng = np.random.default_rng(0)
    for _ in range(20):
        k, w = (a / np.linalg.norm(a) for a in rng.standard_normal((2, 6)))
        values = np.linalg.eigvals(rng.uniform() * transition(rng.uniform(0, 2), k, w))
        assert abs(values.imag).max() < 1e-12
    first, second = np.array([1.0, 0.0]), np.array([np.cos(np.pi / 3), np.sin(np.pi / 3)])
    turn = transition(2, second, second) @ transition(2, first, first)
    np.testing.assert_allclose(np.linalg.matrix_power(turn, 3), np.eye(2), atol=1e-12)
    assert np.linalg.norm(turn - np.eye(2)) > 1


@pytest.mark.parametrize("eigenvalue", [-1.7, -1.0, -0.9, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_a_letter_repeated_ends_in_a_cycle_of_one_or_two(eigenvalue, decay):
    """The direction of what a query reads after the same write, erasing elsewhere, again and again."""
    k, w, query, value = np.random.default_rng(0).standard_normal((4, 6))
    w = w - (w @ k) / (k @ k) * k if eigenvalue == 1 else w
    beta = 1.0 if eigenvalue == 1 else (1 - eigenvalue) / (w @ k)
    state, reads = np.zeros((6, 6)), []
    for _ in range(300):
        state = decay * state
        state = state + np.outer(k, value - beta * state.T @ w)
        reads.append(query @ state / np.linalg.norm(query @ state))
    np.testing.assert_allclose(reads[-4:], reads[-6:-2], atol=1e-3)


def cycle(size):
    """The cycle of the first `size` of five elements, as a matrix."""
    return np.eye(5)[[*range(1, size), 0, *range(size, 5)]]


def test_the_cycle_of_five_needs_four_writes():
    assert [np.linalg.matrix_rank(cycle(n) - np.eye(5)) for n in (2, 3, 4, 5)] == [1, 2, 3, 4]


def test_four_writes_track_s5_at_500_letters():
    swaps = np.zeros((4, 5))
    for i in range(4):
        swaps[i, [i, i + 1]] = 0.5**0.5, -(0.5**0.5)
    letters = np.random.default_rng(0).integers(2, size=500)
    beta = np.where(letters[:, None] == 1, 2.0, [2.0, 0, 0, 0])
    # of the swap the first write alone
    keys = jnp.asarray(np.broadcast_to(swaps[None, None, :, None], (1, 500, 4, 1, 5)), jnp.float32)
    _, state = delta_product(
        jnp.zeros((1, 500, 1, 5)),
        keys,
        jnp.zeros((1, 500, 4, 1, 5)),
        jnp.asarray(beta[None, :, :, None], jnp.float32),
        initial_state=jnp.eye(5)[None, None],
    )
    matrices = [np.eye(5)] * 2
    for n, count in enumerate((1, 4)):
        for i in range(count):
            matrices[n] = transition(2, swaps[i], swaps[i]) @ matrices[n]
    expected = np.eye(5)
    for letter in letters:
        expected = matrices[letter] @ expected
    assert np.array_equal(np.linalg.matrix_power(matrices[1], 5).round(9), np.eye(5))
    np.testing.assert_allclose(jax.device_get(state)[0, 0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("label", "length", "value", "kind"),
    [
        ("S3 product2", "64", 0.0, "confirmed"),
        ("S5_two product4", "500", TRACKS - 0.1, "partly confirmed"),
        ("A5_two own", "128", FAILS + 0.1, "partly confirmed"),
        ("S4_two equal3", "128", REACHES[0] - 0.1, "partly confirmed"),
        ("S3 own2", "500", REACHES[1] - 0.1, "partly confirmed"),
    ],
)
def test_the_verdict_has_the_thresholds_that_were_stated(label, length, value, kind):
    scores = {"tracks": 1.0, "fails": FAILS - 0.1, "equal": 1.0, "own_two": 1.0}
    values = {
        name: dict.fromkeys(("64", "128", "500"), [score] * 3) for part, score in scores.items() for name in SETS[part]
    }
    values[label] = {**values[label], length: [value] * 3}
    assert REFLECTIONS.judge(Result([Table("x", [{"x": 1}])], values)).kind == kind
