"""The solver, against scikit-learn, finite differences and Newton's method in float64."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from keras_probes.probes.path import PENALTIES
from keras_probes.probes.problem import Problem
from keras_probes.probes.solver import minimise
from keras_probes.probes.tasks import Classification

CLASSES = 4


def rows(seed=0, n=300, d=6, scale=1.5):
    """Standardised features, and labels that depend on them, no class absent."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    z = (z - z.mean(0)) / z.std(0)
    noisy = z @ rng.normal(size=(d, CLASSES)) * scale + rng.gumbel(size=(n, CLASSES))
    labels = noisy.argmax(axis=1)
    labels[:CLASSES] = np.arange(CLASSES)
    return z.astype("float32"), labels, np.ones(n, "float32")


def halves():
    """Two draws of examples of one kind."""
    return zip(*(np.split(part, 2) for part in rows(n=600)), strict=True)


class Rows:
    """Blocks of examples; one probe for each row of weights."""

    def __init__(self, z, labels, weights, size=128):
        self.z, self.labels, self.size = z, labels, size
        self.weights = np.atleast_2d(weights)

    def __iter__(self):
        for at in range(0, len(self.z), self.size):
            here = slice(at, at + self.size)
            z = np.broadcast_to(self.z[here], (len(self.weights), *self.z[here].shape))
            yield (tf.constant(z), tf.constant(self.labels[here], tf.int32),
                   tf.constant(self.weights[:, here]))  # fmt: skip


def problem(z, labels, weights, size=128):
    return Problem(Rows(z, labels, weights, size), z.shape[1], Classification(CLASSES))


def prior(labels, weights):
    """The log frequencies of the classes, with half an example more of each."""
    counts = np.bincount(labels, weights, CLASSES) + 0.5
    return np.log(counts / counts.sum())


def centre_of(z, labels, weights):
    return np.vstack([np.zeros((z.shape[1], CLASSES)), prior(labels, weights)])


def stands_for(z, weights, near, l2):
    """H + l2 at an earlier probe, (d + 1) K square: each class its curvature times Z'SZ / S."""
    s = weights.astype("float64") / weights.sum(dtype="float64")
    p = softmax(z.astype("float64") @ near[:-1] + near[-1], axis=1)
    theta = s @ (p * (1 - p))
    second = np.eye(z.shape[1] + 1)
    second[:-1, :-1] = z.T.astype("float64") @ (s[:, None] * z)
    return np.kron(second, np.diag(theta)) + l2 * np.eye(near.size)


def objective(z, labels, weights, w, l2, near=None, trust=0.0):
    """F of W over b."""
    u = z.astype("float64") @ w[:-1] + w[-1]
    losses = logsumexp(u, axis=1) - u[np.arange(len(z)), labels]
    away = w - centre_of(z, labels, weights)
    value = np.average(losses, weights=weights) + l2 / 2 * np.sum(away**2)
    if near is not None:
        far = (w - near).ravel()
        value += trust / 2 * far @ stands_for(z, weights, near, l2) @ far
    return value


def newton(z, labels, weights, l2, near=None, trust=0.0):
    """The optimum of F by Newton's method on all (d + 1) K coefficients, in float64."""
    n, d = z.shape
    x = np.hstack([z.astype("float64"), np.ones((n, 1))])
    s = weights.astype("float64") / weights.sum(dtype="float64")
    centre, penalty = centre_of(z, labels, weights).ravel(), l2 * np.eye((d + 1) * CLASSES)
    w = np.zeros((d + 1) * CLASSES)
    pull = 0 * penalty if near is None else trust * stands_for(z, weights, near, l2)
    value = np.inf

    def of(w):
        return objective(z, labels, weights, w.reshape(-1, CLASSES), l2, near, trust)

    for _ in range(200):
        p = softmax(x @ w.reshape(d + 1, CLASSES), axis=1)
        gradient = (x.T @ (s[:, None] * (p - np.eye(CLASSES)[labels]))).ravel()
        gradient += penalty @ (w - centre) + pull @ (w - (0 if near is None else near.ravel()))
        curvature = np.einsum("i,ik,kl->ikl", s, p, np.eye(CLASSES))
        curvature -= np.einsum("i,ik,il->ikl", s, p, p)
        hessian = np.einsum("ia,ikl,ib->akbl", x, curvature, x).reshape(len(w), -1)
        step = np.linalg.solve(hessian + penalty + pull, gradient)
        rate, value = 1.0, of(w)
        while of(w - rate * step) > value and rate > 1e-9:
            rate /= 2
        w = w - rate * step
        if np.linalg.norm(gradient) < 1e-14 or rate <= 1e-9:
            break
    return min(value, of(w))


def test_gradient_and_curvature_by_finite_differences():
    z, labels, weights = rows(n=50)
    weights = np.random.default_rng(1).uniform(0.1, 2, len(z)).astype("float32")
    given = problem(z, labels, weights)
    rng = np.random.default_rng(2)
    at, direction = rng.normal(size=(2, 1, z.shape[1] + 1, CLASSES))
    _, gradient, curvature = given.losses(at, "float64")
    h = 1e-5
    up, down = (given.losses(at + h * sign * direction, "float64")[0] for sign in (1, -1))
    assert np.sum(gradient * direction) == pytest.approx((up - down)[0] / (2 * h), rel=1e-7)
    for label in range(CLASSES):
        bias = np.zeros_like(at)
        bias[0, -1, label] = h
        up, down = (given.losses(at + sign * bias, "float64")[1] for sign in (1, -1))
        assert curvature[0, label] == pytest.approx((up - down)[0, -1, label] / (2 * h), rel=1e-6)


def test_objective_is_the_one_written_down():
    (z, labels, weights), others = halves()
    near = minimise(problem(*others), 1e-2).weights
    for trust in (0.0, 0.3):
        given = problem(z, labels, weights)
        fit = minimise(given, 1e-2, near=near, trust=trust)
        expected = objective(z, labels, weights, fit.weights[0], 1e-2, near[0], trust)
        assert fit.objective[0] == pytest.approx(expected, rel=1e-6)
        of_near = objective(z, labels, weights, near[0], 1e-2)
        assert fit.began[0] == pytest.approx(of_near, rel=1e-6)


def test_a_weak_penalty_is_proven_at_the_end_of_a_path_too():
    """Features that nearly all vary together: averages of a first layer's channels."""
    z, labels, weights = rows()
    mixed = z[:, :3] @ np.random.default_rng(0).normal(size=(3, 12))
    z = (mixed * np.logspace(0, -4, 12) + mixed[:, :1]).astype("float32")
    given, start = problem(z, labels, weights), None
    for l2 in PENALTIES:
        start = minimise(given, l2, start=start, tol=1e-3, certify=False).weights
    fit = minimise(given, PENALTIES[-1], start=start, max_passes=3000)
    assert fit.certificate[0] <= 1e-6
    assert fit.converged[0]


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_same_probe_as_scikit_learn(l2):
    """Where classes are as frequent as each other, the bias is one more weight."""
    z, labels, weights = rows()
    order = np.argsort(labels, kind="stable")
    least = np.bincount(labels).min()
    balanced = np.concatenate([order[labels[order] == k][:least] for k in range(CLASSES)])
    z, labels, weights = z[balanced], labels[balanced], weights[balanced]
    fit = minimise(problem(z, labels, weights), l2, tol=1e-10)
    theirs = LogisticRegression(
        C=1 / (len(z) * l2), tol=1e-10, max_iter=10_000, fit_intercept=False
    )
    theirs.fit(np.hstack([z.astype("float64"), np.ones((len(z), 1))]), labels)
    ours = fit.weights[0] - fit.weights[0].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(ours, theirs.coef_.T, atol=3e-4)


def hard_cases():
    z, labels, weights = rows()
    rng = np.random.default_rng(3)
    yield "plain", z, labels, weights
    yield "weighted", z, labels, rng.exponential(size=len(z)).astype("float32")
    yield "weights of 0", z, labels, (np.arange(len(z)) % 3 > 0).astype("float32")
    yield "constant", np.hstack([z, np.zeros((len(z), 2), "float32")]), labels, weights
    yield "duplicate and collinear", np.hstack([z, z[:, :2], z[:, :1] - z[:, 1:2]]), labels, weights
    yield "fewer rows than features", *rows(5, n=12, d=20)
    yield "separable", *rows(6, n=40, d=12, scale=50.0)
    rare = labels.copy()
    rare[rare == 3] = 2
    rare[0] = 3
    yield "a class of one row", z, rare, weights


CASES = {name: case for name, *case in hard_cases()}


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("name", CASES)
def test_certificate_is_never_below_the_true_gap(name, l2):
    z, labels, weights = CASES[name]
    fit = minimise(problem(z, labels, weights), l2)
    gap = objective(z, labels, weights, fit.weights[0], l2) - newton(z, labels, weights, l2)
    assert fit.converged.all()
    assert gap - 1e-14 <= fit.certificate[0] <= 1e-6


@pytest.mark.parametrize("trust", [0.4, 3.0])
@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_an_earlier_probe_stands_in_for_other_examples(l2, trust):
    (z, labels, weights), others = halves()
    near = minimise(problem(*others), l2).weights
    fit = minimise(problem(z, labels, weights), l2, near=near, trust=trust)
    gap = objective(z, labels, weights, fit.weights[0], l2, near[0], trust)
    gap -= newton(z, labels, weights, l2, near[0], trust)
    assert fit.converged.all()
    assert -1e-6 < gap <= fit.certificate[0] + 1e-6  # H is of float32 here
    assert fit.certificate[0] <= 1e-6


def test_an_earlier_probe_of_other_features_stands_for_nothing():
    z, labels, weights = rows()
    near = np.random.default_rng(3).normal(size=(1, z.shape[1] + 1, CLASSES))
    fit = minimise(problem(z, labels, weights), 1e-2, near=near, trust=3.0)
    gap = objective(z, labels, weights, fit.weights[0], 1e-2) - newton(z, labels, weights, 1e-2)
    assert -1e-13 < gap <= fit.certificate[0] <= 1e-6


def test_how_much_an_earlier_probe_counts_is_of_each_probe_its_own():
    (z, labels, weights), others = halves()
    near = np.repeat(minimise(problem(*others), 1e-2).weights, 2, axis=0)
    block = np.stack([z, z]), labels.astype("int32"), np.stack([weights, weights])
    both = Problem([tuple(map(tf.constant, block))], z.shape[1], Classification(CLASSES))
    fit = minimise(both, 1e-2, near=near, trust=np.array([0.0, 2.0]), tol=1e-9)
    alone = minimise(problem(z, labels, weights), 1e-2, tol=1e-9)
    np.testing.assert_allclose(fit.weights[0], alone.weights[0], atol=1e-4)
    assert np.linalg.norm(fit.weights[1] - near[1]) < np.linalg.norm(fit.weights[0] - near[1]) / 2


def test_stopped_early_it_says_so_and_the_certificate_holds():
    z, labels, weights = CASES["plain"]
    optimum = newton(z, labels, weights, 1e-4)
    for passes in (1, 2, 4, 8):
        fit = minimise(problem(z, labels, weights), 1e-4, max_passes=passes)
        gap = objective(z, labels, weights, fit.weights[0], 1e-4) - optimum
        assert not fit.converged.any()
        assert fit.steps[0] < passes
        assert 1e-6 < gap <= fit.certificate[0]
        assert fit.lower[0] <= optimum


def test_examples_told_apart_are_certified_by_the_objective():
    """F is never below 0, and here it nearly is: no more steps are taken to prove it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 60)
    z = rng.normal(size=(60, 200)).astype("float32")
    told_apart = problem(z, labels, np.ones(60, "float32"))
    fit = minimise(told_apart, 1e-7, tol=1e-3)
    assert fit.converged.all()
    assert fit.certificate[0] <= (1 + 2e-7) * fit.objective[0] <= 1e-3
    assert told_apart.passes <= 2 * fit.steps[0] + 5
    early = minimise(told_apart, 1e-7, tol=1e-9, max_passes=4)
    assert not early.converged.any()
    assert early.certificate[0] <= (1 + 2e-7) * early.objective[0]


def test_a_tolerance_beyond_rounding_is_not_claimed():
    z, labels, weights = CASES["plain"]
    fit = minimise(problem(z, labels, weights), 1e-2, tol=1e-17)
    assert not fit.converged.any()
    assert fit.certificate[0] < 1e-9


def test_a_weight_is_a_number_of_copies():
    z, labels, weights = CASES["plain"]
    copies = np.random.default_rng(0).integers(1, 4, len(z))
    weighted = minimise(problem(z, labels, copies.astype("float32")), 1e-2, tol=1e-12)
    where = np.repeat(np.arange(len(z)), copies)
    copied = minimise(problem(z[where], labels[where], weights[where * 0]), 1e-2, tol=1e-12)
    np.testing.assert_allclose(weighted.weights, copied.weights, atol=1e-4)


def test_rotated_features_and_renamed_classes_give_the_same_probe():
    z, labels, weights = CASES["plain"]
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(z.shape[1],) * 2))[0]
    plain = minimise(problem(z, labels, weights), 1e-2, tol=1e-10)
    turned = problem((z @ turn).astype("float32"), (labels + 1) % CLASSES, weights)
    fit = minimise(turned, 1e-2, tol=1e-10)
    got, expected = fit.weights[0, :-1], plain.weights[0, :-1]
    np.testing.assert_allclose(turn @ np.roll(got, -1, axis=1), expected, atol=1e-3)


def test_more_features_than_the_sketch_has_directions(monkeypatch):
    z, labels, weights = CASES["plain"]
    exact = minimise(problem(z, labels, weights), 1e-2)
    monkeypatch.setattr("keras_probes.probes.problem.RANK", 3)
    sketched = minimise(problem(z, labels, weights), 1e-2)
    assert sketched.objective[0] == pytest.approx(exact.objective[0], abs=1e-6)
    assert sketched.converged.all()


def test_the_sketch_is_exact_where_it_has_all_directions():
    z, labels, weights = CASES["weighted"]
    basis = problem(z, labels, weights).basis
    vectors, variances = basis.vectors.numpy()[0], basis.variances[0, :, 0]
    expected = (z * weights[:, None]).T @ z / weights.sum()
    np.testing.assert_allclose(vectors * variances @ vectors.T, expected, atol=1e-4)
    np.testing.assert_allclose(basis.rest, 0.0, atol=1e-4)


def test_a_warm_start_takes_fewer_steps():
    z, labels, weights = CASES["plain"]
    given = problem(z, labels, weights)
    near = minimise(given, 2e-3, certify=False)
    warm, cold = minimise(given, 1e-3, start=near.weights), minimise(given, 1e-3)
    assert warm.steps[0] < cold.steps[0]
    assert warm.objective[0] == pytest.approx(cold.objective[0], abs=1e-6)


def test_side_by_side_as_each_by_itself():
    z, labels, weights = CASES["plain"]
    several = np.stack([weights, (np.arange(len(z)) % 3 > 0).astype("float32"), 2 * weights])
    l2 = np.array([1e-1, 1e-3, 1e-2])
    together = Problem(Rows(z, labels, several), z.shape[1], Classification(CLASSES))
    fit = minimise(together, l2, tol=1e-9)
    for place, (of_one, penalty) in enumerate(zip(several, l2, strict=True)):
        alone = minimise(problem(z, labels, of_one), penalty, tol=1e-9)
        np.testing.assert_allclose(fit.weights[place], alone.weights[0], atol=1e-2)
        assert fit.objective[place] == pytest.approx(alone.objective[0], abs=2e-9)
        assert fit.certificate[place] <= 1e-9


def test_only_those_that_are_to_move_do():
    z, labels, weights = CASES["plain"]
    together = Problem(
        Rows(z, labels, np.stack([weights, weights])), z.shape[1], Classification(CLASSES)
    )
    fit = minimise(together, 1e-2, only=np.array([False, True]))
    np.testing.assert_array_equal(fit.weights[0], together.guess()[0])
    assert fit.certificate[1] <= 1e-6 < fit.certificate[0]
