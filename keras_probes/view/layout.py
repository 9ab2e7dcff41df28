"""Where each probed layer stands: the host's graph, with nothing in it but what is probed.

In: the graph in a `ProbeResults`. Out: a `Layout`, from which figures, findings and the report
know what follows what, what stands beside what, and which way is the trunk.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import Node


@dataclasses.dataclass(frozen=True)
class Layout:
    """The probed layers of a host.

    Attributes:
        inputs: By tap, in graph order, the taps before it: those from which it is computed with no
            other tap between.
        columns: Number of taps on the longest way from the beginning to each, which puts parallel
            branches beside each other.
        trunk: The longest way to the tap that is deepest, which is the main output's.
    """

    inputs: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, int]
    trunk: tuple[str, ...]

    @property
    def edges(self) -> list[tuple[str, str]]:
        """Pairs of a tap and one that follows it."""
        return [(above, tap) for tap, inputs in self.inputs.items() for above in inputs]

    @property
    def ends(self) -> list[str]:
        """The taps that none follows: that of the main output, and those of other heads."""
        followed = {above for above, _ in self.edges}
        return [tap for tap in self.inputs if tap not in followed]


def layout_of(results: ProbeResults) -> Layout:
    """Lays out the taps of results; those of a record without a graph follow each other."""
    names = [tap.name for tap in results.taps]
    known = {node.name for node in results.graph}
    if known.issuperset(names):
        inputs = _without_detours(folded(results.graph, names))
    else:
        inputs = {name: tuple(names[place - 1 : place]) for place, name in enumerate(names)}
    columns: dict[str, int] = {}
    for name, above in inputs.items():
        columns[name] = max((columns[of] + 1 for of in above), default=0)
    trunk = [max(reversed(names), key=columns.__getitem__)] if names else []
    while trunk and inputs[trunk[-1]]:
        trunk.append(max(inputs[trunk[-1]], key=columns.__getitem__))
    return Layout(inputs, columns, tuple(reversed(trunk)))


def thinned(count: int, most: int) -> list[int]:
    """Places of layers to show: all, or evenly spaced ones with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def folded(graph: Sequence[Node], kept: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Leaves nodes out of a graph: the nearest nodes above each of those that are kept."""
    nearest: dict[str, dict[str, None]] = {}
    for node in graph:
        nearest[node.name] = {}
        for above in node.inputs:
            nearest[node.name].update({above: None} if above in kept else nearest[above])
    return {node.name: tuple(nearest[node.name]) for node in graph if node.name in kept}


def _without_detours(inputs: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Leaves out an edge where there is a longer way as well, as beside a skip connection."""
    before: dict[str, set[str]] = {}  # all there is above
    for name, above in inputs.items():
        before[name] = {*above, *(far for of in above for far in before[of])}
    return {
        name: tuple(of for of in above if not any(of in before[other] for other in above))
        for name, above in inputs.items()
    }
