"""Generated tasks: seeded generators, each with its distribution, its best possible loss and its score.

===================== =================================================================================
``induction``         one special token recalls what followed it (Mamba's induction heads task)
``repeated``          a block of random tokens over and over (Olsson's)
``twice``             N random tokens, twice
``copying``           a string, a delimiter or none, the string again
``selective_copying`` some tokens in noise, then the same in order
``recall``            key-value pairs, then every key again (multi-query associative recall)
``markov``            a Markov chain of order k, learnt from the row itself
``parity``            the parity of all bits so far
``permutations``      the product of all permutations so far (the word problem of S5)
``needle``            a marked key and value in filler, asked for at the end
``phonebook``         names and numbers, then a name
===================== =================================================================================

Text tasks for language models are in :mod:`mambascope.analyses.tasks.text`. Names are imported when first used.
"""

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

from mambascope.errors import ConfigError, UnknownNameError, nearest

if TYPE_CHECKING:
    from mambascope.analyses.tasks.copying import Copying, RepeatedTokens, SelectiveCopying, TwiceRepeated
    from mambascope.analyses.tasks.induction import InductionHeads
    from mambascope.analyses.tasks.markov import MarkovChain
    from mambascope.analyses.tasks.recall import AssociativeRecall, Needle, Phonebook
    from mambascope.analyses.tasks.task import Sample, Score, Task, evaluate
    from mambascope.analyses.tasks.text import TextScore, TextTask, load_text_task
    from mambascope.analyses.tasks.tracking import Parity, WordProblem

_HOME = {
    "AssociativeRecall": "recall",
    "Copying": "copying",
    "InductionHeads": "induction",
    "MarkovChain": "markov",
    "Needle": "recall",
    "Parity": "tracking",
    "Phonebook": "recall",
    "RepeatedTokens": "copying",
    "Sample": "task",
    "Score": "task",
    "SelectiveCopying": "copying",
    "Task": "task",
    "TextScore": "text",
    "TextTask": "text",
    "TwiceRepeated": "copying",
    "WordProblem": "tracking",
    "evaluate": "task",
    "load_text_task": "text",
}

_TASKS = {
    "copying": "Copying",
    "induction": "InductionHeads",
    "markov": "MarkovChain",
    "needle": "Needle",
    "parity": "Parity",
    "permutations": "WordProblem",
    "phonebook": "Phonebook",
    "recall": "AssociativeRecall",
    "repeated": "RepeatedTokens",
    "selective_copying": "SelectiveCopying",
    "twice": "TwiceRepeated",
}

__all__ = [
    "AssociativeRecall",
    "Copying",
    "InductionHeads",
    "MarkovChain",
    "Needle",
    "Parity",
    "Phonebook",
    "RepeatedTokens",
    "Sample",
    "Score",
    "SelectiveCopying",
    "Task",
    "TextScore",
    "TextTask",
    "TwiceRepeated",
    "WordProblem",
    "evaluate",
    "load_text_task",
    "make_task",
    "task_names",
    "task_type",
]


def task_names() -> list[str]:
    """The names that :func:`make_task` and a recipe's ``[task]`` know."""
    return sorted(_TASKS)


def task_type(name: str) -> "type[Task]":
    """The class of a task. Raises UnknownNameError with the nearest names."""
    if name not in _TASKS:
        raise UnknownNameError(
            f"there is no task {name!r}{nearest(name, _TASKS) or '.'} Known: {', '.join(task_names())}"
        )
    return __getattr__(_TASKS[name])


def make_task(name: str, **options: Any) -> "Task":
    """The task of that name with these fields, for example ``make_task("recall", pairs=16)``.

    Raises UnknownNameError for a name and ConfigError for a field that it does not have, both with the nearest.
    """
    kind: Any = task_type(name)
    known = [field.name for field in dataclasses.fields(kind)]
    for key in options:
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"task {name!r} has no option {key!r}{nearest(key, known)}; {has}")
    return kind(**options)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
