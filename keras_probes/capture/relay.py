"""Batches at hand, given to a host's function as the iterator that it takes."""

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf


class Relays:
    """Iterators over batches that were taken off a host's own, one for each kind of data.

    The host's function knows an iterator by its spec, and is not traced again for another one. A
    new dataset for each step would take as long as the step of a small host.
    """

    def __init__(self) -> None:
        self._by_spec: dict[str, _Relay] = {}

    def iterator(self, batches: Sequence[Any], spec: Any, *, ends: bool) -> Iterator:
        """An iterator over some batches.

        Args:
            batches: What to yield.
            spec: That of the host's own iterator.
            ends: Whether the function reads on to its end, after which it is of no more use.
        """
        relay = _Relay(spec) if ends else self._by_spec.get(str(spec)) or _Relay(spec)
        if not ends:
            self._by_spec[str(spec)] = relay
        relay.put(batches)
        return relay.iterator

    def clear(self) -> None:
        """Lets go of batches that no step took: they are not the next fit's."""
        self._by_spec.clear()


class _Relay:
    """A queue as an iterator, which ends when nothing is left."""

    def __init__(self, spec: Any):
        parts = tf.nest.flatten(spec, expand_composites=True)
        with tf.device("cpu:0"):
            self._queue = tf.queue.FIFOQueue(-1, [part.dtype for part in parts])

        def take(_: tf.Tensor) -> Any:
            taken = self._queue.dequeue()
            taken = taken if len(parts) > 1 else [taken]
            for tensor, part in zip(taken, parts, strict=True):
                tensor.set_shape(part.shape)
            return tf.nest.pack_sequence_as(spec, taken, expand_composites=True)

        # Tuning takes a thread, for which the end of the iterator would have to wait.
        options = tf.data.Options()
        options.autotune.enabled = False
        options.experimental_optimization.apply_default_optimizations = False
        counter = tf.data.Dataset.counter().take_while(lambda _: self._queue.size() > 0)
        self.iterator = iter(counter.map(take).with_options(options))

    def put(self, batches: Sequence[Any]) -> None:
        for batch in batches:
            self._queue.enqueue(tf.nest.flatten(batch, expand_composites=True))
