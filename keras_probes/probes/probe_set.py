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
from keras_probes.probes.settle import ENOUGH, Settled, enough, most_examples, settle

# The l2 penalty of a probe while it trains: PRIOR * share^2 / n, for n examples to train on and the
# share that it leaves of the log(num_classes) nats of a guess. Few examples of many features would
# be learned by heart, noisy ones most of all.
PRIOR = 1.5

# The first FEW steps spare nothing: much is still to be learned. After that,
#
# - one step in PACE takes upon itself, for all, what goes into statistics and averages: that moves
#   as much memory as all else, and these are of many steps by then;
# - where there are ROWS classes or more, a step has at least ROWS examples: batches wait for
#   others. A step moves the weights of all classes however few its examples are, which with many
#   classes and small batches is most of what it costs.
FEW, PACE, ROWS = 128, 8, 128

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
    """Bytes one probe takes: parameters, average, gradient, two optimizer slots, statistics."""
    return 4 * (5 * parameters_of(width, num_classes) + 4 * width.n_features)


@dataclasses.dataclass
class _Group:
    """The taps of one width: one stack of heads a target."""

    taps: list[str]
    n_features: int
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
        shapes = [(len(group.taps), group.n_features) for group in self._groups]
        self._standardize = Standardize(shapes, name="standardize")
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
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            # What it gets are sums over the replicas already.
            self.optimizer._all_reduce_sum_gradients = lambda pairs: pairs
        # Replicas, be it one, can't agree on a variable within a condition.
        self._pace = 1 if tf.distribute.has_strategy() else PACE
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
        x, finite = self._finite(list(itertools.islice(rest, len(self._groups))))
        labels, weights = ({target: next(rest) for target in self.targets} for _ in range(2))
        pace = self._paced()
        self._if_due(pace, lambda: self._standardize.update(x, finite, pace))
        z = self._standardize.standardized(x)
        sums = self._add_up("train", z, finite, labels, weights)

        penalties, gradients = iter(self._penalties(sums)), []
        for target in self.targets:
            heads = [group.heads[target] for group in self._groups]
            logits = [head.logits(of_group) for head, of_group in zip(heads, z, strict=True)]
            weight = finite * weights[target]
            residual = residual_of(tf.concat(logits, axis=0), labels[target], weight)
            parts = tf.split(residual, [len(group.taps) for group in self._groups])
            for head, of_group, part in zip(heads, z, parts, strict=True):
                gradients += head.gradients(of_group, part, next(penalties))
        self.optimizer.apply(gradients, self._trainable())
        self._if_due(pace, lambda: self._average(pace))
        self._updates.assign_add(1.0)

    def _paced(self) -> tf.Tensor:
        """For how many steps this one takes statistics and averages, see `PACE`; float32."""
        step = self._update()
        turn = tf.where(step % self._pace == 0, float(self._pace), 0.0)
        return tf.where(step < FEW, 1.0, turn)

    def _if_due(self, pace: tf.Tensor, due: Callable[[], None]) -> None:
        def take() -> tf.Tensor:
            due()
            return pace

        if self._pace > 1:
            tf.cond(pace > 0, take, lambda: pace)
        else:
            due()

    def _average(self, pace: tf.Tensor) -> None:
        rate = compounded(averaging_rate(self._update()), pace)
        for head in self._heads():
            head.average(rate)

    def test(self, features: Features, labels: Labels, weights: Labels) -> None:
        """Measures a batch; arguments as for `train`."""
        x, finite = self._finite(self._stacked(features))
        self._add_up("test", self._standardize.standardized(x), finite, labels, weights)

    def most_examples(self) -> int:
        """How many examples are of use to `settle`."""
        kernels = [heads.kernel.shape[1:] for heads in self._heads()]
        return max(most_examples(*shape) for shape in kernels)

    def settle(
        self, features: Mapping[str, tf.Tensor], labels: Labels, weights: Labels
    ) -> dict[tuple[str | None, str], Settled]:
        """Takes every probe to its optimum on examples at hand, and goes on from there.

        Args:
            features: By tap, float32, shape (n, n_features), of a host that stands still.
            labels: By target, int32, shape (n,).
            weights: By target, float32, shape (n,).

        Returns:
            By target and tap, what became of the probe. Those with too many features or classes
            for so few examples are not there: they stay as they were.
        """
        found: dict[tuple[str | None, str], Settled] = {}
        for at, group in enumerate(self._groups):
            after: dict[str | None, dict[int, Settled]] = {target: {} for target in group.heads}
            before = {target: heads.mean_kernel.numpy() for target, heads in group.heads.items()}
            for place, tap in enumerate(group.taps):
                finite = tf.reduce_all(tf.math.is_finite(features[tap]), axis=1)
                x = tf.boolean_mask(features[tap], finite)
                settling = {
                    target: heads
                    for target, heads in group.heads.items()
                    if enough(len(x), *heads.kernel.shape[1:])
                }
                if not settling or len(x) < ENOUGH * x.shape[1]:
                    continue
                z = self._standardize.restart(at, place, x)
                for target, heads in settling.items():
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
        shapes = [(len(group.taps), None, group.n_features) for group in self._groups]
        per_example = [tf.TensorSpec([None], t) for t in ("int32", "float32") for _ in self.targets]
        return [*map(tf.TensorSpec, shapes), *per_example]

    def _stacked(self, features: Features) -> list[tf.Tensor]:
        """Features by group: float32, shape (n_taps, batch, n_features)."""
        return [tf.stack([features[tap] for tap in group.taps]) for group in self._groups]

    def _finite(self, x: Sequence[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Leaves out the examples that have a NaN or infinite feature at a tap.

        Args:
            x: By group, float32, shape (n_taps, batch, n_features).

        Returns:
            The same, with 0 in the place of these examples; and of all taps, float32, shape (taps,
            batch): 1 for the examples that count.
        """
        # One such feature makes a sum another: that spares a look at each of them.
        totals = [tf.reduce_sum(of_group, axis=2) for of_group in x]
        finite = tf.math.is_finite(tf.concat(totals, axis=0))
        parts = tf.split(finite[..., None], [len(group.taps) for group in self._groups])

        def without() -> list[tf.Tensor]:
            return [tf.where(part, of, 0.0) for part, of in zip(parts, x, strict=True)]

        kept = tf.cond(tf.reduce_all(finite), lambda: list(x), without)
        return kept, tf.cast(finite, tf.float32)

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
        guess = [np.log(max(2, head.num_classes)) for head in heads for _ in range(head.n_taps)]
        share = tf.convert_to_tensor(self._loss) / np.array(guess, "float32")
        penalties = PRIOR / n * tf.square(share)
        return tf.split(penalties[:, None, None], [head.n_taps for head in heads])

    def _add_up(
        self,
        kind: Literal["train", "test"],
        z: Sequence[tf.Tensor],
        finite: tf.Tensor,
        labels: Labels,
        weights: Labels,
    ) -> tf.Tensor:
        """Takes a batch into the sums; returns what it adds, over all replicas."""
        rows = []
        for target in self.targets:
            pairs = zip(self._groups, z, strict=True)
            logits = [group.heads[target].mean_logits(of_group) for group, of_group in pairs]
            rows.append(
                batch_sums(tf.concat(logits, axis=0), labels[target], weights[target], finite)
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
        at, group = next((at, g) for at, g in enumerate(self._groups) if tap in g.taps)
        place = group.taps.index(tap)
        # float64, since the two terms of b can be large and of opposite sign.
        mean, scale = (np.asarray(of, "float64") for of in self._standardize.of_tap(at, place))
        weights = group.heads[target].mean_weights()
        kernel, bias = (np.asarray(of_group, "float64")[place] for of_group in weights)
        folded = scale[:, None] * kernel, bias[0] - (mean * scale) @ kernel
        return folded[0].astype("float32"), folded[1].astype("float32")

    @property
    def steps(self) -> int:
        """Number of batches the probes were given to train on."""
        return int(self._steps.value.numpy())

    def outputs(self, features: Features) -> dict[str | None, dict[str, tf.Tensor]]:
        """Returns `outputs[target][tap]`: probabilities, float32, shape (batch, num_classes)."""
        found: dict[str | None, dict[str, Any]] = {target: {} for target in self.targets}
        z = self._standardize([[features[tap] for tap in group.taps] for group in self._groups])
        for of_group, group in zip(z, self._groups, strict=True):
            for target, heads in group.heads.items():
                found[target].update(zip(group.taps, heads(of_group), strict=True))
        return {target: {tap: found[target][tap] for tap in self.taps} for target in self.targets}

    @property
    def variables(self) -> dict[str, keras.Variable]:
        """All that training changes but the sums: weights, statistics and optimizer slots."""
        layers: list[keras.layers.Layer] = [self._standardize, *self._heads()]
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
    return _Group(taps, width.n_features, heads)
