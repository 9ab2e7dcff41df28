"""Data as Keras takes it, read once and in order.

In: arrays, `tf.data`, `PyDataset`, a generator, a torch `DataLoader`. Out: batches of (x, y,
sample_weight).

Keras's own adapters read them, so that whatever `fit` takes is taken here; they are internal to
Keras, and this is the only file that touches them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.trainers.data_adapters import get_data_adapter


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of some data, in order.

    Attributes:
        dataset: Yields them.
        spec: Structure of their `tf.TensorSpec`, for any batch size.
        rows: Number of examples; `None` if only reading will tell.
        steps: Number of batches; likewise.
    """

    dataset: tf.data.Dataset
    spec: Any
    rows: int | None
    steps: int | None


def batches_of(data: Any, batch_size: int, preprocess: Callable[..., Any] | None = None) -> Batches:
    """Reads data as `fit` would, without shuffling.

    Args:
        data: A tuple (x, y) or (x, y, sample_weight) of arrays or structures of arrays, or a
            `tf.data.Dataset`, `PyDataset`, generator or `DataLoader` that yields such tuples in
            batches.
        batch_size: Number of rows of a batch, for arrays; other data bring their own.
        preprocess: What the host's own `fit` makes of each batch: takes x, y and sample_weight, as
            the `preprocess_samples` of KerasHub's tasks. Lists of strings are taken for arrays.

    Raises:
        ValueError: The data are empty, endless, or of a kind that Keras does not take.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if not isinstance(data, (tuple, list)):
        x, y, sample_weight = data, None, None
    elif preprocess is not None:
        # Keras's own adapter of arrays takes no strings.
        arrays = keras.utils.pack_x_y_sample_weight(*map(_as_arrays, (x, y, sample_weight)))
        x = tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size)
        y, sample_weight = None, None
    rows = _rows(x)
    if rows == 0:
        raise ValueError("The data are empty. Expected at least one example.")
    adapter = get_data_adapter(x, y, sample_weight=sample_weight, batch_size=batch_size)
    dataset = adapter.get_tf_dataset()
    if preprocess is not None:
        dataset = dataset.map(preprocess)
    if rows is not None:
        # Slices of arrays leave nothing to tune, and the tuner's thread takes five seconds to end.
        options = tf.data.Options()
        options.autotune.enabled = False
        dataset = dataset.with_options(options)
    endless = int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY
    if endless or (isinstance(x, keras.utils.PyDataset) and adapter.num_batches is None):
        raise ValueError(
            "The data are endless. Expected data that end; cut them with dataset.take(batches)."
        )

    return Batches(dataset, any_batch_size(dataset.element_spec), rows, adapter.num_batches)


def any_batch_size(spec: Any) -> Any:
    """A structure of `tf.TensorSpec` with the size of the batch left open."""

    def freed(part: Any) -> Any:
        if isinstance(part, tf.TensorSpec) and part.shape.rank:
            return tf.TensorSpec((None, *part.shape[1:]), part.dtype)
        return part

    return tf.nest.map_structure(freed, spec)


def examples_in(batch: Any) -> int:
    """Number of examples of a batch."""
    return int(tf.nest.flatten(batch)[0].shape[0])


def bytes_in(batch: Any) -> int:
    """Number of bytes of a batch."""
    parts = [part for part in tf.nest.flatten(batch, expand_composites=True) if part is not None]
    return sum(part.shape.num_elements() * part.dtype.size for part in parts)


def labels_of(data: Any) -> tuple[Any, Any] | None:
    """Labels and sample weights of data that are (x, y) or (x, y, sample_weight) of arrays.

    Args:
        data: As `batches_of` takes them.

    Returns:
        Structures of arrays as NumPy has them, the second `None` where there are none; or `None`
        of data whose labels are not at hand.
    """
    if not isinstance(data, (tuple, list)):
        return None
    _, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    labels = arrays_of(y)
    return None if labels is None else (labels, arrays_of(sample_weight))


def arrays_of(structure: Any) -> Any:
    """A structure of arrays as NumPy has them; `None` if it is of something else, or empty."""
    leaves = keras.tree.flatten(structure)
    if not leaves or not all(hasattr(leaf, "__array__") for leaf in leaves):
        return None
    return keras.tree.map_structure(np.asarray, structure)


def _as_arrays(part: Any) -> Any:
    """Lists as arrays, which `tf.data` would take for structures."""
    if isinstance(part, Mapping):
        return {name: _as_arrays(value) for name, value in part.items()}
    return np.asarray(part) if isinstance(part, list) else part


def _rows(x: Any) -> int | None:
    """Number of rows of arrays; `None` for anything else."""
    leaves = keras.tree.flatten(x)
    arrays = all(hasattr(leaf, "__array__") and hasattr(leaf, "shape") for leaf in leaves)
    return int(leaves[0].shape[0]) if arrays and leaves else None
