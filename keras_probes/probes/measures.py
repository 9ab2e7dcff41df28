"""What is measured of probes: sums over examples, and error and loss from them.

In: logits, labels and weights of a batch. Out: sums that add up over batches.
"""

import math
from collections.abc import Mapping

import tensorflow as tf

METRICS = ("error", "loss", "top5_error")

# What a row of sums holds, for one tap and target, over examples.
SUMS = ("count", "wrong", "wrong_top5", "weight", "weighted_loss", "nonfinite", "unlabelled")


def measure(metric: str, sums: Mapping[str, float]) -> float:
    """Reads a metric off sums by their names in `SUMS`; NaN where nothing counts.

    Errors are shares of examples, 0 to 1; the loss is the weighted mean cross-entropy in nats.
    """
    numerator, denominator = {
        "error": ("wrong", "count"),
        "top5_error": ("wrong_top5", "count"),
        "loss": ("weighted_loss", "weight"),
    }[metric]
    return sums[numerator] / sums[denominator] if sums[denominator] else math.nan


def batch_sums(
    logits: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, finite: tf.Tensor
) -> tf.Tensor:
    """What a batch adds to the sums: float64, shape (n_taps, len(SUMS)).

    Args:
        logits: float32, shape (n_taps, batch, num_classes).
        labels: int32, shape (batch,).
        weights: float32, shape (batch,).
        finite: float32, shape (n_taps, batch).
    """
    num_classes = logits.shape[-1]
    labelled = tf.cast(labels >= 0, tf.float32)
    counts, weight = finite * labelled, finite * labelled * weights
    is_label = tf.one_hot(labels, num_classes, dtype=tf.float32)
    of_label = tf.reduce_sum(logits * is_label, axis=-1, keepdims=True)
    # Place of the label among the classes, ties by class number: as argmax would have it.
    earlier = tf.range(num_classes) < labels[:, None]
    ahead = (logits > of_label) | ((logits == of_label) & earlier)
    place = tf.reduce_sum(tf.cast(ahead, tf.float32), axis=-1)
    loss = tf.reduce_logsumexp(logits, axis=-1) - of_label[..., 0]
    columns = [
        counts,
        counts * tf.cast(place >= 1, tf.float32),
        counts * tf.cast(place >= 5, tf.float32),
        weight,
        weight * loss,
        (1.0 - finite) * labelled,
        tf.broadcast_to(1.0 - labelled, tf.shape(finite)),
    ]
    return tf.stack([tf.reduce_sum(tf.cast(c, tf.float64), axis=1) for c in columns], axis=1)
