"""How much a forward pass computes: the multiplications of its products and convolutions.

In: a traced graph. Out: a number. It is a matter of shapes alone, so that it is the same on every
machine.
"""

import math
from collections.abc import Iterable

import tensorflow as tf


def multiplications(operations: Iterable[tf.Operation]) -> int:
    """Number of multiplications of the products and convolutions whose shapes are known."""
    return sum(_of_operation(operation) for operation in operations)


def _of_operation(operation: tf.Operation) -> int:
    kind = operation.type
    if kind == "Einsum":
        return _of_einsum(operation)
    if kind == "MatMul" or kind.startswith("BatchMatMul"):
        transposed = operation.get_attr("transpose_a" if kind == "MatMul" else "adj_x")
        inner = operation.inputs[0].shape.as_list()[-2 if transposed else -1]
        return _size(operation.outputs[0]) * (inner or 0)
    if kind in ("Conv2D", "Conv3D", "DepthwiseConv2dNative"):
        kernel = operation.inputs[1].shape.as_list()
        inner = kernel[:-2] if kind.startswith("Depthwise") else kernel[:-1]
        return _size(operation.outputs[0]) * math.prod(size or 0 for size in inner)
    if kind in ("Conv2DBackpropInput", "Conv3DBackpropInputV2"):  # transposed convolutions
        kernel = operation.inputs[1].shape.as_list()
        return _size(operation.inputs[2]) * math.prod(size or 0 for size in kernel[:-1])
    return 0


def _of_einsum(operation: tf.Operation) -> int:
    """The product of the sizes of all axes that the equation names."""
    terms = operation.get_attr("equation").decode().split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, operation.inputs, strict=True):
        shape = tensor.shape.as_list() if tensor.shape.rank is not None else []
        hidden = len(shape) - len(term.replace("...", ""))
        term = term.replace("...", "".join(map(chr, range(0x100, 0x100 + hidden))))
        sizes.update({axis: size or 0 for axis, size in zip(term, shape, strict=False)})
    return math.prod(sizes.values())


def _size(tensor: tf.Tensor) -> int:
    return tensor.shape.num_elements() or 0
