"""Sequences, which the paper's section 6 asks for: in what language is this name, letter by letter?

    python examples/sequences.py --model transformer

Names of countries and languages in ten languages come from the package Babel. Probes train along
on the averages, over all 24 places, of each layer of an LSTM or of a small transformer.
"""

from collections import Counter

import babel
import keras
import numpy as np
from keras import layers
from options import options
from outcome import write

from keras_probes import LinearProbeCallback

LANGUAGES = ("cs", "de", "es", "fi", "fr", "hu", "it", "nl", "pl", "tr")
LENGTH, WIDTH = 24, 64


def names(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Names that only one of the languages has, in random order, and the number of the language."""
    found = []
    for language in map(babel.Locale, LANGUAGES):
        found.append({*language.territories.values(), *language.languages.values()})
    count = Counter(name for of_language in found for name in of_language)
    pairs = sorted(
        (name, label)
        for label, of_language in enumerate(found)
        for name in of_language
        if count[name] == 1
    )
    order = np.random.default_rng(seed).permutation(len(pairs))
    texts, labels = zip(*(pairs[place] for place in order), strict=True)
    return np.array(texts), np.array(labels)


class Positions(layers.Layer):
    """Adds what is learned of each place in a sequence."""

    def build(self, shape: tuple) -> None:
        self.table = self.add_weight(shape[1:], "random_normal", name="table")

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return inputs + self.table


def build_lstm(letters: int) -> keras.Model:
    """Three LSTM layers."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    h = layers.Embedding(letters, WIDTH, name="embedding")(inputs)
    for place in (1, 2, 3):
        h = layers.LSTM(2 * WIDTH, return_sequences=True, name=f"lstm{place}")(h)
    h = layers.GlobalAveragePooling1D(name="pool")(h)
    return keras.Model(inputs, layers.Dense(len(LANGUAGES), "softmax", name="head")(h))


def build_transformer(letters: int) -> keras.Model:
    """Four blocks of self-attention and a feed-forward network, each with normalisation before."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    h = layers.Embedding(letters, WIDTH, name="embedding")(inputs)
    h = Positions(name="positions")(h)
    for place in (1, 2, 3, 4):
        normed = layers.LayerNormalization()(h)
        attended = layers.MultiHeadAttention(4, WIDTH // 4, name=f"attention{place}")(
            normed, normed
        )
        h = layers.Add(name=f"attended{place}")([h, attended])
        wide = layers.Dense(4 * WIDTH, "gelu")(layers.LayerNormalization()(h))
        h = layers.Add(name=f"block{place}")([h, layers.Dense(WIDTH)(wide)])
    h = layers.GlobalAveragePooling1D(name="pool")(layers.LayerNormalization(name="norm")(h))
    return keras.Model(inputs, layers.Dense(len(LANGUAGES), "softmax", name="head")(h))


# What makes the model, and what to probe.
MODELS = {
    "lstm": (build_lstm, ["embedding", "lstm*", "head"]),
    "transformer": (build_transformer, ["embedding", "positions", "attended*", "block*", "norm",
                                        "head"]),
}  # fmt: skip


def main() -> None:
    """Prints errors and findings, and writes figure and report."""
    parser = options(
        __doc__, "sequences_out", epochs=8, quick="1,000 names, one epoch", images=False
    )
    parser.add_argument("--model", choices=MODELS, default="lstm")
    args = parser.parse_args()
    keras.utils.set_random_seed(args.seed)
    texts, labels = names(args.seed)
    limit, epochs = (1000, 1) if args.quick else (len(texts), args.epochs)
    texts, labels = texts[:limit], labels[:limit]

    letters = layers.TextVectorization(
        standardize="lower", split="character", output_sequence_length=LENGTH
    )
    held_out = limit // 5
    letters.adapt(texts[held_out:])
    x = letters(texts).numpy()
    train, test = (x[held_out:], labels[held_out:]), (x[:held_out], labels[:held_out])

    make, where = MODELS[args.model]
    model = make(letters.vocabulary_size())
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    probes = LinearProbeCallback(where, reduce="gap", log_dir=args.out / "logs", seed=args.seed)
    model.fit(
        *train, batch_size=64, epochs=epochs, validation_data=test, callbacks=[probes], verbose=2
    )

    write(probes.results, args.out)


if __name__ == "__main__":
    main()
