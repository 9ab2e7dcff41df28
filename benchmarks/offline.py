"""The offline path: extraction, training from the store, and a store larger than memory.

    python benchmarks/offline.py extraction
    python benchmarks/offline.py large --gigabytes 4

`extraction`: ResNet-50 at 224x224, random weights and images, the input and 16 `add` layers under
global averages. Images per second of `extract_features` beside those of a bare forward pass of a
Keras model with the same outputs, in turns; and of the solver's passes over the stored features
beside those of the forward pass, which training through the host could not beat.

`large`: one tap of 1,000 features, fitted within the default memory, and once more with all of it
held in memory; beside them the time to read the store. Each fit runs in a process of its own, for
its peak of memory.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf

from keras_probes import FeatureStore, extract_features, fit_probes
from keras_probes.offline import fit
from keras_probes.probes.tasks import Classification
from keras_probes.taps.reduce import GlobalAverage


def seconds(function, *args, **options):
    start = time.perf_counter()
    function(*args, **options)
    return time.perf_counter() - start


class Passes(fit.Problem):
    """Counts how often the solver reads the rows."""

    made: list = []  # noqa: RUF012

    def __init__(self, *args, **options):
        self.made.append(self)
        super().__init__(*args, **options)


def extraction(args, directory):
    fit.Problem = Passes
    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50(weights=None, input_shape=(224, 224, 3))
    taps = ["input", *(layer.name for layer in model.layers if layer.name.endswith("_add"))]
    tensors = [model.input, *(model.get_layer(name).output for name in taps[1:])]
    rng = np.random.default_rng(0)
    x = rng.random((args.images, 224, 224, 3), "float32")
    y = np.arange(args.images) % 10

    data = tf.data.Dataset.from_tensor_slices(x).batch(32).prefetch(2)
    options = tf.data.Options()
    options.autotune.enabled = False  # as extraction reads arrays: to end the tuner takes seconds
    data = data.with_options(options)

    def forward():  # a new model, as extraction compiles anew as well
        bare = keras.Model(model.inputs, [GlobalAverage()(tensor) for tensor in tensors])
        bare.predict(data, verbose=0)

    def extracted():
        shutil.rmtree(f"{directory}/s", ignore_errors=True)
        extract_features(
            model, (x, y), f"{directory}/s", layers=taps, reduce="gap", num_classes=10,
            batch_size=32, verbose=False,
        )  # fmt: skip

    times = []
    for round_number in range(args.rounds + 1):
        pair = seconds(forward), seconds(extracted)
        times += [pair] if round_number else []  # the first round loads libraries
        print(
            f"  round {round_number}: bare {pair[0]:.1f} s, extraction {pair[1]:.1f} s", flush=True
        )
    forward_s, extracted_s = np.median(times, axis=0)
    ratio = np.median([bare / ours for bare, ours in times])
    print(
        f"{args.images} images: bare forward {args.images / forward_s:.1f} images/s, extraction "
        f"{args.images / extracted_s:.1f} images/s, ratio {ratio:.3f}; of the fastest rounds "
        f"{min(bare for bare, _ in times) / min(ours for _, ours in times):.3f}"
    )

    store = wide_store(FeatureStore(f"{directory}/s"), f"{directory}/wide", args.rows)
    Passes.made.clear()
    took = seconds(fit_probes, store, validation=None, test=None, l2=1e-2, memory=0, verbose=False)
    # A pass of the solver over every tap trains on each image once, at every tap.
    per_tap = np.mean([problem.passes for problem in Passes.made])
    rate = args.rows * per_tap / took
    print(
        f"training from the store, {args.rows} rows: {per_tap:.0f} passes a tap over {len(taps)} "
        f"taps in {took:.1f} s: {rate:,.0f} images/s, {rate * forward_s / args.images:.0f} times "
        "a forward pass"
    )


def wide_store(narrow, path, rows):
    """A store of the same taps with more rows: the same features, again and again, with noise."""
    rng = np.random.default_rng(0)
    again = np.arange(rows) % len(narrow)
    arrays = []
    for tap in narrow.taps:
        h = narrow.features(tap.name)[:][again]
        noise = rng.normal(0, 1, h.shape) * (h.std(axis=0) + 1e-3)
        arrays.append((h + noise).astype("float32"))
    inputs = [keras.Input((h.shape[1],)) for h in arrays]
    output = keras.layers.Dense(10)(keras.layers.Concatenate()(inputs))
    data = tuple(arrays), narrow.labels()[again]
    return extract_features(
        keras.Model(inputs, output), data, path, layers="input*", reduce="flatten",
        num_classes=10, verbose=False,
    )  # fmt: skip


def memory_of_process():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def one_fit(path, memory):
    fit.Problem = Passes
    fit_probes_on_nothing(path)
    before = memory_of_process()
    took = seconds(
        fit_probes, FeatureStore(path), validation=None, test=None, l2=1e-2, memory=memory,
        verbose=False,
    )  # fmt: skip
    passes = sum(problem.passes for problem in Passes.made)
    print(json.dumps({"s": took, "gib": memory_of_process() - before, "passes": passes + 2}))


def fit_probes_on_nothing(path):
    """Loads libraries and compiles, so that neither counts."""
    store = FeatureStore(path)
    z = store.features("input")[:1024]
    block = tf.constant(z[None]), tf.constant(store.labels()[:1024]), tf.ones((1, len(z)))
    fit.minimise(fit.Problem([block], z.shape[1], Classification(10)), 1.0)
    Passes.made.clear()


def large(args, directory):
    rows = int(args.gigabytes * 2**30 / 4000)
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(1000, 10)).astype("float32")

    def batches():
        for _ in range(0, rows, 8192):
            x = rng.normal(size=(8192, 1000)).astype("float32")
            yield x, (x @ kernel / 10 + rng.gumbel(size=(8192, 10))).argmax(axis=1)

    host = keras.Sequential([keras.Input((1000,)), keras.layers.Dense(10)])
    path = f"{directory}/large"
    options = {"layers": "input", "num_classes": 10, "verbose": False}
    took = seconds(extract_features, host, batches(), path, **options)
    store = FeatureStore(path)
    size = len(store) * 4000 / 2**30
    print(f"{len(store):,} rows, {size:.2f} GiB, written in {took:.0f} s", flush=True)

    def read():
        features = store.features("input")
        for start in range(0, len(store), 8192):
            features[start : start + 8192]

    read()
    read_s = np.median([seconds(read) for _ in range(3)])
    runs = {}
    for name, memory in (("in memory", 2**40), ("from disk", 512 * 2**20)):
        command = [sys.executable, __file__, "fit", "--path", path, "--memory", str(memory)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        run = runs[name] = json.loads(output.splitlines()[-1])
        print(
            f"{name}: {run['s']:.0f} s, {run['passes']} passes, {run['gib']:.2f} GiB above the "
            "start", flush=True,
        )  # fmt: skip
    allowed = read_s * runs["from disk"]["passes"] + runs["in memory"]["s"]
    print(
        f"a read takes {read_s:.1f} s ({size / read_s:.1f} GiB/s); from disk over (reads + in "
        f"memory): {runs['from disk']['s'] / allowed:.2f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["extraction", "large", "fit"])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--path")
    parser.add_argument("--memory", type=int)
    args = parser.parse_args()
    if args.what == "fit":
        one_fit(args.path, args.memory)
        return
    with tempfile.TemporaryDirectory() as directory:
        {"extraction": extraction, "large": large}[args.what](args, directory)


if __name__ == "__main__":
    main()
