"""Whether what a step computes has the rows of its data, in their order.

In: the x of a step's data, and tensors of the step. Out: why a row of these may belong to another
example than the same row of x, as far as the graph of the step tells.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_probes.taps.flow import SHAPE_OPS

_AXES = {"GatherV2": 2, "ReverseV2": 1, "Roll": 2, "ConcatV2": -1}  # input that holds the axes
_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})


def other_rows(x: Any, tensors: Sequence[tf.Tensor]) -> str:
    """Why the rows of tensors may not be those of x; empty where nothing speaks for it.

    Args:
        x: Structure of tensors.
        tensors: Tensors of one graph that is being built.
    """
    from_x = {id(part) for part in tf.nest.flatten(x, expand_composites=True)}
    moved: set[int] = set()
    _follow(tensors[0].graph, from_x, moved)
    if any(id(tensor) in moved for tensor in tensors):
        return "reorders, joins or mixes the examples of a batch"
    if any(id(tensor) not in from_x for tensor in tensors):
        return "runs the model on something else than the x of its data"
    return ""


def _follow(graph: tf.Graph, from_x: set[int], moved: set[int]) -> None:
    """Adds what a graph computes from x, and what has the rows of x at other places."""
    for operation in graph.get_operations():
        given, made = [id(t) for t in operation.inputs], [id(t) for t in operation.outputs]
        if operation.type in SHAPE_OPS or not from_x.intersection(given):
            continue
        if operation.type in _CALLS:
            called = graph._get_function(operation.get_attr("f").name).graph
            inputs = list(zip(given, map(id, called.inputs), strict=True))
            outputs = list(zip(map(id, called.outputs), made, strict=True))
            for known in (from_x, moved):
                known |= {own for of, own in inputs if of in known}
            _follow(called, from_x, moved)
            for known in (from_x, moved):
                known |= {of for own, of in outputs if own in known}
            continue
        if moved.intersection(given) or (given[0] in from_x and _moves_rows(operation)):
            moved.update(made)
        from_x.update(made)


def _moves_rows(operation: tf.Operation) -> bool:
    """Whether an operation takes rows of its first input to other places."""
    if operation.type in ("RandomShuffle", "GatherNd"):
        return True
    if operation.type == "StridedSlice":
        strides = tf.get_static_value(operation.inputs[3])
        return strides is not None and strides[0] < 0
    if operation.type in _AXES:
        axes = tf.get_static_value(operation.inputs[_AXES[operation.type]])
        return axes is not None and 0 in axes.reshape(-1)
    return False
