"""Reductions, against NumPy, and as Keras layers."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_probes import Flatten, GlobalAverage, RandomFeatures
from keras_probes.taps.graph import Site, Tap
from keras_probes.taps.reduce import reduction_for

RNG = np.random.default_rng(0)


def tap(shape, name="conv", layer=None):
    return Tap(name, name, Site(layer or layers.ReLU(name=name), "output"), shape, "float32", 1)


def reduced(shape, reduce, **options):
    return reduction_for(tap(shape, **options), reduce, seed=0, name="r")


@pytest.mark.parametrize("shape", [(5,), (6, 5), (4, 6, 5), (3, 4, 6, 5)])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_global_average(shape, data_format):
    x = RNG.normal(size=(7, *shape)).astype("float32")
    layer = GlobalAverage(data_format)
    first = data_format == "channels_first" and len(shape) > 1
    axes = tuple(range(2, x.ndim)) if first else tuple(range(1, x.ndim - 1))
    expected = x.mean(axes) if len(shape) > 1 else x
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert layer.compute_output_shape((None, *shape)) == (None, expected.shape[1])


def test_global_average_honours_a_sequence_mask():
    tokens = np.array([[3, 1, 0, 0], [2, 2, 2, 0], [0, 0, 0, 0]])
    embedded = layers.Embedding(5, 6, mask_zero=True)(tokens)
    got = np.asarray(GlobalAverage()(embedded))
    values = np.asarray(embedded)
    np.testing.assert_allclose(got[0], values[0, :2].mean(0), rtol=1e-6)
    np.testing.assert_allclose(got[1], values[1, :3].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(got[2], np.zeros(6))  # nothing but padding


def test_global_average_adds_up_in_float32():
    x = np.full((1, 5000, 1), 1.001, "float16")
    assert abs(float(GlobalAverage()(x)[0, 0]) - float(x[0, 0, 0])) < 1e-5


def test_global_average_takes_the_layers_own_data_format():
    conv = layers.Conv2D(5, 3, data_format="channels_first", name="conv")
    layer = reduced((None, 5, 8, 9), "gap", layer=conv)
    assert layer.compute_output_shape((None, 5, 8, 9)) == (None, 5)


def test_random_features_is_a_fixed_subset_without_replacement():
    x = RNG.normal(size=(4, 5, 6, 7)).astype("float32")
    layer = RandomFeatures(50, seed=3)
    got = np.asarray(layer(x))
    kept = np.asarray(layer.indices)
    assert len(set(kept)) == 50
    np.testing.assert_array_equal(got, x.reshape(4, -1)[:, kept])
    np.testing.assert_array_equal(got, RandomFeatures(50, seed=3)(x))
    assert not np.array_equal(got, RandomFeatures(50, seed=4)(x))


def test_random_features_keeps_all_of_a_small_tap():
    x = RNG.normal(size=(4, 3, 5)).astype("float32")
    np.testing.assert_array_equal(RandomFeatures(50)(x), x.reshape(4, 15))


def test_random_features_is_saved_with_its_subset(tmp_path):
    model = keras.Sequential([keras.Input((5, 6, 7)), RandomFeatures(20, seed=9)])
    x = RNG.normal(size=(4, 5, 6, 7)).astype("float32")
    model.layers[-1].indices.assign(np.arange(20)[::-1])  # not what the seed would draw
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "uint8", "int32"])
@pytest.mark.parametrize("layer", [Flatten(), RandomFeatures(4), GlobalAverage()])
def test_features_are_float32(layer, dtype):
    x = keras.ops.cast(RNG.integers(0, 9, (3, 2, 4)), dtype)
    assert keras.backend.standardize_dtype(layer(x).dtype) == "float32"


def test_auto_flattens_up_to_1000_features_and_draws_1000_of_more():
    assert isinstance(reduced((None, 10, 10, 10), "auto"), Flatten)
    layer = reduced((None, 10, 10, 11), "auto")
    assert isinstance(layer, RandomFeatures)
    assert layer.compute_output_shape((None, 10, 10, 11)) == (None, 1000)


def test_each_tap_has_its_own_subset_and_the_seed_decides():
    def kept(name, seed, reduce="random"):
        layer = reduction_for(tap((None, 50, 50), name), reduce, seed=seed, name="r")
        layer.build((None, 50, 50))
        return set(np.asarray(layer.indices))

    assert kept("a", 0) == kept("a", 0)
    assert kept("a", 0) != kept("b", 0)
    assert kept("a", 0) != kept("a", 1)
    assert kept("a", 0, RandomFeatures(9)) != kept("b", 0, RandomFeatures(9))
    assert kept("a", 0, RandomFeatures(9, seed=5)) == kept("b", 1, RandomFeatures(9, seed=5))


def test_a_mapping_gives_the_first_glob_that_fits():
    mapping = {"conv*": "gap", "*": RandomFeatures(7)}
    assert isinstance(reduced((None, 9, 9, 3), mapping, name="conv1"), GlobalAverage)
    assert isinstance(reduced((None, 9, 9, 3), mapping, name="dense"), RandomFeatures)
    assert isinstance(reduced((None, 9, 9, 3), {"x": "gap"}, name="dense"), Flatten)


def test_any_keras_layer_will_do():
    layer = reduced((None, 9, 9, 3), layers.GlobalMaxPooling2D())
    assert isinstance(layer, layers.GlobalMaxPooling2D)
    assert layer.name == "r"


@pytest.mark.parametrize(
    ("shape", "reduce", "error", "parts"),
    [
        ((None, 9), "gpa", ValueError, ["Unknown reduction", "'gpa'", "'gap'"]),
        ((None, 9), 7, TypeError, ["Expected `reduce`", "Received: reduce=7"]),
        ((None, None, 4), "auto", ValueError, ["'conv'", "(None, None, 4)", '"gap"']),
        ((None, None, 4), "flatten", ValueError, ["Flatten", '"gap"']),
        ((None, 4, None), "gap", ValueError, ["(None, 4, None)"]),
        (None, "gap", ValueError, ["None"]),
        (
            (None, 9, 9, 3),
            layers.MaxPooling2D(),
            ValueError,
            ["MaxPooling2D", "(batch, n_features)"],
        ),
    ],
)
def test_errors_say_what_to_do(shape, reduce, error, parts):
    with pytest.raises(error) as raised:
        reduced(shape, reduce)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("n", [0, -1, 2.5])
def test_random_features_wants_a_positive_number(n):
    with pytest.raises(ValueError, match="positive integer"):
        RandomFeatures(n)


def test_global_average_knows_its_data_formats():
    with pytest.raises(ValueError, match="channels_frist"):
        GlobalAverage("channels_frist")
