"""What every task is: the one place that knows what labels are, and what a probe makes of them.

In: labels as data have them, and the outputs of linear probes. Out: labels in one form, losses,
their derivatives, and sums over examples that measures are read off.

Arrays of outputs have the taps first. A step has them as (taps, batch, outputs); the solver, whose
products are fastest that way round, as (taps, outputs, rows).
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

# Why an example is left out of a target.
MISSING = -1  # it has no label
WRONG = -2  # it has something else than a label
WEIGHTLESS = -3  # its sample weight is 0, or it is padding

PRIME = 2**31 - 1  # below which random labels are mixed
ROWS = 2**16  # so many labels are counted at a time

# Bits a label: the loss before each update, over the first pass through the data, is how long a
# code for the labels the probe makes while it learns (prequential; Blier & Ollivier 2018).
CODE_LENGTH = "code_length"


# What is added up over examples for each tap: shapes by name, () of a number.
Sums = dict[str, tuple[int, ...]]


# Of Keras, by name without case and underscores, in all spellings.
REGRESSION_LOSSES = (
    "meansquarederror", "mse", "meanabsoluteerror", "mae", "huber", "logcosh",
    "meanabsolutepercentageerror", "mape", "meansquaredlogarithmicerror", "msle", "poisson",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Clues:
    """What is known of the labels of a target before the first step.

    Attributes:
        what: What they are called in errors.
        labels: Their `tf.TensorSpec`; `None` before any data.
        output: That of the host's output that goes with them; `None` if there is none.
        loss: What the host compares that output with them by, as given to `compile`.
        values: Labels at hand, arrays.
        num_classes: As the user gave it.
        n_names: Number of names of classes that the data come with.
    """

    what: str
    labels: tf.TensorSpec | None = None
    output: tf.TensorSpec | None = None
    loss: Any = None
    values: Sequence[np.ndarray] = ()
    num_classes: Any = None
    n_names: int | None = None

    @property
    def columns(self) -> int | None:
        """Number of numbers in the label of an example; `None` if it is not known."""
        return _columns(self.labels)

    @property
    def output_columns(self) -> int | None:
        """Number of numbers that the host answers with; `None` if it is not one row of them."""
        return _columns(self.output)

    @property
    def loss_name(self) -> str:
        """The name of the loss without case and underscores: `sparsecategoricalcrossentropy`."""
        loss = self.loss
        name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
        return name.replace("_", "").lower()

    @property
    def by_loss(self) -> str | None:
        """What the loss says the labels are: `"classes"`, `"labels"`, `"numbers"`; else `None`."""
        name, columns = self.loss_name, self.output_columns
        together = columns is not None and (self.labels is None or columns == self.columns)
        if "binary" in name and "entropy" in name:
            if columns == 1:
                return "classes"
            return "labels" if together else None
        if "categorical" in name or "hinge" in name:
            return "classes"
        return "numbers" if together and name in REGRESSION_LOSSES else None

    @functools.cached_property
    def rows(self) -> np.ndarray | None:
        """Labels at hand, float64, shape (n, columns); `None` if there are none."""
        found = [
            np.where((y == 255) & (y.dtype == np.uint8), np.nan, y.astype("float64"))
            for y in self.values
            if y.size and y.ndim <= 2
        ]
        found = [y.reshape(len(y), -1) for y in found]
        if not found or len({y.shape[1] for y in found}) > 1:
            return None
        return np.concatenate(found)


def mixed(keys: tf.Tensor, outputs: int) -> tf.Tensor:
    """Whole numbers below `PRIME` of one for each example, int64, shape (batch, outputs)."""
    factors = tf.random.stateless_uniform((outputs,), (7, 1), 1, PRIME, tf.int64, alg="philox")
    return tf.math.floormod((keys[:, None] + 1) * factors, PRIME)


def are_whole(rows: np.ndarray) -> bool:
    """Whether labels at hand are whole numbers."""
    known = rows[~np.isnan(rows)]
    return bool(np.all(known == np.round(known)) and np.all(np.isfinite(known)))


def are_one_hot(rows: np.ndarray) -> bool:
    """Whether labels at hand have one class for each example, or none, maybe smoothed or mixed."""
    return rows.shape[1] > 1 and bool(np.isin(np.round(np.nansum(rows, axis=1), 2), (0, 1)).all())


def _columns(spec: tf.TensorSpec | None) -> int | None:
    if spec is None or spec.shape.rank not in (1, 2):
        return None
    return 1 if spec.shape.rank == 1 else spec.shape[1]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """What probes are asked: the kind of labels, and the loss that fits them.

    Attributes:
        name: As `task=` has it.
        metrics: What can be measured.
        of_keras: By metric, what Keras calls that of a model; of an error, its complement.
        details: Which of the sums are not of single numbers, and kept of the last evaluation.
        first_pass: What can be measured of the first pass through the data besides.
        activation: Keras activation that makes answers of outputs.
        scaled: Whether labels are numbers, which probes see standardised, and the loss is half the
            squared error.
        strict: Whether `fit` is refused where training labels say nothing of an output.
        label_dtype: Of `labels`.
        outputs: Number of outputs of a probe.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    of_keras: ClassVar[dict[str, tuple[str, ...]]]
    details: ClassVar[tuple[str, ...]] = ()
    first_pass: ClassVar[tuple[str, ...]] = ()
    activation: ClassVar[str]
    scaled: ClassVar[bool] = False
    strict: ClassVar[bool] = False
    label_dtype: ClassVar[str] = "int32"

    outputs: int

    # Labels.

    @classmethod
    @abc.abstractmethod
    def suits(cls, clues: Clues) -> bool:
        """Whether labels can be of this task, as far as is known."""

    @classmethod
    @abc.abstractmethod
    def of(cls, clues: Clues) -> "Task | None":
        """The task of some labels; `None` where too little is known of them.

        Raises:
            ValueError: The labels are not of this task.
        """

    @property
    @abc.abstractmethod
    def about(self) -> str:
        """How many outputs of what, such as `10 classes`."""

    @property
    @abc.abstractmethod
    def none_of(self) -> str:
        """What a number is that is no label, such as `none of the classes 0 to 9`."""

    @property
    def label_shape(self) -> tuple[int, ...]:
        """Shape of an example's label."""
        return ()

    @property
    def terms(self) -> int:
        """Number of terms that an example adds to the loss, where none is missing."""
        return math.prod(self.label_shape)

    @abc.abstractmethod
    def labels(self, raw: tf.Tensor) -> tf.Tensor:
        """Labels in one form, of `label_dtype`, shape (batch, *label_shape).

        What can't be used is marked, so that `state` finds it.
        """

    @abc.abstractmethod
    def state(self, labels: tf.Tensor) -> tf.Tensor:
        """Why examples are left out: int32, shape (batch,): `MISSING` and so on, 0 if not."""

    @abc.abstractmethod
    def without(self, labels: tf.Tensor, which: tf.Tensor, why: int) -> tf.Tensor:
        """The labels without those of some examples.

        Args:
            labels: As `labels` returns them.
            which: bool, shape (batch,).
            why: `MISSING` and so on.
        """

    def scale_of(self, labels: np.ndarray) -> np.ndarray | None:  # noqa: ARG002
        """Mean and spread of numbers, shape (2, outputs); `None` where these can't be told."""
        return None

    def rescaled(self, tally: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:  # noqa: ARG002
        """A tally of labels after their scale has changed from an old one to a new."""
        return tally

    def in_units(self, scale: np.ndarray) -> "Task":  # noqa: ARG002
        """The same task, which measures in the units of labels of this mean and spread."""
        return self

    def standardised(self, labels: Any, scale: Any) -> Any:  # noqa: ARG002
        """Labels as probes see them: numbers with mean 0 and variance 1; others as they are."""
        return labels

    @abc.abstractmethod
    def random(self, keys: tf.Tensor) -> tf.Tensor:
        """A label made of a whole number for each example, int64, shape (batch,)."""

    @abc.abstractmethod
    def expected(self, raw: np.ndarray | None) -> tuple[str, str]:
        """What labels should be, and a guess at why some are not.

        Args:
            raw: Some labels as they are, among them such.
        """

    def of_all(self) -> "Task":
        """The same task, for probes that see all training examples there are at once."""
        return self

    @abc.abstractmethod
    def untrainable(self, tally: np.ndarray) -> str:
        """Why no probe can be fitted to such labels; empty if one can.

        Args:
            tally: Of the training examples, shape (m,).
        """

    @abc.abstractmethod
    def lacking(self, tally: np.ndarray) -> str:
        """What training labels lack, to warn of; empty if nothing. Argument as above."""

    @abc.abstractmethod
    def predictions(self, output: Any) -> Any:
        """The host's answers in the form of labels; `None` if its output has another shape.

        Args:
            output: The host's output that goes with the labels, or its `tf.TensorSpec`; `None` if
                there is none.
        """

    # Measures.

    def measuring(self, metrics: Sequence[str]) -> "Task":  # noqa: ARG002
        """The same task, whose sums hold what these metrics are read off."""
        return self

    def for_evaluation(self) -> "Task":
        """The same task, whose sums hold all that is kept of an evaluation."""
        return self

    @property
    def measurable(self) -> tuple[str, ...]:
        """Which of its metrics there are for so many outputs."""
        return self.metrics

    @property
    @abc.abstractmethod
    def sums(self) -> Sums:
        """What is added up over examples, for one tap.

        Always there: `count` of examples, `weight` and `weighted_loss` of the terms of the loss,
        `nonfinite` and `unlabelled`: the numbers of examples that were left out.
        """

    @abc.abstractmethod
    def batch_sums(
        self, outputs: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, finite: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """What a batch adds to the sums, and the error of each example.

        Args:
            outputs: float32, shape (taps, batch, outputs).
            labels: As `labels` returns them.
            weights: float32, shape (batch,).
            finite: float32, shape (taps, batch): 1 where features are finite, else 0.

        Returns:
            The sums side by side, float64, shape (taps, size); and errors, float32, shape (taps,
            batch), whose mean is the error, or in proportion to it. Those of examples that do not
            count are finite.
        """

    @property
    def size(self) -> int:
        """Number of numbers in the sums of a tap. Single ones come first."""
        return sum(math.prod(shape) for shape in self.sums.values())

    def named(self, row: np.ndarray) -> dict[str, Any]:
        """The sums of a tap by name: numbers, and arrays of the shapes that `sums` tells.

        Args:
            row: All of them side by side.
        """
        sizes = [math.prod(shape) for shape in self.sums.values()]
        parts = np.split(row, np.cumsum(sizes)[:-1])
        return {
            name: part.reshape(shape) if shape else float(part[0])
            for (name, shape), part in zip(self.sums.items(), parts, strict=True)
        }

    @abc.abstractmethod
    def measure(self, metric: str, sums: Mapping[str, Any]) -> float:
        """Reads a metric off sums by name; NaN where nothing counts."""

    @abc.abstractmethod
    def host_error(self, predicted: np.ndarray, labels: np.ndarray) -> float:
        """The error of predictions; both in the form of labels."""

    @abc.abstractmethod
    def interval(self, metric: str, value: float, sums: Mapping[str, Any]) -> tuple[float, float]:
        """Its 95% confidence interval; NaN where none is known."""

    @abc.abstractmethod
    def guesses(self, metric: str, known: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
        """What a metric comes to without looking at any feature.

        Args:
            metric: What is measured.
            known: The tally of the labels that probes are trained on, shape (m,).
            counts: That of those that are measured.

        Returns:
            The metric of who answers by the labels of training alone, and of who does not know even
            these; NaN where nothing is known.
        """

    @property
    @abc.abstractmethod
    def guess_loss(self) -> float:
        """The mean loss of a term for who knows nothing."""

    # The convex problem.

    @abc.abstractmethod
    def tally(self, labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        """How often each label comes: float64, shape (taps, m), which adds up over batches.

        Args:
            labels: As `labels` returns them.
            weights: float32, shape (taps, batch).
        """

    def tally_of(self, labels: Any) -> np.ndarray:
        """That of the examples that have a label, however many, shape (m,)."""
        total = np.zeros(self.tally_size)
        for start in range(0, len(labels), ROWS):
            some = tf.convert_to_tensor(labels[start : start + ROWS])
            known = tf.cast(self.state(some) == 0, tf.float32)
            total += self.tally(some, known[None]).numpy()[0]
        return total

    @property
    @abc.abstractmethod
    def tally_size(self) -> int:
        """Length of a tally, m."""

    @abc.abstractmethod
    def prior(self, tally: np.ndarray) -> np.ndarray:
        """The outputs of a probe that knows nothing of the features, shape (taps, outputs).

        Args:
            tally: Shape (taps, m).
        """

    @abc.abstractmethod
    def total(self, tally: np.ndarray) -> np.ndarray:
        """The weight of all terms of the loss, shape (taps,); `tally` as for `prior`."""

    @abc.abstractmethod
    def residual(self, outputs: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Derivative of an example's loss in its outputs, as in a step.

        Args:
            outputs: Shape (taps, batch, outputs).
            labels: As `labels` returns them; what is returned of missing ones is finite.

        Returns:
            Of the shape of `outputs`.
        """

    @abc.abstractmethod
    def losses(
        self, outputs: tf.Tensor, labels: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Losses of examples and their derivatives, as in the solver.

        Args:
            outputs: Shape (taps, outputs, rows).
            labels: As `labels` returns them; what is returned of missing ones is finite.

        Returns:
            Losses, shape (taps, rows); first and second derivatives in each output, shape (taps,
            outputs, rows).
        """
