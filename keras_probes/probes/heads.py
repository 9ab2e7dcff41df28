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

Replicas of a host see a part of each batch: sums over examples are sums over all of them, and what
comes of these is the same in each.

Where a projection is to be learned with the head (section 3.4, second suggestion), W is the product
P V of two matrices, (n_features, rank) and (rank, num_classes).
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


# Of variables that are the same in each replica: a replica writes what all of them found.
_SAME: dict[str, Any] = {"trainable": False, "aggregation": "only_first_replica"}

# Of the learned projections' optimizer steps: Adam moves every entry by the learning rate, which in
# these units is a hundredth of what entries are at the start.
_PROJECTION_UNIT = 0.1


@dataclasses.dataclass(frozen=True)
class Width:
    """How wide the probe of a tap is.

    Attributes:
        n_features: Number of features.
        rank: Width of the projection that is learned with the head, if any.
    """

    n_features: int
    rank: int | None = None


def parameters_of(width: Width, num_classes: int) -> int:
    """Number of trainable parameters of one probe: W, or its two factors, and b."""
    if width.rank is None:
        return (width.n_features + 1) * num_classes
    return width.n_features * width.rank + (width.rank + 1) * num_classes


def memory_of(width: Width, num_classes: int) -> int:
    """Bytes one probe takes: its parameters, their average, gradient and two optimizer slots."""
    return 4 * (5 * parameters_of(width, num_classes) + 2 * width.n_features)


def _over_replicas(value: tf.Tensor) -> tf.Tensor:
    """The sum of a value over all replicas of the host, in each of them."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return value
    # Not `all_reduce`: where a host's step has one already, TensorFlow mixes up several.
    return context.merge_call(
        lambda strategy, of_each: tf.add_n(strategy.experimental_local_results(of_each)),
        args=(value,),
    )


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
        self.mean = self.add_weight(shape, "zeros", name="mean", **_SAME)
        self.variance = self.add_weight(shape, "zeros", name="variance", **_SAME)
        self.updates = self.add_weight((n_taps, 1, 1), "zeros", name="updates", **_SAME)
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
        count = _over_replicas(ops.sum(finite, axis=1, keepdims=True))
        some = ops.cast(count > 0, "float32")
        count = ops.maximum(count, 1.0)
        mean = _over_replicas(ops.sum(x, axis=1, keepdims=True)) / count
        squares = ops.sum(finite * ops.square(x - mean), axis=1, keepdims=True)
        variance = _over_replicas(squares) / count

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
        self.mean_kernel = self.add_weight(kernel, "zeros", name="mean_kernel", **_SAME)
        self.mean_bias = self.add_weight(bias, "zeros", name="mean_bias", **_SAME)
        self.built = True

    @property
    def averaged(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """Each variable that the optimizer moves, with its average."""
        return [(self.kernel, self.mean_kernel), (self.bias, self.mean_bias)]

    def call(self, inputs):
        return ops.unstack(ops.softmax(self.mean_logits(inputs)), self.n_taps)

    def logits(self, inputs: tf.Tensor) -> tf.Tensor:
        """Logits by the weights as the optimizer left them, (n_taps, batch, num_classes)."""
        return ops.matmul(inputs, self.kernel) + self.bias

    def mean_logits(self, inputs: tf.Tensor) -> tf.Tensor:
        """Logits by the averaged weights, shape (n_taps, batch, num_classes)."""
        return ops.matmul(inputs, self.mean_kernel) + self.mean_bias

    def mean_weights(self) -> tuple[tf.Tensor, tf.Tensor]:
        """W and b of the predictions, (n_taps, n_features, num_classes) and (n_taps, 1, ...)."""
        return self.mean_kernel.value, self.mean_bias.value

    def gradients(self, inputs: tf.Tensor, labels: tf.Tensor, weight: tf.Tensor) -> list[tf.Tensor]:
        """Gradients of mean_i(weight_i * cross-entropy_i), in the order of `averaged`.

        The mean is over the examples of all replicas, and each gets its own share of it.

        Args:
            inputs: float32, shape (n_taps, batch, n_features).
            labels: int32, shape (batch,).
            weight: float32, shape (n_taps, batch).
        """
        residual = self.residual(self.logits(inputs), labels, weight)
        by_kernel = tf.matmul(inputs, residual, transpose_a=True)
        return [by_kernel, ops.sum(residual, axis=1, keepdims=True)]

    def residual(self, logits: tf.Tensor, labels: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        """Gradient in the logits, (n_taps, batch, num_classes); arguments as for `gradients`."""
        residual = ops.softmax(logits) - ops.one_hot(labels, self.num_classes)
        labelled = ops.cast(labels >= 0, "float32")
        batch = _over_replicas(ops.cast(ops.shape(logits)[1], "float32"))
        return residual * (weight * labelled / batch)[..., None]

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
        self.mean_projection = self.add_weight(shape, initial, name="mean_projection", **_SAME)

    @property
    def averaged(self) -> list[tuple[keras.Variable, keras.Variable]]:
        return [*super().averaged, (self.projection, self.mean_projection)]

    def logits(self, inputs: tf.Tensor) -> tf.Tensor:
        return super().logits(ops.matmul(inputs, self._scaled(self.projection)))

    def mean_logits(self, inputs: tf.Tensor) -> tf.Tensor:
        return super().mean_logits(ops.matmul(inputs, self._scaled(self.mean_projection)))

    def mean_weights(self) -> tuple[tf.Tensor, tf.Tensor]:
        kernel, bias = super().mean_weights()
        return ops.matmul(self._scaled(self.mean_projection), kernel), bias

    def gradients(self, inputs: tf.Tensor, labels: tf.Tensor, weight: tf.Tensor) -> list[tf.Tensor]:
        projected = ops.matmul(inputs, self._scaled(self.projection))
        residual = self.residual(super().logits(projected), labels, weight)
        by_kernel = tf.matmul(projected, residual, transpose_a=True)
        by_bias = ops.sum(residual, axis=1, keepdims=True)
        by_projected = tf.matmul(residual, self.kernel, transpose_b=True)
        by_projection = self._scaled(tf.matmul(inputs, by_projected, transpose_a=True))
        return [by_kernel, by_bias, by_projection]

    def get_config(self):
        return {**super().get_config(), "rank": self.rank, "seed": self.seed}

    def _scaled(self, projection: tf.Tensor) -> tf.Tensor:
        """P: its rows take a z of length 1 to a vector of about that length."""
        return projection * (_PROJECTION_UNIT / float(np.sqrt(self.rank)))


@dataclasses.dataclass
class _Group:
    """The taps of one width: one standardisation, one stack of heads a target."""

    taps: list[str]
    standardize: Standardize
    heads: dict[str | None, SoftmaxHeads]


class ProbeSet:
    """All probes of a host: their weights, optimizer and sums.

    Args:
        widths: How wide the probe of each tap is, in graph order.
        num_classes: Number of classes of each target; the key is its name, `None` if it has none.
        optimizer: Keras optimizer for the probes, used by nobody else.
        seed: Seed of projections that are learned.
    """

    def __init__(
        self,
        widths: Mapping[str, Width],
        num_classes: Mapping[str | None, int],
        optimizer: keras.optimizers.Optimizer,
        seed: int = 0,
    ):
        self.taps = list(widths)
        self.targets = list(num_classes)
        self.optimizer = optimizer
        by_width: dict[Width, list[str]] = defaultdict(list)
        for tap, width in widths.items():
            by_width[width].append(tap)
        self._groups = [_group(taps, width, num_classes, seed) for width, taps in by_width.items()]
        self._steps = keras.Variable(0.0, dtype="float32", name="probe_steps", **_SAME)
        # float64 holds counts exactly and loses nothing over a long epoch.
        shape = (len(self.targets) * len(self.taps), len(SUMS))
        self._sums = {
            kind: keras.Variable(np.zeros(shape), dtype="float64", name=kind, **_SAME)
            for kind in ("train", "test")
        }
        self.optimizer.build(self._trainable())
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            # What it gets are sums over the replicas already.
            self.optimizer._all_reduce_sum_gradients = lambda pairs: pairs

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
        self._add_up("train", rows)
        gradients = [_over_replicas(gradient) for gradient in gradients]
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
        self._add_up("test", rows)

    def _add_up(self, kind: Literal["train", "test"], rows: list[tf.Tensor]) -> None:
        self._sums[kind].assign_add(_over_replicas(ops.concatenate(rows, axis=0)))

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
        kernel, bias = (np.asarray(w, "float64")[position] for w in heads.mean_weights())
        folded = scale[:, None] * kernel, bias[0] - shift @ kernel
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

    @property
    def variables(self) -> dict[str, keras.Variable]:
        """All that training changes but the sums: weights, statistics and optimizer slots."""
        layers: list[keras.layers.Layer] = []
        for group in self._groups:
            layers += [group.standardize, *group.heads.values()]
        found = {f"{layer.name}/{v.name}": v for layer in layers for v in layer.variables}
        slots = {f"optimizer/{i}": v for i, v in enumerate(self.optimizer.variables)}
        return {**found, **slots, "steps": self._steps}

    def _trainable(self) -> list[keras.Variable]:
        return [
            variable
            for group in self._groups
            for heads in group.heads.values()
            for variable, _ in heads.averaged
        ]


def _group(
    taps: list[str], width: Width, num_classes: Mapping[str | None, int], seed: int
) -> _Group:
    name = f"{width.n_features}" + ("" if width.rank is None else f"_{width.rank}")
    shape = len(taps), width.n_features
    heads: dict[str | None, SoftmaxHeads] = {}
    for position, (target, classes) in enumerate(num_classes.items()):
        named = f"heads_{name}_{position}"
        if width.rank is None:
            heads[target] = SoftmaxHeads(*shape, classes, name=named)
        else:
            heads[target] = ProjectedHeads(*shape, classes, width.rank, seed, name=named)
    return _Group(taps, Standardize(*shape, name=f"standardize_{name}"), heads)


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
