"""`LinearProbeCallback` in real fits: what it logs, where, and what it refuses."""

import io
import re
from contextlib import redirect_stdout

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hosts import MODES, activations, compiled, convnet, dense_net
from keras import layers

from keras_probes import GlobalAverage, LinearProbeCallback, ProbeResults, RandomFeatures


def fit(digits, probes, model=None, callbacks=(), **options):
    (x, y), validation = digits
    model = model or compiled(dense_net())
    given = {"batch_size": 64, "epochs": 2, "validation_data": validation, "verbose": 0}
    history = model.fit(x, y, callbacks=[probes, *callbacks], **{**given, **options})
    return model, history


@pytest.fixture(scope="module")
def trained(digits):
    keras.utils.set_random_seed(7)
    probes = LinearProbeCallback(
        ["auto", "dense:preactivation"], metrics=("error", "loss", "top5_error")
    )
    model, history = fit(digits, probes, compiled(convnet()), epochs=8, batch_size=16)
    return model, probes, history.history


AUTO = ["input", "conv", "pool", "dense", "out"]


def test_every_measure_is_in_the_history(trained):
    _, probes, history = trained
    taps = [*AUTO[:3], "dense:preactivation", *AUTO[3:]]
    assert [tap.name for tap in probes.results.taps] == taps
    expected = {
        f"{split}probe_{metric}/{tap}"
        for split in ("", "val_")
        for metric in ("error", "loss", "top5_error")
        for tap in taps
    }
    assert {key for key in history if "probe" in key} == expected
    assert all(len(history[key]) == 8 for key in expected)


def test_the_probes_learn(trained):
    _, probes, history = trained
    assert history["val_probe_error/input"][-1] < 0.15
    assert history["val_probe_error/conv"][-1] < 0.15
    assert probes.results.table()["validation error"].max() < 0.5


def test_validation_error_equals_one_recomputed_by_hand(digits, trained):
    """Promise 3: NumPy, the host's activations and `probes.weights` give the logged numbers."""
    model, probes, history = trained
    x, y = digits[1]
    for tap in ("conv", "pool", "dense"):
        features = activations(model, tap, x).reshape(len(x), -1).astype("float64")
        W, b = probes.weights(tap)
        logits = features @ W + b
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        assert np.mean(logits.argmax(axis=1) != y) == history[f"val_probe_error/{tap}"][-1]
        loss = -log_p[np.arange(len(y)), y].mean()
        assert loss == pytest.approx(history[f"val_probe_loss/{tap}"][-1], rel=1e-4)
        fifth = np.sort(logits, axis=1)[:, -5]
        wrong5 = np.mean(logits[np.arange(len(y)), y] < fifth)
        assert wrong5 == history[f"val_probe_top5_error/{tap}"][-1]


def test_the_probe_model_is_a_real_keras_model(digits, trained, tmp_path):
    model, probes, _ = trained
    x, y = digits[1]
    sibling = probes.probe_model
    assert isinstance(sibling, keras.Model)
    inputs = {"input": x, "dense:preactivation": activations(model, "dense", x)}
    inputs |= {tap: activations(model, tap, x) for tap in AUTO[1:]}
    outputs = sibling.predict(inputs, verbose=0)
    assert set(outputs) == set(inputs)
    for p in outputs.values():
        assert p.shape == (len(x), 10)
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    error = np.mean(outputs["pool"].argmax(axis=1) != y)
    assert error == probes.results.table()["validation error"]["pool"]
    sibling.save(tmp_path / "probes.keras")
    loaded = keras.models.load_model(tmp_path / "probes.keras")
    np.testing.assert_array_equal(loaded.predict(inputs, verbose=0)["conv"], outputs["conv"])


def test_training_error_is_progressive(digits):
    """Each batch is measured before its update: with one batch an epoch, by untrained probes."""
    probes = LinearProbeCallback("dense")
    _, history = fit(digits, probes, batch_size=320, epochs=1)
    y = digits[0][1]
    assert history.history["probe_error/dense"] == [np.mean(y != 0)]
    assert history.history["probe_loss/dense"][0] == pytest.approx(np.log(10), rel=1e-6)


def test_evaluate_adds_a_test_column(digits, trained):
    model, probes, _ = trained
    x, y = digits[1]
    plain = model.evaluate(x, y, verbose=0)
    assert model.evaluate(x, y, verbose=0, callbacks=[probes]) == plain
    logs = model.evaluate(x, y, verbose=0, callbacks=[probes], return_dict=True)
    table = probes.results.table()
    assert logs["probe_error/pool"] == table["test error"]["pool"]
    assert list(table["test error"]) == list(table["validation error"])
    assert set(logs) - {key for key in logs if "probe" in key} == {"accuracy", "loss"}
    assert model.evaluate(x, y, verbose=0) == plain
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == {"accuracy", "loss"}


def test_evaluate_in_batches_is_over_the_whole_set(digits, trained):
    model, probes, _ = trained
    x, y = digits[1]
    whole = model.evaluate(x, y, batch_size=160, verbose=0, callbacks=[probes], return_dict=True)
    ragged = model.evaluate(x, y, batch_size=37, verbose=0, callbacks=[probes], return_dict=True)
    for key, value in whole.items():
        assert ragged[key] == pytest.approx(value, rel=1e-5)


class Spy(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.epochs, self.batches, self.tests = [], [], []

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(dict(logs))

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(dict(logs))

    def on_test_end(self, logs=None):
        self.tests.append(dict(logs))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ours_first", [True, False])
def test_other_callbacks_see_the_keys_in_any_order(digits, tmp_path, ours_first, mode):
    (x, y), validation = digits
    probes, spy = LinearProbeCallback(["input", "dense"], mode=mode), Spy()
    key = "val_probe_error/dense"
    others = [
        spy,
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.EarlyStopping(key, patience=0, mode="max", baseline=0.0),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "best.keras", monitor=key, mode="min", save_best_only=True
        ),
    ]
    callbacks = [probes, *others] if ours_first else [*others, probes]
    model = compiled(dense_net())
    history = model.fit(
        x, y, batch_size=64, epochs=3, validation_data=validation, callbacks=callbacks, verbose=0
    ).history
    assert [logs[key] for logs in spy.epochs] == history[key]
    csv = pd.read_csv(tmp_path / "log.csv")
    np.testing.assert_allclose(csv[key], history[key])
    assert (tmp_path / "best.keras").exists()
    assert all(set(logs) == {"accuracy", "loss"} for logs in spy.batches)
    assert spy.tests[-1]["probe_error/dense"] == history[key][-1]


def test_early_stopping_stops_by_a_probe(digits):
    # The wrong way round: it stops once the error falls, as it does where nothing is refitted.
    stop = keras.callbacks.EarlyStopping("val_probe_error/input", mode="max", patience=0)
    probes = LinearProbeCallback("input", refit=0)
    _, history = fit(digits, probes, callbacks=[stop], epochs=5)
    assert len(history.history["loss"]) == 2


@pytest.mark.parametrize("verbose", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_progress_bar_stays_readable(digits, verbose):
    def printed(callbacks):
        model = compiled(dense_net())
        out = io.StringIO()
        with redirect_stdout(out):
            (x, y), validation = digits
            options = {"validation_data": validation, "verbose": verbose, "epochs": 2}
            model.fit(x, y, callbacks=callbacks, **options)
            model.evaluate(x, y, callbacks=callbacks, verbose=verbose)
        # How often the bar is drawn depends on the clock; what it says at the end does not.
        text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())
        ends = [line.split("\r")[-1] for line in text.splitlines()]
        full = [end for end in ends if re.search(r"\b(\d+)/\1\b", end) and "\b" not in end]
        return list(filter(None, (re.findall(r" - (\S+): (\S+)", end) for end in full)))

    plain = printed([])
    assert [len(end) for end in plain] == [4, 4, 2]
    assert printed([LinearProbeCallback()]) == plain


def test_a_fit_ends_in_a_line_for_each_layer(digits, capsys):
    probes = LinearProbeCallback(["input", "dense"])
    fit(digits, probes, verbose=2)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0] == "validation error at each layer:"
    errors = probes.results.table()["validation error"]
    longest = max(errors)
    for line, (tap, error) in zip(lines[1:], errors.items(), strict=True):
        name, value, *bar = line.split()
        assert (name, value) == (tap, f"{error:.4f}")
        assert len("".join(bar)) == round(30 * error / longest)
    fit(digits, probes)
    assert "at each layer" not in capsys.readouterr().out


def test_history_frame_and_files_agree(trained, tmp_path):
    _, probes, history = trained
    frame = probes.results.frame()
    names = {"train": "", "validation": "val_"}
    for split, prefix in names.items():
        for metric in ("error", "loss", "top5_error"):
            for tap in ("input", "dense:preactivation"):
                rows = frame[
                    (frame["split"] == split) & (frame["metric"] == metric) & (frame["tap"] == tap)
                ]
                assert list(rows["value"]) == history[f"{prefix}probe_{metric}/{tap}"]
                assert list(rows["epoch"]) == list(range(8))
                assert set(rows["n"]) == {320 if split == "train" else 160}
    assert list(frame.loc[frame["split"] == "train", "step"].unique()) == list(range(20, 180, 20))
    assert list(frame["tap"].unique()) == [tap.name for tap in probes.results.taps]
    probes.results.save(tmp_path)
    pd.testing.assert_frame_equal(ProbeResults.load(tmp_path).frame(), frame)


def test_summary_before_training(capsys):
    probes = LinearProbeCallback(reduce={"conv": RandomFeatures(100), "pool": "gap"})
    probes.summary(compiled(convnet()))
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "RandomFeatures" in rows["conv"]
    assert f"{101 * 10:,}" in rows["conv"]
    assert "GlobalAverage" in rows["pool"]
    assert "4 x 4 x 6" in rows["pool"]
    assert "MiB" in rows["pool"]
    assert "5 taps" in out


def test_summary_counts_what_fit_makes(digits):
    probes = LinearProbeCallback()
    text = []
    model = compiled(dense_net())
    probes.summary(model, text.append)
    fit(digits, probes, model, epochs=1, validation_data=None)
    trainable = probes.probe_model.count_params() - sum(
        int(np.prod(v.shape)) for v in probes.probe_model.non_trainable_variables
    )
    assert any(f"{trainable:,} parameters" in line for line in text)


def test_summary_needs_a_model_and_its_input():
    with pytest.raises(ValueError, match="Pass the model"):
        LinearProbeCallback().summary()
    with pytest.raises(ValueError, match=r"keras\.Input"):
        LinearProbeCallback().summary(keras.Sequential([layers.Dense(3)]))


def test_several_targets(digits):
    probes = LinearProbeCallback(
        ["input", "dense"],
        target={"digit": None, "even": lambda x, y: 1 - y % 2},
        num_classes={"even": 2},
    )
    _, history = fit(digits, probes, epochs=6)
    assert history.history["val_probe_even_error/input"][-1] < 0.3
    assert history.history["val_probe_digit_error/input"][-1] < 0.3
    assert probes.weights("dense", "even")[0].shape == (16, 2)
    assert set(probes.results.table(target="even").index) == {"input", "dense"}
    outputs = probes.probe_model({"input": np.zeros((1, 8, 8, 1)), "dense": np.zeros((1, 16))})
    assert outputs["even"]["input"].shape == (1, 2)


@pytest.mark.parametrize("form", ["one_hot", "column"])
def test_label_forms_give_the_same_probes(digits, form):
    (x, y), _ = digits
    shaped = keras.utils.to_categorical(y, 10) if form == "one_hot" else y[:, None]
    loss = "categorical_crossentropy" if form == "one_hot" else "sparse_categorical_crossentropy"
    results = []
    for labels, its_loss in ((y, "sparse_categorical_crossentropy"), (shaped, loss)):
        model = dense_net()
        model.compile("adam", its_loss)
        probes = LinearProbeCallback("input")
        model.fit(x, labels, shuffle=False, callbacks=[probes], verbose=0)
        results.append(probes.weights("input")[0])
    np.testing.assert_array_equal(*results)


def test_binary_in_one_column(digits):
    (x, y), _ = digits
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(1, activation="sigmoid")]
    )
    model.compile("adam", "binary_crossentropy")
    probes = LinearProbeCallback("input")
    history = model.fit(x, (y % 2).astype("float32"), epochs=4, callbacks=[probes], verbose=0)
    assert probes.weights("input")[0].shape == (64, 2)
    assert history.history["probe_error/input"][-1] < 0.25


def two_headed():
    inputs = keras.Input((8, 8, 1))
    hidden = layers.Dense(12, name="hidden")(layers.Flatten()(inputs))
    outputs = {
        "digit": layers.Dense(10, activation="softmax", name="digit")(hidden),
        "even": layers.Dense(2, activation="softmax", name="even")(hidden),
    }
    model = keras.Model(inputs, outputs)
    model.compile("adam", dict.fromkeys(outputs, "sparse_categorical_crossentropy"))
    return model


def test_a_dict_of_outputs(digits):
    (x, y), _ = digits
    labels = {"digit": y, "even": 1 - y % 2}
    weights = {"digit": np.ones(len(y)), "even": np.where(y < 5, 1.0, 0.0)}
    probes = LinearProbeCallback("hidden", target={"d": "digit", "e": "even"})
    two_headed().fit(x, labels, sample_weight=weights, callbacks=[probes], verbose=0)
    assert probes.weights("hidden", "d")[0].shape == (12, 10)
    assert probes.weights("hidden", "e")[0].shape == (12, 2)
    with pytest.raises(ValueError, match="keys 'digit', 'even'"):
        two_headed().fit(x, labels, callbacks=[LinearProbeCallback()], verbose=0)


def test_the_hosts_own_error_stands_beside_that_of_the_probes(digits):
    (x, y), validation = digits
    host, probes = dense_net(), LinearProbeCallback("dense")
    host.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    _, history = fit(digits, probes, host)
    frame = probes.results.frame().set_index(["metric", "split"])
    for split, key in (("train", "accuracy"), ("validation", "val_accuracy")):
        expected = [1 - accuracy for accuracy in history.history[key]]
        np.testing.assert_allclose(frame.loc[("error", split), "host"], expected)
    assert frame.loc["loss", "host"].isna().all()

    model, labels = two_headed(), {"digit": y, "even": 1 - y % 2}
    losses = dict.fromkeys(labels, "sparse_categorical_crossentropy")
    model.compile("adam", losses, metrics={"digit": ["accuracy"]})
    probes = LinearProbeCallback(
        "hidden",
        target={"d": "digit", "e": "even", "same": lambda x, y: y["digit"]},
        num_classes={"same": 10},
    )
    logs = model.fit(x, labels, callbacks=[probes], verbose=0).history
    host = probes.results.frame().query("metric == 'error'").set_index("target")["host"]
    assert host["d"] == pytest.approx(1 - logs["digit_accuracy"][0])
    assert np.isnan(host[["e", "same"]]).all()


def test_sample_weights_weigh_the_loss(digits):
    (x, y), (xv, yv) = digits
    weights = np.where(yv < 5, 3.0, 0.5)
    probes = LinearProbeCallback("input")
    model, history = fit(
        digits, probes, epochs=2, validation_data=(xv, yv, weights), sample_weight=1.0 + y % 2
    )
    W, b = probes.weights("input")
    logits = xv.reshape(len(xv), -1) @ W + b
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(yv)), yv]
    expected = (weights * losses).sum() / weights.sum()
    assert history.history["val_probe_loss/input"][-1] == pytest.approx(expected, rel=1e-4)
    wrong = np.mean(logits.argmax(1) != yv)
    assert history.history["val_probe_error/input"][-1] == wrong


class Spoiled(layers.Layer):
    """Yields NaN for images whose first pixel is above a level."""

    def call(self, x):
        spoiled = tf.where(x[:, 4:5, 4:5] > 0.9, np.nan, x)
        return tf.stop_gradient(x * 0.0 + tf.where(tf.math.is_nan(spoiled), np.nan, x)) + 0.0 * x


def test_features_that_are_not_finite_are_told_and_harm_nothing_else(digits):
    (x, y), _ = digits
    inputs = keras.Input((8, 8, 1))
    side = Spoiled(name="spoiled")(inputs)
    hidden = layers.Dense(12, name="hidden")(layers.Flatten()(inputs))
    host = keras.Model(
        inputs, {"digit": layers.Dense(10, name="digit")(hidden), "side": layers.Flatten()(side)}
    )
    host.compile("adam", {"digit": keras.losses.SparseCategoricalCrossentropy(from_logits=True)})
    probes = LinearProbeCallback(["spoiled", "hidden"], target="digit", num_classes=10)
    history = host.fit(
        x, {"digit": y, "side": np.zeros((len(y), 64))}, epochs=2, callbacks=[probes], verbose=0
    )
    spoiled = int((x[:, 4, 4, 0] > 0.9).sum())
    assert 0 < spoiled < len(x)
    table = probes.results.table()
    assert list(table["nonfinite"]) == [spoiled, 0]
    assert np.isfinite(history.history["probe_loss/spoiled"]).all()
    assert np.isfinite(history.history["loss"]).all()
    assert set(probes.results.frame()["n"]) == {len(x), len(x) - spoiled}


def test_a_second_fit_goes_on_and_an_instance_serves_another_model(digits):
    probes = LinearProbeCallback("input")
    model, first = fit(digits, probes, epochs=1)
    _, second = fit(digits, probes, model, epochs=2, initial_epoch=1)
    key = "val_probe_loss/input"
    assert second.history[key][0] < first.history[key][0] + 0.01  # at the optimum in both
    key = "probe_loss/input"  # of each batch before the step on it: 1.7, then 0.001
    assert second.history[key][0] < 0.5 * first.history[key][0]
    frame = probes.results.frame()
    assert list(frame["epoch"].unique()) == [1]
    assert frame["step"].max() == 10
    _, other = fit(digits, probes, compiled(dense_net()), epochs=1)
    for of_both in (key, f"val_{key}"):
        assert other.history[of_both] == first.history[of_both]


def test_an_unbuilt_subclassed_host(digits):
    class Host(keras.Model):
        def __init__(self):
            super().__init__()
            self.flat = layers.Flatten()
            self.hidden = layers.Dense(16, activation="relu", name="hidden")
            self.out = layers.Dense(10, activation="softmax", name="out")

        def call(self, x):
            return self.out(self.hidden(self.flat(x)))

    (x, y), validation = digits
    probes = LinearProbeCallback()
    model = compiled(Host())
    history = model.fit(
        x, y, epochs=2, validation_data=validation, callbacks=[probes], verbose=0
    ).history
    assert [tap.name for tap in probes.results.taps] == ["input", "hidden", "out"]
    assert "val_probe_error/hidden" in history


def test_tf_data_and_generators(digits):
    (x, y), _ = digits
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(50)
    results = []
    for data in (dataset, ((x[i : i + 50], y[i : i + 50]) for i in range(0, 320, 50))):
        probes = LinearProbeCallback("input")
        compiled(dense_net()).fit(data, callbacks=[probes], verbose=0)
        results.append(probes.weights("input")[0])
        assert set(probes.results.frame()["n"]) == {320}
    np.testing.assert_array_equal(*results)


def test_inputs_by_name_are_probed_in_the_models_order(digits):
    (x, y), _ = digits
    flat = x.reshape(len(x), -1)
    zeta, alpha = keras.Input((64,), name="zeta"), keras.Input((32,), name="alpha")
    joined = layers.Concatenate()([zeta, alpha])
    model = compiled(keras.Model([zeta, alpha], layers.Dense(10, activation="softmax")(joined)))
    data = {"zeta": flat, "alpha": flat[:, :32], "unused": flat}
    for mode in ("shared", "isolated"):
        probes = LinearProbeCallback(["input[zeta]", "input[alpha]"], mode=mode)
        model.fit(data, y, callbacks=[probes], verbose=0)
        assert probes.weights("input[zeta]")[0].shape == (64, 10)
        assert probes.weights("input[alpha]")[0].shape == (32, 10)


@pytest.mark.parametrize("mode", MODES)
def test_gap_honours_the_mask_of_the_host(mode):
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 20, (240, 7)) * (np.arange(7) < rng.integers(1, 8, (240, 1)))
    y = (tokens == 3).any(axis=1).astype("int64")
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(20, 6, mask_zero=True, name="embed"),
            layers.GRU(5, name="gru"),
            layers.Dense(2, activation="softmax", name="out"),
        ]
    )
    probes = LinearProbeCallback(["embed", "gru"], reduce={"embed": "gap"}, mode=mode)
    history = compiled(model).fit(
        tokens, y, epochs=2, validation_data=(tokens, y), callbacks=[probes], verbose=0
    )
    embedded = model.get_layer("embed").embeddings.numpy()[tokens]
    masked = embedded * (tokens > 0)[..., None]
    W, b = probes.weights("embed")
    logits = masked.sum(axis=1) / (tokens > 0).sum(axis=1, keepdims=True) @ W + b
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]
    logged = history.history["val_probe_loss/embed"][-1]
    assert logged == pytest.approx(losses.mean(), rel=1e-4)


class Augmented(keras.Model):
    """Calls a layer once more in training, or itself on several views of the batch."""

    def __init__(self, views=None):
        super().__init__()
        self.views = views
        self.flat = layers.Flatten()
        self.hidden = layers.Dense(6, name="hidden")
        self.out = layers.Dense(10, activation="softmax", name="out")

    def call(self, x, training=False):
        if training and self.views is None:
            self.hidden(self.flat(x) + 100.0)
        return self.out(self.hidden(self.flat(x)))

    def train_step(self, data):
        x, y = data
        if self.views is not None:
            x, y = self.views(x), self.views(y)
        return super().train_step((x, y))


@pytest.mark.parametrize(
    ("views", "jit", "words"),
    [
        (None, False, 'which call to probe.*mode="isolated"'),
        (lambda of: tf.concat([of, of], axis=0), False, 'joins.*mode="isolated"'),
        (lambda of: tf.repeat(of, 2, axis=0), False, r'number of examples.*mode=\\?"isolated'),
        (lambda of: tf.repeat(of, 2, axis=0), True, "number_of_examples_than.*mode_isolated"),
    ],
    ids=["twice", "joined", "repeated", "XLA"],
)
def test_steps_that_shared_probes_cannot_read(digits, views, jit, words):
    x, y = (of[:300] for of in digits[0])  # the last batch is smaller: sizes are not known
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=words):
        compiled(Augmented(views), jit_compile=jit).fit(
            x, y, callbacks=[LinearProbeCallback("hidden")], verbose=0
        )
    probes = LinearProbeCallback("hidden", mode="isolated")
    compiled(Augmented(views)).fit(x, y, callbacks=[probes], verbose=0)
    assert set(probes.results.frame()["n"]) == {300}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"metrics": "error"}, ["sequence", "'error'"]),
        ({"seed": None}, ["seed", "None"]),
        ({"mode": "share"}, ["mode", "'shared'", "'share'"]),
        ({"every": 0}, ["every", "auto", "positive integer", "0"]),
        ({"every": "often"}, ["every", "auto", "often"]),
        ({"refit": -0.1}, ["refit", "share", "-0.1"]),
        ({"refit": True}, ["refit", "True"]),
        ({"baselines": "shuffled"}, ["sequence", "'shuffled'"]),
        ({"baselines": ["random"]}, ["baselines", "'shuffled'", "'initial'", "'random'"]),
        ({"every": 2.0}, ["every", "2.0"]),
        ({"metrics": ("eror",)}, ["metrics", "'eror'", "'error'"]),
        ({"metrics": ()}, ["metrics", "'loss'"]),
        ({"target": {}}, ["names of targets"]),
    ],
)
def test_arguments_are_checked_at_once(options, parts):
    with pytest.raises(ValueError, match="Expected") as raised:
        LinearProbeCallback(**options)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"layers": "cnov"}, ValueError, ["Unknown layer", "'conv'"]),
        ({"layers": layers.LSTM}, ValueError, ["matches nothing"]),
        ({"reduce": "gpa"}, ValueError, ["Unknown reduction"]),
        ({"reduce": {"cnov": "gap"}}, ValueError, ["'cnov'", "'conv'"]),
        ({"num_classes": 1}, ValueError, ["at least 2 classes"]),
        ({"target": "digit"}, ValueError, ["'digit'", "array of shape"]),
        ({"target": lambda x, y: y % 3}, ValueError, ["num_classes="]),
    ],
)
def test_bad_input_is_an_error_before_the_first_step(digits, options, error, parts):
    model = compiled(convnet())
    weights = model.get_weights()
    with pytest.raises(error) as raised:
        fit(digits, LinearProbeCallback(**options), model)
    for part in parts:
        assert part in str(raised.value)
    assert int(model.optimizer.iterations) == 0
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_labels_of_a_wrong_shape(digits):
    (x, y), _ = digits
    model = dense_net()
    model.compile("adam", lambda y_true, y_pred: keras.ops.mean(y_pred))
    with pytest.raises(ValueError, match="Expected one label per example"):
        model.fit(x, np.zeros((320, 4, 4)), callbacks=[LinearProbeCallback()], verbose=0)


@pytest.mark.parametrize("mode", ["shared", "isolated"])
def test_labels_out_of_range(digits, mode):
    (x, y), _ = digits
    model = compiled(dense_net())
    probes = LinearProbeCallback("input", target=lambda x, y: y + 1, num_classes=10, mode=mode)
    with pytest.raises(ValueError, match="integers from 0 to 9") as raised:
        model.fit(x, y, batch_size=320, callbacks=[probes], verbose=0)
    assert f"{(y == 9).sum()} of 320" in str(raised.value)
    assert int(model.optimizer.iterations) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_label_out_of_range_anywhere_in_arrays(digits, mode, split):
    (x, y), (x_val, y_val) = digits
    labels = {"train": {"digit": y.copy()}, "validation": {"digit": y_val.copy()}}
    labels[split]["digit"][-1] = 10  # in the last batch, if the host were to get there
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, {"digit": dense_net()(inputs)})
    model.compile("sgd", {"digit": "sparse_categorical_crossentropy"})
    weights = model.get_weights()
    probes = LinearProbeCallback("input", target="digit", mode=mode)
    with pytest.raises(ValueError, match="integers from 0 to 9") as raised:
        model.fit(x, labels["train"], batch_size=32, shuffle=False, callbacks=[probes], verbose=0,
                  validation_data=(x_val, labels["validation"]))  # fmt: skip
    assert f"1 of {len(labels[split]['digit'])}" in str(raised.value)
    assert int(model.optimizer.iterations) == 0
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_too_much_memory_says_how_much_and_what_helps(digits):
    probes, model = LinearProbeCallback(reduce="flatten"), compiled(convnet())
    probes.summary(model)
    probes.memory_limit = 50_000
    with pytest.raises(ValueError, match="MiB") as raised:
        fit(digits, probes, model)
    for part in ("'conv'", "384 features", 'reduce="gap"', "memory_limit"):
        assert part in str(raised.value)


def test_unknown_static_shapes(digits):
    model = keras.Sequential(
        [keras.Input((None, None, 1)), layers.Conv2D(4, 3, name="conv"),
         layers.GlobalAveragePooling2D(), layers.Dense(10)]
    )  # fmt: skip
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    probes = LinearProbeCallback()
    fit(digits, probes, model)  # the data tell
    assert [tap.features for tap in probes.results.taps] == [64, 144, 4, 10]
    _, history = fit(digits, LinearProbeCallback("conv", reduce=GlobalAverage()), model)
    assert "probe_error/conv" in history.history


def test_the_hosts_optimizer_is_refused(digits):
    model = compiled(dense_net())
    with pytest.raises(ValueError, match="optimizer of their own"):
        fit(digits, LinearProbeCallback(optimizer=model.optimizer), model)


def test_a_model_that_is_not_compiled(digits):
    with pytest.raises(ValueError, match="compile"):
        fit(digits, LinearProbeCallback(), dense_net())


def test_evaluate_before_fit_and_of_another_model(digits):
    probes = LinearProbeCallback("input")
    model = compiled(dense_net())
    with pytest.raises(ValueError, match="have not been trained"):
        model.evaluate(*digits[1], callbacks=[probes], verbose=0)
    fit(digits, probes, model, epochs=1)
    with pytest.raises(ValueError, match="have not been trained"):
        compiled(dense_net()).evaluate(*digits[1], callbacks=[probes], verbose=0)


def test_asking_before_fit():
    with pytest.raises(ValueError, match="not built yet"):
        LinearProbeCallback().weights("conv")
    with pytest.raises(ValueError, match="not built yet"):
        _ = LinearProbeCallback().probe_model


def test_asking_for_what_is_not_there(trained):
    _, probes, _ = trained
    with pytest.raises(ValueError, match="Did you mean 'conv'"):
        probes.weights("cnov")
    with pytest.raises(ValueError, match="target"):
        probes.weights("conv", "digit")


def test_other_labels_for_the_same_probes(digits):
    (x, y), _ = digits
    probes = LinearProbeCallback("input")
    model, _ = fit(digits, probes, epochs=1)
    model.compile("adam", lambda y_true, y_pred: keras.ops.mean(y_pred))
    with pytest.raises(ValueError, match=r"one-hot of shape \(batch, 10\)"):
        model.fit(x, keras.utils.to_categorical(y % 4, 4), callbacks=[probes], verbose=0)


def test_results_know_what_was_asked_and_by_which_versions(digits, tmp_path):
    (x, y), _ = digits
    model = compiled(dense_net())
    probes = LinearProbeCallback(
        [model.get_layer("dense"), keras.layers.Flatten, "input"],
        reduce={"input": RandomFeatures(5, name="some"), "*": "gap"},
        target={"digit": None, "odd": lambda _, y: y % 2},
        num_classes={"odd": 2},
        mode="isolated",
    )
    model.fit(x, y, callbacks=[probes], verbose=0)
    assert probes.results.settings == {
        "model": model.name,
        "layers": "Dense dense, Flatten, input",
        "reduce": "input: RandomFeatures some, *: gap",
        "target": "digit: None, odd: "
        "test_results_know_what_was_asked_and_by_which_versions.<locals>.<lambda>",
        "num_classes": "odd: 2",
        "metrics": "error, loss",
        "every": "auto",
        "seed": 0,
        "refit": 0.1,
        "mode": "isolated",
    }
    assert probes.results.versions["keras"] == keras.__version__
    probes.results.save(tmp_path)  # as JSON has it
    assert ProbeResults.load(tmp_path).settings == probes.results.settings
