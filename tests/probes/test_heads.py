"""The maths of the probes, by finite differences, NumPy and scikit-learn."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, top_k_accuracy_score

from keras_probes.probes import heads
from keras_probes.probes.heads import LinearHeads, Standardize
from keras_probes.probes.optimizer import own_optimizer
from keras_probes.probes.probe_set import ProbeSet, parameters_of
from keras_probes.probes.tasks import Classification

RNG = np.random.default_rng(1)


@pytest.fixture(autouse=True)
def _fresh_rng():
    """Each test draws the same numbers, whichever ran before it."""
    global RNG
    RNG = np.random.default_rng(1)


def probe_set(n_features, num_classes=3, optimizer=None):
    return ProbeSet(n_features, {None: Classification(num_classes)}, own_optimizer(optimizer))


def show(method, features, labels, weights=None):
    """Gives one batch to `ProbeSet.train` or `ProbeSet.test`."""
    weights = np.ones(len(labels)) if weights is None else weights
    method(
        {tap: tf.constant(x, "float32") for tap, x in features.items()},
        {None: tf.constant(labels, "int32")},
        {None: tf.constant(weights, "float32")},
    )


def blobs(n=600, n_features=5, num_classes=3, scale=1.0):
    labels = RNG.integers(0, num_classes, n)
    centres = np.random.default_rng(5).normal(size=(num_classes, n_features))
    x = centres[labels] + RNG.normal(size=(n, n_features))
    return (scale * x).astype("float32"), labels


def test_gradients_by_finite_differences():
    layer = LinearHeads(n_taps=2, n_features=4, n_outputs=3, activation="softmax")
    layer.kernel.assign(RNG.normal(size=layer.kernel.shape))
    layer.bias.assign(RNG.normal(size=layer.bias.shape))
    z = RNG.normal(size=(2, 6, 4)).astype("float32")
    labels = np.array([0, 1, 2, 2, 1, -1])  # the last is left out
    weight = RNG.uniform(0.5, 2, (2, 6)).astype("float32")
    weight[1, 0] = 0

    def objective(*variables):
        logits = z.astype("float64") @ variables[0] + variables[1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        per_example = -log_p[:, np.arange(5), labels[:5]] * weight[:, :5]
        return per_example.sum() / 6 + 0.3 / 2 * np.sum(variables[0] ** 2)

    residual = Classification(3).residual(layer.outputs(tf.constant(z)), tf.constant(labels))
    weight[:, 5] = 0
    residual *= weight[..., None] / 6
    got = layer.gradients(tf.constant(z), residual, 0.3)
    at = [np.asarray(variable, "float64") for variable, _ in layer.averaged]
    for which, gradient in enumerate(got):
        for index in np.ndindex(at[which].shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [a.copy() for a in at]
                moved[which][index] += step
                ends.append(objective(*moved))
            assert float(gradient[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-6)


def test_predictions_are_by_the_average_of_the_last_steps():
    x, labels = blobs(n=60 * 10)
    probes = probe_set({"tap": 5})
    (layer,) = probes._heads()
    mean = np.zeros(layer.kernel.shape)
    for step in range(1, 61):
        part = slice(10 * step - 10, 10 * step)
        show(probes.train, {"tap": x[part]}, labels[part])
        rate = max(9 / (step + 8), 1 / heads.HORIZON)
        mean += rate * (np.asarray(layer.kernel) - mean)
        np.testing.assert_allclose(layer.mean_kernel, mean, rtol=1e-4, atol=1e-6)


def test_a_step_descends_on_the_penalty_of_the_last_refit():
    x, labels = blobs(64)
    moved = []
    for l2 in (0.0, 0.5):
        probes = probe_set({"tap": 5}, optimizer=keras.optimizers.SGD(1.0))
        (layer,) = probes._heads()
        layer.kernel.assign(np.ones(layer.kernel.shape))
        layer.l2.assign([[[l2]]])
        show(probes.train, {"tap": x}, labels)
        moved.append(np.asarray(layer.kernel))
    # Without one it is a share of the examples seen so far.
    np.testing.assert_allclose(moved[0] - moved[1], 0.5 - 1 / 64, rtol=1e-4)


def update(layer, batch):
    """Takes a batch, all of it finite, into the statistics of one tap."""
    layer.update([tf.constant(batch[None])], tf.ones((1, len(batch))))


def test_standardize_follows_the_weighted_statistics_of_its_batches():
    layer = Standardize([(1, 3)])
    total, mean, second = 0.0, np.zeros(3), np.zeros(3)
    for step in range(1, 40):
        batch = RNG.normal([1, -5, 100], [1, 3, 0.5], (16, 3)).astype("float32")
        update(layer, batch)
        # The same averages, by their moments, in float64.
        rate = max(9 / (step + 8), 1 / heads.HORIZON)
        mean += rate * (batch.mean(0, dtype="float64") - mean)
        second += rate * ((batch.astype("float64") ** 2).mean(0) - second)
        total += rate
    np.testing.assert_allclose(layer.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(layer.variance, second - mean**2, rtol=1e-2)
    z = np.asarray(layer([[tf.constant(batch)]]))[0, 0]
    expected = (batch - mean) / np.sqrt(second - mean**2) / np.sqrt(3)
    np.testing.assert_allclose(z, expected, rtol=1e-2, atol=1e-4)


def test_a_constant_feature_is_given_as_zero():
    layer = Standardize([(1, 2)])
    x = np.stack([RNG.normal(size=32), np.full(32, 1e6)], axis=1).astype("float32")
    for _ in range(3):
        update(layer, x)
    z = np.asarray(layer([[tf.constant(x)]]))[0, 0]
    assert np.isfinite(z).all()
    np.testing.assert_array_equal(z[:, 1], 0)


def test_a_constant_feature_is_given_as_zero_in_large_batches():
    layer = Standardize([(2, 2)])
    for rows in (4096, 512):
        x = np.stack([RNG.normal(size=rows), np.full(rows, 0.1)], axis=1).astype("float32")
        layer.update([tf.constant(np.stack([x, x]))], tf.ones((2, rows)))
    z = np.asarray(layer([[tf.constant(x)] * 2]))[0]
    np.testing.assert_array_equal(z[..., 1], 0)
    np.testing.assert_allclose(z[..., 0].std(axis=1), 1 / np.sqrt(2), rtol=0.05)


def test_what_hardly_varied_comes_in_no_larger_than_its_reach(monkeypatch):
    seen, standardized = [], Standardize.standardized

    def watched(layer, x):
        seen.append(standardized(layer, x))
        return seen[-1]

    monkeypatch.setattr(Standardize, "standardized", watched)
    probes = probe_set({"tap": 200})
    for _ in range(20):
        x = RNG.normal(size=(4, 200)) * (RNG.uniform(size=(4, 200)) < 0.05)
        show(probes.train, {"tap": x}, [0, 1, 2, 0])
    assert 3 < max(np.abs(z[0]).max() for z in seen) * np.sqrt(200) < 6


def test_statistics_leave_out_what_is_not_finite_in_the_first_batch_too():
    x = RNG.normal(5, 2, (40, 3)).astype("float32")
    bad = x.copy()
    bad[30:, 1] = np.nan
    some, whole = Standardize([(1, 3)]), Standardize([(1, 3)])
    for _ in range(3):
        update(whole, x[:30])
        kept = np.where(np.isfinite(bad).all(1), 1, 0)
        zeroed = np.where(kept[:, None] > 0, bad, 0)
        some.update([tf.constant(zeroed[None])], tf.constant(kept[None], tf.float32))
    for name in ("mean", "variance", "reach", "updates"):
        np.testing.assert_allclose(getattr(some, name), getattr(whole, name), rtol=1e-5)


def test_measures_against_scikit_learn():
    x, labels = blobs(n=400, num_classes=8)
    probes = probe_set({"tap": 5}, num_classes=8)
    for start in range(0, 400, 50):
        show(probes.train, {"tap": x[start : start + 50]}, labels[start : start + 50])
    probes.reset_sums("test")
    weights = RNG.uniform(0, 3, 400)
    for start in range(0, 400, 150):  # a ragged end
        part = slice(start, start + 150)
        show(probes.test, {"tap": x[part]}, labels[part], weights[part])
    sums = probes.sums("test")[None]["tap"]
    W, b = probes.weights("tap", None)
    logits = x.astype("float64") @ W + b
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert sums["count"] == 400
    assert sums["wrong"] == (p.argmax(1) != labels).sum()
    top5 = top_k_accuracy_score(labels, p, k=5, labels=np.arange(8), normalize=False)
    assert sums["wrong_top5"] == 400 - top5
    loss = log_loss(labels, p, sample_weight=weights, labels=np.arange(8))
    assert sums["weighted_loss"] / sums["weight"] == pytest.approx(loss, rel=1e-5)


def test_an_untrained_probe_is_as_wrong_as_a_constant():
    probes = probe_set({"tap": 5}, num_classes=3)
    x, labels = blobs(90)
    show(probes.test, {"tap": x}, labels)
    sums = probes.sums("test")[None]["tap"]
    assert sums["wrong"] == (labels != 0).sum()  # argmax of equal scores is the first class
    assert sums["weighted_loss"] / sums["weight"] == pytest.approx(np.log(3), rel=1e-6)


def test_a_batch_is_measured_before_its_update():
    probes = probe_set({"tap": 5})
    x, labels = blobs(50)
    show(probes.train, {"tap": x}, labels)
    assert probes.sums("train")[None]["tap"]["wrong"] == (labels != 0).sum()


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_training_comes_close_to_the_optimum_whatever_the_scale(scale):
    x, labels = blobs(3000, scale=scale)
    x += np.float32(50 * scale)  # far from centred
    x_test, labels_test = blobs(2000, scale=scale)
    x_test += np.float32(50 * scale)
    probes = probe_set({"tap": 5})
    for _ in range(3):
        for start in range(0, 3000, 50):
            show(probes.train, {"tap": x[start : start + 50]}, labels[start : start + 50])
    probes.reset_sums("test")
    show(probes.test, {"tap": x_test}, labels_test)
    sums = probes.sums("test")[None]["tap"]
    best = LogisticRegression(C=1e3).fit(x / scale - 50, labels)
    optimum = log_loss(labels_test, best.predict_proba(x_test / scale - 50))
    assert sums["weighted_loss"] / sums["weight"] == pytest.approx(optimum, abs=0.02)


def test_folded_weights_equal_the_layers_predictions():
    probes = probe_set({"a": 5, "b": 5, "c": 2})
    for _ in range(5):
        x, labels = blobs(64)
        features = {"a": x, "b": x[:, ::-1] * 7, "c": x[:, :2] - 3}
        show(probes.train, features, labels)
    outputs = probes.outputs({k: tf.constant(np.ascontiguousarray(v)) for k, v in features.items()})
    for tap, feature in features.items():
        W, b = probes.weights(tap, None)
        assert W.shape == (feature.shape[1], 3)
        logits = feature @ W + b
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        np.testing.assert_allclose(outputs[None][tap], p, rtol=1e-4, atol=1e-6)


def test_number_of_parameters():
    (group,) = probe_set({"tap": 40})._groups
    count = sum(int(np.prod(v.shape)) for v, _ in group.heads[None].averaged)
    assert count == parameters_of(40, 3) == 40 * 3 + 3


def test_stacked_taps_train_as_they_would_alone():
    x, labels = blobs(64)
    both = probe_set({"a": 5, "b": 5})
    alone = probe_set({"b": 5})
    for _ in range(4):
        show(both.train, {"a": x, "b": 2 * x + 1}, labels)
        show(alone.train, {"b": 2 * x + 1}, labels)
    for together, single in zip(both.weights("b", None), alone.weights("b", None), strict=True):
        np.testing.assert_allclose(together, single, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_examples_that_are_not_finite_are_left_out_of_their_tap_alone(bad):
    x, labels = blobs(64)
    poisoned = x.copy()
    poisoned[10:20, 2] = bad
    clean, hit = probe_set({"a": 5, "b": 5}), probe_set({"a": 5, "b": 5})
    for _ in range(3):
        show(clean.train, {"a": x, "b": x}, labels)
        show(hit.train, {"a": x, "b": poisoned}, labels)
    sums = hit.sums("train")[None]
    assert sums["b"]["nonfinite"] == 30
    assert sums["b"]["count"] == 3 * 54
    assert np.isfinite(sums["b"]["weighted_loss"])
    assert sums["a"] == clean.sums("train")[None]["a"]
    for got, expected in zip(hit.weights("a", None), clean.weights("a", None), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert all(np.isfinite(w).all() for w in hit.weights("b", None))


def test_a_batch_with_nothing_finite_changes_nothing():
    x, labels = blobs(32)
    probes = probe_set({"a": 5}, optimizer=keras.optimizers.SGD(0.01))
    show(probes.train, {"a": x}, labels)
    kernel = np.asarray(probes._groups[0].heads[None].kernel)
    show(probes.train, {"a": np.full_like(x, np.nan)}, labels)
    # Nothing but the penalty moves it.
    np.testing.assert_allclose(probes._groups[0].heads[None].kernel, kernel, rtol=1e-3)
    assert probes.sums("train")[None]["a"]["count"] == 32


def test_a_replica_without_an_example_spoils_nothing():
    probes = probe_set({"tap": 5})
    x, labels = blobs(n=32)
    show(probes.train, {"tap": x}, labels)
    reach = probes._standardize.reach.numpy()
    show(probes.train, {"tap": x[:0]}, labels[:0])
    assert all(np.isfinite(v).all() for v in probes.variables.values())
    np.testing.assert_allclose(probes._standardize.reach, reach)


def test_examples_without_a_label_are_left_out():
    x, labels = blobs(40)
    some = labels.copy()
    some[:8] = -1
    probes = probe_set({"a": 5}, optimizer=keras.optimizers.SGD(1.0))
    show(probes.train, {"a": x}, some)
    weighted = probe_set({"a": 5}, optimizer=keras.optimizers.SGD(1.0))
    show(weighted.train, {"a": x}, labels, np.r_[np.zeros(8), np.ones(32)])
    for got, expected in zip(probes.weights("a", None), weighted.weights("a", None), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    assert probes.sums("train")[None]["a"]["unlabelled"] == 8
    assert probes.sums("train")[None]["a"]["count"] == 32


def test_several_targets_share_the_features():
    x, labels = blobs(64)
    tasks = {"all": Classification(3), "is_zero": Classification(2)}
    probes = ProbeSet({"a": 5}, tasks, own_optimizer(None))
    both = {"all": tf.constant(labels, "int32"), "is_zero": tf.constant(labels == 0, "int32")}
    weights = {name: tf.ones(64) for name in both}
    for _ in range(5):
        probes.train({"a": tf.constant(x)}, both, weights)
    assert probes.weights("a", "all")[0].shape == (5, 3)
    assert probes.weights("a", "is_zero")[0].shape == (5, 2)
    assert set(probes.sums("train")) == {"all", "is_zero"}


@pytest.mark.parametrize("optimizer", ["sgd", keras.optimizers.Adam(0.02, name="theirs"), None])
def test_the_optimizer_is_a_copy_of_our_own(optimizer):
    mine = own_optimizer(optimizer)
    assert mine is not optimizer
    assert mine.name == "probe_optimizer"
    if isinstance(optimizer, keras.optimizers.Adam):
        assert float(mine.learning_rate) == pytest.approx(0.02)
        assert optimizer.name == "theirs"


def test_a_learning_rate_schedule_survives_the_copy():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5)
    mine = own_optimizer(keras.optimizers.SGD(schedule))
    assert float(mine.learning_rate) == 0.5


@pytest.mark.parametrize("optimizer", ["foo", 3, keras.optimizers.Adam])
def test_what_is_no_optimizer(optimizer):
    with pytest.raises(ValueError, match="optimizer"):
        own_optimizer(optimizer)


def test_a_feature_that_hardly_varied_is_not_blown_up():
    layer = Standardize([(1, 2)])
    x = np.stack([RNG.normal(size=64), np.zeros(64)], axis=1).astype("float32")
    x[0, 1] = 1e-3
    update(layer, x)
    z = np.asarray(layer([[tf.constant(x)]]))[0, 0]
    np.testing.assert_allclose(np.abs(z[:, 1]).max(), 4 / np.sqrt(2), rtol=1e-3)
    assert np.std(z[:, 0]) == pytest.approx(1 / np.sqrt(2), rel=0.01)  # as it is
