"""What the replicas of a host found, put together in each of them.

In: a tensor a replica. Out: their sum or maximum, the same in all. Without a strategy, the tensor.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf


def sum_over_replicas(value: tf.Tensor) -> tf.Tensor:
    """The sum of a value over all replicas of the host, in each of them."""
    return _over_replicas(value, tf.add_n)


def max_over_replicas(value: tf.Tensor) -> tf.Tensor:
    """The largest of a value over all replicas of the host, element by element."""
    return _over_replicas(value, lambda values: tf.reduce_max(tf.stack(values), axis=0))


def _over_replicas(
    value: tf.Tensor, combine: Callable[[Sequence[tf.Tensor]], tf.Tensor]
) -> tf.Tensor:
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return value
    # Not `all_reduce`: where a host's step has one already, TensorFlow mixes up several.
    return context.merge_call(
        lambda strategy, of_each: combine(strategy.experimental_local_results(of_each)),
        args=(value,),
    )
