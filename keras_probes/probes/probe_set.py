"""All probes of a host, side by side: one a tap and target, under one optimizer.

In: features, float32, shape (batch, n_features), by tap; labels and weights by target. Out:
probabilities, and sums from which error and loss are read.

Replicas of a host see a part of each batch: sums over examples are sums over all of them, and what
comes of these is the same in each.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_probes.probes.backlog import Backlog
from keras_probes.probes.heads import (
    SAME,
    ProjectedHeads,
    SoftmaxHeads,
    Standardize,
    averaging_rate,
    compounded,
    residual_of,
)
from keras_probes.probes.measures import SUMS, batch_sums
from keras_probes.probes.replicas import sum_over_replicas
from keras_probes.probes.settle import ENOUGH, Settled, settle

# The l2 penalty of a probe while it trains: PRIOR * share^2 / n, for n examples to train on and the
# share that it leaves of the log(num_classes) nats of a guess. Few examples of many features would
# be learned by heart, noisy ones most of all.
PRIOR = 1.5

# Averages of weights and their penalty move more memory than Adam does, and statistics go over the
# features as often as all else does. After FEW steps, one of PACE takes them upon itself for all:
# averages are over many more steps than that by then.
FEW, PACE = 128, 8

# A step moves the weights of all classes however few its examples are: with many classes and small
# batches that is most of what it costs. So where there are ROWS classes or more, a step after the
# first FEW has at least ROWS examples: batches wait for others.
ROWS = 128

Features = Mapping[str, tf.Tensor]  # by tap
Labels = Mapping[str | None, tf.Tensor]  # by target
Sums = Mapping[str | None, Mapping[str, Mapping[str, float]]]  # by target, tap, name in SUMS


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
        # Batches, and steps that were taken on them.
        self._steps = keras.Variable(0.0, dtype="float32", name="probe_steps", **SAME)
        self._updates = keras.Variable(0.0, dtype="float32", name="probe_updates", **SAME)
        # Of the longest epoch so far.
        self._examples = keras.Variable(0.0, dtype="float32", name="examples", **SAME)
        # float64 holds counts exactly and loses nothing over a long epoch.
        shape = (len(self.targets) * len(self.taps), len(SUMS))
        self._sums = {
            kind: keras.Variable(np.zeros(shape), dtype="float64", name=kind, **SAME)
            for kind in ("train", "test")
        }
        # How often each class is among the labels.
        self._labels = {
            (kind, target): keras.Variable(
                np.zeros(classes), dtype="float64", name=f"{kind}_labels_{place}", **SAME
            )
            for kind in ("train", "test")
            for place, (target, classes) in enumerate(num_classes.items())
        }
        # Running loss before the update, in the same order.
        self._loss = keras.Variable(np.zeros(shape[0]), dtype="float32", name="loss", **SAME)
        self.optimizer.build(self._trainable())
        self._pace = PACE
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            # What it gets are sums over the replicas already.
            self.optimizer._all_reduce_sum_gradients = lambda pairs: pairs
            self._pace = 1  # they can't agree on a variable within a condition
        self._backlog: Backlog | None = None
        # A strategy can't hold a variable whose shape changes.
        if max(num_classes.values()) >= ROWS and not tf.distribute.has_strategy():
            self._backlog = Backlog(self._batch_specs())

    def train(
        self, features: Features, labels: Labels, weights: Labels, *, gather: bool = True
    ) -> None:
        """Measures a batch, then takes one step on it; small ones may wait for others, see `ROWS`.

        The step descends, for every tap and target, on mean_i(weight_i * cross-entropy_i) plus
        `penalty / 2 * |W|^2`; see `PRIOR`.

        Args:
            features: By tap, float32, shape (batch, n_features).
            labels: By target, int32, shape (batch,); an example with -1 is left out.
            weights: By target, float32, shape (batch,).
            gather: Whether batches may wait. XLA can't compile that.
        """
        self._steps.assign_add(1.0)
        batch = self._stacked(features)
        batch += [of[target] for of in (labels, weights) for target in self.targets]
        if self._backlog is None or not gather:
            self._learn(batch)
        else:
            least = tf.where(self._update() < FEW, 0, ROWS)
            self._backlog.pass_on(batch, least, self._learn)

    def catch_up(self) -> None:
        """Takes the step that batches are waiting for, if any do."""
        if self._backlog is not None:
            self._backlog.empty(self._learn)

    def _learn(self, batch: Sequence[tf.Tensor]) -> None:
        """A step on features by group, then labels and weights by target, in one list."""
        rest = iter(batch)
        x, mean, finite = self._finite(list(itertools.islice(rest, len(self._groups))))
        labels, weights = ({target: next(rest) for target in self.targets} for _ in range(2))
        pace = self._paced()

        def update() -> tf.Tensor:
            for place, group in enumerate(self._groups):
                group.standardize.update(x[place], mean[place], finite[place], pace)
            return pace

        self._if_due(pace, update, lambda: pace)
        z = self._standardized(x)
        sums = self._add_up("train", z, finite, labels, weights)

        penalties, gradients = self._penalties(sums), []
        for target in self.targets:
            heads = [group.heads[target] for group in self._groups]
            logits = [head.logits(of_group) for head, of_group in zip(heads, z, strict=True)]
            weight = tf.concat(finite, axis=0) * weights[target]
            residual = residual_of(tf.concat(logits, axis=0), labels[target], weight)
            parts = tf.split(residual, [len(group.taps) for group in self._groups])
            for head, of_group, part in zip(heads, z, parts, strict=True):
                gradients.append(head.gradients(of_group, part))
        self._step(gradients, penalties, pace)

    def _step(
        self,
        gradients: Sequence[Sequence[tf.Tensor]],
        penalties: Sequence[tf.Tensor],
        pace: tf.Tensor,
    ) -> None:
        """One step of the optimizer, by the gradients of the loss and the penalty of each head."""
        heads = self._heads()
        rate = compounded(averaging_rate(self._update()), pace)

        def penalised() -> list[tf.Tensor]:
            triples = zip(heads, gradients, penalties, strict=True)
            return [g for head, of, penalty in triples for g in head.penalised(of, pace * penalty)]

        def average() -> tf.Tensor:
            for head in heads:
                head.average(rate)
            return rate

        of_loss = [gradient for of in gradients for gradient in of]
        of_loss = self._if_due(pace, penalised, lambda: of_loss)
        self.optimizer.apply(of_loss, self._trainable())
        self._if_due(pace, average, lambda: rate)
        self._updates.assign_add(1.0)

    def _paced(self) -> tf.Tensor:
        """For how many steps this one takes upon itself what need not be done in each, float32."""
        step = self._update()
        turn = tf.where(step % self._pace == 0, float(self._pace), 0.0)
        return tf.where(step < FEW, 1.0, turn)

    def _if_due(self, pace: tf.Tensor, due: Callable[[], Any], else_: Callable[[], Any]) -> Any:
        return tf.cond(pace > 0, due, else_) if self._pace > 1 else due()

    def test(self, features: Features, labels: Labels, weights: Labels) -> None:
        """Measures a batch; arguments as for `train`."""
        x, _, finite = self._finite(self._stacked(features))
        self._add_up("test", self._standardized(x), finite, labels, weights)

    def settle(
        self, features: Mapping[str, tf.Tensor], labels: Labels, weights: Labels
    ) -> dict[tuple[str | None, str], Settled]:
        """Takes every probe to its optimum on examples at hand, and goes on from there.

        Args:
            features: By tap, float32, shape (n, n_features), of a host that stands still.
            labels: By target, int32, shape (n,).
            weights: By target, float32, shape (n,).

        Returns:
            By target and tap, what became of the probe. Those of a tap that has too many features
            for so few examples are not there: they stay as they were.
        """
        found: dict[tuple[str | None, str], Settled] = {}
        for group in self._groups:
            after: dict[str | None, dict[int, Settled]] = {target: {} for target in group.heads}
            before = {target: heads.mean_kernel.numpy() for target, heads in group.heads.items()}
            for place, tap in enumerate(group.taps):
                finite = tf.reduce_all(tf.math.is_finite(features[tap]), axis=1)
                x = tf.boolean_mask(features[tap], finite)
                if len(x) < ENOUGH * x.shape[1]:
                    continue
                z = group.standardize.restart(place, x)
                for target, heads in group.heads.items():
                    settled = settle(
                        heads.projected(place, z),
                        tf.boolean_mask(labels[target], finite).numpy(),
                        tf.boolean_mask(weights[target], finite).numpy(),
                        before[target][place],
                        heads.mean_bias.numpy()[place, 0],
                        of=float(self._examples.numpy()),
                    )
                    if settled is not None:
                        after[target][place] = found[target, tap] = settled
            for target, by_place in after.items():
                group.heads[target].restart(
                    {place: settled.kernel for place, settled in by_place.items()},
                    {place: settled.bias for place, settled in by_place.items()},
                )
        return found

    def _batch_specs(self) -> list[tf.TensorSpec]:
        """Of what `_learn` takes."""
        shapes = [(len(g.taps), None, g.standardize.n_features) for g in self._groups]
        per_example = [tf.TensorSpec([None], t) for t in ("int32", "float32") for _ in self.targets]
        return [*map(tf.TensorSpec, shapes), *per_example]

    def _stacked(self, features: Features) -> list[tf.Tensor]:
        """Features by group: float32, shape (n_taps, batch, n_features)."""
        return [tf.stack([features[tap] for tap in group.taps]) for group in self._groups]

    def _finite(
        self, x: Sequence[tf.Tensor]
    ) -> tuple[list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
        """Leaves out the examples that have a NaN or infinite feature at a tap.

        Args:
            x: By group, float32, shape (n_taps, batch, n_features).

        Returns:
            By group: x, with the mean of the others in the place of these examples; that mean,
            shape (n_taps, 1, n_features); and float32, shape (n_taps, batch): 1 for the examples
            that count.
        """
        means = [tf.reduce_mean(of_group, axis=1, keepdims=True) for of_group in x]
        # One such feature makes its mean another: that spares a look at each of them.
        clean = tf.reduce_all([tf.reduce_all(tf.math.is_finite(mean)) for mean in means])

        def as_they_are() -> tuple:
            return list(x), means, [tf.ones(tf.shape(of_group)[:2]) for of_group in x]

        def without() -> tuple:
            found = zip(*map(_without_nonfinite, x), strict=True)
            return tuple(map(list, found))

        return tf.cond(clean, as_they_are, without)

    def _standardized(self, x: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        pairs = zip(self._groups, x, strict=True)
        return [group.standardize.standardized(of_group) for group, of_group in pairs]

    def _penalties(self, sums: tf.Tensor) -> list[tf.Tensor]:
        """The l2 penalty of each of `_heads`, shape (n_taps, 1, 1).

        Args:
            sums: Of this batch, over all replicas, as `_add_up` returns them.
        """
        weight, loss = (sums[:, SUMS.index(name)] for name in ("weight", "weighted_loss"))
        now = tf.cast(tf.math.divide_no_nan(loss, weight), tf.float32)
        rate = averaging_rate(self._update()) * tf.cast(weight > 0, tf.float32)
        self._loss.assign_add(rate * (now - self._loss))

        of_epoch = tf.convert_to_tensor(self._sums["train"])[0]
        seen = sum(of_epoch[SUMS.index(name)] for name in ("count", "nonfinite", "unlabelled"))
        n = tf.maximum(tf.cast(seen, tf.float32), tf.convert_to_tensor(self._examples))
        self._examples.assign(n)

        heads = self._heads()
        losses = tf.split(tf.convert_to_tensor(self._loss), [head.n_taps for head in heads])
        shares = (
            of / float(np.log(max(2, h.num_classes))) for h, of in zip(heads, losses, strict=True)
        )
        return [PRIOR / n * tf.square(share)[:, None, None] for share in shares]

    def _add_up(
        self,
        kind: Literal["train", "test"],
        z: Sequence[tf.Tensor],
        finite: Sequence[tf.Tensor],
        labels: Labels,
        weights: Labels,
    ) -> tf.Tensor:
        """Takes a batch into the sums; returns what it adds, over all replicas."""
        rows = []
        for target in self.targets:
            pairs = zip(self._groups, z, strict=True)
            logits = [group.heads[target].mean_logits(of_group) for group, of_group in pairs]
            counts = tf.concat(finite, axis=0)
            rows.append(
                batch_sums(tf.concat(logits, axis=0), labels[target], weights[target], counts)
            )
            counted = self._labels[kind, target]
            of_class = tf.one_hot(labels[target], counted.shape[0], dtype=tf.float64)
            counted.assign_add(sum_over_replicas(tf.reduce_sum(of_class, axis=0)))
        sums = sum_over_replicas(tf.concat(rows, axis=0))
        self._sums[kind].assign_add(sums)
        return sums

    def reset_sums(self, kind: Literal["train", "test"]) -> None:
        """Starts a new epoch of training, or a new evaluation."""
        if kind == "train" and self._backlog is not None:
            self._backlog.clear()  # of an epoch that was interrupted
        self._sums[kind].assign(np.zeros(self._sums[kind].shape))
        for target in self.targets:
            self._labels[kind, target].assign(np.zeros(self._labels[kind, target].shape))

    def label_counts(self, kind: Literal["train", "test"], target: str | None) -> np.ndarray:
        """How often each class was among the labels since the last reset, shape (num_classes,)."""
        return self._labels[kind, target].value.numpy()

    def sums(self, kind: Literal["train", "test"]) -> Sums:
        """Returns `sums[target][tap][name]` since the last reset, for the names in `SUMS`."""
        rows = iter(self._sums[kind].value.numpy().tolist())
        found = {
            (target, tap): dict(zip(SUMS, next(rows), strict=True))
            for target in self.targets
            for group in self._groups
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
        """Number of batches the probes were given to train on."""
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
        layers: list[keras.layers.Layer] = [
            *(group.standardize for group in self._groups),
            *self._heads(),
        ]
        found = {f"{layer.name}/{v.name}": v for layer in layers for v in layer.variables}
        slots = {f"optimizer/{i}": v for i, v in enumerate(self.optimizer.variables)}
        return {
            **found,
            **slots,
            "steps": self._steps,
            "updates": self._updates,
            "examples": self._examples,
            "loss": self._loss,
        }

    def _update(self) -> tf.Tensor:
        """The number of the step that is being taken, from 1, float32."""
        return self._updates + 1.0

    def _heads(self) -> list[SoftmaxHeads]:
        """By target, then by group."""
        return [group.heads[target] for target in self.targets for group in self._groups]

    def _trainable(self) -> list[keras.Variable]:
        return [variable for heads in self._heads() for variable, _ in heads.averaged]


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


def _without_nonfinite(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`ProbeSet._finite` of one group."""
    finite = tf.reduce_all(tf.math.is_finite(x), axis=2, keepdims=True)
    total = tf.reduce_sum(tf.where(finite, x, 0.0), axis=1, keepdims=True)
    counts = tf.cast(finite, tf.float32)
    mean = tf.math.divide_no_nan(total, tf.reduce_sum(counts, axis=1, keepdims=True))
    return tf.where(finite, x, mean), mean, counts[..., 0]
