"""The paper's Inception v3 (section 4.2, figures 5 and 9): four moments of training, two heads.

A second head, the auxiliary one, hangs from the module `mixed7` and helps in training. Is it ahead
of the main one? Probes of 1,000 random features train along; the graph is coloured at four moments.
"""

import shutil

import keras
from images import in_color, load_images
from keras import layers
from options import options
from outcome import write

from keras_probes import LinearProbeCallback, plot_probed_model


def build_inception(shape: tuple, classes: int) -> keras.Model:
    """Keras's Inception v3, with the auxiliary head that it leaves out."""
    base = keras.applications.InceptionV3(weights=None, include_top=False, input_shape=shape)
    head = layers.GlobalAveragePooling2D(name="head_pool")(base.output)
    head = layers.Dense(classes, "softmax", name="head")(head)

    aux = layers.AveragePooling2D(2, name="aux_pool")(base.get_layer("mixed7").output)
    for place, filters in enumerate([128, 768], start=1):
        aux = layers.Conv2D(filters, 1, use_bias=False, name=f"aux_conv{place}")(aux)
        aux = layers.BatchNormalization(name=f"aux_norm{place}")(aux)
        aux = layers.ReLU(name=f"aux_relu{place}")(aux)
    aux = layers.GlobalAveragePooling2D(name="aux_average")(aux)
    aux = layers.Dense(classes, "softmax", name="aux_head")(aux)
    return keras.Model(base.input, {"head": head, "aux_head": aux}, name="inception_v3")


def main() -> None:
    """Prints the errors at four moments, and writes figures, graphs and the report."""
    args = options(__doc__, "inception_out", epochs=6, quick="96 images, four epochs").parse_args()
    keras.utils.set_random_seed(args.seed)
    limit, epochs = (96, 4) if args.quick else (2000, args.epochs)
    data = [(in_color(x, 75), y) for x, y in load_images(args.data, args.seed, limit)]
    train, test = ((x, {"head": y, "aux_head": y}) for x, y in data)

    model = build_inception(train[0].shape[1:], classes=int(data[0][1].max()) + 1)
    model.compile(
        keras.optimizers.Adam(1e-3),
        loss=dict.fromkeys(["head", "aux_head"], "sparse_categorical_crossentropy"),
        loss_weights={"head": 1.0, "aux_head": 0.4},
        metrics=dict.fromkeys(["head", "aux_head"], "accuracy"),
    )
    probes = LinearProbeCallback(
        ["input", "mixed*", "head_pool", "aux_relu*", "head", "aux_head"],
        reduce="random",
        target="head",
        log_dir=args.out / "logs",
        seed=args.seed,
    )
    fit = model.fit(
        *train, batch_size=16, epochs=epochs, validation_data=test, callbacks=[probes], verbose=2
    )

    results = probes.results
    moments = sorted({0, epochs // 4, epochs // 2, epochs - 1})
    table = results.history()[moments].rename(columns=lambda epoch: f"epoch {epoch + 1}")
    for head in ("head", "aux_head"):
        table.loc[f"({head} itself)"] = [
            1 - fit.history[f"val_{head}_accuracy"][moment] for moment in moments
        ]
    print(f"\nError on {len(test[0]):,} test images\n{table.to_string(float_format='%.3f')}")
    last = table.iloc[:, -1]
    ahead = "ahead of" if last["aux_head"] < last["head"] else "not ahead of"
    print(
        f"\nThe auxiliary head's probe, {last['aux_head']:.1%}, is {ahead} the main head's, "
        f"{last['head']:.1%}; in the paper it is a little ahead while the model trains"
    )
    write(results, args.out, epochs=moments)
    table.to_csv(args.out / "errors.csv")

    if shutil.which("dot"):  # Graphviz, which pip does not install
        for moment in moments:
            path = args.out / f"inception-{moment + 1}.svg"
            plot_probed_model(model, results, path, epoch=moment, condensed=True)


if __name__ == "__main__":
    main()
