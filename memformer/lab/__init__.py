"""Studies of what memories hold and models learn: python -m memformer.lab NAME [RUN_FOLDER...]

Each module declares one or two studies as data (`memformer.lab.study.Study`): the claim, the configs to train or the
sizes to simulate, and functions from the result to a verdict and a figure. `memformer.lab.runner` runs them all.
"""

from collections.abc import Mapping

from memformer.lab import (
    capacity,
    capacity_trained,
    captions,
    compression,
    context,
    convergence,
    convergence_deep,
    coreference,
    distill,
    ffn,
    forgetting,
    held,
    hierarchy,
    kernels,
    language,
    lookup,
    mqar,
    ntm,
    overwriting,
    path,
    reachability,
    recurrent,
    reflections,
    repeats,
    segment_recall,
    snr,
    snr_trained,
    strings,
    swap,
    translation,
    words,
)
from memformer.lab.study import Quick, Result, Study, Table, Verdict

__all__ = ["STUDIES", "Quick", "Result", "Study", "Table", "Verdict"]

# In the order of docs/results.md.
STUDIES: Mapping[str, Study] = {
    "snr": snr.SNR,
    "snr_trained": snr_trained.SNR_TRAINED,
    "compression": compression.COMPRESSION,
    "held": held.HELD,
    "capacity": capacity.CAPACITY,
    "capacity_trained": capacity_trained.CAPACITY_TRAINED,
    "convergence": convergence.CONVERGENCE,
    "convergence_deep": convergence_deep.CONVERGENCE_DEEP,
    "context": context.CONTEXT,
    "path": path.PATH,
    "ffn": ffn.FFN,
    "swap": swap.SWAP,
    "curriculum": swap.CURRICULUM,
    "kernels": kernels.KERNELS,
    "mqar": mqar.MQAR,
    "forgetting": forgetting.FORGETTING,
    "reachability": reachability.REACHABILITY,
    "words": words.WORDS,
    "reflections": reflections.REFLECTIONS,
    "hierarchy": hierarchy.HIERARCHY,
    "strings": strings.STRINGS,
    "recurrent": recurrent.RECURRENT,
    "translation": translation.TRANSLATION,
    "captions": captions.CAPTIONS,
    "ntm": ntm.NTM,
    "distill": distill.DISTILL,
    "coreference": coreference.COREFERENCE,
    "lookup": lookup.LOOKUP,
    "segment_recall": segment_recall.SEGMENT_RECALL,
    "overwriting": overwriting.OVERWRITING,
    "language": language.LANGUAGE,
    "repeats": repeats.REPEATS,
}
