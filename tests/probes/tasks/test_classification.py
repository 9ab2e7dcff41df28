"""One class for each example, against scikit-learn, finite differences and NumPy."""

import math

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.metrics import log_loss, top_k_accuracy_score

from keras_probes.probes.tasks import Classification
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
