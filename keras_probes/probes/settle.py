"""Settling: a probe that trained online is taken to its optimum, on examples at hand.

In: standardised features of a host that stands still, labels, and the probe. Out: the probe that
minimises

    mean cross-entropy + l2/2 |W|^2 + near/2 |W - A|^2

where A is the W it had, and the solver's certificate. While a host trains, its features move on
under the probe, and those of a training step are not those at inference; how far that has left the
probe behind, the difference tells. With n examples at hand, of the N that the host trains on,

    l2 = n/N penalty,    near = (1 - n/N) penalty:

what the others have taught the probe stays; where all are at hand, they alone decide. The penalty
is the one of a row of them, each half a decade from the next, that does best on every `FOLDS`-th
example, as `fit_probes` chooses it; the probe is then fitted to all. The row begins at

    s d / (n |A|^2)

with d features and a share s left of the log(num_classes) nats of a guess: weights as large as they
were (or, if that is more, of entries of 1), and examples that say the less the less of them is
explained. What the probe does in the end cannot tell it: seen again and again, examples of many
features are learned by heart, and the penalty would fade. It is TOL / |W|^2 at least, which costs
about TOL, and without which no certificate would be in reach.

Many classes need many examples, and each pass over these takes longer: `most_examples` says where
a probe is left to its optimizer.

`benchmarks/tracking.py` shows what it comes to, `benchmarks/settling.py` what it costs.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from keras_probes.probes.solver import Block, Problem, fit_softmax

TOL = 2e-3  # nats
MOST_STEPS = 100  # of the solver, at one penalty
FOLDS = 8  # one of them chooses the penalty
FACTOR = 10**0.5  # from a penalty to the next
ENOUGH = 0.5  # examples per feature, at least
FEW = 12  # examples per class, at least
MOST = 10_000  # examples; beyond, a probe of 1,000 features gains little
WORK = 1e9  # multiplications of a pass, of which it takes up to some hundred


@dataclasses.dataclass(frozen=True)
class Settled:
    """A probe before and after.

    Attributes:
        kernel: W, float64, shape (n_features, num_classes).
        bias: b, float64, shape (num_classes,).
        before: Upper bound on how far the objective was above its optimum, in nats.
        after: The same of what is returned.
        l2, near: The penalties, which add up to the one that was chosen.
    """

    kernel: np.ndarray
    bias: np.ndarray
    before: float
    after: float
    l2: float
    near: float


def most_examples(n_features: int, num_classes: int) -> int:
    """How many examples a probe is settled on at most; 0 if those are too few for it.

    A pass over n examples multiplies 2 n d K times for logits and gradient, and n K^2 times for the
    curvature. With 1,000 classes that is beyond what the end of an epoch should cost.
    """
    of_example = num_classes * (2 * n_features + num_classes)
    most = min(MOST, int(WORK // of_example))
    return most if most >= _fewest(n_features, num_classes) else 0


def enough(n: int, n_features: int, num_classes: int) -> bool:
    """Whether a probe is settled where there are n examples."""
    return _fewest(n_features, num_classes) <= min(n, most_examples(n_features, num_classes))


def _fewest(n_features: int, num_classes: int) -> float:
    return max(ENOUGH * n_features, FEW * num_classes)


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
        The probe; `None` if the examples are not `enough`, or of one class. What it says of
        classes that have no example stays as it was.
    """
    rows = np.flatnonzero((labels >= 0) & (weights > 0))
    most = most_examples(*kernel.shape)
    if len(rows) > most:
        rows = rows[np.linspace(0, len(rows) - 1, most).astype(int)]
    seen = np.unique(labels[rows])
    if not enough(len(rows), *kernel.shape) or len(seen) < 2:
        return None
    block = (
        tf.gather(z, rows),
        tf.constant(np.searchsorted(seen, labels[rows]), tf.int32),
        tf.constant(weights[rows], tf.float32),
    )
    found = np.vstack([kernel, bias]).astype("float64")
    start = found[:, seen]
    problem = Problem(lambda: [block], len(kernel), len(seen))
    loss = problem.evaluate(start, l2=0.0).loss
    if loss <= TOL:  # and the optimum is not below 0
        return Settled(found[:-1], found[-1], loss, loss, 0.0, 0.0)
    guess, n, d = np.log(len(seen)), len(rows), len(kernel)
    # One worse than a guess is no probe to stay near.
    from_here = start if loss < guess else np.zeros_like(start)
    size = max(np.sum(from_here[:-1] ** 2), from_here[:-1].size)  # or entries of 1
    known = 1.0 - n / max(n, of)
    problem.centre = known * from_here[:-1]
    first = max(min(loss / guess, 1.0) * d / n, TOL) / size
    penalty, point = _chosen(problem, block, first, from_here)
    fit = fit_softmax(problem, penalty, start=point, tol=TOL, max_iterations=MOST_STEPS)
    before = problem.evaluate(start, penalty).objective
    found[:-1, seen] = fit.kernel
    # A constant added to all of b changes nothing among the classes seen, but beside the others.
    found[-1, seen] = fit.bias + np.mean(found[-1, seen] - fit.bias)
    above = max(before - fit.objective, 0.0) + fit.certificate
    l2, near = (1.0 - known) * penalty, known * penalty
    return Settled(found[:-1], found[-1], above, fit.certificate, l2, near)


def _chosen(
    problem: Problem, block: Block, first: float, start: np.ndarray
) -> tuple[float, np.ndarray]:
    """The penalty that does best on some examples, and the probe it makes of the others."""
    apart = np.arange(len(block[0])) % FOLDS == 0
    others, held = (
        problem.of([tuple(tf.boolean_mask(part, rows) for part in block)])
        for rows in (~apart, apart)
    )

    def tried(penalty: float, start: np.ndarray) -> tuple[float, float, np.ndarray]:
        fit = fit_softmax(
            others, penalty, start=start, tol=TOL, max_iterations=MOST_STEPS, certify=False
        )
        point = np.vstack([fit.kernel, fit.bias])
        return held.evaluate(point, l2=0.0).loss, penalty, point

    best = begun = tried(first, start)
    for factor in (1 / FACTOR, FACTOR):
        following = best
        while best is following and best[1] * factor * np.sum(best[2][:-1] ** 2) > TOL:
            following = tried(best[1] * factor, best[2])
            best = min(best, following, key=lambda one: one[0])
        if best is not begun:
            break
    return best[1:]
