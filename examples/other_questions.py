"""Other questions of the same layers (the paper's section 3.6): what does a classifier keep?

A convnet learns to tell digits, turned by 0 to 3 quarters, whatever way they are turned. Probes ask
each of its layers four questions at once: which digit, odd or even, turned how far, drawn how
thickly; and, as a control, for labels at random.
"""

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tensorflow as tf
from images import load_images
from keras import layers
from options import options

from keras_probes import LinearProbeCallback


def turned(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Each image by a number of quarters; labels are digit + 10 * quarters."""
    quarters = np.random.default_rng(seed).integers(0, 4, len(x))
    x = np.stack([np.rot90(image, k) for image, k in zip(x, quarters, strict=True)])
    return x, y + 10 * quarters


def build_convnet() -> keras.Model:
    """Two convolutions and two fully connected layers."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 5, padding="same", activation="relu", name="conv1"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(64, 5, padding="same", activation="relu", name="conv2"),
            layers.MaxPooling2D(name="pool2"),
            layers.Flatten(),
            layers.Dense(128, activation="relu", name="fc1"),
            layers.Dense(128, activation="relu", name="fc2"),
            layers.Dense(10, activation="softmax", name="digits"),
        ]
    )


def stroke(x: tf.Tensor) -> tf.Tensor:
    """How thick the strokes of each image are: ink over outline."""
    return tf.reduce_sum(x, axis=[1, 2, 3]) / tf.image.total_variation(x)


def digit_loss(y: tf.Tensor, p: tf.Tensor) -> tf.Tensor:
    """The loss of a classifier that is asked for the digit alone."""
    return keras.losses.sparse_categorical_crossentropy(y % 10, p)


def main() -> None:
    """Prints the error of each question at each layer, and writes figure and report."""
    args = options(__doc__, "other_questions_out", epochs=10, quick="one epoch").parse_args()
    keras.utils.set_random_seed(args.seed)
    train, test = (turned(*part, args.seed) for part in load_images(args.data, args.seed))
    thirds = [float(third) for third in np.quantile(stroke(tf.constant(train[0])), [1 / 3, 2 / 3])]

    def thickness(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:  # noqa: ARG001
        return tf.cast(stroke(x) > thirds[0], tf.int32) + tf.cast(stroke(x) > thirds[1], tf.int32)

    questions = {
        "digit": lambda _, y: y % 10,
        "odd": lambda _, y: y % 2,
        "quarters": lambda _, y: y // 10,
        "thickness": thickness,
    }
    classes = {"digit": 10, "odd": 2, "quarters": 4, "thickness": 3}
    model = build_convnet()
    model.compile("adam", digit_loss)
    probes = LinearProbeCallback(
        target=questions, num_classes=classes, baselines=["shuffled"], seed=args.seed
    )
    model.fit(
        *train, batch_size=64, epochs=1 if args.quick else args.epochs, validation_data=test,
        callbacks=[probes], verbose=2,
    )  # fmt: skip

    results = probes.results
    table = pd.DataFrame({name: results.measured(target=name)["value"] for name in questions})
    of_random = results.measured(target="digit", baseline="shuffled")
    table["random"] = of_random["value"]
    guesses = [results.measured(target=name)["majority"].iloc[-1] for name in questions]
    table.loc["(guessing)"] = [*guesses, of_random["majority"].iloc[-1]]
    print(f"\nError on {len(test[0]):,} test images\n{table.to_string(float_format='%.3f')}")

    args.out.mkdir(parents=True, exist_ok=True)
    axes = None
    for name in questions:
        axes = results.plot(axes, target=name, label=name)
    axes.set_title("")
    axes.figure.savefig(args.out / "errors.png", dpi=150)
    plt.close(axes.figure)
    results.save(args.out)
    results.report(args.out / "probes.html")
    table.to_csv(args.out / "errors.csv")


if __name__ == "__main__":
    main()
