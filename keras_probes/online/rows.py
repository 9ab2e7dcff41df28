"""Features, labels and weights of examples: in memory as far as there is room, on disk beyond.

In: what a forward pass computes, batch by batch. Out: arrays, one row for each example.
"""

import functools
import math
import os
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from keras_probes.forward import Part


class Rows:
    """The parts of a forward pass over some examples.

    Args:
        room: How many bytes the features may take in memory. Beyond, all of them lie in temporary
            files, which go when this does.
    """

    def __init__(self, room: float = math.inf):
        self._room = room
        self._parts: dict[Part, list[np.ndarray]] = defaultdict(list)
        self._bytes = 0
        self._directory = ""  # of the features on disk, if they are
        self._widths: dict[str | None, int] = {}  # of the taps that lie on disk

    def add(self, parts: Mapping[Part, tf.Tensor]) -> None:
        """Takes the next rows, as `ForwardPass` computes them."""
        for (kind, name), part in parts.items():
            array = part.numpy()
            self._parts[kind, name].append(array)
            self._bytes += array.nbytes if kind == "tap" else 0
        if self._bytes > self._room:
            self._spill()

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.labels.values())))

    @functools.cached_property
    def features(self) -> Mapping[str, np.ndarray]:
        """By tap, float32, shape (n, n_features); once all rows are there."""
        if not self._directory:
            return {str(tap): np.concatenate(parts) for tap, parts in self._of("tap").items()}
        self._spill()
        return {
            str(tap): np.memmap(self._file(place), "float32", "r").reshape(-1, width)
            for place, (tap, width) in enumerate(self._widths.items())
        }

    @functools.cached_property
    def labels(self) -> Mapping[str | None, tf.Tensor]:
        """By target, as its task has them; once all rows are there."""
        return {t: tf.constant(np.concatenate(of)) for t, of in self._of("labels").items()}

    @functools.cached_property
    def weights(self) -> Mapping[str | None, tf.Tensor]:
        """By target, float32, shape (n,); once all rows are there."""
        given = {t: tf.constant(np.concatenate(of)) for t, of in self._of("weights").items()}
        return {t: given.get(t, tf.ones(len(labels))) for t, labels in self.labels.items()}

    def _of(self, kind: str) -> dict[str | None, list[np.ndarray]]:
        return {name: parts for (of, name), parts in self._parts.items() if of == kind}

    def _spill(self) -> None:
        """Writes the features that are in memory behind those on disk."""
        if not self._directory:
            self._directory = tempfile.mkdtemp()
            weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        for place, (tap, parts) in enumerate(self._of("tap").items()):
            with open(self._file(place), "ab") as file:
                for part in parts:
                    np.ascontiguousarray(part).tofile(file)
                    self._widths[tap] = part.shape[1]
            parts.clear()
        self._bytes = 0

    def _file(self, place: int) -> str:
        return os.path.join(self._directory, str(place))
