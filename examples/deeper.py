"""Deeper networks, which the paper's section 6 asks for: ResNet-101 and VGG-16, trained here.

    python examples/deeper.py --model vgg16

Probes train along on global averages of each residual sum, or of each layer of VGG-16.
"""

import keras
from images import in_color, load_images
from options import options
from outcome import write

from keras_probes import LinearProbeCallback

# What makes the model, what to probe, learning rate of Adam: VGG-16 has no BatchNormalization.
MODELS = {
    "resnet101": (keras.applications.ResNet101, ["input", "*_add"], 1e-3),
    "vgg16": (keras.applications.VGG16, ["input", "block*", "fc*"], 1e-4),
}


def main() -> None:
    """Prints errors and findings, and writes figure and report."""
    parser = options(__doc__, "deeper_out", epochs=3, quick="96 images, one epoch of SGD")
    parser.add_argument("--model", choices=MODELS, default="resnet101")
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    limit, epochs = (96, 1) if args.quick else (4000, args.epochs)
    train, test = ((in_color(x, 32), y) for x, y in load_images(args.data, args.seed, limit))

    make, where, learning_rate = MODELS[args.model]
    model = make(weights=None, input_shape=train[0].shape[1:], classes=int(train[1].max()) + 1)
    # Keras compiles a step of SGD for ResNet-101 in half the time.
    optimizer = keras.optimizers.SGD() if args.quick else keras.optimizers.Adam(learning_rate)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    probes = LinearProbeCallback(where, reduce="gap", log_dir=args.out / "logs", seed=args.seed)
    model.fit(
        *train, batch_size=32, epochs=epochs, validation_data=test, callbacks=[probes], verbose=2
    )

    write(probes.results, args.out)


if __name__ == "__main__":
    main()
