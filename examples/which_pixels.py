"""A label at every position: which digit does a pixel belong to?

A small U-Net is trained to say of each pixel of a canvas which digit it is of, if any. Probes ask
the same of each layer: of the channels at a pixel, or on a coarser grid, of the cell it falls into.
"""

import keras
from canvas import canvases
from keras import layers
from options import options
from outcome import write

from keras_probes import LinearProbeCallback


def build() -> keras.Model:
    """Two steps down, two up, and skips between them."""

    def convolved(h: keras.KerasTensor, width: int, name: str) -> keras.KerasTensor:
        return layers.Conv2D(width, 3, padding="same", activation="relu", name=name)(h)

    inputs = keras.Input((40, 40, 1))
    down1 = convolved(inputs, 16, "down1")
    down2 = convolved(layers.MaxPooling2D()(down1), 32, "down2")
    middle = convolved(layers.MaxPooling2D()(down2), 64, "middle")
    middle = convolved(middle, 64, "middle2")
    up2 = layers.Concatenate(name="skip2")([layers.UpSampling2D()(middle), down2])
    up2 = convolved(up2, 32, "up2")
    up1 = layers.Concatenate(name="skip1")([layers.UpSampling2D()(up2), down1])
    up1 = convolved(up1, 16, "up1")
    return keras.Model(inputs, layers.Conv2D(11, 1, activation="softmax", name="pixels")(up1))


def main() -> None:
    """Prints errors and findings, and writes figure and report."""
    args = options(__doc__, "which_pixels_out", epochs=10, quick="500 digits, 1 epoch").parse_args()
    keras.utils.set_random_seed(args.seed)
    train, test = canvases(args.data, args.seed, most=3, limit=500 if args.quick else None)
    model = build()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    layers_to_probe = ["input", "down*", "middle*", "skip*", "up?", "pixels"]
    probes = LinearProbeCallback(
        layers_to_probe, metrics=["error", "balanced_error", "mean_iou"], seed=args.seed
    )
    model.fit(
        train["x"], train["pixels"], batch_size=64, epochs=1 if args.quick else args.epochs,
        validation_data=(test["x"], test["pixels"]), callbacks=[probes], verbose=2,
    )  # fmt: skip
    table = probes.results.table("mean_iou")[["shape", "validation mean_iou", "rank"]]
    for metric in ("error", "balanced_error"):
        table[metric] = probes.results.measured(metric)["value"]
    print(table)
    print(probes.results.confusion("up1"))
    write(probes.results, args.out)


if __name__ == "__main__":
    main()
