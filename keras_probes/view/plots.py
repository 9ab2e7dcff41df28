"""Figures: error against depth, over epochs, and both at once.

In: a `ProbeResults`. Out: matplotlib Axes. Each takes `ax=` to draw into, and is wide enough for
its layers where it makes its own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from keras_probes.results.record import ProbeResults
from keras_probes.view.layout import Layout, layout_of, thinned

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

APART = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart likewise (Okabe & Ito 2008)
COLORS = "viridis"  # of depth and time: in order, and told apart by the colour-blind
MOST_LABELS = 45  # on an axis; more are not legible
MOST_IN_LEGEND = 12
LIGHT = 0.6  # of the colours: black is legible on what is above
NEAR = 0.6  # times a level is to be below some layer's error: else it is not worth the space


def plot_depth(
    results: ProbeResults,
    ax: "Axes | None" = None,
    *,
    metric: str = "error",
    split: str | None = None,
    epochs: Sequence[int] | None = None,
    target: str | None = None,
    label: str | None = None,
) -> "Axes":
    """Draws a measure against depth, with 95% intervals of errors (paper, figures 3 and 4b).

    Layers follow each other from left to right along the host's graph; parallel branches stand
    beside each other, at the same place, each on a line of its own.

    Args:
        results: What probes measured.
        ax: Where to draw; by default a new figure, wide enough for the names.
        metric: Which measure.
        split: Which split; by default the last measured of train, validation and test.
        epochs: Which moments, from 0, such as the first and the last; by default the latest alone.
        target: Which target; may be left out if there is only one.
        label: What to call it in the legend; by default the epoch, if probes trained in epochs.
            Results that are drawn into the same `ax`, one after the other, have colours of their
            own.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Nothing of this was measured.
    """
    layout = layout_of(results)
    wanted: list[int | None] = list(epochs) if epochs is not None else [None]
    frames = [results.measured(metric, split=split, epoch=epoch, target=target) for epoch in wanted]
    names = _names_by_column(layout)
    ax = ax or _new_axes(width=max(5.0, 2.0 + 0.22 * len(names)), height=4.2)
    alone = APART[len(ax.containers) % len(APART)]
    colors = [alone] if len(frames) == 1 else order_colors(len(frames))
    for frame, color in zip(frames, colors, strict=True):
        # Of `fit_probes`, which keeps its probes, there are no epochs.
        name = "fitted probes" if results.probes else f"epoch {frame['epoch'].iloc[-1] + 1}"
        named = f"{label}, {name}" if label and len(frames) > 1 else label or name
        _draw_moment(ax, frame, layout, color, named)
    last, split = frames[-1], frames[-1]["split"].iloc[-1]
    highest = max(frame["value"].max() for frame in frames)
    levels = (("host", "the model itself", "--", colors[-1]), ("majority", "guessing", ":", "0.35"))
    for column, name, style, color in levels:
        if NEAR * last[column].iloc[-1] < highest:
            _level(ax, last[column].iloc[-1], name, linestyle=style, color=color)
    shown = thinned(len(names), MOST_LABELS)
    ax.set_xticks(shown, [names[place] for place in shown], rotation=90, fontsize=8)
    ax.set_xlim(-0.5, len(names) - 0.5)
    ax.set_ylabel(f"{split} {in_words(metric)}")
    ax.set_title(_title(results, target))
    ax.grid(axis="y", color="0.9")
    ax.set_axisbelow(True)
    if ax.get_legend_handles_labels()[1][1:]:
        ax.legend(frameon=False, fontsize=8)
    return ax


def _draw_moment(ax: "Axes", frame: "pd.DataFrame", layout: Layout, color: Any, label: str) -> None:
    for above, tap in layout.edges:
        if above in frame.index and tap in frame.index:
            places = [layout.columns[above], layout.columns[tap]]
            ax.plot(places, frame.loc[[above, tap], "value"], color=color, linewidth=1.5)
    places = [layout.columns[tap] for tap in frame.index]
    value = frame["value"].to_numpy()
    interval = [value - frame["ci_low"], frame["ci_high"] - value]
    known = frame["ci_low"].notna().any()
    ax.errorbar(
        places, value, yerr=interval if known else None, fmt="o", markersize=4,
        color=color, ecolor=color, elinewidth=1, capsize=2, label=label,
    )  # fmt: skip


def plot_curves(
    results: ProbeResults,
    ax: "Axes | None" = None,
    *,
    metric: str = "error",
    split: str | None = None,
    target: str | None = None,
    by: Literal["epoch", "step"] = "epoch",
) -> "Axes":
    """Draws a measure over epochs, a curve a layer, coloured by depth.

    Args:
        results: What probes measured.
        ax: Where to draw; by default a new figure.
        metric: Which measure.
        split: Which split; by default the last measured of train, validation and test.
        target: Which target; may be left out if there is only one.
        by: As of `ProbeResults.history`.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Nothing of this was measured.
    """
    latest = results.measured(metric, split=split, target=target)
    split = latest["split"].iloc[0]
    values = results.history(metric, split=split, target=target, by=by)
    ax = ax or _new_axes(width=7.5, height=4.2)
    colors = order_colors(len(values))
    moments = _moments(values)
    for (tap, of_tap), color in zip(values.iterrows(), colors, strict=True):
        ax.plot(moments, of_tap, color=color, label=tap, linewidth=1.5, **_point(moments))
    if by == "epoch" and latest["host"].notna().any():
        host = [
            results.measured(metric, split=split, epoch=int(epoch), target=target)["host"].iloc[-1]
            for epoch in moments - 1
        ]
        ax.plot(moments, host, "--", color="0.35", label="the model itself", **_point(moments))
    if len(values) <= MOST_IN_LEGEND:
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        _depth_key(ax, list(values.index))
    _time_axis(ax, by)
    ax.set_ylabel(f"{split} {in_words(metric)}")
    ax.set_title(_title(results, target))
    ax.grid(color="0.9")
    ax.set_axisbelow(True)
    return ax


def plot_heatmap(
    results: ProbeResults,
    ax: "Axes | None" = None,
    *,
    metric: str = "error",
    split: str | None = None,
    target: str | None = None,
    by: Literal["epoch", "step"] = "epoch",
) -> "Axes":
    """Draws a measure over depth and epochs at once, the input at the bottom.

    Args:
        results: What probes measured.
        ax: Where to draw; by default a new figure, high enough for the names.
        metric: Which measure.
        split: Which split; by default the last measured of train, validation and test.
        target: Which target; may be left out if there is only one.
        by: As of `ProbeResults.history`.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Nothing of this was measured.
    """
    values = results.history(metric, split=split, target=target, by=by)
    split = results.measured(metric, split=split, target=target)["split"].iloc[0]
    height = float(np.clip(1.2 + 0.2 * len(values), 3.0, 12.0))
    ax = ax or _new_axes(width=7.0, height=height)
    moments = _moments(values)
    gaps = np.diff(moments) if len(moments) > 1 else np.ones(1)
    padded = np.concatenate([moments[:1] - gaps[0], moments, moments[-1:] + gaps[-1]])
    edges = (padded[1:] + padded[:-1]) / 2
    places = np.arange(len(values) + 1) - 0.5
    mesh = ax.pcolormesh(edges, places, values.to_numpy(), cmap=COLORS)
    shown = thinned(len(values), MOST_LABELS)
    ax.set_yticks(shown, [values.index[place] for place in shown], fontsize=8)
    _time_axis(ax, by)
    ax.set_title(_title(results, target))
    bar = ax.figure.colorbar(mesh, ax=ax)
    bar.set_label(f"{split} {in_words(metric)}")
    return ax


def plot_per_class(
    results: ProbeResults,
    tap: str,
    ax: "Axes | None" = None,
    *,
    split: str | None = None,
    target: str | None = None,
) -> "Axes":
    """Draws the error of a layer's probe by class, or by label of several, the highest first.

    Args:
        results: What probes measured.
        tap: Tap name.
        ax: Where to draw; by default a new figure, high enough for the names.
        split: As of `ProbeResults.per_class`.
        target: Which target; may be left out if there is only one.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: An unknown tap, or nothing was counted by class.
    """
    frame = results.per_class(tap, split=split, target=target)
    frame = frame[frame["n"] > 0].sort_values("error", kind="stable")
    ax = ax or _new_axes(width=6.0, height=float(np.clip(1.2 + 0.2 * len(frame), 3.0, 12.0)))
    places = np.arange(len(frame))
    error, low, high = (frame[name].to_numpy(float) for name in ("error", "ci_low", "ci_high"))
    ax.errorbar(
        error, places, xerr=[error - low, high - error], fmt="o", markersize=4, color=APART[0],
        elinewidth=1, capsize=2,
    )  # fmt: skip
    shown = thinned(len(frame), MOST_LABELS)
    ax.set_yticks(shown, [frame.index[place] for place in shown], fontsize=8)
    ax.set_xlabel(f"error of the probe at {tap}")
    ax.set_ylabel(str(frame.index.name))
    ax.set_xlim(left=0)
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    ax.set_title(_title(results, target))
    return ax


def plot_confusion(
    results: ProbeResults,
    tap: str,
    ax: "Axes | None" = None,
    *,
    split: str | None = None,
    target: str | None = None,
) -> "Axes":
    """Draws the confusion matrix of a layer's probe: of each class, the share of each answer.

    Args:
        results: What probes measured.
        tap: Tap name.
        ax: Where to draw; by default a new figure, large enough for the names.
        split: As of `ProbeResults.confusion`.
        target: Which target; may be left out if there is only one.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: As `ProbeResults.confusion`.
    """
    matrix = results.confusion(tap, split=split, target=target)
    counts = matrix.to_numpy(int)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = float(np.clip(2.0 + 0.3 * len(matrix), 4.0, 12.0))
    ax = ax or _new_axes(width=size + 1.0, height=size)
    image = ax.imshow(shares, cmap=COLORS, vmin=0, vmax=1)
    shown = thinned(len(matrix), MOST_LABELS)
    names = [matrix.index[place] for place in shown]
    ax.set_yticks(shown, names, fontsize=8)
    ax.set_xticks(shown, names, fontsize=8, rotation=90)
    if len(matrix) <= MOST_IN_LEGEND:
        for (row, column), count in np.ndenumerate(counts):
            light = shares[row, column] < LIGHT
            ax.text(
                column, row, str(count), ha="center", va="center", fontsize=8,
                color="white" if light else "black",
            )  # fmt: skip
    ax.set_xlabel(f"answer of the probe at {tap}")
    ax.set_ylabel("class")
    ax.set_title(_title(results, target))
    ax.figure.colorbar(image, ax=ax).set_label("share of the class")
    return ax


def _new_axes(width: float, height: float) -> "Axes":
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            'Figures need matplotlib. Install it with: pip install "keras_probes[view]"'
        ) from error
    return plt.subplots(figsize=(min(width, 16.0), height), layout="constrained")[1]


def _names_by_column(layout: Layout) -> list[str]:
    """What stands below each place of the axis: the names of the taps there."""
    names: list[list[str]] = [[] for _ in range(max(layout.columns.values(), default=-1) + 1)]
    for tap, column in layout.columns.items():
        names[column].append(tap)
    return [" | ".join(of_column) for of_column in names]


def _level(ax: "Axes", value: float, label: str, **line: Any) -> None:
    """A line across, of those that the legend has once."""
    known = label in ax.get_legend_handles_labels()[1]
    ax.axhline(value, linewidth=1.2, label="" if known else label, **line)


def order_colors(count: int) -> list[str]:
    """Colours, `#rrggbb`, of what follows each other, such as layers in depth."""
    import matplotlib
    from matplotlib.colors import to_hex

    places = np.linspace(0, 0.9, count) if count > 1 else [0.35]
    return [to_hex(matplotlib.colormaps[COLORS](place)) for place in places]


def _depth_key(ax: "Axes", names: list[str]) -> None:
    """A colour bar from the first layer to the last, where a legend would be too long."""
    import matplotlib
    from matplotlib.colors import ListedColormap, Normalize

    colors = ListedColormap(order_colors(len(names)))
    scale = matplotlib.cm.ScalarMappable(Normalize(-0.5, len(names) - 0.5), colors)
    places = thinned(len(names), MOST_IN_LEGEND)
    bar = ax.figure.colorbar(scale, ax=ax, ticks=places)
    bar.ax.set_yticklabels([names[place] for place in places], fontsize=8)
    bar.ax.invert_yaxis()


def _moments(history: "pd.DataFrame") -> np.ndarray:
    """When the columns of a history were measured: epochs, from 1, or numbers of batches."""
    return history.columns.to_numpy(int) + (history.columns.name == "epoch")


def _time_axis(ax: "Axes", by: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel({"epoch": "epoch", "step": "batches"}[by])


def _point(moments: Any) -> dict[str, Any]:
    """How to mark a curve of a single point, which has no line."""
    return {"marker": "o"} if len(moments) == 1 else {}


def in_words(metric: str) -> str:
    """A metric as axes name it."""
    return {"loss": "loss, nats"}.get(metric, metric.replace("_", " "))


def _title(results: ProbeResults, target: str | None) -> str:
    name = results.resolve_target(target)
    return "" if name is None else str(name)
