"""Two runs compared: whether the order of layers is the same, and how far their errors differ.

In: two `ProbeResults`, as of probes that trained online and of optimal ones. Out: an `Agreement`.
"""

import dataclasses
import html
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from keras_probes.results.compare import independent, scipy_stats
from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import Z_95

_AS_TEXT: Any = {"float_format": "{:.4f}".format}


@dataclasses.dataclass(frozen=True, eq=False)
class Agreement:
    """How far two runs agree on the layers that both measured.

    The interval of tau takes the layers as a sample of such layers. It does not know of the chance
    in each measure: layers whose errors are near each other change places by luck.

    Attributes:
        metric: What was compared.
        split: On which split of these results.
        other_split: On which split of the others.
        tau: Kendall's tau-b of the two orders of layers: 1 if they are the same, -1 if one is the
            other backwards; NaN if all layers of a run have one value.
        ci_low: Lower end of its 95% confidence interval; NaN with fewer than 5 layers.
        ci_high: Its upper end.
        p: Two-sided p-value of the orders having nothing to do with each other.
        n: Number of layers that both measured.
        table: A frame indexed by tap, in graph order: `value` and `other`, the two measures; their
            `difference`, the first minus the second, and its 95% interval `ci_low` and `ci_high`,
            NaN for a loss. The two are taken for independent; where both are of the same examples,
            the interval is wider than it need be.
        left_out: By tap, why it is not compared.
    """

    metric: str
    split: str
    other_split: str
    tau: float
    ci_low: float
    ci_high: float
    p: float
    n: int
    table: pd.DataFrame
    left_out: Mapping[str, str]

    @property
    def mean_difference(self) -> float:
        """Mean over layers of the difference."""
        return float(self.table["difference"].mean())

    @property
    def largest(self) -> str:
        """The tap whose difference is the farthest from 0."""
        return str(self.table["difference"].abs().idxmax())

    def __str__(self) -> str:
        return f"{self._order()}\n{self.table.to_string(**_AS_TEXT)}\n{self._differences()}"

    def _repr_html_(self) -> str:
        order, differences = html.escape(self._order()), html.escape(self._differences())
        return f"<p>{order}</p>\n{self.table.to_html(**_AS_TEXT)}\n<p>{differences}</p>"

    def _order(self) -> str:
        interval = f"95% {self.ci_low:.2f} to {self.ci_high:.2f}"
        known = interval if math.isfinite(self.ci_low) else "interval not known"
        return (
            f"{self.split} {self.metric}, and {self.other_split} {self.metric} of the other: the "
            f"order of {self.n} layers has tau = {self.tau:.2f} ({known}), p = {self.p:.2g}"
        )

    def _differences(self) -> str:
        largest = self.table["difference"][self.largest]
        named = ", ".join(f"{tap!r} ({reason})" for tap, reason in self.left_out.items())
        return (
            f"difference: {self.mean_difference:+.4f} in the mean, {largest:+.4f} at most "
            f"({self.largest!r})" + (f"\nleft out: {named}" if named else "")
        )


def compare_with(
    results: ProbeResults,
    other: ProbeResults,
    *,
    metric: str = "error",
    split: str | None = None,
    other_split: str | None = None,
    target: str | None = None,
) -> Agreement:
    """As `ProbeResults.compare_with` says."""
    these = results.measured(metric, split=split, target=target)
    others = other.measured(metric, split=other_split or split, target=target)
    left_out = _left_out(these, others)
    taps = [tap for tap in these.index if tap not in left_out]
    if len(taps) < 2:
        raise ValueError(
            "Runs can be compared by at least two taps that both measured. Received: "
            f"{', '.join(map(repr, these.index))}, and in the other run "
            f"{', '.join(map(repr, others.index))}. Give both the same layers=."
        )
    compared = [independent(these.loc[tap], others.loc[tap]) for tap in taps]
    table = pd.DataFrame(
        {
            "value": these["value"][taps],
            "other": others["value"][taps],
            **{
                column: [getattr(of_tap, column) for of_tap in compared]
                for column in ("difference", "ci_low", "ci_high")
            },
        }
    )
    tau, p = map(float, scipy_stats().kendalltau(table["value"], table["other"]))
    splits = these["split"].iloc[0], others["split"].iloc[0]
    bounds = interval_of_tau(tau, len(taps))
    return Agreement(metric, *splits, tau, *bounds, p, len(taps), table, left_out)


def _left_out(these: pd.DataFrame, others: pd.DataFrame) -> dict[str, str]:
    """Why taps can not be compared, of all that were measured in either run."""
    known, of_other = these["value"].dropna().index, others["value"].dropna().index
    left_out = {}
    for tap in [*these.index, *others.index.difference(these.index, sort=False)]:
        if tap not in others.index:
            left_out[tap] = "not in the other run"
        elif tap not in these.index:
            left_out[tap] = "in the other run only"
        elif tap not in known or tap not in of_other:
            left_out[tap] = "no example could be measured"
    return left_out


def interval_of_tau(tau: float, n: int) -> tuple[float, float]:
    """95% confidence interval of Kendall's tau (Fieller, Hartley & Pearson 1957).

    Fisher's z of tau, artanh(tau), is taken for normal, of standard error sqrt(0.437 / (n - 4)).
    That is known of bivariate normal samples without ties, up to a tau of 0.8 or so; above it the
    interval is too narrow. Where the order is the same throughout, z is infinite: there it is that
    of n layers of which one pair has changed places, and the interval reaches to 1.

    Args:
        tau: Of the sample.
        n: Number of pairs of values in it.

    Returns:
        Lower and upper bound, -1 to 1; NaN where n is less than 5 or tau is NaN.
    """
    if n < 5 or math.isnan(tau):
        return math.nan, math.nan
    most = 1 - 4 / (n * (n - 1))
    z, half = math.atanh(min(max(tau, -most), most)), Z_95 * math.sqrt(0.437 / (n - 4))
    return min(tau, math.tanh(z - half)), max(tau, math.tanh(z + half))
