"""Several labels at once, and numbers, in a real fit: against values recomputed by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import average_precision_score, log_loss, mean_absolute_error, r2_score

from keras_probes import LinearProbeCallback, ProbeResults

N, VAL = 480, 160


def data(kind, seed=0):
    """Features, and labels of a kind that depend on them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N + VAL, 8)).astype("float32")
    z = np.abs(x @ np.random.default_rng(1).normal(size=(8, 3)))
    y = {
        "multilabel": (z > [1.5, 2.0, 3.0]).astype("float32"),
        "regression": 50 + 10 * z[:, :1],
        "several": z * [1, 10, 100] + [5, 0, -700],
    }[kind]
    return (x[:N], y[:N]), (x[N:], y[N:])


def host(outputs, loss, activation=None, metrics=()):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((8,)),
        keras.layers.Dense(12, "relu", name="hidden"),
        keras.layers.Dense(outputs, activation, name="out"),
    ])  # fmt: skip
    model.compile("adam", loss, metrics=list(metrics))
    return model


CASES = {
    "multilabel": (3, "binary_crossentropy", "sigmoid", ["binary_accuracy"]),
    "regression": (1, "mse", None, ["mae"]),
    "several": (3, keras.losses.Huber(), None, []),
}
METRICS = {
    "multilabel": ("error", "loss", "mean_average_precision"),
    "regression": ("error", "loss", "mse", "mae"),
    "several": ("error", "mse"),
}


def answers_of(probes, model, x, tap):
    hidden = keras.Model(model.inputs, model.get_layer("hidden").output).predict(x, verbose=0)
    kernel, bias = probes.weights(tap)
    return {"input": x, "hidden": hidden}[tap].astype("float64") @ kernel + bias


def fitted(kind, **options):
    train, validation = data(kind)
    model = host(*CASES[kind])
    probes = LinearProbeCallback(["input", "hidden"], metrics=METRICS[kind], **options)
    history = model.fit(
        *train, 32, 3, validation_data=validation, callbacks=[probes], verbose=0
    ).history
    return model, probes, history, validation


@pytest.mark.parametrize("kind", list(CASES))
@pytest.mark.parametrize("mode", ["shared", "isolated"])
def test_the_task_is_found_and_measures_are_those_by_hand(kind, mode, tmp_path):
    model, probes, history, (x, y) = fitted(kind, mode=mode)
    for tap in ("input", "hidden"):
        answers = answers_of(probes, model, x, tap)
        if kind == "multilabel":
            p = 1 / (1 + np.exp(-answers))
            expected = {
                "error": np.mean((answers > 0) != y),
                "loss": np.mean([log_loss(y[:, k], p[:, k]) for k in range(3)]),
                "mean_average_precision": average_precision_score(y, answers, average="macro"),
            }
        else:
            expected = {"error": 1 - r2_score(y, answers), "mse": np.mean((y - answers) ** 2)}
            if kind == "regression":
                expected["mae"] = mean_absolute_error(y, answers)
        for metric, value in expected.items():
            logged = history[f"val_probe_{metric}/{tap}"][-1]
            assert logged == pytest.approx(value, rel=2e-3, abs=1e-3), metric
    frame = probes.results.measured("error")
    assert (frame["certificate"] < 1e-2).all()
    assert frame["value"]["hidden"] < 0.97 * frame["majority"]["hidden"]
    assert (frame["ci_low"] < frame["value"]).all()
    assert probes.results.diagnose() is not None
    assert probes.results.compare("input", "hidden").n == VAL
    probes.results.save(tmp_path / "r")
    loaded = ProbeResults.load(tmp_path / "r")
    assert str(loaded) == str(probes.results)
    # A saved callback measures the same.
    probes.save(tmp_path / "p")
    again = LinearProbeCallback.load(tmp_path / "p")
    logs = model.evaluate(x, y, callbacks=[again], verbose=0, return_dict=True)
    assert logs["probe_error/hidden"] == history["val_probe_error/hidden"][-1]


@pytest.mark.parametrize("kind", list(CASES))
def test_the_sibling_model_answers_in_the_labels_own_units(kind):
    model, probes, _, (x, y) = fitted(kind)
    answers = probes.probe_model.predict(
        {"input": x, "hidden": keras.Model(model.inputs, model.get_layer("hidden").output)(x)},
        verbose=0,
    )
    for tap in ("input", "hidden"):
        expected = answers_of(probes, model, x, tap)
        if kind == "multilabel":
            expected = 1 / (1 + np.exp(-expected))
        np.testing.assert_allclose(answers[tap], expected, rtol=1e-3, atol=1e-3 * np.abs(y).max())


def test_the_hosts_own_measures_stand_beside():
    _, probes, history, _ = fitted("multilabel")
    of_host = probes.results.measured("error")["host"]["hidden"]
    assert of_host == pytest.approx(1 - history["val_binary_accuracy"][-1])
    _, probes, history, _ = fitted("regression")
    assert probes.results.measured("mae")["host"]["hidden"] == history["val_mae"][-1]
    assert np.isnan(probes.results.measured("error")["host"]["hidden"])


@pytest.mark.parametrize("kind", list(CASES))
def test_baselines_of_every_task(kind):
    _, probes, history, _ = fitted(kind, baselines=["initial", "shuffled"])
    random = probes.results.measured("error", baseline="shuffled")
    assert (random["value"] > 0.9 * random["majority"]).all()
    assert (random["value"] > probes.results.measured("error")["value"])["hidden"]
    assert "val_probe_initial_error/hidden" in history
    table = probes.results.table()
    assert {"validation initial", "validation selectivity"} <= set(table.columns)


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_a_missing_label_is_left_out_and_counted(kind):
    (x, y), (x_val, y_val) = data(kind)
    y, y_val = y.copy(), y_val.copy()
    y[:30], y_val[5:15] = np.nan, np.nan
    y_val[20, 0] = np.nan
    model = host(*CASES[kind])
    model.compile("adam", lambda y, u: tf.reduce_mean(u))  # the host's own loss knows no NaN
    probes = LinearProbeCallback(["input", "hidden"], task=kind)
    model.fit(x, y, 32, 2, validation_data=(x_val, y_val), callbacks=[probes], verbose=0)
    measured = probes.results.measured("error")
    left_out = 10 if kind == "multilabel" else 11
    assert set(measured["unlabelled"]) == {left_out}
    assert set(measured["n"]) == {VAL - left_out}
    assert set(probes.results.measured("error", split="train")["unlabelled"]) == {30}
    assert np.isfinite(measured["value"]).all()


@pytest.mark.parametrize(
    ("kind", "change", "options", "message"),
    [
        ("regression", lambda y: 0 * y + 3, {}, "one and the same"),
        ("regression", lambda y: y / 0.0, {}, "finite numbers"),
        ("multilabel", lambda y: y * 0.5, {"task": "multilabel"}, "0 or 1.*probabilities"),
        ("multilabel", lambda y: 0 * y, {"task": "multilabel"}, "no 1 in any column"),
        ("multilabel", lambda y: y * [1, 0, 1], {}, "no 1 in columns 1 of 3"),
        ("regression", lambda y: y, {"metrics": ["top5_error"]}, "of regression: 'error'"),
        ("multilabel", lambda y: y, {"metrics": ["mse"]}, "of multilabel: 'error'"),
        ("regression", lambda y: y, {"task": "numbers"}, "'regression'"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_step(kind, change, options, message):
    (x, y), _ = data(kind)
    model = host(*CASES[kind])
    before = [np.array(w) for w in model.get_weights()]
    with np.errstate(divide="ignore"):
        y = change(y)
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, 32, 1, callbacks=[LinearProbeCallback("hidden", **options)], verbose=0)
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)


def test_errors_by_class_and_confusion(digits, tmp_path):
    (x, y), (x_val, y_val) = digits
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((8, 8, 1)),
        keras.layers.Flatten(name="flat"),
        keras.layers.Dense(10, "softmax", name="out"),
    ])  # fmt: skip
    model.compile("adam", "sparse_categorical_crossentropy")
    metrics = ["error", "balanced_error"]
    probes = LinearProbeCallback(["input"], metrics=metrics)
    model.fit(x, y, 32, 2, validation_data=(x_val, y_val), callbacks=[probes], verbose=0)
    kernel, bias = probes.weights("input")
    answers = (x_val.reshape(len(x_val), -1) @ kernel + bias).argmax(axis=1)
    probes.results.save(tmp_path)
    for results in (probes.results, ProbeResults.load(tmp_path)):
        matrix = results.confusion("input")
        for k in range(10):
            expected = np.bincount(answers[y_val == k], minlength=10)
            np.testing.assert_array_equal(matrix.loc[k], expected)
        frame = results.per_class("input")
        np.testing.assert_array_equal(frame["n"], np.bincount(y_val, minlength=10))
        np.testing.assert_allclose(
            frame["error"], [np.mean(answers[y_val == k] != k) for k in range(10)]
        )
        measured = results.measured("balanced_error")["value"]["input"]
        assert frame["error"].mean() == pytest.approx(measured)
    with pytest.raises(ValueError, match="Unknown tap. Received: 'conv'"):
        probes.results.per_class("conv")
    with pytest.raises(ValueError, match="Counted: 'train', 'validation'"):
        probes.results.per_class("input", split="test")


def test_errors_by_label():
    model, probes, _, (x, y) = fitted("multilabel")
    frame = probes.results.per_class("hidden")
    answers = answers_of(probes, model, x, "hidden") > 0
    np.testing.assert_allclose(frame["error"], np.mean(answers != y, axis=0))
    assert frame.index.name == "label"
    with pytest.raises(ValueError, match="several labels at once"):
        probes.results.confusion("hidden")


def test_several_questions_of_one_host():
    (x, y), validation = data("regression")
    model = host(*CASES["regression"])
    probes = LinearProbeCallback(
        ["input", "hidden"],
        target={"number": None, "high": lambda x, y: y > 65, "signs": lambda x, y: x[:, :3] > 0},
        task={"high": "classification", "signs": "multilabel"},
        num_classes={"high": 2},
        metrics=["error", "mse", "auroc"],
    )
    model.fit(x, y, 32, 2, validation_data=validation, callbacks=[probes], verbose=0)
    assert probes.results.targets == ["number", "high", "signs"]
    assert probes.results.measured("error", target="signs")["value"]["input"] < 0.02
    assert 0.4 < probes.results.measured("auroc", target="high")["value"]["input"] < 1
    assert probes.results.measured("mse", target="number")["value"]["hidden"] > 0
    offline = probes.refit((x, y), l2=1e-3, verbose=False)
    assert set(offline.targets) == {"number", "high", "signs"}


@pytest.mark.parametrize("metrics", [("error",), ("error", "rank", "directions")])
def test_in_how_many_directions_features_vary(metrics, tmp_path):
    (x, y), validation = data("regression")
    model = host(*CASES["regression"])
    probes = LinearProbeCallback(["input", "hidden"], metrics=metrics, refit=1e3)
    history = model.fit(x, y, 32, 2, validation_data=validation, callbacks=[probes], verbose=0)
    hidden = keras.Model(model.inputs, model.get_layer("hidden").output).predict(x, verbose=0)
    table = probes.results.table()
    for tap, features in (("input", x), ("hidden", hidden)):
        singular = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
        p = singular[singular > 1e-3 * singular[0]] / singular.sum()
        rank = np.exp(-np.sum(p * np.log(p)))
        assert table.loc[tap, "rank"] == pytest.approx(rank, rel=0.02)
        asked = "rank" in metrics
        assert (f"probe_rank/{tap}" in history.history) == asked
        if asked:
            assert history.history[f"probe_rank/{tap}"][-1] == table.loc[tap, "rank"]
            held = np.cumsum(singular**2) / np.sum(singular**2)
            assert table.loc[tap, "directions"] == np.flatnonzero(held >= 0.99)[0] + 1
    offline = probes.refit((x, y), validation=None, test=None, l2=1e-3, verbose=False).table()
    np.testing.assert_allclose(offline["rank"], table["rank"], rtol=0.02)


@pytest.mark.parametrize("kind", list(CASES))
def test_compiled_by_xla_and_without_arrays_at_hand(kind):
    """As on a GPU, where XLA compiles steps by default; data as they come from a pipeline."""
    (x, y), validation = data(kind)
    outputs, loss, activation, _ = CASES[kind]
    measured = []
    for jit in (False, True):
        model = host(outputs, loss, activation)
        model.compile("adam", loss, jit_compile=jit)
        probes = LinearProbeCallback(["input", "hidden"], metrics=METRICS[kind])
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(32, drop_remainder=True)
        held = tf.data.Dataset.from_tensor_slices(validation).batch(32, drop_remainder=True)
        model.fit(batches, epochs=2, validation_data=held, callbacks=[probes], verbose=0)
        assert probes.results.compare("input", "hidden").n == VAL
        measured.append(probes.results.measured("error")["value"])
    np.testing.assert_allclose(*measured, atol=0.02)


def test_summary_says_what_is_asked_before_training():
    for kind, asked in (
        ("multilabel", "Asked: multilabel, 3 labels at once."),
        ("regression", "Asked: regression, a number."),
    ):
        text = []
        LinearProbeCallback().summary(host(*CASES[kind]), text.append)
        assert asked in text


@pytest.mark.parametrize("first", ["constant", "missing", "nearly equal"])
def test_a_first_batch_that_tells_no_scale(first):
    """The first refit takes the scale from its sample: the loss is in units of the labels."""
    (x, y), validation = data("regression")
    y = 5e5 + 2e4 * (y - y.mean()) / y.std()
    held = validation[0], 5e5 + 2e4 * (validation[1] - 60) / 10
    y[:32] = {"constant": 5e5, "missing": np.nan}.get(first, y[:1] + np.arange(32)[:, None] / 99)
    model = host(1, lambda y, u: tf.reduce_mean(u))
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    probes = LinearProbeCallback("hidden", task="regression", metrics=["error", "loss", "mse"])
    model.fit(
        batches, epochs=2, callbacks=[probes], verbose=0,
        validation_data=tf.data.Dataset.from_tensor_slices(held).batch(40),
    )  # fmt: skip
    error, loss, mse = (
        probes.results.measured(metric)["value"]["hidden"] for metric in ("error", "loss", "mse")
    )
    assert loss == pytest.approx(mse / 2 / np.nanvar(y), rel=0.2)
    assert 0 < error < 2
    majority = probes.results.measured("mse", epoch=0)["majority"]["hidden"]
    assert majority == pytest.approx(np.mean((held[1] - np.nanmean(y)) ** 2), rel=0.05)


def test_an_output_of_one_number_without_an_axis():
    inputs = keras.Input((8,))
    out = keras.layers.Reshape((), name="number")(keras.layers.Dense(1, name="out")(inputs))
    model = keras.Model(inputs, out)
    model.compile("adam", "mse")
    (x, _), _ = data("regression")
    probes = LinearProbeCallback("input", metrics=["error", "mse"])
    model.fit(x, np.round(x[:, 0] * 3), 32, 1, callbacks=[probes], verbose=0)
    assert probes.results.settings["metrics"] == "error, mse"


def test_the_rank_needs_a_refit():
    with pytest.raises(ValueError, match="'rank', 'directions'.*refit=0"):
        LinearProbeCallback(metrics=["error", "rank"], refit=0)
