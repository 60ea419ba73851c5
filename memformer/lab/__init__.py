"""Measurements that need more than loss and accuracy: python -m memformer.lab NAME [RUN_FOLDER...]

A laboratory module has `measure(runs, study)`, which reads finished runs of train.py, or, where it needs none,
`measure(study, quick=)`. It states the claim and what came out, and hands tables and figures to the study, which
writes them.
"""

from collections.abc import Callable, Sequence

from memformer.lab import (
    capacity,
    capacity_trained,
    captions,
    compression,
    context,
    convergence,
    convergence_deep,
    ffn,
    hierarchy,
    kernels,
    lookup,
    mqar,
    ntm,
    path,
    reachability,
    recurrent,
    reference,
    segments,
    snr,
    snr_trained,
    swap,
    translation,
    words,
)
from memformer.lab.study import Study
from memformer.training.evaluation import LoadedRun

__all__ = ["LABS", "SIMULATIONS", "Study"]

# Both in the order of docs/results.md; simulations come first.
SIMULATIONS: dict[str, Callable[..., None]] = {
    "snr": snr.measure,
    "snr_trained": snr_trained.measure,
    "compression": compression.measure,
    "capacity": capacity.measure,
    "capacity_trained": capacity_trained.measure,
    "convergence": convergence.measure,
    "convergence_deep": convergence_deep.measure,
    "context": context.measure,
    "path": path.measure,
    "ffn": ffn.measure,
    "swap": swap.measure,
    "curriculum": swap.measure_curriculum,
    "kernels": kernels.measure,
    "mqar": mqar.measure,
    "reachability": reachability.measure,
    "words": words.measure,
    "hierarchy": hierarchy.measure,
}
LABS: dict[str, Callable[[Sequence[LoadedRun], Study], None]] = {
    "recurrent": recurrent.measure,
    "translation": translation.measure,
    "captions": captions.measure,
    "ntm": ntm.measure,
    "coreference": reference.measure,
    "lookup": lookup.measure,
    "segments": segments.measure,
}
