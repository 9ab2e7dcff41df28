"""One class for each example, and softmax probes (paper, section 3.2)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from keras_probes.probes.tasks.ranking import BINS, histograms, mean_auroc
from keras_probes.probes.tasks.task import (
    CODE_LENGTH,
    MISSING,
    WRONG,
    Clues,
    Sums,
    Task,
    are_one_hot,
    are_whole,
)
from keras_probes.results.schema import wilson_interval

SMOOTHING = 0.5  # examples more of each class: the log of none is nothing to begin at
NO_LABEL = 255.0  # of labels that are bytes, as data sets of segmentation have it
BY_CLASS = ("labelled", "right", "answered")  # examples of each class
MOST_CONFUSED = 100  # classes: of more, the sums are not by class and answer
UNSEEN = -1e9  # the bias of a class without examples, where it is never to be predicted


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """One of several classes for each example.

    Labels are int32, shape (batch,): a class, or why there is none.

    Attributes:
        outputs: Number of classes, at least 2.
        ignored: The label of examples without one, beside numbers below 0, NaN, and 255 of bytes.
        signed: Whether labels are -1 and 1, as a hinge loss takes them.
        whole: Whether a class without training examples is never predicted. Its examples count as
            errors, and not in the loss.
        by_class: Whether sums are by class besides.
        ranked: Whether they hold how the scores of two classes rank the examples.
    """

    name: ClassVar[str] = "classification"
    metrics: ClassVar[tuple[str, ...]] = (
        "error", "loss", "top5_error", "balanced_error", "mean_iou", "auroc"
    )  # fmt: skip
    of_keras: ClassVar[dict[str, tuple[str, ...]]] = {
        "error": ("accuracy", "acc", "sparse_categorical_accuracy", "categorical_accuracy")
    }
    first_pass: ClassVar[tuple[str, ...]] = (CODE_LENGTH,)
    activation: ClassVar[str] = "softmax"

    ignored: int | None = None
    signed: bool = False
    whole: bool = False
    by_class: bool = False
    ranked: bool = False

    details: ClassVar[tuple[str, ...]] = ("confusion", *BY_CLASS)

    @classmethod
    def suits(cls, clues: Clues) -> bool:
        if clues.num_classes is not None:
            return True
        rows, of_loss = clues.rows, clues.by_loss
        if cls._count(clues) is None or of_loss == "labels":
            return False
        if of_loss == "numbers":
            # Two values, and one-hot rows, are classes as well.
            return rows is not None and (are_one_hot(rows) or set(np.unique(rows)) <= {0, 1})
        if of_loss is None and rows is not None:
            return are_one_hot(rows) if rows.shape[1] > 1 else are_whole(rows)
        return True

    @classmethod
    def of(cls, clues: Clues) -> "Classification | None":
        count = clues.num_classes if clues.num_classes is not None else cls._count(clues)
        if count is None:
            return None
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 2:
            raise ValueError(
                "A probe needs at least 2 classes to tell apart, given as an integer. "
                f"Received: num_classes={count!r} for {clues.what}."
            )
        labels = clues.labels
        if labels is not None and clues.columns not in (1, count):
            shape = tuple(labels.shape) if labels.shape.rank else labels.shape
            raise ValueError(
                f"Expected labels of {clues.what} as integers of shape (batch,) or (batch, 1), or "
                f"one-hot of shape (batch, {count}). Received: shape {shape}."
            )
        return cls(int(count), getattr(clues.loss, "ignore_class", None), _is_hinge(clues))

    @staticmethod
    def _count(clues: Clues) -> int | None:
        """The number of classes, by what tells it. One column is of two classes."""
        if (clues.columns or 0) > 1:
            return clues.columns
        if _is_hinge(clues):
            return 2
        # A binary cross-entropy over several columns is of several labels, not of classes.
        columns, loss = clues.output_columns, clues.loss_name
        if columns and "crossentropy" in loss and ("binary" not in loss or columns == 1):
            return max(columns, 2)
        if clues.n_names is not None:
            return clues.n_names
        rows = clues.rows
        known = rows[np.isfinite(rows) & (rows >= 0)] if rows is not None else np.zeros(0)
        return max(int(known.max()) + 1, 2) if len(known) else None

    @property
    def about(self) -> str:
        return f"{self.outputs} classes"

    @property
    def none_of(self) -> str:
        return f"none of the classes 0 to {self.outputs - 1}"

    def labels(self, raw: tf.Tensor) -> tf.Tensor:
        if raw.shape.rank == 2 and raw.shape[1] > 1:
            total = tf.reduce_sum(tf.cast(raw, tf.float32), axis=1)
            missing = (total == 0.0) | tf.math.is_nan(total)
            # Rounding and label smoothing keep the sum at 1; several marked classes do not.
            valid = tf.abs(total - 1.0) < 1e-2
            labels = tf.argmax(raw, axis=1, output_type=tf.int32)
        else:
            flat = tf.cast(tf.reshape(raw, (-1,)), tf.float32)
            if self.signed:  # Keras takes 0 for -1 as well
                flat = tf.where(flat == -1.0, 0.0, flat)
            missing = (flat < 0) | tf.math.is_nan(flat)
            if self.ignored is not None:
                missing |= flat == float(self.ignored)
            if raw.dtype == tf.uint8 and self.outputs <= NO_LABEL:
                missing |= flat == NO_LABEL
            valid = (flat < self.outputs) & (tf.round(flat) == flat)
            labels = tf.cast(flat, tf.int32)
        return tf.where(missing, MISSING, tf.where(valid, labels, WRONG))

    def state(self, labels: tf.Tensor) -> tf.Tensor:
        return tf.minimum(labels, 0)

    def without(self, labels: tf.Tensor, which: tf.Tensor, why: int) -> tf.Tensor:
        return tf.where(which, why, labels)

    def random(self, keys: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.math.floormod(keys, self.outputs), tf.int32)

    def expected(self, raw: np.ndarray | None) -> tuple[str, str]:
        return (
            f"integers from 0 to {self.outputs - 1}, or one-hot rows that sum to 1; a negative one "
            "is missing",
            _likely_reason(raw, self.outputs),
        )

    @property
    def measurable(self) -> tuple[str, ...]:
        return tuple(of for of in self.metrics if of != "auroc" or self.outputs == 2)

    def measuring(self, metrics: Sequence[str]) -> "Classification":
        by_class = not {"balanced_error", "mean_iou"}.isdisjoint(metrics)
        ranked = "auroc" in metrics and self.outputs == 2
        return dataclasses.replace(self, by_class=by_class, ranked=ranked)

    def for_evaluation(self) -> "Classification":
        return dataclasses.replace(self, by_class=True)

    def of_all(self) -> "Classification":
        return dataclasses.replace(self, whole=True)

    def untrainable(self, tally: np.ndarray) -> str:
        seen = np.count_nonzero(tally)
        if seen >= 2:
            return ""
        return f"Expected training rows of at least 2 classes. Received: {seen}"

    def lacking(self, tally: np.ndarray) -> str:
        unseen = np.flatnonzero(tally == 0)
        if not len(unseen):
            return ""
        shown = ", ".join(map(str, unseen[:10])) + (", ..." if len(unseen) > 10 else "")
        return (
            f"{len(unseen)} of {self.outputs} classes have no training row: {shown}. The "
            "probe never predicts them; their examples count as errors, and not in the loss."
        )

    def predictions(self, output: Any) -> Any:
        if output is None or output.shape[1:] != [self.outputs]:
            return None
        return tf.argmax(output, axis=1, output_type=tf.int32) if tf.is_tensor(output) else output

    @property
    def sums(self) -> Sums:
        errors, loss = ("count", "wrong", "wrong_top5"), ("weight", "weighted_loss")
        scalars = dict.fromkeys((*errors, *loss, "nonfinite", "unlabelled"), ())
        by_class: Sums = dict.fromkeys(BY_CLASS, (self.outputs,)) if self.by_class else {}
        if self.by_class and self.outputs <= MOST_CONFUSED:
            by_class = {"confusion": (self.outputs, self.outputs)}
        return {**scalars, **by_class, **({"scores": (1, 2, BINS)} if self.ranked else {})}

    def batch_sums(
        self, outputs: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, finite: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        labelled = tf.cast(labels >= 0, tf.float32)
        unlabelled = (labels == MISSING) | (labels == WRONG)
        counts, weight = finite * labelled, finite * labelled * weights
        is_label = tf.one_hot(labels, self.outputs, dtype=tf.float32)
        of_label = tf.reduce_sum(outputs * is_label, axis=-1, keepdims=True)
        # Place of the label among the classes, ties by class number: as argmax would have it.
        earlier = tf.range(self.outputs) < labels[:, None]
        above = outputs - of_label
        ahead = (above > 0) | ((above == 0) & earlier)
        place = tf.reduce_sum(tf.cast(ahead, tf.float32), axis=-1)
        loss = tf.reduce_logsumexp(outputs, axis=-1) - of_label[..., 0]
        if self.whole:
            weight = tf.where(loss < -UNSEEN / 2, weight, 0.0)
        wrong = tf.cast(place >= 1, tf.float32)
        columns = [
            counts,
            counts * wrong,
            counts * tf.cast(place >= 5, tf.float32),
            weight,
            weight * loss,
            (1.0 - finite) * labelled,
            tf.broadcast_to(tf.cast(unlabelled, tf.float32), tf.shape(finite)),
        ]
        parts = [tf.reduce_sum(tf.cast(tf.stack(columns, axis=1), tf.float64), axis=2)]
        if self.by_class:
            answers = tf.argmax(outputs, axis=-1, output_type=tf.int32)
            parts += self._by_class(answers, labels, counts)
        if self.ranked:
            score, there = outputs[..., 1:] - outputs[..., :1], labels[:, None] == 1
            parts.append(histograms(score, there, counts[..., None]))
        return tf.concat([tf.cast(part, tf.float64) for part in parts], axis=1), wrong

    def _by_class(
        self, answers: tf.Tensor, labels: tf.Tensor, counts: tf.Tensor
    ) -> list[tf.Tensor]:
        """Sums by class; by class and answer, where these are few enough.

        Args:
            answers: The classes that probes say, int32, shape (taps, batch).
            labels: Shape (batch,).
            counts: Shape (taps, batch).
        """
        labels = tf.broadcast_to(tf.maximum(labels, 0), tf.shape(answers))
        if self.outputs <= MOST_CONFUSED:
            return [_counted(labels * self.outputs + answers, counts, self.outputs**2)]
        hits = counts * tf.cast(answers == labels, tf.float32)
        each = ((labels, counts), (labels, hits), (answers, counts))
        return [_counted(which, of, self.outputs) for which, of in each]

    def measure(self, metric: str, sums: Mapping[str, Any]) -> float:
        """Errors are shares of examples, 0 to 1; the loss is the weighted mean cross-entropy in
        nats, and `CODE_LENGTH` the same in bits.
        """
        if metric == CODE_LENGTH:
            return self.measure("loss", sums) / math.log(2)
        if metric == "auroc":
            return mean_auroc(sums["scores"]) if self.ranked else math.nan
        if metric in ("balanced_error", "mean_iou"):
            labelled, hit, answered = by_class(sums)
            there = labelled > 0 if metric == "balanced_error" else labelled + answered > 0
            whole = labelled if metric == "balanced_error" else labelled + answered - hit
            shares = hit[there] / whole[there]
            mean = float(shares.mean()) if len(shares) else math.nan
            return 1.0 - mean if metric == "balanced_error" else mean
        numerator, denominator = {
            "error": ("wrong", "count"),
            "top5_error": ("wrong_top5", "count"),
            "loss": ("weighted_loss", "weight"),
        }[metric]
        return sums[numerator] / sums[denominator] if sums[denominator] else math.nan

    def host_error(self, predicted: np.ndarray, labels: np.ndarray) -> float:
        return float(np.mean((predicted != labels)[labels >= 0]))

    def interval(self, metric: str, value: float, sums: Mapping[str, Any]) -> tuple[float, float]:
        if metric not in ("error", "top5_error"):
            return math.nan, math.nan
        return wilson_interval(value, int(sums["count"]))

    def guesses(self, metric: str, known: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
        """By how frequent the classes are, and by which classes there are."""
        if metric == CODE_LENGTH:
            majority, chance = self.guesses("loss", known, counts)
            return majority / math.log(2), chance / math.log(2)
        n, classes = counts.sum(), np.count_nonzero(known + counts)
        if not n or not known.sum():
            return math.nan, math.nan
        if metric == "auroc":
            return 0.5, 0.5
        present = np.count_nonzero(counts)
        if metric == "balanced_error":
            return 1 - 1 / present, 1 - 1 / classes
        if metric == "mean_iou":
            often = counts[np.argmax(known)]
            return float(often / n / (present + (often == 0))), math.nan
        if metric == "loss":
            with np.errstate(divide="ignore"):
                nats = -np.log(known / known.sum())
            return float(counts[counts > 0] @ nats[counts > 0] / n), math.log(classes)
        places = 5 if metric == "top5_error" else 1
        most = np.argsort(-known, kind="stable")[:places]
        return float(1 - counts[most].sum() / n), max(0.0, 1 - places / classes)

    @property
    def guess_loss(self) -> float:
        return math.log(self.outputs)

    def tally(self, labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        by_row = tf.transpose(tf.cast(weights, tf.float64))
        return tf.transpose(tf.math.unsorted_segment_sum(by_row, labels, self.outputs))

    @property
    def tally_size(self) -> int:
        return self.outputs

    def prior(self, tally: np.ndarray) -> np.ndarray:
        """The log of the class frequencies."""
        counts = tally + SMOOTHING
        prior = np.log(counts / counts.sum(axis=1, keepdims=True))
        return np.where(self.whole & (tally == 0), UNSEEN, prior)

    def total(self, tally: np.ndarray) -> np.ndarray:
        return tally.sum(axis=1)

    def residual(self, outputs: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return tf.nn.softmax(outputs) - tf.one_hot(labels, self.outputs, dtype=outputs.dtype)

    def losses(
        self, outputs: tf.Tensor, labels: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        is_label = tf.one_hot(labels, self.outputs, axis=0, dtype=outputs.dtype)
        # By hand: TensorFlow's cross-entropy would find the exponentials a second time.
        outputs -= tf.reduce_max(outputs, axis=1, keepdims=True)
        p = tf.exp(outputs)
        total = tf.reduce_sum(p, axis=1, keepdims=True)
        p /= total
        losses = tf.math.log(total[:, 0]) - tf.reduce_sum(outputs * is_label, axis=1)
        return losses, p - is_label, p - p * p


def by_class(sums: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many examples each class has, are right, and are said to be of it, shape (classes,)."""
    if "confusion" in sums:
        confusion = sums["confusion"]
        return confusion.sum(axis=1), np.diagonal(confusion), confusion.sum(axis=0)
    labelled, hit, answered = (sums[name] for name in BY_CLASS)
    return labelled, hit, answered


def _counted(which: tf.Tensor, counts: tf.Tensor, size: int) -> tf.Tensor:
    """How much of `counts`, shape (taps, batch), is of each of `size` kinds: (taps, size)."""
    taps = tf.shape(which)[0]
    segment = which + (tf.range(taps) * size)[:, None]
    of_all = tf.math.unsorted_segment_sum(
        tf.reshape(counts, [-1]), tf.reshape(segment, [-1]), taps * size
    )
    return tf.reshape(of_all, (taps, size))


def _is_hinge(clues: Clues) -> bool:
    """Whether the loss takes -1 and 1 for two classes."""
    return "hinge" in clues.loss_name and "categorical" not in clues.loss_name


def _likely_reason(raw: Any, num_classes: int) -> str:
    """A guess at why labels are not what was expected, and what to do."""
    values = np.asarray(raw if raw is not None else [], "float64")
    if values.ndim == 2 and values.shape[1] > 1:
        return (
            "Rows mark several classes or add up to something else: pass a target= function that "
            "picks one class per example."
        )
    if np.any(values != np.round(values)):
        return (
            "They look like numbers to predict, as of a regression: pass a target= function that "
            "puts them into classes."
        )
    if values.size and np.nanmin(values) == 1 and np.nanmax(values) == num_classes:
        return "They seem to start at 1: use y - 1."
    return "Pass num_classes= if there are more classes, or a target= function that picks one."
