"""Positions of examples: where labels are of tokens, patches or pixels. A leaf that all may import.

In: cells of a grid. Out: what there is at them.
"""

from typing import TypeAlias

import tensorflow as tf

# Cells of a grid, int32, shape (batch, P, axes), and its sizes, (axes,).
Places: TypeAlias = tuple[tf.Tensor, tf.Tensor]


def values_at(values: tf.Tensor, places: Places) -> tf.Tensor:
    """What there is at some positions, shape (batch * P, ...).

    Args:
        values: Shape (batch, *sizes, ...); on another grid, of the cells that places fall into.
        places: Which ones.
    """
    cells, sizes = places
    axes = cells.shape[-1]
    own = tf.shape(values)[1 : 1 + axes]
    found = tf.gather_nd(values, cells * own // sizes, batch_dims=1)
    return tf.reshape(found, (-1, *values.shape[1 + axes :]))
