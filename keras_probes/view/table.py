"""The table: one row a tap, in graph order, as a frame, as text and for notebooks.

In: a `ProbeResults`. Out: as the paper's table 4a, with what the numbers rest on.
"""

import dataclasses
import html
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import BASELINES, SPLITS, Row, TapInfo
from keras_probes.view.layout import thinned

CONVERGED = 1e-2  # nats; of a probe that trained online
BAR = 30  # characters
MOST_BARS = 40
MOST_LEFT_OUT = 8
# Metrics that a probe has once, or that are no measure of its answers.
ONCE = ("l2", "converged", "code_length", "rank", "directions")
_AS_TEXT: dict[str, Any] = {
    "float_format": "{:.4f}".format,
    "formatters": {"l2": "{:.0e}".format, "certificate": "{:.0e}".format},
}


def table(
    results: ProbeResults, metric: str, *, epoch: int | None = None, target: str | None = None
) -> pd.DataFrame:
    """Returns what `ProbeResults.table` says."""
    shown = results.measured(metric, epoch=epoch, target=target)  # raises where there is nothing
    name = results.resolve_target(target)
    table = pd.DataFrame(
        [dataclasses.asdict(tap) for tap in results.taps],
        columns=[field.name for field in dataclasses.fields(TapInfo)],
    ).set_index("name")
    table.index.name = "tap"
    table["shape"] = [tap.shape_text for tap in results.taps]
    left_out = {name: pd.Series(0, table.index) for name in ("nonfinite", "unlabelled")}
    for split in SPLITS:
        if not results.latest(metric, name, split=split, epoch=epoch):
            continue
        rows = results.measured(metric, split=split, epoch=epoch, target=name)
        table[f"{split} {metric}"] = rows["value"]
        if rows["ci_low"].notna().any():
            table[f"{split} ±95%"] = (rows["ci_high"] - rows["ci_low"]) / 2
        for baseline in BASELINES:
            at = int(rows["epoch"].max())
            of_other = results.latest(metric, name, baseline=baseline, split=split, epoch=at)
            if not of_other:
                continue
            values = _values(of_other)
            is_initial = baseline == "initial"
            column = "initial" if is_initial else "selectivity"
            table[f"{split} {column}"] = values if is_initial else values - rows["value"]
        for kind, count in left_out.items():
            left_out[kind] = count.add(rows[kind], fill_value=0).astype(int)
    certificate = shown["certificate"].reindex(table.index)
    if certificate.notna().any():
        table["certificate"] = certificate
    table["converged"] = certificate <= CONVERGED  # and not where nothing is known
    for once in ONCE:
        of_once = results.latest(once, name)
        if of_once:
            values = _values(of_once).reindex(table.index)
            table[once] = values == 1.0 if once == "converged" else values
    return table.assign(**{kind: count for kind, count in left_out.items() if count.any()})


def as_text(results: ProbeResults) -> str:
    """The table of each target, of the metric that was asked for first."""
    if not results.rows:
        return repr(results)
    tables = [
        ("" if target is None else f"{target}\n")
        + results.table(first_metric(results, target), target=target).to_string(**_AS_TEXT)
        + f"\n{_without_features(results, target)}"
        for target in results.targets
    ]
    return "\n\n".join(tables + ([left_out_text(results.left_out)] if results.left_out else []))


def as_bars(results: ProbeResults) -> str:
    """A line a layer with a bar, for the terminal: the latest measure, of the one asked for first.

    Of very many layers, some are shown, the first and the last among them.
    """
    return "\n\n".join(_bars(results, target) for target in results.targets)


def _bars(results: ProbeResults, target: str | None) -> str:
    metric = first_metric(results, target)
    measured = results.measured(metric, target=target)
    shown = measured["value"].iloc[thinned(len(measured), MOST_BARS)]
    title = f"{measured['split'].iloc[0]} {metric.replace('_', ' ')} at each layer"
    if len(shown) < len(measured):
        title += f" ({len(shown)} of {len(measured)})"
    width, most = max(map(len, shown.index)), shown.max()
    lines = [f"{title}:" if target is None else f"{target}, {title}:"]
    for tap, value in shown.items():
        known = math.isfinite(value) and most > 0
        bar = "#" * round(BAR * value / most) if known else ""
        lines.append(f"  {tap:{width}}  {value:.4f}  {bar}".rstrip())
    return "\n".join(lines)


def as_html(results: ProbeResults) -> str:
    """The same for notebooks."""
    if not results.rows:
        return html.escape(repr(results))
    tables = [
        ("" if target is None else f"<h4>{html.escape(target)}</h4>\n")
        + results.table(first_metric(results, target), target=target).to_html(**_AS_TEXT)
        + f"\n<p>{html.escape(_without_features(results, target))}</p>"
        for target in results.targets
    ]
    if results.left_out:
        tables.append(f"<p>{html.escape(left_out_text(results.left_out))}</p>")
    return "\n".join(tables)


def left_out_text(left_out: Mapping[str, str]) -> str:
    """Which layers are not probed and why, as a sentence; of very many, the first."""
    shown = [f"{name!r} ({reason})" for name, reason in list(left_out.items())[:MOST_LEFT_OUT]]
    more = len(left_out) - len(shown)
    return f"Not probed: {', '.join(shown)}{f' and {more} more' if more else ''}."


def _values(rows: Mapping[str, Row]) -> pd.Series:
    """What was measured, by tap."""
    return pd.Series({tap: row.value for tap, row in rows.items()})


def first_metric(results: ProbeResults, target: str | None) -> str:
    """The measure that was asked for first, of those that the task of a target has."""
    return next(row.metric for row in results.rows if row.target == target)


def _without_features(results: ProbeResults, target: str | None) -> str:
    """What the measure in the table comes to without features, as a sentence."""
    metric = first_metric(results, target)
    last = next(
        r
        for r in reversed(results.rows)
        if (r.target, r.metric, r.baseline) == (target, metric, None)
    )
    guesses = (f"{last.majority:.4f} by the training labels alone", f"{last.chance:.4f} by chance")
    known = [
        text
        for text, value in zip(guesses, (last.majority, last.chance), strict=True)
        if not math.isnan(value)
    ]
    return f"{last.split} {metric} without features: {', '.join(known) or 'not known'}"
