"""The paper's ResNet-50 (section 4.1, figure 4): the error at the input and at each residual sum.

    python examples/resnet50.py --images ILSVRC2012_val/   # pretrained, as in the paper
    python examples/resnet50.py                            # trained here, on small images

`--images` has a folder for each of ImageNet's 1,000 classes, in the order of their names; Keras
fetches the weights, unless `--weights` is a file of them. The features of all 17 layers are
extracted in one pass and kept on disk; then each layer's optimal probe is found.
"""

import argparse
import pathlib
import tempfile

import keras
import pandas as pd
from images import in_color, load_images
from options import options
from outcome import write

from keras_probes import ProbeResults, extract_features, fit_probes

LAYERS = ["input", "*_add"]
PAPER = [0.99, 0.94, 0.89, 0.88, 0.87, 0.82, 0.79, 0.76, 0.77, 0.69, 0.67, 0.62, 0.57, 0.51, 0.41,
         0.39, 0.31]  # table 4a  # fmt: skip


def pretrained(folder: str, weights: str, out: pathlib.Path) -> ProbeResults:
    """Probes of a network that is trained already, on images in a folder."""
    model = keras.applications.ResNet50(weights=weights)
    images = keras.utils.image_dataset_from_directory(
        folder, image_size=(224, 224), crop_to_aspect_ratio=True, shuffle=False
    )
    names, prepare = images.class_names, keras.applications.resnet50.preprocess_input
    data = images.map(lambda x, y: (prepare(x), y)).prefetch(2)
    store = extract_features(
        model, data, out, layers=LAYERS, reduce="gap", num_classes=len(names), class_names=names
    )
    return fit_probes(store)


def trained_here(args: argparse.Namespace) -> ProbeResults:
    """Probes of a network that is trained on small images first."""
    limit = 500 if args.quick else 5000
    train, test = ((in_color(x, 32), y) for x, y in load_images(args.data, args.seed, limit))
    classes = int(train[1].max()) + 1
    model = keras.applications.ResNet50(
        weights=None, input_shape=train[0].shape[1:], classes=classes
    )
    model.compile(
        keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    epochs = 1 if args.quick else args.epochs
    model.fit(*train, batch_size=32, epochs=epochs, validation_data=test, verbose=2)
    with tempfile.TemporaryDirectory() as directory:
        stores = [
            extract_features(
                model, data, f"{directory}/{name}", layers=LAYERS, reduce="gap",
                num_classes=classes,
            )
            for name, data in (("train", train), ("test", test))
        ]  # fmt: skip
        return fit_probes(stores[0], test=stores[1], seed=args.seed)


def main() -> None:
    """Prints the table beside the paper's, and writes results, figure and report."""
    parser = options(__doc__, "resnet50_out", epochs=6, quick="500 images, one epoch")
    parser.add_argument(
        "--images", help="a folder of ImageNet's validation images: nothing is trained"
    )
    parser.add_argument("--weights", default="imagenet", help="with --images: or a file of them")
    args = parser.parse_args()

    keras.utils.set_random_seed(args.seed)
    if args.images:
        results = pretrained(args.images, args.weights, args.out / "features")
    else:
        results = trained_here(args)

    table = results.table()[["shape", "features", "train error", "test error", "test ±95%"]].copy()
    table["paper"] = PAPER
    pretrained_on = f"the weights {args.weights!r}, on {args.images}"
    what = pretrained_on if args.images else "a network trained here"
    print(f"\nErrors of the optimal probes of {what}; the paper's are of the ImageNet weights")
    with pd.option_context("display.width", 120, "display.max_columns", None):
        print(table.to_string(float_format="%.3f"))
    write(results, args.out)


if __name__ == "__main__":
    main()
