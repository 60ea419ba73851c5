"""Measurements of trained models that need more than loss and accuracy: python -m memformer.lab NAME RUN_FOLDER...

A laboratory module has `measure(runs, study)`: it reads finished runs, states the claim and what came out, and
hands tables and figures to the study, which writes them.
"""

from collections.abc import Callable, Sequence

from memformer.lab.study import Study
from memformer.training.evaluation import LoadedRun

__all__ = ["LABS", "Study"]

# In the order of docs/results.md.
LABS: dict[str, Callable[[Sequence[LoadedRun], Study], None]] = {}
