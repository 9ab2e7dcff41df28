"""Several replicas: as one device on the same global batch; other strategies are refused."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from hosts import compiled, dense_net

from keras_probes import LinearProbeCallback

pytestmark = pytest.mark.slow  # CI runs these; each trains several hosts

TESTS = pathlib.Path(__file__).parents[1]

# Logical devices are made before TensorFlow begins, and it serves one size of group a process.
SCRIPT = """
import json, sys
import keras, numpy as np, tensorflow as tf
from sklearn.datasets import load_digits

replicas = int(sys.argv[1])
devices = [tf.config.LogicalDeviceConfiguration()] * replicas
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
from hosts import compiled
from keras_probes import LinearProbeCallback
from keras_probes.probes import probe_set
from keras_probes.probes.tasks import Task

refit, given = probe_set.refit, []


def listening(*arguments, **options):
    arrays = [of for of in arguments if not isinstance(of, Task)]
    given.append([np.asarray(argument).tolist() for argument in arrays])
    return refit(*arguments, **options)


probe_set.refit = listening
bunch = load_digits()
x, y = bunch.images[..., None].astype("float32") / 16, bunch.target


def host():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    h = keras.layers.Flatten(name="flat")(inputs)
    h = keras.layers.Dense(16, activation="relu", name="hidden")(h)
    h = keras.layers.BatchNormalization(name="norm", synchronized=True)(h)
    return compiled(keras.Model(inputs, keras.layers.Dense(10, "softmax", name="out")(h)))


def run(strategy, mode):
    keras.utils.clear_session()
    with strategy.scope():
        model = host()
    reduce = {"hidden": "flatten"}
    taps = ["input", "hidden", "norm"]
    isolated = "isolated" if mode == "isolated" else "shared"
    share = 0 if mode == "shared" else 0.25
    probes = LinearProbeCallback(taps, reduce=reduce, mode=isolated, refit=share)
    given.clear()
    history = model.fit(
        x[:200], y[:200], batch_size=32, epochs=2, shuffle=False, verbose=0,
        validation_data=(x[200:270], y[200:270]), callbacks=[probes] if mode else [],
    ).history
    found = {"history": history, "host": [w.tolist() for w in model.get_weights()]}
    found["given"] = given[:]
    if mode:
        found["tested"] = model.evaluate(
            x[200:270], y[200:270], verbose=0, callbacks=[probes], return_dict=True
        )
        found["probes"] = [w.tolist() for tap in history_taps(history) for w in probes.weights(tap)]
        variables = [v for layer in probes.probe_model.layers for v in layer.variables]
        values = [getattr(v.value, "values", [v.value]) for v in variables]
        found["apart"] = max(
            float(np.abs(np.asarray(copy, "float64") - np.asarray(copies[0], "float64")).max())
            for copies in values for copy in copies
        )
        found["copies"] = max(len(copies) for copies in values)
    return found


def history_taps(history):
    return [key.removeprefix("probe_error/") for key in history if key.startswith("probe_error/")]


def asked(strategy, task):
    # Errors of probes of other tasks, and how those of two layers go together.
    keras.utils.clear_session()
    rng = np.random.default_rng(0)
    z = rng.normal(size=(270, 4, 3)).astype("float32")
    labels = {
        "multilabel": (z.sum(axis=1) > [0.0, 1.0, -1.0]).astype("float32"),
        "regression": 100 + 10 * z.sum(axis=(1, 2)),
        "positions": (z[..., 0] > 0).astype("int32"),
    }[task]
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4, 3))
        h = keras.layers.Dense(8, "relu", name="hidden")(inputs)
        if task != "positions":
            h = keras.layers.GlobalAveragePooling1D(name="pool")(h)
        model = keras.Model(inputs, keras.layers.Dense(1, name="out")(h))
        model.compile("sgd", loss=lambda y, u: keras.ops.mean(u))
    taps = ["input", "hidden"]
    options = {} if task != "positions" else {"num_classes": 2}
    probes = LinearProbeCallback(taps, reduce="auto", task=task, **options)
    model.fit(
        z[:200], labels[:200], batch_size=40, epochs=2, shuffle=False, verbose=0,
        validation_data=(z[200:], labels[200:]), callbacks=[probes],
    )
    found = probes.results.compare(*taps)
    return [*probes.results.measured("error")["value"], found.difference, found.n]


mirrored = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
one = tf.distribute.get_strategy()
print(json.dumps({
    "one": run(one, "shared"),
    "one refitted": run(one, "refitted"),
    "refitted": run(mirrored, "refitted"),
    "plain": run(mirrored, None),
    "shared": run(mirrored, "shared"),
    "isolated": run(mirrored, "isolated"),
    "tasks": {t: [asked(s, t) for s in (one, mirrored)]
              for t in ("multilabel", "regression", "positions")},
}))
"""


@pytest.mark.parametrize("replicas", [2, pytest.param(4, marks=pytest.mark.weekly)])
def test_replicas_agree_with_one_device(replicas):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(replicas)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    one, plain = found["one"], found["plain"]
    for mode in ("shared", "isolated", "refitted"):
        ours = found[mode]
        assert ours["copies"] == replicas
        assert ours["apart"] == 0.0
        for got, expected in zip(ours["host"], plain["host"], strict=True):
            if mode == "isolated":
                np.testing.assert_array_equal(got, expected)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    shared = found["shared"]
    assert shared["history"].keys() == one["history"].keys()
    for key, values in one["history"].items():
        if "probe" not in key:
            continue  # of the host's own measures, Keras 3.8 reports those of one replica
        # A label more or less: rounding may tip an example that lies on a border.
        tolerance = 1.5 / 70 if "error" in key else 1e-3
        np.testing.assert_allclose(shared["history"][key], values, atol=tolerance, err_msg=key)
    for got, expected in zip(shared["probes"], one["probes"], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-3)
    # What is refitted first is the same, probes and examples. What comes of it need not be: where
    # rounding has the solver stop an iteration earlier, weights differ within its certificate.
    refitted, alone = found["refitted"]["given"], found["one refitted"]["given"]
    assert len(refitted) == len(alone) == 2  # all taps at a time, in two epochs
    for arguments, expected in zip(refitted[:1], alone[:1], strict=True):
        for got, argument in zip(arguments, expected, strict=True):
            np.testing.assert_allclose(got, argument, rtol=1e-2, atol=1e-3)
    last = {k.removeprefix("val_"): v[-1] for k, v in shared["history"].items() if "val_" in k}
    assert shared["tested"] == pytest.approx(last)
    for task, (alone, together) in found["tasks"].items():
        np.testing.assert_allclose(together, alone, atol=0.02, err_msg=task)
        assert together[-1] == 70


def test_strategies_that_keras_does_not_support_are_refused(digits):
    (x, y), _ = digits
    with tf.distribute.experimental.CentralStorageStrategy(["CPU:0"]).scope():
        model = compiled(dense_net())
    with pytest.raises(ValueError, match="MirroredStrategy or.*CentralStorageStrategy"):
        model.fit(x, y, callbacks=[LinearProbeCallback()], verbose=0)


@pytest.mark.parametrize(
    "strategy",
    [tf.distribute.OneDeviceStrategy, lambda device: tf.distribute.MirroredStrategy([device])],
)
def test_a_strategy_of_one_device(digits, strategy):
    (x, y), validation = digits

    def errors():
        model = compiled(dense_net())
        probes = LinearProbeCallback("dense")
        history = model.fit(
            x, y, epochs=2, validation_data=validation, callbacks=[probes], verbose=0
        ).history
        return {key: values for key, values in history.items() if "probe_error" in key}

    expected = errors()
    with strategy("CPU:0").scope():
        got = errors()
    assert got.keys() == expected.keys()
    assert got["probe_error/dense"][0] < 0.9
    for key, values in expected.items():
        assert values[-1] < 0.9
        # A label more or less: rounding may tip an example that lies on a border.
        np.testing.assert_allclose(got[key], values, atol=3 / len(x), err_msg=key)
