"""How much a forward pass computes, against sums by hand."""

import keras
import pytest
from keras import layers

from keras_probes.taps.graph import input_spec_of, trace


def work(*made, shape):
    host = keras.Sequential([keras.Input(shape), *made])
    return trace(host, input_spec_of(host)).work


@pytest.mark.parametrize(
    ("made", "shape", "expected"),
    [
        ([layers.Dense(7), layers.Dense(3)], (5,), 5 * 7 + 7 * 3 + 10),  # and biases: weights
        ([layers.Dense(7)], (4, 5), 4 * 5 * 7),
        ([layers.Conv2D(6, 3)], (8, 8, 2), 6 * 6 * 6 * 9 * 2),
        ([layers.Conv2D(6, 3, strides=2, padding="same")], (8, 8, 2), 4 * 4 * 6 * 9 * 2),
        ([layers.Conv1D(6, 3)], (8, 2), 6 * 6 * 3 * 2),
        ([layers.DepthwiseConv2D(3)], (8, 8, 2), 6 * 6 * 2 * 9),
        ([layers.Conv2DTranspose(6, 3)], (8, 8, 2), 8 * 8 * 2 * 9 * 6),
        ([layers.EinsumDense("abc,cd->abd", (4, 7))], (4, 5), 4 * 5 * 7),
    ],
)
def test_multiplications_of_layers(made, shape, expected):
    assert work(*made, shape=shape) == expected


def test_attention():
    inputs = keras.Input((6, 8))
    outputs = layers.MultiHeadAttention(2, 4, use_bias=False)(inputs, inputs)
    host = keras.Model(inputs, outputs)
    projections = 4 * 6 * 8 * 8
    scores = 2 * 2 * 6 * 6 * 4
    assert trace(host, input_spec_of(host)).work == projections + scores


def test_what_a_loop_computes_is_at_least_its_weights():
    host = keras.Sequential([keras.Input((20, 8)), layers.LSTM(16)])
    assert trace(host, input_spec_of(host)).work >= host.count_params()
