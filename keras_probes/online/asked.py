"""What the probes of a host are asked: its targets and their baselines.

In: what the user asked for, and what data and host look like. Out: `Target`s, or an error that says
what does not go together.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from keras_probes.online.settings import Settings
from keras_probes.probes.resolve import POSITIONS, Evidence, resolve_targets
from keras_probes.probes.spectrum import SPECTRUM
from keras_probes.probes.targets import RandomTarget, Target


def targets_of(
    asked: Settings, known: dict[str, Any], x_spec: Any, y_spec: Any, evidence: Evidence
) -> list[Target]:
    """All targets, then their baselines.

    Args:
        asked: What the user asked for.
        known: `task` and `num_classes` as `known_of` returns them; else as the user gave them.
        x_spec: Structure of `tf.TensorSpec` of a batch's x.
        y_spec: The same of its y.
        evidence: What else is known.

    Raises:
        TypeError, ValueError: As `resolve_targets`; or no target can be measured as was asked.
    """
    targets = resolve_targets(
        asked.target,
        x_spec=x_spec,
        y_spec=y_spec,
        evidence=evidence,
        weigh=asked.sample_weight,
        seed=asked.seed,
        **known,
    )
    targets = [dataclasses.replace(t, task=t.task.measuring(asked.metrics)) for t in targets]
    _check_metrics(asked.metrics, targets)
    random = [
        RandomTarget(t.name, t.select, t.task, t.weigh, "shuffled", t.positions) for t in targets
    ]
    initial = [dataclasses.replace(t, baseline="initial") for t in targets]
    return targets + [t for t in random + initial if t.baseline in asked.baselines]


def known_of(targets: Sequence[Target]) -> dict[str, Any]:
    """`task` and `num_classes` as they turned out, as the callback takes them."""
    tasks = {target.name: target.task for target in targets if not target.baseline}
    names = {name: task.name for name, task in tasks.items()}
    if targets[0].positions is not None:  # the shape of the labels says so again
        names = {n: POSITIONS if of == "classification" else of for n, of in names.items()}
    counts = {n: task.outputs for n, task in tasks.items() if task.name == "classification"}
    if None in tasks:
        return {"task": names[None], "num_classes": counts.get(None)}
    return {"task": names, "num_classes": counts}


def axes_of(targets: Iterable[Target]) -> int | None:
    """Number of axes of the positions that labels are of; `None` where they are of examples.

    Raises:
        ValueError: Some are of examples, some of positions.
    """
    axes = {None if t.positions is None else t.positions.axes for t in targets}
    if len(axes) > 1:
        raise ValueError(
            "Expected the labels of all targets to be of examples, or all of positions. "
            "Received: both. Use a callback for each of the two."
        )
    return axes.pop()


def about(targets: Iterable[Target]) -> str:
    """How many classes, labels or numbers the targets ask for, in words."""
    return ", ".join(t.task.about + (f" ({t.key!r})" if t.key is not None else "") for t in targets)


def _check_metrics(metrics: Sequence[str], targets: Sequence[Target]) -> None:
    """Refuses a metric that no target can be measured by."""
    of_tasks = (metric for target in targets for metric in target.task.measurable)
    known = dict.fromkeys((*of_tasks, *SPECTRUM))
    for metric in metrics:
        if metric not in known:
            raise ValueError(
                f"Expected metrics= of {', '.join(sorted({t.task.name for t in targets}))}: "
                f"{', '.join(map(repr, known))}. Received: {metric!r}."
            )
