"""What is measured of probes: sums over examples, and error and loss from them.

In: logits, labels and weights of a batch. Out: sums that add up over batches.
"""

import math
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from keras_probes.probes.targets import MISSING, WRONG

METRICS = ("error", "loss", "top5_error")
# Bits a label: the loss before each update, over the first pass through the data, is how long a
# code for the labels the probe makes while it learns (prequential; Blier & Ollivier 2018).
CODE_LENGTH = "code_length"

# What a row of sums holds, for one tap and target, over examples.
SUMS = ("count", "wrong", "wrong_top5", "weight", "weighted_loss", "nonfinite", "unlabelled")


def measure(metric: str, sums: Mapping[str, float]) -> float:
    """Reads a metric off sums by their names in `SUMS`; NaN where nothing counts.

    Errors are shares of examples, 0 to 1; the loss is the weighted mean cross-entropy in nats, and
    `CODE_LENGTH` the same in bits.
    """
    if metric == CODE_LENGTH:
        return measure("loss", sums) / math.log(2)
    numerator, denominator = {
        "error": ("wrong", "count"),
        "top5_error": ("wrong_top5", "count"),
        "loss": ("weighted_loss", "weight"),
    }[metric]
    return sums[numerator] / sums[denominator] if sums[denominator] else math.nan


def guesses(metric: str, known: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """What a metric comes to without looking at any feature.

    Args:
        metric: One of `METRICS`, or `CODE_LENGTH`.
        known: How often each class is among the labels that probes are trained on.
        counts: How often it is among those that are measured.

    Returns:
        The metric of who always answers by how frequent the classes are, and of who does not know
        even that, but which classes there are; NaN where nothing is known.
    """
    if metric == CODE_LENGTH:
        majority, chance = guesses("loss", known, counts)
        return majority / math.log(2), chance / math.log(2)
    n, classes = counts.sum(), np.count_nonzero(known + counts)
    if not n or not known.sum():
        return math.nan, math.nan
    if metric == "loss":
        with np.errstate(divide="ignore"):
            nats = -np.log(known / known.sum())
        return float(counts[counts > 0] @ nats[counts > 0] / n), math.log(classes)
    places = 5 if metric == "top5_error" else 1
    most = np.argsort(-known, kind="stable")[:places]
    return float(1 - counts[most].sum() / n), max(0.0, 1 - places / classes)


def batch_sums(
    logits: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, finite: tf.Tensor
) -> tf.Tensor:
    """What a batch adds to the sums: float64, shape (n_taps, len(SUMS)).

    Args:
        logits: float32, shape (n_taps, batch, num_classes).
        labels: int32, shape (batch,); an example with one below 0 is left out.
        weights: float32, shape (batch,).
        finite: float32, shape (n_taps, batch).
    """
    num_classes = logits.shape[-1]
    labelled = tf.cast(labels >= 0, tf.float32)
    unlabelled = (labels == MISSING) | (labels == WRONG)
    counts, weight = finite * labelled, finite * labelled * weights
    is_label = tf.one_hot(labels, num_classes, dtype=tf.float32)
    of_label = tf.reduce_sum(logits * is_label, axis=-1, keepdims=True)
    # Place of the label among the classes, ties by class number: as argmax would have it.
    earlier = tf.range(num_classes) < labels[:, None]
    above = logits - of_label
    ahead = (above > 0) | ((above == 0) & earlier)
    place = tf.reduce_sum(tf.cast(ahead, tf.float32), axis=-1)
    loss = tf.reduce_logsumexp(logits, axis=-1) - of_label[..., 0]
    columns = [
        counts,
        counts * tf.cast(place >= 1, tf.float32),
        counts * tf.cast(place >= 5, tf.float32),
        weight,
        weight * loss,
        (1.0 - finite) * labelled,
        tf.broadcast_to(tf.cast(unlabelled, tf.float32), tf.shape(finite)),
    ]
    return tf.reduce_sum(tf.cast(tf.stack(columns, axis=1), tf.float64), axis=2)
