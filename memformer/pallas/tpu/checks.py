"""Reasons why the TPU kernels cannot serve a call."""

from memformer.core.types import Array
from memformer.pallas.checks import check_chip, unsupported
from memformer.pallas.platform import tpu_kind

__all__ = ["check_tpu"]


def check_tpu(op: str, *arrays: Array) -> str:
    """Returns the kind of TPU that this trace is for.

    Raises:
      NotImplementedError: no TPU; an array in float64.
    """
    kind = tpu_kind()
    check_chip(op, kind is not None, "a TPU")
    if any(x.dtype == "float64" for x in arrays):
        raise unsupported(op, "has no float64", "implementation='chunked' or 'recurrent' serves it")
    return kind or ""
