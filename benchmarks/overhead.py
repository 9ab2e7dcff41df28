"""What probes cost: the time of a training step with and without them, in one process.

Bare host, shared and isolated probes take turns, an epoch each, so that a machine whose speed
drifts slows all alike. Prints medians over the rounds, and the median ratio to the bare host of
the same round. Compilation is left out: each variant trains an epoch before the clock starts.
"""

import argparse
import statistics
import time

import keras
import numpy as np
from hosts import convnet

from keras_probes import LinearProbeCallback


def mnist_convnet() -> tuple[keras.Model, tuple]:
    """The paper's MNIST convnet, batch 64."""
    return convnet(), ((28, 28, 1), 10, 64, {"layers": "auto"})


def resnet50() -> tuple[keras.Model, tuple]:
    """ResNet-50 at 96x96, 1,000 classes, batch 16, 17 taps as in the paper's table 4a."""
    model = keras.applications.ResNet50(
        weights=None, input_shape=(96, 96, 3), classes=1000, classifier_activation=None
    )
    return model, ((96, 96, 3), 1000, 16, {"layers": ["input", "*_add"]})


HOSTS = {"convnet": mnist_convnet, "resnet50": resnet50}


def epoch_seconds(host: str, steps: int, rounds: int, reduce: str) -> dict[str, list[float]]:
    """Seconds a step of each variant, one figure a round."""
    variants = {}
    for variant in ("bare", "shared", "isolated"):
        model, (shape, classes, batch, options) = HOSTS[host]()
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        given = [] if variant == "bare" else [(options, variant)]
        callbacks = [LinearProbeCallback(**o, mode=mode, reduce=reduce) for o, mode in given]
        variants[variant] = (model, callbacks)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * batch, *shape)).astype("float32")
    y = rng.integers(0, classes, steps * batch)
    seconds = {variant: [] for variant in variants}
    for turn in range(rounds + 1):
        for variant, (model, callbacks) in variants.items():
            start = time.perf_counter()
            model.fit(x, y, batch_size=batch, callbacks=callbacks, verbose=0)
            if turn > 0:
                seconds[variant].append((time.perf_counter() - start) / steps)
    return seconds


def main() -> None:
    """Prints one row a variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", choices=HOSTS, default="convnet")
    parser.add_argument("--reduce", default="random", choices=["random", "gap"])
    parser.add_argument("--steps", type=int, default=60, help="steps an epoch")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    seconds = epoch_seconds(args.host, args.steps, args.rounds, args.reduce)
    print(f"{args.host}, reduce={args.reduce}, {args.steps} steps x {args.rounds} rounds")
    for variant, figures in seconds.items():
        ratios = [f / bare for f, bare in zip(figures, seconds["bare"], strict=True)]
        print(
            f"{variant:10} median {1000 * statistics.median(figures):8.1f} ms a step, "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
