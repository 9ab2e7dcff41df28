"""`extract_features`: same features as Keras's, from any data, whatever interrupts it."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from hosts import activations, compiled, convnet, dense_net, fingerprint

from keras_probes import (
    FeatureStore,
    LinearProbeCallback,
    SpatialPool,
    Token,
    extract_features,
)

ROWS = 2130  # in batches of 50: two chunks of 1,050 rows and one of 30
ROOT = pathlib.Path(__file__).parents[2]


def data(rows=ROWS):
    rng = np.random.default_rng(0)
    return rng.random((rows, 8, 8, 1), "float32"), rng.integers(0, 10, rows)


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def extract(path, given=None, model=None, **options):
    given_by_all = {"layers": ["input", "dense"], "batch_size": 50, "num_classes": 10}
    options = {**given_by_all, "verbose": False, **options}
    return extract_features(
        model or dense_net(), data() if given is None else given, path, **options
    )


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return -(-ROWS // 50)

    def __getitem__(self, i):
        x, y = data()
        return x[i * 50 : i * 50 + 50], y[i * 50 : i * 50 + 50]


def generator(stop=None):
    x, y = data()
    for at in range(0, ROWS, 50):
        if at == stop:
            raise KeyboardInterrupt
        yield x[at : at + 50], y[at : at + 50]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of an extraction that nothing interrupted."""
    path = tmp_path_factory.mktemp("stores") / "whole"
    extract(path)
    return path


def test_features_are_the_activations_and_the_taps_those_of_the_callback(tmp_path):
    model, (x, y) = convnet(), data(100)
    store = extract_features(model, (x, y), tmp_path / "s", verbose=False)
    names = [tap.name for tap in store.taps if tap.name != "input"]
    before = {name: activations(model, name, x) for name in names}
    probes = LinearProbeCallback()
    compiled(model).fit(x, y, callbacks=[probes], verbose=0)
    assert store.taps == probes.results.taps
    for tap in store.taps:
        if tap.name != "input":
            expected = before[tap.name].reshape(100, -1)
            np.testing.assert_allclose(store.features(tap.name)[:], expected, atol=1e-6)


def test_a_layer_before_and_after_its_activation(tmp_path):
    taps = ["dense", "dense:preactivation"]
    store = extract(tmp_path / "s", model=convnet(), layers=taps)
    before = store.features("dense:preactivation")[:]
    assert (before < 0).any()
    np.testing.assert_allclose(store.features("dense")[:], np.maximum(before, 0), atol=1e-6)


def test_a_coarser_grid(tmp_path):
    model = convnet()
    store = extract(tmp_path / "s", model=model, layers="conv", reduce=SpatialPool(100))
    activation = activations(model, "conv", data()[0])
    side = 8 // int(np.sqrt(store.features("conv").shape[1] / activation.shape[-1]))
    assert side > 1
    blocks = activation.reshape(ROWS, 8 // side, side, 8 // side, side, -1).mean(axis=(2, 4))
    expected = np.moveaxis(blocks, -1, 1).reshape(ROWS, -1)
    np.testing.assert_allclose(store.features("conv")[:], expected, atol=1e-6)


def test_the_last_token_that_is_not_masked(tmp_path):
    tokens = np.array([[3, 1, 2, 0], [1, 2, 0, 0], [2, 2, 1, 3]])
    x = keras.Input((4,), dtype="int64")
    h = keras.layers.Embedding(5, 3, mask_zero=True, name="embedding")(x)
    h = keras.layers.LSTM(3, return_sequences=True, name="lstm")(h)
    model = keras.Model(x, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling1D()(h)))
    store = extract(
        tmp_path / "s", (tokens, np.array([0, 1, 0])), model, layers="lstm", reduce=Token(-1)
    )
    steps = activations(model, "lstm", tokens)
    expected = steps[np.arange(3), [2, 1, 3]]
    np.testing.assert_allclose(store.features("lstm")[:], expected, atol=1e-6)


def test_the_host_is_not_touched(tmp_path):
    model = compiled(convnet())
    before, flags = fingerprint(model), dict(vars(model.layers[1]))
    extract_features(model, data(100), tmp_path / "s", layers="all", verbose=False)
    assert fingerprint(model) == before
    assert vars(model.layers[1]).keys() == flags.keys()


def test_a_host_that_is_not_compiled_nor_functional(tmp_path):
    class Host(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(5, name="hidden")
            self.out = keras.layers.Dense(10, name="out")

        def call(self, x):
            return self.out(self.hidden(keras.ops.reshape(x, (-1, 64))))

    model, (x, y) = Host(), data(60)
    store = extract_features(model, (x, y), tmp_path / "s", layers="hidden", verbose=False)
    expected = x.reshape(60, 64) @ model.hidden.kernel.numpy() + model.hidden.bias.numpy()
    np.testing.assert_allclose(store.features("hidden")[:], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset", "workers", "generator"])
def test_any_data_make_the_same_bytes(kind, whole, tmp_path):
    x, y = data()
    given = {
        "tf.data": lambda: tf.data.Dataset.from_tensor_slices((x, y)).batch(50),
        "PyDataset": Batches,
        "workers": lambda: Batches(workers=2),
        "generator": generator,
    }[kind]()
    extract(tmp_path / "s", given)
    assert contents(tmp_path / "s") == contents(whole)


def killed(path, at, given="None"):
    """Runs an extraction that kills itself while it writes a file whose path has `at` in it."""
    script = f"""
        import os, signal, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from offline.test_extract import data, extract, generator
        from zarr.storage import _local

        original = _local._atomic_write

        def atomic_write(path, *args, **options):
            if {at!r} in str(path):
                path.with_suffix(".0123.partial").write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(path, *args, **options)

        _local._atomic_write = atomic_write
        extract({str(path)!r}, {given})
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert list(path.rglob("*.partial"))


@pytest.mark.slow
def test_killed_while_the_store_is_made_it_starts_anew(whole, tmp_path):
    killed(tmp_path / "s", "tap_001_dense/zarr.json")
    extract(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(whole)


@pytest.mark.parametrize("given", ["arrays", pytest.param("generator", marks=pytest.mark.slow)])
def test_killed_it_goes_on_at_the_last_whole_chunk(given, whole, tmp_path):
    killed(tmp_path / "s", "tap_001_dense/c/1", "generator()" if given == "generator" else "None")
    assert not FeatureStore(tmp_path / "s").complete
    kept = tmp_path / "s" / "tap_001_dense" / "c" / "0" / "0"
    written = kept.stat().st_mtime_ns
    extract(tmp_path / "s", generator() if given == "generator" else None)
    assert contents(tmp_path / "s") == contents(whole)
    assert kept.stat().st_mtime_ns == written  # not computed twice


def test_interrupted_by_hand_it_goes_on(whole, tmp_path):
    with pytest.raises(Exception, match=r"KeyboardInterrupt"):
        extract(tmp_path / "s", generator(stop=1500))
    store = FeatureStore(tmp_path / "s")
    with pytest.raises(ValueError, match="not complete.*Run extract_features again"):
        store.features("dense")
    extract(tmp_path / "s", generator())
    assert contents(tmp_path / "s") == contents(whole)


def test_a_damaged_chunk_is_computed_anew(whole, tmp_path):
    extract(tmp_path / "s")
    file = tmp_path / "s" / "tap_000_input" / "c" / "1" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    extract(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(whole)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["None", "ThreadPoolExecutor(2)"])
def test_a_full_disk_is_a_clear_error_and_the_store_goes_on(engine, whole, tmp_path):
    """The system refuses to write files of more than 200 kB; a chunk of the input has 262 kB."""
    script = f"""
        import resource, sys
        from concurrent.futures import ThreadPoolExecutor
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from offline.test_extract import extract
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        extract({str(tmp_path / "s")!r}, engine={engine})
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.search(r"Could not write chunk [01] of the store", run.stderr)
    assert "goes on from there" in run.stderr
    extract(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(whole)


def test_sample_weights_and_several_targets(tmp_path):
    x, y = data(60)
    weights = np.linspace(0.5, 1, 60).astype("float32")
    target = {"digit": None, "a b": lambda x, y: y % 2, "a_b": lambda x, y: y // 5}
    store = extract(
        tmp_path / "s", (x, y, weights), target=target, num_classes={"a b": 2, "a_b": 2}
    )
    np.testing.assert_array_equal(store.labels("a b"), y % 2)
    np.testing.assert_array_equal(store.labels("a_b"), y // 5)
    np.testing.assert_array_equal(store.sample_weight("digit"), weights)


def test_the_progress_bar_tells_images_per_second(tmp_path, capfd):
    extract(tmp_path / "s", verbose=True)
    shown = capfd.readouterr().err
    assert "images/s" in shown
    assert "2130/2130" in shown


def other_data(x, y):
    return {
        "data length": ((x[:900], y[:900]), {}, "its rows is 2130; received: 900"),
        "first example": ((x[::-1], y), {}, "its first_example is"),
        "labels": ((x, np.r_[y[:-1], (y[-1] + 1) % 10]), {}, "labels of chunk 2 differ"),
        "model": ((x, y), {"model": dense_net(9)}, "its host.sha256 is"),
        "reduction": (
            (x, y),
            {"reduce": "gap"},
            "tap 'input'.reduction is 'Flatten'; received: 'Gl",
        ),
        "taps": ((x, y), {"layers": "dense"}, "its taps are input, dense; received: dense"),
        "dtype": ((x, y), {"dtype": "float16"}, "its dtype is 'float32'; received: 'float16'"),
    }


@pytest.mark.parametrize("case", other_data(*data()))
def test_another_thing_under_the_same_path_is_refused(case, whole):
    before = contents(whole)
    given, options, message = other_data(*data())[case]
    with pytest.raises(ValueError, match="of something else|of other data") as raised:
        extract(whole, given, **options)
    assert message in str(raised.value)
    assert contents(whole) == before


def bad_input():
    x, y = data(60)
    endless = tf.data.Dataset.from_tensor_slices((x, y)).batch(20).repeat()
    return {
        "empty": ((x[:0], y[:0]), {}, "data are empty"),
        "endless": (endless, {}, r"data are endless.*take"),
        "no labels": (x, {}, "Probes need labels"),
        "label out of range": ((x, y + 1), {"num_classes": 10}, "integers from 0 to 9"),
        "dtype": ((x, y), {"dtype": "int8"}, "Expected dtype to be one of"),
        "layer": ((x, y), {"layers": "dens"}, "Did you mean 'dense'"),
    }


@pytest.mark.parametrize("case", bad_input())
def test_bad_input(case, tmp_path):
    given, options, message = bad_input()[case]
    with pytest.raises(ValueError, match=message):
        extract(tmp_path / "s", given, **options)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="Choose another path"):
        extract(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
