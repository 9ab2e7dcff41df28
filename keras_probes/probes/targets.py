"""What the probes are asked for: turns a host's `y`, or anything made of it, into class labels.

In: `x`, `y` and sample weights of a batch. Out: one integer label and one weight per example.

The number of classes is told by one-hot labels, by an output of the host that its loss compares
with class labels, or by labels that are at hand. The width of any other output tells nothing.
"""

import contextlib
import dataclasses
import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Select = None | str | int | Callable[[Any, Any], Any]

# What stands in the place of a label, where an example is left out.
MISSING = -1  # it has none
WRONG = -2  # it has something else than one of the classes
WEIGHTLESS = -3  # its sample weight is 0


@dataclasses.dataclass(frozen=True)
class Target:
    """One labelling of the examples (paper, section 3.6).

    Attributes:
        name: Its name among several targets; `None` for a single one.
        select: `None` (all of `y`), a key or index into `y`, or a function of (x, y).
        num_classes: Number of classes, at least 2.
        ignored: The label of examples without one, beside numbers below 0 and NaN.
        signed: Whether labels are -1 and 1, as a hinge loss takes them.
        weigh: A function (x, y, sample_weight) -> weights, shape (batch,); `None` for the host's
            sample weights where there is one per example.
    """

    name: str | None
    select: Select
    num_classes: int
    ignored: int | None = None
    signed: bool = False
    weigh: Callable[[Any, Any, Any], Any] | None = None

    def labels(self, x: Any, y: Any) -> tf.Tensor:
        """Labels of a batch.

        Returns:
            int32, shape (batch,): a class, `MISSING`, or `WRONG`. Missing are numbers below 0, NaN,
            the ignored label, and rows of zeros.
        """
        raw = tf.convert_to_tensor(self.raw(x, y))
        if raw.shape.rank == 2 and raw.shape[1] > 1:
            total = tf.reduce_sum(tf.cast(raw, tf.float32), axis=1)
            missing = (total == 0.0) | tf.math.is_nan(total)
            # Rounding and label smoothing keep the sum at 1; several marked classes do not.
            valid = tf.abs(total - 1.0) < 1e-2
            labels = tf.argmax(raw, axis=1, output_type=tf.int32)
        else:
            flat = tf.cast(tf.reshape(raw, (-1,)), tf.float32)
            if self.signed:  # Keras takes 0 for -1 as well
                flat = tf.where(flat == -1.0, 0.0, flat)
            missing = (flat < 0) | tf.math.is_nan(flat)
            if self.ignored is not None:
                missing |= flat == float(self.ignored)
            valid = (flat < self.num_classes) & (tf.round(flat) == flat)
            labels = tf.cast(flat, tf.int32)
        return tf.where(missing, MISSING, tf.where(valid, labels, WRONG))

    def raw(self, x: Any, y: Any) -> Any:
        """Labels of a batch as they are."""
        return _pick(self.select, x, y)

    def labels_and_weights(self, x: Any, y: Any, sample_weight: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Labels of a batch, `WEIGHTLESS` where a weight is 0, and weights.

        Args:
            x: The host's input.
            y: The host's labels.
            sample_weight: What the host was given: `None`, a tensor, or a structure as `y`.

        Returns:
            int32 and float32, each of shape (batch,).
        """
        labels = self.labels(x, y)
        weights = self._weights(x, y, sample_weight, labels)
        return tf.where(weights == 0.0, WEIGHTLESS, labels), weights

    def predictions(self, outputs: Any) -> Any:
        """The host's own answers to a batch.

        Args:
            outputs: What the host returned, or the structure of `tf.TensorSpec` of that.

        Returns:
            int32, shape (batch,); `None` where no output has a column for each class.
        """
        output = _output_of(self.select, outputs)
        if output is None or output.shape[1:] != [self.num_classes]:
            return None
        return tf.argmax(output, axis=1, output_type=tf.int32) if tf.is_tensor(output) else output

    def refuse(self, wrong: int, total: int, raw: Any = None) -> None:
        """Raises a `ValueError` if `wrong` of `total` labels are none of the classes.

        Args:
            wrong: Number of labels that are `WRONG`.
            total: Number of labels.
            raw: Some of them as they are, for a guess at the reason.
        """
        if wrong:
            raise ValueError(
                f"Expected labels{self._of} to be integers from 0 to {self.num_classes - 1}, or "
                f"one-hot rows that sum to 1; a negative one is missing. Received: {wrong} of "
                f"{total} labels that are not. {_likely_reason(raw, self.num_classes)}"
            )

    def about(self, unlabelled: int, total: int) -> str:
        """Says that some of the labels are missing."""
        return (
            f"{unlabelled:,} of {total:,} labels{self._of} are missing or none of the classes 0 to "
            f"{self.num_classes - 1}. The probes leave these examples out."
        )

    @property
    def _of(self) -> str:
        return "" if self.name is None else f" of target {self.name!r}"

    def _weights(self, x: Any, y: Any, sample_weight: Any, like: tf.Tensor) -> tf.Tensor:
        """Sample weights of a batch, float32, shape (batch,); ones where there are none.

        Those of another shape, by token or pixel, weigh the host's own loss and say nothing of a
        label for the whole example.
        """
        if self.weigh is not None:
            return tf.cast(tf.reshape(self.weigh(x, y, sample_weight), (-1,)), tf.float32)
        if isinstance(sample_weight, (dict, list, tuple)):
            keyed = self.select is not None and not callable(self.select)
            sample_weight = _pick(self.select, None, sample_weight) if keyed else None
        if sample_weight is None:
            return tf.ones_like(like, tf.float32)
        sample_weight = tf.convert_to_tensor(sample_weight)
        if sample_weight.shape.rank != 1 and sample_weight.shape[1:].as_list() != [1]:
            return tf.ones_like(like, tf.float32)
        return tf.cast(tf.reshape(sample_weight, (-1,)), tf.float32)


@dataclasses.dataclass(frozen=True)
class RandomLabels:
    """A random label for each example, the same whenever it is seen (a function of x alone).

    A control task (Hewitt & Liang 2019, section 2): what a probe gets right of these labels, in
    training, it knows by heart.

    Attributes:
        num_classes: Number of classes; each is as likely.
        of: The target that it is a control of: where that has no label, there is none.
    """

    num_classes: int
    of: Target | None = None

    def __call__(self, x: Any, y: Any) -> tf.Tensor:
        """Hashes the bits of each example: whole numbers, so that no rounding changes a label."""
        prime = 2**31 - 1
        total: Any = 0
        for place, part in enumerate(tf.nest.flatten(x)):
            if part.dtype == tf.string:
                raise ValueError(
                    "A random label for each example is made of the numbers in x. Received: x with "
                    "strings. Leave out baselines=, or vectorise the text before the model."
                )
            bits = tf.cast(tf.bitcast(tf.cast(part, tf.float32), tf.int32), tf.int64)
            bits = tf.reshape(bits, (tf.shape(bits)[0], -1))
            keys = tf.random.stateless_uniform(
                tf.shape(bits)[1:], (7, place), 1, prime, tf.int64, alg="philox"
            )
            products = tf.math.floormod(tf.math.floormod(bits, prime) * keys, prime)
            total += tf.reduce_sum(products, axis=1)
        labels = tf.math.floormod(tf.math.floormod(total, prime), self.num_classes)
        if self.of is None:
            return labels
        return tf.where(self.of.labels(x, y) < 0, tf.constant(MISSING, labels.dtype), labels)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known of a host's labels beside the spec of its data.

    Attributes:
        outputs: Structure of `tf.TensorSpec` the host returns.
        loss: As given to `compile`: a loss, or a structure of losses; `None` if there is none.
        labels: Labels at hand, structures of arrays as `y`.
    """

    outputs: Any
    loss: Any = None
    labels: Sequence[Any] = ()

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
        return [np.asarray(_pick(select, None, y)) for y in self.labels]


def resolve_targets(
    target: Any,
    num_classes: int | Mapping[str, int] | None,
    x_spec: Any,
    y_spec: Any,
    evidence: Evidence,
    weigh: Callable[[Any, Any, Any], Any] | None = None,
) -> list[Target]:
    """Resolves `target=` and `num_classes=` against what the data and the host look like.

    Args:
        target: `None`, a key or index into `y`, a function (x, y) -> labels, or a mapping from
            names to these.
        num_classes: Number of classes, or a mapping from target names to it; `None` infers it.
        x_spec: Structure of `tf.TensorSpec` of a batch's x.
        y_spec: The same of its y; `None` if it has none.
        evidence: What else is known.
        weigh: As of `Target`.

    Returns:
        The targets, each with its number of classes.

    Raises:
        TypeError: `target` has none of these forms.
        ValueError: Labels of a wrong shape, fewer than 2 classes, or a number of classes that
            can't be inferred.
    """
    resolved = []
    named = named_targets(target)
    if isinstance(num_classes, Mapping) and not num_classes.keys() <= set(named):
        raise ValueError(
            "Expected the keys of `num_classes` to be names of targets: "
            f"{', '.join(map(repr, named))}. Received: num_classes={dict(num_classes)!r}."
        )
    for name, select in named.items():
        given = _given(num_classes, name)
        labels = _label_spec(name, select, x_spec, y_spec)
        _refuse_positions(name, select, labels, evidence)
        loss = evidence.loss_of(select)
        count = given if given is not None else _infer_classes(select, labels, evidence)
        if count is None:
            raise ValueError(
                f"The number of classes of {_describe(name, select)} is not known: its labels are "
                "not one-hot, not at hand as arrays, and not what a cross-entropy loss of the "
                "model compares an output with. Pass num_classes=."
            )
        _check(name, select, labels, count)
        ignored = getattr(loss, "ignore_class", None)
        resolved.append(Target(name, select, int(count), ignored, _is_hinge(loss), weigh))
    return resolved


def expected_classes(
    target: Any, num_classes: int | Mapping[str, int] | None, evidence: Evidence
) -> dict[str | None, int | None]:
    """Number of classes of each target as far as it is known before any data; else `None`."""
    return {
        name: _given(num_classes, name) or _infer_classes(select, None, evidence)
        for name, select in named_targets(target).items()
    }


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


def _given(num_classes: int | Mapping[str, int] | None, name: str | None) -> int | None:
    if isinstance(num_classes, Mapping):
        return num_classes.get(name) if name is not None else None
    return num_classes


def _pick(select: Select, x: Any, y: Any) -> Any:
    if callable(select):
        return select(x, y)
    return y if select is None else y[select]


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
        return tf.TensorSpec(made.shape, made.dtype)
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
    return picked


def _structure(spec: Any) -> str:
    if isinstance(spec, Mapping):
        return f"a dict with the keys {', '.join(map(repr, spec))}"
    if isinstance(spec, (list, tuple)):
        return f"a {type(spec).__name__} of {len(spec)}"
    return f"an array of shape {getattr(spec, 'shape', None)}"


def _infer_classes(select: Select, labels: tf.TensorSpec | None, evidence: Evidence) -> int | None:
    """The number of classes, by what tells it: see above. One column is of two classes."""
    if labels is not None and labels.shape.rank == 2 and (labels.shape[1] or 0) > 1:
        return labels.shape[1]
    if _is_hinge(evidence.loss_of(select)):
        return 2
    loss = _name_of(evidence.loss_of(select))
    shape = getattr(_output_of(select, evidence.outputs), "shape", None)
    columns = shape[1] if shape is not None and shape.rank == 2 else None
    # A binary cross-entropy over several columns is of several labels, not of classes.
    if columns and "crossentropy" in loss and ("binary" not in loss or columns == 1):
        return max(columns, 2)
    found = [y for y in evidence.labels_of(select) if y.size and y.ndim <= 2]
    highest = [np.nanmax(np.where(y < 0, np.nan, y)) for y in found if np.any(y >= 0)]
    return max(int(max(highest)) + 1, 2) if highest else None


def _is_hinge(loss: Any) -> bool:
    """Whether a loss takes -1 and 1 for two classes."""
    return "hinge" in _name_of(loss) and "categorical" not in _name_of(loss)


def _name_of(loss: Any) -> str:
    """The name of a loss without case and underscores: `sparsecategoricalcrossentropy`."""
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    return name.replace("_", "").lower()


def _refuse_positions(
    name: str | None, select: Select, labels: tf.TensorSpec, evidence: Evidence
) -> None:
    """Refuses a label at every position, which looks like one-hot rows or like too many axes."""
    output = getattr(_output_of(select, evidence.outputs), "shape", None)
    by_token = labels.shape.rank == 2 and output is not None and output.rank == 3
    if (labels.shape.rank or 0) > 2 or (by_token and labels.shape[1] != 1):
        raise ValueError(
            f"Expected one label per example of {_describe(name, select)}. Received: labels of "
            f"shape {tuple(labels.shape)}: one per token, step or pixel. Pass target=function of "
            "(x, y) that makes one label of each example."
        )


def _likely_reason(raw: Any, num_classes: int) -> str:
    """A guess at why labels are not what was expected, and what to do."""
    values = np.asarray(raw if raw is not None else [], "float64")
    if values.ndim == 2 and values.shape[1] > 1:
        return (
            "Rows mark several classes or add up to something else: pass a target= function that "
            "picks one class per example."
        )
    if np.any(values != np.round(values)):
        return (
            "They look like numbers to predict, as of a regression: pass a target= function that "
            "puts them into classes."
        )
    if values.size and np.nanmin(values) == 1 and np.nanmax(values) == num_classes:
        return "They seem to start at 1: use y - 1."
    return "Pass num_classes= if there are more classes, or a target= function that picks one."


def _output_of(select: Select, outputs: Any) -> Any:
    """The host's output that goes with labels: the only one, or that of the same key."""
    if select is None and len(keras.tree.flatten(outputs)) == 1:
        return keras.tree.flatten(outputs)[0]
    if isinstance(select, (str, int)):
        with contextlib.suppress(KeyError, IndexError, TypeError):
            return outputs[select]
    return None


def _check(name: str | None, select: Select, labels: tf.TensorSpec, count: Any) -> None:
    what = _describe(name, select)
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 2:
        raise ValueError(
            "A probe needs at least 2 classes to tell apart, given as an integer. "
            f"Received: num_classes={count!r} for {what}."
        )
    if not (labels.dtype.is_integer or labels.dtype.is_floating or labels.dtype == tf.bool):
        raise ValueError(f"Expected labels of {what} to be numbers. Received: {labels.dtype.name}.")
    rank, columns = labels.shape.rank, labels.shape[1] if labels.shape.rank == 2 else None
    if rank == 1 or (rank == 2 and columns in (1, count)):
        return
    raise ValueError(
        f"Expected labels of {what} as integers of shape (batch,) or (batch, 1), or one-hot of "
        f"shape (batch, {count}). Received: shape {tuple(labels.shape) if rank else labels.shape}."
    )
