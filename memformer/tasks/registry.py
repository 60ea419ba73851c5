"""The table of tasks, and `make_task`, which builds one from a run's config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from memformer.core.checks import check_choice, check_options
from memformer.tasks.captions import Captions
from memformer.tasks.coreference import Coreference
from memformer.tasks.formal_languages import (
    CycleNavigation,
    EvenPairs,
    ModularArithmetic,
    Parity,
    ReverseString,
    StackManipulation,
)
from memformer.tasks.group_words import GroupWords
from memformer.tasks.language_modeling import LanguageModeling
from memformer.tasks.lookup import Lookup
from memformer.tasks.mqar import MQAR
from memformer.tasks.ntm import AssociativeRecall, Copy, DynamicNGrams, PrioritySort, RepeatCopy
from memformer.tasks.reachability import Reachability
from memformer.tasks.segment_recall import Remember, Rewrite
from memformer.tasks.swap import Swap
from memformer.tasks.task import Task
from memformer.tasks.text import Text
from memformer.tasks.translation import Translation

__all__ = ["TASKS", "make_task"]

# To register a task from outside the package, add its class here: TASKS["mine"] = Mine, for example in a config file.
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
    "lm": LanguageModeling,
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


def make_task(options: Mapping[str, Any]) -> Task:
    """Builds a task from its `name` and options.

    Raises:
      ValueError: missing or unknown name, unknown option (the message lists the known ones), or an option that the
        task rejects.

    Example:
      >>> make_task({"name": "swap", "length": 32}).length
      32
    """
    fields = dict(options)
    name = fields.pop("name", None)
    check_choice("task.name", name, TASKS)
    check_options(f"task {name!r}", fields, [field.name for field in dataclasses.fields(TASKS[name])])
    return TASKS[name](**fields)
