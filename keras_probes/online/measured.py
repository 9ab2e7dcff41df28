"""What probes measured in an epoch or an evaluation, as a value, and the rows it comes to.

In: sums, and the host's own logs. Out: `Row`s.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_probes.probes.probe_set import Sums
from keras_probes.probes.spectrum import SPECTRUM, Spectrum
from keras_probes.probes.targets import Target
from keras_probes.results.schema import Refit, Row, interval_of_mean


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the probes of a host measured in one pass over data.

    Attributes:
        step: Number of batches they had trained on by its end.
        first_pass: Whether it is of training, and they had seen no example before.
        sums: By target, tap and name.
        certificates: By target and tap, where they are known.
        targets: By key, whose tasks measure in the labels' own units.
        known: By target, the tally of the labels they trained on.
        counts: By target, that of this pass.
        pairs: By key, how errors went together, in an evaluation.
        spectra: By target and tap, in how many directions features vary, where that was looked at.
        refit: What became of the refit at its end; `None` if there was none.
    """

    step: int
    first_pass: bool
    sums: Sums
    certificates: Mapping[tuple[str | None, str], float]
    targets: Mapping[str | None, Target]
    known: Mapping[str | None, np.ndarray]
    counts: Mapping[str | None, np.ndarray]
    pairs: Mapping[str | None, np.ndarray]
    spectra: Mapping[str | None, Mapping[str, Spectrum]]
    refit: Refit | None = None

    def details(self) -> dict[str | None, dict[str, dict[str, np.ndarray]]]:
        """What was counted by class or label: by key, tap and name."""
        found = {}
        for key, by_tap in self.sums.items():
            names = self.targets[key].task.details
            counts = {t: {n: s[n] for n in names if n in s} for t, s in by_tap.items()}
            if any(counts.values()):
                found[key] = counts
        return found


def rows_of(
    measured: Measured,
    epoch: int,
    split: str,
    metrics: Sequence[str],
    of_host: Mapping[str, Any],
) -> Iterator[Row]:
    """What was measured in an epoch of training, or in an evaluation.

    Args:
        measured: The sums and what belongs to them.
        epoch: Epoch, from 0.
        split: `"train"`, `"validation"` or `"test"`.
        metrics: Which measures.
        of_host: The host's own logs.
    """
    for key, by_tap in measured.sums.items():
        target = measured.targets[key]
        task = target.task
        asked = [metric for metric in metrics if metric in task.measurable]
        for metric in (*asked, *(task.first_pass if measured.first_pass else ())):
            majority, chance = task.guesses(metric, measured.known[key], measured.counts[key])
            for place, (tap, row) in enumerate(by_tap.items()):
                value = task.measure(metric, row)
                low, high = task.interval(metric, value, row)
                if target.positions is not None:  # of which those of an example go together
                    low, high = _interval_of_examples(metric, value, measured.pairs.get(key), place)
                yield Row(
                    epoch=epoch,
                    step=measured.step,
                    split=split,
                    target=target.name,
                    baseline=target.baseline,
                    tap=tap,
                    metric=metric,
                    value=value,
                    n=int(row["count"]),
                    ci_low=low,
                    ci_high=high,
                    nonfinite=int(row["nonfinite"]),
                    unlabelled=int(row["unlabelled"]),
                    certificate=measured.certificates.get((key, tap), math.nan),
                    majority=majority,
                    chance=chance,
                    host=_of_host(metric, target, of_host),
                )
        if target.baseline is None:
            yield from _rows_of_spectra(measured, epoch, split, target, key)


def _interval_of_examples(
    metric: str, value: float, moments: np.ndarray | None, place: int
) -> tuple[float, float]:
    """The interval of a tap's error, by `Pairs.moments`; NaN of other metrics."""
    if metric != "error" or moments is None:
        return math.nan, math.nan
    size = len(moments) // 3
    return interval_of_mean(value, *(moments[k * size + place, place] for k in range(3)))


def _rows_of_spectra(
    measured: Measured, epoch: int, split: str, target: Target, key: str | None
) -> Iterator[Row]:
    """In how many directions features vary, beside the errors of each target."""
    for tap, spectrum in measured.spectra.get(key, {}).items():
        n, left_out = (int(measured.sums[key][tap][name]) for name in ("count", "nonfinite"))
        for metric in SPECTRUM:
            value = float(getattr(spectrum, metric))
            yield Row(
                epoch, measured.step, split, target.name, tap, metric, value, n, nonfinite=left_out
            )


def rows_of_batches(
    step: int,
    sums: Sums,
    before: Sums,
    targets: Iterable[Target],
    epoch: int,
    metrics: Iterable[str],
) -> Iterator[Row]:
    """What was measured in training between two moments of an epoch.

    Args:
        step: Number of batches the probes had trained on at the second moment.
        sums: Theirs at that moment.
        before: At the first; empty at the beginning of the epoch.
        targets: All of them, as of `Measured`.
        epoch: Epoch, from 0.
        metrics: Which measures.
    """
    for target in targets:
        for tap, total in sums[target.key].items():
            was = before[target.key][tap] if before else {}
            new = {name: value - was.get(name, 0.0) for name, value in total.items()}
            for metric in (metric for metric in metrics if metric in target.task.measurable):
                yield Row(
                    epoch=epoch,
                    step=step,
                    split="train",
                    target=target.name,
                    baseline=target.baseline,
                    tap=tap,
                    metric=metric,
                    value=target.task.measure(metric, new),
                    n=int(new["count"]),
                )


def _of_host(metric: str, target: Target, logs: Mapping[str, Any]) -> float:
    """A metric of the host itself, by Keras's logs; NaN if it was not asked for that.

    Args:
        metric: Which one.
        target: `None`, or the key of one of several outputs, tells whose it is; of others, and of
            baselines, none is known.
        logs: The host's logs.
    """
    select = target.select
    if target.baseline is not None or not (select is None or isinstance(select, str)):
        return math.nan
    of_output = "" if select is None else f"{select}_"
    names = target.task.of_keras.get(metric, ())
    known = (float(logs[key]) for name in names if (key := of_output + name) in logs)
    value = next(known, math.nan)
    return 1.0 - value if metric == "error" else value
