"""What the probes are asked for: which labels of a batch, and of which task.

In: `x`, `y` and sample weights of a batch. Out: one label and one weight per example.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_probes.places import Places, values_at
from keras_probes.probes.tasks.task import MISSING, PRIME, WEIGHTLESS, Task
from keras_probes.results.schema import name_of_baseline

Select = None | str | int | Callable[[Any, Any], Any]

MOST_POSITIONS = 64  # of an example


@dataclasses.dataclass(frozen=True)
class Positions:
    """Which positions of an example have a label each: tokens, patches or pixels.

    Where an example has more than `MOST_POSITIONS`, so many are drawn by seed.

    Attributes:
        axes: Number of axes of positions: 1 of a sequence, 2 of an image.
        per_example: How many of an example are used.
        all: Whether these are all there are.
        seed: Seed of the draw.
    """

    axes: int
    per_example: int
    all: bool
    seed: int

    @classmethod
    def of(cls, labels: tf.TensorSpec, axes: int, seed: int) -> "Positions":
        """Those of labels of a spec, shape (batch, *sizes) or (batch, *sizes, columns)."""
        sizes = labels.shape[1 : 1 + axes].as_list()
        total = math.prod(sizes) if None not in sizes else math.inf
        count = int(min(total, MOST_POSITIONS))
        return cls(axes, count, count == total, seed)

    def places(self, labels: tf.Tensor) -> Places:
        """Draws them for a batch of labels; the same for each batch of one size."""
        sizes = tf.shape(labels)[1 : 1 + self.axes]
        shape = (tf.shape(labels)[0], self.per_example)
        if self.all:
            flat = tf.broadcast_to(tf.range(self.per_example), shape)
        else:
            flat = tf.random.stateless_uniform(
                shape, (self.seed, 11), 0, tf.reduce_prod(sizes), tf.int32
            )
        cells: list[tf.Tensor] = []  # by hand: XLA knows no unravel_index, and no repeat
        for axis in reversed(range(self.axes)):
            cells.insert(0, flat % sizes[axis])
            flat //= sizes[axis]
        return tf.stack(cells, axis=-1), sizes

    def of_each(self, values: tf.Tensor, places: Places) -> tf.Tensor:
        """What there is of an example, shape (batch,), for each of its positions."""
        return tf.reshape(tf.tile(values[:, None], (1, tf.shape(places[0])[1])), [-1])


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
        positions: The positions that labels are of; `None` for one label per example.
    """

    name: str | None
    select: Select
    task: Task
    weigh: Callable[[Any, Any, Any], Any] | None = None
    baseline: str | None = None
    positions: Positions | None = None

    @property
    def key(self) -> str | None:
        """Its name among all targets and baselines; `None` for a single target."""
        return name_of_baseline(self.baseline, self.name)

    @property
    def needs_x(self) -> bool:
        """Whether labels or weights are made of x besides."""
        return callable(self.select) or self.weigh is not None

    def places(self, x: Any, y: Any) -> Places | None:
        """The positions of a batch that its labels are of; `None` where they are of examples."""
        if self.positions is None:
            return None
        return self.positions.places(tf.convert_to_tensor(self.raw(x, y)))

    def labels(self, x: Any, y: Any, places: Places | None = None) -> tf.Tensor:
        """Labels of a batch in the task's form; it marks those that are missing or none.

        Args:
            x: The host's input.
            y: The host's labels.
            places: Where to look; by default where `places` says.
        """
        raw = tf.convert_to_tensor(self.raw(x, y))
        if self.positions is not None:
            places = self.positions.places(raw) if places is None else places
            raw = values_at(raw, places)
        return self.task.labels(raw)

    def raw(self, x: Any, y: Any) -> Any:
        """Labels of a batch as they are."""
        return pick(self.select, x, y)

    def labels_and_weights(
        self,
        x: Any,
        y: Any,
        sample_weight: Any,
        places: Places | None = None,
        padding: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Labels of a batch, marked where a weight is 0, and weights.

        Args:
            x: The host's input.
            y: The host's labels.
            sample_weight: What the host was given: `None`, a tensor, or a structure as `y`.
            places: As for `labels`.
            padding: Which labels are of padding, bool, one for each; `None` if none is known to be.

        Returns:
            Labels as the task has them, and weights, float32, one for each label.
        """
        places = self.places(x, y) if places is None else places
        labels = self.labels(x, y, places)
        weights = self._weights(x, y, sample_weight, labels, places)
        without = weights == 0.0 if padding is None else (weights == 0.0) | padding
        return self.task.without(labels, without, WEIGHTLESS), weights

    def predictions(self, outputs: Any, places: Places | None = None) -> Any:
        """The host's own answers to a batch.

        Args:
            outputs: What the host returned, or the structure of `tf.TensorSpec` of that.
            places: As for `labels`.

        Returns:
            As labels; `None` where no output has the form that takes.
        """
        output = output_of(self.select, outputs)
        if self.positions is not None and output is not None:
            if (output.shape.rank or 0) < 1 + self.positions.axes:
                return None
            if tf.is_tensor(output) and places is not None:
                output = values_at(output, places)
            else:
                output = tf.TensorSpec((None, *output.shape[1 + self.positions.axes :]))
        return self.task.predictions(output)

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

    def _weights(
        self, x: Any, y: Any, sample_weight: Any, like: tf.Tensor, places: Places | None
    ) -> tf.Tensor:
        """Sample weights of a batch, float32, one for each label; ones where there are none.

        Those of another shape, by token or pixel, weigh the host's own loss and say nothing of a
        label for the whole example.
        """
        if self.positions is not None and places is not None:
            return self._weights_at(x, y, sample_weight, self.positions, places)
        if self.weigh is not None:
            return tf.cast(tf.reshape(self.weigh(x, y, sample_weight), (-1,)), tf.float32)
        sample_weight = self._own_part(sample_weight)
        if sample_weight is not None:
            sample_weight = tf.convert_to_tensor(sample_weight)
            by_example = sample_weight.shape.rank == 1 or sample_weight.shape[1:].as_list() == [1]
        if sample_weight is None or not by_example:
            return tf.ones(tf.shape(like)[:1])
        return tf.cast(tf.reshape(sample_weight, (-1,)), tf.float32)

    def _own_part(self, sample_weight: Any) -> Any:
        """Of weights for several outputs, those for this one, if it is one."""
        if not isinstance(sample_weight, (dict, list, tuple)):
            return sample_weight
        keyed = self.select is not None and not callable(self.select)
        return pick(self.select, None, sample_weight) if keyed else None

    def _weights_at(
        self, x: Any, y: Any, sample_weight: Any, positions: Positions, places: Places
    ) -> tf.Tensor:
        """Weights at positions, of weights for each of them or for each example."""
        if self.weigh is not None:
            sample_weight = self.weigh(x, y, sample_weight)
        else:
            sample_weight = self._own_part(sample_weight)
        if sample_weight is None:
            return tf.ones(tf.reduce_prod(tf.shape(places[0])[:2]))
        weights = tf.cast(sample_weight, tf.float32)
        if (weights.shape.rank or 0) > positions.axes:
            return tf.reshape(values_at(weights, places), (-1,))
        return positions.of_each(tf.reshape(weights, (-1,)), places)


@dataclasses.dataclass(frozen=True)
class RandomTarget(Target):
    """A random label for each example, the same whenever it is seen (a function of x alone).

    A control task (Hewitt & Liang 2019, section 2): what a probe gets right of these labels, in
    training, it knows by heart. An example without a label of the target has none here.
    """

    needs_x = True

    def labels(self, x: Any, y: Any, places: Places | None = None) -> tf.Tensor:
        places = self.places(x, y) if places is None else places
        without = self.task.state(super().labels(x, y, places)) < 0
        keys = _hash(x)
        if self.positions is not None and places is not None:
            keys = _hash_of_places(self.positions.of_each(keys, places), places)
        return self.task.without(self.task.random(keys), without, MISSING)


def _hash(x: Any) -> tf.Tensor:
    """A whole number for each example, int64, shape (batch,), made of its bits.

    No rounding changes it.
    """
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
            tf.shape(bits)[1:], (7, place), 1, PRIME, tf.int64, alg="philox"
        )
        products = tf.math.floormod(tf.math.floormod(bits, PRIME) * keys, PRIME)
        total += tf.reduce_sum(products, axis=1)
    return tf.math.floormod(total, PRIME)


def _hash_of_places(keys: tf.Tensor, places: Places) -> tf.Tensor:
    """Another number for each position of an example, of the example's, shape (batch * P,)."""
    cells, sizes = places
    flat = tf.zeros_like(cells[..., 0])
    for axis in range(cells.shape[-1]):
        flat = flat * sizes[axis] + cells[..., axis]
    of_place = tf.cast(tf.reshape(flat, [-1]), tf.int64) + 1
    return tf.math.floormod(keys + tf.math.floormod(of_place * 1_103_515_245, PRIME), PRIME)


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
