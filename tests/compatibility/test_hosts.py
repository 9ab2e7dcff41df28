"""Every kind of host and training loop: errors are right, the host is untouched, nothing is left.

Each case trains a host three times: plain, with shared and with isolated probes. The last
validation error of a tap is recomputed in NumPy from `probes.weights` and from what the layer
returns when the trained host is called eagerly.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hosts import compiled, dense_net
from keras import layers, ops

from keras_probes import Flatten, LinearProbeCallback

pytestmark = pytest.mark.slow  # CI runs these; each trains several hosts

N, VALIDATION = 96, 48
Data = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A host and how it is trained.

    Attributes:
        make: Returns the compiled host.
        tap: The tap to look at closely.
        fit: Options of `fit`, over epochs=2, batch_size=32.
        data: Returns (x, y) of so many examples.
        arrange: Turns (x, y) into what the host takes.
        feed: Turns that into the arguments of `fit`.
        probe: Arguments of the callback.
        labels: (x, y) -> integer labels of the probes.
        rounding: Tolerance of shared mode; 0 where it is bit-identical.
    """

    make: Callable[[], keras.Model]
    tap: str = "dense"
    fit: dict = dataclasses.field(default_factory=dict)
    data: Callable[[int], Data] | None = None
    arrange: Callable[[Any, Any], Data] = lambda x, y: (x, y)
    feed: Callable[[Any, Any], dict] = lambda x, y: {"x": x, "y": y}
    probe: dict = dataclasses.field(default_factory=dict)
    labels: Callable[[Any, Any], Any] = lambda x, y: y
    rounding: float = 1e-4


# Data.


def digits(n):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    start = 0 if n == N else N
    x = bunch.images[start : start + n, ..., None].astype("float32") / 16
    return x, bunch.target[start : start + n]


def sequences(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 6, 4)).astype("float32")
    return x, (x[:, -1, 0] > 0).astype("int64") + (x[:, 0, 1] > 0)


def tokens(n):
    rng = np.random.default_rng(n)
    x = rng.integers(1, 9, (n, 7))
    for row, length in enumerate(rng.integers(2, 8, n)):
        x[row, length:] = 0
    return x, (x[:, 0] + x[:, 1]) % 3


def volumes(n):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 4, 4, 4, 2)).astype("float32")
    return x, (x.mean(axis=(1, 2, 3, 4)) > 0).astype("int64")


# Hosts.


def classifier(inputs, outputs, optimizer="adam", **options):
    model = keras.Model(inputs, outputs)
    model.compile(optimizer, "sparse_categorical_crossentropy", **options)
    return model


def softmax(h, classes=10):
    return layers.Dense(classes, activation="softmax", name="out")(h)


def sequential(**options):
    return compiled(dense_net(), **options)


def branches():
    x = keras.Input((8, 8, 1))
    a = layers.Conv2D(3, 3, padding="same", activation="relu", name="left")(x)
    b = layers.Conv2D(3, 3, padding="same", activation="relu", name="right")(x)
    h = layers.Add(name="add")([a, b])
    return classifier(x, softmax(layers.Flatten()(layers.MaxPooling2D(2, name="pool")(h))))


def nested():
    inner_in = keras.Input((64,))
    inner = keras.Model(
        inner_in, layers.Dense(12, activation="relu", name="dense")(inner_in), name="inner"
    )
    x = keras.Input((8, 8, 1))
    return classifier(x, softmax(inner(layers.Flatten()(x))))


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.flat = layers.Flatten()
        self.dense = layers.Dense(12, activation="relu", name="dense")
        self.drop = layers.Dropout(0.2)
        self.out = layers.Dense(10, activation="softmax", name="out")

    def call(self, x, training=False):
        return self.out(self.drop(self.dense(self.flat(x)), training=training))


def subclassed(built=True, cls=Subclassed):
    model = cls(name="subclassed")
    if built:
        model(np.zeros((2, 8, 8, 1), "float32"))
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


class CustomSteps(Subclassed):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}

    def test_step(self, data):
        x, y = data
        return {"loss": self.compute_loss(x, y, self(x, training=False))}


def shared_layer():
    x = keras.Input((8, 8, 1))
    dense = layers.Dense(64, activation="relu", name="dense")
    return classifier(x, softmax(dense(dense(layers.Flatten()(x)))))


def several_inputs():
    a, b = keras.Input((8, 8, 1), name="a"), keras.Input((8, 8, 1), name="b")
    h = layers.Concatenate(name="both")([layers.Flatten()(a), layers.Flatten()(b)])
    return classifier([a, b], softmax(layers.Dense(12, name="dense")(h)))


def several_outputs(as_dict):
    x = keras.Input((8, 8, 1))
    h = layers.Dense(12, activation="relu", name="dense")(layers.Flatten()(x))
    digit, parity = softmax(h), layers.Dense(2, activation="softmax", name="parity")(h)
    model = keras.Model(x, {"out": digit, "parity": parity} if as_dict else [digit, parity])
    loss = "sparse_categorical_crossentropy"
    model.compile("adam", {"out": loss, "parity": loss} if as_dict else [loss, loss])
    return model


def multi_label():
    x = keras.Input((8, 8, 1))
    h = layers.Dense(12, activation="relu", name="dense")(layers.Flatten()(x))
    model = keras.Model(x, layers.Dense(10, activation="sigmoid", name="out")(h))
    model.compile("adam", "binary_crossentropy")
    return model


def regression():
    x = keras.Input((8, 8, 1))
    h = layers.Dense(12, activation="relu", name="dense")(layers.Flatten()(x))
    model = keras.Model(x, layers.Dense(1, name="out")(h))
    model.compile("adam", "mse")
    return model


def autoencoder():
    x = keras.Input((8, 8, 1))
    code = layers.Dense(8, activation="relu", name="code")(layers.Flatten()(x))
    model = keras.Model(x, layers.Reshape((8, 8, 1))(layers.Dense(64, name="out")(code)))
    model.compile("adam", "mse")
    return model


class Gan(keras.Model):
    """Two networks and two optimizers; probed at the discriminator."""

    def __init__(self):
        super().__init__()
        self.flat = layers.Flatten()
        self.dense = layers.Dense(12, activation="relu", name="dense")
        self.judge = layers.Dense(1, name="judge")
        self.generate = layers.Dense(64, name="generate")
        self.seeds = keras.random.SeedGenerator(3)

    def discriminate(self, x):
        return self.judge(self.dense(self.flat(x)))

    def call(self, x):
        return self.discriminate(x)

    def compile(self, **kwargs):
        super().compile(**kwargs)
        self.of_generator = keras.optimizers.Adam(1e-3)

    def train_step(self, data):
        x, _ = data
        noise = keras.random.normal((32, 5), seed=self.seeds)
        fake = self.generate(noise)
        with tf.GradientTape() as tape:
            real, faked = self(x), self.judge(self.dense(fake))
            loss = tf.reduce_mean(tf.nn.softplus(-real)) + tf.reduce_mean(tf.nn.softplus(faked))
        own = [*self.dense.trainable_variables, *self.judge.trainable_variables]
        self.optimizer.apply(tape.gradient(loss, own), own)
        with tf.GradientTape() as tape:
            against = tf.reduce_mean(tf.nn.softplus(-self.judge(self.dense(self.generate(noise)))))
        own = self.generate.trainable_variables
        self.of_generator.apply(tape.gradient(against, own), own)
        return {"loss": loss}

    def test_step(self, data):
        return {"loss": tf.reduce_mean(self(data[0]))}


def gan():
    model = Gan()
    model(np.zeros((32, 8, 8, 1), "float32"))
    model.generate(np.zeros((32, 5), "float32"))
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    return model


def recurrent(layer):
    def make():
        x = keras.Input((6, 4))
        h = layer()(x)
        return classifier(x, softmax(h, 3))

    return make


def masked():
    x = keras.Input((7,), dtype="int64")
    h = layers.Embedding(9, 5, mask_zero=True, name="embed")(x)
    return classifier(x, softmax(layers.LSTM(6, name="dense")(h), 3))


def transformer():
    x = keras.Input((7,), dtype="int64")
    h = layers.Embedding(9, 8, name="embed")(x)
    attended = layers.MultiHeadAttention(2, 4, dropout=0.1, name="attention")(h, h)
    h = layers.LayerNormalization(name="norm1")(layers.Add(name="add1")([h, attended]))
    wide = layers.Dense(8, name="down")(layers.Dense(16, activation="gelu", name="up")(h))
    h = layers.LayerNormalization(name="norm2")(layers.Add(name="add2")([h, wide]))
    return classifier(x, softmax(layers.GlobalAveragePooling1D(name="pool")(h), 3))


def conv1d():
    x = keras.Input((6, 4))
    h = layers.Conv1D(5, 3, activation="relu", name="dense")(x)
    return classifier(x, softmax(layers.GlobalMaxPooling1D()(h), 3))


def conv3d():
    x = keras.Input((4, 4, 4, 2))
    h = layers.Conv3D(5, 2, activation="relu", name="dense")(x)
    return classifier(x, softmax(layers.GlobalMaxPooling3D()(h), 2))


def channels_first():
    """What the CPU can of it: dense layers, normalisation and averages."""
    x = keras.Input((3, 8, 8))
    h = layers.BatchNormalization(axis=1, name="dense")(x)
    return classifier(x, softmax(layers.GlobalAveragePooling2D(data_format="channels_first")(h)))


def first(n):
    x, y = digits(n)
    return np.moveaxis(x, -1, 1) * np.array([1.0, 0.5, 2.0], "float32")[:, None, None], y


def with_policy(policy, **options):
    def make():
        x = keras.Input((8, 8, 1))
        given = {"dtype": policy}
        h = layers.Dense(16, activation="relu", name="dense", **given)(layers.Flatten(**given)(x))
        h = layers.Dropout(0.2, seed=3, **given)(h)
        out = layers.Dense(10, activation="softmax", name="out", dtype="float32")(h)
        model = keras.Model(x, out)
        model.compile(**{"optimizer": "adam", **options}, loss="sparse_categorical_crossentropy")
        return model

    return make


def regularised():
    x = keras.Input((8, 8, 1))
    h = layers.Dense(
        12, name="dense", kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1(1e-3)
    )(layers.Flatten()(x))
    return classifier(x, softmax(h))


def remat():
    if not hasattr(keras, "RematScope"):
        pytest.skip("Keras has RematScope from 3.9 on")
    x = keras.Input((8, 8, 1))
    with keras.RematScope(mode="full"):  # where Keras itself fails with Dense, inside of `fit`
        h = layers.Conv2D(3, 3, activation="relu", name="dense")(x)
    return classifier(x, softmax(layers.Flatten()(h)))


def optimizer(**options):
    return lambda: sequential(optimizer=keras.optimizers.Adam(**options))


# Loops.


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, **kwargs):
        super().__init__(**kwargs)
        self.x, self.y = x, y

    def __len__(self):
        return -(-len(self.x) // 32)

    def __getitem__(self, i):
        return self.x[i * 32 : (i + 1) * 32], self.y[i * 32 : (i + 1) * 32]


def tf_data(batch=32, endless=False):
    def feed(x, y):
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch)
        return {"x": data.repeat() if endless else data, "batch_size": None}

    return feed


def generated(x, y):
    def batches():
        while True:
            yield from zip(np.split(x, 3), np.split(y, 3), strict=True)

    return {"x": batches(), "steps_per_epoch": 3, "batch_size": None}


def py_dataset(x, y):
    return {"x": Batches(x, y, workers=2, use_multiprocessing=False), "batch_size": None}


def torch_loader(x, y):
    torch = pytest.importorskip("torch", reason="torch is optional")
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    return {"x": torch.utils.data.DataLoader(data, batch_size=32), "batch_size": None}


def weighted(x, y):
    return {"x": x, "y": y, "sample_weight": np.linspace(0.1, 2, len(y)).astype("float32")}


seq = {"data": sequences}
CASES = {
    "sequential": Case(sequential, rounding=0),
    "functional with branches": Case(branches, "add"),
    "nested": Case(nested, "inner/dense"),
    "subclassed, built": Case(subclassed),
    "subclassed, not built": Case(lambda: subclassed(built=False)),
    "custom train_step and test_step": Case(lambda: subclassed(cls=CustomSteps)),
    "shared layer, second call": Case(shared_layer, "dense#1"),
    "several inputs": Case(several_inputs, arrange=lambda x, y: ([x, x[:, ::-1]], y)),
    "outputs in a dict": Case(
        lambda: several_outputs(True),
        arrange=lambda x, y: (x, {"out": y, "parity": y % 2}),
        probe={"target": "out"},
    ),
    "outputs in a list": Case(
        lambda: several_outputs(False),
        arrange=lambda x, y: (x, [y, y % 2]),
        probe={"target": 1},
        labels=lambda x, y: y % 2,
    ),
    "multi-label": Case(
        multi_label,
        arrange=lambda x, y: (x, np.eye(10, dtype="float32")[y]),
        probe={"target": lambda x, y: tf.argmax(y, axis=1), "num_classes": 10},
    ),
    "regression": Case(
        regression,
        arrange=lambda x, y: (x, y.astype("float32")),
        probe={"target": lambda x, y: y >= 5, "num_classes": 2},
        labels=lambda x, y: y >= 5,
    ),
    "autoencoder": Case(
        autoencoder,
        "code",
        arrange=lambda x, y: (x, x),
        probe={"target": lambda x, y: tf.reduce_mean(x, (1, 2, 3)) > 0.3, "num_classes": 2},
        labels=lambda x, y: x.mean(axis=(1, 2, 3)) > 0.3,
    ),
    "two optimizers": Case(gan, probe={"num_classes": 10}),
    "SimpleRNN": Case(recurrent(lambda: layers.SimpleRNN(5, name="dense")), **seq),
    "LSTM": Case(recurrent(lambda: layers.LSTM(5, name="dense")), **seq),
    "GRU": Case(recurrent(lambda: layers.GRU(5, name="dense")), **seq),
    "Bidirectional": Case(
        recurrent(lambda: layers.Bidirectional(layers.LSTM(4), name="dense")), **seq
    ),
    "Embedding with a mask": Case(masked, data=tokens),
    "transformer": Case(transformer, "norm2", data=tokens),
    "Conv1D": Case(conv1d, **seq),
    "Conv3D": Case(conv3d, data=volumes),
    "channels_first": Case(channels_first, data=first),
    "mixed_bfloat16": Case(with_policy("mixed_bfloat16"), rounding=0.05),
    "mixed_float16": Case(with_policy("mixed_float16"), rounding=0.01),
    "float64": Case(with_policy("float64")),
    "jit_compile=True": Case(lambda: sequential(jit_compile=True)),
    "jit_compile=False": Case(lambda: sequential(jit_compile=False), rounding=0),
    "run_eagerly": Case(lambda: sequential(run_eagerly=True), rounding=0),
    "steps_per_execution=8, ragged end": Case(
        lambda: sequential(steps_per_execution=8), fit={"batch_size": 9}
    ),
    "gradient_accumulation_steps": Case(optimizer(gradient_accumulation_steps=2)),
    "use_ema": Case(optimizer(use_ema=True, ema_overwrite_frequency=2)),
    "clipnorm": Case(optimizer(clipnorm=0.1)),
    "weight decay": Case(lambda: sequential(optimizer=keras.optimizers.AdamW(1e-3))),
    "regularisers": Case(regularised),
    "RematScope": Case(remat),
    "tf.data": Case(sequential, feed=tf_data()),
    "tf.data, ragged last batch": Case(sequential, feed=tf_data(batch=36)),
    "tf.data, endless": Case(
        sequential, feed=tf_data(endless=True), fit={"steps_per_epoch": 2, "epochs": 3}
    ),
    "PyDataset with workers": Case(sequential, feed=py_dataset),
    "generator": Case(sequential, feed=generated),
    "torch DataLoader": Case(sequential, feed=torch_loader),
    "validation_freq": Case(sequential, fit={"validation_freq": 2}),
    "class_weight": Case(sequential, fit={"class_weight": {i: 1.0 + i for i in range(10)}}),
    "sample_weight": Case(sequential, feed=weighted),
    "initial_epoch": Case(sequential, fit={"initial_epoch": 3, "epochs": 5}),
}  # fmt: skip


def layer_of(host, tap):
    """The layer behind a tap's name, and which of its calls."""
    path, _, call = tap.partition("#")
    for name in path.split("/"):
        host = next(layer for layer in host.layers if layer.name == name)
    return host, int(call or 0)


def seen(host, tap, x):
    """What a layer returns while the host is called, eagerly; float32, a row for each example."""
    layer, call = layer_of(host, tap)
    outputs, original = [], layer.call

    def noted(*args, **kwargs):
        outputs.append(original(*args, **kwargs))
        return outputs[-1]

    vars(layer)["call"] = noted
    try:
        host(tf.nest.map_structure(tf.convert_to_tensor, x), training=False)
    finally:
        del vars(layer)["call"]
    h = np.asarray(ops.cast(outputs[call], "float32"))
    return h.reshape(len(h), -1)


def variables_of(host):
    return [v.numpy() for v in (*host.variables, *host.optimizer.variables)]


def train(case, *callbacks):
    """A host after its training, and the history of its own measures."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    host = case.make()
    data = case.data or digits
    (x, y), (x_val, y_val) = data(N), data(VALIDATION)
    options = {
        "epochs": 2,
        "batch_size": 32,
        "shuffle": False,
        "validation_data": case.arrange(x_val, y_val),
        "validation_batch_size": 32,
        "verbose": 0,
        **case.feed(*case.arrange(x, y)),
        **case.fit,
    }
    history = host.fit(**options, callbacks=list(callbacks)).history
    return host, history


def own(history):
    return {key: values for key, values in history.items() if "probe" not in key}


# What others of these stand for.
WEEKLY = [
    "functional with branches", "shared layer, second call", "outputs in a list", "SimpleRNN",
    "GRU", "Conv1D", "channels_first", "mixed_float16", "float64", "jit_compile=False",
    "gradient_accumulation_steps", "clipnorm", "weight decay", "regularisers", "tf.data",
    "PyDataset with workers", "validation_freq", "initial_epoch", "two optimizers",
]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.weekly if name in WEEKLY else ()) for name in CASES],
)
def test_errors_are_right_and_the_host_is_untouched(name):
    case = CASES[name]
    plain, plain_history = train(case)
    functions = sorted(name for name in vars(plain) if callable(vars(plain)[name]))
    for mode in ("isolated", "shared"):
        probes = LinearProbeCallback(case.tap, reduce=Flatten(), mode=mode, **case.probe)
        host, history = train(case, probes)

        for got, expected in zip(variables_of(host), variables_of(plain), strict=True):
            if mode == "isolated" or not case.rounding:
                np.testing.assert_array_equal(got, expected)
            else:
                np.testing.assert_allclose(
                    got.astype("float64"), expected, rtol=case.rounding, atol=case.rounding
                )
        if mode == "isolated":
            assert own(history) == plain_history
        assert sorted(name for name in vars(host) if callable(vars(host)[name])) == functions
        assert all("call" not in vars(layer) for layer in host._flatten_layers())

        # The last epoch's validation came after the last step, on the host as it is now.
        x, y = (case.data or digits)(VALIDATION)
        kernel, bias = probes.weights(case.tap)
        logits = seen(host, case.tap, case.arrange(x, y)[0]) @ kernel + bias
        wrong = np.mean(logits.argmax(axis=1) != case.labels(x, y))
        assert history[f"val_probe_error/{case.tap}"][-1] == pytest.approx(wrong, abs=1e-12)
        frame = probes.results.frame()
        assert np.isfinite(frame["value"]).all()
        train_n = frame.loc[frame["split"] == "train", "n"]
        assert set(train_n) == {64 if "endless" in name else N}
        # Refitted at the end of each epoch, or the reason is there.
        refit, last = probes.results.refits[-1], probes.results.measured("error")
        assert mode == "shared" or refit.left_out == {}
        assert last["certificate"].notna().all() == (refit.left_out == {})
