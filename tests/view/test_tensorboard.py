"""Event files, read back by TensorBoard's own reader."""

import pathlib
import sys

import keras
import pytest
import tensorflow as tf
from hosts import compiled, dense_net
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from keras_probes import LinearProbeCallback


def read(log_dir):
    """`{run: {tag: [(step, value), ...]}}`, as TensorBoard would show it."""
    events = EventMultiplexer().AddRunsFromDirectory(str(log_dir)).Reload()
    return {
        run: {
            tag: [
                (event.step, tf.make_ndarray(event.tensor_proto))
                for event in events.Tensors(run, tag)
            ]
            for tag in tags["tensors"]
        }
        for run, tags in events.Runs().items()
    }


def fit(digits, log_dir, *callbacks, model=None, **options):
    (x, y), validation = digits
    model = model or compiled(dense_net())
    return model.fit(
        x, y, epochs=3, validation_data=validation, callbacks=list(callbacks), verbose=0, **options
    ).history


def test_each_tap_is_a_run_and_each_measure_a_tag(digits, tmp_path):
    probes = LinearProbeCallback(["input", "dense:preactivation"], log_dir=tmp_path)
    history = fit(digits, tmp_path, probes)
    runs = read(tmp_path)
    assert sorted(runs) == ["probes/000 input", "probes/001 dense:preactivation"]
    for run, tap in zip(sorted(runs), ("input", "dense:preactivation"), strict=True):
        for split, prefix in (("train", ""), ("validation", "val_")):
            for metric in ("error", "loss"):
                logged = runs[run][f"probe_{metric}/{split}"]
                assert [step for step, _ in logged] == [0, 1, 2]
                expected = history[f"{prefix}probe_{metric}/{tap}"]
                assert [float(value) for _, value in logged] == pytest.approx(expected, rel=1e-6)


def test_beside_kerass_own_callback(digits, tmp_path):
    keras_own = keras.callbacks.TensorBoard(tmp_path)
    fit(digits, tmp_path, keras_own, LinearProbeCallback("input", log_dir=tmp_path))
    runs = read(tmp_path)
    assert set(runs) == {"train", "validation", "probes/000 input"}
    assert "epoch_loss" in runs["train"]


def test_targets_have_tags_of_their_own(digits, tmp_path):
    probes = LinearProbeCallback("input", target={"digit": None}, log_dir=tmp_path)
    fit(digits, tmp_path, probes)
    assert "probe_digit_error/validation" in read(tmp_path)["probes/000 input"]


@pytest.mark.parametrize("name", ["..", "a..b", "a>b"])
def test_layer_names_stay_within_the_directory(digits, tmp_path, name):
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax", name=name),
        ]
    )
    log_dir = tmp_path / "logs"
    fit(digits, log_dir, LinearProbeCallback(log_dir=log_dir), model=compiled(model))
    assert len(read(log_dir)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]
    assert {p.name for p in pathlib.Path(log_dir).iterdir()} == {"probes"}


def test_no_log_dir_writes_nothing(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(digits, tmp_path, LinearProbeCallback("input"))
    assert not list(tmp_path.iterdir())


def test_without_tensorboard_the_error_says_how_to_install_it(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install .*view"):
        fit(digits, tmp_path, LinearProbeCallback("input", log_dir=tmp_path))
