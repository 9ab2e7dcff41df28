"""What a record is made of: taps, layers, measures. A leaf that all may import.

In and out: values.
"""

import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Z_95 = 1.959963984540054  # 97.5% point of the standard normal distribution

SPLITS = ("train", "validation", "test")
COLUMNS = (
    "epoch",
    "step",
    "split",
    "target",
    "baseline",
    "tap",
    "depth",
    "metric",
    "value",
    "n",
    "ci_low",
    "ci_high",
    "nonfinite",
    "unlabelled",
    "certificate",
    "majority",
    "chance",
    "host",
)
BASELINES = ("initial", "shuffled")
# That may be NaN.
NUMBERS = ("value", "ci_low", "ci_high", "certificate", "majority", "chance", "host")


@dataclasses.dataclass(frozen=True)
class TapInfo:
    """What the table says of a tap.

    Attributes:
        name: Canonical tap name.
        depth: Position along the graph, 0 is the input.
        layer: Class name of the layer.
        shape: Shape of one example's activation, without the batch.
        reduction: What makes features of it.
        features: Number of features of the probe.
    """

    name: str
    depth: int
    layer: str
    shape: tuple[int | None, ...]
    reduction: str
    features: int

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "TapInfo":
        """Made of its fields as JSON gives them back, with lists for tuples."""
        return cls(**{**fields, "shape": tuple(fields["shape"])})

    @property
    def shape_text(self) -> str:
        """The shape as tables show it, such as `28 x 28 x 3`."""
        return shape_text(self.shape)


@dataclasses.dataclass(frozen=True)
class Node:
    """A layer of the host, or a tap.

    Attributes:
        name: Its name; of a tap, the tap's.
        layer: Class name of the layer.
        shape: Shape of one example's activation, without the batch.
        inputs: Names of the nodes it is computed from.
    """

    name: str
    layer: str
    shape: tuple[int | None, ...]
    inputs: tuple[str, ...]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Node":
        """Made of its fields as JSON gives them back, with lists for tuples."""
        lists = {name: tuple(fields[name]) for name in ("shape", "inputs")}
        return cls(**{**fields, **lists})


@dataclasses.dataclass(frozen=True)
class Row:
    """One measure of one probe.

    Attributes:
        epoch: Epoch, from 0, as in Keras's History.
        step: Number of batches the probes were trained on until then.
        split: `"train"`, `"validation"` or `"test"`.
        target: Name of the target; `None` if there is a single, unnamed one.
        tap: Tap name.
        metric: `"error"`, `"loss"` (nats), `"top5_error"`, or of the first pass of training
            `"code_length"` (bits a label).
        value: The measure; NaN where no example could be measured.
        n: Number of examples it was measured on.
        ci_low: Lower end of its 95% confidence interval; NaN if none is known.
        ci_high: Its upper end.
        baseline: What was measured beside the probes themselves: one of `BASELINES`; `None` for
            these.
        nonfinite: Number of examples left out since a feature was NaN, infinite or above 1e18.
        unlabelled: Number of examples left out since their label is missing or is no class.
        certificate: Upper bound on how far the training objective of the probe that was measured
            is above its optimum, in nats; NaN if none is known.
        majority: The measure of who sees no feature, and answers by the class frequencies of the
            training labels alone; NaN if they are not known.
        chance: That of who does not know these either.
        host: That of the host itself; NaN if it is not known.
    """

    epoch: int
    step: int
    split: str
    target: str | None
    tap: str
    metric: str
    value: float
    n: int
    ci_low: float = math.nan
    ci_high: float = math.nan
    baseline: str | None = None
    nonfinite: int = 0
    unlabelled: int = 0
    certificate: float = math.nan
    majority: float = math.nan
    chance: float = math.nan
    host: float = math.nan


@dataclasses.dataclass(frozen=True)
class Refit:
    """How probes that train online were refitted at the end of an epoch.

    Attributes:
        epoch: Epoch, from 0.
        examples: Number of examples of the epoch that they were refitted on.
        seconds: How long it took.
        left_out: By tap, why its probes stayed as they had trained.
    """

    epoch: int
    examples: int
    seconds: float
    left_out: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """How the errors of layers went together, over the examples of an evaluation.

    Attributes:
        epoch: Epoch, from 0.
        taps: Names of the taps, T of them.
        moments: Sums over examples of (1, e, e²) of each tap with (1, e) of each, where e is an
            example's error and both taps have one; float64, shape (3 T, 2 T).
    """

    epoch: int
    taps: tuple[str, ...]
    moments: np.ndarray

    def of(self, tap: str, other: str) -> tuple[float, float, float, float, float, float]:
        """Sums over the examples that two taps have: n, of e, e², e', e'² and e e'."""
        size = len(self.taps)
        a, b = self.taps.index(tap), self.taps.index(other)
        n, total, squares = self.moments[[a, size + a, 2 * size + a], b]
        of_other, squares_of_other = self.moments[[size + b, 2 * size + b], a]
        return n, total, squares, of_other, squares_of_other, self.moments[size + a, size + b]


@dataclasses.dataclass(frozen=True)
class Details:
    """What an evaluation counted by class or by label.

    Attributes:
        epoch: Epoch, from 0.
        counts: By tap and name. Of classes: `confusion`, shape (classes, classes), examples by
            class and by answer; of very many, `labelled`, `right` and `answered`, shape (classes,).
            Of several labels: `answers_by_label` and `wrong_by_label`, shape (labels,).
    """

    epoch: int
    counts: Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear probe on the raw, reduced features h of a tap: activation(h @ W + b).

    Attributes:
        kernel: W, float32, shape (n_features, outputs).
        bias: b, float32, shape (outputs,).
        activation: What makes answers of outputs, as Keras names it.
    """

    kernel: np.ndarray
    bias: np.ndarray
    activation: str = "softmax"


def versions(*libraries: str) -> dict[str, str]:
    """Of the libraries that what is measured depends on, and of others by name."""
    names = ("keras_probes", "keras", "tensorflow", "numpy", *libraries)
    return {name: importlib.import_module(name).__version__ for name in names}


def name_of_baseline(baseline: str | None, target: str | None) -> str | None:
    """What a target, or a baseline of it, is called in logs and in TensorBoard."""
    return "_".join(name for name in (target, baseline) if name is not None) or None


def name_of_measure(metric: str, target: str | None, baseline: str | None = None) -> str:
    """The name that a metric of a target has there."""
    name = name_of_baseline(baseline, target)
    return f"probe_{metric}" if name is None else f"probe_{name}_{metric}"


def shape_text(shape: Sequence[int | None]) -> str:
    """A shape as tables and pictures show it, such as `28 x 28 x 3`."""
    return " x ".join("?" if size is None else str(size) for size in shape)


def wilson_interval(error: float, n: int) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson 1927).

    Args:
        error: Observed proportion, 0 to 1.
        n: Number of examples.

    Returns:
        Lower and upper bound, 0 to 1; NaN where there are no examples.
    """
    if n == 0 or math.isnan(error):
        return math.nan, math.nan
    centre = error + Z_95**2 / (2 * n)
    half = Z_95 * math.sqrt(error * (1 - error) / n + Z_95**2 / (4 * n**2))
    scale = 1 + Z_95**2 / n
    # Rounding must not push a bound past the observed proportion at 0 and 1.
    low, high = (centre - half) / scale, (centre + half) / scale
    return min(error, max(0.0, low)), max(error, min(1.0, high))


def interval_of_mean(value: float, n: float, total: float, squares: float) -> tuple[float, float]:
    """95% confidence interval of an error that is in proportion to the mean of examples' errors.

    Args:
        value: The error.
        n: Number of examples.
        total: Sum of their errors.
        squares: Sum of the squares of these.

    Returns:
        Lower and upper bound, at least 0; NaN where they are not known.
    """
    if n < 2 or not total > 0:
        return math.nan, math.nan
    deviation = math.sqrt(max(squares / n - (total / n) ** 2, 0.0) / (n - 1))
    half = Z_95 * value * deviation / (total / n)
    return max(0.0, value - half), value + half
