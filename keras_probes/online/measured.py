"""What probes measured in an epoch or an evaluation, as a value, and the rows it comes to.

In: sums, and the host's own logs. Out: `Row`s.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_probes.probes.measures import CODE_LENGTH, guesses, measure
from keras_probes.probes.probe_set import Sums
from keras_probes.results.schema import Refit, Row

# What Keras calls the share of examples that a model gets right.
_ACCURACIES = ("accuracy", "acc", "sparse_categorical_accuracy", "categorical_accuracy")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the probes of a host measured in one pass over data.

    Attributes:
        step: Number of batches they had trained on by its end.
        first_pass: Whether it is of training, and they had seen no example before.
        sums: By target, tap and name.
        certificates: By target and tap, where they are known.
        known: By target, how often each class was among the labels they trained on.
        counts: By target, how often it was in this pass.
        refit: What became of the refit at its end; `None` if there was none.
    """

    step: int
    first_pass: bool
    sums: Sums
    certificates: Mapping[tuple[str | None, str], float]
    known: Mapping[str | None, np.ndarray]
    counts: Mapping[str | None, np.ndarray]
    refit: Refit | None = None


def rows_of(
    measured: Measured,
    epoch: int,
    split: str,
    metrics: Sequence[str],
    asked: Mapping[str | None, Any],
    of_host: Mapping[str, Any],
) -> Iterator[Row]:
    """What was measured in an epoch of training, or in an evaluation.

    Args:
        measured: The sums and what belongs to them.
        epoch: Epoch, from 0.
        split: `"train"`, `"validation"` or `"test"`.
        metrics: Which measures.
        asked: By name, the targets as the user gave them.
        of_host: The host's own logs.
    """
    code = (CODE_LENGTH,) if measured.first_pass else ()
    for target, by_tap in measured.sums.items():
        of_model = {"error": _host_error(of_host, asked.get(target, ()))}
        for metric in (*metrics, *code):
            majority, chance = guesses(metric, measured.known[target], measured.counts[target])
            for tap, row in by_tap.items():
                yield Row(
                    epoch=epoch,
                    step=measured.step,
                    split=split,
                    target=target,
                    tap=tap,
                    metric=metric,
                    value=measure(metric, row),
                    n=int(row["count"]),
                    nonfinite=int(row["nonfinite"]),
                    unlabelled=int(row["unlabelled"]),
                    certificate=measured.certificates.get((target, tap), math.nan),
                    majority=majority,
                    chance=chance,
                    host=of_model.get(metric, math.nan),
                )


def rows_of_batches(
    step: int, sums: Sums, before: Sums, epoch: int, metrics: Iterable[str]
) -> Iterator[Row]:
    """What was measured in training between two moments of an epoch.

    Args:
        step: Number of batches the probes had trained on at the second moment.
        sums: Theirs at that moment.
        before: At the first; empty at the beginning of the epoch.
        epoch: Epoch, from 0.
        metrics: Which measures.
    """
    for target, by_tap in sums.items():
        for tap, total in by_tap.items():
            was = before[target][tap] if before else {}
            new = {name: value - was.get(name, 0.0) for name, value in total.items()}
            for metric in metrics:
                value, n = measure(metric, new), int(new["count"])
                yield Row(epoch, step, "train", target, tap, metric, value, n)


def _host_error(logs: Mapping[str, Any], select: Any) -> float:
    """The host's own error by its accuracy in Keras's logs; NaN if it was not asked for that.

    Args:
        logs: The host's logs.
        select: The target: `None`, or the key of one of several outputs. For others, none is known.
    """
    if select is not None and not isinstance(select, str):
        return math.nan
    of_output = "" if select is None else f"{select}_"
    known = (logs[key] for name in _ACCURACIES if (key := of_output + name) in logs)
    return 1.0 - float(next(known, math.nan))
