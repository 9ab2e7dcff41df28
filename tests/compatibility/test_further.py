"""Twenty models in the manner of keras.io, with the default call in both modes.

Each is trained plain, with isolated and with shared probes. Isolated probes leave it as it is, bit
for bit; the last validation error of one layer is recomputed by hand.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from keras_probes import LinearProbeCallback

pytestmark = pytest.mark.slow  # CI runs these; each trains a model three times

CE = "sparse_categorical_crossentropy"
N = 96


def rng():
    return np.random.default_rng(11)


def head(h, classes=2):
    """What most end in; `rep` is the layer that is looked at closely."""
    return layers.Dense(classes, "softmax", name="out")(layers.Dense(8, "relu", name="rep")(h))


def functional(inputs, h, classes=2):
    model = keras.Model(inputs, head(h, classes))
    model.compile("adam", CE)
    return model


def tokens():
    x = rng().integers(1, 30, (N, 10))
    x[np.arange(10) >= rng().integers(4, 11, N)[:, None]] = 0
    return x, (x[:, 0] > 15).astype("int32")


def waves(channels=1):
    x = rng().normal(size=(N, 64, channels)).astype("float32")
    return x, (x[:, :32].mean((1, 2)) > 0).astype("int32")


def images():
    x = rng().random((N, 8, 8, 1)).astype("float32")
    return x, (x[:, :4].mean((1, 2, 3)) > 0.5).astype("int32")


# Text.


def bag_of_words():
    i = keras.Input((None,), dtype="int32")
    h = layers.GlobalAveragePooling1D()(layers.Embedding(30, 8, mask_zero=True)(i))
    return functional(i, h), *tokens()


def bidirectional_lstm():
    i = keras.Input((None,), dtype="int32")
    h = layers.Bidirectional(layers.LSTM(6, return_sequences=True))(layers.Embedding(30, 8)(i))
    return functional(i, layers.Bidirectional(layers.LSTM(6))(h)), *tokens()


def text_convolution():
    i = keras.Input((None,), dtype="int64")
    h = layers.Conv1D(8, 3, padding="valid", activation="relu")(layers.Embedding(30, 8)(i))
    return functional(i, layers.Dropout(0.5)(layers.GlobalMaxPooling1D()(h))), *tokens()


@keras.saving.register_keras_serializable("test_further")
class Positions(layers.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.words = layers.Embedding(30, 8, mask_zero=True)
        self.places = layers.Embedding(10, 8)

    def call(self, x):
        return self.words(x) + self.places(ops.arange(ops.shape(x)[-1]))

    def compute_mask(self, inputs, mask=None):
        return self.words.compute_mask(inputs)


def text_transformer():
    i = keras.Input((10,), dtype="int32")
    h = Positions(name="embedding")(i)
    h = layers.LayerNormalization()(h + layers.MultiHeadAttention(2, 4)(h, h))
    h = layers.LayerNormalization()(h + layers.Dense(8)(layers.Dense(16, "relu")(h)))
    return functional(i, layers.GlobalAveragePooling1D()(h)), *tokens()


def strings():
    words = np.array(["good", "bad", "fine", "poor", "film", "plot"])
    some = rng()
    text = tf.constant([" ".join(words[some.integers(0, 6, 5)]) for _ in range(N)])
    vectorize = layers.TextVectorization(10, output_mode="multi_hot")
    vectorize.adapt(text)
    i = keras.Input((), dtype="string")
    y = np.array([b"good" in t for t in text.numpy()]).astype("int32")
    return functional(i, vectorize(i)), text, tf.constant(y)


# Audio.


def waveform():
    h = i = keras.Input((64, 1))
    for width in (4, 8):
        skip = layers.Conv1D(width, 1)(h)
        h = layers.Conv1D(width, 3, padding="same", activation="relu")(h)
        h = layers.MaxPooling1D(2)(layers.Add()([h, skip]))
    return functional(i, layers.Flatten()(h)), *waves()


def spectrogram():
    i = keras.Input((64, 1))
    h = layers.STFTSpectrogram(frame_length=16, frame_step=8, fft_length=16)(i)
    h = layers.Conv1D(8, 3, activation="relu")(layers.BatchNormalization()(h))
    return functional(i, layers.GlobalMaxPooling1D()(h)), *waves()


# Structured data.


def wide_and_deep():
    age = rng().normal(40, 10, (N, 1)).astype("float32")
    job = rng().integers(0, 4, (N, 1))
    scaled = layers.Normalization()
    scaled.adapt(age)
    i = {"age": keras.Input((1,), name="age"), "job": keras.Input((1,), dtype="int64", name="job")}
    one_hot = layers.CategoryEncoding(4, output_mode="one_hot")(i["job"])
    wide = layers.Concatenate()([scaled(i["age"]), one_hot])
    deep = layers.BatchNormalization()(layers.Dense(8, "relu")(wide))
    y = ((age[:, 0] > 40) & (job[:, 0] > 0)).astype("int32")
    return functional(i, layers.Concatenate()([wide, deep])), {"age": age, "job": job}, y


def gated_residual():
    x = rng().normal(size=(N, 6)).astype("float32")
    i = keras.Input((6,))
    h = layers.Dense(8, "elu")(i)
    gate = layers.Dense(8, "sigmoid")(h)
    h = layers.LayerNormalization()(layers.Multiply()([gate, layers.Dense(8)(h)]) + h)
    return functional(i, h), x, (x[:, 0] > 0).astype("int32")


def hashed_crosses():
    x = {"a": rng().integers(0, 5, (N, 1)), "b": rng().integers(0, 5, (N, 1))}
    i = {name: keras.Input((1,), dtype="int64", name=name) for name in x}
    crossed = layers.HashedCrossing(16)((i["a"], i["b"]))
    h = layers.Flatten()(layers.Embedding(16, 4)(crossed))
    return functional(i, h), x, (x["a"][:, 0] > x["b"][:, 0]).astype("int32")


# Time series.


def series_convolution():
    h = i = keras.Input((64, 2))
    for _ in range(2):
        h = layers.ReLU()(layers.BatchNormalization()(layers.Conv1D(6, 3, padding="same")(h)))
    return functional(i, layers.GlobalAveragePooling1D()(h)), *waves(2)


def series_transformer():
    i = keras.Input((None, 2))
    h = layers.LayerNormalization()(i)
    h = layers.MultiHeadAttention(2, 4, dropout=0.1)(h, h) + i
    h = h + layers.Conv1D(2, 1)(layers.Conv1D(4, 1, activation="relu")(h))
    h = layers.GlobalAveragePooling1D(data_format="channels_last")(h)
    return functional(i, h), *waves(2)


def frames():
    x = rng().random((N, 3, 6, 6, 1)).astype("float32")
    i = keras.Input((3, 6, 6, 1))
    h = layers.ConvLSTM2D(3, 3, return_sequences=True)(i)
    h = layers.TimeDistributed(layers.GlobalAveragePooling2D())(h)
    return functional(i, layers.GRU(4)(h)), x, (x[:, 0].mean((1, 2, 3)) > 0.5).astype("int32")


def masked_series():
    x, y = waves(2)
    x[:, 40:] = 0.0
    i = keras.Input((64, 2))
    return functional(i, layers.GRU(6)(layers.Masking()(i))), x, y


# Graphs.


@keras.saving.register_keras_serializable("test_further")
class GraphConvolution(layers.Layer):
    def __init__(self, width, **options):
        super().__init__(**options)
        self.dense = layers.Dense(width)

    def call(self, nodes, edges):
        return ops.relu(self.dense(ops.matmul(edges, nodes)))


def graph_convolution():
    nodes = rng().normal(size=(N, 5, 3)).astype("float32")
    edges = (rng().random((N, 5, 5)) > 0.5).astype("float32")
    i = [keras.Input((5, 3)), keras.Input((5, 5))]
    h = GraphConvolution(6, name="second")(GraphConvolution(6, name="first")(i[0], i[1]), i[1])
    y = (nodes[:, 0, 0] > 0).astype("int32")
    return functional(i, layers.GlobalAveragePooling1D()(h)), [nodes, edges], y


def deep_sets():
    x = rng().normal(size=(N, 7, 3)).astype("float32")
    i = keras.Input((None, 3))
    h = ops.sum(layers.Dense(8, "relu", name="each")(i), axis=1)
    return functional(i, h), x, (x.sum((1, 2)) > 0).astype("int32")


# Vision.


def patches():
    x, y = images()
    i = keras.Input((8, 8, 1))
    h = layers.Reshape((16, 4))(layers.Conv2D(4, 2, 2)(i))
    mixed = layers.Permute((2, 1))(layers.Dense(16, "gelu")(layers.Permute((2, 1))(h)))
    return functional(i, layers.GlobalAveragePooling1D()(layers.Add()([h, mixed]))), x, y


def siamese():
    x, y = images()
    one, two = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    tower = keras.Sequential([layers.Conv2D(4, 3), layers.GlobalMaxPooling2D()], name="tower")
    h = layers.Subtract()([tower(one), tower(two)])
    return functional([one, two], h), [x, np.roll(x, 1, axis=0)], y


# Generative.


class Vae(keras.Model):
    """Samples in its call, and has a step of its own that takes x alone."""

    def __init__(self):
        super().__init__()
        self.flat, self.rep = layers.Flatten(), layers.Dense(8, "relu", name="rep")
        self.mean, self.spread = layers.Dense(2, name="mean"), layers.Dense(2, name="spread")
        self.decoder = layers.Dense(64, "sigmoid", name="decoder")
        self.seed = keras.random.SeedGenerator(3)

    def call(self, x, training=False):
        h = self.rep(self.flat(x))
        z = self.mean(h)
        if training:
            z += ops.exp(self.spread(h)) * keras.random.normal(ops.shape(z), seed=self.seed)
        return ops.reshape(self.decoder(z), ops.shape(x))

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            loss = ops.mean((self(x, training=True) - x) ** 2)
        some = [v for v in self.trainable_variables if "spread" not in v.path]
        self.optimizer.apply(tape.gradient(loss, some), some)
        return {"loss": loss}

    def test_step(self, data):
        x, _ = data
        return {"loss": ops.mean((self(x, training=False) - x) ** 2)}


def variational():
    x, y = images()
    model = Vae()
    model.build(x.shape)
    model.compile("adam")
    return model, x, y


class Contrastive(keras.Model):
    def __init__(self):
        super().__init__()
        self.encoder = keras.Sequential(
            [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(8, "relu", name="rep")]
        )
        self.projection = keras.Sequential([keras.Input((8,)), layers.Dense(4)])

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            one, two = (
                self.projection(self.encoder(x * scale, training=True)) for scale in (0.9, 1.1)
            )
            loss = ops.mean((one - two) ** 2) - ops.mean(ops.std(one, axis=0))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables),
                             self.trainable_variables)  # fmt: skip
        return {"loss": loss}

    def test_step(self, data):
        x, _ = data
        return {"loss": ops.mean(self.projection(self.encoder(x)))}


def contrastive():
    model = Contrastive()
    model.compile("adam")
    return model, *images()


HOSTS = [
    text_transformer, strings, spectrogram, gated_residual, masked_series, graph_convolution,
    siamese, variational,
]  # fmt: skip
MORE_HOSTS = [  # in the manner of those, weekly
    bag_of_words, bidirectional_lstm, text_convolution, waveform, wide_and_deep, hashed_crosses,
    series_convolution, series_transformer, frames, deep_sets, patches, contrastive,
]  # fmt: skip


def trained(make, mode=None):
    keras.utils.clear_session()
    keras.utils.set_random_seed(2)
    host, x, y = make()
    probes = LinearProbeCallback(mode=mode) if mode else None
    history = host.fit(
        x, y, epochs=2, shuffle=False, validation_data=(x, y), verbose=0,
        callbacks=[probes] if probes else [],
    ).history  # fmt: skip
    return host, x, y, probes, history


def rep(host, x):
    """What the layer `rep` computes, by Keras alone."""
    if isinstance(host, Vae):
        return host.rep(host.flat(x))
    network = getattr(host, "encoder", host)
    return keras.Model(network.inputs, network.get_layer("rep").output)(x)


@pytest.mark.parametrize(
    "make", [*HOSTS, *(pytest.param(host, marks=pytest.mark.weekly) for host in MORE_HOSTS)]
)
def test_the_default_call_works_and_is_right(make):
    plain, *_, plain_history = trained(make)
    for mode in ("isolated", "shared"):
        host, x, y, probes, history = trained(make, mode)
        for got, expected in zip(host.variables, plain.variables, strict=True):
            if mode == "isolated":
                np.testing.assert_array_equal(got, expected)
            else:
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        if mode == "isolated":
            assert {k: v for k, v in history.items() if "probe" not in k} == plain_history
        tap = "encoder/rep" if isinstance(host, Contrastive) else "rep"
        kernel, bias = probes.weights(tap)
        wrong = np.mean((np.asarray(rep(host, x)) @ kernel + bias).argmax(axis=1) != np.asarray(y))
        assert history[f"val_probe_error/{tap}"][-1] == pytest.approx(wrong, abs=1e-12)
        refit = probes.results.refits[-1]
        own_rows = mode == "shared" and isinstance(host, Contrastive)  # it sees scaled x alone
        assert bool(refit.left_out) == own_rows
        certificates = probes.results.measured("error")["certificate"]
        assert certificates.isna().all() if own_rows else certificates.notna().all()
