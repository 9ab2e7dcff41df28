"""How long settling a probe takes, by the number of classes.

    python benchmarks/settling.py
    python benchmarks/settling.py --sizes 10:1000 100:1000

On as many made examples as a probe of that size is settled on at most: overlapping normal classes.
It begins where as many others have left it. Also: how far it then may be from its optimum, in nats.
"""

import argparse
import time

import numpy as np
import tensorflow as tf
from keras_probes.probes.settle import most_examples, settle

SIZES = ((10, 1000), (100, 256), (100, 1000), (190, 1000), (390, 64), (1000, 64))


def made(n, classes, features, seed):
    centres = 3 / np.sqrt(features) * np.random.default_rng(0).normal(size=(classes, features))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    z = centres[labels] + rng.normal(size=(n, features))
    return tf.constant(z / z.std(axis=0), tf.float32), labels


def settled(z, labels, kernel, bias):
    return settle(z, labels, np.ones(len(z), "float32"), kernel, bias, of=len(z))


def size(text):
    classes, features = map(int, text.split(":"))
    return classes, features


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=size, default=SIZES, metavar="CLASSES:FEATURES")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for classes, features in args.sizes:
        n, seconds = most_examples(features, classes), []
        if n == 0:
            print(f"{classes:5} classes, {features:5} features: not settled")
            continue
        zeros = np.zeros((features, classes)), np.zeros(classes)
        before = settled(*made(n, classes, features, seed=1), *zeros)  # this also compiles
        z, labels = made(n, classes, features, seed=2)
        for _ in range(args.rounds):
            start = time.perf_counter()
            found = settled(z, labels, before.kernel, before.bias)
            seconds.append(time.perf_counter() - start)
        error = np.mean(np.argmax(z.numpy() @ found.kernel + found.bias, axis=1) != labels)
        print(
            f"{classes:5} classes, {features:5} features: {n:6} examples, "
            f"{np.median(seconds):5.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), at most "
            f"{found.after:.4f} nats above the optimum, error on them {error:.2f}"
        )


if __name__ == "__main__":
    main()
