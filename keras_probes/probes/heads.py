"""The layers of a probe: running standardisation, and linear heads.

In: features, float32, shape (batch, n_features), of several taps. Out: outputs and answers, and
gradients in closed form.

For a tap with features h, a probe is (paper, section 3.2)

    f(h) = softmax(W' z + b),   z = (h - mean) / (spread * sqrt(n_features)),

or another function of these outputs, as the task has it. They are affine in h, so that it folds
back into one W and b on the raw features. Standardising by running statistics is what lets one
learning rate serve every tap, and dividing by sqrt(n_features) gives z the same length at any
width. W and b start at zero, since the problem is convex, and predictions are made with their
average over the last steps, which smooths out the noise of small batches. Taps of equal width are
stacked and share one product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_probes.probes.replicas import max_over_replicas, sum_over_replicas
from keras_probes.probes.spread import inverse_spread

# Averages over steps weigh step t by (DECAY + 1) / (t + DECAY): about the last tenth of all steps
# counts (Shamir & Zhang 2013, "polynomial-decay averaging"), and never more than HORIZON steps, so
# that the probe follows a host that moves.
DECAY = 8.0
HORIZON = 500.0

# Of variables that are the same in each replica: a replica writes what all of them found.
SAME: dict[str, Any] = {"trainable": False, "aggregation": "only_first_replica"}


def averaging_rate(updates: tf.Tensor) -> tf.Tensor:
    """Weight of the newest value in an average, after `updates` values with it."""
    return tf.maximum((DECAY + 1.0) / (updates + DECAY), 1.0 / HORIZON)


@keras.saving.register_keras_serializable(package="keras_probes")
class Standardize(keras.layers.Layer):
    """Centres and scales the features of taps by running statistics.

    A feature that has not varied yet is given as 0. The statistics of all taps lie side by side.

    Args:
        shapes: Number of taps and of features of each group of taps of equal width.

    Input: by group, list of `n_taps` float32 tensors, shape (batch, n_features).
    Output: by group, float32, shape (n_taps, batch, n_features).
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], **kwargs: Any):
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        self.shapes = tuple((n_taps, n_features) for n_taps, n_features in shapes)
        widths = [n_features for n_taps, n_features in self.shapes for _ in range(n_taps)]
        self._tap_of = tf.constant(np.repeat(np.arange(len(widths)), widths), tf.int32)
        self._unit = tf.constant(np.repeat(1 / np.sqrt(widths), widths), tf.float32)
        self.mean, self.variance, self.reach, self.updates = (
            self.add_weight((sum(widths),), "zeros", name=name, **SAME)
            for name in ("mean", "variance", "reach", "updates")
        )
        self.built = True

    def call(self, inputs):
        return self.standardized([ops.cast(ops.stack(of), "float32") for of in inputs])

    def standardized(self, x: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Features as z, both by group, shape (n_taps, batch, n_features)."""
        mean = self._by_group(tf.convert_to_tensor(self.mean))
        scale = self._by_group(self.scale())
        return [(of - m) * s for of, m, s in zip(x, mean, scale, strict=True)]

    def scale(self) -> tf.Tensor:
        """1 / (spread * sqrt(n_features)), float32, of all features side by side."""
        mean, variance, reach = map(tf.convert_to_tensor, (self.mean, self.variance, self.reach))
        return inverse_spread(mean, variance, reach, rounding=1e-6) * self._unit

    def update(self, x: Sequence[tf.Tensor], finite: tf.Tensor) -> None:
        """Takes examples into the statistics.

        Args:
            x: By group, float32, shape (n_taps, n, n_features); 0 for examples that do not count.
            finite: Of all taps, float32, shape (sum of n_taps, n): 1 for the examples that count.
        """
        count = sum_over_replicas(tf.reduce_sum(finite, axis=1))
        count = tf.gather(count, self._tap_of)
        some = tf.cast(count > 0, tf.float32)
        count = tf.maximum(count, 1.0)
        of_all = sum_over_replicas(_flat(tf.reduce_sum, x)) / count

        # Distances from the mean so far give mean, variance and reach, without rounding that would
        # have a constant vary.
        so_far = tf.where(self.updates > 0, self.mean, of_all)
        counts = tf.split(finite[..., None], [n_taps for n_taps, _ in self.shapes])
        triples = zip(x, self._by_group(so_far), counts, strict=True)
        distances = [(of_group - near) * counted for of_group, near, counted in triples]
        squares = [tf.square(of_group) for of_group in distances]
        shift = sum_over_replicas(_flat(tf.reduce_sum, distances)) / count
        square = sum_over_replicas(_flat(tf.reduce_sum, squares)) / count
        farthest = tf.maximum(_flat(tf.reduce_max, squares), 0.0)  # -inf of no examples
        reach = tf.sqrt(max_over_replicas(farthest))

        self.updates.assign_add(some)
        rate = some * averaging_rate(tf.maximum(tf.convert_to_tensor(self.updates), 1.0))
        # The variance of a mixture of what was seen before and the batch, about the new mean.
        self.variance.assign_add(rate * (square - self.variance) - tf.square(rate * shift))
        self.mean.assign(so_far + rate * shift)
        faded = (1.0 - some / HORIZON) * self.reach  # of a host that has moved on
        self.reach.assign(tf.maximum(reach, faded))

    def restart(self, group: int, place: int, x: tf.Tensor, finite: tf.Tensor) -> tf.Tensor:
        """Takes the statistics of a tap from a sample alone; returns its z.

        Args:
            group: Of the tap.
            place: Of the tap in its group.
            x: float32, shape (n, n_features); 0 for examples that do not count.
            finite: float32, shape (n,): 1 for those that count. If none does, the tap keeps the
                statistics it had.
        """
        span, counted = self._span(group, place), finite[:, None]
        count = tf.reduce_sum(finite)
        mean = tf.matmul(counted, x, transpose_a=True)[0] / tf.maximum(count, 1.0)
        away = (x - mean) * counted
        squares = tf.square(away)
        if count > 0:
            variance = tf.matmul(counted, squares, transpose_a=True)[0] / count
            _put(self.mean, span, mean)
            _put(self.variance, span, variance)
            _put(self.reach, span, tf.sqrt(tf.reduce_max(squares, axis=0)))
        return away * self.scale()[span]

    def unscaled(self, group: int, place: int, z: tf.Tensor) -> tf.Tensor:
        """Centred features of a tap in their own units, of its z; 0 where they do not vary."""
        return tf.math.divide_no_nan(z, self.scale()[self._span(group, place)])

    def of_tap(self, group: int, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and scale of one tap's features, float32, shape (n_features,)."""
        span = self._span(group, place)
        return self.mean.numpy()[span], self.scale().numpy()[span]

    def _span(self, group: int, place: int) -> slice:
        """Where the features of a tap are."""
        start = sum(n_taps * n_features for n_taps, n_features in self.shapes[:group])
        width = self.shapes[group][1]
        return slice(start + place * width, start + (place + 1) * width)

    def _by_group(self, flat: tf.Tensor) -> list[tf.Tensor]:
        """What is known of each feature, by group, shape (n_taps, 1, n_features)."""
        parts = tf.split(flat, [n_taps * n_features for n_taps, n_features in self.shapes])
        shapes = [(n_taps, 1, n_features) for n_taps, n_features in self.shapes]
        return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]

    def compute_output_shape(self, input_shape):
        return [
            (n_taps, of_group[0][0], n_features)
            for (n_taps, n_features), of_group in zip(self.shapes, input_shape, strict=True)
        ]

    def get_config(self):
        return {**super().get_config(), "shapes": self.shapes}


@keras.saving.register_keras_serializable(package="keras_probes")
class LinearHeads(keras.layers.Layer):
    """One linear probe for each of several taps of equal width, for one target.

    `kernel` and `bias` are what the optimizer moves; predictions use their averages.

    Args:
        n_taps: Number of taps.
        n_features: Number of features of each.
        n_outputs: Number of outputs of a probe.
        activation: What makes answers of outputs.
        scaled: Whether answers are numbers with units: outputs times a spread, plus a mean.

    Input: float32, shape (n_taps, batch, n_features).
    Output: list of `n_taps` float32 tensors of answers, shape (batch, n_outputs).
    """

    def __init__(
        self,
        n_taps: int,
        n_features: int,
        n_outputs: int,
        activation: str,
        scaled: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        self.n_taps, self.n_features, self.n_outputs = n_taps, n_features, n_outputs
        self.activation, self.scaled = keras.activations.get(activation), scaled
        kernel, bias = (n_taps, n_features, n_outputs), (n_taps, 1, n_outputs)
        trained = {**SAME, "trainable": True}
        self.kernel = self.add_weight(kernel, "zeros", name="kernel", **trained)
        self.bias = self.add_weight(bias, "zeros", name="bias", **trained)
        self.mean_kernel = self.add_weight(kernel, "zeros", name="mean_kernel", **SAME)
        self.mean_bias = self.add_weight(bias, "zeros", name="mean_bias", **SAME)
        # The l2 penalties that refits chose; 0 before the first.
        self.l2 = self.add_weight((n_taps, 1, 1), "zeros", name="l2", **SAME)
        # Mean and spread of the numbers to predict; a spread of 0 before they are known.
        self.scale = (
            self.add_weight((2, n_outputs), "zeros", name="scale", **SAME) if scaled else None
        )
        self.built = True

    @property
    def averaged(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """Each variable that the optimizer moves, with its average."""
        return [(self.kernel, self.mean_kernel), (self.bias, self.mean_bias)]

    def call(self, inputs):
        answers = self.activation(self.mean_outputs(inputs))
        if self.scale is not None:
            spread = ops.where(self.scale[1] > 0, self.scale[1], 1.0)
            answers = answers * spread + self.scale[0]
        return ops.unstack(answers, self.n_taps)

    def outputs(self, inputs: tf.Tensor) -> tf.Tensor:
        """Outputs by the weights as the optimizer left them, (n_taps, batch, n_outputs)."""
        return tf.matmul(inputs, self.kernel) + self.bias

    def mean_outputs(self, inputs: tf.Tensor) -> tf.Tensor:
        """Outputs by the averaged weights, shape (n_taps, batch, n_outputs)."""
        return ops.matmul(inputs, self.mean_kernel) + self.mean_bias

    def mean_weights(self) -> tuple[tf.Tensor, tf.Tensor]:
        """W and b of the predictions, (n_taps, n_features, n_outputs) and (n_taps, 1, ...)."""
        return self.mean_kernel.value, self.mean_bias.value

    def gradients(
        self, inputs: tf.Tensor, residual: tf.Tensor, penalty: tf.Tensor | float
    ) -> list[tf.Tensor]:
        """Gradients of the loss plus `penalty / 2 * |W|^2`, of all replicas' examples.

        Args:
            inputs: float32, shape (n_taps, batch, n_features).
            residual: Gradient of the loss in the outputs, (n_taps, batch, n_outputs).
            penalty: Shape () or (n_taps, 1, 1); the bias has none.

        Returns:
            Gradients in the order of `averaged`.
        """
        by_kernel = sum_over_replicas(tf.matmul(inputs, residual, transpose_a=True))
        by_bias = sum_over_replicas(tf.reduce_sum(residual, axis=1, keepdims=True))
        return [by_kernel + penalty * self.kernel, by_bias]

    def probe(self, place: int) -> np.ndarray:
        """W over b of a tap's predictions, float64, shape (n_features + 1, n_outputs)."""
        parts = [of.value.numpy()[place] for of in (self.mean_kernel, self.mean_bias)]
        return np.concatenate(parts).astype("float64")

    def penalty(self, place: int) -> float:
        """The l2 penalty that a tap's last refit chose; 0 before the first."""
        return float(self.l2.value.numpy()[place, 0, 0])

    def restart(self, place: int, weights: np.ndarray, l2: float) -> None:
        """Goes on from a refitted probe.

        Args:
            place: Of its tap.
            weights: W over b, shape (n_features + 1, n_outputs).
            l2: Its penalty.
        """
        for variable in (self.kernel, self.mean_kernel):
            _put(variable, place, weights[:-1])
        for variable in (self.bias, self.mean_bias):
            _put(variable, place, weights[-1:])
        _put(self.l2, place, l2)

    def shrink(self, factor: tf.Tensor) -> None:
        """Multiplies W and b, and their averages, by a number for each tap, shape (n_taps,)."""
        for variable in (of for pair in self.averaged for of in pair):
            variable.assign(factor[:, None, None] * variable)

    def average(self, rate: tf.Tensor) -> None:
        """Takes the optimizer's weights into the average."""
        for variable, mean in self.averaged:
            mean.assign_add(rate * (variable - mean))

    def compute_output_shape(self, input_shape):
        return [(input_shape[1], self.n_outputs)] * self.n_taps

    def get_config(self):
        return {
            **super().get_config(),
            "n_taps": self.n_taps,
            "n_features": self.n_features,
            "n_outputs": self.n_outputs,
            "activation": keras.activations.serialize(self.activation),
            "scaled": self.scaled,
        }


def _flat(reduce: Callable[..., tf.Tensor], of_groups: Sequence[tf.Tensor]) -> tf.Tensor:
    """Each group reduced over its examples, all features side by side."""
    return tf.concat([tf.reshape(reduce(of, axis=1), [-1]) for of in of_groups], axis=0)


def _put(variable: keras.Variable, place: int | slice, value: Any) -> None:
    """Sets what a variable holds at a place: in each replica, since slices know of one alone."""
    held = variable.value
    for of_replica in getattr(held, "values", (held,)):
        of_replica[place].assign(tf.cast(value, held.dtype))
