"""Data in units that workers run alone: the rows of a store's chunks.

In: data as `extract_features` takes them. Out: for each chunk, what a worker needs to come by its
batches: a slice of arrays; numbers of batches, which the worker reads itself; or of data that only
come in order, the batches.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

from keras_probes.taps.batches import batches_of, examples_in

Preprocess = Callable[..., Any] | None


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of arrays."""

    arrays: Any


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Batches by their numbers, each of `size` examples but the last of the data."""

    start: int
    stop: int
    size: int
    last: int


@dataclasses.dataclass(frozen=True)
class Read:
    """Batches that were read; so many examples of the first are of the unit before."""

    held: list[Any]
    skip: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """The rows of a chunk.

    Attributes:
        chunk: Its number.
        part: The batches that have these rows.
    """

    chunk: int
    part: Slice | Numbers | Read

    def batches(self, data: Any, batch_size: int, preprocess: Preprocess) -> Iterable[Any]:
        """Comes by the batches.

        Args:
            data: Those whose batches have numbers; `None` of others.
            batch_size: Number of examples of a batch, for arrays.
            preprocess: What the host's own `fit` makes of each batch.
        """
        match self.part:
            case Read():
                return self.part.held
            case Slice():
                return batches_of(self.part.arrays, batch_size, preprocess).dataset
            case Numbers():
                return _by_number(self.part, data, batch_size, preprocess)


def _by_number(part: Numbers, data: Any, batch_size: int, preprocess: Preprocess) -> Iterator[Any]:
    some = batches_of(_Some(data, part.start, part.stop), batch_size, preprocess).dataset
    for number, batch in enumerate(some, part.start):
        received = examples_in(batch)
        if received != part.size and number != part.last:
            raise ValueError(
                "Expected batches of one size, so that each worker knows the rows of its own. "
                f"Received: {received} examples in batch {number}, {part.size} in batch 0. "
                "Make batches of one size, or pass them in order, as a generator."
            )
        yield batch


class Units:
    """All units of some data.

    Args:
        data: As `extract_features` takes them.
        examples: How many there are, if they are arrays; else `None`.
        in_order: The batches, for data that have no numbers.
        size: Number of examples of a batch.
        per_chunk: Number of batches of a chunk.

    Attributes:
        numbered: The data, if workers read them by number; else `None`.
        examples: How many examples there are, as far as that is known.
    """

    def __init__(
        self,
        data: Any,
        examples: int | None,
        in_order: Iterable[Any],
        size: int,
        per_chunk: int,
    ):
        self._data, self._in_order = data, in_order
        self._size, self._per_chunk = size, per_chunk
        self.examples = examples
        self.numbered = data if self.examples is None and _has_numbers(data) else None
        if self.numbered is not None:
            last = len(data) - 1
            self.examples = last * size + _examples_of(data, last)

    def __iter__(self) -> Iterator[Unit]:
        if self.numbered is not None:
            return self._by_number()
        return self._read() if self.examples is None else self._sliced(self.examples)

    def _sliced(self, examples: int) -> Iterator[Unit]:
        step = self._size * self._per_chunk
        for chunk, start in enumerate(range(0, examples, step)):
            rows = slice(start, start + step)
            arrays = keras.tree.map_structure(
                lambda array, rows=rows: None if array is None else array[rows], self._data
            )
            yield Unit(chunk, Slice(arrays))

    def _by_number(self) -> Iterator[Unit]:
        total = len(self._data)
        for chunk, start in enumerate(range(0, total, self._per_chunk)):
            stop = min(total, start + self._per_chunk)
            yield Unit(chunk, Numbers(start, stop, self._size, total - 1))

    def _read(self) -> Iterator[Unit]:
        self.examples = 0
        size = self._size * self._per_chunk
        chunk, skip = 0, 0
        held: list[Any] = []
        for batch in self._in_order:
            held.append(batch)
            self.examples += examples_in(batch)
            while (over := self.examples - size * (chunk + 1)) >= 0:
                yield Unit(chunk, Read(held, skip))
                chunk, skip, held = chunk + 1, 0, []
                if over:
                    skip, held = examples_in(batch) - over, [batch]
        if held:
            yield Unit(chunk, Read(held, skip))


class _Some(keras.utils.PyDataset):
    """Some batches of data that have numbers, each read once: Keras looks at the first before."""

    def __init__(self, data: Any, start: int, stop: int):
        super().__init__()
        self._data, self._start, self._stop = data, start, stop
        self._begun = False
        self._looked_at: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Any:
        if index in self._looked_at:
            self._begun = True
            return self._looked_at.pop(index)
        batch = self._data[self._start + index]
        if not self._begun:
            self._looked_at[index] = batch
        return batch


def _has_numbers(data: Any) -> bool:
    """Whether any batch can be read without those before it."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _examples_of(data: Any, number: int) -> int:
    return examples_in(keras.tree.map_structure(keras.ops.convert_to_tensor, data[number]))
