"""Numbers to predict, and linear least squares."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

from keras_probes.probes.tasks.task import (
    MISSING,
    PRIME,
    WEIGHTLESS,
    WRONG,
    Clues,
    Sums,
    Task,
    are_one_hot,
    are_whole,
    mixed,
)
from keras_probes.results.schema import Z_95

CODES = {MISSING: math.nan, WRONG: math.inf, WEIGHTLESS: -math.inf}


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """One number for each example, or several: a linear least squares probe.

    Labels are float32, shape (batch, outputs). The loss is half the mean squared error of labels
    that have mean 0 and variance 1, which `scale` makes of them.

    Attributes:
        outputs: Number of numbers.
        spread: Of each, in its own units: what `mse` and `mae` are measured in.
    """

    name: ClassVar[str] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ("error", "loss", "mse", "mae")
    of_keras: ClassVar[dict[str, tuple[str, ...]]] = {
        "mse": ("mse", "mean_squared_error"),
        "mae": ("mae", "mean_absolute_error"),
    }
    activation: ClassVar[str] = "linear"
    label_dtype: ClassVar[str] = "float32"
    scaled: ClassVar[bool] = True
    strict: ClassVar[bool] = True

    spread: tuple[float, ...] = (1.0,)

    @classmethod
    def suits(cls, clues: Clues) -> bool:
        rows = clues.rows
        if clues.num_classes is not None or (rows is not None and are_one_hot(rows)):
            return False
        if clues.by_loss is None:
            return rows is not None and not are_whole(rows)
        # A binary cross-entropy of what is neither 0 nor 1, as of an autoencoder, is of numbers.
        numbers = clues.by_loss == "labels" and rows is not None and not are_whole(rows)
        return numbers or clues.by_loss == "numbers"

    @classmethod
    def of(cls, clues: Clues) -> "Regression | None":
        columns = clues.columns if clues.labels is not None else clues.output_columns
        if columns:
            return cls(columns)
        if clues.labels is None:
            return None
        raise ValueError(
            f"Expected labels of {clues.what} of shape (batch,) or (batch, numbers). "
            f"Received: shape {tuple(clues.labels.shape)}."
        )

    @property
    def about(self) -> str:
        return "a number" if self.outputs == 1 else f"{self.outputs} numbers"

    @property
    def none_of(self) -> str:
        return "not finite"

    @property
    def label_shape(self) -> tuple[int, ...]:
        return (self.outputs,)

    def labels(self, raw: tf.Tensor) -> tf.Tensor:
        labels = tf.reshape(tf.cast(raw, tf.float32), (-1, self.outputs))
        wrong = tf.reduce_any(tf.math.is_inf(labels), axis=1)
        return self.without(labels, wrong, WRONG)

    def state(self, labels: tf.Tensor) -> tf.Tensor:
        first = labels[:, 0]
        missing = tf.reduce_any(tf.math.is_nan(labels), axis=1)
        state = tf.where(first == math.inf, WRONG, tf.where(first == -math.inf, WEIGHTLESS, 0))
        return tf.where(missing, MISSING, state)

    def without(self, labels: tf.Tensor, which: tf.Tensor, why: int) -> tf.Tensor:
        return tf.where(which[:, None], CODES[why], labels)

    def random(self, keys: tf.Tensor) -> tf.Tensor:
        """Spread evenly from 0 to 1."""
        return tf.cast(mixed(keys, self.outputs) / PRIME, tf.float32)

    def expected(self, raw: np.ndarray | None) -> tuple[str, str]:  # noqa: ARG002
        return ("finite numbers; NaN is missing", "Infinite ones can't be predicted.")

    def scale_of(self, labels: np.ndarray) -> np.ndarray | None:
        known = labels[np.isfinite(labels).all(axis=1)].astype("float64")
        if len(known) < 2 or not known.std(axis=0).all():
            return None
        return np.stack([known.mean(axis=0), known.std(axis=0)])

    def rescaled(self, tally: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
        """A tally of standardised labels, shape (m,), after their scale has changed."""
        (n,), total, squares = np.split(tally, [1, 1 + self.outputs])
        factor, shift = old[1] / new[1], (old[0] - new[0]) / new[1]
        moved = factor**2 * squares + 2 * factor * shift * total + n * shift**2
        return np.concatenate([[n], factor * total + n * shift, moved])

    def in_units(self, scale: np.ndarray) -> "Regression":
        return dataclasses.replace(self, spread=tuple(scale[1].tolist()))

    def standardised(self, labels: Any, scale: Any) -> Any:
        return (labels - scale[0]) / scale[1]

    def untrainable(self, tally: np.ndarray) -> str:
        n, total, squares = np.split(tally, [1, 1 + self.outputs])
        variance = squares / np.maximum(n, 1) - (total / np.maximum(n, 1)) ** 2
        if n and np.all(variance > 1e-12 * squares / n):
            return ""
        constant = np.flatnonzero(~(variance > 1e-12 * squares / np.maximum(n, 1)))
        which = f" in columns {', '.join(map(str, constant))}" if self.outputs > 1 else ""
        return f"Expected training rows with different numbers. Received: one and the same{which}"

    def lacking(self, tally: np.ndarray) -> str:  # noqa: ARG002
        return ""

    def predictions(self, output: Any) -> Any:
        if (
            output is None
            or output.shape.rank not in (1, 2)
            or (output.shape.rank == 2 and output.shape[1] != self.outputs)
        ):
            return None
        if not tf.is_tensor(output):
            return output
        return tf.reshape(tf.cast(output, tf.float32), (-1, self.outputs))

    @property
    def sums(self) -> Sums:
        scalars = ("count", "weight", "weighted_loss", "nonfinite", "unlabelled")
        spread = ("loss", "loss2", "variance", "variance2", "loss_variance")
        by_output = ("squared", "absolute", "labels", "labels2")
        return {
            **dict.fromkeys((*scalars, *spread), ()),
            **dict.fromkeys(by_output, (self.outputs,)),
        }

    def batch_sums(
        self, outputs: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, finite: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        state = self.state(labels)
        labelled = tf.cast(state == 0, tf.float32)
        unlabelled = tf.cast((state == MISSING) | (state == WRONG), tf.float32)
        counts = finite * labelled  # (taps, batch)
        y = _known(labels)
        residual = outputs - y
        loss = tf.reduce_mean(tf.square(residual), axis=2) / 2
        variance = tf.reduce_mean(tf.square(y), axis=1)
        columns = [
            counts,
            self.outputs * weights * counts,
            self.outputs * weights * counts * loss,
            (1.0 - finite) * labelled,
            tf.broadcast_to(unlabelled, tf.shape(finite)),
            counts * loss,
            counts * tf.square(loss),
            counts * variance,
            counts * tf.square(variance),
            counts * loss * variance,
        ]
        of_outputs = [tf.square(residual), tf.abs(residual), y[None], tf.square(y)[None]]
        parts = [
            tf.stack(columns, axis=2),
            *(counts[..., None] * of_each for of_each in of_outputs),
        ]
        return tf.reduce_sum(tf.cast(tf.concat(parts, axis=2), tf.float64), axis=1), 2.0 * loss

    def measure(self, metric: str, sums: Mapping[str, Any]) -> float:
        """The error is the share of variance left unexplained, 1 - R² (mean over the numbers).

        `mse` and `mae` are in the labels' own units, `loss` is that of standardised labels.
        """
        n = sums["count"]
        if not n:
            return math.nan
        if metric == "loss":
            return sums["weighted_loss"] / sums["weight"] if sums["weight"] else math.nan
        if metric == "error":
            return _unexplained(sums["squared"], n, sums["labels"], sums["labels2"])
        spread = np.array(self.spread)
        if metric == "mse":
            return float(np.mean(spread**2 * sums["squared"] / n))
        return float(np.mean(spread * sums["absolute"] / n))

    def interval(self, metric: str, value: float, sums: Mapping[str, Any]) -> tuple[float, float]:
        """By how much squared errors and labels vary, as a ratio of two means (delta method)."""
        n, loss, variance = sums["count"], sums["loss"], sums["variance"]
        if metric != "error" or n < 2 or not (loss > 0 and variance > 0):
            return math.nan, math.nan
        # Squares of the coefficients of variation, and what both have in common.
        of_loss = n * sums["loss2"] / loss**2 - 1
        of_variance = n * sums["variance2"] / variance**2 - 1
        together = n * sums["loss_variance"] / (loss * variance) - 1
        half = Z_95 * value * math.sqrt(max(of_loss + of_variance - 2 * together, 0.0) / (n - 1))
        return max(0.0, value - half), value + half

    def guesses(self, metric: str, known: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
        """By the mean of the labels; nothing is known of who does not know that."""
        (n_known,), mean, _ = np.split(known, [1, 1 + self.outputs])
        (n,), total, squares = np.split(counts, [1, 1 + self.outputs])
        if not n or not n_known or metric == "mae":
            return math.nan, math.nan
        mean = mean / n_known
        away = np.maximum(squares - 2 * mean * total + n * mean**2, 0.0)
        if metric == "error":
            return _unexplained(away, n, total, squares), math.nan
        of_units = {"mse": np.array(self.spread) ** 2, "loss": 0.5}[metric]
        return float(np.mean(of_units * away / n)), math.nan

    def host_error(self, predicted: np.ndarray, labels: np.ndarray) -> float:
        known = np.isfinite(labels).all(axis=1)
        y, away = labels[known].astype("float64"), (predicted - labels)[known].astype("float64")
        if len(y) < 2:
            return math.nan
        y = y - y.mean(axis=0)
        return _unexplained((away**2).sum(axis=0), len(y), y.sum(axis=0), (y**2).sum(axis=0))

    @property
    def guess_loss(self) -> float:
        return 0.5

    def tally(self, labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        y, weights = tf.cast(_known(labels), tf.float64), tf.cast(weights, tf.float64)
        columns = tf.concat([tf.ones_like(y[:, :1]), y, tf.square(y)], axis=1)
        return tf.matmul(weights, columns)

    @property
    def tally_size(self) -> int:
        return 1 + 2 * self.outputs

    def prior(self, tally: np.ndarray) -> np.ndarray:
        """The mean of the labels."""
        return tally[:, 1 : 1 + self.outputs] / tally[:, :1]

    def total(self, tally: np.ndarray) -> np.ndarray:
        return tally[:, 0] * self.outputs

    def residual(self, outputs: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return outputs - tf.cast(_known(labels), outputs.dtype)

    def losses(
        self, outputs: tf.Tensor, labels: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        residual = outputs - tf.cast(tf.transpose(_known(labels)), outputs.dtype)
        losses = tf.reduce_sum(tf.square(residual), axis=1) / 2
        return losses, residual, tf.ones_like(residual)


def _known(labels: tf.Tensor) -> tf.Tensor:
    """Labels with 0 in the place of those that are missing."""
    finite = tf.reduce_all(tf.math.is_finite(labels), axis=1, keepdims=True)
    return tf.where(finite, labels, 0.0)


def _unexplained(away: np.ndarray, n: float, total: np.ndarray, squares: np.ndarray) -> float:
    """The share of variance left unexplained, mean over the numbers; NaN where none varies.

    Args:
        away: Sum of squared errors of each number.
        n: Number of examples.
        total: Sum of each number.
        squares: Sum of its squares.
    """
    variance = squares - total**2 / n
    shares = away[variance > 0] / variance[variance > 0]
    return float(shares.mean()) if len(shares) else math.nan
