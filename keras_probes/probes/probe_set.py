"""All probes of a host, side by side: one a tap and target, under one optimizer.

In: features, float32, shape (batch, n_features), by tap; labels and weights by target. Out:
answers, and sums from which error and loss are read.

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

from keras_probes.probes.heads import SAME, LinearHeads, Standardize, averaging_rate
from keras_probes.probes.refit import NARROW, TOL, refit
from keras_probes.probes.replicas import sum_over_replicas
from keras_probes.probes.spectrum import Spectrum
from keras_probes.probes.spread import LARGEST
from keras_probes.probes.tasks.task import Task

# Numbers that the features of taps refitted side by side may have in all: beyond, a pass is worth
# its calls, and probes that are done would be carried along.
STACK_SIZE = 2**22
STACK_PARAMETERS = 2**20  # likewise: what the solver keeps of them is to stay in the cache
MOST_PAIRED = 512  # taps; what is kept of pairs grows with their square

Features = Mapping[str, tf.Tensor]  # by tap
Labels = Mapping[str | None, tf.Tensor]  # by target
Sums = Mapping[str | None, Mapping[str, Mapping[str, Any]]]  # by target, tap, and the task's name
_Place = tuple[int, int]  # of a tap: its group, and which of that


def parameters_of(n_features: int, outputs: int) -> int:
    """Number of trainable parameters of one probe: W and b."""
    return (n_features + 1) * outputs


def memory_of(n_features: int, outputs: int) -> int:
    """Bytes one probe takes: parameters, average, gradient, two optimizer slots, statistics."""
    return 4 * (5 * parameters_of(n_features, outputs) + 4 * n_features)


@dataclasses.dataclass
class _Group:
    """The taps of one width: one stack of heads a target."""

    taps: list[str]
    n_features: int
    heads: dict[str | None, LinearHeads]


class ProbeSet:
    """All probes of a host: their weights, optimizer and sums.

    Args:
        n_features: Number of features of each tap, in graph order.
        tasks: What each target asks; the key is its name, `None` if it has none.
        optimizer: Keras optimizer for the probes, used by nobody else.
        rows_per_example: How many rows in a row are of one example: its positions.
        name: What the names of its layers begin with, where one model is to have several sets.
    """

    def __init__(
        self,
        n_features: Mapping[str, int],
        tasks: Mapping[str | None, Task],
        optimizer: keras.optimizers.Optimizer,
        rows_per_example: int = 1,
        name: str = "",
    ):
        self.rows_per_example = rows_per_example
        self.taps = list(n_features)
        self.tasks = dict(tasks)
        self._measuring = {
            "train": self.tasks,
            "test": {target: task.for_evaluation() for target, task in tasks.items()},
        }
        self.targets = list(tasks)
        self.optimizer = optimizer
        by_width: dict[int, list[str]] = defaultdict(list)
        for tap, width in n_features.items():
            by_width[width].append(tap)
        self._groups = [_group(taps, width, tasks, name) for width, taps in by_width.items()]
        shapes = [(len(group.taps), group.n_features) for group in self._groups]
        self._standardize = Standardize(shapes, name=f"{name}standardize")
        # Steps that were taken, and examples they were taken on.
        self._steps = keras.Variable(0.0, dtype="float32", name="probe_steps", **SAME)
        self._examples = keras.Variable(0.0, dtype="float32", name="examples", **SAME)
        # float64 holds counts exactly and loses nothing over a long epoch.
        self._sums = {
            (kind, target): keras.Variable(
                np.zeros((len(self.taps), task.size)), dtype="float64", name=kind, **SAME
            )
            for kind, of_kind in self._measuring.items()
            for target, task in of_kind.items()
        }
        # How far probes were from their optimum at the last refit, and are, and when that was; -1
        # where it is not known.
        self._certificates = keras.Variable(
            np.full((len(self.targets) * len(self.taps), 2), -1.0),
            dtype="float64",
            name="certificates",
            **SAME,
        )
        self._refit_at = keras.Variable(-1.0, dtype="float32", name="refit_at", **SAME)
        # How often each label comes.
        self._tallies = {
            (kind, target): keras.Variable(
                np.zeros(task.tally_size), dtype="float64", name=f"{kind}_labels_{place}", **SAME
            )
            for kind in ("train", "test")
            for place, (target, task) in enumerate(tasks.items())
        }
        # How the errors of the taps go together, in an evaluation.
        self._pairs = {
            target: keras.Variable(
                np.zeros((3 * len(self.taps), 2 * len(self.taps))),
                dtype="float64",
                name="pairs",
                **SAME,
            )
            for target in (tasks if len(self.taps) <= MOST_PAIRED else ())
        }
        # In how many directions features vary, by tap, as the last refit found if it was to.
        self.spectra: dict[str, Spectrum] = {}
        self.optimizer.build(self._trainable())
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            # What it gets are sums over the replicas already.
            self.optimizer._all_reduce_sum_gradients = lambda pairs: pairs

    def train(self, features: Features, labels: Labels, weights: Labels) -> None:
        """Measures a batch, then takes one step on it.

        The step descends, for every tap and target, on mean_i(weight_i * loss_i) plus
        `l2 / 2 * |W|^2`: the penalty that the last refit chose, and one example's share before it.
        The mean is over the terms of the loss.

        Args:
            features: By tap, float32, shape (batch, n_features).
            labels: By target, as its task has them.
            weights: By target, float32, shape (batch,).
        """
        self._steps.assign_add(1.0)
        labels = self._standardised(labels)
        x, finite = self._finite(self._stacked(features))
        self._standardize.update(x, finite)
        z = self._standardize.standardized(x)
        sums = self._add_up("train", z, finite, labels, weights)
        self._shrink_the_lost(sums)
        examples = sum_over_replicas(tf.cast(tf.shape(finite)[1], tf.float32))
        self._examples.assign_add(examples)

        gradients = []
        for target, task in self.tasks.items():
            heads = [group.heads[target] for group in self._groups]
            outputs = [head.outputs(of_group) for head, of_group in zip(heads, z, strict=True)]
            labelled = tf.cast(task.state(labels[target]) == 0, tf.float32)
            # As in the refit, where the mean is over weights, the penalty weighs as much as they.
            weight_of_all = sum_over_replicas(tf.reduce_sum(weights[target]))
            mean_weight = tf.math.divide_no_nan(weight_of_all, examples)
            share = finite * weights[target] * labelled / (examples * task.terms)
            residual = task.residual(tf.concat(outputs, axis=0), labels[target])
            parts = tf.split(residual * share[..., None], [len(g.taps) for g in self._groups])
            for head, of_group, part in zip(heads, z, parts, strict=True):
                gradients += head.gradients(of_group, part, mean_weight * self._penalty(head))
        self.optimizer.apply(gradients, self._trainable())
        rate = averaging_rate(tf.convert_to_tensor(self._steps))
        for head in self._heads():
            head.average(rate)

    def _shrink_the_lost(self, sums: Mapping[str | None, tf.Tensor]) -> None:
        """Shrinks the probes that do worse on a batch than guessing, beyond what chance explains.

        The host moves on after a refit. A probe that rests on directions in which its features
        hardly vary is soon as wrong as it was sure, and the optimizer's steps take long to bring it
        back. The loss of such a probe is about proportional to W and b.

        Args:
            sums: Of the batch, as `_add_up` returns them.
        """
        of_guess, losses = [], []
        for target, task in self.tasks.items():
            places = [list(task.sums).index(of) for of in ("count", "weight", "weighted_loss")]
            count, weight, loss = (sums[target][:, place] for place in places)
            of_guess.append(weight * (task.guess_loss + tf.math.rsqrt(count)))
            losses.append(loss)
        of_guess, loss = tf.concat(of_guess, axis=0), tf.concat(losses, axis=0)
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

    def _penalty(self, heads: LinearHeads) -> tf.Tensor:
        """The l2 penalties of a step, shape (n_taps, 1, 1)."""
        chosen = tf.convert_to_tensor(heads.l2)
        return tf.where(chosen > 0, chosen, 1.0 / tf.convert_to_tensor(self._examples))

    def test(
        self,
        features: Features,
        labels: Labels,
        weights: Labels,
        examples: tf.Tensor | int | None = None,
    ) -> None:
        """Measures a batch; arguments as for `train`.

        Args:
            features: By tap.
            labels: By target.
            weights: By target.
            examples: Of how many examples these are; by default each row is one.
        """
        labels = self._standardised(labels)
        x, finite = self._finite(self._stacked(features))
        z = self._standardize.standardized(x)
        self._add_up("test", z, finite, labels, weights, examples)

    def sizes(self) -> list[tuple[int, int]]:
        """Number of features and of outputs of each probe."""
        each = [heads for heads in self._heads() for _ in range(heads.n_taps)]
        return [(heads.n_features, heads.n_outputs) for heads in each]

    def refit(
        self,
        features: Mapping[str, Any],
        labels: Labels,
        weights: Labels,
        *,
        kept: float,
        passes: int | None,
        epoch: int = 0,
        seed: int = 0,
        tol: float = TOL,
        spectra: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Takes every probe to its optimum on a sample, as far as the passes allow.

        One is left as it was, with no certificate, where the sample has no two examples with a
        label and finite features.

        Args:
            features: By tap, float32, shape (n, n_features), of a host that stands still. They are
                read tap by tap, so that they may lie on disk.
            labels: By target, as its task has them.
            weights: By target, float32, shape (n,).
            kept: Share of the epoch's examples that are in the sample.
            passes: About how many passes over the sample to take for each probe; None for as many
                as it takes.
            epoch: Its number; by default penalties are looked at, by the same examples each time.
            seed: Seed of what is drawn.
            tol: How far above its optimum a probe may be, in nats.
            spectra: Whether to find in how many directions features vary.
            progress: Takes what is going on, in words.
        """
        self.spectra.clear()
        found: dict[tuple[str | None, str], tuple[float, float]] = {}
        for target, task in self.tasks.items():
            if task.scaled:
                self._rescale(target, labels[target].numpy())
        labels = self._standardised(labels)
        total = len(self.targets) * len(self.taps)
        options = {"kept": kept, "passes": passes, "epoch": epoch, "seed": seed, "tol": tol,
                   "together": self.rows_per_example}  # fmt: skip
        for width, stack in self._stacks(len(next(iter(features.values())))):
            x = (tf.convert_to_tensor(features[self._tap(*at)]) for at in stack)
            sampled = [self._sampled(*at, of_tap) for at, of_tap in zip(stack, x, strict=True)]
            if spectra:
                for at, (z, _) in zip(stack, sampled, strict=True):
                    self.spectra[self._tap(*at)] = Spectrum.of(self._standardize.unscaled(*at, z))
            z = tf.stack([_wide(z, width) for z, _ in sampled])
            finite = tf.stack([counted for _, counted in sampled])
            for target, task in self.tasks.items():
                labelled = tf.cast(task.state(labels[target]) == 0, tf.float32)
                counts = finite * weights[target] * labelled
                if progress is not None:
                    progress(f"{len(found)} of {total}")
                found |= self._refit(target, stack, z, labels[target], counts, options)
        nothing = (-1.0, -1.0)
        self._certificates.assign([found.get(key, nothing) for key in self._keys()])
        self._refit_at.assign(self._steps)

    def _stacks(self, n: int) -> Iterator[tuple[int, list[_Place]]]:
        """The taps to refit side by side on n examples, and as how many features each is given."""
        by_width: dict[int, list[_Place]] = defaultdict(list)
        most_outputs = max(task.outputs for task in self.tasks.values())
        for at, group in enumerate(self._groups):
            places = by_width[max(group.n_features, NARROW)]
            places += [(at, place) for place in range(len(group.taps))]
        for width, places in by_width.items():
            parameters = parameters_of(min(width, n), most_outputs)
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
        result = refit(z, labels, weights, self.tasks[target], start, l2, **options)
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
        examples: tf.Tensor | int | None = None,
    ) -> dict[str | None, tf.Tensor]:
        """Takes a batch into the sums; returns its own by target, a row a tap."""
        of_batch = {}
        for target, task in self._measuring[kind].items():
            pairs = zip(self._groups, z, strict=True)
            outputs = [group.heads[target].mean_outputs(of_group) for group, of_group in pairs]
            rows, errors = task.batch_sums(
                tf.concat(outputs, axis=0), labels[target], weights[target], finite
            )
            of_batch[target] = sum_over_replicas(rows)
            self._sums[kind, target].assign_add(of_batch[target])
            labelled = tf.cast(task.state(labels[target]) == 0, tf.float32)
            if kind == "test" and target in self._pairs:
                pairs = pair_moments(*_of_examples(errors, finite * labelled, examples))
                self._pairs[target].assign_add(sum_over_replicas(pairs))
            tally = task.tally(labels[target], labelled[None])
            self._tallies[kind, target].assign_add(sum_over_replicas(tally[0]))
        return of_batch

    def scale(self, target: str | None) -> np.ndarray:
        """Mean and spread of the numbers that a target predicts, float64, shape (2, outputs)."""
        variable = self._groups[0].heads[target].scale
        assert variable is not None
        centre, spread = variable.numpy().astype("float64")
        return np.stack([centre, np.where(spread > 0, spread, 1.0)])

    def set_scale(self, target: str | None, labels: np.ndarray) -> None:
        """Takes them from some labels, where they are not known and can be told."""
        for group in self._groups:
            known = group.heads[target].scale
            scale = self.tasks[target].scale_of(labels)
            if known is not None and scale is not None and not known.numpy()[1].all():
                known.assign(scale)

    def _rescale(self, target: str | None, labels: np.ndarray) -> None:
        """Takes the scale from a sample in the first refit: a first batch may tell it badly."""
        task, old = self.tasks[target], self.scale(target)
        new = task.scale_of(labels)
        if new is None or any(group.heads[target].l2.numpy().any() for group in self._groups):
            return
        for group in self._groups:
            heads = group.heads[target]
            assert heads.scale is not None
            heads.scale.assign(new)
            for kernel, bias in zip(*heads.averaged, strict=True):
                kernel.assign(kernel * (old[1] / new[1]))
                bias.assign((bias * old[1] + old[0] - new[0]) / new[1])
        tally = self._tallies["train", target]
        tally.assign(task.rescaled(tally.value.numpy(), old, new))

    def tasks_in_units(self) -> dict[str | None, Task]:
        """The tasks, which measure in the labels' own units."""
        return {
            target: task.in_units(self.scale(target)) if task.scaled else task
            for target, task in self.tasks.items()
        }

    def _standardised(self, labels: Labels) -> dict[str | None, tf.Tensor]:
        """Labels as probes see them: numbers with mean 0 and variance 1."""
        found = dict(labels)
        for target, task in self.tasks.items():
            if task.scaled:
                centre, spread = tf.unstack(
                    tf.convert_to_tensor(self._groups[0].heads[target].scale)
                )
                scale = centre, tf.where(spread > 0, spread, 1.0)
                found[target] = task.standardised(labels[target], scale)
        return found

    def reset_sums(self, kind: Literal["train", "test"]) -> None:
        """Starts a new epoch of training, or a new evaluation."""
        for target in self.targets:
            for variable in (self._sums[kind, target], self._tallies[kind, target]):
                variable.assign(np.zeros(variable.shape))
            if kind == "test" and target in self._pairs:
                self._pairs[target].assign(np.zeros(self._pairs[target].shape))

    def tally(self, kind: Literal["train", "test"], target: str | None) -> np.ndarray:
        """How often each label came since the last reset, as the task has it, shape (m,)."""
        return self._tallies[kind, target].value.numpy()

    def pairs(self) -> dict[str | None, np.ndarray]:
        """By target, how the errors of the taps went together in the last evaluation.

        Of very many taps, nothing is kept.

        Returns:
            What `pair_moments` adds up to, float64, shape (3 T, 2 T), in graph order.
        """
        by_group = [tap for group in self._groups for tap in group.taps]
        order = np.array([by_group.index(tap) for tap in self.taps])
        rows, columns = ((order + len(order) * np.arange(k)[:, None]).ravel() for k in (3, 2))
        return {t: v.value.numpy()[np.ix_(rows, columns)] for t, v in self._pairs.items()}

    def sums(self, kind: Literal["train", "test"]) -> Sums:
        """Returns `sums[target][tap][name]` since the last reset, for the names of the task."""
        by_group = [tap for group in self._groups for tap in group.taps]
        found: dict[str | None, dict[str, dict[str, Any]]] = {}
        for target, task in self._measuring[kind].items():
            rows = map(task.named, self._sums[kind, target].value.numpy())
            of_tap = dict(zip(by_group, rows, strict=True))
            found[target] = {tap: of_tap[tap] for tap in self.taps}
        return found

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
        """The probe on the raw features: float32 W (n_features, outputs), b (outputs,)."""
        at, group = next((at, g) for at, g in enumerate(self._groups) if tap in g.taps)
        place = group.taps.index(tap)
        # float64, since the two terms of b can be large and of opposite sign.
        mean, scale = (np.asarray(of, "float64") for of in self._standardize.of_tap(at, place))
        weights = group.heads[target].mean_weights()
        kernel, bias = (np.asarray(of_group, "float64")[place] for of_group in weights)
        kernel, bias = scale[:, None] * kernel, bias[0] - (mean * scale) @ kernel
        if self.tasks[target].scaled:
            centre, spread = self.scale(target)
            kernel, bias = kernel * spread, bias * spread + centre
        return kernel.astype("float32"), bias.astype("float32")

    @property
    def steps(self) -> int:
        """Number of batches the probes were given to train on."""
        return int(self._steps.value.numpy())

    @property
    def examples(self) -> int:
        """Number of examples in them."""
        return int(self._examples.value.numpy())

    def outputs(self, features: Features) -> dict[str | None, dict[str, tf.Tensor]]:
        """Returns `outputs[target][tap]`: the probes' answers, float32, shape (batch, outputs)."""
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
            **{f"labels/{i}": self._tallies["train", t] for i, t in enumerate(self.targets)},
        }

    def _tap(self, group: int, place: int) -> str:
        return self._groups[group].taps[place]

    def _keys(self) -> list[tuple[str | None, str]]:
        """Target and tap of each probe, in the order of the sums."""
        return [(t, tap) for t in self.targets for group in self._groups for tap in group.taps]

    def _heads(self) -> list[LinearHeads]:
        """By target, then by group."""
        return [group.heads[target] for target in self.targets for group in self._groups]

    def _trainable(self) -> list[keras.Variable]:
        return [variable for heads in self._heads() for variable, _ in heads.averaged]


def _of_examples(
    errors: tf.Tensor, counts: tf.Tensor, examples: tf.Tensor | int | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean errors of examples, and which count, of those of their rows: (T, examples)."""
    if examples is None:
        return errors, counts
    shape = tf.stack([tf.shape(errors)[0], examples, -1])
    n = tf.reduce_sum(tf.reshape(counts, shape), axis=2)
    total = tf.reduce_sum(tf.reshape(errors * counts, shape), axis=2)
    return tf.math.divide_no_nan(total, n), tf.cast(n > 0, tf.float32)


def pair_moments(errors: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
    """What tells how much the errors of any two taps differ, over the examples that both have.

    Args:
        errors: Of each example, float32, shape (T, n).
        counts: 1 for those that count, else 0, likewise.

    Returns:
        Sums over examples of (1, e, e²) of each tap with (1, e) of each, float64, (3 T, 2 T).
    """
    of_counted = errors * counts
    rows = tf.concat([counts, of_counted, errors * of_counted], axis=0)
    columns = tf.concat([counts, of_counted], axis=0)
    return tf.matmul(tf.cast(rows, tf.float64), tf.cast(columns, tf.float64), transpose_b=True)


def _group(taps: list[str], n_features: int, tasks: Mapping[str | None, Task], name: str) -> _Group:
    heads = {
        target: LinearHeads(
            len(taps),
            n_features,
            task.outputs,
            task.activation,
            task.scaled,
            name=f"{name}heads_{n_features}_{place}",
        )
        for place, (target, task) in enumerate(tasks.items())
    }
    return _Group(taps, n_features, heads)


def _wide(z: tf.Tensor, width: int) -> tf.Tensor:
    """Z of a tap, shape (n, d), with zeros for features that it does not have: (n, width)."""
    return tf.pad(z, [[0, 0], [0, width - z.shape[1]]])


def _wide_probe(weights: np.ndarray, width: int) -> np.ndarray:
    """W over b, shape (d + 1, K), likewise: (width + 1, K)."""
    missing = np.zeros((width + 1 - len(weights), weights.shape[1]))
    return np.concatenate([weights[:-1], missing, weights[-1:]])
