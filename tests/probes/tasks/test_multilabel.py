"""Several labels at once, against scikit-learn."""

import math

import numpy as np
import pytest
import tensorflow as tf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from sklearn.multiclass import OneVsRestClassifier

from keras_probes.probes.problem import Problem
from keras_probes.probes.solver import minimise
from keras_probes.probes.tasks import MultiLabel
from keras_probes.probes.tasks.task import MISSING, WRONG

L = 4


def rows(n=500, d=6, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, d)).astype("float32")
    y = (z @ rng.normal(size=(d, L)) + rng.logistic(size=(n, L)) > [0, 1, 2, -1]).astype("int32")
    return z, y


def sums_of(task, u, y, finite=None):
    ones = tf.ones((1, len(y))) if finite is None else tf.constant(finite[None], tf.float32)
    u = tf.constant(u[None], tf.float32)
    return task.named(task.batch_sums(u, tf.constant(y), tf.ones(len(y)), ones)[0].numpy()[0])


def test_it_is_one_logistic_regression_for_each_label():
    z, y = rows()
    problem = Problem(
        [(tf.constant(z[None]), tf.constant(y), tf.ones((1, len(y))))], 6, MultiLabel(L)
    )
    l2 = 1e-6  # ours pulls the bias too: with so little, that makes no difference
    fit = minimise(problem, l2, tol=1e-12)
    # The mean is over labels: each has a share 1 / L of it, the penalty is whole.
    theirs = LogisticRegression(C=1 / (l2 * L * len(y)), tol=1e-10, max_iter=10_000)
    theirs = OneVsRestClassifier(theirs).fit(z, y)
    kernel = np.concatenate([each.coef_ for each in theirs.estimators_]).T
    bias = np.concatenate([each.intercept_ for each in theirs.estimators_])
    np.testing.assert_allclose(fit.weights[0, :-1], kernel, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(fit.weights[0, -1], bias, rtol=2e-3, atol=2e-4)


def test_a_missing_label_leaves_out_that_answer_alone():
    z, y = rows()
    some = np.where(np.random.default_rng(1).uniform(size=y.shape) < 0.3, MISSING, y)
    problem = Problem(
        [(tf.constant(z[None]), tf.constant(some), tf.ones((1, len(y))))], 6, MultiLabel(L)
    )
    fit = minimise(problem, 1e-6, tol=1e-12)
    for label in range(L):
        known = some[:, label] >= 0
        theirs = LogisticRegression(C=1 / (1e-6 * (some >= 0).sum()), tol=1e-10, max_iter=10_000)
        theirs.fit(z[known], y[known, label])
        np.testing.assert_allclose(
            fit.weights[0, :-1, label], theirs.coef_[0], rtol=2e-3, atol=2e-4
        )


def test_measures_are_scikit_learns():
    z, y = rows(2000)
    u = z @ np.random.default_rng(3).normal(size=(6, L)) * 2
    task = MultiLabel(L).measuring(["mean_average_precision"])
    sums = sums_of(task, u, y)
    assert task.measure("error", sums) == pytest.approx(np.mean((u > 0) != y))
    p = 1 / (1 + np.exp(-u))
    expected = np.mean([log_loss(y[:, k], p[:, k]) for k in range(L)])
    assert task.measure("loss", sums) == pytest.approx(expected, rel=1e-5)
    precision = average_precision_score(y, u, average="macro")
    assert task.measure("mean_average_precision", sums) == pytest.approx(precision, abs=2e-3)
    area = roc_auc_score(y, u, average="macro")
    assert task.measure("auroc", sums) == pytest.approx(area, abs=2e-3)


def test_average_precision_of_ties_and_of_labels_that_are_never_there():
    task = MultiLabel(3).measuring(["mean_average_precision"])
    u = np.array([[3, 0, 1], [2, 0, 1], [2, 0, 1], [-1, 0, 1]], "float32")
    y = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], "int32")
    expected = np.mean([average_precision_score(y[:, k], u[:, k]) for k in (0, 1)])
    sums = sums_of(task, u, y)
    assert task.measure("mean_average_precision", sums) == pytest.approx(expected)
    without = sums_of(task, u, np.zeros_like(y))
    assert math.isnan(task.measure("mean_average_precision", without))


def test_guesses():
    _, y = rows(1000)
    known, counts = (MultiLabel(L).tally(tf.constant(part), tf.ones((1, len(part)))).numpy()[0]
                     for part in np.split(y, [600]))  # fmt: skip
    train, test = np.split(y, [600])
    majority = train.mean(axis=0) > 0.5
    task = MultiLabel(L)
    assert task.guesses("error", known, counts) == pytest.approx((np.mean(test != majority), 0.5))
    p = np.broadcast_to(train.mean(axis=0), test.shape)
    expected = np.mean([log_loss(test[:, k], p[:, k]) for k in range(L)])
    assert task.guesses("loss", known, counts) == pytest.approx((expected, math.log(2)))
    share = test.mean(axis=0).mean()
    assert task.guesses("mean_average_precision", known, counts)[0] == pytest.approx(share)


def test_labels_in_the_forms_people_have():
    task = MultiLabel(2)
    for raw in (np.array([[True, False]]), np.array([[1, 0]], "uint8"), np.array([[1.0, 0.0]])):
        np.testing.assert_array_equal(task.labels(tf.constant(raw)), [[1, 0]])
    odd = tf.constant([[np.nan, 1.0], [-1.0, -1.0], [0.3, 1.0]])
    np.testing.assert_array_equal(task.labels(odd), [[MISSING, 1], [MISSING, MISSING], [WRONG, 1]])
    np.testing.assert_array_equal(task.state(task.labels(odd)), [0, MISSING, WRONG])
    assert "probabilities" in task.expected(odd.numpy())[1]


def test_what_can_not_be_learned():
    task = MultiLabel(2)
    assert "no 1 in any column" in task.untrainable(np.array([5.0, 3.0, 0.0, 0.0]))
    assert not task.untrainable(np.array([5.0, 3.0, 0.0, 2.0]))
    assert "no 1 in columns 0 of 2" in task.lacking(np.array([5.0, 3.0, 0.0, 2.0]))
    assert not task.lacking(np.array([5.0, 0.0, 1.0, 5.0]))
