"""One class for each example, against scikit-learn, finite differences and NumPy."""

import math

import numpy as np
import pytest
import tensorflow as tf
from sklearn.dummy import DummyClassifier
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    jaccard_score,
    log_loss,
    roc_auc_score,
    top_k_accuracy_score,
)

from keras_probes.probes.tasks import Classification, classification
from keras_probes.probes.tasks.classification import by_class
from keras_probes.probes.tasks.task import CODE_LENGTH

TASK = Classification(8)


def counts(labels, classes=8):
    return np.bincount(labels, minlength=classes)


def test_guesses_are_those_of_scikit_learns_dummy():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(8))
    train, measured = rng.choice(8, 500, p=p), rng.choice(8, 200, p=p)
    train[:8] = np.arange(8)
    guess = DummyClassifier(strategy="prior").fit(np.zeros((500, 1)), train)
    proba = guess.predict_proba(np.zeros((200, 1)))
    top5 = top_k_accuracy_score(measured, proba, k=5, labels=np.arange(8))
    loss = log_loss(measured, proba, labels=np.arange(8))
    expected = {
        "error": (np.mean(proba.argmax(1) != measured), 7 / 8),
        "top5_error": (1 - top5, 3 / 8),
        "loss": (loss, np.log(8)),
        CODE_LENGTH: (loss / np.log(2), 3.0),
    }
    for metric, values in expected.items():
        assert TASK.guesses(metric, counts(train), counts(measured)) == pytest.approx(values)


@pytest.mark.parametrize("metric", TASK.metrics)
def test_where_nothing_is_known(metric):
    some, none = counts([0, 1, 1]), counts([])
    for known, measured in ((none, some), (some, none)):
        assert all(math.isnan(guess) for guess in TASK.guesses(metric, known, measured))


def test_a_class_that_training_never_showed():
    assert TASK.guesses("error", counts([0, 0, 1]), counts([2, 0]))[0] == 0.5
    assert TASK.guesses("loss", counts([0, 0, 1]), counts([2, 0]))[0] == math.inf
    assert TASK.guesses("loss", counts([0, 1]), counts([0]))[0] == pytest.approx(math.log(2))


def test_the_code_length_is_the_loss_in_bits():
    sums = {"weight": 4.0, "weighted_loss": 4 * math.log(8)}
    assert TASK.measure(CODE_LENGTH, sums) == pytest.approx(3)


def sums_of(task, u, y, finite=None):
    ones = tf.ones((1, len(y))) if finite is None else tf.constant(finite[None], tf.float32)
    labels = tf.constant(y, tf.int32)
    sums, errors = task.batch_sums(tf.constant(u[None], tf.float32), labels, tf.ones(len(y)), ones)
    return task.named(sums.numpy()[0]), errors.numpy()[0]


@pytest.mark.parametrize("most_confused", [100, 3])
def test_measures_by_class_are_scikit_learns(most_confused, monkeypatch):
    monkeypatch.setattr(classification, "MOST_CONFUSED", most_confused)
    rng = np.random.default_rng(0)
    y = rng.choice(6, 800, p=[0.4, 0.3, 0.2, 0.06, 0.04, 0.0])
    u = np.eye(6)[y] + rng.normal(size=(800, 6))
    u[:, 5] -= 9  # neither said nor there
    answers = u.argmax(axis=1)
    task = Classification(6).measuring(["balanced_error"])
    sums, errors = sums_of(task, u, np.append(y, [-1])[:800], np.ones(800))
    np.testing.assert_array_equal(errors, answers != y)
    expected = 1 - balanced_accuracy_score(y, answers)
    assert task.measure("balanced_error", sums) == pytest.approx(expected)
    expected = jaccard_score(y, answers, average="macro")
    assert task.measure("mean_iou", sums) == pytest.approx(expected)
    labelled, right, answered = by_class(sums)
    np.testing.assert_array_equal(labelled, np.bincount(y, minlength=6))
    np.testing.assert_array_equal(right, np.bincount(y[answers == y], minlength=6))
    np.testing.assert_array_equal(answered, np.bincount(answers, minlength=6))
    if most_confused == 100:
        expected = confusion_matrix(y, answers, labels=np.arange(6))
        np.testing.assert_array_equal(sums["confusion"], expected)


def test_examples_without_a_label_or_finite_features_are_in_no_class():
    y, finite = np.array([0, -1, 1, 2]), np.array([1.0, 1.0, 0.0, 1.0])
    sums, _ = sums_of(Classification(3).for_evaluation(), np.eye(3)[[0, 1, 1, 0]], y, finite)
    np.testing.assert_array_equal(sums["confusion"], [[1, 0, 0], [0, 0, 0], [1, 0, 0]])


def test_the_area_under_the_roc_curve_is_scikit_learns():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 1000)
    u = np.stack([rng.normal(size=1000), rng.normal(size=1000) + y], axis=1)
    task = Classification(2).measuring(["auroc"])
    sums, _ = sums_of(task, u, y)
    expected = roc_auc_score(y, u[:, 1] - u[:, 0])
    assert task.measure("auroc", sums) == pytest.approx(expected, abs=2e-3)
    level, _ = sums_of(task, np.zeros_like(u), y)
    assert task.measure("auroc", level) == 0.5
    one, _ = sums_of(task, u, np.zeros(1000, int))
    assert math.isnan(task.measure("auroc", one))
    assert "auroc" not in Classification(3).measurable


def test_guesses_by_class():
    known, counts_ = counts([0, 0, 1], 3), counts([0, 0, 1, 2], 3)
    task = Classification(3)
    assert task.guesses("balanced_error", known, counts_) == pytest.approx((2 / 3, 2 / 3))
    assert task.guesses("mean_iou", known, counts_)[0] == pytest.approx(2 / 4 / 3)
