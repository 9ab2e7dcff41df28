"""What probes may be asked for: one module for each kind of label.

In: labels and outputs. Out: losses and measures. `task.py` says what a task has to know.
"""

from keras_probes.probes.tasks.classification import Classification
from keras_probes.probes.tasks.multilabel import MultiLabel
from keras_probes.probes.tasks.regression import Regression
from keras_probes.probes.tasks.task import Clues, Task

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, MultiLabel, Regression)
}
METRICS = tuple(dict.fromkeys(metric for task in TASKS.values() for metric in task.metrics))


def task_of(clues: Clues, asked: str | None = None) -> Task | None:
    """The task of some labels; `None` where too little is known of them.

    Args:
        clues: What is known.
        asked: Its name, as the user gave it; `None` infers it.

    Raises:
        ValueError: Labels that are not of the task, or may be of several.
    """
    if asked is not None:
        return TASKS[asked].of(clues)
    suiting = [task for task in TASKS.values() if task.suits(clues)]
    if len(suiting) > 1:
        names = ", ".join(repr(task.name) for task in suiting)
        raise ValueError(
            f"{clues.what.capitalize()} may be of several tasks: {names}. Say which with task=."
        )
    return suiting[0].of(clues) if suiting else None
