"""Promise 1: no gradient, state or randomness reaches the host."""

import functools
import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from hosts import compiled, convnet, fingerprint
from keras import layers

from keras_probes import LinearProbeCallback
from keras_probes.probes import heads
from keras_probes.taps.reduce import StopGradient

# XLA takes long to compile.
JIT = [
    pytest.param(False, id="plain"),
    pytest.param(True, id="jit", marks=pytest.mark.slow),
]


def run(digits, callbacks, *, optimizer="adam", host=convnet, **options):
    """Trains a fresh host; its fingerprint, its own history and what `evaluate` returns."""
    (x, y), validation = digits
    # XLA compiles for every batch size: a ragged end is left to the cases that run without.
    batch_size = 40 if options.get("jit_compile") else 48
    model = compiled(host(), optimizer, **{"jit_compile": False, **options})
    history = model.fit(
        x,
        y,
        batch_size=batch_size,
        epochs=2,
        validation_data=validation,
        callbacks=callbacks,
        verbose=0,
    )
    own = {k: v for k, v in history.history.items() if "probe" not in k}
    return fingerprint(model), own, model.evaluate(*validation, batch_size=40, verbose=0)


@pytest.fixture(scope="module")
def run_plain(digits):
    """`run` without callbacks, once for each setting."""
    return functools.cache(functools.partial(run, digits, ()))


@pytest.mark.parametrize("jit", JIT)
@pytest.mark.parametrize("optimizer", ["adam", pytest.param("sgd", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["shared", "isolated"])
def test_host_is_bit_identical(digits, run_plain, mode, optimizer, jit):
    layers = ["conv", "dense"] if jit else "auto"
    probed = run(
        digits, [LinearProbeCallback(layers, mode=mode)], optimizer=optimizer, jit_compile=jit
    )
    assert probed == run_plain(optimizer=optimizer, jit_compile=jit)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shared", "isolated"])
@pytest.mark.parametrize(
    "options", [{"steps_per_execution": 4}, {"run_eagerly": True}], ids=["loop", "eager"]
)
def test_host_is_bit_identical_in_other_loops(digits, run_plain, mode, options):
    probed = run(digits, [LinearProbeCallback("dense", mode=mode)], **options)
    assert probed == run_plain(**options)


def gelu_host(seed=3):
    """A host where, in shared mode, a tap is known to change how the compiler fuses."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Flatten(),
            layers.Dense(32, activation="gelu", name="gelu"),
            layers.LayerNormalization(name="norm"),
            layers.Dropout(0.2),
            layers.Dense(10, activation="softmax", name="out"),
        ]
    )


@pytest.mark.parametrize("jit", JIT)
def test_isolated_mode_holds_where_a_tap_touches_a_fusion(digits, run_plain, jit):
    probes = LinearProbeCallback(["gelu:preactivation", "gelu", "norm"], mode="isolated")
    probed = run(digits, [probes], host=gelu_host, jit_compile=jit)
    assert probed == run_plain(host=gelu_host, jit_compile=jit)


@pytest.mark.parametrize("jit", JIT)
def test_shared_mode_agrees_up_to_rounding_where_a_tap_touches_a_fusion(digits, run_plain, jit):
    probes = LinearProbeCallback(["gelu:preactivation", "gelu", "norm"])
    _, probed, _ = run(digits, [probes], host=gelu_host, jit_compile=jit)
    _, plain, _ = run_plain(host=gelu_host, jit_compile=jit)
    assert probed.keys() == plain.keys()
    for key, values in plain.items():
        np.testing.assert_allclose(probed[key], values, rtol=1e-4)


class Sizes(keras.Model):
    """Remembers the batch sizes that its test step was traced for."""

    traced: list

    def test_step(self, data):
        self.traced.append(data[0].shape[0])
        return super().test_step(data)


def test_isolated_mode_takes_the_traces_that_earlier_fits_made(digits):
    """A random host in bfloat16: another trace for a size that is known changes last bits."""
    (x, y), (val_x, val_y) = digits

    def traced(callbacks):
        inputs = keras.Input((8, 8, 1))
        host = Sizes(inputs, keras.layers.Dense(10, "softmax")(keras.layers.Flatten()(inputs)))
        host.traced = []
        compiled(host)
        for batch_size in (16, 20):  # 20 examples: a ragged end, and none
            host.fit(
                x[:48], y[:48], batch_size=batch_size, verbose=0, callbacks=callbacks,
                validation_data=(val_x[:20], val_y[:20]),
            )  # fmt: skip
        return host.traced

    assert traced([LinearProbeCallback("input", mode="isolated")]) == traced([]) == [None]


class HostWithProbeInItsLoss(keras.Model):
    """Adds the loss of a trained probe model to its own, as a careless plugin would."""

    def __init__(self, inner, probe_model=None):
        super().__init__()
        self.inner = inner
        self.both = keras.Model(inner.inputs, [inner.outputs[0], inner.get_layer("dense").output])
        self.probe_model = probe_model

    def call(self, x, training=False):
        output, hidden = self.both(x, training=training)
        if self.probe_model is not None:
            probabilities = self.probe_model({"dense": hidden})["dense"]
            self.add_loss(tf.reduce_mean(tf.reduce_max(probabilities, axis=-1)))
        return output


@pytest.fixture
def probe_model(digits):
    probes = LinearProbeCallback("dense")
    compiled(convnet()).fit(*digits[0], epochs=1, callbacks=[probes], verbose=0)
    return probes.probe_model


def host_fingerprint(digits, probe_model):
    model = HostWithProbeInItsLoss(convnet(), probe_model)
    if probe_model is not None:
        probe_model.trainable = False
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
    model.fit(*digits[0], epochs=1, verbose=0)
    return fingerprint(model.inner)


def test_no_gradient_passes_the_diode(digits, probe_model):
    assert host_fingerprint(digits, probe_model) == host_fingerprint(digits, None)


def test_a_probe_without_stop_gradient_is_noticed(digits, probe_model, monkeypatch):
    monkeypatch.setattr(StopGradient, "call", lambda self, inputs: inputs)
    assert host_fingerprint(digits, probe_model) != host_fingerprint(digits, None)


def random_states():
    return (
        random.getstate(),
        np.random.get_state()[1].tobytes(),  # noqa: NPY002  (the stream that must not move)
        tf.random.uniform(()).numpy(),
    )


def automatic_names():
    """The names that the next unnamed layers, models and optimizers would get."""
    made = [
        *(kind() for kind in (layers.Flatten, layers.ReLU)),
        *(kind(1) for kind in (layers.Dense, layers.Dropout)),
        keras.Sequential(),
        keras.optimizers.Adam(),
        keras.metrics.Mean(),
    ]
    return [m.name for m in made]


def observed_surroundings(digits, callbacks):
    (x, y), validation = digits
    keras.utils.clear_session()
    model = compiled(convnet())
    keras.utils.set_random_seed(11)
    model.fit(x, y, epochs=1, validation_data=validation, callbacks=callbacks(), verbose=0)
    return random_states(), automatic_names()


@pytest.fixture(scope="module")
def plain_surroundings(digits):
    return observed_surroundings(digits, list)


@pytest.mark.parametrize("optimizer", [None, "sgd", "instance"])
def test_nothing_is_taken_from_random_streams_or_names(digits, plain_surroundings, optimizer):
    def probes():
        chosen = keras.optimizers.SGD(0.1, name="mine") if optimizer == "instance" else optimizer
        return [LinearProbeCallback(["input", "conv"], reduce={"conv": "random"}, optimizer=chosen)]

    assert observed_surroundings(digits, probes) == plain_surroundings


def test_an_unseeded_initializer_is_noticed(digits, plain_surroundings, monkeypatch):
    make = heads.LinearHeads.__init__

    def unseeded(self, *args, **kwargs):
        make(self, *args, **kwargs)
        keras.initializers.GlorotUniform()

    monkeypatch.setattr(heads.LinearHeads, "__init__", unseeded)
    assert (
        observed_surroundings(digits, lambda: [LinearProbeCallback("dense")])[0]
        != (plain_surroundings[0])
    )
