"""The examples that probes are refitted on: some of an epoch's batches, spread over all of it.

In: batches of a host's training, as its step takes them. Out: those kept when the epoch ends.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_probes.taps.batches import bytes_in, examples_in

MAX_EXAMPLES = 10_000
MAX_BYTES = 512 * 2**20  # of the examples with their features


class Sample:
    """Keeps batches of the epoch that is running.

    At first it wants the batches of every step. Whenever there is no more room, it lets go of those
    of every second step that it kept, and wants half as many from then on: whatever the length of
    the epoch and the size of its batches, what is kept is spread evenly over it. A step may have
    several batches: where it runs several, or several replicas.

    Args:
        seed: Seed of the draw from what was kept.

    Attributes:
        stride: It wants the batches of every `stride`-th step.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Forgets everything: another epoch begins."""
        self._epoch = epoch
        self._kept: list[tuple[int, list[Any]]] = []  # steps with their batches
        self.stride = 1

    def wants(self, step: int) -> bool:
        """Whether to keep the batches of this step of the epoch, from 0."""
        return step % self.stride == 0

    def add(self, step: int, batches: Sequence[Any], feature_bytes: int) -> None:
        """Keeps the batches of a step, or as much of them as there is room for.

        Args:
            step: Number of the step in the epoch, from 0.
            batches: What the host's step takes.
            feature_bytes: How much the features of one example are to take.
        """
        self._kept.append((step, list(_cut(batches, _room(batches, feature_bytes)))))
        while len(self._kept) > 1 and self._too_much(feature_bytes):
            self.stride *= 2
            self._kept = [(at, of) for at, of in self._kept if at % self.stride == 0]

    def __len__(self) -> int:
        """Number of examples that are kept."""
        return sum(examples_in(batch) for _, batches in self._kept for batch in batches)

    def drawn(self, n: int) -> list[Any]:
        """Some of the batches that were kept, drawn at random: `n` examples in all.

        Args:
            n: Number of examples, no more than are kept.
        """
        batches = [batch for _, of_step in self._kept for batch in of_step]
        if n >= len(self):
            return batches
        order = np.random.default_rng((self._seed, self._epoch)).permutation(len(batches))
        return list(_cut([batches[place] for place in order], n))

    def _too_much(self, feature_bytes: int) -> bool:
        batches = [batch for _, of_step in self._kept for batch in of_step]
        total = sum(map(bytes_in, batches)) + len(self) * feature_bytes
        return total > MAX_BYTES or len(self) > MAX_EXAMPLES


def _room(batches: Sequence[Any], feature_bytes: int) -> int:
    """For how many examples like these there is room in an empty sample, one at least."""
    examples = sum(map(examples_in, batches))
    each = sum(map(bytes_in, batches)) / max(examples, 1) + feature_bytes
    return max(1, min(MAX_EXAMPLES, int(MAX_BYTES // max(each, 1))))


def _cut(batches: Sequence[Any], n: int) -> Iterator[Any]:
    """The first `n` examples of some batches; more, where a batch is sparse or ragged."""
    for batch in batches:
        if n <= 0:
            return
        size = examples_in(batch)
        if size > n and all(isinstance(part, tf.Tensor) for part in tf.nest.flatten(batch)):
            batch = tf.nest.map_structure(lambda part, n=n: part[:n], batch)
        yield batch
        n -= size
