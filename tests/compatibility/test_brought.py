"""Models, labels and loops as people bring them: the default call works and is right, or says why.

What is right is recomputed by hand: the features by Keras, the probe by its weights.
"""

import copy
import pickle
import warnings

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from keras import layers
from sklearn.linear_model import LogisticRegression

from keras_probes import (
    GlobalAverage,
    LinearProbeCallback,
    ProbeResults,
    diagnose,
    extract_features,
    fit_probes,
)
from keras_probes.results.schema import Row, TapInfo

CE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def fitted(model, x, y=None, taps="auto", *, epochs=1, fit=None, **options):
    """Fits a model with probes, and validates on the same data."""
    probes = LinearProbeCallback(taps, **options)
    validation = (x, y) if y is not None else x
    model.fit(
        x, y, epochs=epochs, validation_data=validation, verbose=0, callbacks=[probes],
        **(fit or {}),
    )  # fmt: skip
    return probes


def errors(probes, split="validation"):
    return probes.results.measured("error", split=split)["value"].to_dict()


def by_hand(probes, tap, features, y, target=None):
    """The error of a tap's probe on features of one's own making."""
    kernel, bias = probes.weights(tap, target)
    logits = np.asarray(features, "float64") @ kernel + bias
    return float(np.mean(logits.argmax(axis=1) != np.asarray(y)))


def compiled(model, loss=CE, **options):
    model.compile("adam", loss, **options)
    return model


@pytest.fixture
def tabular():
    x = np.random.default_rng(0).normal(size=(320, 10)).astype("float32")
    return x, (x[:, 0] + x[:, 1] > 0).astype("int32")


def dense(out=2, loss=CE, width=12):
    model = keras.Sequential(
        [
            keras.Input((10,)),
            layers.Dense(width, "relu", name="hidden"),
            layers.Dense(out, name="out"),
        ]
    )
    return compiled(model, loss)


# 1. Sizes that only the data tell.


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(1)
    x = rng.integers(1, 50, (320, 12))
    lengths = rng.integers(4, 13, 320)
    x[np.arange(12) >= lengths[:, None]] = 0  # padding
    return x, (x == 7).any(axis=1).astype("int32")


def transformer(length=None, mask=True):
    i = keras.Input((length,), dtype="int32")
    h = layers.Embedding(50, 16, mask_zero=mask, name="embed")(i)
    h = layers.Add(name="add")(
        [h, layers.MultiHeadAttention(2, 8, dropout=0.1, name="attention")(h, h)]
    )
    h = layers.LayerNormalization(name="norm")(h)
    h = layers.GlobalAveragePooling1D(name="pool")(layers.Dense(16, "relu", name="mlp")(h))
    return compiled(keras.Model(i, layers.Dense(2, name="head")(h)))


@pytest.mark.parametrize("mode", ["shared", "isolated"])
def test_a_text_of_any_length_is_averaged_over_its_own_steps(tokens, mode):
    x, y = tokens
    model = transformer()
    probes = fitted(model, x, y, mode=mode)
    found = errors(probes)
    assert list(found) == ["embed", "add", "norm", "mlp", "pool", "head"]
    table = model.get_layer("embed").embeddings.numpy()[x]
    counts = (x > 0)[..., None]
    average = (table * counts).sum(axis=1) / counts.sum(axis=1)
    assert found["embed"] == by_hand(probes, "embed", average, y)
    assert "'input' (token ids" in str(probes.results)
    assert probes.results.measured("error")["certificate"].notna().all()


def test_what_no_probe_can_read_is_left_out_and_said(tokens, capsys):
    x, y = tokens
    model = transformer()
    probes = fitted(model, x, y, "all")
    left_out = probes.results.left_out
    assert left_out["attention/softmax"] == "an attention map"
    assert "attention/query" in errors(probes)
    probes.summary()
    assert "Not probed: 'input' (token ids" in capsys.readouterr().out
    for glob in ("attention/*", "*"):
        assert "attention/softmax" not in errors(fitted(transformer(), x, y, glob))


def test_left_out_layers_are_saved_with_the_results(tokens, tmp_path):
    results = fitted(transformer(), *tokens).results
    results.save(tmp_path)
    assert ProbeResults.load(tmp_path).left_out == results.left_out != {}
    store = extract_features(transformer(), tokens, tmp_path / "store", verbose=False)
    offline = fit_probes(store, l2=1e-2, validation=None, verbose=False)
    assert offline.left_out == results.left_out


@pytest.mark.parametrize("name", ["input", "attention/softmax"])
def test_by_its_own_name_it_is_an_error(tokens, name):
    with pytest.raises(ValueError, match=f"{name}.*can't be probed"):
        fitted(transformer(), *tokens, name)


def test_auto_less_some(tokens):
    x, y = tokens
    assert list(errors(fitted(transformer(), x, y, ["auto", "!add", "!m*"]))) == [
        "embed", "norm", "pool", "head"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'!attention/query' takes out nothing"):
        fitted(transformer(), x, y, ["auto", "!attention/query"])
    with pytest.raises(ValueError, match="picks nothing"):
        fitted(transformer(), x, y, ["!add"])


def test_images_of_any_size_are_seen_as_they_come():
    x = np.random.default_rng(2).random((160, 16, 16, 3)).astype("float32")
    y = (x[:, :8].mean((1, 2, 3)) > 0.5).astype("int32")
    i = keras.Input((None, None, 3))
    h = layers.UpSampling2D(interpolation="bilinear", name="up")(
        layers.Conv2D(4, 3, name="conv")(i)
    )
    model = compiled(
        keras.Model(i, layers.Dense(2, name="out")(layers.GlobalMaxPooling2D(name="pool")(h)))
    )
    probes = fitted(model, x, y)
    assert errors(probes)["input"] == by_hand(probes, "input", x.reshape(160, -1), y)
    assert probes.results.taps[0].features == 768


def test_images_of_another_size_than_the_probes_were_built_for():
    i = keras.Input((None, None, 3))
    pooled = layers.GlobalMaxPooling2D(name="pool")(layers.Conv2D(4, 3, name="conv")(i))
    model = compiled(keras.Model(i, layers.Dense(2, name="out")(pooled)))
    rng = np.random.default_rng(2)
    x, y = rng.random((64, 8, 8, 3)), rng.integers(0, 2, 64)
    probes = fitted(model, x, y)
    with pytest.raises(ValueError, match=r"'input' was built for the shape .*8, 8, 3.*gap"):
        model.fit(np.zeros((64, 9, 9, 3)), y, verbose=0, callbacks=[probes])
    model.fit(x, y, verbose=0, callbacks=[probes])  # neither is the worse
    averages = fitted(model, x, y, reduce="gap")
    model.fit(np.zeros((64, 9, 9, 3)), y, verbose=0, callbacks=[averages])


def test_batches_of_several_lengths(tokens):
    x, y = tokens

    def batches():
        for start in range(0, 320, 32):
            yield x[start : start + 32, : 12 if start % 64 else 9], y[start : start + 32]

    spec = (tf.TensorSpec((None, None), tf.int64), tf.TensorSpec((None,), tf.int32))
    data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    model = transformer()
    probes = LinearProbeCallback(num_classes=2)
    model.fit(data, validation_data=data, verbose=0, callbacks=[probes])
    assert list(errors(probes)) == ["embed", "add", "norm", "mlp", "pool", "head"]
    with pytest.raises(ValueError, match="'embed'.*sizes that differ from batch to batch"):
        transformer().fit(
            data, verbose=0, callbacks=[LinearProbeCallback("embed", reduce="random")]
        )
    i = keras.Input((None, None))
    model = compiled(keras.Model(i, layers.Lambda(lambda t: tf.stack([t[:, 0, 0]] * 2, 1))(i)))
    flat = data.map(lambda x, y: (tf.cast(x[:, None], "float32"), y))
    with pytest.raises(ValueError, match="picks nothing that can be probed"):
        model.fit(flat, verbose=0, callbacks=[LinearProbeCallback("*put", num_classes=2)])


def test_rows_of_an_image_are_no_steps_of_a_sequence():
    x = np.random.default_rng(3).random((96, 8, 8)).astype("float32")
    model = keras.Sequential([keras.Input((8, 8)), layers.Flatten(), layers.Dense(2)])
    probes = fitted(compiled(model), x, (x[:, 0, 0] > 0.5).astype("int32"))
    assert probes.results.taps[0].features == 64


def test_what_scales_channels_is_its_input_once_more(tabular):
    x, y = tabular
    adapted = layers.Normalization(name="normalization")
    adapted.adapt(x)
    h = i = keras.Input((10,))
    for layer in (adapted, layers.Rescaling(2.0, name="rescaling"), layers.Dense(8, name="a")):
        h = layer(h)
    h = layers.LayerNormalization(name="other")(layers.BatchNormalization(name="batch")(h))
    model = compiled(keras.Model(i, layers.Dense(2, name="out")(h)))
    probes = fitted(model, x, y)
    assert list(errors(probes)) == ["input", "a", "other", "out"]
    assert "batch" in errors(fitted(model, x, y, "all"))


# 2. Rows that are unknown.


@keras.saving.register_keras_serializable("test_brought")
class Doubled(layers.Layer):
    """By NumPy: TensorFlow does not know how many rows come back."""

    def call(self, x):
        double = tf.numpy_function(lambda a: a * np.float32(2), [x], tf.float32)
        return tf.ensure_shape(double, (None, 10))

    def compute_output_shape(self, shape):
        return shape


def test_after_a_numpy_function(tabular):
    x, y = tabular
    i = keras.Input((10,))
    h = layers.Dense(8, "relu", name="d")(Doubled(name="doubled")(i))
    model = compiled(keras.Model(i, layers.Dense(2, name="o")(h)), jit_compile=False)
    probes = fitted(model, x, y)
    assert list(errors(probes)) == ["input", "doubled", "d", "o"]
    assert errors(probes)["doubled"] == by_hand(probes, "doubled", 2 * x, y)


def test_strings_that_the_model_splits():
    rng = np.random.default_rng(4)
    words = np.array(["red", "green", "blue", "cat", "dog", "bird", "runs", "sleeps"])
    text = tf.constant([" ".join(words[rng.integers(0, 8, 6)]) for _ in range(160)])
    y = np.array([b"cat" in t for t in text.numpy()]).astype("int32")
    vectorize = layers.TextVectorization(20, output_sequence_length=6, name="vectorize")
    vectorize.adapt(text)
    i = keras.Input((1,), dtype="string")
    h = layers.Flatten(name="flat")(layers.Embedding(20, 8, name="embedding")(vectorize(i)))
    model = compiled(
        keras.Model(i, layers.Dense(2, name="out")(layers.Dense(16, "relu", name="d")(h)))
    )
    probes = fitted(model, text[:, None], tf.constant(y), num_classes=2)
    assert list(errors(probes)) == ["embedding", "d", "out"]
    assert probes.results.left_out["vectorize"].startswith("token ids")
    average = model.get_layer("embedding").embeddings.numpy()[vectorize(text).numpy()].mean(axis=1)
    assert errors(probes)["embedding"] == by_hand(probes, "embedding", average, y)


class Experts(layers.Layer):
    """Each gets a part of the rows."""

    def __init__(self, **options):
        super().__init__(**options)
        self.even, self.odd = layers.Dense(4, name="even"), layers.Dense(4, name="odd")

    def call(self, x):
        which = tf.cast(x[:, 0] > 0, tf.int32)
        places = tf.dynamic_partition(tf.range(tf.shape(x)[0]), which, 2)
        parts = tf.dynamic_partition(x, which, 2)
        return tf.dynamic_stitch(places, [self.even(parts[0]), self.odd(parts[1])])


class Halves(layers.Layer):
    """Has two rows for each example within it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.window = layers.Dense(3, name="window")

    def call(self, x):
        return tf.reshape(self.window(tf.reshape(x, (-1, 5))), (-1, 6))


def test_layers_whose_rows_are_no_examples(tabular):
    x, y = tabular
    i = keras.Input((10,))
    make = lambda layer: compiled(keras.Model(i, layers.Dense(2, name="out")(layer(i))))  # noqa: E731
    probes = fitted(make(Experts(name="experts")), x, y)
    assert list(errors(probes)) == ["input", "experts", "out"]
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="no row for each"):
        fitted(make(Experts(name="experts")), x, y, "experts/even")
    with pytest.raises(ValueError, match="'halves/window'.*can't be probed: its output has no row"):
        fitted(make(Halves(name="halves")), x, y, "halves/window")
    probes = fitted(make(Halves(name="halves")), x, y, "all")
    assert "no row for each example" in probes.results.left_out["window"]


def test_a_layer_that_returns_what_no_probe_can_read(tabular):
    class Odd(layers.Layer):
        def call(self, x):
            return Result(x)

    class Result:
        def __init__(self, x):
            self.x = x

    class Host(keras.Model):
        def __init__(self):
            super().__init__()
            self.odd, self.out = Odd(name="odd"), layers.Dense(2, name="out")

        def call(self, x):
            return self.out(self.odd(x).x)

    with pytest.raises(ValueError, match="'odd'.*can't be probed: it returns Result"):
        fitted(compiled(Host()), *tabular, "odd")


# 3. Rows that are others than the labels'.


class Encoder(keras.Model):
    def __init__(self):
        super().__init__()
        self.enc, self.head = layers.Dense(12, "relu", name="enc"), layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.enc(x))

    def losses_of(self, x, y):
        raise NotImplementedError

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.losses_of(x, y)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


class NoiseFirst(Encoder):
    """Calls itself on something else before x."""

    def losses_of(self, x, y):
        noise = self(tf.random.normal(tf.shape(x)))
        return CE(y, self(x)) + 1e-3 * tf.reduce_mean(noise**2)


class LayersOnNoiseFirst(Encoder):
    def losses_of(self, x, y):
        noise = self.head(self.enc(tf.random.normal(tf.shape(x))))
        return CE(y, self.head(self.enc(x))) + 1e-3 * tf.reduce_mean(noise**2)


class LayersOnNoiseAlone(Encoder):
    def losses_of(self, x, y):
        return tf.reduce_mean(self.head(self.enc(tf.random.normal(tf.shape(x)))) ** 2)


class Shuffled(Encoder):
    def losses_of(self, x, y):
        order = tf.random.shuffle(tf.range(tf.shape(x)[0]))
        return CE(tf.gather(y, order), self(tf.gather(x, order), training=True))


class Reversed(Encoder):
    def losses_of(self, x, y):
        return CE(y, self(0.7 * x + 0.3 * x[::-1], training=True))


class Swapped(Encoder):
    def losses_of(self, x, y):
        half = tf.shape(x)[0] // 2
        return CE(y, self(tf.concat([x[half:], x[:half]], axis=0), training=True))


@tf.function(autograph=False)
def reversed_within(x):
    return tf.reverse(x, [0])


@tf.function(autograph=False)
def halved_within(x):
    return x / 2


class ReversedWithin(Encoder):
    def losses_of(self, x, y):
        return CE(reversed_within(y), self(reversed_within(x), training=True))


class HalvedWithin(Encoder):
    def losses_of(self, x, y):
        return CE(y, self(halved_within(x), training=True))


class Scaled(Encoder):
    def losses_of(self, x, y):
        return CE(y, self(x * tf.random.uniform((tf.shape(x)[0], 1), 0.9, 1.1), training=True))


@pytest.mark.parametrize("kind", [NoiseFirst, Scaled, HalvedWithin])
def test_the_call_on_x_is_read(tabular, kind):
    x, y = tabular
    probes = fitted(compiled(kind()), x, y, "enc", epochs=4)
    assert errors(probes, "train")["enc"] < 0.2
    assert bool(probes.results.refits[-1].left_out) == (kind is not NoiseFirst)


@pytest.mark.parametrize(
    "kind",
    [LayersOnNoiseFirst, LayersOnNoiseAlone, Shuffled, Reversed, Swapped, ReversedWithin],
)
def test_other_rows_are_refused_with_what_helps(tabular, kind):
    x, y = tabular
    with pytest.raises(ValueError, match="isolated"):
        fitted(compiled(kind()), x, y, "enc")
    probes = fitted(compiled(kind()), x, y, "enc", epochs=2, mode="isolated")
    assert errors(probes)["enc"] < 0.2


def test_eagerly_it_is_said_that_rows_are_not_known(tabular):
    with pytest.warns(UserWarning, match="same examples in the same order"):
        fitted(compiled(Shuffled(), run_eagerly=True), *tabular, "enc")


# 4. Hosts without a `call`.


class Autoencoder(keras.Model):
    def __init__(self):
        super().__init__()
        self.encoder = keras.Sequential(
            [
                keras.Input((10,)),
                layers.Dense(12, "relu", name="hidden"),
                layers.Dense(8, name="code"),
            ]
        )
        self.decoder = keras.Sequential([keras.Input((8,)), layers.Dense(10, name="back")])

    def of(self, data):
        return keras.utils.unpack_x_y_sample_weight(data)[0]

    def train_step(self, data):
        x = self.of(data)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self.decoder(self.encoder(x)) - x) ** 2)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


class Twice(Autoencoder):
    def of(self, data):
        (unlabelled, _), _ = data
        return unlabelled


@pytest.mark.parametrize("mode", ["shared", "isolated"])
@pytest.mark.parametrize("taps", ["auto", "encoder/*", ["encoder/hidden", "encoder/code"]])
def test_a_host_without_a_call(tabular, taps, mode):
    x, y = tabular
    host = Autoencoder()
    host.compile("adam")
    probes = LinearProbeCallback(taps, mode=mode, num_classes=2)
    host.fit(x, y, epochs=2, verbose=0, callbacks=[probes])
    assert {"encoder/hidden", "encoder/code"} <= set(errors(probes, "train"))
    hidden = host.encoder.get_layer("hidden")(x).numpy()
    optimal = LogisticRegression(C=1e3, max_iter=1000).fit(hidden, y).score(hidden, y)
    assert by_hand(probes, "encoder/hidden", hidden, y) < 1 - optimal + 0.05
    assert probes.results.refits[-1].left_out == {}
    assert list(probes.refit((x, y), l2=1e-2, validation=None, verbose=False).table().index)


def test_what_an_inner_network_leaves_out_has_its_name_before_it(tabular):
    x, y = tabular

    host = Autoencoder()
    host.encoder.add(layers.Lambda(lambda x: x > 0, name="signs"))
    host.encoder.add(layers.Lambda(lambda x: tf.cast(x, "float32"), name="back"))
    host.compile("adam")
    probes = LinearProbeCallback("all", num_classes=2)
    host.fit(x, y, verbose=0, callbacks=[probes])
    assert list(probes.results.left_out) == ["encoder/signs"]
    for name in ("encoder/signs", "signs"):
        with pytest.raises(ValueError, match="can't be probed: its output is of dtype bool"):
            LinearProbeCallback(["encoder/code", name], num_classes=2).summary(host)


def test_the_inner_network_and_the_part_of_the_data_can_be_named(tabular):
    x, y = tabular
    pairs = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    data = tf.data.Dataset.zip((pairs.map(lambda x, y: (x + 1, y)), pairs))
    for unpack in (1, lambda data: data[1]):
        host = Twice()
        host.compile("adam")
        probes = LinearProbeCallback(
            "code", model=lambda m: m.encoder, unpack=unpack, num_classes=2, mode="isolated"
        )
        host.fit(data, epochs=2, verbose=0, callbacks=[probes])
        code = host.encoder(x).numpy()
        optimal = LogisticRegression(C=1e3, max_iter=1000).fit(code, y).score(code, y)
        assert by_hand(probes, "code", code, y) < 1 - optimal + 0.05
    with pytest.raises(ValueError, match="something else than the x"):
        host.fit(data, verbose=0, callbacks=[LinearProbeCallback(
            "code", model=lambda m: m.encoder, unpack=1, num_classes=2)])  # fmt: skip
    with pytest.raises(TypeError, match="returns one. Received: str"):
        host.fit(data, verbose=0, callbacks=[LinearProbeCallback(model=lambda m: "encoder")])


def test_without_a_clue_the_error_says_what_to_pass(tabular, capsys):
    host = Autoencoder()
    host.decoder = keras.Sequential([keras.Input((10,)), layers.Dense(10)])
    host.compile("adam")
    with pytest.raises(ValueError, match=r"no `call`.*encoder/\*.*'encoder', 'decoder'"):
        host.fit(*tabular, verbose=0, callbacks=[LinearProbeCallback(num_classes=2)])
    with pytest.raises(ValueError, match=r"no `call`.*model.encoder"):
        extract_features(host, tabular, "nowhere", verbose=False)
    LinearProbeCallback("encoder/*", num_classes=2).summary(host)
    assert "encoder/code" in capsys.readouterr().out


# 5. The number of classes.


def test_the_width_of_an_output_is_no_number_of_classes(tabular):
    x, y = tabular
    model = dense(64, lambda y, u: tf.reduce_mean(tf.square(u), axis=-1))
    probes = fitted(model, x, y)
    assert probes.results.measured("error")["chance"].iloc[0] == 0.5
    assert probes.weights("out")[0].shape == (64, 2)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    with pytest.raises(ValueError, match="The number of classes .* is not known.*num_classes="):
        model.fit(data, verbose=0, callbacks=[LinearProbeCallback()])


def test_of_a_cross_entropy_it_is_and_chance_counts_those_that_occur(tabular):
    x, y = tabular
    probes = fitted(dense(7), x, y)
    assert probes.weights("hidden")[0].shape == (12, 7)
    assert probes.results.measured("error")["chance"].iloc[0] == 0.5


def test_labels_of_a_hinge_loss(tabular):
    x, y = tabular
    probes = fitted(dense(1, "hinge"), x, 2 * y - 1)
    assert errors(probes)["input"] == by_hand(probes, "input", x, y) < 0.1


# 6. Labels that are missing.


@pytest.mark.parametrize("as_dataset", [False, True])
@pytest.mark.parametrize("missing", [-1, 255, np.nan, "zeros"])
def test_missing_labels_are_left_out_counted_and_said_once(tabular, missing, as_dataset):
    x, y = tabular
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    labels = y.astype("float64" if missing is np.nan else "int64")
    if missing == "zeros":
        labels = keras.utils.to_categorical(y)
        labels[::7], loss = 0.0, keras.losses.CategoricalCrossentropy(from_logits=True)
    else:
        labels[::7] = missing
    if missing == -1 or missing is np.nan:
        loss = lambda y, u: tf.reduce_mean(u**2, axis=-1)  # noqa: E731
    model = dense(2, loss)
    data = (x, labels)
    if as_dataset:
        data = (tf.data.Dataset.from_tensor_slices((x, labels)).batch(32),)
    with pytest.warns(UserWarning, match=r"of .* labels are missing") as warned:
        probes = fitted(model, *data, num_classes=2, epochs=2)
    assert sum("are missing" in str(w.message) for w in warned) == 1
    table = probes.results.table()
    assert (table["unlabelled"] == 2 * 46).all()
    known = np.arange(320) % 7 != 0
    assert errors(probes)["input"] == by_hand(probes, "input", x[known], y[known])
    assert (probes.results.measured("error")["n"] == 274).all()


@pytest.mark.parametrize("as_dataset", [False, True])
def test_what_has_no_weight_may_have_any_label(tabular, as_dataset):
    x, y = tabular
    padding = np.arange(320) % 5 == 0
    y, weights = np.where(padding, 99, y), np.where(padding, 0.0, 1.0)
    data, options = (x, y), {"sample_weight": weights}
    if as_dataset:
        data, options = (tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(32),), {}
    model = dense(2, lambda y, u: tf.reduce_mean(u**2, -1))
    probes = LinearProbeCallback("input", num_classes=2)
    model.fit(*data, epochs=2, verbose=0, callbacks=[probes], **options)
    train = probes.results.measured("error", split="train").loc["input"]
    assert (train["n"], train["unlabelled"]) == (256, 0)
    assert probes.results.refits[-1].left_out == {}


def test_a_target_function_can_say_that_there_is_none(tabular):
    x, y = tabular
    some = lambda x, y: tf.where(x[:, 2] > 0, y, -1)  # noqa: E731
    with pytest.warns(UserWarning, match="are missing"):
        probes = fitted(dense(), x, y, target=some, num_classes=2)
    assert (probes.results.measured("error")["n"] == np.sum(x[:, 2] > 0)).all()


def test_a_wrong_label_ends_no_run(tabular):
    x, y = tabular
    y = np.where(np.arange(320) == 319, 5, y)
    with pytest.raises(ValueError, match="1 of 320 labels that are not"):
        fitted(dense(2), x, y, num_classes=2)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    loss = lambda y, u: tf.reduce_mean(u**2, axis=-1)  # noqa: E731
    with pytest.warns(UserWarning, match="1 of 320 labels are missing or none of the classes"):
        probes = fitted(dense(2, loss), data, epochs=2, num_classes=2)
    assert len(probes.results.refits) == 2


def test_rows_of_weight_0_do_not_count(tabular, tmp_path):
    x, y = tabular
    weights = (np.arange(320) % 3 > 0).astype("float32")
    probes = LinearProbeCallback("input")
    dense().fit(x, y, sample_weight=weights, validation_data=(x, y, weights), verbose=0,
                callbacks=[probes])  # fmt: skip
    counted = weights > 0
    assert errors(probes)["input"] == by_hand(probes, "input", x[counted], y[counted])
    assert (probes.results.measured("error")["n"] == counted.sum()).all()
    assert "unlabelled" not in probes.results.table()
    store = extract_features(dense(), (x, y, weights), tmp_path / "s", verbose=False)
    results = fit_probes(store, validation=None, test=None, l2=1e-3, verbose=False)
    assert (results.measured("error", split="train")["n"] == counted.sum()).all()


def test_stores_keep_missing_labels(tabular, tmp_path):
    x, y = tabular
    y = np.where(np.arange(320) % 4 == 0, -1, y)
    store = extract_features(dense(), (x, y), tmp_path / "s", num_classes=2, verbose=False)
    results = fit_probes(store, l2=1e-3, validation=None, test=None, verbose=False)
    rows = results.measured("error", split="train")
    assert (rows["n"] == 240).all()
    assert (rows["unlabelled"] == 80).all()


# 7. Sample weights of the host's.


def test_weights_by_token_are_the_hosts_own(tokens):
    x, y = tokens
    i = keras.Input((12,), dtype="int32")
    model = compiled(keras.Model(i, layers.Dense(5)(layers.Embedding(50, 8, name="e")(i))))
    fit = {"sample_weight": (x > 0).astype("float32")}
    target = lambda x, y: tf.cast(x[:, 0] > 25, tf.int32)  # noqa: E731
    probes = fitted(model, x, x % 5, "e", target=target, num_classes=2, fit=fit)
    assert (probes.results.measured("error", split="train")["n"] == 320).all()
    some = lambda x, y, w: w[:, 11]  # noqa: E731
    probes = LinearProbeCallback("e", target=target, num_classes=2, sample_weight=some)
    model.fit(x, x % 5, **fit, verbose=0, callbacks=[probes])
    assert (probes.results.measured("error")["n"] == np.sum(x[:, 11] > 0)).all()


# 8. Preprocessing that `fit` does.


class Task(keras.Model):
    """As KerasHub's tasks: what `fit` takes, it preprocesses."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(8, "relu", name="hidden"), layers.Dense(2, name="out")

    def call(self, x):
        return self.out(self.hidden(x))

    def preprocess_samples(self, x, y=None, sample_weight=None):
        x = tf.strings.to_number(tf.strings.split(x).to_tensor(shape=(None, 10)))
        return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)

    def fit(self, x, y, **options):
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(32).map(self.preprocess_samples)
        return super().fit(data, **options)


def test_what_fit_preprocesses_refit_and_extraction_do_as_well(tabular, tmp_path):
    x, y = tabular[0].round(3), tabular[1]
    strings = [" ".join(map(str, row)) for row in x.tolist()]
    model = compiled(Task())
    probes = LinearProbeCallback(["input", "hidden"])
    model.fit(strings, y, verbose=0, callbacks=[probes])
    store = extract_features(model, (strings, y), tmp_path / "s", layers="input", verbose=False)
    np.testing.assert_allclose(np.asarray(store.features("input")[:]), x, atol=1e-6)
    options = {"l2": 1e-3, "validation": None, "test": None, "verbose": False}
    assert probes.refit((strings, y), **options).measured("error")["value"]["input"] < 0.1


# 9. Nothing observed.


def test_a_loop_of_ones_own_is_told(tabular):
    model, probes = dense(), LinearProbeCallback()
    calls = keras.callbacks.CallbackList([probes], model=model, epochs=1, steps=1, verbose=0)
    calls.on_train_begin()
    calls.on_epoch_begin(0)
    calls.on_train_batch_begin(0)
    calls.on_train_batch_end(0)
    with pytest.warns(UserWarning, match="saw no step of epoch 0.*extract_features"):
        calls.on_epoch_end(0)
    calls.on_train_end()
    with pytest.raises(ValueError, match="Nothing to show: no epoch"):
        probes.results.table()
    probes = fitted(model, *tabular)  # the model is none the worse
    assert errors(probes)


def test_a_train_function_of_ones_own_is_told(tabular):
    class Host(Encoder):
        def make_train_function(self, force=False):
            if self.train_function is None or force:

                def function(iterator):
                    next(iterator)
                    return {"loss": tf.constant(0.0)}

                self.train_function = function
            return self.train_function

    with pytest.warns(UserWarning, match='does not call its train_step.*mode="isolated"'):
        fitted(compiled(Host()), *tabular, "enc")


def test_a_model_of_keras_2_is_refused_by_name():
    legacy = type("Model", (), {"__module__": "tf_keras.src.engine.training"})()
    for use in (LinearProbeCallback().set_model, LinearProbeCallback().summary):
        with pytest.raises(TypeError, match=r"Received: tf_keras.*TF_USE_LEGACY_KERAS"):
            use(legacy)


# 10. Copies.


def pickled(probes):
    return pickle.loads(pickle.dumps(probes))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_fresh_and_used(tabular, copied):
    x, y = tabular
    model = dense()
    probes = copied(LinearProbeCallback("hidden", refit=0.2, every=2))
    model.fit(x, y, verbose=0, callbacks=[probes])
    again = copied(probes)
    pd.testing.assert_frame_equal(again.results.frame(), probes.results.frame())
    logs = model.evaluate(x, y, verbose=0, return_dict=True, callbacks=[again])
    assert logs == model.evaluate(x, y, verbose=0, return_dict=True, callbacks=[probes])
    assert copied(again)._settings == probes._settings


# 11. Messages.


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.linspace(0, 1, 320), "numbers to predict, as of a regression"),
        (np.arange(320) % 2 + 1, "start at 1: use y - 1"),
        (np.ones((320, 2)), "Rows mark several classes"),
        (np.zeros((320, 6, 1), int), "one at each position of an output"),
        (np.zeros((320, 4, 4, 1), int), "one at each position of an output"),
    ],
)
def test_errors_name_the_likeliest_reason(tabular, labels, message):
    with pytest.raises(ValueError, match=message):
        fitted(dense(2, "mse"), tabular[0], labels, num_classes=2)


def test_labels_by_token_are_told_by_the_output(tokens):
    """Whole rows of labels, as wide as one-hot ones might be."""
    x, _ = tokens
    i = keras.Input((12,), dtype="int32")
    model = compiled(keras.Model(i, layers.Dense(50)(layers.Embedding(50, 8)(i))))
    measured = fitted(model, x, x).results.measured("error", split="train")
    assert set(measured["n"]) == {x.size - np.count_nonzero(x < 0)}


# 12. Numbers at the edge.


@pytest.mark.parametrize("refit", [0, 0.1])
def test_a_spike_leaves_a_feature_alive(tabular, refit):
    x, y = tabular
    spiked = x.copy()
    spiked[40, 0] = 1e25
    probes = LinearProbeCallback("input", refit=refit)
    dense().fit(spiked, y, epochs=5, shuffle=False, verbose=0, callbacks=[probes])
    kernel, _ = probes.weights("input")
    assert np.isfinite(kernel).all()
    assert np.abs(kernel[0]).max() > 0.1
    assert (probes.results.measured("error")["nonfinite"] == 1).all()


def test_large_features_are_finite(tabular):
    x, y = tabular
    probes = LinearProbeCallback("input")
    dense().fit(x * 1e17, y, verbose=0, callbacks=[probes])
    assert (probes.results.measured("error")["nonfinite"] == 0).all()


def test_a_keras_layer_as_reduction_under_a_mixed_policy():
    x = np.random.default_rng(5).random((96, 8, 8, 1)).astype("float32")
    y = (x[:, :4].mean((1, 2, 3)) > 0.5).astype("int32")
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(4, 3, name="conv"),
                layers.Flatten(),
                layers.Dense(2),
            ]
        )
        probes = fitted(compiled(model), x, y, "conv", reduce=layers.GlobalMaxPooling2D())
    finally:
        keras.config.set_dtype_policy("float32")
    assert probes.results.measured("error")["certificate"].notna().all()


def test_a_diagnosis_where_no_training_example_was_finite():
    row = Row(0, 1, "train", None, "a", "error", np.nan, 0, nonfinite=50)
    rows = [row, Row(0, 1, "validation", None, "a", "error", 0.3, 50, majority=0.9, chance=0.9)]
    results = ProbeResults([TapInfo("a", 0, "Dense", (3,), "Flatten", 3)], rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert diagnose(results) is not None


def test_targets_named_like_baselines(tabular):
    x, y = tabular
    targets = {"sign": None, "sign_initial": lambda x, y: 1 - y}
    options = {"target": targets, "num_classes": {"sign_initial": 2}}
    assert set(fitted(dense(), x, y, "input", **options).results.targets) == set(targets)
    with pytest.raises(ValueError, match="named 'sign_initial', as the baseline"):
        LinearProbeCallback(**options, baselines=["initial"])


def test_a_weight_of_all_classes_leaves_the_penalty_as_it_is(tabular):
    """A mean over weighted examples is the same when all weights are a hundred times as large."""
    x, y = tabular
    kernels = []
    for weight in (1.0, 100.0):
        probes = LinearProbeCallback("input", refit=0)
        keras.utils.set_random_seed(0)
        dense().fit(x, y, shuffle=False, verbose=0, callbacks=[probes],
                    class_weight={0: weight, 1: weight})  # fmt: skip
        kernels.append(probes.weights("input")[0])
    np.testing.assert_allclose(kernels[1], kernels[0], rtol=1e-3, atol=1e-4)


def test_average_by_name_serves_as_ever(tokens):
    probes = fitted(transformer(12), *tokens, reduce=GlobalAverage())
    assert {tap.reduction for tap in probes.results.taps} == {"GlobalAverage"}


def test_an_evaluation_after_the_fit_reaches_tensorboard(tabular, tmp_path):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    x, y = tabular
    model, probes = dense(), LinearProbeCallback("hidden", log_dir=tmp_path)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[probes])
    logs = model.evaluate(x, y, verbose=0, return_dict=True, callbacks=[probes])
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    found = [
        (run, tag)
        for run, content in events.Runs().items()
        for tag in content["tensors"]
        if "test" in tag and "error" in tag and "hidden" in run + tag
    ]
    assert len(found) == 1
    (event,) = events.Tensors(*found[0])
    value = tf.make_ndarray(event.tensor_proto)
    assert event.step == 1
    assert value == pytest.approx(logs["probe_error/hidden"])


def test_an_optimizer_by_name_has_the_rate_of_the_default(tabular):
    kernels = []
    for optimizer in (None, "adam"):
        keras.utils.set_random_seed(0)
        probes = LinearProbeCallback("input", refit=0, optimizer=optimizer)
        dense().fit(*tabular, shuffle=False, verbose=0, callbacks=[probes])
        kernels.append(probes.weights("input")[0])
    np.testing.assert_array_equal(*kernels)


def test_inputs_and_outputs_in_a_dict_are_named_by_their_keys():
    class Two(layers.Layer):
        def call(self, x):
            return {"z": x["b"] + x["a"], "u": x["b"] - x["a"]}

    rng = np.random.default_rng(6)
    x = {"b": rng.normal(size=(96, 3)), "a": rng.normal(size=(96, 3))}
    i = {name: keras.Input((3,), name=name) for name in x}
    two = Two(name="two")(i)
    model = compiled(keras.Model(i, layers.Dense(2, name="out")(two["z"] * two["u"])))
    y = (x["a"][:, 0] > 0).astype("int32")
    probes = fitted(model, x, y, "all")
    assert {"input[a]", "input[b]", "two[u]", "two[z]", "out"} <= set(errors(probes))
    assert errors(probes)["input[b]"] == by_hand(probes, "input[b]", x["b"], y)


def test_the_summary_counts_baselines(tabular, capsys):
    LinearProbeCallback(baselines=["initial", "shuffled"]).summary(dense())
    before = capsys.readouterr().out
    probes = LinearProbeCallback(baselines=["initial", "shuffled"])
    fitted_probes = dense()
    fitted_probes.fit(*tabular, verbose=0, callbacks=[probes])
    probes.summary()
    assert before.splitlines()[:5] == capsys.readouterr().out.splitlines()[:5]


def test_a_long_target_is_not_printed_whole(tabular):
    with pytest.raises(TypeError, match="target=") as raised:
        fitted(dense(), *tabular, target=np.arange(10**5))
    assert len(str(raised.value)) < 400


# Found by reading: what depends on more than one of these.


@keras.saving.register_keras_serializable("test_brought")
class Forgetful(layers.Layer):
    """Knows of no masks."""

    def call(self, x):
        return x * 2.0


def forgetful(length):
    i = keras.Input((length,), dtype="int32")
    h = Forgetful(name="twice")(layers.Embedding(50, 8, mask_zero=True, name="embed")(i))
    h = layers.Dense(6, name="dense")(h)
    return compiled(keras.Model(i, layers.Dense(2, name="out")(h[:, 0])))


@pytest.mark.parametrize("length", [12, None])
@pytest.mark.parametrize("taps", ["dense", "all", ["all", "!embed"]])
def test_padding_stays_padding_whatever_else_is_probed(tokens, taps, length):
    x, y = tokens
    keras.utils.set_random_seed(0)
    model = forgetful(length)
    data = tf.data.Dataset.from_tensor_slices((x, y)).padded_batch(32, ([None], []))
    probes = LinearProbeCallback(taps, num_classes=2)
    model.fit(data, validation_data=data, verbose=0, callbacks=[probes])
    inner = keras.Model(model.inputs, model.get_layer("dense").output)(x).numpy()
    counts = (x > 0)[..., None]
    average = (inner * counts).sum(axis=1) / counts.sum(axis=1)
    assert errors(probes)["dense"] == by_hand(probes, "dense", average, y)


def test_the_mask_of_a_text_is_not_that_of_an_image_beside_it(tokens):
    text, y = tokens
    image = np.random.default_rng(9).random((320, 12, 12, 1)).astype("float32")
    i = [keras.Input((12,), dtype="int32"), keras.Input((12, 12, 1))]
    words = layers.Embedding(50, 8, mask_zero=True, name="embed")(i[0])
    words = layers.GlobalAveragePooling1D()(Forgetful(name="twice")(words))
    pixels = layers.Reshape((12, 12), name="rows")(layers.Conv2D(1, 1, name="conv")(i[1]))
    joined = layers.Concatenate()([words, layers.Flatten()(pixels)])
    model = compiled(keras.Model(i, layers.Dense(2, name="out")(joined)))
    probes = fitted(model, [text, image], y, ["embed", "rows"])
    rows = keras.Model(model.inputs, model.get_layer("rows").output)([text, image]).numpy()
    assert errors(probes)["rows"] == by_hand(probes, "rows", rows.mean(axis=1), y)


def test_the_number_of_classes_is_asked_for_once(tabular):
    x, y = tabular
    three = np.where(x[:, 2] > 1, 2, y)
    model = dense(3, lambda y, u: tf.reduce_mean(u**2, axis=-1))
    probes = fitted(model, x, three, "input")
    model.evaluate(x, three, verbose=0, callbacks=[probes])
    model.fit(x, y, verbose=0, callbacks=[probes])  # none of the third
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
    model.fit(data, verbose=0, callbacks=[copy.deepcopy(probes)])


def test_a_hinge_takes_0_for_minus_1(tabular):
    x, y = tabular
    assert errors(fitted(dense(1, "hinge"), x, y))["input"] < 0.1


def test_unpack_may_compute(tabular):
    x, y = tabular
    data = tf.data.Dataset.from_tensor_slices({"i": 2 * x, "l": y}).batch(32)

    class Host(Encoder):
        def train_step(self, data):
            return super().train_step((data["i"] / 2.0, data["l"]))

        def losses_of(self, x, y):
            return CE(y, self(x))

    unpack = lambda data: (data["i"] / 2.0, data["l"])  # noqa: E731
    for mode in ("isolated", "shared"):
        probes = LinearProbeCallback("enc", unpack=unpack, num_classes=2, mode=mode)
        compiled(host := Host()).fit(data, epochs=4, verbose=0, callbacks=[probes])
        assert by_hand(probes, "enc", host.enc(x), y) < 0.25


def test_a_loaded_callback_can_be_shown_copied_and_saved(tabular, tmp_path):
    model, probes = dense(), LinearProbeCallback()
    model.fit(*tabular, verbose=0, callbacks=[probes])
    probes.save(tmp_path / "a")
    loaded = LinearProbeCallback.load(tmp_path / "a")
    loaded.summary(model, print_fn=lambda text: None)
    loaded.save(tmp_path / "b")
    expected = model.evaluate(*tabular, verbose=0, return_dict=True, callbacks=[probes])
    for other in (copy.deepcopy(loaded), LinearProbeCallback.load(tmp_path / "b")):
        logs = model.evaluate(*tabular, verbose=0, return_dict=True, callbacks=[other])
        assert logs == expected


def test_the_control_leaves_out_what_its_target_does(tabular):
    x, y = tabular
    some = np.where(np.arange(320) % 4 == 0, y, -1)
    model = dense(2, lambda y, u: tf.reduce_mean(u**2, axis=-1))
    with pytest.warns(UserWarning, match="are missing"):
        probes = fitted(model, x, some, "input", num_classes=2, baselines=["shuffled"])
    counts = probes.results.frame().groupby("baseline", dropna=False)["n"].unique()
    assert [n.tolist() for n in counts] == [[80], [80]]


def test_a_copy_looks_at_the_same_network(tabular):
    x, y = tabular
    inner = keras.Sequential([keras.Input((10,)), layers.Dense(8, "relu", name="deep")])
    model = compiled(keras.Sequential([keras.Input((10,)), inner, layers.Dense(2)]))
    for mode in ("isolated", "shared"):
        probes = copy.deepcopy(LinearProbeCallback("deep", model=inner, mode=mode, num_classes=2))
        model.fit(x, y, verbose=0, callbacks=[probes])
        deep = inner(x).numpy()
        optimal = LogisticRegression(C=1e3, max_iter=1000).fit(deep, y).score(deep, y)
        assert by_hand(probes, "deep", deep, y) < 1 - optimal + 0.05


def test_an_unknown_size_is_not_another_size(tabular):
    x = np.random.default_rng(3).normal(size=(64, 5, 2)).astype("float32")
    y = (x[:, 0, 0] > 0).astype("int32")

    class Host(keras.Model):
        def __init__(self):
            super().__init__()
            self.pool = layers.GlobalAveragePooling1D()
            self.dense, self.out = layers.Dense(4, name="dense"), layers.Dense(2, name="out")

        def call(self, x):
            return self.out(self.pool(self.dense(x)))

    spec = (tf.TensorSpec((None, None, 2)), tf.TensorSpec((None,), tf.int32))
    data = tf.data.Dataset.from_generator(lambda: iter([(x, y)]), output_signature=spec)
    probes = LinearProbeCallback("dense", reduce="flatten")
    compiled(Host()).fit(x, y, validation_data=data, verbose=0, callbacks=[probes])
    assert "dense" in errors(probes)
