"""The host's graph: names, depths, cut points, on every kind of host."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_probes.taps.graph import HostGraph, input_spec_of, trace


def graph_of(model: keras.Model, spec=None) -> HostGraph:
    return trace(model, input_spec_of(model) if spec is None else spec)


def names(graph: HostGraph, among=None) -> list[str]:
    return [tap.name for tap in graph.taps if among is None or tap.name in among]


def depths(graph: HostGraph) -> dict[str, int]:
    return {tap.name: tap.depth for tap in graph.taps}


def residual_model() -> keras.Model:
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="stem")(x)
    branch = layers.Conv2D(4, 3, padding="same", activation="relu", name="branch1")(x)
    branch = layers.Conv2D(4, 3, padding="same", name="branch2")(branch)
    x = layers.Add(name="add")([x, branch])
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def test_cut_points_of_a_residual_model():
    graph = graph_of(residual_model())
    assert names(graph, graph.auto) == ["input", "stem", "add", "pool", "head"]
    assert depths(graph)["stem"] == 1
    assert depths(graph)["branch1:preactivation"] == 2
    assert depths(graph)["branch1"] == 3
    assert depths(graph)["add"] == 5  # along the longer branch


def test_what_each_tap_is_computed_from():
    graph = graph_of(residual_model())
    assert graph.inputs == {
        "input": (),
        "stem": ("input",),
        "branch1:preactivation": ("stem",),
        "branch1": ("branch1:preactivation",),
        "branch2": ("branch1",),
        "add": ("stem", "branch2"),
        "pool": ("add",),
        "head": ("pool",),
    }


def test_edges_are_those_of_keras():
    model = keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=10)
    graph = graph_of(model)
    for layer in model.layers[1:]:
        above = [t._keras_history.operation for t in layer._inbound_nodes[0].input_tensors]
        expected = ["input" if op is model.layers[0] else op.name for op in above]
        (found,) = {graph.inputs[layer.name]} if layer.name in graph.inputs else ((),)
        found = [
            of
            for name in found
            for of in (graph.inputs[name] if name.endswith(":preactivation") else [name])
        ]
        assert sorted(found) == sorted(expected)


def test_a_tensor_with_several_names_has_the_first_one():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="last")], name="inner")
    x = inputs = keras.Input((4,))
    x = layers.Dropout(0.5, name="drop")(inner(x))
    graph = graph_of(keras.Model(inputs, layers.Dense(2, name="head")(x)))
    assert graph.same["inner"] == graph.same["drop"] == graph.same["inner/last"] == "inner/last"
    assert graph.inputs["head"] == ("inner/last",)


def test_resnet50_probes_what_the_paper_probes():
    model = keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=10)
    graph = graph_of(model)
    adds = [name for name in names(graph, graph.auto) if name.endswith("_add")]
    assert len(adds) == 16
    assert "input" in graph.auto
    assert not any(name.endswith(("_1_conv", "_2_relu", "_pad")) for name in graph.auto)


def test_inception_cuts_at_its_mixed_concatenations():
    model = keras.applications.InceptionV3(weights=None, input_shape=(75, 75, 3), classes=10)
    graph = graph_of(model)
    mixed = [name for name in names(graph, graph.auto) if name.startswith("mixed")]
    assert mixed == [f"mixed{i}" for i in range(11)]


def test_layers_that_add_nothing_at_inference_are_left_out():
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.ZeroPadding2D(name="pad"),
            layers.Conv2D(3, 3, name="conv"),
            layers.Dropout(0.5, name="drop"),
            layers.GaussianNoise(0.1, name="noise"),
            layers.Reshape((16, 3), name="reshape"),
            layers.Permute((2, 1), name="permute"),
            layers.Flatten(name="flat"),
            layers.Dense(2, name="out"),
        ]
    )
    graph = graph_of(model)
    assert names(graph, graph.auto) == ["input", "conv", "out"]


def test_every_output_has_its_cut_points():
    x = inputs = keras.Input((5,))
    x = trunk = layers.Dense(4, name="trunk")(x)
    main = layers.Dense(3, name="main2")(layers.Dense(3, name="main1")(x))
    side = layers.Dense(3, name="side")(trunk)
    graph = graph_of(keras.Model(inputs, {"main": main, "side": side}))
    assert set(graph.auto) == {"input", "trunk", "main1", "main2", "side"}
    assert graph.outputs["side"].shape.as_list() == [None, 3]


def test_several_inputs_are_numbered_and_are_no_cut():
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b")
    joined = layers.Concatenate(name="joined")([a, b])
    graph = graph_of(keras.Model([a, b], layers.Dense(2, name="out")(joined)))
    assert names(graph)[:2] == ["input[0]", "input[1]"]
    assert names(graph, graph.auto) == ["joined", "out"]


def test_nested_models_have_paths_and_one_name_a_tensor():
    inner = keras.Sequential(
        [keras.Input((6,)), layers.Dense(5, name="a"), layers.Dense(4, name="b")], name="inner"
    )
    inputs = keras.Input((6,))
    graph = graph_of(keras.Model(inputs, layers.Dense(2, name="out")(inner(inputs))))
    assert names(graph, graph.auto) == ["input", "inner/a", "inner/b", "out"]
    assert "inner" in names(graph)
    assert "inner" not in graph.distinct
    assert depths(graph)["inner"] == depths(graph)["inner/b"] == 2


def test_layers_called_twice_and_with_several_outputs():
    shared = layers.Dense(4, name="shared")
    lstm = layers.LSTM(3, return_sequences=True, return_state=True, name="lstm")
    inputs = keras.Input((7, 4))
    sequence, h, c = lstm(shared(shared(inputs)))
    model = keras.Model(inputs, layers.Dense(2, name="out")(layers.Concatenate()([h, c])))
    graph = graph_of(model)
    found = names(graph)
    assert {"shared#0", "shared#1", "lstm[0]", "lstm[1]", "lstm[2]"} <= set(found)
    assert "shared" not in found
    assert "lstm" not in found
    assert found.index("shared#0") < found.index("shared#1") < found.index("lstm[0]")
    assert not any("cell" in name for name in found)  # the inside of a loop can't be read


def test_operations_of_the_functional_graph_are_taps():
    inputs = keras.Input((5,))
    hidden = layers.Dense(5, name="hidden")(inputs)
    model = keras.Model(inputs, keras.ops.sin(hidden) + inputs)
    graph = graph_of(model)
    assert [tap.layer_type for tap in graph.taps][-2:] == ["Sin", "Add"]


def test_a_layer_as_activation_has_a_preactivation():
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, activation=layers.LeakyReLU(name="leaky"), name="fc")]
    )
    assert names(graph_of(model)) == ["input", "fc:preactivation", "fc/leaky", "fc"]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first = layers.Dense(6, activation="relu", name="first")
        self.block = keras.Sequential([layers.Dense(6, name="inside")], name="block")
        self.out = layers.Dense(3, name="out")

    def call(self, x, training=False):
        x = self.first(x)
        return self.out(x + self.block(x))


def test_a_subclassed_model_that_was_never_built():
    model = Subclassed()
    assert input_spec_of(model) is None
    graph = graph_of(model, tf.TensorSpec((None, 5), "float32"))
    assert names(graph, graph.auto) == ["input", "first", "out"]
    assert "block/inside" in names(graph)


def test_a_built_model_with_a_part_that_is_not():
    class Host(Subclassed):
        def build(self, input_shape):
            self.built = True

    model = Host()
    model.build((None, 5))
    graph_of(model, tf.TensorSpec((None, 5), "float32"))
    assert model.block.input_shape == (None, 6)
    assert model(np.ones((3, 5), "float32")).shape == (3, 3)


def test_tracing_builds_a_model_with_the_weights_it_would_have_had():
    x = np.ones((2, 5), "float32")
    keras.utils.set_random_seed(5)
    alone = Subclassed()
    alone(x)
    keras.utils.set_random_seed(5)
    traced = Subclassed()
    graph_of(traced, tf.TensorSpec((None, 5), "float32"))
    for a, b in zip(alone.get_weights(), traced.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_masks_are_no_way_around_a_layer():
    model = keras.Sequential(
        [
            keras.Input((9,), dtype="int32"),
            layers.Embedding(20, 4, mask_zero=True, name="embed"),
            layers.GRU(5, name="gru"),
            layers.Dense(2, name="out"),
        ]
    )
    graph = graph_of(model)
    assert names(graph, graph.auto) == ["input", "embed", "gru", "out"]


def test_a_boolean_that_is_data_is_a_way():
    inputs = keras.Input((4,))
    binary = layers.Lambda(lambda t: tf.cast(t > 0, tf.float32), name="binary")(inputs)
    hidden = layers.Dense(5, name="hidden")(binary)
    graph = graph_of(keras.Model(inputs, layers.Dense(3, name="out")(hidden)))
    assert names(graph, graph.auto) == ["input", "binary", "hidden", "out"]


def test_a_layer_named_input_is_told_from_the_input():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3, name="out")(layers.Dense(5, name="input")(inputs)))
    assert names(graph_of(model), graph_of(model).auto) == ["input#0", "input#1", "out"]


def test_rows_that_are_no_examples_are_no_taps():
    inputs = keras.Input((4,))
    folded = layers.Lambda(lambda t: tf.reshape(t, (-1, 2)), name="fold")(inputs)
    folded = layers.Dense(6, name="inside")(folded)
    unfolded = layers.Lambda(lambda t: tf.reshape(t, (-1, 12)), name="unfold")(folded)
    graph = graph_of(keras.Model(inputs, layers.Dense(3, name="out")(unfolded)))
    assert names(graph) == ["input", "unfold", "out:preactivation", "out"]
    assert {tap.shape[0] for tap in graph.taps} == {None}


def test_a_host_may_split_its_batch():
    inputs = keras.Input((4,))
    halves = layers.Lambda(lambda t: tf.concat(tf.split(t, 2), axis=0), name="halves")(inputs)
    graph = graph_of(keras.Model(inputs, layers.Dense(3, name="out")(halves)))
    assert "halves" in names(graph)


def test_sparse_inputs():
    inputs = keras.Input((4,), sparse=True)
    model = keras.Model(inputs, layers.Dense(3, name="out")(layers.Dense(5, name="hidden")(inputs)))
    graph = graph_of(model)
    assert "hidden" in names(graph)
    assert "input" not in names(graph)


@pytest.mark.parametrize("batch", [None, 4])
def test_the_batch_is_free_unless_the_host_fixes_it(batch):
    inputs = keras.Input(batch_shape=(batch, 3))
    graph = graph_of(keras.Model(inputs, layers.Dense(2, name="out")(inputs)))
    assert {tap.shape[0] for tap in graph.taps} == {batch}


def test_tracing_leaves_no_state_behind():
    model = residual_model()
    before = {id(layer): dict(vars(layer)) for layer in model.layers}
    weights = model.get_weights()
    graph_of(model)
    for layer in model.layers:
        assert vars(layer).keys() == before[id(layer)].keys()
        assert vars(layer).get("activation") is before[id(layer)].get("activation")
    for a, b in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(not hasattr(keras, "RematScope"), reason="Keras has it from 3.9 on")
def test_what_is_recomputed_for_the_gradient_is_a_cut_point():
    inputs = keras.Input((8, 8, 1))
    with keras.RematScope(mode="full"):
        h = layers.Conv2D(3, 3, activation="relu", name="conv")(inputs)
    model = keras.Model(inputs, layers.Dense(10, name="out")(layers.Flatten(name="flat")(h)))
    graph = trace(model, input_spec_of(model))
    assert graph.auto == {"input", "conv", "out"}
