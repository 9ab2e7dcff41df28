"""The flow of data through a traced graph: what depends on what, and what every path runs through.

In: a `tf.Graph`, and tensors of it. Out: depths, neighbours, masks and cut points.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import tensorflow as tf

# Operations that read how large a tensor is, not what it holds: no path of data.
SHAPE_OPS = frozenset({"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"})
# Operations whose output holds the values of their first input, moved, padded or retyped.
_SAME_VALUE_OPS = frozenset(
    {"Cast", "ExpandDims", "Identity", "IdentityN", "MirrorPad", "Pad", "PadV2", "PreventGradient"}
    | {"Reshape", "Snapshot", "Squeeze", "StopGradient", "Transpose"}
)


class Flow:
    """The flow of data through a traced graph, from the host's input on.

    Args:
        graph: The graph.
        sources: Tensors of the host's input.
        masks: Ids of tensors that are masks: what to leave out, not what there is.
    """

    def __init__(self, graph: tf.Graph, sources: list[tf.Tensor], masks: set[int]):
        self._operations = graph.get_operations()  # in topological order
        self._sources = sources
        self._masks = masks

    def _above(self, tensor: tf.Tensor) -> Iterator[tf.Tensor]:
        """The tensors whose values an operation's output depends on, shapes and masks apart."""
        if tensor.op.type not in SHAPE_OPS:
            yield from (t for t in _inputs_of(tensor) if id(t) not in self._masks)

    def depths(self, recorded: Iterable[tf.Tensor]) -> dict[int, int]:
        """Longest path from an input, counted in recorded tensors, for each tensor that has one."""
        is_recorded = {id(t) for t in recorded}
        depths = {id(t): 0 for t in self._sources}
        for operation in self._operations:
            for tensor in operation.outputs:
                above = [depths[id(t)] for t in self._above(tensor) if id(t) in depths]
                if above:
                    depths.setdefault(id(tensor), max(above) + (id(tensor) in is_recorded))
        return depths

    def above(self, recorded: Iterable[tf.Tensor]) -> dict[int, list[int]]:
        """For each recorded tensor, those that it is computed from, none of them between."""
        is_recorded = {id(t) for t in recorded}
        nearest: dict[int, dict[int, None]] = {id(t): {} for t in self._sources}
        for operation in self._operations:
            for tensor in operation.outputs:
                found = nearest.setdefault(id(tensor), {})
                for t in self._above(tensor):
                    found.update({id(t): None} if id(t) in is_recorded else nearest[id(t)])
        return {key: list(nearest[key]) for key in is_recorded}

    def masks(self, noted: Mapping[int, tf.Tensor]) -> dict[int, dict[int, tf.Tensor]]:
        """For each tensor its own mask, or those of the tensors it is computed from.

        Args:
            noted: Masks by the id of their tensor.

        Returns:
            By the id of a tensor, masks by their own id; for tensors that have any.
        """
        found = {id(t): {id(noted[id(t)]): noted[id(t)]} for t in self._sources if id(t) in noted}
        for operation in self._operations:
            for tensor in operation.outputs:
                of: dict[int, tf.Tensor] = {}
                for above in self._above(tensor):
                    of |= found.get(id(above), {})
                if id(tensor) in noted:
                    of = {id(noted[id(tensor)]): noted[id(tensor)]}
                if of:
                    found[id(tensor)] = of
        return found

    def cut_points(self, output: tf.Tensor) -> set[int]:
        """The tensors that every path of data from the sources to `output` runs through.

        Tensors on such a path are laid out in topological order. One of them is a cut exactly where
        no edge jumps over its position: a path that jumps u -> w over v reaches the output without
        v, and a path that avoids v has to jump over it somewhere.
        """
        needed = {id(output)}
        for operation in reversed(self._operations):
            for tensor in operation.outputs:
                if id(tensor) in needed:
                    needed.update(id(t) for t in self._above(tensor))

        positions = {id(t): place for place, t in enumerate(self._sources) if id(t) in needed}
        edges = [(-1, position) for position in positions.values()]
        for operation in self._operations:
            for tensor in operation.outputs:
                above = [positions[id(t)] for t in self._above(tensor) if id(t) in positions]
                if above and id(tensor) in needed and id(tensor) not in positions:
                    positions[id(tensor)] = len(positions) + len(self._sources)
                    edges += [(start, positions[id(tensor)]) for start in above]

        jumps: dict[int, int] = defaultdict(int)  # change in the number of edges overhead
        for start, end in edges:
            jumps[start + 1] += 1
            jumps[end] -= 1
        cuts, overhead, last = set(), 0, -1
        for tensor_id, position in sorted(positions.items(), key=lambda item: item[1]):
            overhead += sum(jumps[p] for p in range(last + 1, position + 1))
            last = position
            if overhead == 0:
                cuts.add(tensor_id)
        return cuts


def _inputs_of(tensor: tf.Tensor) -> Sequence[tf.Tensor]:
    """What an operation makes `tensor` of."""
    if tensor.op.type == "IdentityN":  # how a custom gradient ends, as under a RematScope
        return (tensor.op.inputs[tensor.value_index],)
    return tensor.op.inputs


def root_of(tensor: tf.Tensor, repeats: Mapping[int, tf.Tensor]) -> int:
    """Identifies the tensor whose values `tensor` repeats, perhaps in another shape or scale."""
    while id(tensor) in repeats or tensor.op.type in _SAME_VALUE_OPS:
        same = repeats.get(id(tensor))
        tensor = _inputs_of(tensor)[0] if same is None else same
    return id(tensor)
