"""How well scores rank examples, by how often they fall into narrow bins.

In: scores of examples with and without a label. Out: histograms that add up over batches, and the
average precision and area under the ROC curve that they come to: those of scikit-learn, for scores
that are rounded to the bins.
"""

import math

import numpy as np
import tensorflow as tf

BINS = 2048


def histograms(scores: tf.Tensor, there: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
    """Counts scores by bin.

    Args:
        scores: float32, shape (taps, batch, labels).
        there: Whether the example has the label, bool, shape (batch, labels).
        counts: 1 for those that count, else 0, shape (taps, batch, labels).

    Returns:
        float32, shape (taps, labels * 2 * BINS): by label, without it and with it, by bin.
    """
    taps, labels = tf.shape(scores)[0], scores.shape[2]
    # Without bounds, and the finest where most scores are.
    squeezed = scores / (1.0 + tf.abs(scores))
    place = tf.minimum(tf.cast((1.0 + squeezed) * (BINS / 2), tf.int32), BINS - 1)
    of_label = 2 * tf.range(labels) + tf.cast(there, tf.int32)
    total = labels * 2 * BINS
    segment = of_label * BINS + place + (tf.range(taps) * total)[:, None, None]
    counted = tf.math.unsorted_segment_sum(
        tf.reshape(counts, [-1]), tf.reshape(segment, [-1]), taps * total
    )
    return tf.reshape(counted, (taps, total))


def mean_average_precision(found: np.ndarray) -> float:
    """Mean over labels of the average precision, of those that are there at all.

    Args:
        found: Histograms, shape (labels, 2, BINS).
    """
    highest_first = np.cumsum(found[..., ::-1], axis=2)
    there = highest_first[:, 1]
    precision = there / np.maximum(there + highest_first[:, 0], 1)
    gained = np.diff(there, axis=1, prepend=0) / np.maximum(there[:, -1:], 1)
    of_each = np.sum(gained * precision, axis=1)[there[:, -1] > 0]
    return float(of_each.mean()) if len(of_each) else math.nan


def mean_auroc(found: np.ndarray) -> float:
    """Mean over labels of the area under the ROC curve, of those there are both kinds of."""
    without, there = found[:, 0], found[:, 1]
    below = np.cumsum(without, axis=1) - without / 2  # half of those that are level
    pairs = without.sum(axis=1) * there.sum(axis=1)
    of_each = np.sum(there * below, axis=1)[pairs > 0] / pairs[pairs > 0]
    return float(of_each.mean()) if len(of_each) else math.nan
