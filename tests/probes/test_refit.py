"""The refit of probes on a sample, against SciPy and scikit-learn, and what it leaves alone."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from keras_probes.probes import problem
from keras_probes.probes import refit as refit_module
from keras_probes.probes.optimizer import own_optimizer
from keras_probes.probes.path import PENALTIES, walk
from keras_probes.probes.probe_set import ProbeSet
from keras_probes.probes.refit import (
    FIRST_PENALTY,
    GAIN,
    HELD_OUT,
    OTHERS,
    SEARCH_EVERY,
    TOL,
    refit,
)
from keras_probes.probes.tasks import Classification


def examples(n=400, d=5, classes=3, seed=0):
    """Overlapping blobs; z float32, of length about 1, and labels."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(5).normal(size=(classes, d))
    labels = rng.integers(0, classes, n)
    z = (centres[labels] + rng.normal(size=(n, d))) / np.sqrt(d)
    return z.astype("float32"), labels


def refitted(z, labels, start, weights=None, l2=0.0, kept=1.0, passes=400, epoch=0, tol=TOL):
    weights = np.ones(len(labels), "float32") if weights is None else weights
    return refit(
        tf.constant(z[None]), tf.constant(labels, tf.int32), tf.constant(weights[None]),
        Classification(start.shape[1]), start[None], np.array([l2]), kept=kept, passes=passes,
        epoch=epoch, seed=1, tol=tol,
    )  # fmt: skip


def cross_entropy(z, labels, kernel, bias, weights=None):
    logits = z.astype("float64") @ kernel + bias
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(z)), labels]
    return np.average(losses, weights=weights)


def split(w):
    return w[:-1], w[-1]


@pytest.mark.parametrize("kept", [1.0, 0.2])
@pytest.mark.parametrize("known", [False, True])
def test_both_bounds_hold_and_the_probe_is_at_its_optimum(known, kept):
    """From any probe, and from one that knows other examples and stands for them."""
    z, labels = examples()
    start = 3 * np.random.default_rng(1).normal(size=(6, 3))
    if known:
        start = refitted(*examples(seed=7), start, l2=1e-2, epoch=1).weights[0]
    found = refitted(z, labels, start, l2=1e-2, kept=kept, epoch=1)
    counts = np.bincount(labels, minlength=3) + 0.5
    guess = np.vstack([np.zeros((5, 3)), np.log(counts / counts.sum())])
    p = softmax(z.astype("float64") @ start[:-1] + start[-1], axis=1)
    theta = np.mean(p * (1 - p), axis=0)
    second = np.eye(6)  # of the features; the bias is a feature that is 1
    second[:-1, :-1] = z.T.astype("float64") @ z / len(z)

    def value(w):
        far = w - start
        of_others = theta @ np.einsum("ik,ij,jk->k", far, second, far) + 1e-2 * np.sum(far**2)
        pull = 1e-2 * np.sum((w - guess) ** 2) + known * OTHERS * (1 - kept) * of_others
        return cross_entropy(z, labels, *split(w)) + pull / 2

    optimum = minimize(lambda w: value(w.reshape(6, 3)), np.zeros(18), tol=1e-9).fun
    above, above_before = value(found.weights[0]) - optimum, value(start) - optimum
    assert -1e-6 < above <= found.after[0] + 1e-6
    assert found.after[0] <= TOL
    assert above_before - 1e-6 <= found.before[0] <= above_before + found.after[0] + 1e-6


@pytest.mark.parametrize("kept", [1.0, 0.2])
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0])
def test_both_bounds_hold_after_a_search_from_any_start(scale, kept):
    z, labels = examples()
    start = scale * np.random.default_rng(1).normal(size=(6, 3))
    found = refitted(z, labels, start, kept=kept)
    counts = np.bincount(labels, minlength=3) + 0.5
    guess = np.vstack([np.zeros((5, 3)), np.log(counts / counts.sum())])

    def value(w):
        return cross_entropy(z, labels, *split(w)) + found.l2[0] / 2 * np.sum((w - guess) ** 2)

    optimum = minimize(lambda w: value(w.reshape(6, 3)), np.zeros(18), tol=1e-9).fun
    above, above_before = value(found.weights[0]) - optimum, value(start) - optimum
    assert -1e-6 < above <= found.after[0] + 1e-6
    assert found.after[0] <= TOL
    assert above_before - 1e-6 <= found.before[0] <= above_before + found.after[0] + 1e-6


@pytest.mark.parametrize("known", [False, True])
def test_more_features_than_examples_are_the_same_problem_in_fewer(known, monkeypatch):
    """As without that, and what other examples have taught beside their span stays in part."""
    monkeypatch.setattr(refit_module, "NARROW", 90)  # both to the same tolerance
    z, labels = examples(60, d=90)
    start = 0.3 * np.random.default_rng(1).normal(size=(91, 3))
    if known:
        start = refitted(*examples(400, d=90, seed=7), start, l2=1e-2, epoch=1).weights[0]
    found = refitted(z, labels, start, l2=1e-2, kept=0.5, epoch=1)
    monkeypatch.setattr(refit_module, "_within_span", lambda z, w: (z, w, unturned))
    monkeypatch.setattr(problem, "EXACT", 90)
    expected = refitted(z, labels, start, l2=1e-2, kept=0.5, epoch=1)
    assert found.before[0] == pytest.approx(expected.before[0], abs=2 * TOL)
    away = [cross_entropy(z, labels, *split(w.weights[0])) for w in (found, expected)]
    assert away[0] == pytest.approx(away[1], abs=TOL)
    assert np.linalg.norm(found.weights - expected.weights) < 0.1 * np.linalg.norm(start)


def unturned(fit):
    return fit.weights, np.zeros(len(fit.weights))


def test_the_first_probes_stand_for_no_other_examples():
    z, labels = examples()
    start = np.random.default_rng(1).normal(size=(6, 3))
    few, all_of_them = (refitted(z, labels, start, kept=kept) for kept in (0.2, 1.0))
    np.testing.assert_array_equal(few.weights, all_of_them.weights)


@pytest.mark.parametrize(("n", "noise"), [(80, 0), (80, 40), (400, 40), (400, 0)])
def test_the_penalty_is_the_one_that_does_best_on_examples_apart(n, noise):
    z, labels = examples(n)
    random = np.random.default_rng(4).normal(size=(n, noise)) / np.sqrt(5)
    z = np.concatenate([z, random.astype("float32")], axis=1)
    start, l2 = np.zeros((6 + noise, 3)), 0.0
    for _ in range(6):  # on the same examples apart
        l2 = refitted(z, labels, start, l2=l2).l2[0]
    apart = np.random.default_rng((1, 0)).permutation(n)[: n // HELD_OUT]
    others = np.setdiff1d(np.arange(n), apart)

    def loss_apart(penalty):
        model = LogisticRegression(C=1 / (penalty * len(others)), tol=1e-8, max_iter=10000)
        model.fit(z[others], labels[others])
        return cross_entropy(z[apart], labels[apart], model.coef_.T, model.intercept_)

    below, here, above = (loss_apart(l2 * 10**power) for power in (-0.5, 0, 0.5))
    assert here < min(below, above) + GAIN


@pytest.mark.parametrize(("n", "folds"), [(60, 8), (2000, 4), (9000, 1)])
def test_where_passes_are_not_counted_eighths_take_turns(n, folds):
    """A thousand examples choose the penalty, or all: scikit-learn's loss on the same folds."""
    z, labels = examples(n)
    z = np.concatenate([z, np.random.default_rng(4).normal(size=(n, 5))], axis=1).astype("float32")
    found = refitted(z, labels, np.zeros((11, 3)), passes=None, tol=1e-3)
    order = np.random.default_rng((1, 0)).permutation(n)

    def loss_apart(penalty):
        losses = []
        for apart in np.array_split(order, HELD_OUT)[:folds]:
            others = np.setdiff1d(order, apart)
            model = LogisticRegression(C=1 / (penalty * len(others)), tol=1e-8, max_iter=10000)
            model.fit(z[others], labels[others])
            of_fold = cross_entropy(z[apart], labels[apart], model.coef_.T, model.intercept_)
            losses += [of_fold] * len(apart)
        return np.mean(losses)

    below, here, above = (loss_apart(found.l2[0] * 10**power) for power in (-0.5, 0, 0.5))
    assert here < min(below, above) + GAIN
    assert found.after[0] <= 1e-3
    again = refitted(z, labels, found.weights[0], l2=found.l2[0], passes=None, tol=1e-3)
    assert again.l2[0] == found.l2[0]


@pytest.mark.parametrize("passes", [400, None])
def test_examples_without_weight_choose_no_penalty(passes):
    z, labels = examples(240)
    weights = np.zeros(240, "float32")
    weights[200:] = 1.0
    start = np.zeros((6, 3))
    found = refitted(z, labels, start, weights, passes=passes)
    alone = refitted(z[200:], labels[200:], start, passes=passes)
    assert found.l2 == alone.l2
    np.testing.assert_allclose(found.weights, alone.weights, rtol=1e-4, atol=1e-5)


def test_between_two_searches_the_penalty_stays():
    z, labels = examples()
    start = np.zeros((6, 3))
    epochs = (0, 1, SEARCH_EVERY - 1, SEARCH_EVERY)
    found = [refitted(z, labels, start, l2=1.0, epoch=epoch).l2[0] for epoch in epochs]
    assert found[1] == found[2] == 1.0 > max(found[0], found[3])


def test_a_probe_without_loss_is_left_as_it_is():
    z = np.eye(3, dtype="float32").repeat(20, axis=0)
    labels = np.arange(3).repeat(20)
    start = np.vstack([50 * np.eye(3), np.zeros(3)])
    found = refitted(z, labels, start, l2=1e-8)
    np.testing.assert_allclose(found.weights[0], start, atol=1e-2)
    assert found.before[0] <= TOL


def test_examples_without_weight_are_left_out():
    z, labels = examples()
    weights = np.random.default_rng(2).uniform(0.5, 2, 400).astype("float32")
    weights[50:90] = 0
    start = np.zeros((6, 3))
    got = refitted(z, labels, start, weights)
    z[50:90], labels[50:90] = 1e3, 0
    expected = refitted(z, labels, start, weights)
    np.testing.assert_allclose(got.weights, expected.weights, rtol=1e-4, atol=1e-5)


def test_few_passes_go_as_far_as_they_get_and_the_certificate_says_how_far():
    z, labels = examples()
    start = 3 * np.random.default_rng(1).normal(size=(6, 3))
    bounds = [refitted(z, labels, start, passes=passes).after[0] for passes in (2, 8, 100)]
    assert bounds[0] > bounds[1] > TOL > bounds[2]


def test_with_a_single_class_and_hardly_an_example_it_goes_on():
    z, labels = examples(n=20, d=50)
    found = refitted(z, labels, np.zeros((51, 3)))
    assert np.isfinite(found.weights).all()
    assert found.after[0] <= TOL
    found = refitted(z[:2], 0 * labels[:2], np.zeros((51, 3)))
    assert np.isfinite(found.weights).all()
    logits = z[:2] @ found.weights[0][:-1] + found.weights[0][-1]
    assert (logits.argmax(axis=1) == 0).all()


def test_what_the_other_examples_have_taught_stays():
    """With a fortieth of the epoch at hand, it is nearer to the probe of all than by that alone."""
    z, labels = examples(4000, d=20, seed=3)
    of_all = refitted(z, labels, np.zeros((21, 3)))
    few, of_all_of_them = (z[:100], labels[:100]), of_all.weights[0]
    alone, with_others = (refitted(*few, of_all_of_them, l2=1e-3, kept=kept) for kept in (1, 0.025))
    best, of_few, both = (
        cross_entropy(z[100:], labels[100:], *split(found.weights[0]))
        for found in (of_all, alone, with_others)
    )
    assert both - best < 0.7 * (of_few - best)


def test_a_search_is_not_stuck_where_fits_take_longer_than_there_are_passes():
    """Many classes, and features that vary together: the first penalty would take them all."""
    rng = np.random.default_rng(0)
    classes, d, n = 500, 64, 2400
    labels = rng.integers(0, classes, n)
    turned, again = (np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(2))
    mixed = turned * np.logspace(0, -3, d)[:, None] @ again
    z = (rng.normal(size=(classes, d))[labels] + 0.1 * rng.normal(size=(n, d))) @ mixed
    z = (z / z.std(axis=0)).astype("float32")
    found = refitted(z, labels, np.zeros((d + 1, classes)), passes=12)
    assert found.l2[0] < PENALTIES[FIRST_PENALTY]
    assert found.after[0] < 0.1  # of 6.2 nats; with the first penalty alone it is 0.28


def test_a_walk_finds_the_lowest_place_of_each_probe():
    lowest = np.array([0, 3, 9, 5])
    tried = []

    def trial(places, only):
        tried.append(only.sum())
        return np.abs(places - lowest).astype(float)

    start = np.full(4, 4)
    np.testing.assert_array_equal(walk(trial, start, 10), lowest)
    np.testing.assert_array_equal(walk(trial, start, 10, both=False), [4, 4, 9, 5])
    np.testing.assert_array_equal(walk(trial, start, 10, step=-1, both=False), [0, 3, 4, 4])
    np.testing.assert_array_equal(walk(trial, start, 10, step=2), [0, 4, 8, 4])
    assert tried[0] == 4
    assert len(PENALTIES) == 17


def test_a_walk_has_patience():
    losses = np.array([3.0, 2.0, 2.5, 1.0, 4.0, 5.0, 0.0])

    def trial(places, only):
        return losses[places]

    start = np.zeros(1, int)
    assert walk(trial, start, 7, patience=1, both=False) == 1
    assert walk(trial, start, 7, patience=2, both=False) == 3


def probe_set(widths, targets=(None,)):
    classes = targets if isinstance(targets, dict) else dict.fromkeys(targets, 3)
    tasks = {target: Classification(count) for target, count in classes.items()}
    return ProbeSet(widths, tasks, own_optimizer(None))


def give(probes, method, features, labels, n, **options):
    rows = {tap: tf.constant(x[:n]) for tap, x in features.items()}
    labels = {target: tf.constant(y[:n], tf.int32) for target, y in labels.items()}
    weights = {target: tf.ones(n) for target in labels}
    return getattr(probes, method)(rows, labels, weights, **options)


def loss(probes, features, labels, tap, target=None):
    probes.reset_sums("test")
    give(probes, "test", features, labels, len(labels[target]))
    sums = probes.sums("test")[target][tap]
    return sums["weighted_loss"] / sums["weight"]


def test_probes_of_old_features_are_at_the_optimum_of_new_ones():
    z, y = examples(800)
    labels = {"a": y, "b": (y + 1) % 3}
    probes = probe_set({"near": 5, "far": 5}, ("a", "b"))
    old = {"near": z, "far": -3 * z - 40}
    for _ in range(30):
        give(probes, "train", old, labels, 64)
    before = probes.weights("near", "a")
    new = {"near": z, "far": 0.5 * z + 7}  # the host has moved on
    assert loss(probes, new, labels, "far", "a") > 2
    assert probes.certificates("test") == {}
    give(probes, "refit", new, labels, 800, kept=1.0, passes=200)
    now, then = probes.certificates("test"), probes.certificates("train")
    assert set(now) == {(target, tap) for target in ("a", "b") for tap in ("near", "far")}
    assert all(0 < bound <= TOL for bound in now.values())
    assert then["a", "far"] > 10 * then["a", "near"]
    best = cross_entropy(z, y, *(np.asarray(w, "float64") for w in probes.weights("near", "a")))
    for target, tap in now:
        assert loss(probes, new, labels, tap, target) == pytest.approx(best, abs=0.01)
    assert not np.array_equal(probes.weights("near", "a")[0], before[0])

    # The optimizer and the averages go on from there, and the certificates are of the past.
    for heads in probes._groups[0].heads.values():
        for variable, mean in heads.averaged:
            np.testing.assert_array_equal(variable, mean)
        assert (heads.l2.numpy() > 0).all()
    x = np.concatenate([new["near"], new["far"]], axis=1)
    np.testing.assert_allclose(probes._standardize.mean, x.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(probes._standardize.variance, x.var(0), rtol=1e-4)
    give(probes, "train", new, labels, 64)
    assert probes.certificates("test") == {}


def test_only_finite_rows_count_and_a_tap_without_one_stays_as_it_was():
    z, y = examples(100)
    probes = probe_set({"tap": 5, "broken": 5})
    features, labels = {"tap": z.copy(), "broken": z}, {None: y}
    features["tap"][:10] = np.nan
    give(probes, "train", features, labels, 100)
    before = probes.weights("broken", None)
    broken = {**features, "broken": np.full_like(z, np.inf)}
    give(probes, "refit", broken, labels, 100, kept=1.0, passes=100)
    assert set(probes.certificates("test")) == {(None, "tap")}
    for got, expected in zip(probes.weights("broken", None), before, strict=True):
        np.testing.assert_array_equal(got, expected)
    features["tap"][:10] = z[:10]
    again = probe_set({"tap": 5})
    give(again, "train", {"tap": features["tap"][10:]}, {None: y[10:]}, 90)
    give(again, "refit", {"tap": features["tap"][10:]}, {None: y[10:]}, 90, kept=1.0, passes=100)
    assert loss(probes, features, labels, "tap") == pytest.approx(
        loss(again, {"tap": features["tap"]}, labels, "tap"), abs=0.02
    )


def test_many_classes_are_refitted_and_certified():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(300, 40))
    y = rng.integers(0, 300, 1500)
    z = (centres[y] + 0.7 * rng.normal(size=(1500, 40))).astype("float32")
    probes = probe_set({"tap": 40}, {"many": 300, "few": 3})
    labels = {"many": y, "few": y % 3}
    for _ in range(10):
        give(probes, "train", {"tap": z}, labels, 1500)
    before = loss(probes, {"tap": z}, labels, "tap", "many")
    give(probes, "refit", {"tap": z}, labels, 1500, kept=1.0, passes=100)
    assert set(probes.certificates("test")) == {("many", "tap"), ("few", "tap")}
    assert probes.certificates("test")["many", "tap"] <= TOL
    assert loss(probes, {"tap": z}, labels, "tap", "many") < before
