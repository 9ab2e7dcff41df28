"""What is true of every task, and which one labels are taken for."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_probes.probes.problem import Problem
from keras_probes.probes.resolve import Evidence, resolve_targets
from keras_probes.probes.solver import minimise
from keras_probes.probes.tasks import TASKS, Classification, MultiLabel, Regression
from keras_probes.probes.tasks.task import MISSING, WEIGHTLESS, WRONG

N, D, K = 40, 5, 3
RNG = np.random.default_rng(0)
# By task: labels as data have them, one of them missing.
LABELS = {
    "classification": np.append(RNG.integers(0, K, N - 1), -1),
    "multilabel": np.where(RNG.uniform(size=(N, K)) < 0.1, -1, RNG.integers(0, 2, (N, K))),
    "regression": np.vstack([RNG.normal(size=(N - 1, K)), [[0.0, np.nan, 1.0]]]),
}
Z = RNG.normal(size=(2, N, D)).astype("float32")
WEIGHTS = RNG.uniform(0.5, 2, (2, N)).astype("float32")


@pytest.fixture(autouse=True)
def _fresh_rng():
    """Each test draws the same numbers, whichever ran before it."""
    global RNG
    RNG = np.random.default_rng(1)


@pytest.fixture(params=list(TASKS))
def task(request):
    return TASKS[request.param](K)


@pytest.fixture
def labels(task):
    return task.labels(tf.constant(LABELS[task.name].astype("float32")))


def test_labels_keep_their_form(task, labels):
    assert labels.dtype.name == task.label_dtype
    assert tuple(labels.shape) == (N, *task.label_shape)
    state = task.state(labels).numpy()
    if task.name != "multilabel":  # there, some labels of an example are missing
        assert state[-1] == MISSING
    assert np.count_nonzero(state == 0) >= N - 2
    for why in (MISSING, WRONG, WEIGHTLESS):
        marked = task.without(labels, tf.range(N) < 7, why)
        np.testing.assert_array_equal(task.state(marked)[:7], why)
        np.testing.assert_array_equal(task.state(marked)[7:], state[7:])


def test_derivatives_by_finite_differences(task, labels):
    u = RNG.normal(size=(2, K, N))
    _, first, second = (of.numpy() for of in task.losses(tf.constant(u), labels))
    residual = task.residual(tf.constant(u.swapaxes(1, 2)), labels).numpy()
    known = task.state(labels).numpy() == 0
    np.testing.assert_allclose(residual[:, known].swapaxes(1, 2), first[:, :, known], atol=1e-6)
    for k in range(K):
        step = np.zeros((1, K, 1))
        step[:, k] = 1e-4
        up, here, down = (task.losses(tf.constant(u + s), labels)[0].numpy()
                          for s in (step, 0 * step, -step))  # fmt: skip
        np.testing.assert_allclose((up - down)[:, known] / 2e-4, first[:, k, known], atol=1e-6)
        curvature = (up - 2 * here + down) / 1e-8
        np.testing.assert_allclose(curvature[:, known], second[:, k, known], atol=1e-5)


def test_the_certificate_holds_against_the_optimum_in_float64(task, labels):
    known = (task.state(labels).numpy() == 0).astype("float32")
    problem = Problem([(tf.constant(Z), labels, tf.constant(WEIGHTS * known))], D, task)
    exact = minimise(problem, 1e-2, tol=1e-13)
    assert exact.converged.all()
    for passes in (3, 8):
        fit = minimise(problem, 1e-2, max_passes=passes)
        assert np.all(fit.objective - exact.objective <= fit.certificate + 1e-12)
    # The objective is what it is said to be.
    w, centre = exact.weights, problem.guess()
    u = (Z.astype("float64") @ w[:, :-1] + w[:, -1:]).swapaxes(1, 2)
    losses = np.where(known, task.losses(tf.constant(u), labels)[0].numpy(), 0.0)
    weight = WEIGHTS * known
    terms = {"classification": known, "regression": K * known}.get(
        task.name, np.sum(LABELS["multilabel"] >= 0, axis=1)
    )
    mean = np.sum(weight * losses, axis=1) / np.sum(weight * terms, axis=1)
    penalty = 1e-2 / 2 * np.sum((w - centre) ** 2, axis=(1, 2))
    np.testing.assert_allclose(exact.objective, mean + penalty, rtol=1e-7)


def test_a_random_label_is_none_of_the_examples_features(task):
    keys = tf.constant(RNG.integers(0, 2**31 - 1, 4000))
    labels = task.random(keys).numpy()
    assert labels.shape == (4000, *task.label_shape)
    again = task.random(keys[100:200]).numpy()
    np.testing.assert_array_equal(labels[100:200], again)
    flat = labels.reshape(4000, -1).astype("float64")
    spread = np.corrcoef(flat.T) if flat.shape[1] > 1 else np.eye(1)
    assert np.all(np.abs(spread - np.eye(len(spread))) < 0.08)
    assert np.all(np.abs(flat.mean(axis=0) - {"classification": 1.0}.get(task.name, 0.5)) < 0.05)


def test_sums_add_up_and_have_names(task, labels):
    u = tf.constant(RNG.normal(size=(2, N, K)), tf.float32)
    finite = tf.constant(RNG.integers(0, 2, (2, N)), tf.float32)
    weights = tf.constant(WEIGHTS[0])
    whole = task.batch_sums(u, labels, weights, finite)[0].numpy()
    assert whole.shape == (2, task.size)
    parts = [
        task.batch_sums(u[:, at], labels[at], weights[at], finite[:, at])[0].numpy()
        for at in (slice(0, 17), slice(17, N))
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)
    named = task.named(whole[0])
    known = task.state(labels).numpy() == 0
    assert named["count"] == np.sum(finite.numpy()[0][known])
    assert named["nonfinite"] == np.sum(1 - finite.numpy()[0][known])
    assert named["unlabelled"] == N - known.sum()
    # The error is the mean of the examples' errors, or in proportion to it.
    every, errors = (of.numpy() for of in task.batch_sums(u, labels, weights, tf.ones((2, N))))
    values = [task.measure("error", task.named(row)) for row in every]
    of_examples = errors[:, known].mean(axis=1)
    # But where labels of an example are missing: there it is of answers, not of examples.
    assert values[0] / values[1] == pytest.approx(of_examples[0] / of_examples[1], rel=0.15)


SPEC = tf.TensorSpec
X = SPEC((None, 8), "float32")
ONE, FIVE = np.array([0.5, 1.5, 2.0]), np.array([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
BINARY, SPARSE = keras.losses.BinaryCrossentropy(), "sparse_categorical_crossentropy"


@pytest.mark.parametrize(
    ("loss", "columns", "y", "at_hand", "expected"),
    [
        (BINARY, 5, (None, 5), None, MultiLabel(5, 0.5)),
        (keras.losses.BinaryFocalCrossentropy(from_logits=True), 5, (None, 5), None,
         MultiLabel(5, 0.0)),
        (None, None, (None, 5), FIVE, MultiLabel(5)),
        (BINARY, 1, (None,), np.array([0, 1, 1]), Classification(2)),
        (BINARY, 1, (None, 1), None, Classification(2)),
        ("categorical_crossentropy", 5, (None, 5), None, Classification(5)),
        ("mse", 1, (None,), None, Regression(1)),
        ("mse", 1, (None, 1), np.array([[3], [7], [1]]), Regression(1)),
        ("mean_absolute_error", 5, (None, 5), None, Regression(5)),
        (keras.losses.Huber(), 1, (None,), ONE, Regression(1)),
        (None, None, (None,), ONE, Regression(1)),
        (None, None, (None, 2), np.array([[0.5, 3.0], [1.0, 1.0]]), Regression(2)),
        ("mse", 3, (None, 3), np.eye(3), Classification(3)),
        (None, None, (None,), np.array([0, 1, 2]), Classification(3)),
        (None, None, (None, 3), np.eye(3) * 0.9 + 0.1 / 3, Classification(3)),
        (SPARSE, 10, (None,), None, Classification(10)),
    ],
)  # fmt: skip
def test_the_task_is_told_by_labels_output_and_loss(loss, columns, y, at_hand, expected):
    outputs = SPEC((None, columns), "float32") if columns else None
    evidence = Evidence(outputs, loss, [] if at_hand is None else [at_hand])
    (target,) = resolve_targets(None, None, X, SPEC(y, "float32"), evidence)
    assert target.task == expected


def test_what_is_asked_for_goes_first():
    y, evidence = SPEC((None, 5), "float32"), Evidence(SPEC((None, 5), "float32"), BINARY)
    (target,) = resolve_targets(None, None, X, y, evidence, task="regression")
    assert target.task == Regression(5)
    (target,) = resolve_targets(None, 5, X, y, evidence)
    assert target.task == Classification(5)
    named = {"a": None, "b": lambda x, y: y}
    tasks = {"a": "multilabel", "b": "regression"}
    found = resolve_targets(named, None, X, y, evidence, task=tasks)
    assert [type(target.task) for target in found] == [MultiLabel, Regression]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"at_hand": np.array([0.0, 1.0, 1.0])}, ["'classification', 'regression'", "task="]),
        ({"task": "multilabel", "y": SPEC((None, 4, 4), "float32")}, ["one at each position"]),
        ({"task": {"typo": "regression"}}, ["names of targets", "'typo'"]),
        ({"y": SPEC((None,), "string")}, ["to be numbers", "np.unique"]),
    ],
)
def test_labels_that_fit_no_task_or_two(options, parts):
    options = {"y": SPEC((None,), "float32"), "at_hand": None, "task": None, **options}
    at_hand = [] if options["at_hand"] is None else [options["at_hand"]]
    evidence = Evidence(SPEC((None, 1), "float32"), "mse", at_hand)
    with pytest.raises(ValueError, match=parts[0]) as raised:
        resolve_targets(None, None, X, options["y"], evidence, task=options["task"])
    assert parts[-1] in str(raised.value)
