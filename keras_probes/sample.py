"""The examples that probes are settled on: some of an epoch's batches, spread over all of it.

In: batches of a host's training, as its step takes them. Out: those kept when the epoch ends.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


class Sample:
    """Keeps batches of the epoch that is running.

    Of an epoch whose number of steps is known, the batches of every n-th step are kept, so that
    they come to as many examples as there is room for; of one that is not, the last ones. A step
    may have several batches: where it runs several, or several replicas.

    Attributes:
        batches: What is kept, in the order of training.
    """

    def __init__(self) -> None:
        self.batches: deque[Any] = deque()
        self.begin(0, None)

    def begin(self, memory: int, steps: int | None) -> None:
        """Forgets everything: another epoch begins.

        Args:
            memory: Bytes that examples and their features may take.
            steps: Number of steps of the epoch, where it is known.
        """
        self.batches.clear()
        self._memory, self._steps = memory, steps
        self._room: int | None = None if memory > 0 else 0  # in examples, once one is seen
        self._examples, self._every = 0, 1

    def wants(self, step: int) -> bool:
        """Whether to keep the batches of this step of the epoch, from 0."""
        return self._room != 0 and step % self._every == 0

    def add(self, batches: Sequence[Any], feature_bytes: int, most: int) -> None:
        """Keeps the batches of a step.

        Args:
            batches: What the host's step takes.
            feature_bytes: How much the features of one example are to take.
            most: How many examples are of use.
        """
        sizes = [_examples(batch) for batch in batches]
        if self._room is None:
            each = sum(map(_bytes, batches)) / sum(sizes) + feature_bytes
            self._room = self._plan(sum(sizes), min(most, int(self._memory // each)))
        self.batches.extend(batches)
        self._examples += sum(sizes)
        while self._examples > self._room:
            self._examples -= _examples(self.batches.popleft())

    def _plan(self, of_step: int, room: int) -> int:
        """Of which steps to keep the examples, and how many, if there is `room` for so many."""
        if room < of_step:
            return 0
        if self._steps is not None:
            self._every = math.ceil(self._steps / (room // of_step))
        return room


def _examples(batch: Any) -> int:
    return int(tf.nest.flatten(batch)[0].shape[0])


def _bytes(batch: Any) -> int:
    return sum(int(tf.size(part)) * part.dtype.size for part in tf.nest.flatten(batch))
