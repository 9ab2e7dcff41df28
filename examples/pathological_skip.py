"""A skip connection over half of a network that is far too deep (section 5.1, figure 6).

128 fully connected layers of 128 units learn MNIST by plain SGD, since one skip connection leads
past the first 64 of them. Probes show that these stay unused, and `diagnose` says so. It finds no
such thing in a network of as many layers with a skip connection past each (`--healthy`).
"""

import keras
import numpy as np
from images import load_images
from keras import layers
from options import options
from outcome import write

from keras_probes import LinearProbeCallback, ProbeResults

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


def short_skips(depth: int) -> keras.Model:
    """As many layers of the same width, each with a skip connection past it."""
    inputs = keras.Input((784,))
    h = hidden(inputs, 0)
    for place in range(1, depth):
        # So small at first that all of them together leave h about as large as it was.
        small = keras.initializers.VarianceScaling(1 / depth)
        branch = layers.Dense(WIDTH, kernel_initializer=small, name=f"hidden{place}")
        h = layers.Add(name=f"skip{place}")([h, branch(layers.ReLU()(h))])
    return keras.Model(inputs, layers.Dense(10, "softmax", name="head")(h), name="short_skips")


def weights(model: keras.Model) -> dict[str, np.ndarray]:
    """The weights of each of the layers, by name."""
    return {each.name: each.kernel.numpy() for each in model.layers if "hidden" in each.name}


def beside_the_paper(
    model: keras.Model, first: dict[str, np.ndarray], results: ProbeResults
) -> str:
    """What became of each half, in the words of section 5.1."""
    errors, last = results.measured()["value"], weights(model)
    moved = {
        name: np.linalg.norm(last[name] - first[name]) / np.linalg.norm(first[name])
        for name in last
    }
    names, told = list(last)[1:], []  # the skip connection begins after the first layer
    middle = len(last) // 2 - 1
    for which, half in (("first", names[:middle]), ("second", names[middle:])):
        told.append(
            f"the {which} half ends at an error of {errors[half[-1]]:.2f}, its weights moved by "
            f"{np.median([moved[name] for name in half]):.2%}"
        )
    return (
        f"In between, the skip connection brings it to {errors['skip']:.2f}; {'; '.join(told)}. In "
        "the paper the weights of the first half are not zero, but no useful signal passes."
    )


def main() -> None:
    """Trains, prints the findings and writes the figure and the report."""
    parser = options(__doc__, "pathological_skip_out", epochs=6, quick="24 layers, 2 epochs")
    parser.add_argument("--healthy", action="store_true", help="the network with short skips")
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    train, test = ((x.reshape(len(x), -1), y) for x, y in load_images(args.data, args.seed))
    depth, epochs = (24, 2) if args.quick else (128, args.epochs)

    model = short_skips(depth) if args.healthy else one_long_skip(depth)
    first = weights(model)
    model.compile(
        keras.optimizers.SGD(0.002), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    where = "skip*" if args.healthy else "hidden*"
    probes = LinearProbeCallback(["input", "hidden0", where, "skip*", "head"], seed=args.seed)
    model.fit(
        *train, batch_size=32, epochs=epochs, validation_data=test, callbacks=[probes], verbose=2
    )

    if not args.healthy:
        print(f"\n{beside_the_paper(model, first, probes.results)}")
    write(probes.results, args.out)


if __name__ == "__main__":
    main()
