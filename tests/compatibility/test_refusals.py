"""What can't be probed is refused before the host trains, with the tap and what to use instead."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hosts import compiled
from keras import layers

from keras_probes import LinearProbeCallback


def refused(model, wanted, error, message, x=None, y=None):
    x = np.zeros((8, *model.inputs[0].shape[1:]), "float32") if x is None else x
    y = np.arange(len(x)) % 2 if y is None else y
    before = [w.copy() for w in model.get_weights()]
    with pytest.raises(error, match=message):
        compiled(model).fit(x, y, callbacks=[LinearProbeCallback(wanted)], verbose=0)
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_cell_within_a_recurrent_layer():
    inputs = keras.Input((6, 4))
    h = layers.RNN(layers.LSTMCell(5, name="cell"), name="recurrent")(inputs)
    model = keras.Model(inputs, layers.Dense(10, activation="softmax", name="out")(h))
    refused(model, "cell", ValueError, "'cell'.*loop.*'recurrent'")


def test_a_layer_that_is_called_in_a_loop():
    class Looped(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.inner = layers.Dense(4, name="inner")

        def build(self, shape):
            self.inner.build(shape)

        def call(self, x):
            return tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, self.inner(h)), (0, x))[1]

        def compute_output_shape(self, shape):
            return shape

    inputs = keras.Input((4,))
    h = Looped(name="looped")(inputs)
    model = keras.Model(inputs, layers.Dense(10, activation="softmax", name="out")(h))
    refused(model, "inner", ValueError, "'inner'.*loop.*'looped'")


def test_a_layer_that_is_never_called():
    class Host(keras.Model):
        def __init__(self):
            super().__init__()
            self.unused = layers.Dense(4, name="unused")
            self.unused.build((None, 4))
            self.out = layers.Dense(10, activation="softmax", name="out")

        def call(self, x):
            return self.out(x)

    model = Host()
    model(np.zeros((2, 4), "float32"))
    refused(model, "unused", ValueError, "'unused'.*never", x=np.zeros((8, 4), "float32"))


def test_a_tap_that_the_step_does_not_compute():
    class Host(keras.Model):
        def __init__(self):
            super().__init__()
            self.extra = layers.Dense(4, name="extra")
            self.out = layers.Dense(10, activation="softmax", name="out")

        def call(self, x, training=False):
            return self.out(x if training else self.extra(x))

    model = Host()
    model(np.zeros((2, 4), "float32"))
    refused(model, "extra", ValueError, "'extra'.*does not compute|does not compute.*'extra'",
            x=np.zeros((8, 4), "float32"))  # fmt: skip


@pytest.mark.parametrize("reduce", ["auto", "gap", "random"])
def test_a_tap_whose_shape_changes_between_batches(reduce):
    inputs = keras.Input((None, 4))
    h = layers.Conv1D(5, 1, name="conv")(inputs)
    out = layers.Dense(10, activation="softmax", name="out")(layers.GlobalMaxPooling1D()(h))
    model = compiled(keras.Model(inputs, out))

    def batches():
        for steps in (3, 5, 4):
            yield np.ones((8, steps, 4), "float32"), np.arange(8) % 2

    data = tf.data.Dataset.from_generator(
        batches,
        output_signature=(
            tf.TensorSpec((None, None, 4), tf.float32), tf.TensorSpec((None,), tf.int64)
        ),
    )  # fmt: skip
    probes = LinearProbeCallback("conv", reduce=reduce, num_classes=10)
    if reduce != "random":
        history = model.fit(data, callbacks=[probes], verbose=0).history
        assert set(probes.results.frame()["n"]) == {24}
        assert history["probe_error/conv"][0] <= 0.5
    else:
        with pytest.raises(ValueError, match="'conv'.*sizes that differ.*gap"):
            model.fit(data, callbacks=[probes], verbose=0)
