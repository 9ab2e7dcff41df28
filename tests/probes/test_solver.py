"""The solver, against scikit-learn, finite differences and Newton's method in float64."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from keras_probes.probes import solver
from keras_probes.probes.solver import Problem, fit_softmax

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


def problem(z, labels, weights, size=128):
    def blocks():
        for at in range(0, len(z), size):
            here = slice(at, at + size)
            yield (tf.constant(z[here]), tf.constant(labels[here], tf.int32),
                   tf.constant(weights[here]))  # fmt: skip

    return Problem(blocks, z.shape[1], CLASSES)


def objective(z, labels, weights, kernel, bias, l2, centre=0.0):
    u = z.astype("float64") @ kernel + bias
    losses = logsumexp(u, axis=1) - u[np.arange(len(z)), labels]
    return np.average(losses, weights=weights) + l2 / 2 * np.sum((kernel - centre) ** 2)


def newton(z, labels, weights, l2, centre=0.0):
    """The optimum of F by Newton's method on all (d + 1) K coefficients, in float64."""
    n, d = z.shape
    x = np.hstack([z.astype("float64"), np.ones((n, 1))])
    s = weights.astype("float64") / weights.sum(dtype="float64")
    penalty = np.repeat(np.r_[np.full(d, l2), 0.0], CLASSES)
    around = np.vstack([np.broadcast_to(centre, (d, CLASSES)), np.zeros(CLASSES)]).ravel()
    w = np.zeros((d + 1) * CLASSES)
    value = np.inf

    def of(w):
        return objective(z, labels, weights, *split(w, d), l2, centre)

    for _ in range(200):
        p = softmax(x @ w.reshape(d + 1, CLASSES), axis=1)
        gradient = (x.T @ (s[:, None] * (p - np.eye(CLASSES)[labels]))).ravel()
        gradient += penalty * (w - around)
        curvature = np.einsum("i,ik,kl->ikl", s, p, np.eye(CLASSES))
        curvature -= np.einsum("i,ik,il->ikl", s, p, p)
        hessian = np.einsum("ia,ikl,ib->akbl", x, curvature, x).reshape(len(w), -1)
        step = np.linalg.lstsq(hessian + np.diag(penalty), gradient, rcond=1e-14)[0]
        rate, value = 1.0, of(w)
        while of(w - rate * step) > value and rate > 1e-9:
            rate /= 2
        w = w - rate * step
        if np.linalg.norm(gradient) < 1e-14 or rate <= 1e-9:
            break
    return min(value, of(w))


def split(w, d):
    w = w.reshape(d + 1, CLASSES)
    return w[:-1], w[-1]


def test_gradient_by_finite_differences():
    z, labels, weights = rows(n=50)
    weights = np.random.default_rng(1).uniform(0.1, 2, len(z)).astype("float32")
    given = problem(z, labels, weights)
    rng = np.random.default_rng(2)
    given.centre = rng.normal(size=given.centre.shape)
    at, direction = rng.normal(size=(2, z.shape[1] + 1, CLASSES))
    gradient = given.evaluate(at, 0.1, "float64").gradient
    up, down = (given.evaluate(at + h * direction, 0.1, "float64").objective for h in (1e-5, -1e-5))
    assert np.sum(gradient * direction) == pytest.approx((up - down) / 2e-5, rel=1e-7)


def test_objective_is_the_one_written_down():
    z, labels, weights = rows()
    fit = fit_softmax(problem(z, labels, weights), 1e-2)
    expected = objective(z, labels, weights, fit.kernel, fit.bias, 1e-2)
    assert fit.objective == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_same_probe_as_scikit_learn(l2):
    z, labels, weights = rows()
    fit = fit_softmax(problem(z, labels, weights), l2, tol=1e-10)
    theirs = LogisticRegression(C=1 / (len(z) * l2), tol=1e-10, max_iter=10_000)
    theirs.fit(z.astype("float64"), labels)
    np.testing.assert_allclose(fit.kernel, theirs.coef_.T, atol=3e-4)
    np.testing.assert_allclose(
        fit.bias - fit.bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=3e-4
    )


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
def test_certificate_is_never_below_the_true_gap_and_within_ten_times(name, l2):
    z, labels, weights = CASES[name]
    fit = fit_softmax(problem(z, labels, weights), l2)
    gap = objective(z, labels, weights, fit.kernel, fit.bias, l2) - newton(z, labels, weights, l2)
    assert fit.converged
    assert gap <= fit.certificate <= 1e-6
    # A gap of rounding size has no meaningful ratio.
    assert fit.certificate <= max(10 * gap, 1e-11)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_near_another_probe(l2):
    z, labels, weights = rows()
    given = problem(z, labels, weights)
    given.centre = np.random.default_rng(3).normal(size=given.centre.shape)
    fit = fit_softmax(given, l2)
    gap = objective(z, labels, weights, fit.kernel, fit.bias, l2, given.centre)
    gap -= newton(z, labels, weights, l2, given.centre)
    assert -1e-13 < gap <= fit.certificate <= 1e-6


@pytest.mark.parametrize("centred", [False, True])
def test_the_lower_bound_holds_wherever_it_is_taken(centred):
    z, labels, weights = CASES["weighted"]
    given, rng = problem(z, labels, weights), np.random.default_rng(0)
    if centred:
        given.centre = rng.normal(size=given.centre.shape)
    optimum = newton(z, labels, weights, 1e-2, given.centre)
    near = fit_softmax(given, 1e-2)
    best = np.vstack([near.kernel, near.bias])
    bounds = [
        given.lower_bound(
            given.evaluate(best + spread * rng.normal(size=best.shape), 1e-2, "float64")
        )
        for spread in (0.0, 1e-6, 1e-4, 1e-2, 1.0, 10.0)
    ]
    assert max(bounds) <= optimum + 1e-14
    assert bounds[0] > optimum - 1e-3  # and says something


def test_stopped_early_it_says_so_and_the_certificate_holds():
    z, labels, weights = CASES["plain"]
    fit = fit_softmax(problem(z, labels, weights), 1e-4, max_iterations=2)
    gap = objective(z, labels, weights, fit.kernel, fit.bias, 1e-4)
    gap -= newton(z, labels, weights, 1e-4)
    assert not fit.converged
    assert fit.iterations == 2
    assert 1e-6 < gap <= fit.certificate


def test_examples_told_apart_are_certified_by_the_objective():
    """F is never below 0, and here it nearly is: no more steps are taken to prove it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 60)
    z = rng.normal(size=(60, 200)).astype("float32")
    told_apart = problem(z, labels, np.ones(60, "float32"))
    fit = fit_softmax(told_apart, 1e-7, tol=1e-3)
    assert fit.converged
    assert fit.certificate <= (1 + 1e-9) * fit.objective <= 1e-3
    assert told_apart.passes <= 2 * fit.iterations + 5
    early = fit_softmax(told_apart, 1e-7, tol=1e-9, max_iterations=3)
    assert not early.converged
    assert early.certificate <= (1 + 1e-9) * early.objective


def test_a_tolerance_beyond_rounding_is_not_claimed():
    z, labels, weights = CASES["plain"]
    fit = fit_softmax(problem(z, labels, weights), 1e-2, tol=1e-17)
    assert not fit.converged
    assert fit.certificate < 1e-9


def test_a_weight_is_a_number_of_copies():
    z, labels, weights = CASES["plain"]
    copies = np.random.default_rng(0).integers(1, 4, len(z))
    weighted = fit_softmax(problem(z, labels, copies.astype("float32")), 1e-2, tol=1e-11)
    where = np.repeat(np.arange(len(z)), copies)
    copied = fit_softmax(problem(z[where], labels[where], weights[where * 0]), 1e-2, tol=1e-11)
    np.testing.assert_allclose(weighted.kernel, copied.kernel, atol=1e-4)


def test_rotated_features_and_renamed_classes_give_the_same_probe():
    z, labels, weights = CASES["plain"]
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(z.shape[1],) * 2))[0]
    plain = fit_softmax(problem(z, labels, weights), 1e-2, tol=1e-10)
    turned = problem((z @ turn).astype("float32"), (labels + 1) % CLASSES, weights)
    fit = fit_softmax(turned, 1e-2, tol=1e-10)
    np.testing.assert_allclose(turn @ np.roll(fit.kernel, -1, axis=1), plain.kernel, atol=1e-3)


def test_more_features_than_an_eigenbasis_is_found_for(monkeypatch):
    z, labels, weights = CASES["plain"]
    with_basis = fit_softmax(problem(z, labels, weights), 1e-2)
    monkeypatch.setattr(solver, "EIGENBASIS_UP_TO", 3)
    without = fit_softmax(problem(z, labels, weights), 1e-2)
    assert without.objective == pytest.approx(with_basis.objective, abs=1e-6)
    assert without.converged


def test_a_warm_start_takes_fewer_steps():
    z, labels, weights = CASES["plain"]
    given = problem(z, labels, weights)
    near = fit_softmax(given, 2e-3, certify=False)
    start = np.vstack([near.kernel, near.bias])
    warm, cold = fit_softmax(given, 1e-3, start=start), fit_softmax(given, 1e-3)
    assert warm.iterations < cold.iterations
    assert warm.objective == pytest.approx(cold.objective, abs=1e-6)
