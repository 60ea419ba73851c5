"""Dispatch: the order of preference, what falls through, what does not, and the scope in the trace."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from memformer.core.dispatch import check_implementation, dispatch


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an op of one argument."""

    op: str
    x: Any


CALL = Call("op", 3)


def _unable(call):
    raise NotImplementedError("needs a chip")


def _mistaken(call):
    raise ValueError("x is wrong")


TABLE = {
    "recurrent": lambda call: ("recurrent", call.x),
    "chunked": lambda call: ("chunked", call.x),
    "pallas": _unable,
}
PREFER = ("pallas", "chunked", "recurrent")


def test_none_takes_the_first_that_can():
    assert dispatch(CALL, None, TABLE, PREFER) == ("chunked", 3)
    assert dispatch(CALL, None, TABLE, ("recurrent", "chunked")) == ("recurrent", 3)


def test_a_named_one_is_used():
    assert dispatch(CALL, "recurrent", TABLE, PREFER) == ("recurrent", 3)


def test_a_named_one_that_cannot_says_why():
    with pytest.raises(NotImplementedError, match="needs a chip"):
        dispatch(CALL, "pallas", TABLE, PREFER)


def test_an_unknown_name_is_a_user_error_and_lists_what_the_op_has():
    message = "implementation must be None or one of 'recurrent', 'chunked', 'pallas', got 'triton'"
    with pytest.raises(ValueError, match=message):
        dispatch(CALL, "triton", TABLE, PREFER)
    with pytest.raises(ValueError, match=message):
        check_implementation("triton", TABLE)
    with pytest.raises(ValueError, match="one of 'chunked', got 'pallas'"):
        dispatch(CALL, "pallas", {"chunked": TABLE["chunked"]}, ("chunked",))
    check_implementation(None, TABLE)


def test_a_user_error_does_not_fall_through():
    with pytest.raises(ValueError, match="x is wrong"):
        dispatch(CALL, None, {"pallas": _mistaken, "chunked": TABLE["chunked"]}, PREFER)


def test_none_that_serves_raises_with_all_reasons():
    table = {"pallas": _unable, "chunked": _unable}
    with pytest.raises(NotImplementedError, match="op serves this call: pallas: needs a chip; chunked: needs a chip"):
        dispatch(CALL, None, table, ("pallas", "chunked"))


def test_the_compiled_program_names_the_implementation():
    def run(x):
        call = Call(op="op", x=x)
        return dispatch(call, None, {"chunked": lambda call: jnp.sin(call.x)}, ("chunked",))

    text = jax.jit(run).lower(jnp.ones(3)).compile().as_text()
    assert "memformer.op.chunked" in text
