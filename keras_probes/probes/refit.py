"""The refit at an epoch's end: probes that trained online are taken to their optimum on a sample.

In: standardised features of a host that stands still, labels, and the probes. Out: the probes that
minimise

    mean cross-entropy + l2/2 (kept |w|^2 + NEAR (1 - kept) |w - v|^2)

where w is W and b, v what they were, and `kept` the share of the epoch's examples that are in the
sample: what the others have taught a probe stays, and where all are in it, they alone decide. The
penalty is chosen as `fit_probes` chooses it, by an eighth of the sample that is drawn by seed, and
without v, since v was trained on that eighth too.

`benchmarks/tracking.py` shows how near that comes to the optimum on all examples, and
`benchmarks/fit_cost.py` what it costs.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from keras_probes.probes.path import PENALTIES, choose_penalty
from keras_probes.probes.solver import RANK, Problem, fit_softmax, objective

TOL = 1e-2  # nats: what a loss on 1,000 examples is known to
SEARCH_TOL = 2e-2  # the same while penalties are compared
HELD_OUT = 8  # one example in so many chooses the penalty
NEAR = 10.0  # how much more than 0 an earlier probe says of where the optimum is
GAIN = 5e-3  # nats on the eighth that another penalty has to bring; less is luck
FIRST_PENALTY = 8  # place in the row where the first search begins
FIRST_STEP = 2  # places at a time in the first search

# What reading a feature costs in a pass, in multiplications: a pass over few classes waits for
# memory.
READ_COST = 24


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


def pass_cost(n_features: int, num_classes: int) -> int:
    """What a pass of the solver costs for one example and one probe, in multiplications."""
    return n_features * (2 * num_classes + READ_COST)


def sketch_cost(n_features: int) -> int:
    """What the solver's preconditioner costs for one example and one tap, likewise."""
    return 2 * n_features * min(n_features, RANK)


def refit(
    z: tf.Tensor,
    labels: tf.Tensor,
    weights: tf.Tensor,
    start: np.ndarray,
    l2: np.ndarray,
    *,
    kept: float,
    passes: int,
    epoch: int,
) -> Refit:
    """Takes T probes of one width to their optimum.

    Args:
        z: Standardised features, float32, shape (T, n, d), n at least 2.
        labels: int32, shape (n,).
        weights: float32, shape (T, n), not all 0; 0 for examples that do not count.
        start: W over b, shape (T, d + 1, K).
        l2: The penalties that the last refit chose, shape (T,); 0 in the first.
        kept: Share of the epoch's examples that are in the sample, above 0 to 1.
        passes: About how many passes over the sample to take.
        epoch: Number of the epoch: which penalties are looked at, and by which examples.

    Returns:
        The `Refit`.
    """
    taps, n, features = z.shape
    shape = taps, features, start.shape[2]
    order = np.random.default_rng(epoch).permutation(n)
    apart = np.split(order, [max(1, n // HELD_OUT)])
    whole = Problem([(z, labels, weights)], shape)
    held, others = (
        Problem(
            [(tf.gather(z, at, axis=1), tf.gather(labels, at), tf.gather(weights, at, axis=1))],
            shape,
            whole.basis,
        )
        for at in map(np.sort, apart)
    )
    known = bool(np.all(l2 > 0))
    begin = np.full(taps, FIRST_PENALTY)
    if known:
        begin = np.abs(np.log(PENALTIES[:, None] / l2)).argmin(axis=0)
    places, found = choose_penalty(
        others,
        lambda tried: held.losses(tried)[0],
        PENALTIES,
        begin,
        start=start,
        tol=SEARCH_TOL,
        max_passes=passes // 2,
        # A penalty moves slowly: one neighbour is looked at in an epoch, by turns.
        step=(-1) ** epoch if known else FIRST_STEP,
        both=not known,
        gain=GAIN if known else 0.0,
    )
    chosen, others_say = PENALTIES[places], NEAR * (1.0 - kept)
    l2, share = chosen * (kept + others_say), others_say / (kept + others_say)
    before = objective(whole, start, l2, near=start, share=share)
    fit = fit_softmax(
        whole, l2, start=found, near=start, share=share, tol=TOL,
        max_passes=max(passes - others.passes, 2),
    )  # fmt: skip
    return Refit(fit.weights, chosen, before - fit.lower, fit.certificate)
