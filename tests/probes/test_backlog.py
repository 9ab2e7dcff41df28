"""Small batches that wait for others, so that a step of the probes is worth its while."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_probes import LinearProbeCallback
from keras_probes.probes import probe_set
from keras_probes.probes.backlog import Backlog
from keras_probes.probes.optimizer import own_optimizer
from keras_probes.probes.probe_set import FEW, ROWS, ProbeSet, Width

WIDTHS = {"a": Width(5), "b": Width(7), "c": Width(5)}
CLASSES = ROWS  # the fewest for which batches wait


def draw(rows, seed):
    rng = np.random.default_rng(seed)
    features = {
        tap: rng.normal(size=(rows, w.n_features)).astype("float32") for tap, w in WIDTHS.items()
    }
    return features, {None: rng.integers(0, CLASSES, rows)}, {None: rng.uniform(0, 2, rows)}


def make_train(waits):
    """Probes, and their `train` as a compiled step."""
    probes = ProbeSet(WIDTHS, {None: CLASSES}, own_optimizer(None))
    if not waits:
        probes._backlog = None

    @tf.function(reduce_retracing=True)
    def train(features, labels, weights):
        probes.train(features, labels, weights)

    def on_arrays(features, labels, weights):
        train(
            {tap: tf.constant(x) for tap, x in features.items()},
            {t: tf.constant(y, "int32") for t, y in labels.items()},
            {t: tf.constant(w, "float32") for t, w in weights.items()},
        )

    return probes, on_arrays


def parts(batch, *rows):
    """A batch cut into batches of so many rows."""
    start = 0
    for size in rows:
        part = slice(start, start + size)
        yield [{key: array[part] for key, array in of.items()} for of in batch]
        start += size


def assert_same(one, other):
    values = one.variables
    assert values.keys() == other.variables.keys()
    for name, variable in other.variables.items():
        if name != "steps":
            np.testing.assert_allclose(values[name], variable, rtol=1e-5, atol=1e-6, err_msg=name)
    for tap in WIDTHS:
        assert one.sums("train")[None][tap] == pytest.approx(other.sums("train")[None][tap])


def test_after_few_steps_small_batches_wait_and_count_as_one():
    (probes, train), (at_once, train_at_once) = make_train(True), make_train(False)
    for seed in range(FEW - 1):
        batch = draw(8, seed)
        train(*batch)  # each a step of its own
        train_at_once(*batch)
    assert_same(probes, at_once)

    batch = draw(ROWS + 6, seed=1000)
    for part in parts(batch, ROWS - 40, 5, 41):
        train(*part)
    train_at_once(*batch)
    assert_same(probes, at_once)
    assert probes.steps == FEW + 2  # batches, as callers count


def test_what_still_waits_is_caught_up_with():
    (probes, train), (at_once, train_at_once) = make_train(True), make_train(False)
    for either in probes, at_once:
        either._updates.assign(FEW)
    batch = draw(20, seed=0)
    for part in parts(batch, 8, 12):
        train(*part)
    assert probes.sums("train")[None]["a"]["count"] == 0
    probes.catch_up()
    train_at_once(*batch)
    assert_same(probes, at_once)
    probes.catch_up()  # nothing waits
    assert_same(probes, at_once)


def test_what_an_interrupted_epoch_left_is_forgotten():
    probes, train = make_train(True)
    probes._updates.assign(FEW)
    train(*draw(20, seed=0))
    probes.reset_sums("train")
    probes.catch_up()
    assert probes.sums("train")[None]["a"]["count"] == 0


def test_enough_at_once_do_not_wait():
    probes, train = make_train(True)
    probes._updates.assign(FEW)
    train(*draw(ROWS, seed=0))
    assert probes.sums("train")[None]["a"]["count"] == ROWS


def test_with_few_classes_no_batch_waits():
    probes = ProbeSet(WIDTHS, {None: CLASSES - 1}, own_optimizer(None))
    probes._updates.assign(FEW)
    features, _, weights = draw(2, seed=0)
    labels = {None: tf.constant([0, 1])}
    probes.train(
        {tap: tf.constant(x) for tap, x in features.items()},
        labels,
        {None: tf.constant(weights[None], "float32")},
    )
    assert probes.sums("train")[None]["a"]["count"] == 2


def test_batches_in_any_order_of_axes():
    backlog = Backlog([tf.TensorSpec((2, None)), tf.TensorSpec((None,), tf.int32)])
    taken = []
    for size in (2, 1, 4):
        batch = [tf.fill((2, size), float(size)), tf.fill((size,), size)]
        backlog.pass_on(batch, tf.constant(3), taken.append)
    first, second = taken
    np.testing.assert_array_equal(first[0], [[2, 2, 1]] * 2)
    np.testing.assert_array_equal(first[1], [2, 2, 1])
    np.testing.assert_array_equal(second[1], [4] * 4)
    backlog.empty(taken.append)
    assert len(taken) == 2


@pytest.fixture
def few(monkeypatch):
    """Batches wait after 8 steps."""
    monkeypatch.setattr(probe_set, "FEW", 8)


def fit(host, options, probes, epochs):
    """Epochs of batches of one example, of which all but the first ones wait."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(11, 6)).astype("float32"), rng.integers(0, CLASSES, 11)
    host.compile("sgd", "sparse_categorical_crossentropy", **options)
    for _ in range(epochs):
        host.fit(x, y, batch_size=1, verbose=0, callbacks=[probes])
        counts = probes.results.frame().query("split == 'train' and metric == 'error'")["n"]
        assert (counts == 11).all()


def host():
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(4, "relu"), keras.layers.Dense(CLASSES, "softmax")]
    )


@pytest.mark.parametrize(
    ("mode", "options"),
    [("shared", {}), ("shared", {"run_eagerly": True}), ("shared", {"steps_per_execution": 4}),
     ("isolated", {}), ("isolated", {"jit_compile": True})],
)  # fmt: skip
@pytest.mark.usefixtures("few")
def test_each_example_of_an_epoch_is_measured(mode, options):
    fit(host(), options, LinearProbeCallback(mode=mode), epochs=2)


@pytest.mark.usefixtures("few")
def test_a_host_that_is_compiled_by_xla_later_on():
    model, probes = host(), LinearProbeCallback()
    fit(model, {}, probes, epochs=2)
    fit(model, {"jit_compile": True}, probes, epochs=1)
    fit(model, {}, probes, epochs=1)
