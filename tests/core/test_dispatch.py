"""The chooser: order of preference, what falls through, what does not, and the trace it leaves."""

import jax
import jax.numpy as jnp
import pytest

from memformer.core.dispatch import check_implementation, dispatch


def _unable(x):
    raise NotImplementedError("needs a chip")


def _mistaken(x):
    raise ValueError("x is wrong")


CANDIDATES = {"pallas": _unable, "chunked": lambda x: ("chunked", x), "recurrent": lambda x: ("recurrent", x)}
PREFER = ("pallas", "chunked", "recurrent")


def test_none_takes_the_first_that_can():
    assert dispatch("op", None, CANDIDATES, PREFER, 3) == ("chunked", 3)
    assert dispatch("op", None, CANDIDATES, ("recurrent", "chunked"), 3) == ("recurrent", 3)


def test_a_name_is_used():
    assert dispatch("op", "recurrent", CANDIDATES, PREFER, 3) == ("recurrent", 3)


def test_keywords_are_passed_on():
    assert dispatch("op", None, {"chunked": lambda x, *, size: (x, size)}, ("chunked",), 1, size=2) == (1, 2)


def test_a_named_one_that_cannot_says_why():
    with pytest.raises(NotImplementedError, match="needs a chip"):
        dispatch("op", "pallas", CANDIDATES, PREFER, 3)


def test_a_name_that_is_not_there_says_what_is():
    with pytest.raises(NotImplementedError, match="op has no 'pallas' implementation yet; use None or 'chunked'"):
        dispatch("op", "pallas", {"chunked": CANDIDATES["chunked"]}, ("chunked",), 3)


def test_an_unknown_name_is_the_callers_mistake():
    message = "implementation must be None or one of 'recurrent', 'chunked', 'pallas', got 'triton'"
    with pytest.raises(ValueError, match=message):
        dispatch("op", "triton", CANDIDATES, PREFER, 3)
    with pytest.raises(ValueError, match=message):
        check_implementation("triton")
    check_implementation(None)


def test_a_callers_mistake_does_not_fall_through():
    with pytest.raises(ValueError, match="x is wrong"):
        dispatch("op", None, {"pallas": _mistaken, "chunked": CANDIDATES["chunked"]}, PREFER, 3)


def test_none_that_serves_is_told_with_all_reasons():
    candidates = {"pallas": _unable, "chunked": _unable}
    with pytest.raises(NotImplementedError, match="op serves this call: pallas: needs a chip; chunked: needs a chip"):
        dispatch("op", None, candidates, ("pallas", "chunked"), 3)


def test_the_compiled_program_names_the_implementation():
    def run(x):
        return dispatch("op", None, {"chunked": jnp.sin}, ("chunked",), x)

    text = jax.jit(run).lower(jnp.ones(3)).compile().as_text()
    assert "memformer.op.chunked" in text
