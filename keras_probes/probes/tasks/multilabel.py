"""Several labels for each example, each there or not, and logistic probes."""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from keras_probes.probes.tasks.ranking import (
    BINS,
    histograms,
    mean_auroc,
    mean_average_precision,
)
from keras_probes.probes.tasks.task import (
    CODE_LENGTH,
    MISSING,
    WRONG,
    Clues,
    Sums,
    Task,
    are_whole,
    mixed,
)
from keras_probes.results.schema import wilson_interval

SMOOTHING = 0.5  # examples more with and without each label
RANKED = {"mean_average_precision", "auroc"}


@dataclasses.dataclass(frozen=True)
class MultiLabel(Task):
    """Which of several labels each example has: one logistic probe for each.

    Labels are int32, shape (batch, labels): 0, 1, or why there is none.

    Attributes:
        outputs: Number of labels.
        threshold: Above which the host's output says that a label is there; `None` if unknown.
        ranked: Whether sums hold how scores rank the examples.
    """

    name: ClassVar[str] = "multilabel"
    metrics: ClassVar[tuple[str, ...]] = ("error", "loss", "mean_average_precision", "auroc")
    of_keras: ClassVar[dict[str, tuple[str, ...]]] = {
        "error": ("accuracy", "acc", "binary_accuracy")
    }
    first_pass: ClassVar[tuple[str, ...]] = (CODE_LENGTH,)
    activation: ClassVar[str] = "sigmoid"
    strict: ClassVar[bool] = True

    details: ClassVar[tuple[str, ...]] = ("answers_by_label", "wrong_by_label")

    threshold: float | None = None
    ranked: bool = False

    @classmethod
    def suits(cls, clues: Clues) -> bool:
        if clues.num_classes is not None or clues.by_loss in ("classes", "numbers"):
            return False
        if clues.by_loss == "labels":
            return clues.rows is None or are_whole(clues.rows)
        return _are_several(clues.rows)

    @classmethod
    def of(cls, clues: Clues) -> "MultiLabel | None":
        columns = clues.columns if clues.labels is not None else clues.output_columns
        if clues.labels is not None and not columns:
            raise ValueError(
                f"Expected labels of {clues.what} of shape (batch, labels), each 0 or 1. "
                f"Received: shape {tuple(clues.labels.shape)}."
            )
        if not columns:
            return None
        compared = clues.output_columns == columns and "crossentropy" in clues.loss_name
        threshold = 0.0 if getattr(clues.loss, "from_logits", False) else 0.5
        return cls(columns, threshold if compared else None)

    @property
    def about(self) -> str:
        return f"{self.outputs} labels at once"

    @property
    def none_of(self) -> str:
        return "neither 0 nor 1"

    @property
    def label_shape(self) -> tuple[int, ...]:
        return (self.outputs,)

    def labels(self, raw: tf.Tensor) -> tf.Tensor:
        raw = tf.reshape(tf.cast(raw, tf.float32), (-1, self.outputs))
        valid = (raw == 0.0) | (raw == 1.0)
        missing = (raw < 0.0) | tf.math.is_nan(raw)
        labels = tf.cast(raw, tf.int32)
        return tf.where(missing, MISSING, tf.where(valid, labels, WRONG))

    def state(self, labels: tf.Tensor) -> tf.Tensor:
        """An example is used as far as its labels are known, if any is and none is wrong."""
        wrong = tf.reduce_any(labels == WRONG, axis=1)
        return tf.where(wrong, WRONG, tf.minimum(tf.reduce_max(labels, axis=1), 0))

    def without(self, labels: tf.Tensor, which: tf.Tensor, why: int) -> tf.Tensor:
        return tf.where(which[:, None], why, labels)

    def random(self, keys: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.math.floormod(mixed(keys, self.outputs), 2), tf.int32)

    def expected(self, raw: np.ndarray | None) -> tuple[str, str]:
        values = np.asarray([] if raw is None else raw, "float64")
        return (
            "0 or 1, for each example and label; a negative one is missing",
            'They look like probabilities: round them, or pass task="regression".'
            if np.any(values != np.round(values))
            else 'Pass task="regression" for numbers, or a target= function that makes 0 and 1.',
        )

    def measuring(self, metrics: Any) -> "MultiLabel":
        return dataclasses.replace(self, ranked=not RANKED.isdisjoint(metrics))

    def untrainable(self, tally: np.ndarray) -> str:
        if np.reshape(tally, (2, -1))[1].any():
            return ""
        return "Expected training rows with one of the labels. Received: no 1 in any column"

    def lacking(self, tally: np.ndarray) -> str:
        absent = np.flatnonzero(np.reshape(tally, (2, -1))[1] == 0)
        if not len(absent):
            return ""
        shown = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
        return (
            "Expected training rows with each of the labels; leave others out with target=function "
            f"of (x, y). Received: no 1 in columns {shown} of {self.outputs}"
        )

    def predictions(self, output: Any) -> Any:
        if output is None or output.shape[1:] != [self.outputs] or self.threshold is None:
            return None
        return tf.cast(output > self.threshold, tf.int32) if tf.is_tensor(output) else output

    @property
    def sums(self) -> Sums:
        scalars = ("count", "wrong", "weight", "weighted_loss", "nonfinite", "unlabelled")
        by_label = dict.fromkeys(self.details, (self.outputs,))
        scores = {"scores": (self.outputs, 2, BINS)} if self.ranked else {}
        return {**dict.fromkeys(scalars, ()), **by_label, **scores}

    def batch_sums(
        self, outputs: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, finite: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        state = self.state(labels)
        known = tf.cast((labels >= 0) & (state == 0)[:, None], tf.float32)
        y = tf.cast(labels == 1, tf.float32)
        answers = finite[..., None] * known  # (taps, batch, labels)
        wrong = answers * tf.cast((outputs > 0) != (y > 0), tf.float32)
        loss = tf.reduce_sum(answers * (tf.math.softplus(outputs) - outputs * y), axis=2)
        labelled = tf.cast(state == 0, tf.float32)
        unlabelled = tf.cast((state == MISSING) | (state == WRONG), tf.float32)
        columns = [
            finite * labelled,
            tf.reduce_sum(wrong, axis=2),
            weights * tf.reduce_sum(answers, axis=2),
            weights * loss,
            (1.0 - finite) * labelled,
            tf.broadcast_to(unlabelled, tf.shape(finite)),
        ]
        parts = [
            tf.reduce_sum(tf.stack(columns, axis=2), axis=1),
            tf.reduce_sum(answers, axis=1),
            tf.reduce_sum(wrong, axis=1),
        ]
        if self.ranked:
            parts.append(histograms(outputs, labels == 1, answers))
        errors = tf.math.divide_no_nan(tf.reduce_sum(wrong, axis=2), tf.reduce_sum(answers, axis=2))
        return tf.cast(tf.concat(parts, axis=1), tf.float64), errors

    def measure(self, metric: str, sums: Any) -> float:
        """The error is the share of wrong answers; the loss that of an answer, in nats."""
        if metric == CODE_LENGTH:
            return self.measure("loss", sums) / math.log(2)
        if metric == "mean_average_precision":
            return mean_average_precision(sums["scores"])
        if metric == "auroc":
            return mean_auroc(sums["scores"])
        numerator, denominator = {
            "error": (sums["wrong"], np.sum(sums["answers_by_label"])),
            "loss": (sums["weighted_loss"], sums["weight"]),
        }[metric]
        return float(numerator / denominator) if denominator else math.nan

    def interval(self, metric: str, value: float, sums: Any) -> tuple[float, float]:
        """Answers to one example go together: as many are known as there are examples."""
        if metric != "error":
            return math.nan, math.nan
        return wilson_interval(value, int(sums["count"]))

    def guesses(self, metric: str, known: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
        """By how frequent each label is, and by a coin."""
        if metric == CODE_LENGTH:
            majority, chance = self.guesses("loss", known, counts)
            return majority / math.log(2), chance / math.log(2)
        known, counts = (np.reshape(tally, (2, -1)) for tally in (known, counts))
        n = counts.sum()
        if not n or not known.sum():
            return math.nan, math.nan
        if metric == "auroc":
            return 0.5, 0.5
        if metric == "mean_average_precision":
            shares = counts[1] / np.maximum(counts.sum(axis=0), 1)
            share = float(shares[counts[1] > 0].mean()) if counts[1].any() else math.nan
            return share, share
        if metric == "error":
            wrong = np.where(known[1] > known[0], counts[0], counts[1])
            return float(wrong.sum() / n), 0.5
        with np.errstate(divide="ignore", invalid="ignore"):
            nats = -np.log(known / known.sum(axis=0))
            loss = np.where(counts > 0, counts * nats, 0.0).sum() / n
        return float(loss), math.log(2)

    def host_error(self, predicted: np.ndarray, labels: np.ndarray) -> float:
        return float(np.mean((predicted != labels)[labels >= 0]))

    @property
    def guess_loss(self) -> float:
        return math.log(2)

    def tally(self, labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        counts = tf.concat([labels == 0, labels == 1], axis=1)
        return tf.matmul(tf.cast(weights, tf.float64), tf.cast(counts, tf.float64))

    @property
    def tally_size(self) -> int:
        return 2 * self.outputs

    def prior(self, tally: np.ndarray) -> np.ndarray:
        """The log odds of each label."""
        without, there = np.split(tally + SMOOTHING, 2, axis=1)
        return np.log(there / without)

    def total(self, tally: np.ndarray) -> np.ndarray:
        return tally.sum(axis=1)

    def residual(self, outputs: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return (tf.sigmoid(outputs) - tf.cast(labels == 1, outputs.dtype)) * tf.cast(
            labels >= 0, outputs.dtype
        )

    def losses(
        self, outputs: tf.Tensor, labels: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        labels = tf.transpose(labels)
        known, y = tf.cast(labels >= 0, outputs.dtype), tf.cast(labels == 1, outputs.dtype)
        p = tf.sigmoid(outputs)
        losses = tf.reduce_sum(known * (tf.math.softplus(outputs) - outputs * y), axis=1)
        return losses, known * (p - y), known * (p - p * p)


def _are_several(rows: np.ndarray | None) -> bool:
    """Whether rows at hand mark several labels of one example."""
    if rows is None or rows.shape[1] < 2:
        return False
    known = rows[np.isfinite(rows) & (rows >= 0)]
    marked = np.sum(rows == 1, axis=1)
    return bool(np.isin(known, (0, 1)).all() and np.any(marked > 1))
