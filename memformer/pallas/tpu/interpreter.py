"""The switch of Pallas' TPU interpreter, for tests."""

import contextlib
from collections.abc import Iterator

from jax.experimental.pallas import tpu as pltpu

from memformer.pallas.platform import set_interpreter

__all__ = ["interpreted"]


@contextlib.contextmanager
def interpreted(params: pltpu.InterpretParams | None = None) -> Iterator[None]:
    """Runs the kernels traced inside in Pallas' TPU interpreter, on any backend.

    Args:
      params: settings of the interpreter; None simulates two cores for "parallel" grid axes, detects races, and fills
        uninitialized memory with NaN.
    """
    params = params or pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=2
    )
    # JAX's own switch is part of the cache key of jit; ours is what `platform` can see.
    with set_interpreter("tpu"), pltpu.force_tpu_interpret_mode(params):
        yield
