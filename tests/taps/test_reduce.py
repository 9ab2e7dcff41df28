"""Reductions, against NumPy, and as Keras layers."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_probes import Flatten, GlobalAverage, RandomFeatures, SpatialPool, Token
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


def adaptive_average(x, grid):
    """Cells by hand, channels last: (batch, *sizes, channels) -> (batch, channels, *grid)."""
    out = np.zeros((len(x), x.shape[-1], *grid))
    for cell in np.ndindex(*grid):
        here = [
            slice(c * size // cells, int(np.ceil((c + 1) * size / cells)))
            for c, size, cells in zip(cell, x.shape[1:-1], grid, strict=True)
        ]
        part = x[:, *here]
        out[:, :, *cell] = part.mean(axis=tuple(range(1, part.ndim - 1)))
    return out.reshape(len(x), -1)


@pytest.mark.parametrize(
    ("shape", "budget", "grid"),
    [
        ((7, 6, 5), 1000, (7, 6)),
        ((7, 6, 5), 209, (6, 6)),
        ((7, 6, 5), 50, (3, 3)),
        ((7, 6, 5), 5, (1, 1)),
        ((9, 4), 12, (3,)),
        ((4, 3, 5, 2), 60, (3, 3, 3)),
        ((6,), 6, ()),
    ],
)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_spatial_pool_is_the_finest_grid_within_its_budget(shape, budget, grid, data_format):
    x = RNG.normal(size=(3, *shape)).astype("float32")
    first = data_format == "channels_first" and len(shape) > 1
    layer = SpatialPool(budget, data_format)
    given = np.moveaxis(x, -1, 1) if first else x
    np.testing.assert_allclose(layer(given), adaptive_average(x, grid), rtol=1e-5, atol=1e-6)
    features = layer.compute_output_shape((None, *given.shape[1:]))[1]
    assert features == shape[-1] * np.prod(grid) <= budget


def test_spatial_pool_honours_a_sequence_mask():
    x = RNG.normal(size=(3, 4, 6)).astype("float32")
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    got = np.asarray(SpatialPool(12)(x, mask=mask)).reshape(3, 6, 2)
    np.testing.assert_allclose(got[0, :, 0], x[0, :2].mean(0), rtol=1e-5)
    np.testing.assert_allclose(got[0, :, 1], x[0, 2], rtol=1e-5)
    np.testing.assert_allclose(got[1, :, 0], x[1, 0], rtol=1e-5)
    np.testing.assert_array_equal(got[1, :, 1], 0.0)
    np.testing.assert_array_equal(got[2], 0.0)


def test_spatial_pool_takes_the_layers_own_data_format():
    conv = layers.Conv2D(5, 3, data_format="channels_first", name="conv")
    layer = reduced((None, 5, 8, 9), SpatialPool(50), layer=conv)
    assert layer.compute_output_shape((None, 5, 8, 9)) == (None, 5 * 9)


def test_token_takes_a_step():
    x = RNG.normal(size=(3, 4, 6)).astype("float16")
    for index in (0, 2, -1, -4):
        np.testing.assert_array_equal(Token(index)(x), x[:, index].astype("float32"))
    deep = RNG.normal(size=(3, 4, 2, 3)).astype("float32")
    np.testing.assert_array_equal(Token(1)(deep), deep[:, 1].reshape(3, 6))


def test_token_counts_back_from_the_last_unmasked_step():
    x = RNG.normal(size=(4, 4, 6)).astype("float32")
    mask = np.array([[1, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
    last = x[np.arange(4), [2, 2, 3, 0]]
    np.testing.assert_array_equal(Token(-1)(x, mask=mask), last)
    np.testing.assert_array_equal(Token(-2)(x, mask=mask), x[np.arange(4), [1, 1, 2, 0]])
    np.testing.assert_array_equal(Token(1)(x, mask=mask), x[:, 1])
    masked = layers.Embedding(5, 6, mask_zero=True)(np.array([[3, 1, 0], [2, 2, 2]]))
    np.testing.assert_array_equal(Token(-1)(masked), np.asarray(masked)[np.arange(2), [1, 2]])


def test_token_serves_sequences_of_any_length():
    assert reduced((None, None, 6), Token(-1)).compute_output_shape((None, None, 6)) == (None, 6)


@pytest.mark.parametrize(
    ("shape", "reduction", "message"),
    [
        ((None, 8, 8, 20), SpatialPool(10), "'conv'.*20 channels. Raise max_features"),
        ((None, None, 20), SpatialPool(100), "sizes that differ"),
        ((None, 7), Token(0), "'conv'.*a step of a sequence"),
        ((None, 7, 5), Token(7), "There is no step 7. Received: 7 steps"),
        ((None, 7, None), Token(0), "sizes that differ"),
    ],
)
def test_reductions_that_do_not_fit_a_tap(shape, reduction, message):
    with pytest.raises(ValueError, match=message):
        reduced(shape, reduction)


@pytest.mark.parametrize("make", [lambda: SpatialPool(0), lambda: Token(0.5), lambda: Token(True)])
def test_reductions_refuse_what_is_no_number(make):
    with pytest.raises(ValueError, match="integer"):
        make()


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


def test_taps_of_one_shape_are_seen_at_the_same_places_and_the_seed_decides():
    def kept(name, seed, reduce="random", size=50):
        layer = reduction_for(tap((None, 50, size), name), reduce, seed=seed, name="r")
        layer.build((None, 50, size))
        return np.asarray(layer.indices).tolist()

    assert kept("a", 0) == kept("b", 0)
    assert kept("a", 0) != kept("a", 1)
    assert kept("a", 0) != kept("a", 0, size=60)
    assert kept("a", 0, RandomFeatures(9)) == kept("b", 0, RandomFeatures(9))
    assert kept("a", 0, RandomFeatures(9, seed=5)) == kept("b", 1, RandomFeatures(9, seed=5))
    assert kept("a", 0, RandomFeatures(9, seed=5)) != kept("a", 0, RandomFeatures(9))


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
        ((None, None, 4), "random", ValueError, ["'conv'", "(None, None, 4)", '"gap"']),
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
