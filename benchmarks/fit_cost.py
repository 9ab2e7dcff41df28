"""What probes cost a user: CPU seconds of the whole `fit`, with the callback against without it.

    python benchmarks/fit_cost.py convnet --data mnist.npz --variants random gap isolated
    python benchmarks/fit_cost.py resnet50 --classes 1000 --variants auto
    python benchmarks/fit_cost.py resnet --data characters.npz --classes 1000 --images 20000
    python benchmarks/fit_cost.py convnet --data mnist.npz --variants random --jit

In one process and in turns, a fit without the callback before each variant's: a new host each time,
so that everything counts that is traced and compiled. CPU seconds are those of all threads. The
ratio is that of the two fits of a round; its median over rounds is what to quote. Without `--data`
images are noise, which costs the same.
"""

import argparse
import statistics
import time

import keras
import numpy as np
from hosts import HOSTS, images

from keras_probes import LinearProbeCallback

LABELLED = 1000
VARIANTS = {
    "auto": {},
    "random": {"reduce": "random"},
    "gap": {"reduce": "gap"},
    "isolated": {"mode": "isolated"},
    "online": {"refit": 0},
    "every10": {"every": 10},
    "own": {"data": LABELLED},  # of the training images, in the place of what is elsewhere
}


def data_for(args, shape, classes):
    """Training and validation data: of the file, or made."""
    if args.data:
        x, y = images(args.data, args.images + args.validation)
    else:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(args.images + args.validation, *shape)).astype("float32")
        y = rng.integers(0, classes, len(x))
    return (x[: args.images], y[: args.images]), (x[args.images :], y[args.images :])


def cpu_seconds(args, variant):
    """CPU seconds of one fit, and the callback if it had one."""
    keras.utils.set_random_seed(0)
    make, layers, batch = HOSTS[args.host]
    options = {"classes": args.classes} if args.classes else {}
    if args.data:
        options["shape"] = images(args.data, 1)[0].shape[1:]
    host = make(**options)
    train, validation = data_for(args, host.input_shape[1:], host.output_shape[-1])
    host.compile(
        keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=args.jit,
    )  # fmt: skip
    probes = None
    if variant is not None:
        options = {**VARIANTS[variant], **({} if args.refit is None else {"refit": args.refit})}
        if "data" in options:
            some = options.pop("data")
            own = tuple(part[:some] for part in train)
            options |= {"data": own, "validation_data": validation}
        probes = LinearProbeCallback(layers, **options)
    start = time.process_time()
    host.fit(
        *train, batch_size=args.batch or batch, epochs=args.epochs,
        validation_data=validation if args.validation else None, verbose=0,
        callbacks=[probes] if probes else [],
    )  # fmt: skip
    return time.process_time() - start, probes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("--data", help="an .npz with x_train and y_train, images of 0..255")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["auto"])
    parser.add_argument("--classes", type=int, help="of the host")
    parser.add_argument("--images", type=int, default=8000, help="number to train on")
    parser.add_argument("--validation", type=int, default=2000, help="number to validate on")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jit", action="store_true", help="compile the host with XLA")
    parser.add_argument("--refit", type=float, help="share of an epoch; the default's by default")
    args = parser.parse_args()
    keras.utils.disable_interactive_logging()
    seconds = {variant: [] for variant in args.variants}
    for _ in range(args.rounds):
        for variant, pairs in seconds.items():
            bare, _ = cpu_seconds(args, None)
            with_probes, probes = cpu_seconds(args, variant)
            pairs.append((bare, with_probes))
            last = probes.results.refits[-1]
            converged = probes.results.frame()["certificate"].dropna() <= 1e-2
            print(
                f"{variant}: {with_probes:.1f} s for {bare:.1f} s; the last refit on "
                f"{last.examples:,} examples in {last.seconds:.1f} s; certificates of 0.01 nats or "
                f"less: {np.mean(converged):.0%}",
                flush=True,
            )
    for variant, pairs in seconds.items():
        ratios = [with_probes / bare for bare, with_probes in pairs]
        print(
            f"{args.host}, {variant}: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) times the {len(ratios)} fits without, of "
            f"{statistics.median(bare for bare, _ in pairs):.1f} CPU seconds"
        )


if __name__ == "__main__":
    main()
