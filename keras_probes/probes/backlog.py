"""Examples that wait for others, so that a step of the probes is worth its while.

In: batches, as tensors with an axis of examples each. Out: the same, several joined into one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


class Backlog:
    """Joins batches until they are enough.

    Args:
        specs: Of the tensors of a batch; `None` in a shape is the axis of examples.
    """

    def __init__(self, specs: Sequence[tf.TensorSpec]):
        self._specs = specs
        self._axes = [spec.shape.as_list().index(None) for spec in specs]
        self._held = [
            tf.Variable(nothing, shape=spec.shape, trainable=False)
            for spec, nothing in zip(specs, self._nothing(), strict=True)
        ]

    def pass_on(
        self, batch: Sequence[tf.Tensor], least: tf.Tensor, take: Callable[[list[tf.Tensor]], Any]
    ) -> None:
        """Has a batch wait, or gives it to `take` with those that did.

        Args:
            batch: Tensors as the specs say.
            least: int32: how many examples are enough.
            take: What is done with them.
        """
        triples = zip(self._held, batch, self._axes, strict=True)
        joined = [tf.concat([held, part], axis) for held, part, axis in triples]
        count = self._count(joined)

        def go() -> tf.Tensor:
            take(joined)
            # Of a length unknown while traced: TensorFlow would take it for that of what waits.
            nobody = tf.range(count, count)
            for held, part, axis in zip(self._held, joined, self._axes, strict=True):
                held.assign(tf.gather(part, nobody, axis=axis))
            return least

        def wait() -> tf.Tensor:
            for held, part in zip(self._held, joined, strict=True):
                held.assign(part)
            return least

        tf.cond(count >= least, go, wait)

    def empty(self, take: Callable[[list[tf.Tensor]], Any]) -> None:
        """Gives `take` what waits, if anything does; not to be called within a graph."""
        held = [each.value() for each in self._held]
        if self._count(held) > 0:
            take(held)
            self.clear()

    def clear(self) -> None:
        """Forgets what waits."""
        for held, nothing in zip(self._held, self._nothing(), strict=True):
            held.assign(nothing)

    def _count(self, batch: Sequence[tf.Tensor]) -> tf.Tensor:
        """Number of examples."""
        return tf.shape(batch[0])[self._axes[0]]

    def _nothing(self) -> list[tf.Tensor]:
        return [tf.zeros([size or 0 for size in s.shape], s.dtype) for s in self._specs]
