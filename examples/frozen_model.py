"""Probes on a finished model: what does each layer of it know of my images?

    python examples/frozen_model.py --model ResNet50 --weights imagenet --data photos/
    python examples/frozen_model.py --model my_model.keras --data images.npz --out results

Runs the model once over the images, keeps every probed layer's features on disk, then finds the
optimal linear probe of each layer, with a certificate. Interrupted, it goes on where it was.

`photos/` has a folder of images for each class; an .npz has Keras's layout: x_train and y_train,
and x_test and y_test to report on if they are there.
"""

import argparse
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

from keras_probes import FeatureStore, extract_features, fit_probes


def load_model(name: str, weights: str | None) -> tuple[keras.Model, object]:
    """A model and what prepares its images."""
    if pathlib.Path(name).suffix in (".keras", ".h5"):
        return keras.models.load_model(name, compile=False), lambda x: x / 255
    make = getattr(keras.applications, name, None)
    if make is None:
        names = ", ".join(n for n in dir(keras.applications) if n[0].isupper())
        raise SystemExit(f"--model takes a .keras or .h5 file, or one of {names}. Received: {name}")
    weights = None if weights == "none" else weights
    return make(weights=weights), sys.modules[make.__module__].preprocess_input


def load_data(path: str, size: tuple[int, int], batch_size: int) -> tuple[list, int]:
    """Data sets of (images, labels), the second one for testing, and the number of classes."""
    if pathlib.Path(path).is_dir():
        images = keras.utils.image_dataset_from_directory(
            path, shuffle=False, image_size=size, batch_size=batch_size
        )
        return [images], len(images.class_names)
    with np.load(path) as arrays:
        splits = [
            (arrays[f"x_{split}"], arrays[f"y_{split}"].ravel().astype("int32"))
            for split in ("train", "test")
            if f"x_{split}" in arrays
        ]
    datasets = [tf.data.Dataset.from_tensor_slices(split).batch(batch_size) for split in splits]
    return datasets, 1 + max(int(labels.max()) for _, labels in splits)


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
    args = parser.parse_args()

    model, prepare = load_model(args.model, args.weights)
    height, width, channels = model.input_shape[1:]
    size = (height or 224, width or 224)
    datasets, num_classes = load_data(args.data, size, args.batch_size)

    def prepared(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        images = images if images.shape.rank == 4 else images[..., None]
        if images.shape[-1] == 1 and channels == 3:
            images = tf.image.grayscale_to_rgb(images)
        return prepare(tf.image.resize(tf.cast(images, tf.float32), size)), labels

    stores: list[FeatureStore] = []
    for split, dataset in zip(("train", "test"), datasets, strict=False):
        taken = dataset if args.limit is None else dataset.take(args.limit)
        stores.append(
            extract_features(
                model,
                taken.map(prepared, num_parallel_calls=tf.data.AUTOTUNE).prefetch(2),
                pathlib.Path(args.out) / f"features-{split}",
                layers=args.layers,
                reduce=args.reduce,
                num_classes=num_classes,
                class_names=getattr(dataset, "class_names", None),
            )
        )
    results = fit_probes(stores[0], test=stores[1] if len(stores) > 1 else 0.1)
    results.save(args.out)
    print(f"\nError of the optimal linear probe of each layer of {args.model}:\n{results}")
    print(f"\nWritten to {args.out}: the features, and the probes, which ProbeResults.load reads.")


if __name__ == "__main__":
    main()
