"""A label at each position, in a real fit: against masks and grids worked out by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hosts import MODES
from keras import layers
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score

from keras_probes import LinearProbeCallback, ProbeResults, extract_features, fit_probes
from keras_probes.offline import fit
from keras_probes.probes.targets import MOST_POSITIONS, Positions

SIZE, N, VAL = 8, 120, 40


def squares(seed=0):
    """Images of a square each, and which pixels belong to it; the first rows have no label."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.3, (N + VAL, SIZE, SIZE, 1)).astype("float32")
    y = np.zeros((N + VAL, SIZE, SIZE), "int32")
    for image, mask in zip(x, y, strict=True):
        kind, (row, column) = rng.integers(1, 3), rng.integers(0, SIZE - 3, 2)
        image[row : row + 4, column : column + 4, 0] += kind
        mask[row : row + 4, column : column + 4] = kind
    y[:, 0] = -1
    return (x[:N], y[:N]), (x[N:], y[N:])


def unet(loss=None, activation="softmax", outputs=3):
    """A small host with a way down, a way up and a skip."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIZE, SIZE, 1))
    fine = layers.Conv2D(6, 3, padding="same", activation="relu", name="fine")(inputs)
    down = layers.MaxPooling2D(name="down")(fine)
    coarse = layers.Conv2D(5, 3, padding="same", activation="relu", name="coarse")(down)
    up = layers.UpSampling2D(name="up")(coarse)
    both = layers.Concatenate(name="both")([fine, up])
    model = keras.Model(inputs, layers.Conv2D(outputs, 1, activation=activation, name="out")(both))
    model.compile("adam", loss or keras.losses.SparseCategoricalCrossentropy(ignore_class=-1))
    return model


def by_hand(probes, model, x, y, tap):
    """Labels and answers of every position, with the features of the cell it falls into."""
    layer = model.inputs if tap == "input" else model.get_layer(tap).output
    maps = x if tap == "input" else keras.Model(model.inputs, layer).predict(x, verbose=0)
    kernel, bias = probes.weights(tap)
    row, column = np.indices((SIZE, SIZE))
    height, width = maps.shape[1:3]
    features = maps[:, row * height // SIZE, column * width // SIZE]
    answers = (features.astype("float64") @ kernel + bias).argmax(axis=-1)
    return y[y >= 0], answers[y >= 0]


@pytest.mark.parametrize("mode", ["shared", "isolated"])
def test_every_pixel_is_an_example(mode, tmp_path):
    (x, y), (x_val, y_val) = squares()
    model = unet()
    probes = LinearProbeCallback("all", mode=mode, metrics=["error", "mean_iou"])
    history = model.fit(
        x, y, 32, 2, validation_data=(x_val, y_val), callbacks=[probes], verbose=0
    ).history
    assert MOST_POSITIONS == SIZE**2  # so that all of them are used
    for tap in ("input", "fine", "coarse", "up"):
        labels, answers = by_hand(probes, model, x_val, y_val, tap)
        error = history[f"val_probe_error/{tap}"][-1]
        assert error == pytest.approx(np.mean(labels != answers), abs=1e-3), tap
        iou = history[f"val_probe_mean_iou/{tap}"][-1]
        expected = jaccard_score(labels, answers, average="macro", zero_division=0)
        assert iou == pytest.approx(expected, abs=5e-3), tap
    measured = probes.results.measured("error")
    assert set(measured["n"]) == {VAL * SIZE * (SIZE - 1)}
    assert set(measured["unlabelled"]) == {VAL * SIZE}
    assert (measured["certificate"] < 1e-2).all()
    # Pixels of an image go together: the interval and the test are of images.
    naive = np.sqrt(measured["value"] * (1 - measured["value"]) / measured["n"])
    assert ((measured["ci_high"] - measured["ci_low"]) / 3.92 > naive)["input"]
    found = probes.results.compare("input", "fine")
    assert (found.n, found.test) == (VAL, "paired t-test")
    probes.save(tmp_path / "p")
    again = LinearProbeCallback.load(tmp_path / "p")
    logs = model.evaluate(x_val, y_val, callbacks=[again], verbose=0, return_dict=True)
    assert logs["probe_error/fine"] == history["val_probe_error/fine"][-1]
    with pytest.raises(ValueError, match="no sibling model of probes at positions"):
        _ = probes.probe_model


def test_offline_too_and_attached_they_answer_at_each_position(tmp_path):
    (x, y), (x_val, y_val) = squares()
    model = unet()
    train = extract_features(
        model, (x, y), tmp_path / "t", layers=["fine", "coarse"], verbose=False
    )
    val = extract_features(
        model, (x_val, y_val), tmp_path / "v", layers=["fine", "coarse"], verbose=False
    )
    assert (train.rows_per_example, len(train)) == (64, 64 * N)
    results = fit_probes(train, validation=None, test=val, l2=1e-5, verbose=False)
    fine = keras.Model(model.inputs, model.get_layer("fine").output)
    known = y >= 0
    theirs = LogisticRegression(C=1e5 / known.sum(), max_iter=10_000)
    theirs.fit(fine.predict(x, verbose=0)[known], y[known])
    expected = 1 - theirs.score(fine.predict(x_val, verbose=0)[y_val >= 0], y_val[y_val >= 0])
    measured = results.measured("error")
    assert measured["value"]["fine"] == pytest.approx(expected, abs=5e-3)
    assert (measured["ci_low"] < measured["value"]).all()
    answers = results.attach(model)(x_val[:3])
    assert answers["fine"].shape == (3, 8, 8, 3)
    assert answers["coarse"].shape == (3, 4, 4, 3)
    wrong = np.asarray(answers["fine"]).argmax(-1) != y_val[:3]
    assert wrong[y_val[:3] >= 0].mean() < 2 * expected + 0.1
    # Rows of one image stay together when some are kept apart.
    places = fit._splits(train, 0.25, None, 0)["validation"].places
    assert set(np.bincount(places // 64)) == {0, 64}
    results.save(tmp_path / "r")
    assert str(ProbeResults.load(tmp_path / "r")) == str(results)


def tagging():
    """Sequences of tokens, padded, and a tag for each."""
    rng = np.random.default_rng(0)
    x = rng.integers(1, 30, (200, 10))
    y = (x // 10).astype("int32")
    for row, length in enumerate(rng.integers(3, 10, 200)):
        x[row, length:] = 0
        y[row, length:] = -1
    inputs = keras.Input((10,), dtype="int32")
    embedded = layers.Embedding(30, 6, mask_zero=True, name="embedding")(inputs)
    hidden = layers.LSTM(8, return_sequences=True, name="lstm")(embedded)
    model = keras.Model(inputs, layers.Dense(3, name="out")(hidden))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    model.compile("adam", loss)
    return model, x, y


def test_every_token_is_an_example():
    model, x, y = tagging()
    probes = LinearProbeCallback()
    model.fit(x, y, 32, 2, validation_split=0.25, callbacks=[probes], verbose=0)
    measured = probes.results.measured("error")
    assert set(measured["n"]) == {np.sum(y[150:] >= 0)}
    assert measured["value"]["embedding"] < 0.1
    assert "input" not in measured.index
    assert list(measured.index) == ["embedding", "lstm", "out"]


def test_weights_leave_positions_out():
    model, x, y = tagging()
    probes = LinearProbeCallback()
    weights = (x > 0).astype("float32")
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, np.maximum(y, 0), 32, 1, sample_weight=weights, callbacks=[probes], verbose=0)
    assert set(probes.results.measured("error")["n"]) == {int(weights.sum())}


def test_numbers_and_several_labels_at_each_position():
    (x, y), _ = squares()
    depth = (x * 2 + 1).astype("float32")
    probes = LinearProbeCallback(["input", "fine"], metrics=["error", "mse"])
    options = {"validation_data": (x, depth), "callbacks": [probes], "verbose": 0}
    unet("mse", None, 1).fit(x, depth, 32, 1, **options)
    assert probes.results.measured("error")["value"]["input"] < 1e-3
    both = np.stack([y > 0, y > 1], axis=-1).astype("float32")
    probes = LinearProbeCallback(["input", "fine"])
    unet("binary_crossentropy", "sigmoid", 2).fit(x, both, 32, 2, callbacks=[probes], verbose=0)
    measured = probes.results.measured("error")
    assert measured["value"]["fine"] < measured["majority"]["fine"]


def test_taps_without_positions_are_left_out_or_refused():
    (x, y), _ = squares()
    inputs = keras.Input((SIZE, SIZE, 1))
    pooled = layers.GlobalAveragePooling2D(name="pooled")(inputs)
    back = layers.Reshape((SIZE, SIZE, 1), name="back")(layers.Dense(64, name="wide")(pooled))
    model = keras.Model(inputs, layers.Conv2D(3, 1, activation="softmax", name="out")(back))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(ignore_class=-1))
    probes = LinearProbeCallback()
    model.fit(x, y, 32, 1, callbacks=[probes], verbose=0)
    assert list(probes.results.measured("error").index) == ["input", "out"]
    assert set(probes.results.left_out) == {"pooled", "wide"}
    assert "positions" in probes.results.left_out["wide"]
    for layer, message in (("wide", "as many, beside batch and channels"), ("pooled", "as many")):
        with pytest.raises(ValueError, match=message):
            model.fit(x, y, 32, 1, callbacks=[LinearProbeCallback(layer)], verbose=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "gap"}, "the features are the channels"),
        ({"target": {"a": None, "b": lambda x, y: y[:, 1, 1] > 0}, "num_classes": {"b": 2}},
         "Use a callback for each"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(options, message):
    (x, y), _ = squares()
    with pytest.raises(ValueError, match=message):
        unet().fit(x, y, 32, 1, callbacks=[LinearProbeCallback("fine", **options)], verbose=0)


def test_labels_of_positions_that_nothing_tells():
    (x, y), _ = squares()
    model = unet(loss=lambda y, u: tf.reduce_mean(u), outputs=1)
    flat = keras.Model(model.inputs, layers.GlobalAveragePooling2D()(model.output))
    flat.compile("adam", lambda y, u: tf.reduce_mean(u))
    with pytest.raises(ValueError, match='Pass task="positions"'):
        flat.fit(x, y, 32, 1, callbacks=[LinearProbeCallback("fine")], verbose=0)
    probes = LinearProbeCallback("fine", task="positions")
    flat.fit(x, y, 32, 1, callbacks=[probes], verbose=0)
    assert set(probes.results.measured("error")["n"]) == {N * SIZE * (SIZE - 1)}


@pytest.mark.parametrize("sizes", [(5,), (40, 30), (None, 30)])
def test_positions_are_drawn_by_seed(sizes):
    axes = len(sizes)
    labels = tf.zeros((3, *(size or 50 for size in sizes)))
    spec = tf.TensorSpec((None, *sizes))
    cells, grid = Positions.of(spec, axes, 1).places(labels)
    expected = min(np.prod(labels.shape[1:]), MOST_POSITIONS)
    assert cells.shape == (3, expected, axes)
    np.testing.assert_array_equal(grid, labels.shape[1:])
    assert np.all((cells >= 0) & (cells < grid))
    np.testing.assert_array_equal(Positions.of(spec, axes, 1).places(labels)[0], cells)
    if expected == MOST_POSITIONS:
        assert np.any(Positions.of(spec, axes, 2).places(labels)[0] != cells)
        assert np.any(cells[0] != cells[1])
        whole = Positions.of(spec, axes, 1)
        many = tf.tile(labels[:1], (400, *[1] * axes))
        middle = np.asarray(whole.places(many)[0]).reshape(-1, axes).mean(axis=0)
        np.testing.assert_allclose(middle, (np.array(many.shape[1:]) - 1) / 2, rtol=0.03)


def test_compiled_by_xla():
    (x, y), validation = squares()
    measured = []
    for jit in (False, True):
        model = unet()
        loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)
        model.compile("adam", loss, jit_compile=jit)
        probes = LinearProbeCallback(["input", "fine", "coarse"], baselines=["shuffled"])
        model.fit(x, y, 40, 2, validation_data=validation, callbacks=[probes], verbose=0)
        measured.append(probes.results.measured("error")["value"])
    np.testing.assert_allclose(*measured, atol=0.02)


def test_summary_says_what_is_asked_before_training():
    text = []
    LinearProbeCallback().summary(unet(), text.append)
    assert "AtPositions" in text[0]
    assert "Asked: classification, 3 classes at each position." in text
    text.clear()
    model, _, _ = tagging()
    LinearProbeCallback().summary(model, text.append)
    assert "Asked: classification, 3 classes at each position." in text


def test_targets_on_grids_of_different_sizes():
    (x, y), _ = squares()
    inputs = keras.Input((SIZE, SIZE, 1))
    fine = layers.Conv2D(6, 3, padding="same", activation="relu", name="fine")(inputs)
    coarse = layers.MaxPooling2D(2, name="coarse")(fine)
    outputs = {
        "small": layers.Conv2D(3, 1, activation="softmax", name="small")(coarse),
        "large": layers.Conv2D(3, 1, activation="softmax", name="large")(fine),
    }
    model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)
    model.compile("adam", {"small": loss, "large": loss})
    labels = {"small": y[:, ::2, ::2], "large": y}
    for target in ({"a": "small", "b": "large"}, {"b": "large", "a": "small"}):
        probes = LinearProbeCallback(["fine", "coarse"], target=target, baselines=["shuffled"])
        model.fit(x, labels, 40, 1, callbacks=[probes], verbose=0)
        assert (probes.results.measured(target="a", split="train")["n"] > 0).all()


def test_a_label_of_the_whole_sequence_is_no_label_of_positions():
    rng = np.random.default_rng(0)
    inputs = keras.Input((20, 3))
    model = keras.Model(inputs, layers.Dense(16, name="out")(inputs))
    model.compile("adam", lambda y, u: tf.reduce_mean(u))
    y = np.eye(10)[rng.integers(0, 10, 64)]
    probes = LinearProbeCallback("out", reduce="gap")
    model.fit(rng.normal(size=(64, 20, 3)), y, 32, 1, callbacks=[probes], verbose=0)
    assert set(probes.results.measured("error")["n"]) == {64}


@pytest.mark.parametrize("mode", ["shared", "isolated"])
def test_padding_that_a_mask_knows_of_is_left_out(mode, tmp_path):
    model, x, y = tagging()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    probes = LinearProbeCallback(mode=mode)
    labels = np.maximum(y, 0)
    model.fit(x, labels, 32, 1, callbacks=[probes], verbose=0)
    measured = probes.results.measured("error")
    assert set(measured["n"]) == {np.count_nonzero(x)}
    assert set(measured["unlabelled"]) == {0}
    store = extract_features(model, (x, labels), tmp_path / "s", layers=["lstm"], verbose=False)
    np.testing.assert_array_equal(store.labels().reshape(x.shape) >= 0, x > 0)


def test_validation_of_another_size_is_of_as_many_examples():
    (x, y), (x_val, y_val) = squares()
    inputs = keras.Input((None, None, 1))
    fine = layers.Conv2D(6, 3, padding="same", activation="relu", name="fine")(inputs)
    model = keras.Model(inputs, layers.Conv2D(3, 1, activation="softmax", name="out")(fine))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(ignore_class=-1))
    probes = LinearProbeCallback(["input", "fine"])
    small = x[:, :6, :6], y[:, :6, :6]
    model.fit(*small, 40, 1, validation_data=(x_val, y_val), callbacks=[probes], verbose=0)
    assert probes.results.compare("input", "fine").n == VAL


def test_positions_that_no_tap_has():
    (x, y), _ = squares()
    inputs = keras.Input((SIZE, SIZE, 1))
    flat = layers.Dense(SIZE * SIZE * 3, name="wide")(layers.Flatten()(inputs))
    model = keras.Model(inputs, layers.Reshape((SIZE, SIZE, 3), name="out")(flat))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    model.compile("adam", loss)
    with pytest.raises(ValueError, match="picks nothing that can be probed.*no such positions"):
        model.fit(x, y, 32, 1, callbacks=[LinearProbeCallback(["auto", "!input"])], verbose=0)


@keras.saving.register_keras_serializable("tests")
class ToGrid(layers.Layer):
    """Knows its channels in a trace of its own, and not within a step."""

    def call(self, x):
        return keras.ops.reshape(x, (keras.ops.shape(x)[0], 4, 4, -1))

    def compute_output_shape(self, shape):
        return (shape[0], 4, 4, shape[-1])


@pytest.mark.parametrize("mode", MODES)
def test_channels_that_a_step_does_not_tell(mode, tmp_path):
    inputs = keras.Input((4, 4, 3))
    grid = ToGrid(name="grid")(layers.Reshape((16, 3))(inputs))
    model = keras.Model(inputs, layers.Dense(2)(layers.Reshape((4, 4, 3))(grid)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).random((32, 4, 4, 3)).astype("float32")
    y = (x[..., 0] > 0.5).astype("int32")
    probes = LinearProbeCallback("grid", mode=mode)
    model.fit(x, y, validation_data=(x, y), epochs=2, verbose=0, callbacks=[probes])
    kernel, bias = probes.weights("grid")
    wrong = np.mean((x @ kernel + bias).argmax(axis=-1) != y)
    assert probes.results.measured("error", split="validation")["value"]["grid"] == wrong
    store = extract_features(model, (x, y), tmp_path / "s", layers="grid", verbose=False)
    np.testing.assert_array_equal(store.features("grid")[:], x.reshape(-1, 3))
