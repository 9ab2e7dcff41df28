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
        self._axes = [spec.shape.as_list().index(None) for spec in specs]
        self._held = [
            tf.Variable(
                tf.zeros([size or 0 for size in spec.shape], spec.dtype),
                shape=spec.shape,
                trainable=False,
            )
            for spec in specs
        ]
        self._count = tf.Variable(0, trainable=False)  # of examples that wait

    def pass_on(
        self, batch: Sequence[tf.Tensor], least: tf.Tensor, take: Callable[[list[tf.Tensor]], Any]
    ) -> None:
        """Has a batch wait, or gives it to `take` with those that did.

        Args:
            batch: Tensors as the specs say.
            least: int32: how many examples are enough.
            take: What is done with them.
        """
        joined = tf.cond(self._count > 0, lambda: self._joined(batch), lambda: list(batch))
        count = tf.shape(joined[0])[self._axes[0]]

        def go() -> tf.Tensor:
            take(joined)
            return self._count.assign(0)

        def wait() -> tf.Tensor:
            for held, part in zip(self._held, joined, strict=True):
                held.assign(part)
            return self._count.assign(count)

        tf.cond(count >= least, go, wait)

    def empty(self, take: Callable[[list[tf.Tensor]], Any]) -> None:
        """Gives `take` what waits, if anything does; not to be called within a graph."""
        if self._count.numpy():
            take([held.value() for held in self._held])
            self.clear()

    def clear(self) -> None:
        """Forgets what waits."""
        self._count.assign(0)

    def _joined(self, batch: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        triples = zip(self._held, batch, self._axes, strict=True)
        return [tf.concat([held, part], axis) for held, part, axis in triples]
