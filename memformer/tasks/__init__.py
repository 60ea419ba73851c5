"""Tasks: random-access sources of examples, built by name with `make_task`."""

from memformer.tasks.captions import Captions
from memformer.tasks.context_free_languages import BracketArithmetic, ReverseString, StackManipulation
from memformer.tasks.coreference import Coreference, Sentence
from memformer.tasks.formal_languages import FormalLanguage, OneAnswer, scaled_accuracy
from memformer.tasks.group_words import GROUPS, GroupWords, cayley_table
from memformer.tasks.language_modeling import LanguageModeling
from memformer.tasks.lookup import Lookup
from memformer.tasks.mqar import MQAR
from memformer.tasks.ntm import AssociativeRecall, Copy, DynamicNGrams, PrioritySort, RepeatCopy, optimal_bits
from memformer.tasks.reachability import Reachability
from memformer.tasks.registry import TASKS, import_tasks, make_task, register
from memformer.tasks.regular_languages import CycleNavigation, EvenPairs, ModularArithmetic, Parity
from memformer.tasks.segment_recall import Remember, Rewrite
from memformer.tasks.swap import Swap
from memformer.tasks.task import Task
from memformer.tasks.text import Text
from memformer.tasks.translation import Translation, VersePair

__all__ = [
    "GROUPS",
    "MQAR",
    "TASKS",
    "AssociativeRecall",
    "BracketArithmetic",
    "Captions",
    "Copy",
    "Coreference",
    "CycleNavigation",
    "DynamicNGrams",
    "EvenPairs",
    "FormalLanguage",
    "GroupWords",
    "LanguageModeling",
    "Lookup",
    "ModularArithmetic",
    "OneAnswer",
    "Parity",
    "PrioritySort",
    "Reachability",
    "Remember",
    "RepeatCopy",
    "ReverseString",
    "Rewrite",
    "Sentence",
    "StackManipulation",
    "Swap",
    "Task",
    "Text",
    "Translation",
    "VersePair",
    "cayley_table",
    "import_tasks",
    "make_task",
    "optimal_bits",
    "register",
    "scaled_accuracy",
]
