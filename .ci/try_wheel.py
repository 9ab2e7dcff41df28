"""Imports the installed wheel and runs it once, with nothing but its required packages."""

import pathlib

import keras
import numpy as np

import keras_probes

assert "site-packages" in str(pathlib.Path(keras_probes.__file__)), keras_probes.__file__

rng = np.random.default_rng(0)
x, y = rng.normal(size=(64, 5)).astype("float32"), rng.integers(0, 3, 64)
model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, activation="softmax")])
model.compile("adam", "sparse_categorical_crossentropy")
probes = keras_probes.LinearProbeCallback()
history = model.fit(x, y, callbacks=[probes], verbose=0).history
assert "probe_error/input" in history
print(probes.results)
