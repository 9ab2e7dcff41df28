"""The examples that probes are settled on: some of an epoch's batches, spread over all of it.

In: batches of a host's training, as its step takes them. Out: those kept when the epoch ends.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

MOST = 10_000  # examples: beyond, a probe of 1,000 features gains little


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
        self._room, self._examples, self._every = MOST, 0, 1

    def wants(self, step: int) -> bool:
        """Whether to keep the batches of this step of the epoch, from 0."""
        return self._room > 0 and self._memory > 0 and step % self._every == 0

    def add(self, batches: Sequence[Any], feature_bytes: int) -> None:
        """Keeps the batches of a step.

        Args:
            batches: What the host's step takes.
            feature_bytes: How much the features of one example are to take.
        """
        sizes = [_examples(batch) for batch in batches]
        if not self.batches:
            self._plan(sum(sizes), sum(map(_bytes, batches)) / sum(sizes) + feature_bytes)
        if self._room:
            self.batches.extend(batches)
            self._examples += sum(sizes)
        while self._examples > self._room:
            self._examples -= _examples(self.batches.popleft())

    def _plan(self, of_step: int, bytes_each: float) -> None:
        """Decides how many examples to keep, and of which steps."""
        self._room = min(MOST, int(self._memory // bytes_each))
        if self._room < of_step:
            self._room = 0
        elif self._steps is not None:
            self._every = math.ceil(self._steps / (self._room // of_step))


def _examples(batch: Any) -> int:
    return int(tf.nest.flatten(batch)[0].shape[0])


def _bytes(batch: Any) -> int:
    return sum(int(tf.size(part)) * part.dtype.size for part in tf.nest.flatten(batch))
