"""What probes cost: a training step, the end of an epoch, the first step, memory.

    python benchmarks/overhead.py step --host resnet50 --reduce gap
    python benchmarks/overhead.py step --host mlp --probes 4 --batch 16
    python benchmarks/overhead.py first --host convnet
    python benchmarks/overhead.py memory --host resnet50 --reduce random
    python benchmarks/overhead.py import

`step`: in one process, variants take turns, an epoch each, so that a machine whose speed drifts
slows all alike; the time of a step and its ratio to the bare host's of the same round. With many
classes probes take part in some steps only: it is the median over stretches of batches that have
one of these. `kept` are steps whose batch goes into the sample, in all others `refit` is 0; `refit`
is what the end of such an epoch takes, in steps of the bare host. `first` and `memory`: a process
for each variant and round; the first step, with all that is traced and compiled for it, alone and
from the call of `fit`, in which the taps are found, and the most memory the process had in an epoch
of early steps and one of late ones.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from by_hand import ByHand
from hosts import HOSTS
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from keras_probes import GlobalAverage, LinearProbeCallback, RandomFeatures
from keras_probes.taps.graph import input_spec_of, trace
from keras_probes.taps.select import select

# How often a probe's parameters are moved in a step: Adam reads four arrays and writes three, the
# gradient is written, two products read weights, penalty and average read two and write one each.
PASSES = 16


VARIANTS = ("bare", "shared", "isolated", "kept", "by hand")
REDUCTIONS = {"gap": GlobalAverage, "random": lambda: RandomFeatures(seed=0)}


class Clock(keras.callbacks.Callback):
    """Seconds of the first step, of a later one, and from the last to the epoch's end."""

    def __init__(self, stretch):
        super().__init__()
        self.stretch = stretch

    def start(self):
        self.called = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        self.ends = [time.perf_counter()]
        self.began = None

    def on_train_batch_begin(self, batch, logs=None):
        self.began = self.began or time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.ends.append(time.perf_counter())

    def on_epoch_end(self, epoch, logs=None):
        between = np.diff(self.ends)
        whole = [
            between[start : start + self.stretch]
            for start in range(1, len(between) + 1 - self.stretch, self.stretch)
        ]
        self.first, self.fit = self.ends[1] - self.began, self.ends[1] - self.called
        self.step = statistics.median(map(statistics.fmean, whole or [between[1:]]))
        self.refit = time.perf_counter() - self.ends[-1]


class Variant:
    """A host with its data, and probes of one kind or none; `run` trains it for an epoch."""

    def __init__(self, name, args):
        keras.utils.set_random_seed(0)
        make, layers, batch = HOSTS[args.host]
        self.host = make(classes=args.classes) if args.classes else make()
        self.batch = args.batch or batch
        self.host.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        rows, self.classes = args.steps * self.batch, self.host.output_shape[-1]
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(rows, *self.host.input_shape[1:])).astype("float32")
        self.y = rng.integers(0, self.classes, rows)
        graph = trace(self.host, input_spec_of(self.host))
        taps = [tap.name for tap in select(graph, layers).taps]
        places = np.linspace(0, len(taps) - 1, args.probes or len(taps)).round().astype(int)
        self.taps = [taps[place] for place in places]
        self.clock = Clock(args.every)
        self.probes = None if name == "bare" else self._probes(name, args.reduce, args.every)

    def _probes(self, name, reduce, every):
        if name == "by hand":
            tensors = {
                tap: REDUCTIONS[reduce]()(
                    self.host.inputs[0] if tap == "input" else self.host.get_layer(tap).output
                )
                for tap in self.taps
            }
            by_hand = ByHand(tensors, self.host.inputs, self.classes)
            by_hand.batches(self.x, self.y, self.batch)
            return by_hand
        mode = "isolated" if name == "isolated" else "shared"
        return LinearProbeCallback(
            self.taps, reduce=REDUCTIONS[reduce](), mode=mode, refit=0.25 if name == "kept" else 0,
            every=every,
        )  # fmt: skip

    def run(self):
        callbacks = [callback for callback in (self.probes, self.clock) if callback is not None]
        self.clock.start()
        self.host.fit(
            self.x, self.y, batch_size=self.batch, shuffle=False, callbacks=callbacks, verbose=0
        )
        return self.clock


def in_turns(args):
    """Prints the time of a step and of an epoch's end."""
    variants = {name: Variant(name, args) for name in args.variants}
    clocks = {name: [] for name in variants}
    for turn in range(args.rounds + 1):
        for name, one in variants.items():
            clock = one.run()
            if turn > 0:  # before that, it is compiled
                clocks[name].append((clock.step, clock.refit))
    for name, seconds in clocks.items():
        pairs = list(zip(seconds, clocks["bare"], strict=True))
        ratios = [step / bare for (step, _), (bare, _) in pairs]
        refit = statistics.median(end / bare for (_, end), (bare, _) in pairs)
        print(
            f"{name:9} {1000 * statistics.median(step for step, _ in seconds):8.1f} ms a step, "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            + (f"; refit {refit:.1f} steps" if name == "kept" else "")
        )


def apart(args):
    """Prints the time of the first step, or the most memory a process took."""
    figures = {name: [] for name in args.variants}
    for _ in range(args.rounds):
        for name in figures:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures[name].append(json.loads(printed.splitlines()[-1]))
    for name, values in figures.items():
        for what in values[0]:
            mine, bare = ([one[what] for one in figures[of]] for of in (name, "bare"))
            ratios = [value / least for value, least in zip(mine, bare, strict=True)]
            more = statistics.median(mine) - statistics.median(bare)
            print(
                f"{name:9} {what}: {statistics.median(mine):.1f}, {more:+.1f}, ratio "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )


def imports(args):
    """Prints what importing the package takes beyond Keras."""
    seconds = {"keras": [], "keras_probes": []}
    for _ in range(args.rounds):
        for name, taken in seconds.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", f"import {name}"], check=True, capture_output=True
            )
            taken.append(time.perf_counter() - start)
    beyond = [ours - bare for bare, ours in zip(*seconds.values(), strict=True)]
    print(
        f"import keras {statistics.median(seconds['keras']):.2f} s, keras_probes "
        f"{statistics.median(beyond):+.2f} s ({min(beyond):+.2f} to {max(beyond):+.2f})"
    )


def child(args):
    one = Variant(args.child, args)
    clock = one.run()
    figures = {"first step, s": clock.first, "from the call of fit, s": clock.fit}
    if args.what == "memory":
        one.run()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        figures = {"most memory, MiB": most / 1024}
    print(json.dumps(figures))


def limits(args):
    """Prints what the probes need at the least, beside the host."""
    one = Variant("shared", args)
    one.run()
    flops, moved = work_of(one.host, one.batch)
    sizes = one.probes._online.sizes()
    parameters = sum(count for count, _ in sizes.values())
    memory = sum(size for _, size in sizes.values())
    print(
        f"{args.host}, {len(one.taps)} probes, {args.reduce}, batch {one.batch}: "
        f"host {flops / 1e9:.2f} GFLOP a step and {moved / 2**20:.0f} MiB, a third of it its "
        f"forward pass, which isolated probes have too; probes "
        f"{6 * one.batch * parameters / 1e9:.2f} GFLOP and {4 * PASSES * parameters / 2**20:.0f} "
        f"MiB, {memory / 2**20:.0f} MiB held, {4 * parameters / 2**20:.0f} of it gradients"
    )


def work_of(host, batch):
    """FLOPs and bytes of a step: three times those of a forward pass.

    Of the bytes, those of weights and of what layers pass on, written once and read once.
    """
    function = tf.function(lambda x: host(x, training=False))
    concrete = function.get_concrete_function(tf.TensorSpec((batch, *host.input_shape[1:])))
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    graph = convert_variables_to_constants_v2(concrete).graph
    flops = tf.compat.v1.profiler.profile(graph, options=options).total_float_ops
    outputs = [layer.output for layer in host.layers]
    floats = 2 * sum(batch * math.prod(each.shape[1:]) for each in outputs) + host.count_params()
    return 3 * flops, 3 * 4 * floats


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "first", "memory", "import"])
    parser.add_argument("--host", choices=HOSTS, default="convnet")
    parser.add_argument("--reduce", default="random", choices=REDUCTIONS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--probes", type=int, help="how many of the host's taps; all by default")
    parser.add_argument("--batch", type=int, help="batch size")
    parser.add_argument("--classes", type=int, help="instead of 1,000, of ResNet-50 and Inception")
    parser.add_argument("--steps", type=int, default=40, help="steps an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--every", type=int, default=1, help="probes take part in every k-th step")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    if args.what == "import":
        imports(args)
        return
    # First, since on Linux a process begins with the most memory that its parent had.
    (in_turns if args.what == "step" else apart)(args)
    limits(args)


if __name__ == "__main__":
    main()
