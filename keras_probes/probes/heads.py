"""The layers of a probe: running standardisation, and softmax-linear heads.

In: features, float32, shape (batch, n_features), of several taps of equal width. Out: logits and
probabilities, and gradients in closed form.

For a tap with features h, a probe is (paper, section 3.2)

    f(h) = softmax(W' z + b),   z = (h - mean) / (spread * sqrt(n_features)),

which is affine in h, so that it folds back into one W and b on the raw features. Standardising by
running statistics is what lets one learning rate serve every tap, and dividing by sqrt(n_features)
gives z the same length at any width. W and b start at zero, since the problem is convex, and
predictions are made with their average over the last steps, which smooths out the noise of small
batches. Taps of equal width are stacked and share one product.

Where a projection is to be learned with the head (section 3.4, second suggestion), W is the product
P V of two matrices, (n_features, rank) and (rank, num_classes).
"""

from collections.abc import Mapping, Sequence
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

# Of the learned projections' optimizer steps: Adam moves every entry by the learning rate, which in
# these units is a hundredth of what entries are at the start.
_PROJECTION_UNIT = 0.1


def averaging_rate(updates: tf.Tensor) -> tf.Tensor:
    """Weight of the newest value in an average, after `updates` values with it."""
    return tf.maximum((DECAY + 1.0) / (updates + DECAY), 1.0 / HORIZON)


def compounded(rate: tf.Tensor, pace: tf.Tensor | float) -> tf.Tensor:
    """Weight of a value in an average that it enters `pace` times, at this rate each."""
    return 1.0 - (1.0 - rate) ** pace


@keras.saving.register_keras_serializable(package="keras_probes")
class Standardize(keras.layers.Layer):
    """Centres and scales the features of several taps of equal width by running statistics.

    A feature that has not varied yet is given as 0.

    Input: list of `n_taps` float32 tensors, shape (batch, n_features).
    Output: float32, shape (n_taps, batch, n_features).
    """

    def __init__(self, n_taps: int, n_features: int, **kwargs: Any):
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        self.n_taps, self.n_features = n_taps, n_features
        shape = (n_taps, 1, n_features)
        self.mean = self.add_weight(shape, "zeros", name="mean", **SAME)
        self.variance = self.add_weight(shape, "zeros", name="variance", **SAME)
        self.reach = self.add_weight(shape, "zeros", name="reach", **SAME)
        self.updates = self.add_weight((n_taps, 1, 1), "zeros", name="updates", **SAME)
        self.built = True

    def call(self, inputs):
        return self.standardized(ops.stack(inputs))

    def standardized(self, x: tf.Tensor) -> tf.Tensor:
        """Features of all taps as z, both of shape (n_taps, batch, n_features)."""
        return (x - self.mean) * self.scale()

    def scale(self) -> tf.Tensor:
        """1 / (spread * sqrt(n_features)), float32, shape (n_taps, 1, n_features)."""
        mean, variance, reach = map(tf.convert_to_tensor, (self.mean, self.variance, self.reach))
        inverse = inverse_spread(mean, variance, reach, rounding=1e-6)
        return inverse / float(np.sqrt(self.n_features))

    def update(
        self, x: tf.Tensor, mean: tf.Tensor, finite: tf.Tensor, pace: tf.Tensor | float = 1.0
    ) -> None:
        """Takes a batch into the statistics.

        Args:
            x: float32, shape (n_taps, batch, n_features); examples that do not count are the mean
                of those that do.
            mean: Of the examples, float32, shape (n_taps, 1, n_features).
            finite: float32, shape (n_taps, batch): 1 for the examples that count.
            pace: How many batches it stands for.
        """
        here = tf.reduce_sum(finite, axis=1)[:, None, None]
        count = sum_over_replicas(here)
        some = tf.cast(count > 0, tf.float32)
        count = tf.maximum(count, 1.0)
        of_all = sum_over_replicas(here * mean) / count

        # Distances from the mean so far: one pass over them gives both variance and reach.
        so_far = tf.where(self.updates > 0, self.mean, of_all)
        squares = tf.math.squared_difference(x, so_far)
        left_out = tf.cast(tf.shape(x)[1], tf.float32) - here
        total = tf.reduce_sum(squares, axis=1, keepdims=True)
        total -= left_out * tf.math.squared_difference(mean, so_far)
        square = sum_over_replicas(total) / count
        farthest = tf.reduce_max(squares, axis=1, keepdims=True)  # -inf of no examples
        reach = tf.sqrt(max_over_replicas(tf.where(here > 0, farthest, 0.0)))

        self.updates.assign_add(some * pace)
        rate = averaging_rate(tf.maximum(tf.convert_to_tensor(self.updates), 1.0))
        rate = some * compounded(rate, pace)
        # The variance of a mixture of what was seen before and the batch, about the new mean.
        moved = rate * (of_all - so_far)
        self.variance.assign_add(rate * (square - self.variance) - tf.square(moved))
        self.mean.assign_add(rate * (of_all - self.mean))
        faded = (1.0 - some * pace / HORIZON) * self.reach  # of a host that has moved on
        self.reach.assign(tf.maximum(reach, faded))

    def restart(self, place: int, x: tf.Tensor) -> tf.Tensor:
        """Takes the statistics of one tap from examples at hand alone; returns their z.

        Args:
            place: Of the tap.
            x: float32, shape (n, n_features), all finite.
        """
        mean, variance = tf.nn.moments(x, axes=0, keepdims=True)
        reach = tf.reduce_max(tf.abs(x - mean), axis=0, keepdims=True)
        for variable, value in ((self.mean, mean), (self.variance, variance), (self.reach, reach)):
            _put(variable, {place: value})
        return (x - mean) * self.scale()[place]

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
        self.mean_kernel = self.add_weight(kernel, "zeros", name="mean_kernel", **SAME)
        self.mean_bias = self.add_weight(bias, "zeros", name="mean_bias", **SAME)
        self.built = True

    @property
    def averaged(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """Each variable that the optimizer moves, with its average."""
        return [(self.kernel, self.mean_kernel), (self.bias, self.mean_bias)]

    def call(self, inputs):
        return ops.unstack(ops.softmax(self.mean_logits(inputs)), self.n_taps)

    def logits(self, inputs: tf.Tensor) -> tf.Tensor:
        """Logits by the weights as the optimizer left them, (n_taps, batch, num_classes)."""
        return tf.matmul(inputs, self.kernel) + self.bias

    def mean_logits(self, inputs: tf.Tensor) -> tf.Tensor:
        """Logits by the averaged weights, shape (n_taps, batch, num_classes)."""
        return ops.matmul(inputs, self.mean_kernel) + self.mean_bias

    def mean_weights(self) -> tuple[tf.Tensor, tf.Tensor]:
        """W and b of the predictions, (n_taps, n_features, num_classes) and (n_taps, 1, ...)."""
        return self.mean_kernel.value, self.mean_bias.value

    def gradients(self, inputs: tf.Tensor, residual: tf.Tensor) -> list[tf.Tensor]:
        """Gradients of the loss in the order of `averaged`, of all replicas' examples.

        Args:
            inputs: float32, shape (n_taps, batch, n_features).
            residual: Gradient of the loss in the logits, as `residual_of` gives it.
        """
        by_kernel = sum_over_replicas(tf.matmul(inputs, residual, transpose_a=True))
        by_bias = sum_over_replicas(tf.reduce_sum(residual, axis=1, keepdims=True))
        return [by_kernel, by_bias]

    def penalised(
        self, gradients: Sequence[tf.Tensor], penalty: tf.Tensor | float
    ) -> list[tf.Tensor]:
        """The same of the loss plus `penalty / 2 * |W|^2`; neither bias nor projection has one."""
        by_kernel, *others = gradients
        return [by_kernel + penalty * self.kernel, *others]

    def projected(self, place: int, z: tf.Tensor) -> tf.Tensor:  # noqa: ARG002
        """What the kernel of one tap is applied to, of z, float32, shape (n, n_features)."""
        return z

    def restart(self, kernels: Mapping[int, np.ndarray], biases: Mapping[int, np.ndarray]) -> None:
        """Goes on from these kernels and biases, by tap, and the averages of anything else."""
        _put(self.mean_kernel, kernels)
        _put(self.mean_bias, biases)
        for variable, mean in self.averaged:
            held = mean.numpy()
            _put(variable, {place: held[place] for place in kernels})

    def average(self, rate: tf.Tensor) -> None:
        """Takes the optimizer's weights into the average."""
        for variable, mean in self.averaged:
            mean.assign_add(rate * (variable - mean))

    def compute_output_shape(self, input_shape):
        return [(input_shape[1], self.num_classes)] * self.n_taps

    def get_config(self):
        config = {"n_taps": self.n_taps, "n_features": self.n_features}
        return {**super().get_config(), **config, "num_classes": self.num_classes}


@keras.saving.register_keras_serializable(package="keras_probes")
class ProjectedHeads(SoftmaxHeads):
    """Heads whose W is a product P V: a projection to `rank` features, learned with the head.

    Logits are (z P) V + b. V starts at zero as W does; P starts at random, since the gradient of
    either is zero where the other is.

    Args:
        seed: Seed of P.

    Input, output: As `SoftmaxHeads`.
    """

    def __init__(
        self, n_taps: int, n_features: int, num_classes: int, rank: int, seed: int, **kwargs: Any
    ):
        super().__init__(n_taps, rank, num_classes, **kwargs)
        self.n_features, self.rank, self.seed = n_features, rank, seed
        shape = (n_taps, n_features, rank)

        def initial(shape: Any, dtype: Any) -> Any:
            drawn = np.random.default_rng(seed).normal(size=shape) / _PROJECTION_UNIT
            return ops.convert_to_tensor(drawn, dtype)

        self.projection = self.add_weight(shape, initial, name="projection")
        self.mean_projection = self.add_weight(shape, initial, name="mean_projection", **SAME)

    @property
    def averaged(self) -> list[tuple[keras.Variable, keras.Variable]]:
        return [*super().averaged, (self.projection, self.mean_projection)]

    def logits(self, inputs: tf.Tensor) -> tf.Tensor:
        return super().logits(tf.matmul(inputs, self._scaled(self.projection)))

    def mean_logits(self, inputs: tf.Tensor) -> tf.Tensor:
        return super().mean_logits(tf.matmul(inputs, self._scaled(self.mean_projection)))

    def projected(self, place: int, z: tf.Tensor) -> tf.Tensor:
        return tf.matmul(z, self._scaled(tf.convert_to_tensor(self.mean_projection)[place]))

    def mean_weights(self) -> tuple[tf.Tensor, tf.Tensor]:
        kernel, bias = super().mean_weights()
        return ops.matmul(self._scaled(self.mean_projection), kernel), bias

    def gradients(self, inputs: tf.Tensor, residual: tf.Tensor) -> list[tf.Tensor]:
        projected = tf.matmul(inputs, self._scaled(self.projection))
        by_projected = tf.matmul(residual, self.kernel, transpose_b=True)
        by_projection = sum_over_replicas(tf.matmul(inputs, by_projected, transpose_a=True))
        by_projection = self._scaled(by_projection)
        return [*super().gradients(projected, residual), by_projection]

    def get_config(self):
        return {**super().get_config(), "rank": self.rank, "seed": self.seed}

    def _scaled(self, projection: tf.Tensor) -> tf.Tensor:
        """P: its rows take a z of length 1 to a vector of about that length."""
        return projection * (_PROJECTION_UNIT / float(np.sqrt(self.rank)))


def _put(variable: keras.Variable, values: Mapping[int, Any]) -> None:
    """Sets what a variable holds of some taps, in all replicas: assigning to slices would not."""
    held = np.array(variable.numpy())
    for place, value in values.items():
        held[place] = value
    variable.assign(held)


def residual_of(logits: tf.Tensor, labels: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """Gradient of mean_i(weight_i * cross-entropy_i) in the logits: (n_taps, batch, num_classes).

    The mean is over the examples of all replicas, and each gets its own share of it.

    Args:
        logits: float32, shape (n_taps, batch, num_classes).
        labels: int32, shape (batch,); an example with -1 is left out.
        weight: float32, shape (n_taps, batch).
    """
    residual = tf.nn.softmax(logits) - tf.one_hot(labels, logits.shape[-1])
    batch = sum_over_replicas(tf.cast(tf.shape(logits)[1], tf.float32))
    return residual * (weight * tf.cast(labels >= 0, tf.float32) / batch)[..., None]
