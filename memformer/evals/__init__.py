"""Evaluation of language models: the evaluation harness, likelihoods of text, loss by position and by distance.

python -m memformer.evals my_task.yaml --workdir=runs/lm
"""

from memformer.evals.harness import harness_model, run_harness
from memformer.evals.positions import (
    DistanceLoss,
    PositionLoss,
    evaluate_distances,
    evaluate_positions,
    loss_by_distance,
    loss_by_position,
    token_distances,
)
from memformer.evals.scoring import TextScorer

__all__ = [
    "DistanceLoss",
    "PositionLoss",
    "TextScorer",
    "evaluate_distances",
    "evaluate_positions",
    "harness_model",
    "loss_by_distance",
    "loss_by_position",
    "run_harness",
    "token_distances",
]
