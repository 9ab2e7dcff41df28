"""A skip connection over half of a network that is far too deep (section 5.1, figure 6).

128 fully connected layers of 128 units learn MNIST by plain SGD, since one skip connection leads
past the first 64 of them. Probes show that these stay unused, and `diagnose` says so.
"""

import argparse
import pathlib

import keras
from images import mnist
from keras import layers

from keras_probes import LinearProbeCallback

WIDTH = 128


def hidden(h: keras.KerasTensor, place: int) -> keras.KerasTensor:
    """One of the layers."""
    return layers.Dense(WIDTH, "relu", kernel_initializer="he_normal", name=f"hidden{place}")(h)


def one_long_skip(depth: int) -> keras.Model:
    """The paper's network: a skip connection from the first layer past the first half."""
    inputs = keras.Input((784,))
    first = h = hidden(inputs, 0)
    for place in range(1, depth):
        if place == depth // 2:
            h = layers.Add(name="skip")([first, h])
        h = hidden(h, place)
    return keras.Model(inputs, layers.Dense(10, "softmax", name="head")(h), name="one_long_skip")


def main() -> None:
    """Trains, prints the findings and writes the figure and the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="an .npz file with x_train, y_train, ...; or mnist")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("pathological_skip_out"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="24 layers, 2 epochs")
    args = parser.parse_args()

    keras.utils.set_random_seed(args.seed)
    (x, y), (x_test, y_test) = mnist(args.data, args.seed)
    x, x_test = x.reshape(-1, 784), x_test.reshape(-1, 784)
    model = one_long_skip(24 if args.quick else 128)
    model.compile(
        keras.optimizers.SGD(0.002), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    probes = LinearProbeCallback(["input", "hidden*", "skip", "head"])
    model.fit(
        x, y, batch_size=32, epochs=2 if args.quick else args.epochs,
        validation_data=(x_test, y_test), callbacks=[probes], verbose=2,
    )  # fmt: skip

    print(f"\n{probes.results.diagnose()}")
    probes.results.report(args.out / "probes.html")
    probes.results.plot().figure.savefig(args.out / "errors.png", dpi=150)


if __name__ == "__main__":
    main()
