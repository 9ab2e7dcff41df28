"""Beside Keras's own callbacks: they do what they do without probes, and probes log each epoch."""

import csv

import keras
import mlflow
import mlflow.keras
import numpy as np
import pytest
from hosts import compiled, dense_net, fingerprint

from keras_probes import LinearProbeCallback

pytestmark = pytest.mark.slow  # CI runs these; each trains several hosts

KEY = "val_probe_error/dense"


def evaluating():
    def look(epoch, logs):
        model = callback.model
        seen.append(model.evaluate(np.zeros((4, 8, 8, 1)), np.zeros(4), verbose=0))
        seen.append(float(model.predict(np.zeros((4, 8, 8, 1)), verbose=0).sum()))

    seen = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=look)
    callback.seen = seen
    return callback


# By name: directory -> callback.
CALLBACKS = {
    "ModelCheckpoint of the model": lambda d: keras.callbacks.ModelCheckpoint(d / "m.keras"),
    "ModelCheckpoint of the weights": lambda d: keras.callbacks.ModelCheckpoint(
        d / "m.weights.h5", save_weights_only=True, save_best_only=True
    ),
    "EarlyStopping": lambda d: keras.callbacks.EarlyStopping(
        "loss", mode="max", patience=1, restore_best_weights=True
    ),
    "ReduceLROnPlateau": lambda d: keras.callbacks.ReduceLROnPlateau(
        "loss", mode="max", patience=1, factor=0.5
    ),
    "TensorBoard": lambda d: keras.callbacks.TensorBoard(d / "logs", histogram_freq=1),
    "CSVLogger": lambda d: keras.callbacks.CSVLogger(d / "log.csv"),
    "SwapEMAWeights": lambda d: keras.callbacks.SwapEMAWeights(),
    "TerminateOnNaN": lambda d: keras.callbacks.TerminateOnNaN(),
    "LambdaCallback that evaluates": lambda d: evaluating(),
}


def train(digits, make, directory, *probes, order=1):
    keras.utils.clear_session()
    directory.mkdir()
    callback = make(directory)
    ema = isinstance(callback, keras.callbacks.SwapEMAWeights)
    model = compiled(dense_net(), keras.optimizers.Adam(use_ema=ema))
    (x, y), validation = digits
    history = model.fit(
        x, y, batch_size=80, epochs=3, validation_data=validation, shuffle=False, verbose=0,
        callbacks=[callback, *probes][::order],
    ).history  # fmt: skip
    own = {key: values for key, values in history.items() if "probe" not in key}
    return model, history, (own, fingerprint(model), getattr(callback, "seen", None))


@pytest.mark.parametrize("name", CALLBACKS)
def test_it_does_what_it_does_without_probes(digits, tmp_path, name):
    *_, plain = train(digits, CALLBACKS[name], tmp_path / "plain")
    for order in (1, -1):
        probes = LinearProbeCallback("dense", mode="isolated")
        where = tmp_path / f"order{order}"
        _, history, probed = train(digits, CALLBACKS[name], where, probes, order=order)
        assert probed == plain
        epochs = len(history["loss"])
        assert epochs == (2 if name == "EarlyStopping" else 3)
        assert len(history[KEY]) == len(history["probe_error/dense"]) == epochs
        frame = probes.results.frame().query("metric in ['error', 'loss']")
        assert len(frame) == 2 * 2 * epochs
        others = set(probes.results.frame()["metric"]) - {"error", "loss"}
        assert others == {"code_length", *({"rank", "directions"} if epochs == 3 else ())}
        if name == "CSVLogger":
            rows = list(csv.DictReader((where / "log.csv").read_text().splitlines()))
            assert [float(row[KEY]) for row in rows] == history[KEY]
        if name == "ModelCheckpoint of the model":
            saved = keras.models.load_model(where / "m.keras")
            assert not any("probe" in variable.path for variable in saved.variables)


def test_the_best_model_by_a_probe_is_kept(digits, tmp_path):
    """Monitors on a probe's key: the model of the epoch in which it was lowest."""
    probes = LinearProbeCallback("dense")

    class Keep(keras.callbacks.Callback):
        weights = ()

        def on_epoch_end(self, epoch, logs=None):
            self.weights = (*self.weights, self.model.get_weights())

    keep = Keep()
    checkpoint = keras.callbacks.ModelCheckpoint(
        tmp_path / "best.keras", monitor=KEY, mode="min", save_best_only=True
    )
    early = keras.callbacks.EarlyStopping(KEY, mode="min", patience=9, restore_best_weights=True)
    model = compiled(dense_net())
    (x, y), validation = digits
    history = model.fit(
        x, y, epochs=4, validation_data=validation, verbose=0,
        callbacks=[probes, keep, checkpoint, early],
    ).history  # fmt: skip
    best = int(np.argmin(history[KEY]))
    saved = keras.models.load_model(tmp_path / "best.keras")
    for kept, ours in zip(keep.weights[best], saved.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, kept)


def test_a_host_that_turns_nan_leaves_the_probes_usable(digits):
    (x, y), _ = digits
    model = compiled(dense_net(), keras.optimizers.SGD(1e30))
    probes = LinearProbeCallback(["input", "dense"])
    callbacks = [keras.callbacks.TerminateOnNaN(), probes]
    history = model.fit(x, y, batch_size=32, epochs=2, callbacks=callbacks, verbose=0).history
    assert len(history["loss"]) == 1
    assert np.isfinite(history["probe_loss/input"][0])
    frame = probes.results.frame()
    assert (frame.loc[frame["tap"] == "dense", "n"] < 320).all()
    assert all(np.isfinite(w).all() for tap in ("input", "dense") for w in probes.weights(tap))


def test_curves_reach_mlflow_through_the_logs(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    (x, y), validation = digits
    probes = LinearProbeCallback(["input", "dense:preactivation"])
    with mlflow.start_run() as run:
        history = compiled(dense_net()).fit(
            x, y, epochs=2, verbose=0, validation_data=validation,
            callbacks=[probes, mlflow.keras.MlflowCallback()],
        ).history  # fmt: skip
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient()
    for key in ("probe_error/input", "val_probe_loss/dense:preactivation"):
        logged = client.get_metric_history(run.info.run_id, key)
        assert [measure.step for measure in logged] == [0, 1]
        assert [measure.value for measure in logged] == pytest.approx(history[key])
