"""Event files, read back by TensorBoard's own reader."""

import contextlib
import gc
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import keras
import numpy as np
import pytest
import tensorflow as tf
from hosts import compiled, dense_net
from keras import layers
from made import results_of
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from keras_probes import LinearProbeCallback
from keras_probes.view.tensorboard import TensorBoardWriter

RUNS = ["probes/000 input", "probes/001 dense:preactivation"]
TOGETHER = {"probes", "probes/all layers", "probes/the model itself"}


def read(log_dir):
    """`{run: {tag: [(step, value), ...]}}`, as TensorBoard would show it."""
    every = {"tensors": 0}
    events = EventMultiplexer(size_guidance=every).AddRunsFromDirectory(str(log_dir)).Reload()
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
    assert set(runs) == {*RUNS, *TOGETHER}
    for run, tap in zip(RUNS, ("input", "dense:preactivation"), strict=True):
        for split, prefix in (("train", ""), ("validation", "val_")):
            for metric in ("error", "loss"):
                logged = runs[run][f"probe_{metric}/{split}"]
                assert [step for step, _ in logged] == [0, 1, 2]
                expected = history[f"{prefix}probe_{metric}/{tap}"]
                assert [float(value) for _, value in logged] == pytest.approx(expected, rel=1e-6)
    of_host = [1 - accuracy for accuracy in history["val_accuracy"]]
    logged = runs["probes/the model itself"]["probe_error/validation"]
    assert [float(value) for _, value in logged] == pytest.approx(of_host, abs=1e-6)


def test_every_n_batches_on_request(digits, tmp_path):
    (x, y), _ = digits
    probes = LinearProbeCallback("input", log_dir=tmp_path, update_freq=3)
    history = (
        compiled(dense_net())
        .fit(x[:320], y[:320], batch_size=32, epochs=2, callbacks=[probes], verbose=0)
        .history
    )
    run = read(tmp_path)["probes/000 input"]
    logged = run["probe_error_by_batch/train"]
    assert [step for step, _ in logged] == [3, 6, 9, 13, 16, 19]  # the sums begin with each epoch
    assert len(run["probe_error/train"]) == 2
    # The mean of ten batches is that of nine, and of one that is an error or none.
    of_nine = sum(float(value) for _, value in logged[:3]) / 3
    assert 0 <= 10 * history["probe_error/input"][0] - 9 * of_nine <= 1 + 1e-6


@pytest.mark.parametrize("asked", [0, -1, 2.0, True, "batch"])
def test_bad_update_freq(asked):
    with pytest.raises(ValueError, match="update_freq"):
        LinearProbeCallback(update_freq=asked)


class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            raise ArithmeticError("stop")


def test_files_are_closed_after_an_exception(digits, tmp_path):
    probes = LinearProbeCallback("input", log_dir=tmp_path, update_freq=1)
    with contextlib.suppress(ArithmeticError):
        fit(digits, tmp_path, probes, Stop())
    gc.collect()
    assert not probes._writer._writers
    assert len(read(tmp_path)["probes/000 input"]["probe_error_by_batch/train"]) == 3


def test_table_curve_and_graph_of_each_epoch(digits, tmp_path):
    probes = LinearProbeCallback(["input", "dense:preactivation"], log_dir=tmp_path)
    fit(digits, tmp_path, probes)
    run = read(tmp_path)["probes/all layers"]
    drawn = ["depth", "graph"] if shutil.which("dot") else ["depth"]
    pictures = {f"probe_error_by_layer/{name}" for name in drawn}
    assert set(run) == {"probe_error_by_layer/table", *pictures}
    assert all([step for step, _ in events] == [0, 1, 2] for events in run.values())
    for name in pictures:
        width, height, png = run[name][-1][1]
        assert tf.io.decode_png(png).shape[:2] == (int(height), int(width))
        assert min(int(width), int(height)) > 100
    (text,) = run["probe_error_by_layer/table"][1][1].ravel()
    error = probes.results.table(epoch=1)["validation error"]["input"]
    assert f"| {error:.4g} |" in text.decode().splitlines()[2]


def test_pictures_are_drawn_of_few_epochs_and_the_last(tmp_path):
    writer, results = TensorBoardWriter(tmp_path), results_of({"input": [0.5] * 23})
    writer.begin()
    for epoch in range(23):
        writer.write(results_of({"input": [0.5] * (epoch + 1)}), epoch)
    writer.end(results, 22)
    run = read(tmp_path)["probes/all layers"]
    drawn = [step for step, _ in run["probe_error_by_layer/depth"]]
    assert drawn == [*range(10), 19, 22]
    assert len(run["probe_error_by_layer/table"]) == 23


def test_names_in_the_table_are_escaped(tmp_path):
    TensorBoardWriter(tmp_path).write(results_of({"input": 0.5, "a|<script>": 0.1}), 0)
    (text,) = read(tmp_path)["probes/all layers"]["probe_error_by_layer/table"][0][1].ravel()
    assert "a&#124;&lt;script&gt;" in text.decode()


def test_steps_go_on_over_several_fits(digits, tmp_path):
    probes, model = LinearProbeCallback("input", log_dir=tmp_path), compiled(dense_net())
    fit(digits, tmp_path, probes, model=model)  # epochs 0, 1, 2
    fit(digits, tmp_path, probes, model=model)
    fit(digits, tmp_path, probes, model=model, initial_epoch=2)
    logged = read(tmp_path)["probes/000 input"]["probe_error/validation"]
    assert [step for step, _ in logged] == list(range(7))


def test_steps_go_on_in_a_run_that_is_resumed(digits, tmp_path):
    (x, y), _ = digits
    model = compiled(dense_net())
    for initial, epochs in ((0, 2), (2, 4)):  # a callback each, as in a process each
        probes = LinearProbeCallback("input", log_dir=tmp_path)
        model.fit(x, y, initial_epoch=initial, epochs=epochs, callbacks=[probes], verbose=0)
    logged = read(tmp_path)["probes/000 input"]["probe_error/train"]
    assert [step for step, _ in logged] == [0, 1, 2, 3]


def test_beside_kerass_own_callback(digits, tmp_path):
    keras_own = keras.callbacks.TensorBoard(tmp_path)
    fit(digits, tmp_path, keras_own, LinearProbeCallback("input", log_dir=tmp_path))
    runs = read(tmp_path)
    assert set(runs) == {"train", "validation", "probes/000 input", *TOGETHER}
    assert "epoch_loss" in runs["train"]


def test_targets_have_tags_of_their_own(digits, tmp_path):
    probes = LinearProbeCallback("input", target={"digit": None}, log_dir=tmp_path)
    fit(digits, tmp_path, probes)
    assert "probe_digit_error/validation" in read(tmp_path)["probes/000 input"]


@pytest.fixture
def served(tmp_path):
    """A TensorBoard of `tmp_path`; asks it for a page, as JSON."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", tmp_path, "--port", "0"]
    command += ["--load_fast", "false", "--reload_interval", "1"]

    def ask(page, wait=60, **query):
        address = f"{at[0]}{page}?{urllib.parse.urlencode(query)}"
        for _ in range(wait):
            with urllib.request.urlopen(address) as response:
                found = json.load(response)
            if found:
                return found
            time.sleep(1)  # it reads the files in the background
        raise AssertionError(f"nothing at {page}")

    at = []

    def start():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True)  # fmt: skip
        started.append(process)
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                at.append(found[0])
                ask.address = found[0]
                return ask
        raise AssertionError("TensorBoard did not start")

    started = []
    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_real_tensorboard_serves_all_curves_table_and_pictures(digits, tmp_path, served):
    probes = LinearProbeCallback(["input", "dense:preactivation"], log_dir=tmp_path)
    history = fit(digits, tmp_path, probes)
    ask = served()
    tags = ask("data/plugin/scalars/tags")
    measures = {f"probe_{m}/{s}" for m in ("error", "loss") for s in ("train", "validation")}
    for run, tap in zip(RUNS, ("input", "dense:preactivation"), strict=True):
        assert measures <= set(tags[run])
        curve = ask("data/plugin/scalars/scalars", run=run, tag="probe_error/validation")
        assert [step for _, step, _ in curve] == [0, 1, 2]
        expected = history[f"val_probe_error/{tap}"]
        assert [value for _, _, value in curve] == pytest.approx(expected, rel=1e-6)
    experiment = ask("data/plugin/hparams/experiment", request=json.dumps({}))
    assert {"mode", "layers", "seed"} <= {p["name"] for p in experiment["hparamInfos"]}
    measured = {(m["name"]["group"], m["name"]["tag"]) for m in experiment["metricInfos"]}
    assert ("001 dense:preactivation", "probe_error/validation") in measured
    assert "probe_error_by_layer/depth" in ask("data/plugin/images/tags")["probes/all layers"]
    assert "probe_error_by_layer/table" in ask("data/plugin/text/tags")["probes/all layers"]


@pytest.mark.slow
def test_the_first_page_shows_all_layers_in_one_chart(digits, tmp_path, served, browser):
    """Its screenshot is the documents' docs/images/tensorboard.png."""
    blocks = [
        layer
        for place in range(3)
        for layer in (
            layers.Conv2D(8, 3, padding="same", name=f"block{place}_conv"),
            layers.ReLU(name=f"block{place}_relu"),
        )
    ]
    head = [layers.GlobalAveragePooling2D(name="pool"), layers.Dense(10, "softmax", name="out")]
    model = compiled(keras.Sequential([keras.Input((8, 8, 1)), *blocks, *head]))
    probes = LinearProbeCallback(reduce="gap", log_dir=tmp_path)
    fit(digits, tmp_path, probes, model=model, batch_size=8)
    ask = served()
    ask("data/plugin/scalars/tags")
    browser.get(ask.address + "#timeseries")
    cards = WebDriverWait(browser, 60).until(
        lambda _: browser.find_elements(By.CSS_SELECTOR, "scalar-card")[:2]
    )
    WebDriverWait(browser, 60).until(lambda _: "out" in cards[1].get_property("textContent"))
    for card, split in zip(cards, ("train", "validation"), strict=True):
        shown = card.get_property("textContent")
        assert f"probe_error/{split}" in shown
        places = [shown.index(f"probes/{i:03d} ") for i in range(len(probes.results.taps))]
        assert places == sorted(places)  # in depth order
        assert "probes/the model itself" in shown
    WebDriverWait(browser, 60).until(lambda _: all(map(colored_pixels, cards)))
    browser.save_screenshot(str(tmp_path / "tensorboard.png"))


def colored_pixels(card):
    """Number of pixels of a card's curves: grid, axes and numbers are grey."""
    with Image.open(io.BytesIO(card.screenshot_as_png)) as image:
        saturation = np.asarray(image.convert("HSV"))[..., 1]
    upper_half = saturation[: len(saturation) // 2]
    return np.count_nonzero(upper_half > 100)


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
    assert len(read(log_dir)) == 5
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
