"""`FeatureStore`: what is on disk, how it is read, what is refused."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
import xarray
from hosts import dense_net

from keras_probes import FeatureStore, extract_features
from keras_probes.probes.tasks import Classification

ROWS = 2600  # three chunks, the last one not full


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of three taps, its path, and the features as Keras computes them."""
    rng = np.random.default_rng(0)
    x, y = rng.random((ROWS, 8, 8, 1), "float32"), rng.integers(0, 10, ROWS)
    model = dense_net()
    path = tmp_path_factory.mktemp("stores") / "features"
    extract_features(model, (x, y), path, layers=["input", "dense"], verbose=False)
    hidden = keras.Model(model.inputs, model.get_layer("dense").output)
    return path, x.reshape(ROWS, -1), hidden.predict(x, batch_size=32, verbose=0), y


@pytest.fixture
def damaged(made, tmp_path):
    """A copy to do harm to."""
    copy = tmp_path / "copy"
    for file in made[0].rglob("*"):
        if file.is_file():
            (copy / file.relative_to(made[0])).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(made[0])).write_bytes(file.read_bytes())
    return copy


def test_features_and_labels_are_those_of_the_host(made):
    path, x, hidden, y = made
    store = FeatureStore(path)
    assert [tap.name for tap in store.taps] == ["input", "dense"]
    assert len(store) == ROWS
    assert store.complete
    np.testing.assert_array_equal(store.features("input")[:], x)
    np.testing.assert_array_equal(np.asarray(store.features("dense")), hidden)
    np.testing.assert_array_equal(store.labels(), y)
    assert store.sample_weight() is None
    assert store.targets == {None: Classification(10)}
    assert store.host["class"] == "Sequential"
    assert set(store.versions) == {"keras_probes", "keras", "tensorflow", "numpy", "zarr"}
    assert "2,600 rows" in repr(store)


@pytest.mark.parametrize(
    "rows",
    [0, -1, slice(None), slice(1000, 1100), slice(-5, None), slice(0, 2600, 700),
     [5, 1, 2000, -1], np.arange(ROWS) % 900 == 0],
    ids=str,
)  # fmt: skip
def test_rows_are_read_as_numpy_has_it(made, rows):
    path, x, *_ = made
    np.testing.assert_array_equal(FeatureStore(path).features("input")[rows], x[rows])


def test_others_read_it(made):
    path, x, _, y = made
    dataset = xarray.open_zarr(path, consolidated=False)
    np.testing.assert_array_equal(dataset["tap_000_input"], x)
    np.testing.assert_array_equal(dataset["labels"], y)
    assert dataset["tap_001_dense"].dims == ("row", "tap_001_dense_feature")
    assert dataset["tap_001_dense"].attrs["tap"] == "dense"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tmp_path):
    x = np.random.default_rng(0).normal(0, 3, (50, 8, 8, 1)).astype("float32")
    store = extract_features(
        dense_net(), (x, np.zeros(50)), tmp_path / "s", layers="input", dtype=dtype, verbose=False
    )
    expected = tf.cast(x.reshape(50, -1), dtype).numpy()
    read = store.features("input")[:]
    assert read.dtype == expected.dtype
    np.testing.assert_array_equal(read.astype("float32"), expected.astype("float32"))


def test_a_chunk_of_nothing_but_nan_is_there(tmp_path):
    x = np.full((20, 8, 8, 1), np.nan, "float32")
    store = extract_features(
        dense_net(), (x, np.zeros(20)), tmp_path / "s", layers="input", verbose=False
    )
    assert store.complete
    assert np.isnan(store.features("input")[:]).all()


def test_a_random_subset_is_kept_beside_its_features(tmp_path):
    x = np.random.default_rng(0).random((10, 8, 8, 1), "float32")
    store = extract_features(
        dense_net(), (x, np.zeros(10)), tmp_path / "s", layers="input", reduce="random",
        verbose=False,
    )  # fmt: skip
    kept = store.kept("input")
    np.testing.assert_array_equal(store.features("input")[:], x.reshape(10, -1)[:, kept])


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_chunk_is_named_and_never_used(damaged, made, harm):
    file = damaged / "tap_001_dense" / "c" / "1" / "0"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content if harm == "flip" else content[:-100])
    features = FeatureStore(damaged).features("dense")
    np.testing.assert_array_equal(features[:1024], made[2][:1024])
    np.testing.assert_array_equal(features[2048:], made[2][2048:])
    with pytest.raises(ValueError, match=r"Chunk 1 of tap 'dense', rows 1024 to 2047, is damaged"):
        features[:]


def test_a_missing_chunk_is_named_and_never_filled_in(damaged):
    store = FeatureStore(damaged)
    features = store.features("dense")
    (damaged / "tap_001_dense" / "c" / "2" / "0").unlink()
    with pytest.raises(ValueError, match=r"Chunk 2 of tap 'dense', rows 2048 to 2599, is missing"):
        features[-1]
    assert not store.complete
    with pytest.raises(ValueError, match="1 chunks of 1024 rows are missing"):
        FeatureStore(damaged).features("input")


def test_what_is_no_store(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="is not a feature store"):
            FeatureStore(path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="is not a feature store"):
        FeatureStore(tmp_path / "file")


def test_a_newer_format(damaged):
    group = json.loads((damaged / "zarr.json").read_text())
    group["attributes"]["keras_probes"]["format"] = 99
    (damaged / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(ValueError, match="format 99 .* Update keras_probes"):
        FeatureStore(damaged)


def test_unknown_names(made):
    store = FeatureStore(made[0])
    with pytest.raises(ValueError, match="'conv'.*'input', 'dense'"):
        store.features("conv")
    with pytest.raises(ValueError, match="Unknown target"):
        store.labels("digit")
