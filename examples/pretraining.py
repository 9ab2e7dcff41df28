"""What the examples of pretraining share: who sees which labels, and the twin to compare with.

The labels of 500 images are known. The pretrained network never sees them, its probes do; and so
does its twin, the same encoder with the same first weights, trained to classify these images alone.
Both have had 500 labels in all, and as many batches. But the twin has been trained on the very
images that its probes are fitted to. All are tested on other images.
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tensorflow as tf
from images import Split, load_images
from options import options

from keras_probes import LinearProbeCallback, ProbeResults
from keras_probes.view.plots import plot_curves


class Images(NamedTuple):
    """Who sees what.

    Attributes:
        x: For pretraining, shape (n, height, width, channels).
        known: The first of these, with their labels.
        test: Others, with theirs.
    """

    x: np.ndarray
    known: Split
    test: Split


def asked_for(description: str, out: str, epochs: int) -> tuple[argparse.Namespace, Images]:
    """Returns the options of the paper's experiments, and the images; seeds what is random."""
    parser = options(description, out, epochs, quick="600 images, 2 epochs")
    parser.add_argument("--labels", type=int, default=500, help="images whose labels are known")
    args = parser.parse_args()
    args.epochs = 2 if args.quick else args.epochs
    keras.utils.set_random_seed(args.seed)
    (x, y), test = load_images(args.data, args.seed, 600 if args.quick else None)
    return args, Images(x, (x[: args.labels], y[: args.labels]), test)


def two_alike(make: Callable[[], keras.Model], x: np.ndarray) -> tuple[keras.Model, keras.Model]:
    """Returns two encoders of images x that begin with the same weights."""
    first, second = make(), make()
    for encoder in (first, second):
        encoder(x[:1])
    second.set_weights(first.get_weights())
    return first, second


def beside_a_twin(
    host: keras.Model, twin: keras.Model, layers: str, images: Images, batch: int,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Trains both with probes, prints their errors, and writes results and a figure.

    Args:
        host: What trains without labels, compiled.
        twin: The encoder with a softmax layer.
        layers: Where the probes are, in both.
        images: To train and test on.
        batch: Number of images of a batch.
        args: The options.
    """
    probes, of_twin = (
        LinearProbeCallback(
            layers, reduce="gap", data=images.known, validation_data=images.test,
            baselines=baselines, seed=args.seed,
        )
        for baselines in (["initial"], [])
    )  # fmt: skip
    print("Without labels")
    host.fit(images.x, batch_size=batch, epochs=args.epochs, callbacks=[probes], verbose=2)

    print(f"The twin, on {len(images.known[1])} images with their labels")
    twin.compile("adam", "sparse_categorical_crossentropy")
    known = tf.data.Dataset.from_tensor_slices(images.known).shuffle(10**4, args.seed)
    twin.fit(
        known.repeat().batch(batch), steps_per_epoch=math.ceil(len(images.x) / batch),
        epochs=args.epochs, callbacks=[of_twin], shuffle=False, verbose=2,
    )  # fmt: skip
    _write({"pretrained": probes.results, "twin": of_twin.results}, args)


def _write(both: dict[str, ProbeResults], args: argparse.Namespace) -> None:
    pretrained, twin = both.values()
    errors = {"as initialised": pretrained.measured(baseline="initial", epoch=0)["value"]}
    for name, results in both.items():
        history = results.history()
        for epoch in history.columns[[0, -1]]:
            errors[f"{name}, epoch {epoch + 1}"] = history[epoch]
    with pd.option_context("display.width", 120, "display.max_columns", None):
        print(f"\nError of the probes on images to test\n{pd.DataFrame(errors).round(3)}")
    print(
        f"\nAfter the last epoch, pretrained and (other) the twin\n{pretrained.compare_with(twin)}"
    )

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    titles = "pretrained without labels", f"the twin, on {args.labels} labels"
    for (name, results), ax, title in zip(both.items(), panels, titles, strict=True):
        results.save(args.out / name)
        plot_curves(results, ax).set_title(title)
    panels[0].get_legend().remove()  # on the right are the same layers
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylabel("")
    figure.savefig(args.out / "errors.png", dpi=110)
