"""Hosts that several benchmarks train, and the images they train on."""

import keras
import numpy as np
from keras import layers


def convnet(shape=(28, 28, 1), classes=10):
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
            layers.Dense(classes, name="fc2"),
        ]
    )


def mlp(depth=128, width=128):
    """Fully connected layers, `hidden0` and on, as in the paper's section 5.1."""
    hidden = [layers.Dense(width, activation="relu", name=f"hidden{i}") for i in range(depth)]
    return keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(10)])


def resnet(shape=(32, 32, 3), classes=10):
    """A residual network of nine convolutions with BatchNormalization, and two shortcuts."""

    def conv(h, width, strides, name):
        h = layers.Conv2D(
            width, 3, strides=strides, padding="same", use_bias=False, name=f"{name}_conv"
        )(h)
        return layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(h)

    inputs = keras.Input(shape)
    h = layers.ReLU(name="stem")(conv(inputs, 16, 1, "stem"))
    for block, (width, strides) in enumerate([(16, 1), (32, 2), (64, 2), (64, 1)], 1):
        branch = layers.ReLU()(conv(h, width, strides, f"block{block}a"))
        branch = conv(branch, width, 1, f"block{block}b")
        if strides > 1:
            h = layers.Conv2D(width, 1, strides=strides, use_bias=False)(h)
        h = layers.Add(name=f"block{block}_add")([h, branch])
        h = layers.ReLU(name=f"block{block}")(h)
    h = layers.GlobalAveragePooling2D(name="pool")(h)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(h))


def resnet50(classes=1000):
    return keras.applications.ResNet50(
        weights=None, input_shape=(96, 96, 3), classes=classes, classifier_activation=None
    )


def inception(classes=1000):
    return keras.applications.InceptionV3(
        weights=None, input_shape=(75, 75, 3), classes=classes, classifier_activation=None
    )


# Host, what to probe, batch size.
HOSTS = {
    "convnet": (convnet, "auto", 64),
    "resnet": (resnet, "auto", 64),
    "mlp": (mlp, "hidden*", 64),
    "resnet50": (resnet50, ["input", "*_add"], 16),
    "inception": (inception, ["input", "mixed*"], 16),
}


def images(path, limit):
    with np.load(path) as file:
        x = np.concatenate([file[name] for name in ("x_train", "x_test") if name in file])
        y = np.concatenate([file[name] for name in ("y_train", "y_test") if name in file])
    kept = np.random.default_rng(0).permutation(len(x))[:limit]
    x = x[kept].astype("float32") / 255
    return (x if x.ndim == 4 else x[..., None]), y[kept].ravel().astype("int64")
