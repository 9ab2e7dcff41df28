"""Promise 2: after a fit, however it ended, the host is as if it had never been probed."""

import copy
import functools
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from hosts import MODES, compiled, dense_net, fingerprint

from keras_probes import LinearProbeCallback


class Stop(keras.callbacks.Callback):
    """Raises at one of Keras's calls."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error = at, error
        setattr(self, at, self._raise)

    def _raise(self, *args, **kwargs):
        raise self.error


def state_of(host):
    """The attributes of a host and its layers, by identity where they are functions."""
    return {
        id(layer): {
            name: value for name, value in vars(layer).items() if callable(value) or name == "call"
        }
        for layer in host._flatten_layers()
    }


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def fit(host, digits, *callbacks, **options):
    (x, y), validation = digits
    given = {"batch_size": 80, "epochs": 1, "validation_data": validation, "verbose": 0}
    return host.fit(x, y, callbacks=list(callbacks), **{**given, **options})


def test_attributes_and_functions_are_restored(digits, mode):
    host = compiled(dense_net())
    fit(host, digits)
    before, functions = state_of(host), (host.train_function, host.test_function)
    fit(host, digits, LinearProbeCallback(mode=mode))
    host.evaluate(*digits[1], callbacks=[], verbose=0)
    assert state_of(host) == before
    assert (host.train_function, host.test_function) == functions


def test_evaluate_leaves_nothing_behind(digits, mode):
    host, probes = compiled(dense_net()), LinearProbeCallback("dense", mode=mode)
    fit(host, digits, probes)
    before = state_of(host)
    for return_dict in (True, False):
        host.evaluate(*digits[1], callbacks=[probes], verbose=0, return_dict=return_dict)
        assert state_of(host) == before


def uses(host, digits):
    """What people do with a model after they trained it."""
    (x, y), (xv, yv) = digits
    history = host.fit(x, y, batch_size=80, epochs=2, validation_data=(xv, yv), verbose=0)
    return (
        history.history,
        host.evaluate(xv, yv, verbose=0),
        host.evaluate(xv, yv, verbose=0, return_dict=True),
        host.train_on_batch(x[:16], y[:16]),
        host.test_on_batch(x[:16], y[:16]),
        host.predict(xv, verbose=0).tobytes(),
        fingerprint(host),
    )


STOPS = {
    "on_train_batch_end": RuntimeError("ours"),
    "on_train_batch_begin": KeyboardInterrupt(),
    "on_test_batch_end": KeyboardInterrupt(),
    "on_test_begin": RuntimeError("ours"),
    "on_epoch_end": RuntimeError("ours"),
}
QUICK = ("on_train_batch_end", "on_test_batch_end")


def interrupted(digits, at, *callbacks):
    """What a host does after a fit that was interrupted."""
    host = compiled(dense_net())
    with pytest.raises(type(STOPS[at])):
        fit(host, digits, *callbacks, Stop(at, STOPS[at]))
    return uses(host, digits)


@pytest.fixture(scope="module")
def interrupted_plain(digits):
    """`interrupted` without probes, once for each place."""
    return functools.cache(functools.partial(interrupted, digits))


@pytest.mark.parametrize(
    "at", [pytest.param(at, marks=() if at in QUICK else pytest.mark.slow) for at in STOPS]
)
def test_after_an_interrupted_fit_the_host_goes_on_as_a_plain_one(
    digits, interrupted_plain, at, mode
):
    probed = interrupted(digits, at, LinearProbeCallback("dense", mode=mode))
    assert probed == interrupted_plain(at)


def test_an_error_within_the_step_takes_everything_off_at_once(digits, mode):
    host = compiled(dense_net())
    before = state_of(host)

    def fails(x, y):
        raise RuntimeError("in the target")

    probes = LinearProbeCallback("dense", target=fails, num_classes=2, mode=mode)
    with pytest.raises(ValueError, match="in the target"):
        fit(host, digits, probes)
    after = state_of(host)
    for layer, attributes in before.items():
        assert after[layer].keys() - {"train_function"} == attributes.keys() - {"train_function"}


def test_the_first_plain_step_takes_off_what_an_exception_left(digits, mode):
    host = compiled(dense_net())
    fit(host, digits)
    before = state_of(host)
    with pytest.raises(RuntimeError):
        fit(
            host,
            digits,
            LinearProbeCallback("dense", mode=mode),
            Stop("on_epoch_end", RuntimeError()),
        )
    fit(host, digits)
    assert state_of(host) == before


def test_a_hosts_own_train_function(digits, mode):
    class Own(keras.Sequential):
        def make_train_function(self, force=False):
            if self.train_function is None or force:
                self.train_function = tf.function(lambda iterator: self.train_step(next(iterator)))
            return self.train_function

    def run(callbacks):
        host = compiled(Own(dense_net().layers))
        fit(host, digits, *callbacks, epochs=2)
        return int(host.optimizer.iterations), fingerprint(host)

    probed, plain = run([LinearProbeCallback("dense", mode=mode)]), run([])
    assert probed == plain
    assert plain[0] == 8


def test_probes_work_after_an_interrupted_fit(digits, mode):
    host, probes = compiled(dense_net()), LinearProbeCallback("dense", mode=mode)
    with pytest.raises(RuntimeError):
        fit(host, digits, probes, Stop("on_epoch_end", RuntimeError()))
    history = fit(host, digits, probes, epochs=2)
    assert len(history.history["val_probe_error/dense"]) == 2
    other = LinearProbeCallback("input", mode=mode)
    with pytest.raises(KeyboardInterrupt):
        fit(host, digits, other, Stop("on_test_batch_begin", KeyboardInterrupt()))
    history = fit(host, digits, probes)
    assert {key for key in history.history if "probe_error" in key} == {
        "probe_error/dense",
        "val_probe_error/dense",
    }
    assert not any(name.startswith("_get_metrics") for name in vars(host))


def test_recompiling_between_fits(digits, mode):
    host, probes = compiled(dense_net()), LinearProbeCallback("dense", mode=mode)
    fit(host, digits, probes)
    compiled(host, "sgd")
    assert "probe_error/dense" in fit(host, digits, probes).history
    compiled(host, "sgd")
    assert "probe_error/dense" not in fit(host, digits).history


def test_the_same_host_compiles_its_step_with_probes_once(digits, mode):
    traced = []

    def target(x, y):
        traced.append(1)
        return y

    host = compiled(dense_net())
    probes = LinearProbeCallback("dense", target=target, num_classes=10, mode=mode)
    fit(host, digits, probes)
    host.evaluate(*digits[1], callbacks=[probes], batch_size=80, verbose=0)
    first = len(traced)
    fit(host, digits, probes)
    # What is left is the look at the labels before each run: their shape twice, and a first batch.
    assert len(traced) - first <= 3


def test_saving_cloning_pickling_and_copying(digits, tmp_path, mode):
    x = digits[1][0]
    host = compiled(dense_net())

    class Use(keras.callbacks.Callback):
        """... while probes are attached."""

        def on_epoch_end(self, epoch, logs=None):
            use()

    def use():
        expected = host.predict(x, verbose=0)
        host.save(tmp_path / "host.keras")
        loaded = keras.models.load_model(tmp_path / "host.keras")
        for other in (loaded, pickle.loads(pickle.dumps(host)), copy.deepcopy(host)):
            np.testing.assert_array_equal(other.predict(x, verbose=0), expected)
            assert not any("probe" in v.path for v in other.variables)
        clone = keras.models.clone_model(host)
        assert clone.get_config() == host.get_config()
        assert [v.shape for v in loaded.variables] == [v.shape for v in host.variables]

    fit(host, digits, LinearProbeCallback(mode=mode), Use())
    use()


def test_a_plain_fit_takes_off_what_is_left_after_an_exception_and_compile(digits, mode):
    host = compiled(dense_net())
    names = {layer: set(of_layer) for layer, of_layer in state_of(host).items()}
    stop = Stop("on_train_batch_end", RuntimeError())
    with pytest.raises(RuntimeError):
        fit(host, digits, LinearProbeCallback("dense", mode=mode), stop)
    compiled(host)
    fit(host, digits)
    left = {"train_function", "test_function"}
    assert {layer: set(of_layer) - left for layer, of_layer in state_of(host).items()} == names


@pytest.mark.slow
def test_exporting(digits, tmp_path):
    x = digits[1][0]
    host = compiled(dense_net())
    fit(host, digits, LinearProbeCallback())
    host.export(tmp_path / "saved", verbose=False)
    served = keras.layers.TFSMLayer(tmp_path / "saved", call_endpoint="serve")(x)
    np.testing.assert_allclose(served, host.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_evaluate_by_another_callback_is_left_alone(digits, mode):
    (x, y), (xv, yv) = digits

    class Evaluate(keras.callbacks.Callback):
        seen = ()

        def on_train_batch_end(self, batch, logs=None):
            self.seen = (
                *self.seen,
                self.model.evaluate(xv[:20], yv[:20], verbose=0, return_dict=True),
            )
            self.model.predict(xv[:5], verbose=0)

    def run(callbacks):
        host, other = compiled(dense_net()), Evaluate()
        history = fit(host, digits, *callbacks, other, epochs=2).history
        own = {key: v for key, v in history.items() if "probe" not in key}
        return history, (own, other.seen, fingerprint(host))

    probes = LinearProbeCallback("dense", mode=mode)
    history, probed = run([probes])
    assert probed == run([])[1]
    assert set(probes.results.frame()["n"]) == {320, 160}
    assert len(history["val_probe_error/dense"]) == 2


def test_an_evaluate_of_the_probes_in_the_middle_of_a_fit(digits, mode):
    probes = LinearProbeCallback("dense", mode=mode)

    class Evaluate(keras.callbacks.Callback):
        seen = ()

        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                (x, y), given = digits[1], {"callbacks": [probes], "return_dict": True}
                logs = self.model.evaluate(x, y, verbose=0, **given)
                self.seen = (*self.seen, logs["probe_error/dense"])

    other = Evaluate()
    history = fit(dense_host := compiled(dense_net()), digits, probes, other, epochs=2).history
    frame = probes.results.frame()
    assert list(frame["split"].unique()) == ["test", "train", "validation"]
    assert set(frame.loc[frame["split"] == "train", "n"]) == {320}
    tested = frame[(frame["split"] == "test") & (frame["metric"] == "error")]
    assert list(tested["value"]) == list(other.seen)
    assert len(history["val_probe_error/dense"]) == 2
    assert not any(name.startswith("_get_metrics") for name in vars(dense_host))


@pytest.mark.slow
def test_two_callbacks_at_once(digits, mode):
    first, second = LinearProbeCallback("dense", mode=mode), LinearProbeCallback("input")
    host = compiled(dense_net())
    history = fit(host, digits, first, second, epochs=2).history
    for probes, tap in ((first, "dense"), (second, "input")):
        alone = LinearProbeCallback(tap, mode=mode if tap == "dense" else "shared")
        expected = fit(compiled(dense_net()), digits, alone, epochs=2).history
        for key in (f"probe_loss/{tap}", f"val_probe_loss/{tap}"):
            np.testing.assert_allclose(history[key], expected[key], rtol=1e-4)
        assert [t.name for t in probes.results.taps] == [tap]
    assert not any(name.startswith("_get_metrics") for name in vars(host))
