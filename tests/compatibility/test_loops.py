"""What happens around a fit: overflows, several fits, flags that change, other uses of the host."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hosts import activations, compiled, dense_net, fingerprint
from keras import layers

from keras_probes import LinearProbeCallback, SpatialPool, Token

pytestmark = pytest.mark.slow  # CI runs these; each trains several hosts


def error_by_hand(model, probes, tap, x, y):
    kernel, bias = probes.weights(tap)
    h = activations(model, tap, x).reshape(len(x), -1).astype("float32")
    return np.mean((h @ kernel + bias).argmax(axis=1) != y)


@pytest.mark.parametrize("mode", ["shared", "isolated"])
def test_a_step_that_overflows_harms_no_probe(digits, mode):
    """float16 with loss scaling: the first scales are too high, and the host skips those steps."""
    (x, y), (x_val, y_val) = digits
    inputs = keras.Input((8, 8, 1))
    h = layers.Flatten(dtype="mixed_float16")(inputs)
    h = layers.Dense(16, activation="relu", name="dense", dtype="mixed_float16")(h)
    out = layers.Dense(10, activation="softmax", name="out", dtype="float32")(h)
    model = keras.Model(inputs, out)
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(), initial_scale=2.0**40, dynamic_growth_steps=4
    )
    model.compile(optimizer, "sparse_categorical_crossentropy")
    probes = LinearProbeCallback(["input", "dense"], mode=mode)
    history = model.fit(
        x, y, batch_size=32, epochs=3, validation_data=(x_val, y_val), callbacks=[probes], verbose=0
    ).history
    skipped = 30 - int(optimizer.inner_optimizer.iterations.numpy())
    assert skipped > 5
    assert float(optimizer.dynamic_scale.numpy()) < 2.0**40
    assert all(np.isfinite(values).all() for values in history.values())
    assert history["val_probe_error/input"][-1] < 0.2
    assert (probes.results.frame()["n"] >= 160).all()


def test_flags_changed_between_fits(digits):
    """A frozen layer, then a thawed one: the host trains as it would, the probes go on."""
    (x, y), validation = digits

    def run(*callbacks):
        model = compiled(dense_net())
        for trainable in (False, True):
            model.get_layer("dense").trainable = trainable
            compiled(model)
            model.fit(x, y, callbacks=list(callbacks), validation_data=validation, verbose=0)
        return model

    probes = LinearProbeCallback("dense", mode="isolated")
    assert fingerprint(run(probes)) == fingerprint(run())
    assert {row.step for row in probes.results.rows} == {20}


@pytest.mark.parametrize("mode", ["shared", "isolated"])
def test_an_int8_host_in_evaluation(digits, mode):
    (x, y), (x_val, y_val) = digits
    model = compiled(dense_net())
    model.fit(x, y, epochs=2, verbose=0)
    model.quantize("int8")
    compiled(model)
    probes = LinearProbeCallback("dense", mode=mode)
    model.fit(x, y, epochs=1, callbacks=[probes], verbose=0)
    logs = model.evaluate(x_val, y_val, callbacks=[probes], return_dict=True, verbose=0)
    by_hand = error_by_hand(model, probes, "dense", x_val, y_val)
    assert logs["probe_error/dense"] == pytest.approx(by_hand, abs=1.5 / 160)


def test_train_on_batch_is_left_alone(digits):
    (x, y), _ = digits

    def run(*callbacks):
        model = compiled(dense_net())
        model.fit(x, y, callbacks=list(callbacks), verbose=0)
        model.train_on_batch(x[:32], y[:32])
        return model

    probes = LinearProbeCallback("dense", mode="isolated")
    assert fingerprint(run(probes)) == fingerprint(run())
    assert probes._online.probes.steps == 10


def test_validation_split(digits):
    (x, y), _ = digits
    model, probes = compiled(dense_net()), LinearProbeCallback("dense")
    history = model.fit(x, y, validation_split=0.25, callbacks=[probes], verbose=0).history
    by_hand = error_by_hand(model, probes, "dense", x[240:], y[240:])
    assert history["val_probe_error/dense"][-1] == by_hand
    frame = probes.results.frame()
    assert dict(zip(frame["split"], frame["n"], strict=True)) == {"train": 240, "validation": 80}


@pytest.mark.parametrize("generated_first", [True, False])
def test_a_layer_that_a_step_also_calls_on_other_data(digits, generated_first):
    """As a GAN's discriminator: what the host itself is called on is what is probed."""
    (x, y), (x_val, y_val) = digits

    class Host(keras.Model):
        def __init__(self):
            super().__init__()
            self.flat, self.dense = layers.Flatten(), layers.Dense(12, name="dense")
            self.out = layers.Dense(10, activation="softmax", name="out")

        def call(self, x):
            return self.out(self.dense(self.flat(x)))

        def train_step(self, data):
            x, y = data
            noise = tf.ones_like(self.flat(x))
            with tf.GradientTape() as tape:
                if generated_first:
                    self.dense(noise)
                loss = self.compute_loss(x, y, self(x))
                if not generated_first:
                    self.dense(noise)
            variables = self.trainable_variables
            self.optimizer.apply(tape.gradient(loss, variables), variables)
            return {"loss": loss}

    keras.utils.set_random_seed(0)
    model = Host()
    model(x[:2])
    model.compile("adam", "sparse_categorical_crossentropy")
    probes = LinearProbeCallback("dense")
    history = model.fit(x, y, epochs=4, callbacks=[probes], verbose=0).history
    assert history["probe_error/dense"][-1] < 0.3  # of noise, nothing can be told


def test_a_class_token_and_a_spatial_grid(digits):
    (x, y), validation = digits
    inputs = keras.Input((8, 8, 1))
    h = layers.Conv2D(5, 3, padding="same", activation="relu", name="conv")(inputs)
    tokens = layers.Reshape((64, 5), name="tokens")(h)
    mixed = layers.MultiHeadAttention(1, 4, name="attention")(tokens, tokens)
    out = layers.Dense(10, activation="softmax", name="out")(mixed[:, 0])
    model = compiled(keras.Model(inputs, out))
    reduce = {"conv": SpatialPool(100), "attention": Token(0)}
    probes = LinearProbeCallback(["conv", "attention"], reduce=reduce)
    model.fit(x, y, callbacks=[probes], validation_data=validation, verbose=0)
    table = probes.results.table()
    assert dict(table["features"]) == {"conv": 80, "attention": 5}
    kernel, bias = probes.weights("attention")
    first = activations(model, "attention", validation[0])[:, 0]
    wrong = np.mean((first @ kernel + bias).argmax(axis=1) != validation[1])
    assert table["validation error"]["attention"] == wrong
