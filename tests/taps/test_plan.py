"""A plan: taps with their reductions, from the user's words to features."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hosts import activations, convnet
from keras import layers

from keras_probes import GlobalAverage, RandomFeatures
from keras_probes.taps.graph import call_at_inference, input_spec_of
from keras_probes.taps.plan import make_plan
from keras_probes.taps.record import Recording, record_calls


def plan_of(model, layers="auto", reduce="auto", seed=0):
    return make_plan(model, input_spec_of(model), layers, reduce, seed)


def test_features_of_a_pass(digits):
    model, x = convnet(), digits[1][0]
    plan = plan_of(model, ["conv", "pool"], {"conv": RandomFeatures(20), "pool": "gap"})
    assert plan.n_features == {"conv": 20, "pool": 6}
    with record_calls(model, plan.layers()) as recording:
        call_at_inference(model, tf.constant(x))
    features = plan.features(recording)
    kept = np.asarray(plan.taps[0].reduction.indices)
    conv = activations(model, "conv", x).reshape(len(x), -1)
    np.testing.assert_allclose(features["conv"], conv[:, kept], rtol=1e-5, atol=1e-6)
    pool = activations(model, "pool", x).mean(axis=(1, 2))
    np.testing.assert_allclose(features["pool"], pool, rtol=1e-5, atol=1e-6)


def test_one_instance_serves_taps_of_different_shapes():
    plan = plan_of(convnet(), reduce=GlobalAverage())
    reductions = [reduced.reduction for reduced in plan.taps]
    assert len({id(reduction) for reduction in reductions}) == len(reductions)
    assert plan.n_features["conv"] == 6
    assert plan.n_features["dense"] == 16


def test_the_same_seed_makes_the_same_plan():
    def kept(seed):
        (reduced,) = plan_of(convnet(), "conv", RandomFeatures(50), seed).taps
        return np.asarray(reduced.reduction.indices).tolist()

    assert kept(1) == kept(1) != kept(2)


def test_a_tap_the_step_does_not_compute():
    plan = plan_of(convnet(), ["conv", "pool"])
    with pytest.raises(ValueError, match=r"'conv'.*isolated"):
        plan.features(Recording())


def test_the_graph_shows_a_tensor_by_the_name_that_is_probed():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="last")], name="inner")
    x = inputs = keras.Input((4,))
    x = layers.Dropout(0.5, name="drop")(inner(x))
    host = keras.Model(inputs, layers.Dense(2, name="head")(x))

    def graph(*taps):
        nodes = plan_of(host, list(taps)).nodes()
        return {node.name: node.inputs for node in nodes}

    assert graph("head") == {"input": (), "inner/last": ("input",), "head": ("inner/last",)}
    assert graph("inner") == {"input": (), "inner": ("input",), "head": ("inner",)}
    assert graph("inner", "drop")["drop"] == ("inner",)
    assert graph("inner", "inner/last") == {
        "input": (), "inner/last": ("input",), "inner": ("inner/last",), "head": ("inner/last",)
    }  # fmt: skip


def test_a_glob_that_fits_no_tap():
    with pytest.raises(ValueError, match=r"'pol\*'.*'pool'"):
        plan_of(convnet(), reduce={"pol*": "gap"})


def test_a_reduction_that_would_need_training():
    with pytest.raises(ValueError, match=r"without trainable weights.*TrainableReduction.*'conv'"):
        plan_of(convnet(), "conv", TrainableReduction())


class TrainableReduction(keras.layers.Layer):
    def build(self, input_shape):
        self.scale = self.add_weight(())

    def call(self, inputs):
        return self.scale * keras.ops.mean(inputs, axis=(1, 2))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[-1])
