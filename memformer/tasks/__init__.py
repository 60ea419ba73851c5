"""Tasks: random-access sources of examples, by name.

A task is a frozen dataclass; `make_task` builds one from a run's settings.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from memformer.data.source import SPLITS, Example, RandomAccessSource, SyntheticSource, Task
from memformer.tasks.captions import Captions
from memformer.tasks.coreference import Coreference
from memformer.tasks.formal_languages import (
    CycleNavigation,
    EvenPairs,
    ModularArithmetic,
    Parity,
    ReverseString,
    StackManipulation,
    scaled_accuracy,
)
from memformer.tasks.group_words import GroupWords
from memformer.tasks.lookup import Lookup
from memformer.tasks.mqar import MQAR
from memformer.tasks.ntm import AssociativeRecall, Copy, DynamicNGrams, PrioritySort, RepeatCopy
from memformer.tasks.reachability import Reachability
from memformer.tasks.segment_recall import Remember, Rewrite
from memformer.tasks.swap import Swap
from memformer.tasks.text import Text
from memformer.tasks.translation import Translation

__all__ = [
    "MQAR",
    "SPLITS",
    "TASKS",
    "AssociativeRecall",
    "Captions",
    "Copy",
    "CycleNavigation",
    "DynamicNGrams",
    "EvenPairs",
    "Example",
    "GroupWords",
    "Lookup",
    "ModularArithmetic",
    "Parity",
    "PrioritySort",
    "RandomAccessSource",
    "Reachability",
    "Coreference",
    "Remember",
    "RepeatCopy",
    "ReverseString",
    "Rewrite",
    "StackManipulation",
    "Swap",
    "SyntheticSource",
    "Task",
    "Text",
    "Translation",
    "make_task",
    "scaled_accuracy",
]

TASKS: dict[str, type[Task]] = {
    "swap": Swap,
    "reachability": Reachability,
    "group_words": GroupWords,
    "parity": Parity,
    "even_pairs": EvenPairs,
    "cycle_navigation": CycleNavigation,
    "modular_arithmetic": ModularArithmetic,
    "reverse_string": ReverseString,
    "stack_manipulation": StackManipulation,
    "mqar": MQAR,
    "text": Text,
    "coreference": Coreference,
    "lookup": Lookup,
    "translation": Translation,
    "captions": Captions,
    "copy": Copy,
    "repeat_copy": RepeatCopy,
    "associative_recall": AssociativeRecall,
    "dynamic_ngrams": DynamicNGrams,
    "priority_sort": PrioritySort,
    "remember": Remember,
    "rewrite": Rewrite,
}


def make_task(settings: Mapping[str, Any]) -> Task:
    """Builds a task from `name` and that task's own settings.

    Raises:
      ValueError: no name, an unknown name, an unknown key (the known ones are listed), or a setting
        that the task refuses.

    Example:
      >>> make_task({"name": "swap", "length": 32}).length
      32
    """
    fields = dict(settings)
    name = fields.pop("name", None)
    if name not in TASKS:
        raise ValueError(f"task.name must be one of {', '.join(map(repr, TASKS))}, got {name!r}")
    known = [field.name for field in dataclasses.fields(TASKS[name])]
    for key in fields:
        if key not in known:
            raise ValueError(f"task {name!r} has no setting {key!r}; it has {', '.join(known)}")
    return TASKS[name](**fields)
