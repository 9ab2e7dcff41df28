"""Numbers to predict: where on a canvas is the digit?

A convnet is trained to say row and column of a digit's centre. A probe is a linear least squares
fit at each layer; its error is the share of variance left unexplained, and `mae` is in pixels.
Averages over a layer tell hardly where something is: all positions, or a random part, do.
"""

import keras
import pandas as pd
from canvas import canvases
from keras import layers
from options import options
from outcome import write

from keras_probes import LinearProbeCallback


def build() -> keras.Model:
    """Three convolutions, and two numbers."""
    return keras.Sequential(
        [
            keras.Input((40, 40, 1)),
            layers.Conv2D(16, 5, 2, padding="same", activation="relu", name="conv1"),
            layers.Conv2D(32, 3, 2, padding="same", activation="relu", name="conv2"),
            layers.Conv2D(32, 3, 2, padding="same", activation="relu", name="conv3"),
            layers.Flatten(),
            layers.Dense(64, activation="relu", name="fc"),
            layers.Dense(2, name="place"),
        ]
    )


def main() -> None:
    """Prints errors and findings, and writes figure and report."""
    args = options(
        __doc__, "where_is_it_out", epochs=10, quick="1,000 digits, 1 epoch"
    ).parse_args()
    keras.utils.set_random_seed(args.seed)
    train, test = canvases(args.data, args.seed, most=1, limit=1000 if args.quick else None)
    columns = {}
    for reduce in ("gap", "random"):
        keras.utils.set_random_seed(args.seed)
        model = build()
        model.compile("adam", "mse", metrics=["mae"])
        probes = LinearProbeCallback(metrics=["error", "mae"], reduce=reduce, seed=args.seed)
        model.fit(
            train["x"], train["place"], batch_size=64, epochs=1 if args.quick else args.epochs,
            validation_data=(test["x"], test["place"]), callbacks=[probes], verbose=2,
        )  # fmt: skip
        for metric in ("error", "mae"):
            columns[f"{metric}, {reduce}"] = probes.results.measured(metric)["value"]
    print(pd.DataFrame(columns).round(3))
    write(probes.results, args.out)


if __name__ == "__main__":
    main()
