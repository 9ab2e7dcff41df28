"""Other labels than classes, offline."""

import keras
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from keras_probes import extract_features, fit_probes


def stored(path, y, outputs, loss, activation=None, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((6,)),
        keras.layers.Dense(8, "relu", name="hidden"),
        keras.layers.Dense(outputs, activation, name="out"),
    ])  # fmt: skip
    model.compile("adam", loss)
    x = np.random.default_rng(0).normal(size=(len(y), 6)).astype("float32")
    return x, extract_features(model, (x, y), path, layers=["input"], verbose=False, **options)


def numbers(n=400):
    x = np.random.default_rng(0).normal(size=(n, 6))
    return 30 + 5 * x @ np.arange(6) + np.random.default_rng(1).normal(size=n)


def test_numbers_are_ridge_regression_in_their_own_units(tmp_path):
    y = numbers()
    x, store = stored(tmp_path / "s", y, 1, "mse")
    results = fit_probes(store, validation=None, test=None, l2=1e-3, verbose=False)
    probe = results.probes[None, "input"]
    # The penalty is on standardised features and labels: on the latter it scales with them.
    spread = x.std(axis=0)
    ridge = Ridge(alpha=1e-3 * len(x)).fit((x - x.mean(axis=0)) / spread, y)
    np.testing.assert_allclose(probe.kernel[:, 0], ridge.coef_ / spread, rtol=2e-2)
    error = results.measured("error")["value"]["input"]
    assert error == pytest.approx(1 - ridge.score((x - x.mean(axis=0)) / spread, y), abs=1e-4)
    answers = results.probe("input")(x).numpy()[:, 0]
    assert results.measured("mse")["value"]["input"] == pytest.approx(np.mean((y - answers) ** 2))
    assert results.measured("error")["certificate"]["input"] < 1e-10


def test_a_rare_label_is_a_warning(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (60, 3))
    y[:, 1] = 0
    y[7, 1] = 1
    _, store = stored(tmp_path / "s", y, 3, "binary_crossentropy", "sigmoid")
    with pytest.warns(UserWarning, match="no 1 in columns 1 of 3"):
        [fit_probes(store, validation=0.5, l2=1e-2, seed=s, verbose=False) for s in range(3)]


def test_names_of_classes_may_be_names_of_labels(tmp_path):
    y = np.random.default_rng(0).integers(0, 2, (60, 3))
    names = ["cat", "dog", "eel"]
    _, store = stored(tmp_path / "s", y, 3, "binary_crossentropy", "sigmoid", class_names=names)
    assert store.targets[None].name == "multilabel"
    frame = fit_probes(store, l2=1e-2, verbose=False).per_class("input")
    assert list(frame.index) == names
