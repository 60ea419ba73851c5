"""The switch of Pallas' GPU interpreter, for tests."""

import contextlib
from collections.abc import Iterator

from memformer.pallas.gpu import compat
from memformer.pallas.platform import set_interpreter

__all__ = ["interpreted"]


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Runs the kernels traced inside in Pallas' GPU interpreter with race detection, on any backend.

    Raises:
      NotImplementedError: this jax has no interpreter that can run them (before 0.11).
    """
    with compat.gpu_interpret_mode(), set_interpreter("gpu"):
        yield
