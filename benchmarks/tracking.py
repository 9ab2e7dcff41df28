"""How far online probes are from the optimum of the layer they look at, while the host trains.

    python benchmarks/tracking.py mnist --data mnist.npz --reduce random
    python benchmarks/tracking.py cifar --data cifar10.npz --reduce gap --mode isolated
    python benchmarks/tracking.py characters --data characters.npz --reduce gap --no-by-hand

At the end of every epoch the host stands still: its features of the training rows are extracted and
each tap's optimal probe is fitted (`fit_probes`, the penalty by a validation split). The gap is the
error of the online probe minus that of the optimal one, on the same held-out images, in percentage
points; Kendall's tau tells how far layers have the same order by both. Beside ours, in the same
run, what people write by hand: Dense heads under Adam(1e-3) on a second forward pass, with and
without BatchNormalization before them. The file has `x_train` and `y_train` (and `x_test`,
`y_test`), images of 0..255.
"""

import argparse
import tempfile

import keras
import numpy as np
import pandas as pd
from by_hand import ByHand
from hosts import convnet, images, resnet

from keras_probes import (
    GlobalAverage,
    LinearProbeCallback,
    RandomFeatures,
    extract_features,
    fit_probes,
)

VALIDATION, TEST, BATCH = 1000, 2000, 64


CUTS = ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "fc1", "relu3", "fc2"]
STEM = ["stem_conv", "stem_norm", "stem"]
BLOCKS = [f"block{block}{end}" for block in range(1, 5) for end in ("_add", "")]
HOSTS = {
    "mnist": (convnet, 5, ["input", *CUTS]),
    "cifar": (resnet, 10, ["input", *STEM, *BLOCKS, "pool", "logits"]),
    "characters": (resnet, 5, [*BLOCKS[1::2], "pool"]),
}


def optimal_results(host, splits, reduce):
    """Results of each tap's optimal probe, with the host as it is."""
    with tempfile.TemporaryDirectory() as directory:
        train, validation, test = (
            extract_features(
                host, data, f"{directory}/{split}", layers=list(reduce), reduce=reduce,
                batch_size=200, verbose=False,
            )
            for split, data in splits.items()
        )  # fmt: skip
        # Nearer than any error on 2,000 images can show.
        return fit_probes(train, validation=validation, test=test, tol=1e-4, verbose=False)


def track(host, splits, probes, reduce, epochs, with_by_hand):
    """A row for each epoch, kind of probe and tap: the optimal error and the gap, in points.

    Of ours, `tau` is how far the order of layers is that by the optimal errors of the epoch.
    """
    tensors = {
        tap: reduction(host.inputs[0] if tap == "input" else host.get_layer(tap).output)
        for tap, reduction in reduce.items()
    }
    by_hand = {
        name: ByHand(tensors, host.inputs, host.output_shape[-1], normalize)
        for name, normalize in (("Dense", False), ("BatchNormalization, Dense", True))
        if with_by_hand
    }
    rows = []
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(splits["train"][0]))
        batches = tuple(part[order] for part in splits["train"])
        for one in by_hand.values():
            one.batches(*batches, BATCH)
        logs = host.fit(
            *batches, batch_size=BATCH, shuffle=False, validation_data=splits["test"], verbose=0,
            initial_epoch=epoch, epochs=epoch + 1, callbacks=[probes, *by_hand.values()],
        ).history  # fmt: skip
        errors = {"keras_probes": {tap: logs[f"val_probe_error/{tap}"][-1] for tap in reduce}}
        errors |= {name: one.errors(*splits["test"]) for name, one in by_hand.items()}
        optimal = optimal_results(host, splits, reduce)
        agreement = probes.results.compare_with(optimal)
        best = 100 * optimal.measured()["value"]
        for name, by_tap in errors.items():
            tau = agreement.tau if name == "keras_probes" else np.nan
            for tap, error in by_tap.items():
                rows.append((epoch, name, tap, best[tap], 100 * error - best[tap], tau))
        gap = 100 * agreement.table["difference"].median()
        print(
            f"epoch {epoch + 1}: median gap {gap:.2f} points, tau {agreement.tau:.2f} (95% "
            f"{agreement.ci_low:.2f} to {agreement.ci_high:.2f})", flush=True,
        )  # fmt: skip
    return pd.DataFrame(rows, columns=["epoch", "probes", "tap", "optimal", "gap", "tau"])


def summary(frame):
    """Median, 95th percentile and worst gap of each kind of probe, as the targets ask for them.

    Then the median and the lowest tau of all epochs.
    """
    first, later = frame[frame.epoch == 0], frame[frame.epoch > 0]
    by_kind, tau = later.groupby("probes").gap, frame.groupby("probes").tau
    return pd.DataFrame(
        {
            "first epoch, median": first.groupby("probes").gap.median(),
            "later, median": by_kind.median(),
            "later, 95%": by_kind.quantile(0.95),
            "later, worst": by_kind.max(),
            "tau, median": tau.median(),
            "tau, lowest": tau.min(),
        }
    )


def plot(frame, path):
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(frame.probes))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(4.5 * len(kinds), 3.6), sharey=True, layout="constrained"
    )
    for kind, ax in zip(kinds, np.atleast_1d(axes), strict=True):
        table = frame[frame.probes == kind].pivot(index="epoch", columns="tap", values="gap")
        table = table[list(dict.fromkeys(frame.tap))]
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, table.shape[1]))
        for color, tap in zip(colors, table, strict=True):
            ax.plot(table.index + 1, table[tap], color=color, label=tap)
        ax.set(title=kind, xlabel="epoch")
        ax.axhline(0, color="0.5", linewidth=0.8)
    np.atleast_1d(axes)[0].set_ylabel("error above the optimum, points")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("--data", required=True)
    parser.add_argument("--reduce", choices=["random", "gap"], default="random")
    parser.add_argument("--mode", choices=["shared", "isolated"], default="shared")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--limit", type=int, help="number of images to use, of all three splits")
    parser.add_argument("--refit", type=float, default=0.1, help="as of LinearProbeCallback")
    parser.add_argument("--no-by-hand", action="store_true", help="ours alone")
    parser.add_argument("--figure", help="where to save a plot of the gaps")
    args = parser.parse_args()

    keras.utils.set_random_seed(0)
    x, y = images(args.data, args.limit)
    held_out = min(VALIDATION + TEST, len(x) // 3)
    ends = np.cumsum([len(x) - held_out, held_out // 3])
    parts = zip(np.split(x, ends), np.split(y, ends), strict=True)
    splits = dict(zip(("train", "validation", "test"), parts, strict=True))
    make, epochs, taps = HOSTS[args.host]
    host = make(x.shape[1:], int(y.max()) + 1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    host.compile(keras.optimizers.Adam(1e-3), loss)
    # With a seed of its own, a layer takes the same subset wherever it is used.
    reduce = {
        tap: GlobalAverage() if args.reduce == "gap" else RandomFeatures(seed=0) for tap in taps
    }
    probes = LinearProbeCallback(list(reduce), reduce=reduce, mode=args.mode, refit=args.refit)
    frame = track(host, splits, probes, reduce, args.epochs or epochs, not args.no_by_hand)

    n = [record.examples for record in probes.results.refits]
    print(f"refitted on {n[-1]:,} of {len(splits['train'][0]):,} examples")
    print(f"{args.host}, {args.reduce}, {args.mode}: error above the optimum, points, by epoch")
    for kind, of_kind in frame.groupby("probes", sort=False):
        table = of_kind.pivot(index="tap", columns="epoch", values="gap").loc[taps]
        table = table.rename(columns=lambda epoch: epoch + 1)
        print(f"{kind}\n{table.to_string(float_format='{:.2f}'.format)}")
    print(summary(frame).to_string(float_format="{:.2f}".format, na_rep=""))
    if args.figure:
        plot(frame, args.figure)


if __name__ == "__main__":
    main()
