"""Probes as people write them by hand: a second forward pass, and Dense heads under Adam(1e-3)."""

import keras
import numpy as np


class ByHand(keras.callbacks.Callback):
    """After every batch, runs the host once more and trains heads on what its layers return.

    Args:
        taps: The layers' tensors by name: `keras.Model` outputs, reduced to vectors.
        inputs: The host's input tensor.
        classes: Number of classes.
        normalize: Whether a BatchNormalization stands before each head.
    """

    def __init__(self, taps, inputs, classes, normalize=False):
        super().__init__()
        self.features = keras.Model(inputs, taps)
        heads, of_heads = {}, {}
        for name, tensor in taps.items():
            h = of_heads[name] = keras.Input(tensor.shape[1:], name=name)
            h = keras.layers.BatchNormalization()(h) if normalize else h
            heads[name] = keras.layers.Dense(classes)(h)
        self.heads = keras.Model(of_heads, heads)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.heads.compile(keras.optimizers.Adam(1e-3), dict.fromkeys(heads, loss))

    def batches(self, x, y, batch_size):
        """Says what the next `fit` will be given, without shuffling."""
        self.x, self.y, self.batch_size = x, y, batch_size

    def on_train_batch_end(self, batch, logs=None):
        here = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        labels = dict.fromkeys(self.features.output, self.y[here])
        self.heads.train_on_batch(self.features(self.x[here], training=False), labels)

    def errors(self, x, y):
        """Error by tap."""
        logits = self.heads.predict(self.features.predict(x, verbose=0), verbose=0)
        return {name: float(np.mean(u.argmax(axis=1) != y)) for name, u in logits.items()}
