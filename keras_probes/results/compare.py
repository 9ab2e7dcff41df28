"""Two layers compared: how much their errors differ, and what chance makes of it.

In: a `ProbeResults`. Out: a `Comparison`.

Both layers were measured on the same examples and mostly miss the same ones, so that a small
difference can be sure. Of classes, an example is missed or not: only those that one layer misses
and the other does not tell the two apart (McNemar 1947). Other errors are compared by a paired
t-test of the examples' squared errors, or shares of wrong answers.
"""

import dataclasses
import math
from typing import Any

from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import Z_95, Pairs

MCNEMAR, PAIRED_T, INDEPENDENT = "McNemar's exact test", "paired t-test", "independent samples"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """By how much the error of a layer is above that of another.

    Attributes:
        tap: The layer.
        other: What it is compared with.
        difference: Its error minus the other's.
        ci_low: Lower end of the 95% confidence interval of that.
        ci_high: Its upper end.
        p: Two-sided p-value of there being no difference.
        p_above: One-sided p-value of its error being no more than the other's.
        n: Number of examples that both were measured on.
        test: Which test: see `ProbeResults.compare`.
    """

    tap: str
    other: str
    difference: float
    ci_low: float
    ci_high: float
    p: float
    p_above: float
    n: int
    test: str

    def __str__(self) -> str:
        return (
            f"{self.tap} - {self.other}: {self.difference:+.4f} (95% {self.ci_low:+.4f} to "
            f"{self.ci_high:+.4f}), p = {self.p:.2g} by {self.test} on {self.n:,} examples"
        )


def compare(
    results: ProbeResults,
    tap: str,
    other: str,
    *,
    split: str | None = None,
    target: str | None = None,
) -> Comparison:
    """As `ProbeResults.compare` says."""
    measured = results.measured("error", split=split, target=target)
    for name in (tap, other):
        if name not in measured.index:
            known = ", ".join(map(repr, measured.index))
            raise ValueError(f"Unknown tap. Received: {name!r}. Measured: {known}.")
    row, row_of_other = measured.loc[tap], measured.loc[other]
    return compare_rows(pairs_of(results, row), row, row_of_other)


def pairs_of(results: ProbeResults, row: Any) -> Pairs | None:
    """How errors went together in the pass that a row of a frame is of; `None` if unknown."""
    pairs = results.pairs.get((row["target"], row["baseline"], row["split"]))
    return pairs if pairs is not None and pairs.epoch == row["epoch"] else None


def compare_rows(pairs: Pairs | None, row: Any, row_of_other: Any) -> Comparison:
    """Compares two rows of a frame.

    Args:
        pairs: Of their pass, where they are known.
        row: Of a tap, by its name.
        row_of_other: Of the other.
    """
    if pairs is None or pairs.of(row.name, row_of_other.name)[0] < 2:
        return independent(row, row_of_other)
    return _paired(pairs, row, row_of_other)


def _paired(pairs: Pairs, row: Any, row_of_other: Any) -> Comparison:
    stats = scipy_stats()
    tap, other = row.name, row_of_other.name
    n, total, squares, of_other, squares_of_other, both = pairs.of(tap, other)
    if (squares, squares_of_other) == (total, of_other):  # each is 0 or 1
        missed, hit = round(total - both), round(of_other - both)
        difference = (missed - hit) / n
        # Agresti & Min 2005, section 3: the interval of two examples more that tell them apart.
        centre, size = (missed - hit) / (n + 2), n + 2
        half = Z_95 * math.sqrt(max((missed + hit + 1) / size - centre**2, 0.0) / size)
        p, p_above = 1.0, 1.0
        if missed + hit:
            p = stats.binomtest(missed, missed + hit).pvalue
            p_above = stats.binomtest(missed, missed + hit, alternative="greater").pvalue
        bounds = centre - half, centre + half
        return Comparison(tap, other, difference, *bounds, p, p_above, round(n), MCNEMAR)
    # In units of the error, of which the examples' errors are a multiple.
    unit = row["value"] / (total / n) if total else 1.0
    mean = unit * (total - of_other) / n
    square = unit**2 * (squares - 2 * both + squares_of_other) / n
    deviation = math.sqrt(max(square - mean**2, 0.0) / (n - 1))
    half = stats.t.ppf(0.975, n - 1) * deviation
    t = _ratio(mean, deviation)
    p, p_above = 2 * stats.t.sf(abs(t), n - 1), stats.t.sf(t, n - 1)
    return Comparison(
        tap, other, mean, mean - half, mean + half, float(p), float(p_above), round(n), PAIRED_T
    )


def independent(row: Any, row_of_other: Any) -> Comparison:
    """Compares two rows as measures of different examples, by their own intervals."""
    difference = row["value"] - row_of_other["value"]
    deviation = math.hypot(deviation_of(row), deviation_of(row_of_other))
    z = _ratio(difference, deviation)
    half = Z_95 * deviation
    return Comparison(
        row.name, row_of_other.name, difference, difference - half, difference + half,
        math.erfc(abs(z) / math.sqrt(2)), math.erfc(z / math.sqrt(2)) / 2,
        int(min(row["n"], row_of_other["n"])), INDEPENDENT,
    )  # fmt: skip


def _ratio(difference: float, deviation: float) -> float:
    if deviation or not difference:
        return difference / deviation if deviation else 0.0
    return math.copysign(math.inf, difference)


def deviation_of(row: Any) -> float:
    """Standard deviation of a measure, by its confidence interval."""
    return (row["ci_high"] - row["ci_low"]) / (2 * Z_95)


def scipy_stats() -> Any:
    """The module `scipy.stats`, which an extra brings."""
    try:
        import scipy.stats
    except ImportError as error:
        raise ImportError(
            'Comparing layers needs SciPy. Install it with: pip install "keras_probes[view]"'
        ) from error
    return scipy.stats
