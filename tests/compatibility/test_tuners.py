"""Searches and loops that make a new model again and again: KerasTuner, cross-validation."""

import json
import subprocess
import sys

import keras
import keras_tuner
import numpy as np
import pytest
from hosts import compiled

from keras_probes import LinearProbeCallback

pytestmark = pytest.mark.slow  # CI runs these; each trains several hosts


def build(hp):
    keras.utils.set_random_seed(hp.Int("seed", 0, 20))
    return compiled(
        keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                keras.layers.Flatten(),
                keras.layers.Dense(hp.Choice("units", [4, 24]), activation="relu", name="fc1"),
                keras.layers.Dense(10, activation="softmax", name="out"),
            ]
        ),
        jit_compile=False,
    )


@pytest.mark.parametrize("own", [False, True], ids=["riding", "own data"])
def test_a_search_for_the_best_probe(digits, tmp_path, own):
    (x, y), validation = digits
    data = {"data": (x, y), "validation_data": validation} if own else {}
    probes = LinearProbeCallback("fc1", **data)
    seen = []

    class Look(keras.callbacks.Callback):
        def __deepcopy__(self, memo):
            return self

        def on_epoch_end(self, epoch, logs=None):
            seen.append(logs["val_probe_error/fc1"])

    tuner = keras_tuner.RandomSearch(
        build, keras_tuner.Objective("val_probe_error/fc1", "min"), max_trials=3, seed=1,
        directory=tmp_path, project_name="search", overwrite=True,
    )  # fmt: skip
    tuner.search(x, y, validation_data=validation, epochs=2, verbose=0, callbacks=[probes, Look()])
    assert len(seen) == 6
    best = tuner.oracle.get_best_trials(3)
    assert [trial.score for trial in best] == sorted(min(seen[k : k + 2]) for k in (0, 2, 4))
    assert not probes.results.rows  # each trial had a copy


def test_cross_validation(digits):
    (x, y), _ = digits
    errors = []
    for fold in range(3):
        held = np.arange(len(x)) % 3 == fold
        probes = LinearProbeCallback(
            "fc1", data=(x[~held], y[~held]), validation_data=(x[held], y[held])
        )
        model = compiled(
            keras.Sequential(
                [
                    keras.Input((8, 8, 1)),
                    keras.layers.Flatten(),
                    keras.layers.Dense(16, activation="relu", name="fc1"),
                    keras.layers.Dense(10, activation="softmax", name="out"),
                ]
            )
        )
        model.fit(x[~held], y[~held], epochs=2, verbose=0, callbacks=[probes])
        rows = probes.results.measured()
        assert rows["n"].iloc[0] == held.sum()
        errors.append(rows["value"].iloc[0])
    assert max(errors) < 0.5


# Memory of a process of its own, by the pages that it holds.
MEMORY = """
import gc, json, sys, weakref
import keras, numpy as np
from keras_probes import LinearProbeCallback

epochs, models, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
x = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
y = (x[:, 0] > 0).astype("int32")
held = []


def hold():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    held.append(pages * 4096 / 2**20)


class Hold(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch % 100 == 99:
            hold()


def run(epochs, callbacks):
    model = keras.Sequential([
        keras.Input((6,)),
        keras.layers.Dense(4, activation="relu", name="hidden"),
        keras.layers.Dense(2, name="out"),
    ])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, jit_compile=False)
    own = {"data": (x, y), "validation_data": (x, y), "every_epochs": 5}
    probes = [LinearProbeCallback("hidden", **own)] if kind == "own" else []
    model.fit(x, y, epochs=epochs, verbose=0, callbacks=[*probes, *callbacks])
    return weakref.ref(model)


if epochs > 1:
    run(epochs, [Hold()])
alive = []
for _ in range(models):
    alive.append(run(1, []))
    hold()
gc.collect()
print(json.dumps({"held": held, "alive": sum(ref() is not None for ref in alive)}))
"""


def memory(*arguments):
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, arguments)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["alive"] == 0
    return found["held"]


def test_memory_does_not_grow():
    """Over 1,000 epochs; and over 20 models no more than TensorFlow itself keeps of each."""
    epochs = memory(1000, 0, "own")
    assert epochs[-1] - epochs[1] < 5.0
    growth = {}
    for kind in ("none", "own"):
        models = memory(1, 20, kind)
        growth[kind] = (models[-1] - models[4]) / 15
    assert growth["own"] < growth["none"] + 0.3
