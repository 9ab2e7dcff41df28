"""What is recorded is what the layers compute."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hosts import activations, convnet
from keras import layers

from keras_probes.taps.graph import call_at_inference, input_spec_of, trace
from keras_probes.taps.record import operations_of, record_calls


def recorded(model, x, *, eagerly):
    """`{tap name: array}` of one pass at inference."""
    graph = trace(model, input_spec_of(model))

    def forward(x):
        with record_calls(model, operations_of(model)) as recording:
            call_at_inference(model, x)
        return {tap.name: recording.tensors[tap.site] for tap in graph.taps}

    function = forward if eagerly else tf.function(forward)
    x = keras.tree.map_structure(tf.constant, x)
    return {name: np.asarray(tensor) for name, tensor in function(x).items()}


@pytest.mark.parametrize("eagerly", [True, False])
def test_every_output_is_the_layers_own(digits, eagerly):
    model, x = convnet(), digits[1][0]
    seen = recorded(model, x, eagerly=eagerly)
    np.testing.assert_array_equal(seen["input"], x)
    for layer in model.layers:
        np.testing.assert_allclose(
            seen[layer.name], activations(model, layer.name, x), rtol=1e-5, atol=1e-6
        )
    np.testing.assert_array_equal(np.maximum(seen["conv:preactivation"], 0), seen["conv"])
    assert (seen["conv:preactivation"] < 0).any()


def test_preactivation_by_hand(digits):
    model, x = convnet(), digits[1][0]
    seen = recorded(model, x, eagerly=False)
    layer = model.get_layer("out")
    logits = seen["dense"] @ layer.kernel.numpy() + layer.bias.numpy()
    np.testing.assert_allclose(seen["out:preactivation"], logits, rtol=1e-4, atol=1e-5)


def test_calls_and_outputs_are_told_apart():
    shared = layers.Dense(4, activation="tanh", name="shared")
    lstm = layers.LSTM(3, return_sequences=True, return_state=True, name="lstm")
    inputs = keras.Input((7, 4))
    once = shared(inputs)
    twice = shared(once)
    sequence, h, c = lstm(twice)
    model = keras.Model(inputs, [once, twice, sequence, h, c])
    x = np.random.default_rng(0).normal(size=(5, 7, 4)).astype("float32")
    seen = recorded(model, x, eagerly=False)
    names = ["shared#0", "shared#1", "lstm[0]", "lstm[1]", "lstm[2]"]
    for name, expected in zip(names, model.predict(x, verbose=0), strict=True):
        np.testing.assert_allclose(seen[name], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.tanh(seen["shared#1:preactivation"]), seen["shared#1"], rtol=1e-5, atol=1e-6
    )


def test_bidirectional_halves():
    inputs = keras.Input((6, 4))
    layer = layers.Bidirectional(layers.GRU(3), name="both")
    model = keras.Model(inputs, layer(inputs))
    x = np.random.default_rng(0).normal(size=(5, 6, 4)).astype("float32")
    seen = recorded(model, x, eagerly=False)
    halves = [name for name in seen if name.startswith("both/")]
    assert len(halves) == 2
    np.testing.assert_allclose(
        np.concatenate([seen[h] for h in halves], axis=1), model.predict(x, verbose=0), rtol=1e-5
    )


def test_a_call_that_raises_leaves_the_layers_as_they_were():
    model = convnet()

    def broken(x):
        raise RuntimeError("in the activation")

    model.get_layer("dense").activation = broken
    before = {layer.name: dict(vars(layer)) for layer in model.layers}
    with (
        pytest.raises(RuntimeError, match="in the activation"),
        record_calls(model, operations_of(model)),
    ):
        model(np.zeros((1, 8, 8, 1), "float32"))
    for layer in model.layers:
        assert "call" not in vars(layer)
        assert vars(layer).get("activation") is before[layer.name].get("activation")
