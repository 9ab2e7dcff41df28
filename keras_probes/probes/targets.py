"""What the probes are asked for: which labels of a batch, and of which task.

In: `x`, `y` and sample weights of a batch. Out: one label and one weight per example.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_probes.probes.tasks.task import MISSING, WEIGHTLESS, Task
from keras_probes.results.schema import name_of_baseline

Select = None | str | int | Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """One labelling of the examples (paper, section 3.6).

    Attributes:
        name: Its name among several targets; `None` for a single one.
        select: `None` (all of `y`), a key or index into `y`, or a function of (x, y).
        task: What kind of labels they are.
        weigh: A function (x, y, sample_weight) -> weights, shape (batch,); `None` for the host's
            sample weights where there is one per example.
        baseline: Which baseline of the target it is, one of `BASELINES`; `None` for the target.
    """

    name: str | None
    select: Select
    task: Task
    weigh: Callable[[Any, Any, Any], Any] | None = None
    baseline: str | None = None

    @property
    def key(self) -> str | None:
        """Its name among all targets and baselines; `None` for a single target."""
        return name_of_baseline(self.baseline, self.name)

    @property
    def needs_x(self) -> bool:
        """Whether labels or weights are made of x besides."""
        return callable(self.select) or self.weigh is not None

    def labels(self, x: Any, y: Any) -> tf.Tensor:
        """Labels of a batch in the task's form; it marks those that are missing or none."""
        return self.task.labels(tf.convert_to_tensor(self.raw(x, y)))

    def raw(self, x: Any, y: Any) -> Any:
        """Labels of a batch as they are."""
        return pick(self.select, x, y)

    def labels_and_weights(self, x: Any, y: Any, sample_weight: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Labels of a batch, marked where a weight is 0, and weights.

        Args:
            x: The host's input.
            y: The host's labels.
            sample_weight: What the host was given: `None`, a tensor, or a structure as `y`.

        Returns:
            Labels as the task has them, and weights, float32, shape (batch,).
        """
        labels = self.labels(x, y)
        weights = self._weights(x, y, sample_weight, labels)
        return self.task.without(labels, weights == 0.0, WEIGHTLESS), weights

    def predictions(self, outputs: Any) -> Any:
        """The host's own answers to a batch.

        Args:
            outputs: What the host returned, or the structure of `tf.TensorSpec` of that.

        Returns:
            As labels; `None` where no output has the form that takes.
        """
        return self.task.predictions(output_of(self.select, outputs))

    def refuse(self, wrong: int, total: int, raw: Any = None) -> None:
        """Raises a `ValueError` if `wrong` of `total` labels are none.

        Args:
            wrong: Number of labels that are `WRONG`.
            total: Number of labels.
            raw: Some of them as they are, for a guess at the reason.
        """
        if wrong:
            expected, reason = self.task.expected(raw)
            raise ValueError(
                f"Expected labels{self._of} to be {expected}. Received: {wrong} of {total} labels "
                f"that are not. {reason}"
            )

    def about(self, unlabelled: int, total: int) -> str:
        """Says that some of the labels are missing."""
        return (
            f"{unlabelled:,} of {total:,} labels{self._of} are missing or {self.task.none_of}. "
            "The probes leave these examples out."
        )

    @property
    def _of(self) -> str:
        return "" if self.key is None else f" of target {self.key!r}"

    def _weights(self, x: Any, y: Any, sample_weight: Any, like: tf.Tensor) -> tf.Tensor:
        """Sample weights of a batch, float32, shape (batch,); ones where there are none.

        Those of another shape, by token or pixel, weigh the host's own loss and say nothing of a
        label for the whole example.
        """
        if self.weigh is not None:
            return tf.cast(tf.reshape(self.weigh(x, y, sample_weight), (-1,)), tf.float32)
        if isinstance(sample_weight, (dict, list, tuple)):
            keyed = self.select is not None and not callable(self.select)
            sample_weight = pick(self.select, None, sample_weight) if keyed else None
        if sample_weight is not None:
            sample_weight = tf.convert_to_tensor(sample_weight)
            by_example = sample_weight.shape.rank == 1 or sample_weight.shape[1:].as_list() == [1]
        if sample_weight is None or not by_example:
            return tf.ones(tf.shape(like)[:1])
        return tf.cast(tf.reshape(sample_weight, (-1,)), tf.float32)


@dataclasses.dataclass(frozen=True)
class RandomTarget(Target):
    """A random label for each example, the same whenever it is seen (a function of x alone).

    A control task (Hewitt & Liang 2019, section 2): what a probe gets right of these labels, in
    training, it knows by heart. An example without a label of the target has none here.
    """

    needs_x = True

    def labels(self, x: Any, y: Any) -> tf.Tensor:
        without = self.task.state(super().labels(x, y)) < 0
        return self.task.without(self.task.random(_hash(x)), without, MISSING)


def _hash(x: Any) -> tf.Tensor:
    """A whole number for each example, int64, shape (batch,), made of its bits.

    No rounding changes it.
    """
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
    return tf.math.floormod(total, prime)


def pick(select: Select, x: Any, y: Any) -> Any:
    """The labels that a target selects."""
    if callable(select):
        return select(x, y)
    return y if select is None else y[select]


def output_of(select: Select, outputs: Any) -> Any:
    """The host's output that goes with labels: the only one, or that of the same key."""
    if select is None and len(keras.tree.flatten(outputs)) == 1:
        return keras.tree.flatten(outputs)[0]
    if isinstance(select, (str, int)):
        with contextlib.suppress(KeyError, IndexError, TypeError):
            return outputs[select]
    return None
