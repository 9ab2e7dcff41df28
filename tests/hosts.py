"""Small hosts that many tests probe, and what they are compared by."""

import hashlib

import keras
import numpy as np
import pytest
from keras import layers

# What holds in both modes by the same code is left to CI for one of them.
MODES = ["shared", pytest.param("isolated", marks=pytest.mark.slow)]


def convnet(seed: int = 3) -> keras.Model:
    """A convnet on 8x8 digits with BatchNormalization and Dropout, seeded by itself."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(6, 3, padding="same", activation="relu", name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.MaxPooling2D(name="pool"),
            layers.Dropout(0.3, name="drop"),
            layers.Flatten(name="flat"),
            layers.Dense(16, activation="relu", name="dense"),
            layers.Dense(10, activation="softmax", name="out"),
        ],
        name="convnet",
    )


def dense_net(seed: int = 3) -> keras.Model:
    """A small host with Dropout that compiles fast."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(name="flat"),
            layers.Dense(16, activation="relu", name="dense"),
            layers.Dropout(0.3, name="drop"),
            layers.Dense(10, activation="softmax", name="out"),
        ],
        name="dense_net",
    )


def compiled(model: keras.Model, optimizer: str = "adam", **options) -> keras.Model:
    """Compiles a classifier of sparse labels."""
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], **options)
    return model


def fingerprint(model: keras.Model) -> str:
    """SHA-256 over every weight, optimizer slot and seed state of a host."""
    digest = hashlib.sha256()
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer else ())]
    assert any("seed_generator_state" in v.path for v in variables), "no seed state to compare"
    for variable in variables:
        digest.update(f"{variable.dtype} {variable.shape}".encode())
        digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return digest.hexdigest()


def activations(model: keras.Model, layer: str, x: np.ndarray) -> np.ndarray:
    """The output of a layer at inference, by Keras alone."""
    return keras.Model(model.inputs, model.get_layer(layer).output).predict(x, verbose=0)
