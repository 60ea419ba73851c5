"""Evaluation by others' yardsticks: likelihoods of text, and the language-model evaluation harness.

python -m memformer.evals my_task.yaml --workdir=runs/lm
"""

from memformer.evals.harness import harness_model, run_harness
from memformer.evals.scoring import TextScorer

__all__ = ["TextScorer", "harness_model", "run_harness"]
