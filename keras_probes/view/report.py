"""The report: one page that opens offline, with the findings, curves, graph and table of a record.

In: a `ProbeResults`. Out: an HTML file. `report.html` beside this file is the page; what moves with
the epoch is drawn there, by Plotly, from the numbers put into it here.
"""

import datetime
import math
import os
import pathlib
import re
import shutil
from importlib.util import find_spec
from typing import Any

import numpy as np
import pandas as pd

from keras_probes.results.record import ProbeResults
from keras_probes.view.diagnose import Findings, diagnose
from keras_probes.view.graph import color_scale, graph_of, ink, rendered
from keras_probes.view.layout import layout_of
from keras_probes.view.plots import in_words, order_colors

MOST_NODES = 40  # of a graph that is drawn whole
_TEMPLATE = pathlib.Path(__file__).with_name("report.html")


def write_report(
    results: ProbeResults, path: str | os.PathLike, *, metric: str = "error", title: str = ""
) -> pathlib.Path:
    """Writes what `ProbeResults.report` says."""
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            "The report needs Jinja2 and Plotly. Install them with: "
            'pip install "keras_probes[view]"'
        ) from error
    sections = [
        _section(results, metric, target, place) for place, target in enumerate(results.targets)
    ]
    if not sections:
        results.measured(metric)  # raises: there is nothing to show
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title or f"Linear probes of {results.settings.get('model', 'a model')}",
        date=datetime.date.today().isoformat(),
        sections=sections,
        settings=results.settings,
        versions=results.versions,
        plotly=Markup(get_plotlyjs()),
        Markup=Markup,
    )
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _section(results: ProbeResults, metric: str, target: str | None, place: int) -> dict[str, Any]:
    """What the page says of a target."""
    latest = results.measured(metric, target=target)
    split = latest["split"].iloc[0]
    known = latest["value"].dropna()
    findings: Findings = Findings()
    if any((row.metric, row.target) == ("error", target) for row in results.rows):
        findings = diagnose(results, target=target)
    return {
        "id": f"s{place}",
        "target": target,
        "metric": in_words(metric),
        "split": split,
        "best": known.idxmin() if len(known) else None,
        "least": known.min(),
        "last": latest.iloc[-1],
        "findings": findings,
        "table": _table(results, metric, target),
        "graph": _graph(results, metric, split, target, f"s{place}-"),
        "data": _numbers(results, metric, split, target),
    }


def _table(results: ProbeResults, metric: str, target: str | None) -> dict[str, Any]:
    table = results.table(metric, target=target)
    shown = [c for c in table.columns if c != "depth"]
    return {"columns": shown, "rows": [
        (tap, [_cell(column, row[column]) for column in shown]) for tap, row in table.iterrows()
    ]}  # fmt: skip


def _cell(column: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "-"
    return f"{value:.0e}" if column in ("certificate", "l2") else f"{value:.4f}"


def _graph(
    results: ProbeResults, metric: str, split: str, target: str | None, prefix: str
) -> str | None:
    """The coloured graph as SVG to stand in a page; `None` where there is nothing to draw it with.

    Its ids begin with `prefix`, since a page has several.
    """
    if not (results.graph and shutil.which("dot") and find_spec("pydot")):
        return None
    condensed = len(results.graph) > MOST_NODES
    dot = graph_of(results, metric=metric, split=split, target=target, condensed=condensed)
    svg = rendered(dot, "svg").decode()
    svg = re.sub(r"<title>.*?</title>", "", svg[svg.index("<svg") :])  # Graphviz's names of nodes
    return svg.replace(' id="', f' id="{prefix}').replace("<svg", '<svg role="presentation"', 1)


def _numbers(results: ProbeResults, metric: str, split: str, target: str | None) -> dict[str, Any]:
    """What is drawn in the page, by tap and epoch, as JSON takes it."""
    history = results.history(metric, split=split, target=target)
    names, epochs = list(history.index), [int(epoch) for epoch in history.columns]
    moments = [
        results.measured(metric, split=split, epoch=epoch, target=target).reindex(names)
        for epoch in epochs
    ]
    layout, about = layout_of(results), {tap.name: tap for tap in results.taps}
    color_of = color_scale(results, metric, split, target)
    fills = [[color_of(v) if math.isfinite(v) else "#f2f2f2" for v in m["value"]] for m in moments]
    return {
        "metric": in_words(metric),
        "split": split,
        "epochs": epochs,
        "taps": names,
        "about": [f"{about[name].layer}, {about[name].shape_text}" for name in names],
        "places": [list(about).index(name) for name in names],
        "columns": [layout.columns[name] for name in names],
        "edges": [
            [names.index(above), names.index(tap)]
            for above, tap in layout.edges
            if above in names and tap in names
        ],
        "curves": order_colors(len(names)),
        "values": [_known(m["value"]) for m in moments],
        "low": [_known(m["ci_low"]) for m in moments],
        "high": [_known(m["ci_high"]) for m in moments],
        "host": [_known(m["host"])[-1] for m in moments],
        "guess": [_known(m["majority"])[-1] for m in moments],
        "fills": fills,
        "inks": [[ink(fill) for fill in of_epoch] for of_epoch in fills],
    }


def _known(values: pd.Series) -> list[float | None]:
    """JSON has no NaN."""
    return [round(float(v), 5) if np.isfinite(v) else None for v in values]
