"""Several labels at once: which of ten digits are on a canvas?

A convnet is trained to say of each digit whether it is there. At each of its layers there is a
logistic probe for each digit; their error is the share of wrong answers.
"""

import keras
from canvas import canvases
from keras import layers
from options import options
from outcome import write

from keras_probes import LinearProbeCallback


def build() -> keras.Model:
    """Four convolutions, and an answer for each digit."""
    return keras.Sequential(
        [
            keras.Input((40, 40, 1)),
            layers.Conv2D(32, 5, padding="same", activation="relu", name="conv1"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(64, 3, padding="same", activation="relu", name="conv2"),
            layers.MaxPooling2D(name="pool2"),
            layers.Conv2D(128, 3, padding="same", activation="relu", name="conv3"),
            layers.Conv2D(128, 3, padding="same", activation="relu", name="conv4"),
            layers.GlobalMaxPooling2D(name="pool"),
            layers.Dense(10, activation="sigmoid", name="digits"),
        ]
    )


def main() -> None:
    """Prints errors and findings, and writes figure and report."""
    args = options(
        __doc__, "which_digits_out", epochs=10, quick="1,000 digits, 1 epoch"
    ).parse_args()
    keras.utils.set_random_seed(args.seed)
    train, test = canvases(args.data, args.seed, most=3, limit=1000 if args.quick else None)
    model = build()
    model.compile("adam", "binary_crossentropy", metrics=["binary_accuracy"])
    probes = LinearProbeCallback(
        metrics=["error", "mean_average_precision"], reduce="gap", seed=args.seed
    )
    model.fit(
        train["x"], train["digits"], batch_size=64, epochs=1 if args.quick else args.epochs,
        validation_data=(test["x"], test["digits"]), callbacks=[probes], verbose=2,
    )  # fmt: skip
    print(probes.results.table()[["validation error", "validation ±95%", "rank", "certificate"]])
    print(probes.results.measured("mean_average_precision")["value"].round(3))
    print(probes.results.per_class("pool").round(3))
    write(probes.results, args.out)


if __name__ == "__main__":
    main()
