"""Probes saved, loaded and taken up again after a kill, bit for bit."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pandas as pd
import pytest
from hosts import compiled, convnet, dense_net

from keras_probes import LinearProbeCallback, RandomFeatures
from keras_probes.online.checkpoint import Backups

TESTS = pathlib.Path(__file__).parent


def same_results(ours, theirs):
    pd.testing.assert_frame_equal(ours.frame(), theirs.frame(), check_exact=True)
    assert ours.taps == theirs.taps


@pytest.fixture(scope="module")
def trained(digits):
    model = compiled(convnet())
    reduce = {"conv": RandomFeatures(50), "dense": "flatten"}
    probes = LinearProbeCallback(
        ["conv", "dense"], reduce=reduce, optimizer=keras.optimizers.Adam(0.05), mode="isolated"
    )
    (x, y), validation = digits
    model.fit(x, y, epochs=2, validation_data=validation, callbacks=[probes], verbose=0)
    return model, probes


def test_loaded_probes_evaluate_as_the_saved_ones(digits, trained, tmp_path):
    model, probes = trained
    probes.save(tmp_path / "run.probes")
    loaded = LinearProbeCallback.load(tmp_path / "run.probes")
    same_results(loaded.results, probes.results)
    x, y = digits[1]
    given = {"verbose": 0, "return_dict": True}
    expected = model.evaluate(x, y, callbacks=[probes], **given)
    assert model.evaluate(x, y, callbacks=[loaded], **given) == expected
    for tap in ("conv", "dense"):
        for ours, theirs in zip(loaded.weights(tap), probes.weights(tap), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_file_from_before_there_was_a_refit(digits, trained, tmp_path):
    """As the first version wrote it: other counters, no penalties, another name for Adam."""
    model, probes = trained
    saved, earlier = probes._checkpoint(), len(probes.results.frame())
    new = ("l2", "certificates", "refit_at")
    arrays = {
        name: array
        for name, array in saved.arrays.items()
        if name.split("/")[-1] not in new and "labels/" not in name
    }
    arrays |= {"updates": np.float32(20), "loss": np.ones(2, "float32")}
    settings = {name: value for name, value in saved.settings.items() if name != "refit"}
    settings["every"] = 1
    settings["optimizer"] = settings["optimizer"] | {
        "module": "keras_probes.probes.optimizer",
        "class_name": "OnePassAdam",
        "registered_name": "keras_probes>OnePassAdam",
    }
    dataclasses.replace(saved, arrays=arrays, settings=settings).save(tmp_path / "old.probes")
    loaded = LinearProbeCallback.load(tmp_path / "old.probes")
    x, y = digits[1]
    given = {"verbose": 0, "return_dict": True}
    expected = model.evaluate(x, y, callbacks=[probes], **given)
    assert model.evaluate(x, y, callbacks=[loaded], **given) == expected
    measured_since = loaded.results.frame()[earlier:]
    assert len(measured_since) == 4
    assert measured_since["certificate"].isna().all()


def test_loaded_probes_are_saved_again_before_they_have_seen_a_model(trained, tmp_path):
    trained[1].save(tmp_path / "run.probes")
    LinearProbeCallback.load(tmp_path / "run.probes").save(tmp_path / "copy.probes")
    with (
        zipfile.ZipFile(tmp_path / "run.probes") as one,
        zipfile.ZipFile(tmp_path / "copy.probes") as other,
    ):
        assert one.namelist() == other.namelist()
        for name in one.namelist():
            if name.endswith(".json"):
                assert json.loads(one.read(name)) == json.loads(other.read(name))
    same_results(LinearProbeCallback.load(tmp_path / "copy.probes").results, trained[1].results)


def test_loaded_probes_train_on(digits, trained, tmp_path):
    (x, y), _ = digits
    _, probes = trained
    probes.save(tmp_path / "run.probes")

    def go_on():
        loaded, model = LinearProbeCallback.load(tmp_path / "run.probes"), compiled(convnet())
        history = model.fit(x, y, callbacks=[loaded], shuffle=False, verbose=0).history
        return loaded, history

    first, second = go_on(), go_on()
    assert first[1] == second[1]
    assert {row.step for row in first[0].results.rows} == {probes.results.rows[-1].step * 3 // 2}
    np.testing.assert_array_equal(first[0].weights("conv")[0], second[0].weights("conv")[0])


def test_a_save_that_breaks_off_leaves_the_earlier_one(trained, tmp_path, monkeypatch):
    _, probes = trained
    path = tmp_path / "run.probes"
    probes.save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        probes.save(path)
    assert path.read_bytes() == before


def test_there_is_no_pickle_in_it(trained, tmp_path):
    _, probes = trained
    probes.save(tmp_path / "run.probes")
    with zipfile.ZipFile(tmp_path / "run.probes") as archive:
        assert json.loads(archive.read("settings.json"))["layers"] == ["conv", "dense"]
        with archive.open("arrays.npz") as file:
            arrays = np.load(file, allow_pickle=False)
            assert all(arrays[name].dtype != object for name in arrays.files)


def test_a_target_given_as_a_function_is_asked_for_again(digits, tmp_path):
    (x, y), _ = digits

    def parity(x, y):
        return y % 2

    probes = LinearProbeCallback("dense", target=parity, num_classes=2)
    model = compiled(dense_net())
    model.fit(x, y, callbacks=[probes], verbose=0)
    probes.save(tmp_path / "run.probes")
    with pytest.raises(ValueError, match=r"target=\.\.\."):
        LinearProbeCallback.load(tmp_path / "run.probes")
    loaded = LinearProbeCallback.load(tmp_path / "run.probes", target=parity)
    given = {"verbose": 0, "return_dict": True}
    expected = model.evaluate(x, y, callbacks=[probes], **given)
    assert model.evaluate(x, y, callbacks=[loaded], **given) == expected


def test_what_is_no_saved_callback(trained, tmp_path):
    with pytest.raises(FileNotFoundError):
        LinearProbeCallback.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("not a zip")
    with pytest.raises(ValueError, match="damaged or something else"):
        LinearProbeCallback.load(tmp_path / "text")
    trained[1].save(tmp_path / "run.probes")
    content = bytearray((tmp_path / "run.probes").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        LinearProbeCallback.load(tmp_path / "bad")


def test_the_state_of_another_host_is_refused(digits, trained, tmp_path):
    (x, y), _ = digits
    trained[1].save(tmp_path / "run.probes")
    keras.utils.set_random_seed(0)
    other = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(3, 3, name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(9, name="dense"),
            keras.layers.Dense(10, activation="softmax", name="out"),
        ]
    )
    loaded = LinearProbeCallback.load(tmp_path / "run.probes")
    with pytest.raises(ValueError, match="state is of other probes.*'standardize/mean'"):
        compiled(other).fit(x, y, callbacks=[loaded], verbose=0)


def test_saving_before_there_is_anything(tmp_path):
    with pytest.raises(ValueError, match="not built yet"):
        LinearProbeCallback().save(tmp_path / "run.probes")


# A run that may be killed. A host with Dropout would go on with other masks, probes or none.
RUN = """
import os, signal, sys
import keras, numpy as np
from sklearn.datasets import load_digits
from keras import layers
from hosts import compiled
from keras_probes import LinearProbeCallback, RandomFeatures

directory, kill_at, ours_first, validated = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4]
bunch = load_digits()
x, y = bunch.images[..., None].astype("float32") / 16, bunch.target


class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.now(f"batch {self.epoch} {batch}")

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        self.now(f"end {epoch}")

    def now(self, at):
        if at == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


keras.utils.set_random_seed(1)
model = compiled(keras.Sequential([
    keras.Input((8, 8, 1)),
    layers.Conv2D(20, 3, activation="relu", name="conv"),
    layers.BatchNormalization(),
    layers.Flatten(),
    layers.Dense(16, activation="relu", name="dense"),
    layers.Dense(10, activation="softmax", name="out"),
]))
reduce = {"conv": RandomFeatures(300), "dense": "flatten"}
probes = LinearProbeCallback(["conv", "dense"], reduce=reduce, backup_dir=f"{directory}/probes")
theirs = keras.callbacks.BackupAndRestore(f"{directory}/host")
# What is killed at an epoch's end is killed between the two.
callbacks = [probes, Kill(), theirs] if ours_first == "yes" else [theirs, Kill(), probes]
validation = {"validation_data": (x[200:260], y[200:260])} if validated == "yes" else {}
model.fit(x[:200], y[:200], batch_size=40, epochs=4, shuffle=False, verbose=0,
          callbacks=callbacks, **validation)
probes.save(f"{directory}/end.probes")
model.save_weights(f"{directory}/end.weights.h5")
assert not os.listdir(f"{directory}/probes")
"""


def run(directory, kill_at="", ours_first="yes", validated="yes"):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    return subprocess.run(
        [sys.executable, "-c", RUN, str(directory), kill_at, ours_first, validated],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def contents(directory):
    with zipfile.ZipFile(directory / "end.probes") as archive:
        probes = {name: archive.read(name) for name in archive.namelist()}
    # How long a refit took is the one thing that is never the same twice.
    name = "results/probes.json"
    probes[name], refits = re.subn(rb'"seconds": [0-9.e-]+', b"", probes[name])
    assert refits == 4
    return {**probes, "host": (directory / "end.weights.h5").read_bytes()}


@pytest.mark.parametrize(
    ("kill_at", "ours_first", "validated"),
    [
        pytest.param("batch 2 3", "yes", "yes", marks=pytest.mark.slow),
        pytest.param("end 1", "yes", "yes", marks=pytest.mark.slow),
        pytest.param("end 1", "no", "no", marks=pytest.mark.slow),
        pytest.param("batch 0 1", "no", "yes", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path, kill_at, ours_first, validated):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken = run(whole, "", ours_first, validated)
    assert unbroken.returncode == 0, unbroken.stderr[-2000:]
    assert run(broken, kill_at, ours_first, validated).returncode == -9
    again = run(broken, "", ours_first, validated)
    assert again.returncode == 0, again.stderr[-2000:]
    assert contents(broken) == contents(whole)


def test_arrays_are_backed_up_once_an_epoch_and_what_was_measured_with_it(digits, tmp_path):
    (x, y), validation = digits
    probes = LinearProbeCallback("dense", backup_dir=tmp_path)

    class Stop(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            self.written = (tmp_path / "epoch-00001.probes").stat()

        def on_epoch_end(self, epoch, logs=None):
            assert (tmp_path / "epoch-00001.probes").stat() == self.written
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        compiled(dense_net()).fit(
            x, y, epochs=2, validation_data=validation, callbacks=[probes, Stop()], verbose=0
        )
    backup = Backups(tmp_path).read(1)
    assert {row.split for row in backup.results.rows} == {"train", "validation"}
    Backups(tmp_path).write(1, backup)  # of another run: what the first measured is gone
    assert os.listdir(tmp_path) == ["epoch-00001.probes"]


def test_a_backup_of_another_epoch_is_refused(digits, tmp_path):
    (x, y), _ = digits
    probes = LinearProbeCallback("dense", backup_dir=tmp_path)

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        compiled(dense_net()).fit(x, y, epochs=9, callbacks=[probes, Stop()], verbose=0)
    assert os.listdir(tmp_path) == ["epoch-00001.probes"]
    again = LinearProbeCallback("dense", backup_dir=tmp_path)
    with pytest.raises(ValueError, match="no backup of the probes for epoch 5.*epoch-00001"):
        compiled(dense_net()).fit(x, y, initial_epoch=5, epochs=9, callbacks=[again], verbose=0)
