"""Settling: a probe that trained online is taken to its optimum, on examples at hand.

In: standardised features of a host that stands still, labels, and the probe. Out: the probe that
minimises

    mean cross-entropy + l2/2 |W|^2 + near/2 |W - A|^2

with A the W it had, and the solver's certificate. While a host trains, its features move on under
the probe, and those of a training step are not those at inference; how far that has left the probe
behind, the difference tells. The second penalty keeps near A what the examples can't tell; the
first is that of a probe on all the host trains on, of which they may be a part. With n examples at
hand of N, d features, and a share s left of the log(num_classes) nats of a guess, they are

    l2 = p(N),    near = p(n),    p(n) = WIDE s^2 r min(1, r / CROWDED) / n,    r = d / n:

none to speak of where examples are many for so few features. There near is TOL / |A|^2 at least
(of an A whose logits vary by 1, if it is smaller), which costs about TOL, and without which no
certificate would be in reach. Where a probe comes out so much better or larger than it was that
its penalties would be less than half of these, it is settled again, with them. On other examples it
is taken to do worse by as many nats as it has parameters for each (Akaike 1974).

`benchmarks/tracking.py` shows what it comes to.
"""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from keras_probes.probes.solver import Problem, fit_softmax

WIDE = 30.0
CROWDED = 1 / 9  # features per example
TOL = 2e-3  # nats
MOST_STEPS = 50
STALE = 0.5  # of a penalty: below, one set by what the probe was is taken back
ENOUGH = 0.5  # examples per feature, at least


@dataclasses.dataclass(frozen=True)
class Settled:
    """A probe before and after.

    Attributes:
        kernel: W, float64, shape (n_features, num_classes).
        bias: b, float64, shape (num_classes,).
        before: Upper bound on how far the objective was above its optimum, in nats.
        after: The same of what is returned.
        l2, near: The penalties.
    """

    kernel: np.ndarray
    bias: np.ndarray
    before: float
    after: float
    l2: float
    near: float


def settle(
    z: tf.Tensor,
    labels: np.ndarray,
    weights: np.ndarray,
    kernel: np.ndarray,
    bias: np.ndarray,
    of: float,
) -> Settled | None:
    """Takes one probe to its optimum.

    Args:
        z: Standardised features, float32, shape (n, n_features).
        labels: int, shape (n,); an example with -1 is left out.
        weights: Of the examples, shape (n,).
        kernel: W, shape (n_features, num_classes).
        bias: b, shape (num_classes,).
        of: Number of examples the host trains on, N.

    Returns:
        The probe; `None` if the examples are too few for so many features, or of one class. What
        it says of classes that have no example stays as it was.
    """
    counts = (labels >= 0) & (weights > 0)
    seen = np.unique(labels[counts])
    if counts.sum() < ENOUGH * len(kernel) or len(seen) < 2:
        return None
    block = (
        z,
        tf.constant(np.searchsorted(seen, np.where(counts, labels, seen[0])), tf.int32),
        tf.constant(np.where(counts, weights, 0.0), tf.float32),
    )
    found = np.vstack([kernel, bias]).astype("float64")
    start = found[:, seen]
    problem = Problem(lambda: [block], len(kernel), len(seen))
    loss = problem.evaluate(start, l2=0.0).loss
    if loss <= TOL:  # and the optimum is not below 0
        return Settled(found[:-1], found[-1], loss, loss, 0.0, 0.0)
    guess, n, d = np.log(len(seen)), int(counts.sum()), len(kernel)
    # One worse than a guess is no probe to stay near.
    from_here = point = start if loss < guess else np.zeros_like(start)
    options: dict[str, Any] = {"tol": TOL, "max_iterations": MOST_STEPS}

    def penalties(share: float, size: float) -> tuple[float, float]:
        l2, near = (_penalty(share, d, number) for number in (max(n, of), n))
        return l2, max(near, TOL / size)

    share, size = min(loss / guess, 1.0), max(np.sum(from_here[:-1] ** 2), from_here[:-1].size)
    while True:
        l2, near = penalties(share, size)
        # Both penalties are one, around a point between 0 and A, but for a constant.
        problem.centre = from_here[:-1] * near / (l2 + near)
        fit = fit_softmax(problem, l2 + near, start=point, certify=False, **options)
        point = np.vstack([fit.kernel, fit.bias])
        loss = fit.objective - (l2 + near) / 2 * np.sum((fit.kernel - problem.centre) ** 2)
        left = min(share, (loss + d * (len(seen) - 1) / n) / guess)
        grown = max(size, np.sum(fit.kernel**2))
        if sum(penalties(left, grown)) > STALE * (l2 + near):
            break
        share, size = left, grown
    fit = fit_softmax(problem, l2 + near, start=point, **options)
    before = problem.evaluate(start, l2 + near).objective
    found[:-1, seen] = fit.kernel
    # A constant added to all of b changes nothing among the classes seen, but beside the others.
    found[-1, seen] = fit.bias + np.mean(found[-1, seen] - fit.bias)
    above = max(before - fit.objective, 0.0) + fit.certificate
    return Settled(found[:-1], found[-1], above, fit.certificate, l2, near)


def _penalty(share: float, n_features: int, n: float) -> float:
    """p(n) of the module's description."""
    r = n_features / n
    return WIDE * share**2 * r * min(1.0, r / CROWDED) / n
