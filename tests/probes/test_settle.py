"""Settling a probe, against SciPy and by what it must leave alone."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from keras_probes.probes import settle as settling
from keras_probes.probes.optimizer import own_optimizer
from keras_probes.probes.probe_set import ProbeSet, Width
from keras_probes.probes.settle import FACTOR, FOLDS, MOST, TOL, enough, most_examples, settle


def examples(n=400, d=5, classes=3, seed=0):
    """Overlapping blobs; z float32, of length about 1, and labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(5).normal(size=(classes, d))
    labels = rng.integers(0, classes, n)
    z = (centres[labels] + rng.normal(size=(n, d))) / np.sqrt(d)
    return z.astype("float32"), labels


def settled(z, labels, kernel, bias, weights=None, of=0):
    weights = np.ones(len(labels), "float32") if weights is None else weights
    return settle(tf.constant(z), labels, weights, kernel, bias, of)


def cross_entropy(z, labels, kernel, bias, weights=None):
    logits = z.astype("float64") @ kernel + bias
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(z)), labels]
    return np.average(losses, weights=weights)


def objective(z, labels, kernel, bias, centre, l2, near):
    """What `settle` minimises."""
    penalty = l2 * np.sum(kernel**2) + near * np.sum((kernel - centre) ** 2)
    return cross_entropy(z, labels, kernel, bias) + penalty / 2


@pytest.mark.parametrize("of", [400, 2000])
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
def test_both_bounds_hold_and_the_probe_is_at_its_optimum(scale, of):
    z, labels = examples()
    rng = np.random.default_rng(1)
    start = scale * rng.normal(size=(5, 3)), scale * rng.normal(size=3)

    share = cross_entropy(z, labels, *start) / np.log(3)
    centre = start[0] if share < 1 else 0 * start[0]
    found = settled(z, labels, *start, of=of)

    def value(kernel, bias):
        return objective(z, labels, kernel, bias, centre, found.l2, found.near)

    def of_flat(flat):
        return value(flat[:15].reshape(5, 3), flat[15:])

    optimum = minimize(of_flat, np.zeros(18), tol=1e-9).fun
    above = value(found.kernel, found.bias) - optimum
    assert -1e-6 < above <= found.after + 1e-6
    assert found.after <= TOL
    above_before = value(*start) - optimum
    assert above_before - 1e-6 <= found.before <= above_before + found.after + 1e-6

    # What the examples at hand are of all there are, l2 is of both penalties.
    assert found.l2 == pytest.approx((found.l2 + found.near) * 400 / of)


@pytest.mark.parametrize(("n", "noise"), [(80, 0), (80, 40), (400, 40), (400, 0)])
def test_the_penalty_is_the_one_that_does_best_on_examples_apart(n, noise):
    z, labels = examples(n)
    random = np.random.default_rng(4).normal(size=(n, noise)) / np.sqrt(5)
    z = np.concatenate([z, random.astype("float32")], axis=1)
    kernel, bias = np.zeros((5 + noise, 3)), np.zeros(3)
    found = settled(z, labels, kernel, bias)
    apart = np.arange(n) % FOLDS == 0

    def loss_apart(penalty):
        model = LogisticRegression(C=1 / (penalty * (~apart).sum()), tol=1e-8, max_iter=10000)
        model.fit(z[~apart], labels[~apart])
        return cross_entropy(z[apart], labels[apart], model.coef_.T, model.intercept_)

    best = loss_apart(found.l2)
    assert best < loss_apart(found.l2 * FACTOR) + 2e-3
    if found.l2 * np.sum(found.kernel**2) > 10 * TOL:  # there is a penalty below
        assert best < loss_apart(found.l2 / FACTOR) + 2e-3


def test_a_probe_without_loss_is_left_as_it_is():
    z = np.eye(3, dtype="float32").repeat(20, axis=0)
    labels = np.arange(3).repeat(20)
    kernel, bias = 50 * np.eye(3), np.zeros(3)
    found = settled(z, labels, kernel, bias)
    np.testing.assert_array_equal(found.kernel, kernel)
    assert found.before == found.after <= 1e-8


def test_examples_without_label_or_weight_are_left_out():
    z, labels = examples()
    weights = np.random.default_rng(2).uniform(0.5, 2, 400).astype("float32")
    kernel, bias = np.zeros((5, 3)), np.zeros(3)
    labels_with, weights_with = labels.copy(), weights.copy()
    labels_with[:50], weights_with[50:90] = -1, 0
    got = settled(z, labels_with, kernel, bias, weights_with)
    expected = settled(z[90:], labels[90:], kernel, bias, weights[90:])
    np.testing.assert_allclose(got.kernel, expected.kernel, rtol=1e-4, atol=1e-5)


def test_classes_without_an_example_stay_as_they_were():
    z, labels = examples()
    kernel, bias = np.zeros((5, 4)), np.array([0.0, 1.0, 0.5, -3.0])
    found = settled(z, labels, kernel, bias)
    np.testing.assert_array_equal(found.kernel[:, 3], 0)
    assert found.bias[3] == -3
    assert found.bias[:3].mean() == pytest.approx(0.5)
    alone = settled(z, labels, kernel[:, :3], bias[:3])
    np.testing.assert_allclose(found.kernel[:, :3], alone.kernel)


def test_too_few_examples_and_a_single_class_settle_nothing():
    z, labels = examples(n=20, d=50)
    assert settled(z, labels, np.zeros((50, 3)), np.zeros(3)) is None
    z, labels = examples()
    assert settled(z, 0 * labels, np.zeros((5, 3)), np.zeros(3)) is None


def test_how_many_examples_are_settled_on():
    assert most_examples(1000, 10) == MOST
    assert most_examples(1000, 100) == 10**9 // (100 * 2100)
    assert most_examples(64, 1000) == 0  # 886 examples are less than one a class
    assert enough(120, 240, 10)
    assert not enough(119, 5, 10)
    assert not enough(120, 241, 10)
    assert not enough(10**6, 64, 1000)


def test_with_many_classes_it_settles_on_some_of_the_examples_or_not_at_all(monkeypatch):
    z, labels = examples(400)
    zeros = np.zeros((5, 3)), np.zeros(3)
    some = np.linspace(0, 399, 150).astype(int)
    expected = settled(z[some], labels[some], *zeros, of=400)
    monkeypatch.setattr(settling, "WORK", 150 * 3 * (2 * 5 + 3))
    got = settled(z, labels, *zeros, of=400)
    np.testing.assert_array_equal(got.kernel, expected.kernel)
    assert got.l2 == pytest.approx(expected.l2)
    monkeypatch.setattr(settling, "WORK", 11 * 3 * (2 * 5 + 3))
    assert settled(z, labels, *zeros) is None


def probe_set(widths, targets=(None,)):
    classes = targets if isinstance(targets, dict) else dict.fromkeys(targets, 3)
    return ProbeSet(widths, classes, own_optimizer(None))


def give(probes, method, features, labels, n):
    rows = {tap: tf.constant(x[:n]) for tap, x in features.items()}
    labels = {target: tf.constant(y[:n], tf.int32) for target, y in labels.items()}
    return getattr(probes, method)(rows, labels, {target: tf.ones(n) for target in labels})


def loss(probes, features, labels, tap, target=None):
    probes.reset_sums("test")
    give(probes, "test", features, labels, len(labels[target]))
    sums = probes.sums("test")[target][tap]
    return sums["weighted_loss"] / sums["weight"]


# A learned projection is not settled, only what is made of it.
@pytest.mark.parametrize(("rank", "near"), [(None, 0.03), (2, 0.15)])
def test_probes_of_old_features_are_at_the_optimum_of_new_ones(rank, near):
    z, y = examples(800)
    labels = {"a": y, "b": (y + 1) % 3}
    probes = probe_set({"near": Width(5, rank), "far": Width(5, rank)}, ("a", "b"))
    old = {"near": z, "far": -3 * z - 40}
    for _ in range(30):
        give(probes, "train", old, labels, 64)
    before = probes.weights("near", "a")
    new = {"near": z, "far": 0.5 * z + 7}  # the host has moved on
    assert loss(probes, new, labels, "far", "a") > 2
    found = give(probes, "settle", new, labels, 800)
    assert set(found) == {(target, tap) for target in ("a", "b") for tap in ("near", "far")}
    assert all(one.after <= TOL for one in found.values())
    assert found["a", "far"].before > 10 * found["a", "near"].before
    best = cross_entropy(z, y, *(np.asarray(w, "float64") for w in probes.weights("near", "a")))
    for target, tap in found:
        assert loss(probes, new, labels, tap, target) == pytest.approx(best, abs=near)
    assert not np.array_equal(probes.weights("near", "a")[0], before[0])

    # The optimizer and the averages go on from there.
    group = probes._groups[0]
    for heads in group.heads.values():
        for variable, mean in heads.averaged:
            np.testing.assert_array_equal(variable, mean)
    x = np.concatenate([new["near"], new["far"]], axis=1)
    np.testing.assert_allclose(probes._standardize.mean, x.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probes._standardize.variance, x.var(0), rtol=1e-4)


def test_only_finite_rows_count_and_wide_taps_stay_as_they_were():
    z, y = examples(100)
    wide = np.random.default_rng(3).normal(size=(100, 300)).astype("float32")
    probes = probe_set({"tap": Width(5), "wide": Width(300)})
    features, labels = {"tap": z.copy(), "wide": wide}, {None: y}
    features["tap"][:10] = np.nan
    give(probes, "train", features, labels, 100)
    before = probes.weights("wide", None)
    found = give(probes, "settle", features, labels, 100)
    assert set(found) == {(None, "tap")}
    for got, expected in zip(probes.weights("wide", None), before, strict=True):
        np.testing.assert_array_equal(got, expected)
    features["tap"][:10] = z[:10]
    again = probe_set({"tap": Width(5)})
    give(again, "train", {"tap": features["tap"][10:]}, {None: y[10:]}, 90)
    give(again, "settle", {"tap": features["tap"][10:]}, {None: y[10:]}, 90)
    assert loss(probes, features, labels, "tap") == pytest.approx(
        loss(again, {"tap": features["tap"]}, labels, "tap"), abs=0.02
    )


def test_a_target_of_many_classes_stays_as_it_was_beside_another():
    z, y = examples(100)
    probes = probe_set({"tap": Width(5)}, {"few": 3, "many": 1000})
    assert probes.most_examples() == MOST
    labels = {"few": y, "many": y}
    give(probes, "train", {"tap": z}, labels, 100)
    before = probes.weights("tap", "many")
    assert set(give(probes, "settle", {"tap": z}, labels, 100)) == {("few", "tap")}
    np.testing.assert_array_equal(before[0], probes.weights("tap", "many")[0])
    assert probe_set({"tap": Width(5)}, {"many": 1000}).most_examples() == 0
