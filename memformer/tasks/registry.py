"""The table of tasks, `register`, which adds one from outside, and `make_task`, which builds one from its options."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from memformer.core.checks import check, check_choice, check_options
from memformer.tasks.captions import Captions
from memformer.tasks.context_free_languages import BracketArithmetic, ReverseString, StackManipulation
from memformer.tasks.coreference import Coreference
from memformer.tasks.group_words import GroupWords
from memformer.tasks.language_modeling import LanguageModeling
from memformer.tasks.lookup import Lookup
from memformer.tasks.mqar import MQAR
from memformer.tasks.ntm import AssociativeRecall, Copy, DynamicNGrams, PrioritySort, RepeatCopy
from memformer.tasks.reachability import Reachability
from memformer.tasks.regular_languages import CycleNavigation, EvenPairs, ModularArithmetic, Parity
from memformer.tasks.segment_recall import Remember, Rewrite
from memformer.tasks.swap import Swap
from memformer.tasks.task import Task
from memformer.tasks.text import Text
from memformer.tasks.translation import Translation

__all__ = ["TASKS", "import_tasks", "make_task", "register"]

TASKS: dict[str, type[Task]] = {
    "swap": Swap,
    "reachability": Reachability,
    "group_words": GroupWords,
    "parity": Parity,
    "even_pairs": EvenPairs,
    "cycle_navigation": CycleNavigation,
    "modular_arithmetic": ModularArithmetic,
    "bracket_arithmetic": BracketArithmetic,
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


def register(name: str, task: type[Task]) -> type[Task]:
    """Registers a task from outside the package, so that configs and `make_task` know it by name.

    Call it in the module that defines the task, and give that module to train.py as --task_module. The run records it,
    so that eval.py and generate.py import it too.

    Args:
      name: key in `TASKS` and in a config's task.name; also set as the task's `name`.
      task: a frozen dataclass that extends `Task`.

    Returns:
      The task.

    Raises:
      ValueError: a name that is no identifier or belongs to another task, or a class that is no such dataclass.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Echo(Swap):
      ...     objects: int = 3
      >>> make_task({"name": register("echo", Echo).name, "length": 4}).objects
      3
      >>> del TASKS["echo"]
    """
    check(isinstance(name, str) and name.isidentifier(), "name", "an identifier, such as 'my_task'", name)
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise ValueError(f"task must be a class that extends memformer.tasks.Task, got {task!r}")
    # the decorator leaves its parameters in the class that it decorates, not in those derived from it
    parameters = vars(task).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise ValueError(f"task must be decorated with @dataclasses.dataclass(frozen=True), and {task.__name__} is not")
    known = TASKS.get(name, task)
    # a module that is imported again, as notebooks do, brings a new class of the same place
    if (known.__module__, known.__qualname__) != (task.__module__, task.__qualname__):
        raise ValueError(f"name {name!r} belongs to the task {known.__module__}.{known.__qualname__}: choose another")
    task.name = name
    TASKS[name] = task
    return task


def import_tasks(module: str) -> None:
    """Imports a module whose import registers tasks; modules of the working directory are found too.

    Raises:
      ValueError: no such module, or one that needs a package that is not installed.
    """
    folder = os.getcwd()
    if folder not in sys.path:
        # behind all others: the working directory replaces no installed package
        sys.path.append(folder)
    try:
        importlib.import_module(module)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"task_module must be a module that Python can import from {folder} or its path, such as my_package.tasks, "
            f"got {module!r}: {error}"
        ) from error
