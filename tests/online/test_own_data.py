"""Probes on labelled data of their own: what they measure, and that no host knows of it."""

import copy
import json
import os
import pathlib
import pickle
import subprocess
import sys

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hosts import activations, compiled, convnet, dense_net, fingerprint
from keras import layers

from keras_probes import LinearProbeCallback, extract_features, fit_probes
from keras_probes.view.plots import plot_curves, plot_heatmap

TESTS = pathlib.Path(__file__).parents[1]


def labelled(digits, n=160):
    """A labelled set and one to test on, of images that hosts are not trained on."""
    (x, y), (x_val, y_val) = digits
    return (x[:n], y[:n]), (x_val, y_val)


def autoencoder(seed=3):
    """A host whose training has no labels, with Dropout."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((8, 8, 1))
    h = layers.Conv2D(6, 3, padding="same", activation="relu", name="conv")(inputs)
    h = layers.Dropout(0.2, name="drop")(h)
    code = layers.Dense(12, activation="relu", name="code")(layers.Flatten(name="flat")(h))
    h = layers.Dense(64, activation="sigmoid", name="decoded")(code)
    model = keras.Model(inputs, layers.Reshape((8, 8, 1), name="image")(h), name="autoencoder")
    model.compile("adam", "mse", jit_compile=False)
    return model


def fitted(probes, x, host=autoencoder, **options):
    model = host()
    options = {"epochs": 2, "batch_size": 64, "verbose": 0, **options}
    history = model.fit(x, x, callbacks=[probes] if probes else [], **options)
    return model, history.history


def test_errors_of_a_host_that_is_trained_without_labels(digits):
    (x, y), validation = labelled(digits)
    probes = LinearProbeCallback(
        ["input", "code"], data=(x, y), validation_data=validation, reduce={"code": "flatten"}
    )
    model, history = fitted(probes, digits[0][0])
    kernel, bias = probes.weights("code")
    for (some, labels), key in ((validation, "val_"), ((x, y), "")):
        logits = activations(model, "code", some) @ kernel + bias
        wrong = np.mean(logits.argmax(axis=1) != labels)
        assert history[f"{key}probe_error/code"][-1] == pytest.approx(wrong)
        likelihood = tf.nn.log_softmax(logits).numpy()[np.arange(len(labels)), labels]
        assert history[f"{key}probe_loss/code"][-1] == pytest.approx(-likelihood.mean(), abs=1e-5)
    assert len(history["val_probe_error/input"]) == 2
    table = probes.results.table()
    assert {"train error", "validation error", "certificate", "rank"} <= set(table)
    assert table["converged"].all()
    assert (probes.results.measured()["n"] == len(validation[1])).all()
    assert [refit.examples for refit in probes.results.refits] == [len(y)] * 2
    assert set(probes.probe_model.output) == {"input", "code"}
    assert len(probes.results.per_class("code")) == 10


def test_probes_are_as_good_as_fitted_offline(digits, tmp_path):
    data, validation = labelled(digits, 320)
    probes = LinearProbeCallback(["input", "code"], data=data, validation_data=validation)
    model, _ = fitted(probes, digits[0][0], epochs=3)
    store = extract_features(
        model, data, tmp_path / "features", layers=["input", "code"], verbose=False
    )
    rows = probes.results.measured("loss", split="train")
    assert (rows["certificate"] <= 1e-3).all()
    for place, (tap, width) in enumerate(probes._online.plan.n_features.items()):
        # Online, features are of length 1 whatever their number.
        l2 = width * probes._online.probes._groups[place].heads[None].penalty(0)
        optimal = fit_probes(store, validation=None, test=None, l2=l2, taps=[tap], verbose=False)
        best = optimal.measured("loss", split="train")["value"][tap]
        assert rows["value"][tap] == pytest.approx(best, abs=1e-2)


@pytest.mark.parametrize("mode", ["shared", "isolated"])
@pytest.mark.parametrize("host", [convnet, dense_net])
def test_the_host_is_bit_identical(digits, mode, host):
    (x, y), validation = digits

    def run(callbacks):
        model = compiled(host(), jit_compile=False)
        history = model.fit(
            x,
            y,
            epochs=2,
            batch_size=48,
            validation_data=validation,
            callbacks=callbacks,
            verbose=0,
        ).history
        own = {key: value for key, value in history.items() if "probe" not in key}
        return fingerprint(model), own

    data, held_out = labelled(digits)
    probes = LinearProbeCallback(
        data=data, validation_data=held_out, mode=mode, every_steps=3, baselines=["initial"]
    )
    assert run([probes]) == run([])
    assert probes.results.history(by="step").shape[1] > 2


def test_the_steps_are_the_hosts_own_compiled_functions(digits):
    (x, _), _ = digits
    traced, called = [], []

    class Own(keras.Model):
        def train_step(self, data):
            traced.append(1)
            return super().train_step(data)

    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 1))
    h = layers.Dense(8, name="code")(layers.Flatten()(inputs))
    model = Own(inputs, layers.Reshape((8, 8, 1))(layers.Dense(64)(h)))
    model.compile("adam", "mse", jit_compile=False)

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            called.append(getattr(self.model.train_function, "plain", self.model.train_function))

    model.fit(x, x, epochs=1, verbose=0)
    before, function = len(traced), model.train_function
    probes = LinearProbeCallback("code", data=labelled(digits)[0])
    model.fit(x, x, epochs=2, verbose=0, callbacks=[probes, Look()])
    assert len(traced) == before
    assert set(called) == {function}
    assert model.train_function is function
    assert "_get_metrics_result_or_logs" not in vars(model)


def test_of_a_host_that_stands_still_the_curve_is_flat(digits):
    """Whatever measurement a penalty is looked at in: 160 labels are too few for a new draw."""
    (x, y), validation = labelled(digits)
    model = autoencoder()
    model.optimizer.learning_rate = 0.0
    probes = LinearProbeCallback(["conv", "code"], data=(x, y), validation_data=validation)
    model.fit(x, x, epochs=9, batch_size=64, verbose=0, callbacks=[probes])
    errors = probes.results.history(split="validation")
    assert errors.shape == (2, 9)
    assert np.ptp(errors.to_numpy(), axis=1).max() == 0


def test_several_sets_by_name(digits):
    (x, y), (x_val, y_val) = labelled(digits)
    data = {"digit": (x, y), "parity": tf.data.Dataset.from_tensor_slices((x, y % 2)).batch(50)}
    held_out = {"digit": (x_val, y_val), "parity": (x_val, y_val % 2)}
    probes = LinearProbeCallback("code", data=data, validation_data=held_out)
    model, history = fitted(probes, digits[0][0], epochs=1)
    assert {"val_probe_digit_error/code", "probe_parity_loss/code"} <= set(history)
    assert probes.results.targets == ["digit", "parity"]
    for name, labels in (("digit", y_val), ("parity", y_val % 2)):
        kernel, bias = probes.weights("code", name)
        answers = (activations(model, "code", x_val) @ kernel + bias).argmax(axis=1)
        assert history[f"val_probe_{name}_error/code"][-1] == np.mean(answers != labels)
    assert set(probes.probe_model.output) == {"digit", "parity"}
    with pytest.raises(ValueError, match="one data set"):
        probes.refit((x, y))

    # Sets with targets of their own; one of them is tested on nothing.
    questions = {"is_even": lambda x, y: 1 - y % 2, "digit": None}
    probes = LinearProbeCallback(
        "code", data={"a": (x, y), "b": (x[::2], y[::2])}, validation_data={"a": (x_val, y_val)},
        target=questions, num_classes={"a_is_even": 2, "b_is_even": 2},
    )  # fmt: skip
    _, history = fitted(probes, digits[0][0], epochs=1)
    assert {"val_probe_a_is_even_error/code", "probe_b_digit_error/code"} <= set(history)
    assert not any(key.startswith("val_probe_b") for key in history)


def test_when_probes_are_measured(digits):
    data, validation = labelled(digits, 80)
    probes = LinearProbeCallback("code", data=data, validation_data=validation, every_epochs=2)
    _, history = fitted(probes, digits[0][0], epochs=5)
    assert len(history["val_probe_error/code"]) == 3
    assert list(probes.results.history()) == [1, 3, 4]

    # 320 examples are 5 batches of 64: of ten, after the 3rd, 6th and 9th, and at both ends.
    probes = LinearProbeCallback("code", data=data, validation_data=validation, every_steps=3)
    _, history = fitted(probes, digits[0][0])
    steps = probes.results.history(by="step")
    assert list(steps) == [3, 5, 6, 9, 10]
    assert steps[[5, 10]].to_numpy().tolist() == probes.results.history().to_numpy().tolist()
    assert history["val_probe_error/code"] == steps[[5, 10]].loc["code"].tolist()
    for draw in (plot_curves, plot_heatmap):
        assert draw(probes.results, by="step").get_xlabel() == "batches"


def scalars(directory, tag):
    (events,) = directory.glob("events*")
    return [
        float(tf.make_ndarray(value.tensor))
        for event in tf.compat.v1.train.summary_iterator(str(events))
        for value in event.summary.value
        if value.tag == tag
    ]


def test_measure_in_a_loop_of_ones_own(digits, tmp_path):
    (x, y), _ = digits
    data, validation = labelled(digits, 80)
    probes = LinearProbeCallback(
        ["input", "code"], data=data, validation_data=validation, log_dir=tmp_path
    )
    model, loss = autoencoder(), keras.losses.MeanSquaredError()
    optimizer = keras.optimizers.Adam()
    frames = [probes.measure(model)]
    for _ in range(3):
        with tf.GradientTape() as tape:
            value = loss(x, model(x, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        frames.append(probes.measure(model, step=int(optimizer.iterations)))
    assert probes.results.frame().equals(pd.concat(frames, ignore_index=True))
    history = probes.results.history()
    assert list(history) == [0, 1, 2, 3]
    assert history.loc["input"].nunique() == 1
    assert history.loc["code"].nunique() > 1
    kernel, bias = probes.weights("code")
    wrong = (activations(model, "code", validation[0]) @ kernel + bias).argmax(1) != validation[1]
    assert history[3]["code"] == wrong.mean()
    assert list(probes.results.history(by="step"))[-1] == 3
    written = scalars(tmp_path / "probes" / "001 code", "probe_error/validation")
    assert written == pytest.approx(history.loc["code"].tolist())

    for _ in range(2):
        model.train_on_batch(x[:64], x[:64])
    frame = probes.measure(model)
    assert set(frame["step"]) == {2}
    assert set(frame["epoch"]) == {4}
    with pytest.raises(ValueError, match="another one, 'convnet'"):
        probes.measure(convnet())
    with pytest.raises(ValueError, match="without data="):
        LinearProbeCallback().measure(model)


def test_a_loop_of_ones_own_that_calls_callbacks(digits):
    (x, _), _ = digits
    data, validation = labelled(digits, 80)
    probes, model = (
        LinearProbeCallback("code", data=data, validation_data=validation),
        autoencoder(),
    )
    calls = keras.callbacks.CallbackList([probes], add_history=True, model=model, epochs=2)
    calls.on_train_begin()
    for epoch in range(2):
        calls.on_epoch_begin(epoch)
        for batch in range(3):
            calls.on_train_batch_begin(batch)
            model.train_on_batch(x[:64], x[:64])
            calls.on_train_batch_end(batch)
        calls.on_epoch_end(epoch, {})
    calls.on_train_end()
    logged = model.history.history["val_probe_error/code"]
    assert logged == probes.results.history().loc["code"].tolist()
    assert set(probes.results.frame()["step"]) == {3, 6}


def test_every_callback_sees_the_keys(digits, tmp_path):
    data, validation = labelled(digits, 80)
    probes = LinearProbeCallback("code", data=data, validation_data=validation, log_dir=tmp_path)
    seen = []

    class First(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(logs["val_probe_error/code"])

    stop = keras.callbacks.EarlyStopping("val_probe_error/code", mode="min", min_delta=1.0)
    model = autoencoder()
    x = digits[0][0]
    callbacks = [First(), stop, probes]
    history = model.fit(
        x, x, epochs=3, validation_split=0.2, verbose=0, callbacks=callbacks
    ).history
    assert len(seen) == 2 == len(history["val_loss"])
    assert seen == history["val_probe_error/code"]
    written = scalars(tmp_path / "probes" / "000 code", "probe_error/validation")
    assert written == pytest.approx(seen)


def test_a_network_within_the_one_that_is_trained(digits):
    """An encoder without a softmax layer, within a host that has no `call` of its own."""
    (x, _), _ = digits
    data, validation = labelled(digits, 80)

    class Pair(keras.Model):
        def __init__(self):
            super().__init__(name="pair")
            keras.utils.set_random_seed(2)
            inputs = keras.Input((8, 8, 1))
            flat = layers.Flatten(name="flat")(inputs)
            self.encoder = keras.Model(inputs, layers.Dense(8, "relu", name="code")(flat))
            self.decoder = keras.Sequential([keras.Input((8,)), layers.Dense(64)])

        def train_step(self, data):
            x = data[0] if isinstance(data, tuple) else data
            with tf.GradientTape() as tape:
                restored = self.decoder(self.encoder(x + 0.1, training=True))
                loss = keras.ops.mean((restored - keras.ops.reshape(x, (-1, 64))) ** 2)
            weights = self.trainable_weights
            self.optimizer.apply(tape.gradient(loss, weights), weights)
            return {"loss": loss}

    named = LinearProbeCallback("encoder/code", data=data, validation_data=validation)
    given = LinearProbeCallback(
        "code", model=lambda host: host.encoder, data=data, validation_data=validation
    )
    host = Pair()
    host.compile("adam", jit_compile=False)
    history = host.fit(x, epochs=2, verbose=0, callbacks=[named, given]).history
    assert history["val_probe_error/encoder/code"] == history["val_probe_error/code"]
    kernel, bias = given.weights("code")
    wrong = (host.encoder.predict(validation[0], verbose=0) @ kernel + bias).argmax(1)
    assert history["val_probe_error/code"][-1] == np.mean(wrong != validation[1])


def test_beside_probes_that_ride(digits):
    (x, y), validation = digits
    own = LinearProbeCallback("dense", data=labelled(digits)[0])
    riding = LinearProbeCallback("dense", target={"digit": None})
    history = (
        compiled(dense_net())
        .fit(x, y, epochs=2, validation_data=validation, callbacks=[own, riding], verbose=0)
        .history
    )
    assert {"probe_error/dense", "probe_digit_error/dense"} <= set(history)
    assert "val_probe_error/dense" not in history


def generator(x, y):
    for start in range(0, len(x), 50):
        yield x[start : start + 50], y[start : start + 50]


class Sequence(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.parts = list(generator(x, y))

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, place):
        return self.parts[place]


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x, keras.utils.to_categorical(y, 10)),
        lambda x, y: (x, y, np.ones(len(x), "float32")),
        lambda x, y: tf.data.Dataset.from_tensor_slices((x, y)).batch(50),
        generator,
        Sequence,
    ],
    ids=["one-hot", "weights", "tf.data", "generator", "PyDataset"],
)
def test_any_data_that_end(digits, form):
    data, validation = labelled(digits)
    arrays, other = (
        LinearProbeCallback("code", data=of[0], validation_data=of[1])
        for of in ((data, validation), (form(*data), form(*validation)))
    )
    _, expected = fitted(arrays, digits[0][0])
    _, history = fitted(other, digits[0][0])
    # Batches of another size round otherwise, and the solver stops elsewhere within its tolerance.
    for key in ("val_probe_error/code", "probe_loss/code"):
        np.testing.assert_allclose(history[key], expected[key], atol=0.02)


@pytest.mark.parametrize("wide", [False, True])
def test_features_on_disk_are_as_in_memory(digits, wide):
    """More features than examples take another way through the solver."""
    data, validation = labelled(digits, 200)
    taps = ["conv"] if wide else ["input", "code"]
    found, spilled = [], []

    class OnDisk(LinearProbeCallback):
        features_limit = 0

        def on_epoch_end(self, epoch, logs=None):
            spilled.append(self._online.room)

    for kind in (LinearProbeCallback, OnDisk):
        probes = kind(taps, data=data, validation_data=validation)
        fitted(probes, digits[0][0], epochs=2)
        found.append(probes.results.frame())
    assert spilled == [0, 0]
    assert found[0].equals(found[1])


def test_labels_of_other_tasks(digits):
    (x, y), (x_val, y_val) = labelled(digits)
    of = lambda x, y: {  # noqa: E731
        "several": (x, np.stack([y % 2, y > 4], axis=1).astype("int32")),
        "number": (x, (y / 7.0).astype("float32")),
    }
    probes = LinearProbeCallback("code", data=of(x, y), validation_data=of(x_val, y_val))
    _, history = fitted(probes, digits[0][0])
    assert 0 < history["val_probe_several_error/code"][-1] < 0.5
    assert 0 < history["val_probe_number_error/code"][-1] < 1.5
    kernel, bias = probes.weights("code", "number")
    predicted = activations(probes._online.host, "code", x_val) @ kernel + bias
    unexplained = np.mean((predicted[:, 0] - y_val / 7.0) ** 2) / np.var(y_val / 7.0)
    assert history["val_probe_number_error/code"][-1] == pytest.approx(unexplained, rel=1e-4)

    masks, masks_val = ((of[..., 0] > 0.5).astype("int32") for of in (x, x_val))
    probes = LinearProbeCallback(
        "conv", data=(x, masks), validation_data=(x_val, masks_val), task="positions"
    )
    _, history = fitted(probes, digits[0][0])
    assert history["val_probe_error/conv"][-1] < 0.2
    assert probes.results.measured()["n"].iloc[0] == 64 * len(y_val)


def test_labels_that_are_missing_and_examples_without_weight(digits):
    (x, y), validation = labelled(digits)
    known = np.where(np.arange(len(y)) % 4, y, -1)
    probes = LinearProbeCallback("code", data=(x, known), validation_data=validation)
    with pytest.warns(UserWarning, match="40 of 160 labels"):
        fitted(probes, digits[0][0], epochs=1)
    assert probes.results.measured(split="train")["unlabelled"].iloc[0] == 40
    some = known >= 0
    few = LinearProbeCallback("code", data=(x[some], y[some]), validation_data=validation)
    fitted(few, digits[0][0], epochs=1)
    weighted = LinearProbeCallback(
        "code", data=(x, y, some.astype("float32")), validation_data=validation
    )
    fitted(weighted, digits[0][0], epochs=1)
    assert weighted.results.measured(split="train")["n"].iloc[0] == some.sum()


def test_baselines(digits):
    data, validation = labelled(digits, 320)
    probes = LinearProbeCallback(
        "code", data=data, validation_data=validation, baselines=["initial", "shuffled"]
    )
    model = autoencoder()
    fresh = LinearProbeCallback("code", data=data, validation_data=validation)
    first = fresh.measure(model)
    x = digits[0][0]
    model.fit(x, x, epochs=3, verbose=0, callbacks=[probes])
    table = probes.results.table()
    error = first[(first["split"] == "validation") & (first["metric"] == "error")]["value"]
    assert table["validation initial"]["code"] == pytest.approx(error.iloc[0], abs=0.02)
    assert table["validation selectivity"]["code"] > 0.3


def test_a_broken_run_goes_on(digits, tmp_path):
    data, validation = labelled(digits, 80)
    x = digits[0][0]

    def host():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((8, 8, 1))
        h = layers.Dense(8, "relu", name="code")(layers.Flatten()(inputs))
        model = keras.Model(inputs, layers.Reshape((8, 8, 1))(layers.Dense(64)(h)))
        model.compile("adam", "mse", jit_compile=False)
        return model

    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.epoch == 3 and batch == 2:
                raise RuntimeError("stopped")

        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

    def run(directory, *more):
        model = host()
        probes = LinearProbeCallback(
            ["input", "code"], data=data, validation_data=validation, every_epochs=2,
            every_steps=4, backup_dir=directory / "probes",
        )  # fmt: skip
        theirs = keras.callbacks.BackupAndRestore(str(directory / "host"))
        model.fit(
            x,
            x,
            batch_size=64,
            epochs=5,
            shuffle=False,
            verbose=0,
            callbacks=[probes, theirs, *more],
        )
        return model, probes

    whole, expected = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "broken", Break())
    again, probes = run(tmp_path / "broken")
    assert all(map(np.array_equal, whole.get_weights(), again.get_weights()))
    assert probes.results.frame().equals(expected.results.frame())
    state = expected._online.state()
    assert all(np.array_equal(state[name], of) for name, of in probes._online.state().items())


def test_saving_copying_and_pickling(digits, tmp_path):
    data, validation = labelled(digits, 80)
    probes = LinearProbeCallback("code", data=data, validation_data=validation)
    copied, pickled = copy.deepcopy(probes), pickle.loads(pickle.dumps(probes))
    assert copied._settings.data[0] is data[0]
    histories = [fitted(of, digits[0][0])[1] for of in (probes, copied, pickled)]
    assert histories[0] == histories[1] == histories[2]

    probes.save(tmp_path / "run.probes")
    with pytest.raises(ValueError, match="data= that a file can't keep"):
        LinearProbeCallback.load(tmp_path / "run.probes")
    given = {"data": data, "validation_data": validation}
    loaded = LinearProbeCallback.load(tmp_path / "run.probes", **given)
    assert loaded.results.frame().equals(probes.results.frame())
    later = copy.deepcopy(probes)
    model = probes._online.host
    frames = [of.measure(model) for of in (probes, loaded, later)]
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])


def test_a_measurement_that_fails_ends_no_training(digits):
    (x, y), validation = labelled(digits, 80)

    class Failing(Sequence):
        fail = False

        def __getitem__(self, place):
            if self.fail:
                raise OSError("the disk is gone")
            return super().__getitem__(place)

    data = Failing(x, y)

    class Fail(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            data.fail = epoch == 1

    probes = LinearProbeCallback("code", data=data, validation_data=validation)
    model = autoencoder()
    with pytest.warns(UserWarning, match="could not be measured in epoch 2, and training goes on"):
        history = model.fit(
            digits[0][0], digits[0][0], epochs=3, verbose=0, callbacks=[Fail(), probes]
        ).history
    assert len(history["loss"]) == 3
    assert list(probes.results.history()) == [0, 2]
    data.fail = True
    with pytest.raises(Exception, match="the disk is gone"):
        probes.measure(model)


def test_evaluate_is_for_probes_that_ride(digits):
    data, validation = labelled(digits, 80)
    probes, x = LinearProbeCallback("code", data=data), digits[0][0]
    model, history = fitted(probes, x, validation_data=(x[:32], x[:32]))
    assert {"val_loss", "probe_error/code"} <= set(history)
    with pytest.raises(ValueError, match="measured by probes.measure"):
        model.evaluate(x, x, verbose=0, callbacks=[probes])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"run_eagerly": True}, [4, 8, 10, 12, 16, 20]),
        ({"steps_per_execution": 4}, [4, 8, 10, 14, 18, 20]),  # it ends after 4, 8 and 10 batches
    ],
    ids=["eager", "several"],
)
def test_other_loops(digits, options, expected):
    data, validation = labelled(digits, 80)
    probes = LinearProbeCallback("code", data=data, validation_data=validation, every_steps=4)
    model, x = autoencoder(), digits[0][0]
    model.compile("adam", "mse", jit_compile=False, **options)
    history = model.fit(x, x, batch_size=32, epochs=2, verbose=0, callbacks=[probes]).history
    assert len(history["val_probe_error/code"]) == 2
    assert list(probes.results.history(by="step")) == expected


def test_summary_before_the_fit(digits, capsys):
    data, validation = labelled(digits, 80)
    probes = LinearProbeCallback("code", data=data, validation_data=validation, every_epochs=3)
    model = autoencoder()
    probes.summary(model)
    text = capsys.readouterr().out
    assert "classification, 10 classes" in text
    assert "after every 3 epochs, and the last" in text
    fitted(probes, digits[0][0], host=lambda: model, epochs=1)


class NoStep(keras.callbacks.Callback):
    """Fails where a step was run."""

    def on_train_batch_begin(self, batch, logs=None):
        pytest.fail("the host took a step")


def endless(x, y):
    while True:
        yield x, y


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x, y: {"data": (x,)}, "data to have labels"),
        (lambda x, y: {"data": x}, "data to have labels"),
        (lambda x, y: {"data": (x[:0], y[:0])}, "empty"),
        (lambda x, y: {"data": (x[:, :4], y)}, "x of data does not fit.*'autoencoder'"),
        (
            lambda x, y: {"data": (x, y), "validation_data": (x[:, :4], y)},
            "x of validation_data does not fit",
        ),
        (lambda x, y: {"data": (x, y), "validation_data": (x, y + 3)}, "validation_data.*0 to 9"),
        (
            lambda x, y: {"data": (x, y), "validation_data": (x, np.eye(12, dtype="int32")[y])},
            "validation_data.*10 classes.*12 classes",
        ),
        (lambda x, y: {"data": (x, 0.5 + 0.0 * y)}, "among the labels that data= was given"),
        (lambda x, y: {"data": (x, y), "layers": "cod"}, "^(?!.*data).*'cod'"),
        (
            lambda x, y: {"data": tf.data.Dataset.from_tensor_slices((x, y)).batch(9).repeat()},
            "data.*endless",
        ),
        (lambda x, y: {"data": (x, y), "target": "digit"}, "data.*key or index into y"),
        (
            lambda x, y: {"data": (x, y), "target": lambda x, y: y["digit"], "num_classes": 10},
            "data.*fails",
        ),
        (lambda x, y: {"data": (x, np.array(list("ab" * 80)))}, "data.*numbers"),
        (lambda x, y: {"data": (x, y), "num_classes": {"digit": 10}}, "names of targets"),
        (lambda x, y: {"data": {"a": (x, y)}, "num_classes": {"b": 10}}, "names of targets"),
        (lambda x, y: {"data": 3}, "data can't be read"),
    ],
)  # fmt: skip
def test_bad_data_before_any_step(digits, given, message):
    (x, y), _ = labelled(digits)
    probes = LinearProbeCallback(**{"layers": "code", **given(x, y)})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        autoencoder().fit(digits[0][0], digits[0][0], verbose=0, callbacks=[NoStep(), probes])


def test_data_without_an_end(digits, monkeypatch):
    (x, y), _ = labelled(digits)
    monkeypatch.setattr("keras_probes.online.labelled.MOST_KEPT", 10**6)
    probes = LinearProbeCallback("code", data=endless(x, y))
    with pytest.raises(ValueError, match="data has no end"):
        autoencoder().fit(digits[0][0], digits[0][0], verbose=0, callbacks=[NoStep(), probes])
    monkeypatch.setattr("keras_probes.online.labelled.MOST_EXAMPLES", 10**3)
    forever = tf.data.Dataset.from_generator(
        lambda: endless(x, y),
        output_signature=(tf.TensorSpec((None, 8, 8, 1)), tf.TensorSpec((None,), tf.int32)),
    )
    probes = LinearProbeCallback("code", data=forever)
    with pytest.raises(ValueError, match="data has no end"):
        autoencoder().fit(digits[0][0], digits[0][0], verbose=0, callbacks=[NoStep(), probes])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_data": (1, 2)}, "validation_data= alone"),
        ({"every_epochs": 2}, "every_epochs=2 without data"),
        ({"every_steps": 2}, "every_steps=2 without data"),
        ({"data": (1, 2), "every_epochs": 0}, "every_epochs.*positive integer"),
        ({"data": (1, 2), "every_steps": True}, "every_steps.*positive integer"),
        ({"data": (1, 2), "every": 2}, "every= is about the batches of fit"),
        ({"data": (1, 2), "optimizer": "sgd"}, "optimizer= is about the batches of fit"),
        ({"data": (1, 2), "unpack": 1}, "unpack= is about the batches of fit"),
        ({"data": (1, 2), "refit": 0}, "refit= is about the batches of fit"),
        ({"data": {}}, "mapping"),
        ({"data": {1: (1, 2)}}, "mapping"),
        ({"data": {"a": (1, 2)}, "validation_data": (1, 2)}, "named 'a', validation_data without"),
        ({"data": {"a": (1, 2)}, "validation_data": {"b": (1, 2)}}, "named 'a'.*named 'b'"),
    ],
)
def test_arguments_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        LinearProbeCallback(**options)


def test_the_hosts_own_logs_are_about_other_data(digits):
    (x, y), validation = digits
    probes = LinearProbeCallback("dense", data=labelled(digits)[0], validation_data=validation)
    compiled(dense_net()).fit(x, y, epochs=1, verbose=0, callbacks=[probes])
    assert probes.results.frame()["host"].isna().all()


def test_settings_do_not_hold_the_data(digits):
    (x, y), _ = labelled(digits)
    lists = LinearProbeCallback("code", data={"a": (x, y.tolist())})._settings.described()
    assert lists["data"] == "a"
    assert not {"mode", "every", "refit"} & set(lists)
    bright = lambda x, y: tf.cast(tf.reduce_mean(x, (1, 2, 3)) > 0.3, tf.int32)  # noqa: E731
    probes = LinearProbeCallback("code", data=x, target=bright, num_classes=2)
    fitted(probes, digits[0][0], epochs=1)
    assert probes.results.settings["data"] == "ndarray"


def test_measurements_after_a_fit_that_broke(digits):
    data, validation = labelled(digits, 80)
    probes, model, x = LinearProbeCallback("code", data=data), autoencoder(), digits[0][0]

    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped") as kept:  # with the fit in its traceback
        model.fit(x, x, verbose=0, callbacks=[probes, Break()])
    for _ in range(2):
        model.train_on_batch(x[:64], x[:64])
        probes.measure(model)
    assert kept.traceback
    assert list(probes.results.history(split="train")) == [0, 1]
    assert list(probes.results.history(split="train", by="step")) == [2, 3]


def test_a_host_that_is_not_built_is_built_by_its_own_data(digits):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 16)).astype("float32"), np.arange(64) % 2

    def host():
        model = keras.Sequential([layers.Dense(4, name="code"), layers.Dense(2, name="out")])
        return compiled(model, jit_compile=False)

    fits, other = (
        (rng.normal(size=(20, n)).astype("float32"), np.arange(20) % 3) for n in (16, 32)
    )
    probes = LinearProbeCallback("code", data=fits)
    host().fit(x, y, epochs=2, verbose=0, callbacks=[probes])
    assert len(probes.results.history(split="train").columns) == 2
    model = host()
    with pytest.warns(UserWarning, match="x of data does not fit"):
        model.fit(x, y, verbose=0, callbacks=[LinearProbeCallback("code", data=other)])
    model.fit(x, y, verbose=0)
    probes = LinearProbeCallback("code", data=fits, baselines=["initial"])
    with pytest.raises(ValueError, match="none before its first batch"):
        host().fit(x, y, verbose=0, callbacks=[probes])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"a": (1, 2), "a_shuffled": (1, 2)}, "baselines": ["shuffled"]}, "'a_shuffled'"),
        (
            {"data": {"a": (1, 2), "a_b": (1, 2)}, "target": {"b_c": None, "c": None}},
            "Two targets would be named 'a_b_c'",
        ),
    ],
)
def test_names_that_collide(options, message):
    with pytest.raises(ValueError, match=message):
        LinearProbeCallback(**options)


def test_tensorboard_has_the_latest_of_each_epoch(digits, tmp_path):
    data, validation = labelled(digits, 80)
    probes = LinearProbeCallback(
        "code", data=data, validation_data=validation, every_steps=2, log_dir=tmp_path
    )
    _, history = fitted(probes, digits[0][0])
    directory = tmp_path / "probes" / "000 code"
    assert scalars(directory, "probe_error/validation") == pytest.approx(
        history["val_probe_error/code"]
    )
    assert len(scalars(directory, "probe_error_by_batch/validation")) == 4


def test_a_measurement_within_an_epoch_that_fails(digits, tmp_path):
    class Failing(Sequence):
        def __getitem__(self, place):
            if self.fail:
                raise OSError("the disk is gone")
            return super().__getitem__(place)

    data = Failing(*labelled(digits, 80)[0])
    data.fail = False
    probes = LinearProbeCallback("code", data=data, every_steps=2, log_dir=tmp_path)
    model = autoencoder()
    probes.summary(model, print_fn=lambda text: None)
    data.fail = True
    with pytest.warns(UserWarning, match="the disk is gone"):
        fitted(probes, digits[0][0], host=lambda: model)
    assert not probes.results.rows


def test_steps_of_a_model_whose_optimizer_is_not_used(digits):
    probes, model = LinearProbeCallback("code", data=labelled(digits, 80)[0]), autoencoder()
    for _ in range(3):
        probes.measure(model)
    assert list(probes.results.history(split="train", by="step")) == [0, 1, 2]


def test_names_of_classes_are_of_the_labels_themselves(digits):
    (x, y), _ = labelled(digits)

    def named():
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
        data.class_names = [f"digit {n}" for n in range(12)]
        return data

    probes, model = LinearProbeCallback("code", data=named()), autoencoder()
    probes.measure(model)
    assert probes.weights("code")[1].shape == (12,)
    parity = lambda x, y: y % 2  # noqa: E731
    with pytest.raises(ValueError, match="number of classes"):
        LinearProbeCallback("code", data=named(), target=parity).measure(model)


def test_shapes_that_data_do_not_tell(digits):
    (x, y), _ = labelled(digits)
    unknown = tf.data.Dataset.from_generator(
        lambda: generator(x, y),
        output_signature=(tf.TensorSpec(None), tf.TensorSpec((None,), tf.int32)),
    )
    with pytest.raises(ValueError, match="data to say of which shapes"):
        LinearProbeCallback("code", data=unknown).measure(autoencoder())


# Logical devices are made before TensorFlow begins.
REPLICAS = """
import json
import keras, numpy as np, tensorflow as tf
from sklearn.datasets import load_digits

devices = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
from keras_probes import LinearProbeCallback

bunch = load_digits()
x, y = bunch.images[..., None].astype("float32") / 16, bunch.target


def run(strategy, probed):
    keras.utils.set_random_seed(0)
    keras.utils.clear_session()
    with strategy.scope():
        inputs = keras.Input((8, 8, 1))
        code = keras.layers.Dense(16, "relu", name="code")(keras.layers.Flatten()(inputs))
        model = keras.Model(inputs, keras.layers.Reshape((8, 8, 1))(keras.layers.Dense(64)(code)))
        model.compile("adam", "mse")
    probes = LinearProbeCallback(
        ["input", "code"], data=(x[:200], y[:200]), validation_data=(x[200:270], y[200:270])
    )
    model.fit(x, x, batch_size=64, epochs=2, shuffle=False, verbose=0,
              callbacks=[probes] if probed else [])
    frame = probes.measure(model) if probed else None
    return {
        "host": [w.tolist() for w in model.get_weights()],
        "errors": frame["value"].tolist() if probed else None,
        "history": probes.results.history().to_numpy().tolist() if probed else None,
    }


mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert mirrored.num_replicas_in_sync == 2
found = {
    "plain": run(mirrored, False),
    "probed": run(mirrored, True),
    "one": run(tf.distribute.get_strategy(), True),
}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_several_replicas():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    run = subprocess.run(
        [sys.executable, "-c", REPLICAS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["plain"]["host"] == found["probed"]["host"]
    for name in ("errors", "history"):  # the host's own gradients are summed in another order
        np.testing.assert_allclose(found["probed"][name], found["one"][name], atol=0.03)
