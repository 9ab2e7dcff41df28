"""Labelled data that probes have for themselves, and are measured on again and again.

In: `data=` and `validation_data=`. Out: sets of examples by name, each a `Source` of batches.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_probes.taps.batches import batches_of, bytes_in, examples_in, labels_of

BATCH = 64  # examples, of arrays; other data bring their own batches
MOST_EXAMPLES = 10**7  # more are taken for data that have no end
MOST_LABELS = 2**24  # numbers that are looked at before the first step
MOST_KEPT = 2 * 2**30  # bytes of what can be read but once


class Source:
    """Data that are read from the first example on whenever they are gone through.

    A generator can be read but once: its batches are kept.

    Args:
        data: What `extract_features` takes.
        what: What they are called in errors.
        preprocess: What the host's own `fit` makes of each batch, if it has such a function.

    Attributes:
        what: As given.
        spec: Structure of `tf.TensorSpec` of the batches.
        first: The first batch: (x, y, sample_weight).
        labels: (y, sample_weight) of the first batch, then of the other examples, in parts: of all
            of them, or of very many numbers the first.
        class_names: Names of the classes, where the data know them.

    Raises:
        ValueError: The data are empty or endless, can't be read, or their labels are no numbers.
    """

    def __init__(self, data: Any, what: str, preprocess: Callable[..., Any] | None = None):
        self.what = what
        self.class_names = getattr(data, "class_names", None)
        self._once = hasattr(data, "__next__")
        at_hand = _labels_at_hand(data, what) if preprocess is None else None
        try:
            batches = batches_of(data, BATCH, preprocess)
        except (TypeError, ValueError) as error:
            again = " A generator can be read but once: pass a new one." if self._once else ""
            raise ValueError(f"{what} can't be read: {error}{again}") from error
        self.spec = batches.spec
        if any(part.shape.rank is None for part in tf.nest.flatten(self.spec)):
            raise ValueError(
                f"Expected {what} to say of which shapes its batches are. Received: {self.spec}. "
                "Use tf.ensure_shape in dataset.map, or an output_signature with shapes."
            )
        dataset = batches.dataset.cache() if self._once else batches.dataset
        if self._once or batches.rows is not None or isinstance(data, tf.data.Dataset):
            self._open = lambda: dataset
        else:  # read by an iterator of its own, which can't be begun again
            self._open = lambda: batches_of(data, BATCH, preprocess).dataset
        iterator = iter(self)
        self.first = next(iterator, None)
        if self.first is None:
            raise ValueError(f"{what} is empty. Expected at least one example.")
        others = self._read_labels(iterator) if at_hand is None else [_without_first(at_hand)]
        self.labels = [self.first[1:], *others]

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yields batches, (x, y, sample_weight)."""
        return map(keras.utils.unpack_x_y_sample_weight, self._open())

    def _read_labels(self, batches: Iterator[tuple[Any, Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """The labels and weights of all batches but the first; those beyond a limit are dropped."""
        assert self.first is not None
        examples, size = examples_in(self.first), bytes_in(self.first)
        numbers = _numbers(self.first[1])
        for batch in batches:
            examples += examples_in(batch)
            size += bytes_in(batch)
            if examples > MOST_EXAMPLES or (self._once and size > MOST_KEPT):
                raise ValueError(
                    f"{self.what} has no end, as far as {examples:,} examples tell. Expected data "
                    "that end: cut them with dataset.take(batches), or itertools.islice."
                )
            numbers += _numbers(batch[1])
            if numbers <= MOST_LABELS:
                yield batch[1:]


@dataclasses.dataclass(frozen=True)
class LabelledSet:
    """Examples that probes are fitted to, and others that they are tested on.

    Attributes:
        name: Its name among several; `None` of a single one.
        data: What the probes are fitted to.
        validation: What they are tested on; `None` for nothing.
    """

    name: str | None
    data: Source
    validation: Source | None

    @property
    def sources(self) -> list[Source]:
        """Both, or the first alone."""
        return [self.data, *filter(None, [self.validation])]


def check_sets(data: Any, validation_data: Any) -> None:
    """Looks whether `data=` and `validation_data=` go together, before either is read.

    Raises:
        ValueError: One has sets by name that the other does not know.
    """
    if data is None:
        if validation_data is not None:
            raise ValueError(
                "Probes are tested on validation_data= when they have data= of their own. "
                "Received: validation_data= alone. Pass data= as well; or leave both out, and "
                "pass validation_data to fit."
            )
        return
    named = isinstance(data, Mapping)
    if named and not (data and all(isinstance(name, str) and name for name in data)):
        raise ValueError(
            "Expected `data` to be labelled data, or a mapping from names to these. Received: a "
            f"mapping with the keys {list(data)!r}."
        )
    if validation_data is None:
        return
    known = set(data) if named else None
    given = set(validation_data) if isinstance(validation_data, Mapping) else None
    if (known is None) != (given is None) or not (given or set()) <= (known or set()):
        raise ValueError(
            "Expected `validation_data` to have the sets of `data`, by the same names. Received: "
            f"data {_sets(known)}, validation_data {_sets(given)}."
        )


def labelled_sets(
    data: Any, validation_data: Any, preprocess: Callable[..., Any] | None
) -> list[LabelledSet]:
    """The sets of `data=`, each with its part of `validation_data=`.

    Args:
        data: As `LinearProbeCallback` takes it.
        validation_data: Likewise.
        preprocess: As of `Source`.

    Raises:
        ValueError: Data that are empty, endless, or can't be read.
    """
    named = isinstance(data, Mapping)
    found = []
    for name, of_set in data.items() if named else [(None, data)]:
        held_out = (validation_data or {}).get(name) if named else validation_data
        place = f"[{name!r}]" if named else ""
        found.append(
            LabelledSet(
                name,
                Source(of_set, f"data{place}", preprocess),
                None
                if held_out is None
                else Source(held_out, f"validation_data{place}", preprocess),
            )
        )
    return found


def _sets(names: set[str] | None) -> str:
    return "without names" if names is None else f"named {', '.join(map(repr, sorted(names)))}"


def _labels_at_hand(data: Any, what: str) -> tuple[Any, Any] | None:
    """Labels and weights of data that are arrays, if they are numbers."""
    found = labels_of(data)
    for array in [] if found is None else keras.tree.flatten(found[0]):
        if array.dtype.kind in "OSU" and array.size:
            raise ValueError(
                f"Expected the labels of {what} to be numbers. Received: {array.dtype}, such as "
                f"{array.flat[0]!r}. np.unique(y, return_inverse=True)[1] numbers them."
            )
    return found


def _without_first(labels: tuple[Any, Any]) -> tuple[Any, Any]:
    """Those of the examples behind the first batch."""
    return keras.tree.map_structure(lambda of: None if of is None else of[BATCH:], labels)


def _numbers(labels: Any) -> int:
    return sum(int(tf.size(part)) for part in tf.nest.flatten(labels) if tf.is_tensor(part))
