"""The refit at an epoch's end: probes that trained online are taken to their optimum on a sample.

In: standardised features of a host that stands still, labels, and the probes. Out: the probes that
minimise

    mean loss + l2/2 |w - a|^2 + trust/2 (w - v)' (H + l2) (w - v)

where w is W and b, a and H are those of `solver`, v is what the probes were, and trust is `OTHERS`
times the share of the epoch's examples that are not in the sample: what these have taught a probe
stays, and where all are in it, they alone decide. The penalty is chosen as `fit_probes` chooses it,
by an eighth of the sample that is drawn by seed, and without v, since v was trained on that eighth
too. Where passes are not counted, small samples have it chosen by several eighths, each held out in
turn.

`benchmarks/tracking.py` shows how near that comes to the optimum on all examples, and
`benchmarks/fit_cost.py` what it costs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_probes.probes.path import PENALTIES, HeldLoss, choose_penalty
from keras_probes.probes.problem import RANK, Problem
from keras_probes.probes.solver import Fit, minimise
from keras_probes.probes.tasks.task import Task

TOL = 1e-2  # nats: what a loss on 1,000 examples is known to
# While penalties are compared, since a fit that stops early looks like a stronger one; and for
# narrow taps, whose passes cost little: averages of a first layer make two points of error of 1e-2.
FINE_TOL = 2e-3
HELD_OUT = 8  # one example in so many chooses the penalty
COMPARED = 1000  # examples choose it, of these eighths together, where passes are not counted
MOST_PASSES = 1000  # where they are not counted; few fits take a tenth of that
OTHERS = 3.0  # times what is in the sample: what earlier probes know of the rest, at most
GAIN = 5e-3  # nats on the eighth that another penalty has to bring; less is luck
SEARCH_EVERY = 4  # epochs: the best penalty moves slowly
TRIALS = 3  # penalties that are tried at least, however long their fits would take
FIRST_PENALTY = 8  # place in the row where the first search begins
FIRST_STEP = 2  # places at a time in the first search
FIRST_PASSES = 2.5  # times as many in the first refit: it comes from far away

NARROW = 64  # taps of fewer features are refitted as if they had so many: calls are what they cost

# What else takes time for a feature of an example, as the multiplications that take as long.
READ_COST = 90  # in a pass of the solver: over few classes it waits for memory
VECTOR_COST = 3000  # of a parameter in a pass: the solver's own vectors
PREPARE_COST = 500  # before the first: copies and statistics


@dataclasses.dataclass(frozen=True)
class Refit:
    """Probes after a refit, T of them.

    Attributes:
        weights: W over b, float64, shape (T, d + 1, K).
        l2: The penalties that were chosen, shape (T,).
        before: Upper bound on how far the objective was above its optimum, in nats, shape (T,).
        after: The same of what is returned.
    """

    weights: np.ndarray
    l2: np.ndarray
    before: np.ndarray
    after: np.ndarray


def pass_cost(n: int, n_features: int, num_classes: int) -> int:
    """What a pass of the solver over n examples costs for one probe, in multiplications."""
    features = max(n_features, NARROW)
    steps = VECTOR_COST * min(features, n) * num_classes
    return n * features * (2 * num_classes + READ_COST) + steps


def prepare_cost(n_features: int) -> int:
    """What comes before the first pass costs for one example and one tap, likewise."""
    return n_features * (2 * RANK + PREPARE_COST)


def refit(
    z: tf.Tensor,
    labels: tf.Tensor,
    weights: tf.Tensor,
    task: Task,
    start: np.ndarray,
    l2: np.ndarray,
    *,
    kept: float,
    passes: int | None,
    epoch: int,
    seed: int,
    together: int = 1,
    tol: float = TOL,
) -> Refit:
    """Takes T probes of one width to their optimum.

    Args:
        z: Standardised features, float32, shape (T, n, d), n at least 2.
        labels: As the task has them, shape (n, ...).
        weights: float32, shape (T, n), not all 0; 0 for examples that do not count.
        task: Of the labels.
        start: W over b, shape (T, d + 1, K).
        l2: The penalties that the last refit chose, shape (T,); 0 in the first.
        kept: Share of the epoch's examples that are in the sample, above 0 to 1.
        passes: About how many passes over the sample to take; half as many more after a search, and
            `FIRST_PASSES` times as many in the first refit. None for as many as it takes:
            penalties are then compared one by one, by up to `COMPARED` examples, always the same.
        epoch: Number of the epoch: when penalties are looked at, and by which examples.
        seed: Seed of these examples' draw.
        together: How many rows in a row are of one example, and are held out together.
        tol: How far above its optimum a probe may be, in nats; of narrow taps, and while penalties
            are compared, `FINE_TOL` at most.

    Returns:
        The `Refit`.
    """
    first, counted = bool(np.any(l2 == 0)), passes is not None
    if passes is None:
        passes = MOST_PASSES
    elif first:
        passes = int(FIRST_PASSES * passes)
    z, begin, back = _within_span(z, start)
    whole = Problem([(z, labels, weights)], z.shape[2], task)
    penalties, found = l2, begin
    if first or epoch % SEARCH_EVERY == 0:
        rows = np.arange(z.shape[1]).reshape(-1, together)
        rows = rows[np.any(weights.numpy()[:, rows], axis=(0, 2))]  # of examples that count
        draw = np.random.default_rng((seed, epoch if counted else 0))
        order = draw.permutation(len(rows))
        folds = _folds(rows[order], 1 if counted else COMPARED)
        penalties, found = _searched(
            whole, folds, begin, l2, max_passes=passes, tol=min(tol, FINE_TOL),
            each=math.ceil(passes / TRIALS) if counted else None,
            step=FIRST_STEP if first and counted else 1, gain=0.0 if first else GAIN,
        )  # fmt: skip
        if not counted:  # of a host that has not changed, probes stay what they are
            stays = np.isclose(penalties, l2, rtol=1e-3)[:, None, None]
            found = np.where(stays, begin, found)
    # The first probes there are come of a few steps, and stand for nothing.
    trust = np.where(l2 > 0, OTHERS * (1.0 - kept), 0.0)
    tol = min(tol, FINE_TOL) if z.shape[2] <= NARROW else tol
    fit = minimise(
        whole, penalties, start=found, near=begin, trust=trust, tol=tol,
        max_passes=max(passes - whole.passes, passes // 2),
    )  # fmt: skip
    weights_there, fallen = back(fit)
    return Refit(weights_there, penalties, fit.began - fit.lower + fallen, fit.certificate)


def _within_span(
    z: tf.Tensor, start: np.ndarray
) -> tuple[tf.Tensor, np.ndarray, Callable[[Fit], tuple[np.ndarray, np.ndarray]]]:
    """The same problem in as few features as there are examples, where these are fewer.

    Beside the span of z no example says anything of w. There F is l2/2 (|w|^2 + trust |w - v|^2),
    with its minimum at trust / (1 + trust) v.

    Args:
        z: Shape (T, n, d).
        start: W over b, shape (T, d + 1, K).

    Returns:
        Z and W over b in coordinates of the span, and what takes a fit there back: to its W over b,
        and to how much F falls beside the span, shape (T,).
    """
    if z.shape[1] >= z.shape[2]:
        return z, start, lambda fit: (fit.weights, np.zeros(len(start)))
    of_span, coordinates = tf.linalg.qr(tf.transpose(z, (0, 2, 1)))
    axes = of_span.numpy().astype("float64")
    within = axes.swapaxes(1, 2) @ start[:, :-1]
    beside = start[:, :-1] - axes @ within

    def back(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
        stays = (fit.trust / (1 + fit.trust))[:, None, None]
        kernel = axes @ fit.weights[:, :-1] + stays * beside
        fallen = fit.l2 / 2 / (1 + fit.trust) * np.sum(beside**2, axis=(1, 2))
        return np.concatenate([kernel, fit.weights[:, -1:]], axis=1), fallen

    begin = np.concatenate([within, start[:, -1:]], axis=1)
    return tf.transpose(coordinates, (0, 2, 1)), begin, back


def _folds(rows: np.ndarray, enough: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which rows to fit to and which to hold out: eighths in turn, until enough were held out.

    Args:
        rows: By example, in a random order, shape (examples, rows of each).
        enough: Number of examples.
    """
    eighths = np.array_split(rows, min(HELD_OUT, len(rows)))
    eighths = eighths[: math.ceil(enough / len(eighths[0]))]
    return [(np.setdiff1d(rows, held), np.sort(held.ravel())) for held in eighths]


def _searched(
    whole: Problem,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    start: np.ndarray,
    l2: np.ndarray,
    **searching: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The best penalties by examples held out, and the probes with them on the others.

    Args:
        whole: All examples.
        folds: Rows to fit to, and rows to hold out.
        start: W over b, shape (T, d + 1, K).
        l2: The penalties so far, shape (T,); 0 for none.
        **searching: As of `choose_penalty`.
    """
    parts = [tuple(map(whole.of_examples, fold)) for fold in folds]
    total = sum(held.total for _, held in parts)

    def share_of_loss(held: Problem) -> HeldLoss:
        share = np.divide(held.total, total, out=np.zeros_like(total), where=held.total > 0)
        return lambda tried: np.where(share > 0, share * held.losses(tried)[0], 0.0)

    begin = np.full(len(l2), FIRST_PENALTY)
    if np.all(l2 > 0):
        begin = np.abs(np.log(PENALTIES[:, None] / l2)).argmin(axis=0)
    places, found = choose_penalty(
        [(others, share_of_loss(held)) for others, held in parts], PENALTIES, begin, start=start,
        **searching,
    )  # fmt: skip
    whole.passes += max(others.passes for others, _ in parts)
    return PENALTIES[places], found
