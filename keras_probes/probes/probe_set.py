"""All probes of a host, side by side: one a tap and target, under one optimizer.

In: features, float32, shape (batch, n_features), by tap; labels and weights by target. Out:
probabilities, and sums from which error and loss are read.

Replicas of a host see a part of each batch: sums over examples are sums over all of them, and what
comes of these is the same in each.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_probes.probes.heads import SAME, SoftmaxHeads, Standardize, averaging_rate, residual_of
from keras_probes.probes.measures import SUMS, batch_sums
from keras_probes.probes.refit import NARROW, refit
from keras_probes.probes.replicas import sum_over_replicas
from keras_probes.probes.spread import LARGEST

# Numbers that the features of taps refitted side by side may have in all: beyond, a pass is worth
# its calls, and probes that are done would be carried along.
STACK_SIZE = 2**22
STACK_PARAMETERS = 2**20  # likewise: what the solver keeps of them is to stay in the cache

Features = Mapping[str, tf.Tensor]  # by tap
Labels = Mapping[str | None, tf.Tensor]  # by target
Sums = Mapping[str | None, Mapping[str, Mapping[str, float]]]  # by target, tap, name in SUMS
_Place = tuple[int, int]  # of a tap: its group, and which of that


def parameters_of(n_features: int, num_classes: int) -> int:
    """Number of trainable parameters of one probe: W and b."""
    return (n_features + 1) * num_classes


def memory_of(n_features: int, num_classes: int) -> int:
    """Bytes one probe takes: parameters, average, gradient, two optimizer slots, statistics."""
    return 4 * (5 * parameters_of(n_features, num_classes) + 4 * n_features)


@dataclasses.dataclass
class _Group:
    """The taps of one width: one stack of heads a target."""

    taps: list[str]
    n_features: int
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
        self._groups = [_group(taps, width, num_classes) for width, taps in by_width.items()]
        shapes = [(len(group.taps), group.n_features) for group in self._groups]
        self._standardize = Standardize(shapes, name="standardize")
        # Steps that were taken, and examples they were taken on.
        self._steps = keras.Variable(0.0, dtype="float32", name="probe_steps", **SAME)
        self._examples = keras.Variable(0.0, dtype="float32", name="examples", **SAME)
        # float64 holds counts exactly and loses nothing over a long epoch.
        shape = (len(self.targets) * len(self.taps), len(SUMS))
        self._sums = {
            kind: keras.Variable(np.zeros(shape), dtype="float64", name=kind, **SAME)
            for kind in ("train", "test")
        }
        # How far probes were from their optimum at the last refit, and are, and when that was; -1
        # where it is not known.
        self._certificates = keras.Variable(
            np.full((shape[0], 2), -1.0), dtype="float64", name="certificates", **SAME
        )
        self._refit_at = keras.Variable(-1.0, dtype="float32", name="refit_at", **SAME)
        # How often each class is among the labels.
        self._labels = {
            (kind, target): keras.Variable(
                np.zeros(classes), dtype="float64", name=f"{kind}_labels_{place}", **SAME
            )
            for kind in ("train", "test")
            for place, (target, classes) in enumerate(num_classes.items())
        }
        self.optimizer.build(self._trainable())
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            # What it gets are sums over the replicas already.
            self.optimizer._all_reduce_sum_gradients = lambda pairs: pairs

    def train(self, features: Features, labels: Labels, weights: Labels) -> None:
        """Measures a batch, then takes one step on it.

        The step descends, for every tap and target, on mean_i(weight_i * cross-entropy_i) plus
        `l2 / 2 * |W|^2`: the penalty that the last refit chose, and one example's share before it.

        Args:
            features: By tap, float32, shape (batch, n_features).
            labels: By target, int32, shape (batch,); an example with -1 is left out.
            weights: By target, float32, shape (batch,).
        """
        self._steps.assign_add(1.0)
        x, finite = self._finite(self._stacked(features))
        self._standardize.update(x, finite)
        z = self._standardize.standardized(x)
        sums = self._add_up("train", z, finite, labels, weights)
        self._shrink_the_lost(sums)
        examples = sum_over_replicas(tf.cast(tf.shape(finite)[1], tf.float32))
        self._examples.assign_add(examples)

        gradients = []
        for target in self.targets:
            heads = [group.heads[target] for group in self._groups]
            logits = [head.logits(of_group) for head, of_group in zip(heads, z, strict=True)]
            weight = finite * weights[target]
            # As in the refit, where the mean is over weights, the penalty weighs as much as they.
            weight_of_all = sum_over_replicas(tf.reduce_sum(weights[target]))
            mean_weight = tf.math.divide_no_nan(weight_of_all, examples)
            residual = residual_of(tf.concat(logits, axis=0), labels[target], weight)
            parts = tf.split(residual, [len(group.taps) for group in self._groups])
            for head, of_group, part in zip(heads, z, parts, strict=True):
                gradients += head.gradients(of_group, part, mean_weight * self._penalty(head))
        self.optimizer.apply(gradients, self._trainable())
        rate = averaging_rate(tf.convert_to_tensor(self._steps))
        for head in self._heads():
            head.average(rate)

    def _shrink_the_lost(self, sums: tf.Tensor) -> None:
        """Shrinks the probes that do worse on a batch than guessing, beyond what chance explains.

        The host moves on after a refit. A probe that rests on directions in which its features
        hardly vary is soon as wrong as it was sure, and the optimizer's steps take long to bring it
        back. The loss of such a probe is about proportional to W and b.

        Args:
            sums: Of the batch, as `_add_up` returns them.
        """
        count, weight, loss = (
            sums[:, SUMS.index(name)] for name in ("count", "weight", "weighted_loss")
        )
        classes = [heads.num_classes for heads in self._heads() for _ in range(heads.n_taps)]
        of_guess = weight * (tf.constant(np.log(classes)) + tf.math.rsqrt(count))
        factor = tf.where(loss > of_guess, 0.5 * of_guess / loss, 1.0)
        parts = tf.split(tf.cast(factor, tf.float32), [heads.n_taps for heads in self._heads()])

        def shrink() -> tf.Tensor:
            for heads, part in zip(self._heads(), parts, strict=True):
                heads.shrink(part)
            return tf.constant(True)

        if tf.distribute.has_strategy():
            shrink()  # a replica can't write within a branch
        else:
            tf.cond(tf.reduce_any(loss > of_guess), shrink, lambda: tf.constant(False))

    def _penalty(self, heads: SoftmaxHeads) -> tf.Tensor:
        """The l2 penalties of a step, shape (n_taps, 1, 1)."""
        chosen = tf.convert_to_tensor(heads.l2)
        return tf.where(chosen > 0, chosen, 1.0 / tf.convert_to_tensor(self._examples))

    def test(self, features: Features, labels: Labels, weights: Labels) -> None:
        """Measures a batch; arguments as for `train`."""
        x, finite = self._finite(self._stacked(features))
        self._add_up("test", self._standardize.standardized(x), finite, labels, weights)

    def sizes(self) -> list[tuple[int, int]]:
        """Number of features and of classes of each probe."""
        each = [heads for heads in self._heads() for _ in range(heads.n_taps)]
        return [(heads.n_features, heads.num_classes) for heads in each]

    def refit(
        self,
        features: Features,
        labels: Labels,
        weights: Labels,
        *,
        kept: float,
        passes: int,
        epoch: int = 0,
        seed: int = 0,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Takes every probe to its optimum on a sample, as far as the passes allow.

        One is left as it was, with no certificate, where the sample has no two examples with a
        label and finite features.

        Args:
            features: By tap, float32, shape (n, n_features), of a host that stands still.
            labels: By target, int32, shape (n,).
            weights: By target, float32, shape (n,).
            kept: Share of the epoch's examples that are in the sample.
            passes: About how many passes over the sample to take for each probe.
            epoch: Its number.
            seed: Seed of what is drawn.
            progress: Takes what is going on, in words.
        """
        found: dict[tuple[str | None, str], tuple[float, float]] = {}
        total = len(self.targets) * len(self.taps)
        options = {"kept": kept, "passes": passes, "epoch": epoch, "seed": seed}
        for width, stack in self._stacks(len(next(iter(features.values())))):
            sampled = [self._sampled(*at, features[self._tap(*at)]) for at in stack]
            z = tf.stack([_wide(z, width) for z, _ in sampled])
            finite = tf.stack([counted for _, counted in sampled])
            for target in self.targets:
                counts = finite * weights[target] * tf.cast(labels[target] >= 0, tf.float32)
                if progress is not None:
                    progress(f"{len(found)} of {total}")
                found |= self._refit(target, stack, z, labels[target], counts, options)
        nothing = (-1.0, -1.0)
        self._certificates.assign([found.get(key, nothing) for key in self._keys()])
        self._refit_at.assign(self._steps)

    def _stacks(self, n: int) -> Iterator[tuple[int, list[_Place]]]:
        """The taps to refit side by side on n examples, and as how many features each is given."""
        by_width: dict[int, list[_Place]] = defaultdict(list)
        most_classes = max(heads.num_classes for heads in self._heads())
        for at, group in enumerate(self._groups):
            places = by_width[max(group.n_features, NARROW)]
            places += [(at, place) for place in range(len(group.taps))]
        for width, places in by_width.items():
            parameters = parameters_of(min(width, n), most_classes)
            side_by_side = max(1, min(STACK_SIZE // (n * width), STACK_PARAMETERS // parameters))
            for first in range(0, len(places), side_by_side):
                yield width, places[first : first + side_by_side]

    def _sampled(self, group: int, place: int, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Z of a tap, and which examples count, with statistics of the sample alone."""
        finite = tf.reduce_all(tf.abs(x) <= LARGEST, axis=1)
        if not tf.reduce_all(finite):
            x = tf.where(finite[:, None], x, 0.0)
        finite = tf.cast(finite, tf.float32)
        return self._standardize.restart(group, place, x, finite), finite

    def _refit(
        self,
        target: str | None,
        stack: Sequence[_Place],
        z: tf.Tensor,
        labels: tf.Tensor,
        weights: tf.Tensor,
        options: Mapping[str, Any],
    ) -> dict[tuple[str | None, str], tuple[float, float]]:
        """Refits a target's probes of some taps, those with examples.

        Returns:
            Their certificates before and after, by target and tap.
        """
        some = np.flatnonzero(np.count_nonzero(weights.numpy(), axis=1) > 1).tolist()
        if not some:
            return {}
        if len(some) < len(stack):
            z, weights = tf.gather(z, some), tf.gather(weights, some)
            stack = [stack[i] for i in some]
        probes = [(self._groups[at].heads[target], place) for at, place in stack]
        start = np.stack([_wide_probe(heads.probe(at), z.shape[2]) for heads, at in probes])
        l2 = np.array([heads.penalty(at) for heads, at in probes])
        result = refit(z, tf.maximum(labels, 0), weights, start, l2, **options)
        for (heads, at), w, penalty in zip(probes, result.weights, result.l2, strict=True):
            heads.restart(at, np.delete(w, np.s_[heads.n_features : -1], axis=0), penalty)
        keys = [(target, self._tap(*at)) for at in stack]
        certificates = zip(result.before.tolist(), result.after.tolist(), strict=True)
        return dict(zip(keys, certificates, strict=True))

    def _stacked(self, features: Features) -> list[tf.Tensor]:
        """Features by group: float32, shape (n_taps, batch, n_features)."""
        return [tf.stack([features[tap] for tap in group.taps]) for group in self._groups]

    def _finite(self, x: Sequence[tf.Tensor]) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Leaves out the examples that have a NaN, infinite or enormous feature at a tap.

        Args:
            x: By group, float32, shape (n_taps, batch, n_features).

        Returns:
            The same, with 0 in the place of these examples; and of all taps, float32, shape (taps,
            batch): 1 for the examples that count.
        """
        usable = [tf.reduce_all(tf.abs(of_group) <= LARGEST, axis=2) for of_group in x]
        finite = tf.concat(usable, axis=0)
        parts = tf.split(finite[..., None], [len(group.taps) for group in self._groups])

        def without() -> list[tf.Tensor]:
            return [tf.where(part, of, 0.0) for part, of in zip(parts, x, strict=True)]

        kept = tf.cond(tf.reduce_all(finite), lambda: list(x), without)
        return kept, tf.cast(finite, tf.float32)

    def _add_up(
        self,
        kind: Literal["train", "test"],
        z: Sequence[tf.Tensor],
        finite: tf.Tensor,
        labels: Labels,
        weights: Labels,
    ) -> tf.Tensor:
        """Takes a batch into the sums; returns its own, a row a probe."""
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
        of_batch = sum_over_replicas(tf.concat(rows, axis=0))
        self._sums[kind].assign_add(of_batch)
        return of_batch

    def reset_sums(self, kind: Literal["train", "test"]) -> None:
        """Starts a new epoch of training, or a new evaluation."""
        self._sums[kind].assign(np.zeros(self._sums[kind].shape))
        for target in self.targets:
            self._labels[kind, target].assign(np.zeros(self._labels[kind, target].shape))

    def label_counts(self, kind: Literal["train", "test"], target: str | None) -> np.ndarray:
        """How often each class was among the labels since the last reset, shape (num_classes,)."""
        return self._labels[kind, target].value.numpy()

    def sums(self, kind: Literal["train", "test"]) -> Sums:
        """Returns `sums[target][tap][name]` since the last reset, for the names in `SUMS`."""
        rows = self._sums[kind].value.numpy().tolist()
        pairs = zip(self._keys(), rows, strict=True)
        found = {key: dict(zip(SUMS, row, strict=True)) for key, row in pairs}
        return {t: {tap: found[t, tap] for tap in self.taps} for t in self.targets}

    def certificates(self, kind: Literal["train", "test"]) -> dict[tuple[str | None, str], float]:
        """Upper bounds on how far the probes are above their optimum, in nats.

        Args:
            kind: `"train"`: as they trained before the refit; `"test"`: as they are now.

        Returns:
            By target and tap; probes of which nothing is known are not there.
        """
        if float(self._refit_at.value.numpy()) != self.steps:
            return {}
        column = self._certificates.value.numpy()[:, ("train", "test").index(kind)]
        known = zip(self._keys(), column.tolist(), strict=True)
        return {key: bound for key, bound in known if bound >= 0}

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

    @property
    def examples(self) -> int:
        """Number of examples in them."""
        return int(self._examples.value.numpy())

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
        """What the probes have become: all that training changes but the sums."""
        layers: list[keras.layers.Layer] = [self._standardize, *self._heads()]
        found = {f"{layer.name}/{v.name}": v for layer in layers for v in layer.variables}
        slots = {f"optimizer/{i}": v for i, v in enumerate(self.optimizer.variables)}
        return {
            **found,
            **slots,
            "steps": self._steps,
            "examples": self._examples,
            "certificates": self._certificates,
            "refit_at": self._refit_at,
            **{f"labels/{i}": self._labels["train", t] for i, t in enumerate(self.targets)},
        }

    def _tap(self, group: int, place: int) -> str:
        return self._groups[group].taps[place]

    def _keys(self) -> list[tuple[str | None, str]]:
        """Target and tap of each probe, in the order of the sums."""
        return [(t, tap) for t in self.targets for group in self._groups for tap in group.taps]

    def _heads(self) -> list[SoftmaxHeads]:
        """By target, then by group."""
        return [group.heads[target] for target in self.targets for group in self._groups]

    def _trainable(self) -> list[keras.Variable]:
        return [variable for heads in self._heads() for variable, _ in heads.averaged]


def _group(taps: list[str], n_features: int, num_classes: Mapping[str | None, int]) -> _Group:
    heads = {
        target: SoftmaxHeads(len(taps), n_features, classes, name=f"heads_{n_features}_{position}")
        for position, (target, classes) in enumerate(num_classes.items())
    }
    return _Group(taps, n_features, heads)


def _wide(z: tf.Tensor, width: int) -> tf.Tensor:
    """Z of a tap, shape (n, d), with zeros for features that it does not have: (n, width)."""
    return tf.pad(z, [[0, 0], [0, width - z.shape[1]]])


def _wide_probe(weights: np.ndarray, width: int) -> np.ndarray:
    """W over b, shape (d + 1, K), likewise: (width + 1, K)."""
    missing = np.zeros((width + 1 - len(weights), weights.shape[1]))
    return np.concatenate([weights[:-1], missing, weights[-1:]])
