"""The search of the penalty: a walk along a row of penalties to the lowest loss on other examples.

In: what a penalty comes to, and where to begin. Out: the best penalty of each probe. Offline probes
begin at the strongest penalty, refitted ones at the one they had.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_probes.probes.problem import Problem
from keras_probes.probes.solver import minimise

# Half a decade apart. Features are standardised, so that one row serves every tap. Only few
# features that vary together have their best penalty near its end.
PENALTIES = np.logspace(0, -8, 17)

# Takes places in the row, shape (T,), and which of the probes to fit, shape (T,). Returns their
# losses on examples that they were not fitted to, shape (T,).
Trial = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Takes W over b, shape (T, d + 1, K). Returns their losses on examples apart, shape (T,).
HeldLoss = Callable[[np.ndarray], np.ndarray]


def walk(
    trial: Trial,
    start: np.ndarray,
    length: int,
    *,
    step: int = 1,
    patience: int = 1,
    both: bool = True,
    gain: float = 0.0,
) -> np.ndarray:
    """Walks downhill from where it starts, for T probes side by side.

    Args:
        trial: What a penalty comes to.
        start: Where to begin, places in the row, shape (T,).
        length: Number of penalties in the row.
        step: How many places to go at a time; negative towards the stronger penalties.
        patience: How many losses in a row may be higher than the one before.
        both: Whether to try the other direction where the first one finds nothing better.
        gain: By how much a loss has to be lower than that of the start to be taken for better.

    Returns:
        The place of the lowest loss, shape (T,).
    """
    best, at = start.copy(), start.copy()
    last = trial(at, np.ones(len(start), bool))
    lowest = last - gain
    for direction in (step, -step)[: 1 + both]:
        walking = best == start
        at, last = np.where(walking, start, at), np.where(walking, lowest + gain, last)
        rises = np.zeros(len(start), int)
        while True:
            following = at + direction
            walking &= (following >= 0) & (following < length) & (rises < patience)
            if not walking.any():
                break
            at = np.where(walking, following, at)
            losses = trial(at, walking)
            rises = np.where(losses > last, rises + walking, 0)
            best = np.where(walking & (losses < lowest), at, best)
            lowest = np.where(walking, np.minimum(losses, lowest), lowest)
            last = np.where(walking, losses, last)
    return best


def choose_penalty(
    folds: Sequence[tuple[Problem, HeldLoss]],
    penalties: np.ndarray,
    begin: np.ndarray,
    *,
    start: np.ndarray | None = None,
    tol: float,
    max_passes: int,
    each: int | None = None,
    **walking: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds each probe's best penalty, by examples that it is not fitted to.

    Args:
        folds: Of each, the examples to fit to, and the loss on others. The sum of losses counts.
        penalties: The row to choose from, from strong to weak.
        begin: Places in it to begin at, shape (T,).
        start: W over b to begin at.
        tol: How far a fit may be above its optimum, in nats.
        max_passes: Number of passes over the examples of a fold after which to try no more.
        each: Of these, how many a fit may take at most.
        **walking: As of `walk`.

    Returns:
        The places of the best penalties, shape (T,), and the probes with them, on average of folds.
    """
    latest = np.stack([problem.guess() if start is None else start for problem, _ in folds])
    best, lowest = latest.mean(axis=0), np.full(len(begin), np.inf)
    last = [problem.passes + max_passes for problem, _ in folds]

    def trial(places: np.ndarray, only: np.ndarray) -> np.ndarray:
        nonlocal best, lowest
        left = [most - problem.passes for most, (problem, _) in zip(last, folds, strict=True)]
        if min(left) <= 0 and np.isfinite(lowest).all():
            return np.full(len(places), np.inf)
        losses = np.zeros(len(places))
        for fold, (problem, held_loss) in enumerate(folds):
            latest[fold] = minimise(
                problem, penalties[places], start=latest[fold], tol=tol, certify=False,
                max_passes=max(min(left[fold], each or left[fold]), 1), only=only,
            ).weights  # fmt: skip
            losses += held_loss(latest[fold])
        better = only & (losses < lowest)
        best = np.where(better[:, None, None], latest.mean(axis=0), best)
        lowest = np.where(better, losses, lowest)
        return losses

    places = walk(trial, begin, len(penalties), **walking)
    return places, best
