"""The probes: softmax-linear classifiers, one a tap, trained side by side.

In: features, float32, shape (batch, n_features), by tap; labels and weights by target. Out:
probabilities, and sums from which error and loss are read.

For a tap with features h, a probe is (paper, section 3.2)

    f(h) = softmax(W' z + b),   z = (h - mean) / (std * sqrt(n_features)),

which is affine in h, so that it folds back into one W and b on the raw features. Standardising by
running statistics is what lets one learning rate serve every tap, and dividing by sqrt(n_features)
gives z the same length at any width. W and b start at zero, since the problem is convex, and
predictions are made with their average over the last steps, which smooths out the noise of small
batches. Taps of equal width are stacked and share one product.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_probes.probes.measures import SUMS, batch_sums

# Averages over steps weigh step t by (DECAY + 1) / (t + DECAY): about the last tenth of all steps
# counts (Shamir & Zhang 2013, "polynomial-decay averaging"), and never more than HORIZON steps, so
# that the probe follows a host that moves.
DECAY = 8.0
HORIZON = 500.0

LEARNING_RATE = 0.1  # of Adam, on features of length 1

Features = Mapping[str, tf.Tensor]  # by tap
Labels = Mapping[str | None, tf.Tensor]  # by target
Sums = Mapping[str | None, Mapping[str, Mapping[str, float]]]  # by target, tap, name in SUMS


def own_optimizer(
    optimizer: keras.optimizers.Optimizer | str | None,
) -> keras.optimizers.Optimizer:
    """Returns an optimizer for the probes alone: Adam by default, else a fresh copy.

    Raises:
        ValueError: It is neither an optimizer nor the name of one.
    """
    if optimizer is None:
        return keras.optimizers.Adam(LEARNING_RATE, name="probe_optimizer")
    config: dict[str, Any] = {"class_name": optimizer, "config": {}}
    if isinstance(optimizer, keras.optimizers.Optimizer):
        config = keras.optimizers.serialize(optimizer)
    config["config"]["name"] = "probe_optimizer"  # a name of our own uses up no automatic one
    made = keras.optimizers.deserialize(config) if isinstance(config["class_name"], str) else None
    if not isinstance(made, keras.optimizers.Optimizer):
        raise ValueError(
            'Expected `optimizer` to be a Keras optimizer, its name such as "sgd", or None. '
            f"Received: optimizer={optimizer!r}."
        )
    return made


def parameters_of(n_features: int, num_classes: int) -> int:
    """Number of trainable parameters of one probe: W and b."""
    return (n_features + 1) * num_classes


def memory_of(n_features: int, num_classes: int) -> int:
    """Bytes one probe takes: its parameters, their average, gradient and two optimizer slots."""
    return 4 * (5 * parameters_of(n_features, num_classes) + 2 * n_features)


def averaging_rate(updates: tf.Tensor) -> tf.Tensor:
    """Weight of the newest value in an average, after `updates` values with it."""
    return ops.maximum((DECAY + 1.0) / (updates + DECAY), 1.0 / HORIZON)


@keras.saving.register_keras_serializable(package="keras_probes")
class Standardize(keras.layers.Layer):
    """Centres and scales the features of several taps of equal width by running statistics.

    A feature that has not varied yet is given as 0. One whose variance is below a hundredth of its
    tap's average is scaled as if it had that: a pixel that has been lit once would else be blown up
    without bounds when it is lit again.

    Input: list of `n_taps` float32 tensors, shape (batch, n_features).
    Output: float32, shape (n_taps, batch, n_features).
    """

    def __init__(self, n_taps: int, n_features: int, **kwargs: Any):
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        self.n_taps, self.n_features = n_taps, n_features
        shape = (n_taps, 1, n_features)
        self.mean = self.add_weight(shape, "zeros", trainable=False, name="mean")
        self.variance = self.add_weight(shape, "zeros", trainable=False, name="variance")
        self.updates = self.add_weight((n_taps, 1, 1), "zeros", trainable=False, name="updates")
        self.built = True

    def call(self, inputs):
        return (ops.stack(inputs) - self.mean) * self.scale()

    def scale(self) -> tf.Tensor:
        """1 / (std * sqrt(n_features)), float32, shape (n_taps, 1, n_features)."""
        # Below this the spread is only the rounding of a float32 mean.
        varies = self.variance > 1e-12 * ops.square(self.mean) + 1e-30
        floor = 1e-2 * ops.mean(self.variance, axis=-1, keepdims=True)
        variance = ops.where(varies, ops.maximum(self.variance, floor), 1.0)
        inverse_std = ops.where(varies, ops.rsqrt(variance), 0.0)
        return inverse_std / float(np.sqrt(self.n_features))

    def update(self, inputs: Sequence[tf.Tensor], finite: tf.Tensor) -> None:
        """Takes a batch into the statistics.

        Args:
            inputs: As for `call`; examples that do not count are 0 throughout.
            finite: float32, shape (n_taps, batch): 1 for the examples that count.
        """
        x, finite = ops.stack(inputs), finite[..., None]
        count = ops.sum(finite, axis=1, keepdims=True)
        some = ops.cast(count > 0, "float32")
        count = ops.maximum(count, 1.0)
        mean = ops.sum(x, axis=1, keepdims=True) / count
        variance = ops.sum(finite * ops.square(x - mean), axis=1, keepdims=True) / count

        self.updates.assign_add(some)
        rate = some * averaging_rate(ops.maximum(self.updates, 1.0))
        shift = mean - self.mean
        # The variance of a mixture: of what each part has, and of how far their means lie apart.
        between = (1.0 - rate) * ops.square(shift)
        self.variance.assign_add(rate * (variance + between - self.variance))
        self.mean.assign_add(rate * shift)

    def compute_output_shape(self, input_shape):
        return (self.n_taps, input_shape[0][0], self.n_features)

    def get_config(self):
        return {**super().get_config(), "n_taps": self.n_taps, "n_features": self.n_features}


@keras.saving.register_keras_serializable(package="keras_probes")
class SoftmaxHeads(keras.layers.Layer):
    """One softmax-linear classifier for each of several taps of equal width, for one target.

    `kernel` and `bias` are what the optimizer moves; predictions use their averages.

    Input: float32, shape (n_taps, batch, n_features).
    Output: list of `n_taps` float32 tensors of probabilities, shape (batch, num_classes).
    """

    def __init__(self, n_taps: int, n_features: int, num_classes: int, **kwargs: Any):
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        self.n_taps, self.n_features, self.num_classes = n_taps, n_features, num_classes
        kernel, bias = (n_taps, n_features, num_classes), (n_taps, 1, num_classes)
        self.kernel = self.add_weight(kernel, "zeros", name="kernel")
        self.bias = self.add_weight(bias, "zeros", name="bias")
        self.mean_kernel = self.add_weight(kernel, "zeros", trainable=False, name="mean_kernel")
        self.mean_bias = self.add_weight(bias, "zeros", trainable=False, name="mean_bias")
        self.built = True

    def call(self, inputs):
        return ops.unstack(ops.softmax(self.mean_logits(inputs)), self.n_taps)

    def logits(self, inputs: tf.Tensor) -> tf.Tensor:
        """Logits by the weights as the optimizer left them, (n_taps, batch, num_classes)."""
        return ops.matmul(inputs, self.kernel) + self.bias

    def mean_logits(self, inputs: tf.Tensor) -> tf.Tensor:
        """Logits by the averaged weights, shape (n_taps, batch, num_classes)."""
        return ops.matmul(inputs, self.mean_kernel) + self.mean_bias

    def gradients(self, inputs: tf.Tensor, labels: tf.Tensor, weight: tf.Tensor) -> list[tf.Tensor]:
        """Gradients of mean_i(weight_i * cross-entropy_i) in `kernel` and `bias`.

        Args:
            inputs: float32, shape (n_taps, batch, n_features).
            labels: int32, shape (batch,).
            weight: float32, shape (n_taps, batch).
        """
        residual = ops.softmax(self.logits(inputs)) - ops.one_hot(labels, self.num_classes)
        labelled = ops.cast(labels >= 0, "float32")
        batch = ops.cast(ops.shape(inputs)[1], "float32")
        residual *= (weight * labelled / batch)[..., None]
        by_kernel = tf.matmul(inputs, residual, transpose_a=True)
        return [by_kernel, ops.sum(residual, axis=1, keepdims=True)]

    def average(self, rate: tf.Tensor) -> None:
        """Takes the optimizer's weights into the average."""
        self.mean_kernel.assign_add(rate * (self.kernel - self.mean_kernel))
        self.mean_bias.assign_add(rate * (self.bias - self.mean_bias))

    def compute_output_shape(self, input_shape):
        return [(input_shape[1], self.num_classes)] * self.n_taps

    def get_config(self):
        config = {"n_taps": self.n_taps, "n_features": self.n_features}
        return {**super().get_config(), **config, "num_classes": self.num_classes}


@dataclasses.dataclass
class _Group:
    """The taps of one width: one standardisation, one stack of heads a target."""

    taps: list[str]
    standardize: Standardize
    heads: dict[str | None, SoftmaxHeads]


class ProbeSet:
    """All probes of a host: their weights, optimizer and sums.

    Args:
        n_features: Number of features of each tap, in graph order.
        num_classes: Number of classes of each target; the key is its name, `None` if it has none.
        optimizer: Keras optimizer for the probes, used by nobody else.
    """

    def __init__(
        self,
        n_features: Mapping[str, int],
        num_classes: Mapping[str | None, int],
        optimizer: keras.optimizers.Optimizer,
    ):
        self.taps = list(n_features)
        self.targets = list(num_classes)
        self.optimizer = optimizer
        by_width: dict[int, list[str]] = defaultdict(list)
        for tap, width in n_features.items():
            by_width[width].append(tap)
        self._groups = []
        for width, taps in by_width.items():
            heads = {
                target: SoftmaxHeads(len(taps), width, classes, name=f"heads_{width}_{position}")
                for position, (target, classes) in enumerate(num_classes.items())
            }
            standardize = Standardize(len(taps), width, name=f"standardize_{width}")
            self._groups.append(_Group(taps, standardize, heads))
        self._steps = keras.Variable(0.0, dtype="float32", trainable=False, name="probe_steps")
        # float64 holds counts exactly and loses nothing over a long epoch.
        shape = (len(self.targets) * len(self.taps), len(SUMS))
        self._sums = {
            kind: keras.Variable(np.zeros(shape), dtype="float64", trainable=False, name=kind)
            for kind in ("train", "test")
        }
        self.optimizer.build(self._trainable())

    def train(self, features: Features, labels: Labels, weights: Labels) -> None:
        """Measures a batch, then takes one step on it.

        The step descends, for every tap and target, on mean_i(weight_i * cross-entropy_i).

        Args:
            features: By tap, float32, shape (batch, n_features).
            labels: By target, int32, shape (batch,); an example with -1 is left out.
            weights: By target, float32, shape (batch,).
        """
        rows, gradients = [], []
        for group in self._groups:
            inputs, finite = _finite(features, group.taps)
            group.standardize.update(inputs, finite)
            z = group.standardize(inputs)
            for target, heads in group.heads.items():
                rows.append(
                    batch_sums(heads.mean_logits(z), labels[target], weights[target], finite)
                )
                gradients += heads.gradients(z, labels[target], finite * weights[target])
        self._sums["train"].assign_add(ops.concatenate(rows, axis=0))
        self.optimizer.apply(gradients, self._trainable())
        self._steps.assign_add(1.0)
        for group in self._groups:
            for heads in group.heads.values():
                heads.average(averaging_rate(self._steps))

    def test(self, features: Features, labels: Labels, weights: Labels) -> None:
        """Measures a batch; arguments as for `train`."""
        rows = []
        for group in self._groups:
            inputs, finite = _finite(features, group.taps)
            z = group.standardize(inputs)
            for target, heads in group.heads.items():
                rows.append(
                    batch_sums(heads.mean_logits(z), labels[target], weights[target], finite)
                )
        self._sums["test"].assign_add(ops.concatenate(rows, axis=0))

    def reset_sums(self, kind: Literal["train", "test"]) -> None:
        """Starts a new epoch of training, or a new evaluation."""
        self._sums[kind].assign(np.zeros(self._sums[kind].shape))

    def sums(self, kind: Literal["train", "test"]) -> Sums:
        """Returns `sums[target][tap][name]` since the last reset, for the names in `SUMS`."""
        rows = iter(self._sums[kind].value.numpy().tolist())
        found = {
            (target, tap): dict(zip(SUMS, next(rows), strict=True))
            for group in self._groups
            for target in group.heads
            for tap in group.taps
        }
        return {t: {tap: found[t, tap] for tap in self.taps} for t in self.targets}

    def weights(self, tap: str, target: str | None) -> tuple[np.ndarray, np.ndarray]:
        """The probe on the raw features: float32 W (n_features, num_classes), b (num_classes,)."""
        group = next(g for g in self._groups if tap in g.taps)
        position, heads = group.taps.index(tap), group.heads[target]
        # float64, since the two terms of b can be large and of opposite sign.
        scale = group.standardize.scale().numpy().astype("float64")[position, 0]
        shift = group.standardize.mean.value.numpy().astype("float64")[position, 0] * scale
        kernel = heads.mean_kernel.value.numpy().astype("float64")[position]
        bias = heads.mean_bias.value.numpy().astype("float64")[position, 0]
        folded = scale[:, None] * kernel, bias - shift @ kernel
        return folded[0].astype("float32"), folded[1].astype("float32")

    @property
    def steps(self) -> int:
        """Number of batches the probes were trained on."""
        return int(self._steps.value.numpy())

    def outputs(self, features: Features) -> dict[str | None, dict[str, tf.Tensor]]:
        """Returns `outputs[target][tap]`: probabilities, float32, shape (batch, num_classes)."""
        found: dict[str | None, dict[str, Any]] = {target: {} for target in self.targets}
        for group in self._groups:
            z = group.standardize([features[tap] for tap in group.taps])
            for target, heads in group.heads.items():
                found[target].update(zip(group.taps, heads(z), strict=True))
        return {target: {tap: found[target][tap] for tap in self.taps} for target in self.targets}

    def _trainable(self) -> list[keras.Variable]:
        return [
            variable
            for group in self._groups
            for heads in group.heads.values()
            for variable in (heads.kernel, heads.bias)
        ]


def _finite(features: Features, taps: Sequence[str]) -> tuple[list[tf.Tensor], tf.Tensor]:
    """Puts zeros in the place of examples with a NaN or infinite feature.

    Returns:
        The features of `taps`, and float32, shape (n_taps, batch): 1 for the examples that count.
    """
    finite = [tf.reduce_all(tf.math.is_finite(features[tap]), axis=1) for tap in taps]
    inputs = [
        tf.where(is_finite[:, None], features[tap], 0.0)
        for tap, is_finite in zip(taps, finite, strict=True)
    ]
    return inputs, tf.cast(tf.stack(finite), tf.float32)
