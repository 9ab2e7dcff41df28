"""Hosts that several benchmarks train."""

import keras
from keras import layers


def convnet(shape=(28, 28, 1)):
    """The paper's MNIST convnet (section 3.5)."""
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(32, 5, padding="same", name="conv1"),
            layers.ReLU(name="relu1"),
            layers.MaxPooling2D(name="pool1"),
            layers.Conv2D(64, 5, padding="same", name="conv2"),
            layers.ReLU(name="relu2"),
            layers.MaxPooling2D(name="pool2"),
            layers.Flatten(),
            layers.Dense(512, name="fc1"),
            layers.ReLU(name="relu3"),
            layers.Dropout(0.5),
            layers.Dense(10, name="fc2"),
        ]
    )


def mlp(depth=128, width=128):
    """Fully connected layers, `hidden0` and on, as in the paper's section 5.1."""
    hidden = [layers.Dense(width, activation="relu", name=f"hidden{i}") for i in range(depth)]
    return keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(10)])
