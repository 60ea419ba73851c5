"""Interleaving of independent computations at trace time.

A kernel computes one head as a chain of products in which each waits for the one before it. The compiler does not look
far enough ahead to overlap the chains of several heads when they are traced one after the other. So each chain is a
generator that yields between products, and the functions here trace the steps of several chains in turn: that keeps
the MXU busy.
"""

from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

__all__ = ["Steps", "delayed", "interleave", "interleave_groups"]

# A computation that yields between products.
Steps: TypeAlias = Generator[None, None, Any]


def interleave(chains: Sequence[Steps], stagger: int = 0) -> list[Any]:
    """Advances every chain to its next yield, in turn, until all have returned.

    Args:
      chains: the computations.
      stagger: turns by which each chain starts after the one before it; fewer of their large values are live at once.

    Returns:
      What each chain returned.
    """
    results: list[Any] = [None] * len(chains)
    running = dict(enumerate(chains))
    turn = 0
    while running:
        turn += 1
        for i, chain in list(running.items()):
            if turn <= i * stagger:
                break
            try:
                next(chain)
            except StopIteration as stop:
                results[i] = stop.value
                del running[i]
    return results


def delayed(chain: Steps, steps: int) -> Steps:
    """The chain after `steps` more yields."""
    for _ in range(steps):
        yield
    return (yield from chain)


def interleave_groups(chains: Sequence[Steps], size: int) -> Generator[None, None, None]:
    """One chain that runs others in groups of `size`: those of a group interleaved, the groups in sequence.

    Args:
      chains: the computations.
      size: chains per group.
    """
    for first in range(0, len(chains), size):
        running = list(chains[first : first + size])
        while running:
            running = [chain for chain in running if next(chain, True) is None]
            yield
