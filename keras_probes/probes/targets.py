"""What the probes are asked for: turns a host's `y`, or anything made of it, into class labels.

In: `x`, `y` and sample weights of a batch. Out: one integer label and one weight an example.
"""

import contextlib
import dataclasses
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

Select = None | str | int | Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """One labelling of the examples (paper, section 3.6).

    Attributes:
        name: Its name among several targets; `None` for a single one.
        select: `None` (all of `y`), a key or index into `y`, or a function of (x, y).
        num_classes: Number of classes, at least 2.
    """

    name: str | None
    select: Select
    num_classes: int

    def labels(self, x: Any, y: Any) -> tf.Tensor:
        """Labels of a batch.

        Returns:
            int32, shape (batch,); -1 where there is no label: out of range, no integer, or a row
            that marks several classes or none.
        """
        raw = tf.convert_to_tensor(_pick(self.select, x, y))
        if raw.shape.rank == 2 and raw.shape[1] > 1:
            # Rounding and label smoothing keep the sum at 1; several marked classes do not.
            valid = tf.abs(tf.reduce_sum(tf.cast(raw, tf.float32), axis=1) - 1.0) < 1e-2
            labels = tf.argmax(raw, axis=1, output_type=tf.int32)
        else:
            flat = tf.cast(tf.reshape(raw, (-1,)), tf.float32)
            valid = (flat >= 0) & (flat < self.num_classes) & (tf.round(flat) == flat)
            labels = tf.cast(flat, tf.int32)
        return tf.where(valid, labels, -1)

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

    def refuse(self, unlabelled: int, total: int) -> None:
        """Raises a `ValueError` if `unlabelled` of `total` labels are none."""
        if unlabelled:
            name = "" if self.name is None else f" of target {self.name!r}"
            raise ValueError(
                f"Expected labels{name} to be integers from 0 to {self.num_classes - 1}, or "
                f"one-hot rows that sum to 1. Received: {unlabelled} of {total} labels that are "
                "not. Labels that start at 1 need y - 1; several classes for one example need a "
                "target= function that picks one."
            )

    def weights(self, sample_weight: Any, like: tf.Tensor) -> tf.Tensor:
        """Sample weights of a batch, float32, shape (batch,); ones where there are none.

        Args:
            sample_weight: What the host was given: `None`, a tensor, or a structure as `y`.
            like: A tensor of shape (batch,).
        """
        if isinstance(sample_weight, (dict, list, tuple)):
            keyed = self.select is not None and not callable(self.select)
            sample_weight = _pick(self.select, None, sample_weight) if keyed else None
        if sample_weight is None:
            return tf.ones_like(like, tf.float32)
        sample_weight = tf.convert_to_tensor(sample_weight)
        if sample_weight.shape.rank != 1 and sample_weight.shape[1:].as_list() != [1]:
            raise ValueError(
                "Expected one sample weight an example, shape (batch,). "
                f"Received: sample_weight of shape {sample_weight.shape}."
            )
        return tf.cast(tf.reshape(sample_weight, (-1,)), tf.float32)


@dataclasses.dataclass(frozen=True)
class RandomLabels:
    """A random label for each example, the same whenever it is seen (a function of x alone).

    A control task (Hewitt & Liang 2019, section 2): what a probe gets right of these labels, in
    training, it knows by heart.

    Attributes:
        num_classes: Number of classes; each is as likely.
    """

    num_classes: int

    def __call__(self, x: Any, y: Any) -> tf.Tensor:  # noqa: ARG002
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
        return tf.math.floormod(tf.math.floormod(total, prime), self.num_classes)


def resolve_targets(
    target: Any, num_classes: int | Mapping[str, int] | None, x_spec: Any, y_spec: Any, outputs: Any
) -> list[Target]:
    """Resolves `target=` and `num_classes=` against what the data and the host look like.

    Args:
        target: `None`, a key or index into `y`, a function (x, y) -> labels, or a mapping from
            names to these.
        num_classes: Number of classes, or a mapping from target names to it; `None` infers it.
        x_spec: Structure of `tf.TensorSpec` of a batch's x.
        y_spec: The same of its y; `None` if it has none.
        outputs: Structure of `tf.TensorSpec` the host returns.

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
        count = given if given is not None else _infer_classes(select, labels, outputs)
        if count is None:
            raise ValueError(
                f"The number of classes of {_describe(name, select)} can't be inferred: its labels "
                "are not one-hot, and no output of the host of shape (batch, classes) belongs to "
                "them. Pass num_classes=."
            )
        _check(name, select, labels, count)
        resolved.append(Target(name, select, int(count)))
    return resolved


def expected_classes(
    target: Any, num_classes: int | Mapping[str, int] | None, outputs: Any
) -> dict[str | None, int | None]:
    """Number of classes of each target as far as it is known before any data; else `None`."""
    return {
        name: _given(num_classes, name) or _infer_classes(select, None, outputs)
        for name, select in named_targets(target).items()
    }


def named_targets(target: Any) -> Mapping[str | None, Any]:
    """Returns `target=` as a mapping; a single target has the name `None`."""
    if not isinstance(target, Mapping):
        return {None: target}
    if not target or not all(isinstance(name, str) and name for name in target):
        raise ValueError(
            "Expected a mapping from the names of targets to a key, an index or a function each. "
            f"Received: target={target!r}."
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
            f"or a mapping from names to these. Received: target={select!r}."
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


def _infer_classes(select: Select, labels: tf.TensorSpec | None, outputs: Any) -> int | None:
    """One-hot labels tell; else the host's output of the same key does (one column: binary)."""
    if labels is not None and labels.shape.rank == 2 and (labels.shape[1] or 0) > 1:
        return labels.shape[1]
    output = _output_of(select, outputs)
    shape = getattr(output, "shape", None)
    return max(shape[1], 2) if shape is not None and shape.rank == 2 and shape[1] else None


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
