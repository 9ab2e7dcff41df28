"""Probes that are settled at the end of each epoch, and `refit`: what it brings, what it says."""

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hosts import compiled
from keras import layers

from keras_probes import LinearProbeCallback, extract_features, fit_probes

TAPS = ["norm", "pool", "dense"]


def host():
    """BatchNormalization, whose moving averages at Keras's momentum are far off at first."""
    return compiled(
        keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(6, 3, padding="same", name="conv"),
                layers.BatchNormalization(name="norm"),
                layers.ReLU(name="relu"),
                layers.GlobalAveragePooling2D(name="pool"),
                layers.Dense(12, activation="relu", name="dense"),
                layers.Dense(10, activation="softmax", name="out"),
            ]
        ),
        "adam",
    )


def fitted(model, *data, sample_memory=None, **options):
    probes = LinearProbeCallback(TAPS, reduce={"norm": "gap", "*": "flatten"})
    if sample_memory is not None:
        probes.sample_memory = sample_memory
    model.fit(*data, callbacks=[probes], verbose=0, **options)
    return probes


@pytest.fixture(scope="module")
def settled_and_not(digits, tmp_path_factory):
    """Results of both, and of the optimal probes of the same host, after two epochs."""
    (x, y), validation = digits
    found = {}
    for name, memory in (("settled", None), ("not", 0)):
        keras.utils.set_random_seed(7)
        model = host()
        probes = fitted(model, x, y, 16, 2, sample_memory=memory, validation_data=validation)
        found[name] = probes.results
    stores = [
        extract_features(
            model, data, tmp_path_factory.mktemp("store") / "features", layers=TAPS,
            reduce={"norm": "gap", "*": "flatten"}, verbose=False,
        )
        for data in ((x, y), validation)
    ]  # fmt: skip
    found["optimal"] = fit_probes(stores[0], validation=stores[1], test=None, verbose=False)
    return found


def test_they_are_at_the_optimum_of_the_host_as_it_is(settled_and_not):
    errors = {name: r.table()["validation error"] for name, r in settled_and_not.items()}
    assert (errors["not"] - errors["optimal"]).min() > 0.2
    assert (errors["settled"] - errors["optimal"]).abs().max() < 0.06


def test_rows_and_table_tell_how_near(settled_and_not):
    frame = settled_and_not["settled"].frame()
    by_split = frame.groupby("split")["certificate"]
    assert by_split.min()["train"] > 0.05  # those that trained in the epoch
    assert 0 < by_split.max()["validation"] < 0.01  # those that were settled at its end
    table = settled_and_not["settled"].table()
    assert table["converged"].all()
    assert not settled_and_not["not"].frame()["certificate"].notna().any()
    assert "converged" not in settled_and_not["not"].table()


def test_without_validation_the_table_marks_them(digits):
    table = fitted(host(), *digits[0], 16).results.table()
    assert not table["converged"].any()
    assert (table["certificate"] > 0.01).all()


def batches(digits):
    return tf.data.Dataset.from_tensor_slices(digits[0]).batch(20)


def generator(digits):
    (x, y), _ = digits
    while True:
        for start in range(0, 320, 20):
            yield x[start : start + 20], y[start : start + 20]


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (batches, {}),
        (lambda digits: batches(digits).repeat(), {"steps_per_epoch": 16}),
        (lambda digits: batches(digits).filter(lambda x, y: True), {}),  # of unknown length
        (generator, {"steps_per_epoch": 16}),
    ],
    ids=["dataset", "endless", "of unknown length", "generator"],
)
@pytest.mark.parametrize("at_once", [1, 3])
def test_whatever_fit_reads(digits, data, options, at_once):
    model = host()
    model.compile("adam", "sparse_categorical_crossentropy", steps_per_execution=at_once)
    probes = fitted(model, data(digits), epochs=2, validation_data=digits[1], **options)
    frame = probes.results.frame()
    assert (frame.groupby(["epoch", "split"]).size() == 2 * len(TAPS)).all()
    assert (frame[frame["split"] == "validation"]["certificate"] < 0.01).all()


def test_a_certificate_is_of_the_probes_as_they_were_settled(digits):
    (x, y), validation = digits
    model = host()
    probes = fitted(model, x, y, validation_data=validation)
    model.evaluate(*validation, callbacks=[probes], verbose=0)
    assert probes.results.frame().query("split == 'test'")["certificate"].notna().all()

    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.evaluate(*validation, callbacks=[probes], verbose=0)

    model.fit(x, y, 160, callbacks=[probes, Evaluate()], verbose=0)
    within = probes.results.frame().query("split == 'test'")
    assert len(within) == 2 * 2 * len(TAPS)
    assert within["certificate"].isna().all()


def test_refit_is_the_offline_path_at_one_go(digits, settled_and_not):
    (x, y), validation = digits
    keras.utils.set_random_seed(7)
    probes = fitted(host(), x, y, 16, 2, sample_memory=0, validation_data=validation)
    got = probes.refit((x, y), validation=validation, test=None, verbose=False)
    pd.testing.assert_frame_equal(got.frame(), settled_and_not["optimal"].frame())
    fractions = probes.refit((x, y), validation=0.2, test=0.3, l2=1e-2, verbose=False)
    assert set(fractions.frame()["n"]) == {160, 64, 96}


def test_refit_keeps_subsets_and_targets(digits):
    (x, y), _ = digits
    targets = {"digit": None, "odd": lambda x, y: y % 2}
    probes = LinearProbeCallback("conv", target=targets, num_classes={"odd": 2}, seed=3)
    model = host()
    model.fit(x, y, callbacks=[probes], verbose=0)
    results = probes.refit((x, y), test=None, l2=1e-2, tol=1e-3, verbose=False)
    assert set(results.probes) == {("digit", "conv"), ("odd", "conv")}
    features = probes._online.plan.features_of(tf.constant(x))["conv"]
    logits = features @ results.probes["odd", "conv"].kernel + results.probes["odd", "conv"].bias
    error = np.mean(np.argmax(logits, axis=1) != y % 2)
    table = results.table(target="odd").loc["conv"]
    expected = 0.9 * table["train error"] + 0.1 * table["validation error"]
    assert error == pytest.approx(expected, abs=1e-3)


def test_refit_before_fit():
    with pytest.raises(ValueError, match="not built yet"):
        LinearProbeCallback().refit((np.zeros((4, 8, 8, 1)), np.zeros(4)))
