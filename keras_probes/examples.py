"""Examples that are read one by one, by their number, so that each worker reads its own alone.

In: files, or anything else that has a length and items by number. Out: a Keras data set of batches.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_probes.storage import location

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png")


class Examples(keras.utils.PyDataset):
    """Batches of examples that are read by their number.

    ```python
    photos = Examples(paths, load)  # load(path) returns (image, label)
    store = extract_features(model, photos, "features/", engine=RayEngine(8))
    ```

    `fit` takes them too, and `LinearProbeCallback(data=)`.

    Args:
        items: What has a length and items by number: paths, a Grain source, a torch data set.
        load: Takes an item, and returns its example: (x, y), (x, y, sample_weight) or x, of arrays
            or structures of arrays, of one shape in all examples; by default the item is that.
        batch_size: Number of examples of a batch.
        class_names: Names of the classes, where there are any.
        **kwargs: As of `keras.utils.PyDataset`, such as `workers`, which read in this process.

    Raises:
        TypeError: `items` has no length, or no items by number.
        ValueError: There are no items.
    """

    def __init__(
        self,
        items: Any,
        load: Callable[[Any], Any] | None = None,
        *,
        batch_size: int = 32,
        class_names: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not hasattr(items, "__len__") or not hasattr(items, "__getitem__"):
            raise TypeError(
                "Expected `items` with a length and items by number, such as a list of paths. "
                f"Received: {items!r}."
            )
        if not len(items):
            raise ValueError("The data are empty. Expected at least one example.")
        self.items, self.load, self.batch_size = items, load, batch_size
        self.class_names = None if class_names is None else list(class_names)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.items) // self.batch_size)

    def __getitem__(self, index: int) -> tuple:
        """Reads a batch."""
        start = index * self.batch_size
        numbers = range(start, min(start + self.batch_size, len(self.items)))
        batch = [self._example(number) for number in numbers]
        return keras.tree.map_structure(lambda *leaves: np.stack(leaves), *batch)

    def _example(self, number: int) -> tuple:
        item = self.items[number]
        example = item if self.load is None else self.load(item)
        return example if isinstance(example, tuple) else (example,)


def image_folder(
    directory: str | os.PathLike,
    size: tuple[int, int],
    *,
    channels: int = 3,
    prepare: Callable[[np.ndarray], Any] | None = None,
    **kwargs: Any,
) -> Examples:
    """Images in a folder for each class, as `keras.utils.image_dataset_from_directory` reads them.

    Args:
        directory: A folder of folders, or its URL. Classes are in the order of their names.
        size: Height and width that images are brought to.
        channels: 3 for colours, 1 for shades of gray.
        prepare: What makes the model's input of an image, float32, 0..255, shape (height, width,
            channels), such as `keras.applications.resnet50.preprocess_input`.
        **kwargs: As of `Examples`.

    Returns:
        The images with their classes.

    Raises:
        ValueError: There are no images in it.
    """
    root = location(directory)
    folders = sorted((folder for folder in root.iterdir() if folder.is_dir()), key=str)
    items = [
        (file, label)
        for label, folder in enumerate(folders)
        for file in sorted(folder.rglob("*"), key=str)
        if file.suffix.lower() in ENDINGS
    ]
    if not items:
        raise ValueError(
            "Expected a folder for each class, with images in it "
            f"({', '.join(ENDINGS)}). Received: {str(directory)!r}."
        )
    load = functools.partial(_image, size=size, channels=channels, prepare=prepare)
    return Examples(items, load, class_names=[folder.name for folder in folders], **kwargs)


def _image(
    item: tuple[Any, int], size: tuple[int, int], channels: int, prepare: Callable | None
) -> tuple[np.ndarray, np.int32]:
    file, label = item
    decoded = tf.io.decode_image(file.read_bytes(), channels, expand_animations=False)
    image = tf.image.resize(decoded, size).numpy()
    if prepare is not None:
        image = np.asarray(prepare(image), "float32")
    return image, np.int32(label)
