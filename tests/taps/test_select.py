"""Selectors, in all their forms, and what is said of those that do not fit."""

import dataclasses

import keras
import pytest
from keras import layers

from keras_probes.taps.graph import input_spec_of, trace
from keras_probes.taps.select import select


@pytest.fixture(scope="module")
def model():
    shared = layers.Dense(4, activation="relu", name="shared")
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="conv_like"), layers.ReLU(name="relu")],
        name="outer",
    )
    inputs = keras.Input((4,))
    return keras.Model(
        inputs, layers.Dense(2, activation="softmax", name="out")(inner(shared(shared(inputs))))
    )


@pytest.fixture(scope="module")
def graph(model):
    return trace(model, input_spec_of(model))


def chosen(graph, layers):
    return [tap.name for tap in select(graph, layers).taps]


EVERYTHING = ["input", "shared#0", "shared#1", "outer/conv_like", "outer/relu", "out"]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("auto", EVERYTHING),
        ("all", EVERYTHING),
        ("input", ["input"]),
        ("outer/relu", ["outer/relu"]),
        ("outer", ["outer"]),
        ("shared#1", ["shared#1"]),
        ("out:preactivation", ["out:preactivation"]),
        ("shared#0:preactivation", ["shared#0:preactivation"]),
        ("outer/*", ["outer/conv_like", "outer/relu"]),
        ("*relu", ["outer/relu"]),
        ("shared#?", ["shared#0", "shared#1"]),
        ("out*", ["outer/conv_like", "outer/relu", "outer", "out"]),
        ("*:preactivation", ["shared#0:preactivation", "shared#1:preactivation"]),
        (layers.ReLU, ["outer/relu"]),
        (lambda layer: layer.name.startswith("out"), ["outer", "out"]),
        (["out", "input", "out", layers.ReLU], ["input", "outer/relu", "out"]),
        (("out", ["input"]), ["input", "out"]),
    ],
)
def test_forms(graph, selector, expected):
    found = chosen(graph, selector)
    if selector == "*:preactivation":
        assert found[:2] == expected
        assert all(name.endswith(":preactivation") for name in found)
    else:
        assert found == expected


def test_a_layer_instance(graph, model):
    assert chosen(graph, model.get_layer("shared")) == ["shared#0", "shared#1"]


def test_the_layers_of_a_model(graph, model):
    assert chosen(graph, model.layers) == ["input", "shared#0", "shared#1", "outer", "out"]
    assert chosen(graph, layers.InputLayer) == ["input"]


def test_predicates_see_layers_alone():
    inputs = keras.Input((4,))
    hidden = keras.ops.relu(layers.Dense(5, name="hidden")(inputs))
    model = keras.Model(inputs, layers.Dense(3, name="out")(hidden))
    graph = trace(model, input_spec_of(model))
    assert chosen(graph, lambda layer: layer.trainable) == ["hidden", "out"]


def test_no_cut_points():
    a, b = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([a, b], [layers.Dense(2, name="of_a")(a), layers.Dense(2, name="of_b")(b)])
    graph = trace(model, input_spec_of(model))
    assert set(chosen(graph, "auto")) == {"input[0]", "input[1]", "of_a", "of_b"}
    with pytest.raises(ValueError, match="Name the layers"):
        select(dataclasses.replace(graph, auto=frozenset()), "auto")


@pytest.mark.parametrize(
    ("selector", "error", "parts"),
    [
        ("shraed", ValueError, ["Unknown layer", "'shraed'", "'shared#0'"]),
        ("relu", ValueError, ["Unknown layer", "Did you mean 'outer/relu'"]),
        ("shared", ValueError, ["ambiguous", "'shared#0'", "'shared#1'"]),
        ("shared:preactivation", ValueError, ["ambiguous", "'shared#1:preactivation'"]),
        ("conv9*", ValueError, ["matches no tap", "'conv9*'"]),
        (layers.Conv2D, ValueError, ["matches nothing", "Conv2D", "Dense"]),
        (lambda layer: False, ValueError, ["matches nothing", "predicate"]),
        (layers.Dense(3, name="stranger"), ValueError, ["'stranger'", "not called by this model"]),
        ([], ValueError, ["picks nothing"]),
        (3, TypeError, ["Expected `layers`", "Received: 3"]),
        (["out", 3.5], TypeError, ["Received: 3.5"]),
    ],
)
def test_errors_say_what_to_do(graph, selector, error, parts):
    with pytest.raises(error) as raised:
        select(graph, selector)
    for part in parts:
        assert part in str(raised.value)
