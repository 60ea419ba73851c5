"""Generated pictures of coloured shapes, with captions.

A scene has one shape, or two, of which the caption names the larger first: "a red circle above a blue square". All
random numbers come from the scene's generator, so that scene i of (seed, split) is the same everywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Figure", "describe_scene", "draw_scene", "figure_coverage", "paint_scene"]

COLOURS = {
    "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.6, 0.15),
    "blue": (0.1, 0.25, 0.85),
    "yellow": (0.95, 0.8, 0.05),
    "purple": (0.55, 0.15, 0.65),
    "black": (0.05, 0.05, 0.05),
}
KINDS = ("circle", "square", "triangle", "cross", "ring")

# Position of the larger shape, with the direction (x, y) from it to the smaller; y points down.
RELATIONS = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}

# Pairs of colour and kind that only the test split has; every colour and every kind is in training.
HELD_OUT = tuple((colour, KINDS[(i + 1) % len(KINDS)]) for i, colour in enumerate(COLOURS))
SEEN = tuple((colour, kind) for colour in COLOURS for kind in KINDS if (colour, kind) not in HELD_OUT)

WORDS = ("a", *COLOURS, *KINDS, "above", "below", "left", "right", "of")

# Number of words of the longest caption: "a red circle left of a blue square".
LONGEST = 8

# Radii, as fractions of the picture's side, apart enough that "the larger" is unambiguous.
LARGE, SMALL = (0.17, 0.21), (0.09, 0.12)
# Minimum gap between two shapes along their direction.
GAP = 0.04


class Figure(NamedTuple):
    """One shape of a scene; lengths are fractions of the picture's side, and (0, 0) is the upper left corner.

    Attributes:
      colour: a key of `COLOURS`.
      kind: one of `KINDS`.
      x, y: the centre.
      radius: half the side of the bounding box.
    """

    colour: str
    kind: str
    x: float
    y: float
    radius: float


def draw_scene(rng: np.random.Generator, *, held_out: bool) -> tuple[str, tuple[Figure, ...]]:
    """Draws a scene.

    Args:
      rng: the scene's generator.
      held_out: True for at least one shape of `HELD_OUT`, False for none.

    Returns:
      (relation, figures): a key of `RELATIONS` with the larger and the smaller figure; or, for a quarter of the scenes,
      ("", (figure,)).

    Example:
      >>> relation, figures = draw_scene(np.random.default_rng(0), held_out=False)
      >>> describe_scene(relation, figures)
      ('a', 'black', 'circle', 'above', 'a', 'yellow', 'cross')
    """
    pairs = [SEEN[rng.integers(len(SEEN))], SEEN[rng.integers(len(SEEN))]]
    alone = rng.random() < 0.25
    if held_out:
        everything = SEEN + HELD_OUT
        new = 0 if alone else rng.integers(2)
        pairs[new] = HELD_OUT[rng.integers(len(HELD_OUT))]
        pairs[1 - new] = everything[rng.integers(len(everything))]
    large, small = rng.uniform(*LARGE), rng.uniform(*SMALL)
    if alone:
        radius = (large, small)[rng.integers(2)]
        x, y = rng.uniform(radius, 1 - radius, 2)
        return "", (Figure(*pairs[0], x, y, radius),)
    relation = tuple(RELATIONS)[rng.integers(len(RELATIONS))]
    direction = np.array(RELATIONS[relation])
    distance = rng.uniform(large + small + GAP, 1 - large - small)
    # The sideways offset is less than half of that, which makes the relation unambiguous.
    offset = np.where(direction, direction * distance, rng.uniform(-0.4, 0.4) * distance)
    first = rng.uniform(np.maximum(large, small - offset), np.minimum(1 - large, 1 - small - offset))
    (x, y), (right, down) = first, offset
    return relation, (Figure(*pairs[0], x, y, large), Figure(*pairs[1], x + right, y + down, small))


def describe_scene(relation: str, figures: Sequence[Figure]) -> tuple[str, ...]:
    """Words of the caption of a scene.

    Example:
      >>> describe_scene("left of", [Figure("red", "ring", 0.2, 0.5, 0.2), Figure("blue", "cross", 0.8, 0.5, 0.1)])
      ('a', 'red', 'ring', 'left', 'of', 'a', 'blue', 'cross')
    """
    words = [word for figure in figures for word in ("a", figure.colour, figure.kind)]
    return (*words[:3], *relation.split(), *words[3:])


def figure_coverage(figure: Figure, size: int) -> np.ndarray:
    """Fraction of each pixel that a figure covers, [size, size] in [0, 1], with smooth edges.

    Example:
      >>> figure_coverage(Figure("red", "square", 0.5, 0.5, 0.2), 5)[2]
      array([0. , 0.35..., 1. , 0.35..., 0. ])
    """
    centres = (np.arange(size) + 0.5) / size
    x, y = centres[None, :] - figure.x, centres[:, None] - figure.y
    return np.clip(0.5 - _distance(figure.kind, np.abs(x), y, figure.radius) * size, 0, 1)


def _distance(kind: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance to a shape's edge, or a bound of it; negative inside. Shapes are symmetric, and x is |x|."""
    if kind == "circle":
        return np.hypot(x, y) - r
    if kind == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * r) - 0.25 * r
    if kind == "triangle":
        # Corners (0, -r), (r, 0.8 r) and (-r, 0.8 r).
        return np.maximum(y - 0.8 * r, (1.8 * x - (y + r)) / np.hypot(1.8, 1))
    y = np.abs(y)
    if kind == "square":
        return np.maximum(x, y) - 0.85 * r
    return np.minimum(np.maximum(x - r, y - 0.3 * r), np.maximum(x - 0.3 * r, y - r))


def paint_scene(rng: np.random.Generator, figures: Sequence[Figure], size: int) -> np.ndarray:
    """Paints a scene on a background of random light grey: float32 [size, size, 3] in [0, 1]."""
    picture = np.full((size, size, 3), rng.uniform(0.85, 1))
    for figure in figures:
        covered = figure_coverage(figure, size)[:, :, None]
        # Shades vary within each named colour.
        picture += covered * (np.array(COLOURS[figure.colour]) * rng.uniform(0.8, 1) - picture)
    return picture.astype(np.float32)
