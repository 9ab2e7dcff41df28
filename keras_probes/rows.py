"""Rows of the results: what the sums of the online probes of one host come to.

In: sums, the probes they are of, and the host's own logs. Out: `Row`s.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from keras_probes.online import OnlineProbes
from keras_probes.probes.measures import CODE_LENGTH, guesses, measure
from keras_probes.probes.probe_set import Sums
from keras_probes.results import Row
from keras_probes.taps.capture import Kind

# What Keras calls the share of examples that a model gets right.
_ACCURACIES = ("accuracy", "acc", "sparse_categorical_accuracy", "categorical_accuracy")


def rows_of_epoch(
    online: OnlineProbes,
    sums: Sums,
    epoch: int,
    split: str,
    metrics: Sequence[str],
    asked: Mapping[str | None, Any],
    of_host: Mapping[str, Any],
) -> Iterator[Row]:
    """What was measured in an epoch of training, or in an evaluation.

    Args:
        online: The probes.
        sums: Theirs, since it began.
        epoch: Epoch, from 0.
        split: `"train"`, `"validation"` or `"test"`.
        metrics: Which measures.
        asked: By name, the targets as the user gave them.
        of_host: The host's own logs.
    """
    kind: Kind = "train" if split == "train" else "test"
    step, certificates = online.steps, online.certificates(kind)
    for target, by_tap in sums.items():
        probes = online.probes_of(target)
        known, counts = (probes.label_counts(k, target) for k in ("train", kind))
        code = (CODE_LENGTH,) if kind == "train" and online.first_pass else ()
        of_model = {"error": _host_error(of_host, asked.get(target, ()))}
        for metric in (*metrics, *code):
            majority, chance = guesses(metric, known, counts)
            for tap, row in by_tap.items():
                yield Row(
                    epoch=epoch,
                    step=step,
                    split=split,
                    target=target,
                    tap=tap,
                    metric=metric,
                    value=measure(metric, row),
                    n=int(row["count"]),
                    nonfinite=int(row["nonfinite"]),
                    certificate=certificates.get((target, tap), math.nan),
                    majority=majority,
                    chance=chance,
                    host=of_model.get(metric, math.nan),
                )


def rows_of_batches(
    online: OnlineProbes, sums: Sums, before: Sums, epoch: int, metrics: Iterable[str]
) -> Iterator[Row]:
    """What was measured in training between two moments of an epoch.

    Args:
        online: The probes.
        sums: Theirs at the second moment.
        before: At the first; empty at the beginning of the epoch.
        epoch: Epoch, from 0.
        metrics: Which measures.
    """
    step = online.steps
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
