"""The joint: which batches an observer is shown, in every loop that Keras has."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hosts import compiled, dense_net

from keras_probes.capture.joint import Joint
from keras_probes.capture.keras_run import calling_lists
from keras_probes.capture.steps import Part
from keras_probes.taps.record import Site


class Watcher(keras.callbacks.Callback):
    """A callback and its observer in one: sums what it is shown of a layer's output."""

    def __init__(self, isolated=False):
        super().__init__()
        self.isolated = isolated
        self.unpack = keras.utils.unpack_x_y_sample_weight
        self.part = lambda step: Part()
        self.kept = []
        self.total = tf.Variable(0.0)
        self.examples = tf.Variable(0)
        self.prepared, self.traced, self.ended = 0, 0, []

    def set_model(self, model):
        super().set_model(model)
        self.probed = model
        self.run = calling_lists()[0]

    def join(self, kind):
        self.joint = Joint.at(self.model) or Joint(self.model)
        self.joint.attach(kind, self, self.end_pass, self.run)

    def on_train_begin(self, logs=None):
        self.join("train")

    def on_train_batch_begin(self, batch, logs=None):
        self.joint.expect("train", self, self.part(batch))

    def on_train_end(self, logs=None):
        self.joint.detach("train", self)

    def on_test_begin(self, logs=None):
        self.join("test")

    def on_test_batch_begin(self, batch, logs=None):
        self.joint.expect("test", self)

    def on_test_end(self, logs=None):
        self.joint.detach("test", self)

    def prepare(self, data_spec):
        self.prepared += 1

    def check(self, data):
        self.first = data

    def keep(self, batches, spec):
        self.kept.append(batches)

    def layers(self):
        return [self.model.get_layer("flat")]

    def observe(self, kind, recording, data):
        self.traced += 1
        tensor = recording.tensors[Site(self.model.get_layer("flat"), "output")]
        self.total.assign_add(tf.reduce_sum(tensor))
        self.examples.assign_add(tf.shape(tensor)[0])

    def end_pass(self, kind, of_host):
        self.ended.append((kind, int(self.examples)))
        self.examples.assign(0)
        return {"watched": float(self.total)}


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(
    ("options", "batch_size"),
    [({}, 50), ({"steps_per_execution": 3}, 50), ({"run_eagerly": True}, 128)],
    ids=["plain", "loop with a ragged end", "eager"],
)
def test_every_batch_is_shown_once(digits, isolated, options, batch_size):
    (x, y), (xv, yv) = digits
    watcher = Watcher(isolated)
    history = compiled(dense_net(), **options).fit(
        x, y, batch_size=batch_size, epochs=2, validation_data=(xv, yv),
        callbacks=[watcher], verbose=0,
    ).history  # fmt: skip
    assert watcher.ended == [("train", 320), ("test", 160)] * 2
    expected = np.cumsum([x.sum(), xv.sum()] * 2)
    np.testing.assert_allclose(history["watched"], expected[0::2], rtol=1e-4)
    np.testing.assert_allclose(history["val_watched"], expected[1::2], rtol=1e-4)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 3}, {"run_eagerly": True}])
def test_a_step_whose_batches_are_kept_is_the_one_it_would_have_been(digits, isolated, options):
    (x, y), _ = digits
    losses, watchers = [], []
    for part in (lambda step: Part(), lambda step: Part(keep=step % 6 == 0)):
        keras.utils.set_random_seed(3)
        watcher = Watcher(isolated)
        watcher.part = part
        watchers.append(watcher)
        model = compiled(dense_net(), **options)
        fitted = model.fit(x, y, 50, epochs=2, shuffle=False, callbacks=[watcher], verbose=0)
        losses.append(fitted.history["loss"])
    assert losses[0] == losses[1]
    assert watchers[0].ended == watchers[1].ended
    assert watchers[0].kept == []
    at_once = options.get("steps_per_execution", 1)
    steps = [s for step in (0, 6) for s in range(step, min(step + at_once, 7))] * 2
    kept = [batch for batches in watchers[1].kept for batch in batches]
    for (x_kept, y_kept), step in zip(kept, steps, strict=True):
        np.testing.assert_array_equal(x_kept, x[50 * step : 50 * step + 50])
        np.testing.assert_array_equal(y_kept, y[50 * step : 50 * step + 50])


def test_a_batch_that_a_failed_step_left_is_not_taken_by_the_next_fit(digits):
    (x, y), _ = digits

    class Again(Watcher):
        fails = True

        def join(self, kind):
            self.joint = getattr(self, "joint", None) or Joint(self.model)
            self.joint.attach(kind, self, self.end_pass, self.run)

        def observe(self, kind, recording, data):
            if self.fails:
                raise RuntimeError("while it is traced")
            super().observe(kind, recording, data)

    watcher, model = Again(), compiled(dense_net())
    model.fit(x, y, 50, verbose=0)  # makes what the first trace of a step makes
    with pytest.raises(RuntimeError, match="traced"):
        model.fit(x + 1e6, y, 50, shuffle=False, callbacks=[watcher], verbose=0)
    watcher.fails = False
    model.fit(x, y, 50, shuffle=False, callbacks=[watcher], verbose=0)
    assert watcher.ended == [("train", 320)]
    assert float(watcher.total) == pytest.approx(x.sum(), rel=1e-4)


@pytest.mark.parametrize("isolated", [False, True])
def test_batches_are_kept_of_steps_that_nobody_observes(digits, isolated):
    (x, y), _ = digits
    watcher = Watcher(isolated)
    watcher.part = lambda step: Part(observe=step == 0, keep=step in (2, 6))
    compiled(dense_net()).fit(x, y, 50, shuffle=False, callbacks=[watcher], verbose=0)
    assert watcher.ended == [("train", 50)]
    kept = np.concatenate([y_kept for ((_, y_kept),) in watcher.kept])
    np.testing.assert_array_equal(kept, np.concatenate([y[100:150], y[300:]]))


def test_a_train_function_that_takes_more_than_its_batch_ends_and_does_not_wait(digits):
    (x, y), _ = digits
    model = compiled(dense_net(), run_eagerly=True)

    def make_train_function(force=False):
        def two_batches(iterator):
            model.train_step(next(iterator))
            return model.train_step(next(iterator))

        model.train_function = two_batches

    model.make_train_function = make_train_function
    watcher = Watcher()
    watcher.part = lambda step: Part(keep=True)
    model.fit(x, y, 50, callbacks=[watcher], verbose=0)
    assert len(watcher.kept) == 1


@pytest.mark.parametrize("isolated", [False, True])
def test_steps_per_epoch_of_endless_data(digits, isolated):
    (x, y), _ = digits
    data = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(40)
    watcher = Watcher(isolated)
    compiled(dense_net()).fit(data, steps_per_epoch=5, epochs=3, callbacks=[watcher], verbose=0)
    assert watcher.ended == [("train", 200)] * 3


@pytest.mark.parametrize("isolated", [False, True])
def test_the_step_is_compiled_once_over_fits(digits, isolated):
    (x, y), _ = digits
    model, watcher = compiled(dense_net()), Watcher(isolated)
    model.fit(x, y, callbacks=[watcher], verbose=0)
    joint = watcher.joint
    watcher.join = lambda kind: joint.attach(kind, watcher, watcher.end_pass, watcher.run)
    functions = {key: made for key, (_, made) in joint._steps._made.items()}
    model.fit(x, y, callbacks=[watcher], verbose=0)
    assert {key: made for key, (_, made) in joint._steps._made.items()} == functions
    compiled(model)
    model.fit(x, y, callbacks=[watcher], verbose=0)
    assert all(joint._steps._made[key][1] is not made for key, made in functions.items())
    assert watcher.prepared == 3


def test_a_step_is_traced_once(digits):
    """Keras makes slots and metrics in the first trace, which TensorFlow then throws away."""
    (x, y), _ = digits
    watcher, model = Watcher(), compiled(dense_net())
    model.fit(x, y, batch_size=40, callbacks=[watcher], verbose=0)
    assert watcher.traced == 1
    compiled(model)
    model.fit(x, y, batch_size=40, callbacks=[watcher], verbose=0)
    assert watcher.traced == 2


def test_the_calling_list_is_found_through_a_wrapping_callback(digits):
    class Wrapping(keras.callbacks.Callback):
        def set_model(self, model):
            super().set_model(model)
            (self.found,) = calling_lists()

    class Outer(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.inner = Wrapping()

        def set_model(self, model):
            super().set_model(model)
            self.inner.set_model(model)

    outer = Outer()
    compiled(dense_net()).fit(*digits[1], callbacks=[outer], verbose=0)
    assert isinstance(outer.inner.found, keras.callbacks.CallbackList)
    assert calling_lists() == []
