"""Probes on a finished model: what does each layer of it know of my images?

    python examples/frozen_model.py --model ResNet50 --weights imagenet --data photos/
    python examples/frozen_model.py --model my_model.keras --data images.npz --workers 4

Runs the model once over the images, keeps every probed layer's features on disk, then finds the
optimal linear probe of each layer, with a certificate. Interrupted, it goes on where it was.

`photos/` has a folder of images for each class; an .npz has Keras's layout: x_train and y_train,
and x_test and y_test to report on if they are there.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_probes import Examples, FeatureStore, extract_features, fit_probes, image_folder


def scaled(image: np.ndarray) -> np.ndarray:
    """What most models of one's own take."""
    return image / 255


def load_model(name: str, weights: str | None) -> tuple[keras.Model, Callable]:
    """A model and what prepares its images."""
    if pathlib.Path(name).suffix in (".keras", ".h5"):
        return keras.models.load_model(name, compile=False), scaled
    make = getattr(keras.applications, name, None)
    if make is None:
        names = ", ".join(n for n in dir(keras.applications) if n[0].isupper())
        raise SystemExit(f"--model takes a .keras or .h5 file, or one of {names}. Received: {name}")
    weights = None if weights == "none" else weights
    return make(weights=weights), sys.modules[make.__module__].preprocess_input


def load_data(
    path: str, size: tuple[int, int], channels: int, **options: Any
) -> tuple[list[Examples], int]:
    """Images with their labels, the second ones for testing, and the number of classes."""
    if pathlib.Path(path).is_dir():
        images = image_folder(path, size, channels=channels, **options)
        return [images], len(images.class_names or ())
    prepare, batch_size = options["prepare"], options["batch_size"]

    def load(example: tuple[np.ndarray, int]) -> tuple[np.ndarray, int]:
        image = example[0] if example[0].ndim == 3 else example[0][..., None]
        if image.shape[-1] == 1 and channels == 3:
            image = np.repeat(image, 3, -1)
        return np.asarray(prepare(tf.image.resize(image, size).numpy())), example[1]

    with np.load(path) as arrays:
        splits = [
            (arrays[f"x_{split}"], arrays[f"y_{split}"].ravel().astype("int32"))
            for split in ("train", "test")
            if f"x_{split}" in arrays
        ]
    num_classes = 1 + max(int(labels.max()) for _, labels in splits)
    examples = (list(zip(*split, strict=True)) for split in splits)
    return [Examples(some, load, batch_size=batch_size) for some in examples], num_classes


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="of keras.applications, or a file")
    parser.add_argument("--weights", default="imagenet", help='"imagenet", a file, or "none"')
    parser.add_argument("--data", required=True, help="a folder of images by class, or an .npz")
    parser.add_argument("--layers", default="auto", help='"auto", "all", a name or a glob')
    parser.add_argument("--reduce", default="gap", help='"gap", "auto", "random" or "flatten"')
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="number of batches to take of each split")
    parser.add_argument("--out", default="frozen_model")
    parser.add_argument("--workers", type=int, help="number of processes; by default this one")
    args = parser.parse_args()

    model, prepare = load_model(args.model, args.weights)
    height, width, channels = model.input_shape[1:]
    size = (height or 224, width or 224)
    options = {"prepare": prepare, "batch_size": args.batch_size}
    splits, num_classes = load_data(args.data, size, channels, **options)
    engine = ProcessPoolExecutor(args.workers) if args.workers else None

    stores: list[FeatureStore] = []
    for name, images in zip(("train", "test"), splits, strict=False):
        if args.limit is not None:
            images.items = images.items[: args.limit * args.batch_size]
        path = pathlib.Path(args.out) / f"features-{name}"
        stores.append(
            extract_features(
                model,
                images,
                path,
                layers=args.layers,
                reduce=args.reduce,
                num_classes=num_classes,
                engine=engine,
            )
        )
    results = fit_probes(stores[0], test=stores[1] if len(stores) > 1 else 0.1, engine=engine)
    results.save(args.out)
    print(f"\nError of the optimal linear probe of each layer of {args.model}:\n{results}")
    print(f"\nWritten to {args.out}: the features, and the probes, which ProbeResults.load reads.")


if __name__ == "__main__":
    main()
