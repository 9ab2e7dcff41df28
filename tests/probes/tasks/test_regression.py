"""Numbers to predict, against scikit-learn."""

import math

import numpy as np
import pytest
import tensorflow as tf
from sklearn.dummy import DummyRegressor
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from keras_probes.probes import solver
from keras_probes.probes.problem import Problem
from keras_probes.probes.solver import minimise
from keras_probes.probes.tasks import Regression
from keras_probes.probes.tasks.task import MISSING, WRONG

UNITS = np.array([1.0, 1e3, 1e-2])


def rows(n=500, d=6, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, d)).astype("float32")
    y = z @ np.random.default_rng(9).normal(size=(d, 3)) + rng.normal(size=(n, 3))
    return z, (y * UNITS + [5, -2e3, 0]).astype("float32")


def standardised(y):
    task = Regression(3)
    scale = task.scale_of(y)
    return task.in_units(scale), task.standardised(y, scale).astype("float32")


def sums_of(task, u, y, weights=None):
    weights = tf.ones(len(y)) if weights is None else tf.constant(weights, tf.float32)
    u, labels = tf.constant(u[None], tf.float32), task.labels(tf.constant(y))
    return task.named(task.batch_sums(u, labels, weights, tf.ones((1, len(y))))[0].numpy()[0])


def problem(z, y, weights=None):
    weights = np.ones(len(y), "float32") if weights is None else weights
    block = tf.constant(z[None]), tf.constant(y), tf.constant(weights[None])
    return Problem([block], z.shape[1], Regression(y.shape[1]))


@pytest.mark.parametrize("l2", [1e-6, 1e-2, 1.0])
def test_it_is_ridge_regression(l2):
    z, y = rows()
    _, y = standardised(y)
    weights = np.random.default_rng(1).uniform(0.5, 2, len(y)).astype("float32")
    fit = minimise(problem(z, y, weights), l2)
    # Ours pulls the bias to the mean of the labels, as weakly as a feature that is always 1.
    mean = np.average(y, axis=0, weights=weights)
    ridge = Ridge(alpha=l2 * 3 * weights.sum(), fit_intercept=False)
    ridge.fit(np.column_stack([z, np.ones(len(z))]), y - mean, weights)
    np.testing.assert_allclose(fit.weights[0, :-1], ridge.coef_[:, :-1].T, atol=1e-5)
    np.testing.assert_allclose(fit.weights[0, -1], ridge.coef_[:, -1] + mean, atol=1e-5)
    assert fit.certificate[0] < 1e-12


def test_descent_and_closed_form_agree(monkeypatch):
    z, y = rows()
    _, y = standardised(y)
    near = minimise(problem(*(part[:250] for part in (z, y))), 1e-2).weights
    # Descent knows the earlier examples' Hessian but for what the bias has in common with features.
    for options, tolerance in (({}, 1e-6), ({"near": near, "trust": 2.0}, 2e-2)):
        exact = minimise(problem(z[250:], y[250:]), 1e-2, **options)
        with monkeypatch.context() as patched:
            patched.setattr(solver, "LARGEST_GRAM", 0)
            descent = minimise(problem(z[250:], y[250:]), 1e-2, tol=1e-12, **options)
        assert descent.steps > 1
        np.testing.assert_allclose(exact.weights, descent.weights, atol=tolerance)
        np.testing.assert_allclose(exact.objective, descent.objective, atol=tolerance)
        np.testing.assert_allclose(exact.trust, descent.trust)


def test_an_earlier_probe_of_another_host_stands_for_nothing():
    z, y = rows()
    _, y = standardised(y)
    far = np.full((1, 7, 3), 30.0)
    fit = minimise(problem(z, y), 1e-2, near=far, trust=2.0)
    assert fit.trust == 0
    np.testing.assert_allclose(fit.weights, minimise(problem(z, y), 1e-2).weights)


def test_only_some_move():
    z, y = rows()
    _, y = standardised(y)
    start = np.ones((2, 7, 3))
    block = tf.constant(np.stack([z, z])), tf.constant(y), tf.ones((2, len(y)))
    fit = minimise(
        Problem([block], 6, Regression(3)), 1e-2, start=start, only=np.array([True, False])
    )
    assert not np.allclose(fit.weights[0], 1)
    np.testing.assert_allclose(fit.weights[1], 1)
    assert fit.certificate[1] > 0.1


def test_measures_are_scikit_learns_in_the_labels_own_units():
    z, y = rows(2000)
    task, labels = standardised(y)
    scale = task.scale_of(y)
    u = labels + 0.5 * np.random.default_rng(2).normal(size=labels.shape).astype("float32")
    predicted = u * scale[1] + scale[0]
    sums = sums_of(task, u, labels)
    assert task.measure("error", sums) == pytest.approx(1 - r2_score(y, predicted), rel=1e-4)
    assert task.measure("mse", sums) == pytest.approx(mean_squared_error(y, predicted), rel=1e-4)
    assert task.measure("mae", sums) == pytest.approx(mean_absolute_error(y, predicted), rel=1e-4)
    assert task.measure("loss", sums) == pytest.approx(np.mean((u - labels) ** 2) / 2, rel=1e-4)
    assert task.host_error(predicted.astype("float32"), y) == pytest.approx(
        1 - r2_score(y, predicted), rel=1e-4
    )


def test_guesses_are_the_means_of_training():
    _, y = rows(1000)
    task, labels = standardised(y[:600])
    scale = task.scale_of(y[:600])
    rest = task.standardised(y[600:], scale).astype("float32")
    known, counts = (task.tally(tf.constant(part), tf.ones((1, len(part)))).numpy()[0]
                     for part in (labels, rest))  # fmt: skip
    guess = DummyRegressor().fit(y[:600], y[:600]).predict(y[600:])
    error, chance = task.guesses("error", known, counts)
    assert error == pytest.approx(1 - r2_score(y[600:], guess), rel=1e-4)
    assert math.isnan(chance)
    expected = mean_squared_error(y[600:], guess)
    assert task.guesses("mse", known, counts)[0] == pytest.approx(expected, rel=1e-4)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    task, inside = Regression(1), 0
    for _ in range(300):
        y = rng.normal(size=(400, 1)).astype("float32")
        u = y + 0.6 * rng.normal(size=y.shape).astype("float32")  # leaves 0.36 of the variance
        sums = sums_of(task, u, y)
        low, high = task.interval("error", task.measure("error", sums), sums)
        inside += low <= 0.36 <= high
    assert 0.9 <= inside / 300 <= 1.0


def test_a_missing_number_leaves_the_example_out():
    task = Regression(2)
    labels = task.labels(tf.constant([[1.0, 2.0], [np.nan, 2.0], [np.inf, 0.0], [3.0, 4.0]]))
    np.testing.assert_array_equal(task.state(labels), [0, MISSING, WRONG, 0])
    sums = task.named(
        task.batch_sums(tf.zeros((1, 4, 2)), labels, tf.ones(4), tf.ones((1, 4)))[0].numpy()[0]
    )
    assert (sums["count"], sums["unlabelled"], sums["weight"]) == (2, 2, 4)
    np.testing.assert_array_equal(sums["labels"], [4, 6])


def test_constant_numbers_are_refused():
    task = Regression(2)
    tally = task.tally(tf.constant([[1.0, 3.0], [2.0, 3.0]]), tf.ones((1, 2))).numpy()[0]
    assert "one and the same in columns 1" in task.untrainable(tally)
    assert not task.untrainable(
        task.tally(tf.constant([[1.0, 3.0], [2.0, 4.0]]), tf.ones((1, 2))).numpy()[0]
    )
