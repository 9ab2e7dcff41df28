"""From what the user asked for, the data and the host: targets, each with its task.

In: `target=`, `task=`, `num_classes=`, specs of the data, and evidence. Out: `Target`s.
"""

import contextlib
import dataclasses
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_probes.probes.targets import Positions, Select, Target, output_of, pick
from keras_probes.probes.tasks import Clues, Task, task_of

POSITIONS = "positions"  # as `task=` has it: a class at each position of an example
AT_HAND = 2**20  # positions that are looked at


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known of a host's labels beside the spec of its data.

    Attributes:
        outputs: Structure of `tf.TensorSpec` the host returns.
        loss: As given to `compile`: a loss, or a structure of losses; `None` if there is none.
        labels: Labels at hand, structures of arrays as `y`.
        n_names: Number of names of classes that the data come with.
    """

    outputs: Any
    loss: Any = None
    labels: Sequence[Any] = ()
    n_names: int | None = None

    def loss_of(self, select: Select) -> Any:
        """The loss that compares an output with the labels `select` picks; `None` if unknown."""
        if callable(select):
            return None
        if not isinstance(self.loss, (Mapping, list, tuple)):
            return self.loss
        losses: Any = self.loss
        if select is None:
            flat = keras.tree.flatten(losses)
            return flat[0] if len(flat) == 1 else None
        with contextlib.suppress(KeyError, IndexError, TypeError):
            return losses[select]
        return None

    def labels_of(self, select: Select) -> list[np.ndarray]:
        """The labels at hand that `select` picks; none for a function, which takes x besides."""
        if callable(select):
            return []
        return [np.asarray(pick(select, None, y)) for y in self.labels]

    def output_of(self, select: Select) -> tf.TensorSpec | None:
        """The output that goes with the labels `select` picks, if there is one."""
        output = output_of(select, self.outputs)
        return output if hasattr(output, "shape") else None

    def clues(
        self,
        name: str | None,
        select: Select,
        labels: tf.TensorSpec | None,
        num_classes: Any,
        axes: int | None = None,
    ) -> Clues:
        """What is known of the labels of a target.

        Args:
            name: Of the target.
            select: Which labels these are.
            labels: Their spec; `None` before any data.
            num_classes: As the user gave it; `None` if not.
            axes: Number of axes of the positions that labels are of, if they are: then what is
                known is of a position.
        """
        output, values = self.output_of(select), self.labels_of(select)
        if axes is not None:
            labels, output = (_of_position(spec, axes) for spec in (labels, output))
            few = [y[: max(1, AT_HAND // math.prod(y.shape[1:]))] for y in values if y.ndim > axes]
            values = [y.reshape(-1, *y.shape[1 + axes :]) for y in few]
        return Clues(
            _describe(name, select),
            labels,
            output,
            self.loss_of(select),
            values,
            num_classes,
            self.n_names,
        )


def resolve_targets(
    target: Any,
    num_classes: int | Mapping[str, int] | None,
    x_spec: Any,
    y_spec: Any,
    evidence: Evidence,
    *,
    task: str | Mapping[str, str] | None = None,
    weigh: Callable[[Any, Any, Any], Any] | None = None,
    seed: int = 0,
) -> list[Target]:
    """Resolves `target=`, `task=` and `num_classes=` against what the data and the host look like.

    Args:
        target: `None`, a key or index into `y`, a function (x, y) -> labels, or a mapping from
            names to these.
        num_classes: Number of classes, or a mapping from target names to it; `None` infers it.
        x_spec: Structure of `tf.TensorSpec` of a batch's x.
        y_spec: The same of its y; `None` if it has none.
        evidence: What else is known.
        task: Name of the task, or a mapping from target names to it; `None` infers it.
        weigh: As of `Target`.
        seed: Seed of the positions that are drawn of an example.

    Returns:
        The targets, each with its task.

    Raises:
        TypeError: `target` has none of these forms.
        ValueError: Labels that fit no task or several, or that are not of the task they should be.
    """
    resolved = []
    named = named_targets(target)
    check_names(named, num_classes=num_classes, task=task)
    for name, select in named.items():
        labels = _label_spec(name, select, x_spec, y_spec)
        asked = _given(task, name)
        axes = _axes_of_positions(
            _describe(name, select), labels, evidence.output_of(select), asked
        )
        clues = evidence.clues(name, select, labels, _given(num_classes, name), axes)
        found = task_of(clues, None if asked == POSITIONS else asked)
        if found is None:
            raise ValueError(
                f"The number of classes of {clues.what} is not known: its labels are "
                "not one-hot, not at hand as arrays, and not what a cross-entropy loss of the "
                "model compares an output with. Pass num_classes=."
            )
        positions = None if axes is None else Positions.of(labels, axes, seed)
        resolved.append(Target(name, select, found, weigh, positions=positions))
    return resolved


def expected_tasks(
    target: Any,
    num_classes: int | Mapping[str, int] | None,
    task: str | Mapping[str, str] | None,
    evidence: Evidence,
) -> dict[str | None, Task | None]:
    """The task of each target as far as it is known before any data; else `None`."""
    tasks, axes = {}, expected_axes(target, evidence)
    for name, select in named_targets(target).items():
        asked = _given(task, name)
        clues = evidence.clues(name, select, None, _given(num_classes, name), axes)
        tasks[name] = task_of(clues, None if asked == POSITIONS else asked)
    return tasks


def expected_axes(target: Any, evidence: Evidence) -> int | None:
    """Number of axes of the positions that labels are likely to be of; `None` if of none.

    It is told by an output with as many, and a loss that compares it with labels.
    """
    found = set()
    for select in named_targets(target).values():
        output = evidence.output_of(select)
        known = output is not None and evidence.loss_of(select) is not None
        rank = (output.shape.rank or 0) if known and output is not None else 0
        found.add(rank - 2 if rank > 2 else None)
    return found.pop() if len(found) == 1 else None


def named_targets(target: Any) -> Mapping[str | None, Any]:
    """Returns `target=` as a mapping; a single target has the name `None`."""
    if not isinstance(target, Mapping):
        return {None: target}
    if not target or not all(isinstance(name, str) and name for name in target):
        raise ValueError(
            "Expected a mapping from the names of targets to a key, an index or a function each. "
            f"Received: target={reprlib.repr(target)}."
        )
    return target


def check_names(names: Iterable[str | None], **arguments: Any) -> None:
    """Raises a `ValueError` where a mapping from names of targets has a key that is none of them.

    Args:
        names: Of the targets.
        **arguments: What was given for all targets, or by their names.
    """
    known = list(dict.fromkeys(names))
    for argument, given in arguments.items():
        if isinstance(given, Mapping) and not given.keys() <= set(known):
            raise ValueError(
                f"Expected the keys of `{argument}` to be names of targets: "
                f"{', '.join(map(repr, known))}. Received: {argument}={dict(given)!r}."
            )


def _given(argument: Any, name: str | None) -> Any:
    """What was given for a target: an argument is for all, or a mapping from their names."""
    if isinstance(argument, Mapping):
        return argument.get(name) if name is not None else None
    return argument


def _describe(name: str | None, select: Select) -> str:
    if name is not None:
        return f"target {name!r}"
    if callable(select):
        return "the function given as target="
    return "the host's labels" if select is None else f"target={select!r}"


def _label_spec(name: str | None, select: Select, x_spec: Any, y_spec: Any) -> tf.TensorSpec:
    """Shape and dtype of the labels a target selects."""
    if select is not None and not callable(select) and not isinstance(select, (str, int)):
        raise TypeError(
            "Expected `target` to be None, a key or an index into y, a function (x, y) -> labels, "
            f"or a mapping from names to these. Received: target={reprlib.repr(select)}."
        )
    if callable(select):
        try:
            function = tf.function(lambda x, y: select(x, y), autograph=False)
            made = function.get_concrete_function(x_spec, y_spec).structured_outputs
        except Exception as error:
            raise ValueError(
                f"{_describe(name, select)} fails: {error!r}. It is called with the tensors x and "
                "y of a batch, within the compiled step: use TensorFlow or keras.ops operations."
            ) from error
        if not isinstance(made, tf.TensorSpec | tf.Tensor):
            raise ValueError(
                f"Expected {_describe(name, select)} to return one array of labels. "
                f"Received: {type(made).__name__}."
            )
        return _numbers(name, select, tf.TensorSpec(made.shape, made.dtype))
    if y_spec is None:
        raise ValueError(
            "Probes need labels, and the data has no y. Pass (x, y) to the host, or "
            "target=function of (x, y) that returns the labels."
        )
    if select is not None:
        try:
            picked = y_spec[select]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"Expected target={select!r} to be a key or index into y. "
                f"Received: y is {_structure(y_spec)}."
            ) from error
    else:
        picked = y_spec
    if not isinstance(picked, tf.TensorSpec):
        raise ValueError(
            f"Expected one array of labels for {_describe(name, select)}. "
            f"Received: {_structure(picked)}. "
            'Say which with target=, such as target="name", target=0, or {"a": 0, "b": 1} for '
            "several at once."
        )
    return _numbers(name, select, picked)


def _numbers(name: str | None, select: Select, labels: tf.TensorSpec) -> tf.TensorSpec:
    """The spec of labels, if they are numbers."""
    if labels.dtype.is_integer or labels.dtype.is_floating or labels.dtype == tf.bool:
        return labels
    raise ValueError(
        f"Expected labels of {_describe(name, select)} to be numbers. Received: "
        f"{labels.dtype.name}. Number them: keras.layers.StringLookup(num_oov_indices=0) does it "
        "in a tf.data pipeline, np.unique(y, return_inverse=True)[1] for an array."
    )


def _structure(spec: Any) -> str:
    if isinstance(spec, Mapping):
        return f"a dict with the keys {', '.join(map(repr, spec))}"
    if isinstance(spec, (list, tuple)):
        return f"a {type(spec).__name__} of {len(spec)}"
    return f"an array of shape {getattr(spec, 'shape', None)}"


def _axes_of_positions(
    what: str, labels: tf.TensorSpec, output: tf.TensorSpec | None, asked: str | None
) -> int | None:
    """Number of axes of the positions that labels are of; `None` for one label per example.

    Args:
        what: What the labels are called in errors.
        labels: Their spec, (batch, *sizes), or (batch, *sizes, columns).
        output: Of the host's output that goes with them, (batch, *sizes, columns), if there is one.
        asked: The task, as the user gave it.
    """
    rank, rank_of_output = labels.shape.rank or 0, (output.shape.rank or 0) if output else 0
    known = rank_of_output - 2 if rank_of_output > 2 else None
    if output is not None and known is not None and rank in (known + 1, known + 2):
        sizes = slice(1, 1 + known)
        same = labels.shape[sizes].is_compatible_with(output.shape[sizes])
        if same and labels.shape[1] != 1:
            return known
    if asked == POSITIONS and rank > 1:
        # One column is no axis; without an output, so many are.
        return rank - 2 if rank > 2 and labels.shape[-1] == 1 else rank - 1
    if rank > 2 or asked == POSITIONS:
        raise ValueError(
            f"Expected one label per example of {what}, or one at each position of an output of "
            f"the model. Received: labels of shape {tuple(labels.shape)}"
            + (f", and an output of shape {tuple(output.shape)}" if output else "")
            + f'. Pass task="{POSITIONS}" if each position has a class of its own (a token, pixel '
            "or patch), or target=function of (x, y) that makes one label of each example."
        )
    return None


def _of_position(spec: tf.TensorSpec | None, axes: int) -> tf.TensorSpec | None:
    """The spec of what there is of a position, of a spec of what there is of an example."""
    if spec is None or (spec.shape.rank or 0) < 1 + axes:
        return None
    return tf.TensorSpec((None, *spec.shape[1 + axes :]), spec.dtype)
