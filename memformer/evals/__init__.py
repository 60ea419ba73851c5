"""Evaluation of language models: the language-model evaluation harness, likelihoods of text, loss by position.

python -m memformer.evals my_task.yaml --workdir=runs/lm
"""

from memformer.evals.harness import harness_model, run_harness
from memformer.evals.positions import PositionLoss, evaluate_positions, loss_by_position
from memformer.evals.scoring import TextScorer

__all__ = ["PositionLoss", "TextScorer", "evaluate_positions", "harness_model", "loss_by_position", "run_harness"]
