"""Tolerances of numeric tests: one error measure and one table."""

import jax
import numpy as np

# Relative root mean square against the float64 recurrence, by dtype of the inputs.
FORWARD = {"float64": 1e-10, "float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
GRADIENT = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}


def relative_rms(got, want) -> float:
    """|got - want| / |want| as root mean squares in float64; |got| where want is 0."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise AssertionError(f"shapes differ: {got.shape} and {want.shape}")
    size = np.sqrt(np.mean(want**2))
    error = np.sqrt(np.mean((got - want) ** 2))
    return float(error / size) if size > 0 else float(error)


def assert_close(got, want, tolerance: float, what: str = "") -> None:
    """Asserts that every leaf of `got` is finite and within `tolerance` of `want` in relative RMS."""
    got_leaves, got_tree = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_tree = jax.tree_util.tree_flatten_with_path(want)
    assert got_tree == want_tree, f"{what}: trees differ: {got_tree} and {want_tree}"
    assert got_leaves, f"{what}: nothing to compare"
    for (path, g), (_, w) in zip(got_leaves, want_leaves, strict=True):
        where = f"{what}{jax.tree_util.keystr(path)}"
        assert np.all(np.isfinite(np.asarray(g, np.float64))), f"{where}: not finite"
        error = relative_rms(g, w)
        assert error <= tolerance, f"{where}: relative RMS {error:.2e} > {tolerance:.0e}"


def slopes(value_and_gradient, at, *, seed: int = 0, step: float = 1e-6) -> tuple[float, float]:
    """The derivative along a random direction: by the gradient, and by the two values around `at`.

    Args:
      value_and_gradient: a compiled function of one tree of float64 arrays, called three times; the tree is moved with
        NumPy, which compiles nothing.
      at: the tree.
      seed: of the direction.
      step: length of the step to both sides.
    """
    leaves, tree = jax.tree.flatten(jax.device_get(at))
    rng = np.random.default_rng(seed)
    way = [rng.standard_normal(np.shape(x)) for x in leaves]
    gradient = jax.tree.leaves(value_and_gradient(at)[1])
    along = sum(float(np.vdot(g, d)) for g, d in zip(gradient, way, strict=True))
    moved = [[x + s * step * d for x, d in zip(leaves, way, strict=True)] for s in (1, -1)]
    ahead, behind = (float(value_and_gradient(tree.unflatten(x))[0]) for x in moved)
    return along, (ahead - behind) / (2 * step)
