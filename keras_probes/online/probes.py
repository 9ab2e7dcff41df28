"""The probes of one host: what is looked at, what is asked, and what they have become.

In: a host, what the user asked for, and what data look like. Out: probes that are built, kept and
brought back. How they come to their examples is up to the two kinds: `riding`, in the host's own
steps, and `own_data`.
"""

import abc
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_probes.capture.joint import Kind, Part
from keras_probes.online.asked import about, axes_of, known_of
from keras_probes.online.measured import Measured
from keras_probes.online.refit import Progress, Snapshot
from keras_probes.online.settings import Settings
from keras_probes.probes.optimizer import own_optimizer
from keras_probes.probes.probe_set import ProbeSet, Sums, memory_of, parameters_of
from keras_probes.probes.resolve import Evidence, expected_axes, expected_tasks
from keras_probes.probes.targets import Target
from keras_probes.probes.tasks.task import MISSING, WRONG, Task
from keras_probes.results.schema import Refit, name_of_baseline
from keras_probes.taps.plan import TapPlan, make_plan
from keras_probes.taps.within import probed_model

ENOUGH = 1024  # examples, whose positions tell whether labels can be learned


Passes = Mapping[str, Measured]  # by split


class HostProbes(abc.ABC):
    """The probes of one host.

    They are built once the data are known, which tell what inputs and labels look like.

    Args:
        host: The model.
        settings: What to probe and how.

    Attributes:
        memory_limit: Bytes all probes together may take.
        probed: The model whose layers are looked at: the host, or one within it.
        targets: What the probes are asked, with the baselines of each; after they are built.
    """

    memory_limit: int
    probed: keras.Model
    _source = "fit"  # what was given the labels, as errors say

    def __init__(self, host: keras.Model, settings: Settings):
        self.host = host
        self.targets: list[Target] = []
        self._settings = settings
        self._plan: TapPlan | None = None
        self._snapshots: list[Snapshot] = []
        self._model: keras.Model | None = None
        self._pending: Mapping[str, np.ndarray] | None = None  # to restore once built
        self._said: set[Target | str] = set()  # what was said once
        self._axes: int | None = None  # of the positions that labels are of, if they are

    # What the callback calls, and the two kinds do in their own way.

    @abc.abstractmethod
    def look(self) -> None:
        """Looks at the host, and at the data where they are known, as far as nothing is trained."""

    @abc.abstractmethod
    def begin_fit(self) -> None:
        """Gets ready for a `fit` of the host, before its first step."""

    @abc.abstractmethod
    def begin_epoch(self, epoch: int, steps: int | None) -> None:
        """Starts an epoch of training.

        Args:
            epoch: Its number, from 0.
            steps: Number of its batches, where it is known.
        """

    @abc.abstractmethod
    def part_in(self, batch: int) -> Part | None:
        """What part to take in the step that begins with this batch of the epoch."""

    @abc.abstractmethod
    def end_pass(self, kind: Kind, progress: Progress, last: bool = False) -> Passes:
        """Ends an epoch of training, or an evaluation.

        Args:
            kind: Which of the two.
            progress: Takes what is going on, in words.
            last: Whether the fit ends with it, as far as is known.

        Returns:
            What was measured, by split.
        """

    @abc.abstractmethod
    def about_refit(self, last: Refit | None) -> str:
        """Which probes are fitted and when, and why others are not.

        Args:
            last: The last refit, if there was one.
        """

    # What they have in common.

    @property
    def built(self) -> bool:
        """Whether the probes are there."""
        return bool(self._snapshots)

    @property
    def restoring(self) -> bool:
        """Whether there is a state to take over once they are."""
        return self._pending is not None

    @property
    def steps(self) -> int:
        """Number of batches the probes were given to train on."""
        return self.probes.steps if self.built else 0

    @property
    def plan(self) -> TapPlan:
        """The taps; after `choose_taps`."""
        assert self._plan is not None
        return self._plan

    @property
    def probes(self) -> ProbeSet:
        """The probes of the host as it is; once `built`."""
        return self._snapshots[0].probes

    def weights(
        self, tap: str, target: str | None, baseline: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """W and b of a probe on raw features; of a target, or of a baseline of it."""
        key = name_of_baseline(baseline, target)
        found = (s.probes for s in self._snapshots if key in s.probes.targets)
        return next(found).weights(tap, key)

    @property
    def known(self) -> dict[str, Any]:
        """`task` and `num_classes` as they turned out, as the callback takes them; once `built`."""
        return known_of(self.targets)

    def choose_taps(self, input_spec: Any = None) -> None:
        """Looks at the host and picks the taps, unless the probes are there already.

        Args:
            input_spec: Structure of `tf.TensorSpec` of the x of the data; by default what the host
                declares, which may leave sizes open that the data tell.

        Raises:
            TypeError, ValueError: What the user asked for does not fit the host.
        """
        if self.built:
            self.plan.check_sizes(input_spec)
        else:
            asked = self._settings
            self.probed, prefix = probed_model(self.host, asked.model, asked.layers, input_spec)
            with self.host.distribute_strategy.scope():
                self._plan = make_plan(
                    self.probed, input_spec, asked.layers, asked.reduce, asked.seed, prefix
                )
            self._axes = None
            if input_spec is None:  # later, the labels tell
                self._choose_positions(expected_axes(asked.target, self._evidence()))

    def _choose_positions(self, axes: int | None) -> None:
        """Picks those taps that have positions, where the labels are of these."""
        if axes is not None:
            asked = self._settings
            with self.host.distribute_strategy.scope():
                self._plan = self.plan.at_positions(asked.layers, asked.reduce, asked.seed, axes)
            self._axes = axes

    def model(self) -> keras.Model:
        """The sibling Keras model: the host's tensors by tap name -> probabilities."""
        if self.targets[0].positions is not None:
            raise ValueError(
                "There is no sibling model of probes at positions. probes.refit(data) fits them to "
                "the finished model, and attach(model) of its results shows them at each position."
            )
        if self._model is None:
            inputs = self.plan.inputs()
            features = {t.tap.name: t.features(inputs[t.tap.name]) for t in self.plan.taps}
            outputs = {
                target: answers
                for snapshot in self._snapshots
                if snapshot.plan is self.plan
                for target, answers in snapshot.probes.outputs(features).items()
            }
            with warnings.catch_warnings():
                # Tap names may hold slashes, which Keras names may not, so that the two differ.
                warnings.filterwarnings("ignore", "When providing `inputs` as a dict")
                self._model = keras.Model(inputs, outputs.get(None, outputs), name="linear_probes")
        return self._model

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Number of parameters, and memory in bytes, of the probes of each tap.

        Raises:
            ValueError: The number of classes is not known yet.
        """
        tasks: Sequence[Task | None] = [target.task for target in self.targets]
        if not tasks:
            tasks = list(self._expected_tasks().values()) * (1 + len(self._settings.baselines))
        counts = [task.outputs for task in tasks if task is not None]
        if len(counts) < len(tasks):
            raise ValueError(
                "The number of classes is not known before the first batch. Pass num_classes= to "
                "see the number of parameters, or call summary() after fit."
            )
        return {
            tap: (
                sum(parameters_of(width, count) for count in counts),
                sum(memory_of(width, count) for count in counts),
            )
            for tap, width in self.plan.n_features.items()
        }

    def _expected_tasks(self) -> dict[str | None, Task | None]:
        asked = self._settings
        return expected_tasks(asked.target, asked.num_classes, asked.task, self._evidence())

    def about_tasks(self) -> str:
        """What the probes are asked, as a sentence for each target."""
        tasks = {t.name: t.task for t in self.targets if t.baseline is None}
        found = tasks or self._expected_tasks()
        return "\n".join(
            ("Asked" if name is None else f"{name!r} asks")
            + f": {'not known before the data' if task is None else task.name + ', ' + task.about}"
            + (" at each position." if self._axes else ".")
            for name, task in found.items()
        )

    def state(self) -> dict[str, np.ndarray]:
        """Everything the probes have become, by name: a copy that later training leaves alone."""
        return {name: np.array(v.numpy()) for name, v in self._variables().items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `state` returned, now or as soon as the probes are built.

        Raises:
            ValueError: It is the state of probes of other taps, widths or classes.
        """
        if not self.built:
            self._pending = state
            return
        variables = self._variables()
        state = _of_today(state, variables)
        shapes = {name: tuple(v.shape) for name, v in variables.items()}
        given = {name: array.shape for name, array in state.items()}
        if shapes != given:
            name = next(n for n in {**shapes, **given} if shapes.get(n) != given.get(n))
            raise ValueError(
                f"The saved state is of other probes. Expected {name!r} to have the shape "
                f"{shapes.get(name, 'of nothing')}. Received: {given.get(name, 'nothing')}. Were "
                "layers, reduce, optimizer or the model others when it was saved?"
            )
        for name, variable in variables.items():
            variable.assign(state[name])

    def _variables(self) -> dict[str, keras.Variable]:
        subsets = {
            f"reduction/{reduced.tap.name}/{variable.name}": variable
            for reduced in self.plan.taps
            for variable in reduced.reduction.variables
        }
        probes = {
            f"{snapshot.name}/{name}".lstrip("/"): variable
            for snapshot in self._snapshots
            for name, variable in snapshot.probes.variables.items()
        }
        initial = {
            f"initial/weights/{i}": was
            for snapshot in self._snapshots
            for i, (_, was) in enumerate(snapshot.plan.other_weights)
        }
        return {**probes, **subsets, **initial}

    def _build(self, targets: Sequence[Sequence[Target]]) -> None:
        """Makes the probes, and takes over the state that waits for them.

        Args:
            targets: Those of each set of examples, with their baselines.
        """
        self.targets = [target for of_set in targets for target in of_set]
        self._snapshots = []
        self._choose_positions(axes_of(self.targets))
        self._check_memory()
        with self.host.distribute_strategy.scope():
            for place, of_set in enumerate(targets):
                now = [target for target in of_set if target.baseline != "initial"]
                self._add_snapshot(self.plan, now, place, str(place) if place else "")
            first = None
            for place, of_set in enumerate(targets):
                initial = [target for target in of_set if target.baseline == "initial"]
                if initial:
                    first = first or self.plan.with_weights_as_now()
                    name = f"initial_{place}" if place else "initial"
                    self._add_snapshot(first, initial, place, name)
        if self._pending is not None:
            self.restore(self._pending)
            self._pending = None

    def _take_targets(self, targets: list[Target]) -> None:
        """Reads labels as the host's loss, which may have changed, says now."""
        named = {target.key: target for target in targets}
        if targets != self.targets:
            self.targets = targets
            for snapshot in self._snapshots:
                snapshot.targets = [named[target.key] for target in snapshot.targets]
                snapshot.forward = None

    def _check_same_targets(self, targets: Sequence[Target]) -> None:
        """Refuses targets that the probes were not built for."""
        if about(targets) != about(self.targets):
            raise ValueError(
                f"The probes were built for {about(self.targets)}. Received: labels of "
                f"{about(targets)}. Use a new LinearProbeCallback for other labels."
            )

    @abc.abstractmethod
    def _evidence(self) -> Evidence:
        """What is known of the labels beside the spec of the data."""

    def _look_at_training_labels(self, y: Any, targets: Sequence[Target]) -> None:
        """Refuses labels that no probe can be fitted to, and takes the scale of numbers."""
        for target in targets:
            if target.needs_x:
                continue
            some = y
            if target.positions is not None:
                stride = -(-len(keras.tree.flatten(y)[0]) // ENOUGH)
                some = keras.tree.map_structure(lambda of, by=stride: of[::by], y)
            labels, task = target.labels(None, some), target.task
            self._take_scale(target, labels)
            # Of labels that are wrong or missing, `check` tells; not all positions were looked at.
            state = task.state(labels)
            if task.strict and target.positions is None and not tf.reduce_any(state == WRONG):
                tally = task.tally_of(labels)
                reason = task.untrainable(tally) or task.lacking(tally)
                if reason and tf.reduce_any(state == 0):
                    raise ValueError(
                        f"{reason}, among the labels that {self._source} was given. Probes learn "
                        "nothing from these: give others with target=, or leave the callback out."
                    )

    def _take_scale(self, target: Target, labels: tf.Tensor) -> None:
        """Takes the scale of numbers from some of them, where it is not known yet."""
        if target.task.scaled:
            found = (s.probes for s in self._snapshots if target.key in s.probes.targets)
            next(found).set_scale(target.key, labels.numpy())

    def _add_snapshot(self, plan: TapPlan, targets: list[Target], of_set: int, name: str) -> None:
        tasks = {target.key: target.task for target in targets}
        optimizer = own_optimizer(self._settings.optimizer)
        prefix = f"set_{of_set}_" if of_set else ""
        probes = ProbeSet(self.plan.n_features, tasks, optimizer, rows_per_example(targets), prefix)
        self._snapshots.append(Snapshot(plan, targets, probes, name, of_set))

    def _look_at(self, batches: Iterable[Any], targets: Sequence[Target]) -> None:
        """Refuses data whose labels are none, and warns of those that are missing.

        Args:
            batches: Each (x, y, sample_weight), or with `None` in the place of x.
            targets: What is asked of these data.
        """
        missing, wrong, total = (Counter[Target]() for _ in range(3))
        examples: dict[Target, Any] = {}
        for x, y, weights in batches:
            if x is not None and not all(reduced.tap.by_example for reduced in self.plan.taps):
                # Before the first step, since an optimised graph may fail elsewhere first.
                places = targets[0].places(x, y)
                labels = targets[0].labels(x, y, places)
                self.plan.check_rows(self.plan.features_of(x, places), labels)
            for target in targets:
                if x is not None or not target.needs_x:
                    labels, _ = target.labels_and_weights(x, y, weights)
                    self._take_scale(target, labels)
                    state = target.task.state(labels)
                    missing[target] += int(tf.math.count_nonzero(state == MISSING))
                    total[target] += len(labels)
                    if tf.reduce_any(state == WRONG):
                        wrong[target] += int(tf.math.count_nonzero(state == WRONG))
                        examples[target] = target.raw(x, y)
        for target in targets:
            target.refuse(wrong[target], total[target], examples.get(target))
            if missing[target]:
                self._say(target, target.about(missing[target], total[target]))

    def _say(self, what: Target | str, message: str) -> None:
        """Warns once."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(message, stacklevel=2)

    def sums(self, kind: Kind) -> Sums:
        """What was measured since the epoch or evaluation began, by target, tap and name."""
        return _sums(self._snapshots, kind)

    def reset_sums(self, kind: Kind) -> None:
        """Starts a new epoch of training, or a new evaluation."""
        for snapshot in self._snapshots:
            snapshot.probes.reset_sums(kind)

    def targets_in_units(self) -> dict[str | None, Target]:
        """Targets and baselines by key, whose tasks measure in the labels' own units."""
        tasks = {k: task for s in self._snapshots for k, task in s.probes.tasks_in_units().items()}
        return {t.key: dataclasses.replace(t, task=tasks[t.key]) for t in self.targets}

    def _measured(self, kind: Kind, snapshots: Sequence[Snapshot], step: int) -> Measured:
        """What probes have measured since their last reset.

        Args:
            kind: In training, or in an evaluation.
            snapshots: Which probes.
            step: Number of batches that the host, or they, had trained on by then.
        """
        probes = [snapshot.probes for snapshot in snapshots]
        by_target = {target: each for each in probes for target in each.targets}
        units = self.targets_in_units()
        return Measured(
            step=step,
            first_pass=False,
            sums=_sums(snapshots, kind),
            certificates={k: v for each in probes for k, v in each.certificates(kind).items()},
            targets={key: units[key] for key in by_target},
            known={t: each.tally("train", t) for t, each in by_target.items()},
            counts={t: each.tally(kind, t) for t, each in by_target.items()},
            pairs={t: m for each in probes if kind == "test" for t, m in each.pairs().items()},
            spectra={},
        )

    def _check_memory(self) -> None:
        memory = {tap: size for tap, (_, size) in self.sizes().items()}
        if sum(memory.values()) > self.memory_limit:
            largest = max(memory, key=memory.__getitem__)
            raise ValueError(
                f"The probes would take {mebibytes(sum(memory.values()))}, more than the limit of "
                f"{mebibytes(self.memory_limit)}; most of it {largest!r}, with "
                f"{self.plan.n_features[largest]:,} features: {mebibytes(memory[largest])}. Keep "
                'fewer features with reduce="gap" or reduce="auto" (at most 1,000 a tap), choose '
                "fewer layers, or set memory_limit on the callback, in bytes."
            )


def _sums(snapshots: Iterable[Snapshot], kind: Kind) -> Sums:
    by_target = (snapshot.probes.sums(kind) for snapshot in snapshots)
    return {target: by_tap for sums in by_target for target, by_tap in sums.items()}


def rows_per_example(targets: Sequence[Target]) -> int:
    """Number of labels of an example, of targets that are asked of the same examples."""
    positions = targets[0].positions
    return 1 if positions is None else positions.per_example


def _of_today(
    state: Mapping[str, np.ndarray], variables: Mapping[str, keras.Variable]
) -> dict[str, np.ndarray]:
    """A state as it is saved now, of one that may have been saved before there was a refit."""
    if "refit_at" in state:
        return dict(state)
    gone = ("updates", "loss", "initial/updates", "initial/loss")
    kept = {name: array for name, array in state.items() if name not in gone}
    new = ("l2", "certificates", "refit_at")
    return kept | {
        name: np.array(variable.numpy())
        for name, variable in variables.items()
        if name.split("/")[-1] in new or "labels/" in name
    }


def mebibytes(size: float) -> str:
    """A number of bytes in words."""
    return f"{size / 2**20:,.1f} MiB"
