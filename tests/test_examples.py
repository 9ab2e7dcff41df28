"""Examples that are read by number: batches, folders of images, and who takes them."""

import keras
import numpy as np
import pytest
from hosts import activations, compiled, dense_net

from keras_probes import Examples, LinearProbeCallback, extract_features, image_folder


def test_batches_are_made_of_examples():
    items = [({"a": np.full(2, i), "b": np.array(-i)}, i % 3, i / 10) for i in range(7)]
    data = Examples(items, batch_size=3)
    assert len(data) == 3
    x, y, weight = data[2]
    np.testing.assert_array_equal(x["a"], [[6, 6]])
    np.testing.assert_array_equal(data[1][0]["b"], [-3, -4, -5])
    assert (list(y), list(weight)) == ([0], [0.6])


def test_x_alone_and_loaded():
    data = Examples(range(5), lambda i: np.full((2,), i, "float32"), batch_size=4)
    assert isinstance(data[1], tuple)
    np.testing.assert_array_equal(data[1][0], [[4, 4]])


def test_only_the_examples_of_a_batch_are_read():
    read = []

    def load(item):
        read.append(item)
        return np.zeros(1), item

    Examples(list(range(100)), load, batch_size=8)[2]
    assert read == list(range(16, 24))


def test_fit_and_probes_take_them(digits, tmp_path):
    (x, y), _ = digits
    names = [str(i) for i in range(10)]
    data = Examples(range(100), lambda i: (x[i], y[i]), class_names=names)
    probes = LinearProbeCallback("dense", data=data)
    model = compiled(dense_net())
    model.fit(data, verbose=0, callbacks=[probes])
    assert probes.results.measured(split="train")["n"]["dense"] == 100
    store = extract_features(model, data, tmp_path / "s", layers="dense", verbose=False)
    assert store.class_names == names
    expected = activations(model, "dense", x[:100])
    np.testing.assert_allclose(store.features("dense")[:], expected, atol=1e-6)
    np.testing.assert_array_equal(store.labels(), y[:100])


def test_a_source_of_grain():
    grain = pytest.importorskip("grain")
    source = grain.sources.RangeDataSource(0, 10, 1)
    data = Examples(source, lambda i: (np.full(3, i), i), batch_size=4)
    np.testing.assert_array_equal(data[2][1], [8, 9])


def halved(image):
    return image / 2


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_those_that_keras_reads(channels, tmp_path):
    rng = np.random.default_rng(0)
    for name, count, ending in (("cats", 3, "png"), ("ants", 2, "jpg"), ("empty", 0, "png")):
        (tmp_path / name).mkdir()
        for i in range(count):
            image = rng.integers(0, 255, (12, 9 + i, 3))
            keras.utils.save_img(tmp_path / name / f"{i}.{ending}", image, scale=False)
    (tmp_path / "cats" / "notes.txt").write_text("x")
    mode = {1: "grayscale", 3: "rgb"}[channels]
    expected = keras.utils.image_dataset_from_directory(
        tmp_path, shuffle=False, image_size=(8, 6), batch_size=2, color_mode=mode, verbose=False
    )
    data = image_folder(tmp_path, (8, 6), channels=channels, batch_size=2, prepare=halved)
    assert data.class_names == expected.class_names == ["ants", "cats", "empty"]
    assert len(data) == len(expected) == 3
    for (x, y), (of_keras, labels) in zip((data[i] for i in range(3)), expected, strict=True):
        assert x.dtype == "float32"
        np.testing.assert_allclose(2 * x, of_keras, atol=1e-4)
        np.testing.assert_array_equal(y, labels)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((i for i in range(3)), TypeError, "Expected `items` with a length.*generator"),
        ([], ValueError, "data are empty"),
    ],
)
def test_bad_items(given, error, message):
    with pytest.raises(error, match=message):
        Examples(given)


def test_a_folder_without_images(tmp_path):
    with pytest.raises(ValueError, match="Expected a folder for each class, with images in it"):
        image_folder(tmp_path, (8, 8))
