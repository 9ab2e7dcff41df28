"""Whether what a step computes has the rows of its data, in their order.

In: the x of a step's data, and tensors of the step. Out: why a row of these may belong to another
example than the same row of x, as far as the graph of the step tells.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_probes.taps.graph import SHAPE_OPS

_INDEXING = {"GatherV2": 2, "ReverseV2": 1, "Roll": 2}  # input that holds the axes


def other_rows(x: Any, tensors: Sequence[tf.Tensor]) -> str:
    """Why the rows of tensors may not be those of x; empty where nothing speaks for it.

    Args:
        x: Structure of tensors.
        tensors: Tensors of one graph that is being built.
    """
    from_x = {id(part) for part in tf.nest.flatten(x, expand_composites=True)}
    moved: set[int] = set()
    for operation in tensors[0].graph.get_operations():
        given = [id(tensor) for tensor in operation.inputs]
        if operation.type in SHAPE_OPS or not from_x.intersection(given):
            continue
        made = {id(tensor) for tensor in operation.outputs}
        from_x |= made
        if moved.intersection(given) or (given[0] in from_x and _moves_rows(operation)):
            moved |= made
    if any(id(tensor) in moved for tensor in tensors):
        return "puts the examples of a batch into another order, or mixes them"
    if any(id(tensor) not in from_x for tensor in tensors):
        return "runs the model on something else than the x of its data"
    return ""


def _moves_rows(operation: tf.Operation) -> bool:
    """Whether an operation takes rows of its first input to other places."""
    if operation.type in ("RandomShuffle", "GatherNd"):
        return True
    if operation.type == "StridedSlice":
        strides = tf.get_static_value(operation.inputs[3])
        return strides is not None and strides[0] < 0
    if operation.type in _INDEXING:
        axes = tf.get_static_value(operation.inputs[_INDEXING[operation.type]])
        return axes is not None and 0 in axes.reshape(-1)
    return False
