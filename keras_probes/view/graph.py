"""The host's graph, each probed layer coloured by its error, its probe hanging from it by a diode.

In: the graph and measures in a `ProbeResults`. Out: SVG or PNG by Graphviz, as the paper's figures
5, 6, 8 and 9. The diode is that of its appendix A: what the probe learns does not flow back.
"""

import dataclasses
import html
import os
import pathlib
import re
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import Node, shape_text
from keras_probes.view.layout import folded

if TYPE_CHECKING:
    import pydot

FORMATS = ("svg", "png")
_FONT = {"fontname": "Helvetica", "fontsize": "11"}
_PLAIN = "#f2f2f2"  # of layers without a probe


def plot_probed_model(
    model: keras.Model,
    results: ProbeResults,
    path: str | os.PathLike,
    *,
    metric: str = "error",
    epoch: int | None = None,
    split: str | None = None,
    target: str | None = None,
    condensed: bool = False,
) -> pathlib.Path:
    """Draws the host with its probes: red where a probe's error is high, green and blue where low.

    Each probed layer has its shape and, in the probe that hangs from it, the measure. The colours
    span all epochs, so that pictures of several moments can be compared.

    Args:
        model: The host.
        results: What probes of it measured.
        path: Where to write; the ending says whether it becomes SVG or PNG.
        metric: Which measure.
        epoch: Which moment, from 0; the latest by default.
        split: Which split; by default the last measured of train, validation and test.
        target: Which target; may be left out if there is only one.
        condensed: Leaves out the layers that are not probed, and gives each a single line, so that
            a deep host fits a page.

    Returns:
        The path.

    Raises:
        ImportError: pydot or Graphviz is not installed.
        ValueError: The results are of another model or hold no graph, nothing of this was measured,
            or the path has another ending.
    """
    path = pathlib.Path(path)
    if path.suffix[1:] not in FORMATS:
        raise ValueError(
            f"Expected `path` to end in {' or '.join('.' + f for f in FORMATS)}. "
            f"Received: path={str(path)!r}."
        )
    _check_model(model, results)
    asked: dict[str, Any] = {"metric": metric, "epoch": epoch, "split": split, "target": target}
    dot = graph_of(results, condensed=condensed, title=model.name, **asked)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(rendered(dot, path.suffix[1:]))
    return path


def graph_of(
    results: ProbeResults,
    *,
    metric: str = "error",
    epoch: int | None = None,
    split: str | None = None,
    target: str | None = None,
    condensed: bool = False,
    title: str = "",
) -> "pydot.Dot":
    """Returns the picture as Graphviz takes it; `probe-i` and `layer-i` are ids of the i-th tap.

    Raises:
        ImportError: pydot is not installed.
        ValueError: As `plot_probed_model`.
    """
    pydot = _pydot()
    if not results.graph:
        raise ValueError(
            "These results hold no graph of the model: those of a LinearProbeCallback and of "
            "fit_probes do. Received: results put together otherwise."
        )
    frame = results.measured(metric, epoch=epoch, split=split, target=target)
    split = frame["split"].iloc[0]
    color_of = color_scale(results, metric, split, target)
    probed = {tap.name for tap in results.taps}
    nodes = [
        node for node in results.graph
        if node.name in probed or not (condensed or node.name.endswith(":preactivation"))
    ]  # fmt: skip
    inputs = folded(results.graph, {node.name for node in nodes})
    ids = {node.name: f"n{place}" for place, node in enumerate(nodes)}
    places = {tap.name: place for place, tap in enumerate(results.taps)}

    dot = pydot.Dot(
        "probed", graph_type="digraph", rankdir="TB", nodesep="0.25",
        ranksep="0.13" if condensed else "0.3",
        label=_key(color_of, split, metric, title), labelloc="b", **_FONT,
    )  # fmt: skip
    for node in nodes:
        measured = frame["value"].get(node.name, np.nan)
        fill = color_of(measured) if np.isfinite(measured) else _PLAIN
        box = {"shape": "box", "style": "filled,rounded", "fillcolor": fill}
        box |= {"label": _label(node, in_a_line=condensed), "height": "0.25", "margin": "0.1,0.04"}
        if node.name not in probed:
            dot.add_node(pydot.Node(ids[node.name], **box, **_FONT))
            continue
        place = places[node.name]
        beside = pydot.Subgraph(f"beside_{place}", rank="same")
        beside.add_node(
            pydot.Node(ids[node.name], id=f"layer-{place}", fontcolor=ink(fill), **box, **_FONT)
        )
        text = f"{measured:.3f}" if np.isfinite(measured) else "?"
        beside.add_node(
            pydot.Node(f"p{place}", id=f"probe-{place}", shape="plain", label=text, **_FONT)
        )
        diode = {"arrowhead": "teenormal", "arrowsize": "0.8", "minlen": "1", "color": "#444444"}
        beside.add_edge(pydot.Edge(ids[node.name], f"p{place}", **diode))
        dot.add_subgraph(beside)
    for name, above in inputs.items():
        for of in above:
            dot.add_edge(pydot.Edge(ids[of], ids[name], color="#888888", weight="10"))
    return dot


def rendered(dot: "pydot.Dot", form: str) -> bytes:
    """Runs Graphviz.

    Raises:
        ImportError: It is not installed.
    """
    try:
        drawn: Any = dot.create(format=form)
    except FileNotFoundError as error:
        raise ImportError(
            "Drawing the graph needs Graphviz's program `dot`. Install it with your system's "
            "packages, such as: apt-get install graphviz, brew install graphviz, or "
            "conda install graphviz."
        ) from error
    return drawn


@dataclasses.dataclass(frozen=True)
class ColorScale:
    """Makes a colour, `#rrggbb`, of a measure: from blue, the least, over green to red, the most.

    Attributes:
        low, high: The least and the most.
    """

    low: float
    high: float

    def __call__(self, value: float) -> str:
        import matplotlib
        from matplotlib.colors import to_hex

        span = self.high - self.low
        place = (self.high - value) / span if span > 0 else 0.5
        # Its ends are too dark to write on.
        return to_hex(matplotlib.colormaps["Spectral"](0.1 + 0.8 * place))


def color_scale(results: ProbeResults, metric: str, split: str, target: str | None) -> ColorScale:
    """The colours of a measure, over all epochs."""
    values = results.history(metric, split=split, target=target).to_numpy()
    values = values[np.isfinite(values)]
    return ColorScale(values.min(), values.max()) if values.size else ColorScale(0.0, 1.0)


def ink(fill: str) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = (int(fill[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "#ffffff"


def _label(node: Node, *, in_a_line: bool) -> str:
    """HTML-like, since names may hold whatever plain labels take for something else."""
    below = html.escape(f"{node.layer}  {shape_text(node.shape)}")
    gap = "  " if in_a_line else '<BR/><FONT POINT-SIZE="3"> <BR/></FONT>'
    return f'<<B>{html.escape(node.name)}</B>{gap}<FONT POINT-SIZE="9">{below}</FONT>>'


def _key(color_of: ColorScale, split: str, metric: str, title: str) -> str:
    """The colours from the least to the most, as a table."""
    low, high = color_of.low, color_of.high
    values = np.linspace(low, high, 9)
    cells = "".join(f'<TD BGCOLOR="{color_of(value)}" WIDTH="18"> </TD>' for value in values)
    return (
        f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0"><TR><TD>{html.escape(title)}  '
        f"{split} {html.escape(metric.replace('_', ' '))} </TD><TD>{low:.3f} </TD>{cells}"
        f"<TD> {high:.3f}</TD></TR></TABLE>>"
    )


def _check_model(model: keras.Model, results: ProbeResults) -> None:
    layers = {layer.name for layer in model._flatten_layers()}
    layers |= {operation.name for operation in getattr(model, "operations", ())}
    for tap in results.taps:
        name = re.sub(r"(:preactivation|#\d+|\[\d+\])+$", "", tap.name).rsplit("/", 1)[-1]
        if tap.layer != "Input" and name not in layers:
            raise ValueError(
                f"Expected the model that was probed. Received: {model.name!r}, which has no layer "
                f"{name!r} for tap {tap.name!r}."
            )


def _pydot() -> Any:
    try:
        import pydot
    except ImportError as error:
        raise ImportError(
            "Drawing the graph needs pydot and Graphviz. Install them with: "
            'pip install "keras_probes[view]" and your system\'s packages, such as: '
            "apt-get install graphviz."
        ) from error
    return pydot
