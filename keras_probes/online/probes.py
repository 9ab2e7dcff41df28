"""The probes of one host, riding in its steps.

In: batches, as a host computes them. Out: trained probes and what they measured. This is the
observer that `capture` calls; the callback decides when.
"""

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_probes.capture.keras_run import labels_at_hand
from keras_probes.capture.steps import Kind, Part, has_own_step
from keras_probes.online.asked import about, axes_of, known_of, targets_of
from keras_probes.online.measured import Measured
from keras_probes.online.refit import Progress, Refitter, Snapshot, costs_of
from keras_probes.online.settings import Settings
from keras_probes.probes.optimizer import own_optimizer
from keras_probes.probes.probe_set import ProbeSet, Sums, memory_of, parameters_of
from keras_probes.probes.resolve import (
    Evidence,
    expected_axes,
    expected_tasks,
)
from keras_probes.probes.spectrum import SPECTRUM
from keras_probes.probes.targets import Target
from keras_probes.probes.tasks.task import MISSING, WRONG, Task
from keras_probes.results.schema import Refit, name_of_baseline
from keras_probes.taps.batches import examples_in
from keras_probes.taps.plan import ISOLATE, TapPlan, check_rows, make_plan
from keras_probes.taps.record import Recording
from keras_probes.taps.rows import other_rows
from keras_probes.taps.within import probed_model

_SEVERAL_VIEWS = (
    f"This step of the model computes another number of examples than there are labels. {ISOLATE}"
)
_ROWS_UNKNOWN = (
    "The model's own step calls it with something else than the x that probes know. Eagerly, and "
    "with unpack=function, it can't be told whether that has the same examples in the same order, "
    'as labels need it. If not, use mode="isolated".'
)
ENOUGH = 1024  # examples, whose positions tell whether labels can be learned
_NO_STEP = (
    "No batch of this epoch reached the probes: the model's own train_function does not call its "
    'train_step. Use mode="isolated".'
)


class OnlineProbes:
    """Probes that train on the batches of one host.

    They are built once the data are known, which tell what inputs and labels look like.

    Args:
        host: The model.
        settings: What to probe and how.

    Attributes:
        memory_limit: Bytes all probes together may take.
        probed: The model whose layers are looked at: the host, or one within it.
        unpack: Takes a batch as the host's step does; returns (x, y, sample_weight).
    """

    memory_limit: int
    probed: keras.Model

    def __init__(self, host: keras.Model, settings: Settings):
        self.host = host
        self.isolated = settings.isolated
        self.unpack = settings.unpacking()
        self.targets: list[Target] = []
        self._settings = settings
        self._plan: TapPlan | None = None
        self._snapshots: list[Snapshot] = []
        self._model: keras.Model | None = None
        self._pending: Mapping[str, np.ndarray] | None = None  # to restore once built
        self._refitter = Refitter(settings.refit, settings.seed)
        self._said: set[Target | str] = set()  # what was said once
        self._first_pass = True  # whether the probes had seen no example before this epoch
        self._steps_of_epoch: int | None = None  # number of steps of the epoch, where it is known
        self._steps_before = 0  # number of steps the probes took before this epoch
        self._step = 0  # the one of them that is running
        self._every = 1  # probes take part in every so-manieth
        self._axes: int | None = None  # of the positions that labels are of, if they are

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
            outputs = self.probes.outputs(features)
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

    def about_refit(self, last: Refit | None) -> str:
        """Which probes are refitted, and why others are not.

        Args:
            last: The last refit, if there was one.
        """
        if self._refitter.reason:
            return f"No probe is refitted: {self._refitter.reason}."
        if last is not None and last.left_out:
            taps = ", ".join(f"{tap!r} ({reason})" for tap, reason in last.left_out.items())
            return f"Not refitted at the end of the last epoch: {taps}."
        share = f"for up to {self._settings.refit:g} of what the epoch costs, or two CPU seconds"
        if last is None and not self.isolated and self._has_own_step():
            return (
                f"All probes are refitted at the end of each epoch, {share}, if the model's own "
                "train_step calls it with x as it comes; else none is."
            )
        return f"All probes are refitted at the end of each epoch, {share}."

    def _has_own_step(self) -> bool:
        """Whether what is probed may be called with something else than x."""
        return self.probed is not self.host or has_own_step(self.host)

    def begin_epoch(self, epoch: int, steps: int | None) -> None:
        """Starts the sums and the sample of an epoch of training.

        Args:
            epoch: Its number, from 0.
            steps: Number of its batches, where it is known.
        """
        at_once = self.host.steps_per_execution
        self._steps_of_epoch = None if steps is None else math.ceil(steps / at_once)
        self._refitter.begin(epoch, self._steps_of_epoch)
        self._steps_before = self.steps
        self._first_pass = not self.restoring and not self._steps_before
        self.reset_sums("train")

    def reset_sums(self, kind: Kind) -> None:
        """Starts a new epoch of training, or a new evaluation."""
        for snapshot in self._snapshots:
            snapshot.probes.reset_sums(kind)

    def part_in(self, batch: int) -> Part:
        """What part to take in the step that begins with this batch of the epoch."""
        self._step = batch // self.host.steps_per_execution
        first = self._step == 0
        return Part(
            observe=first or self._step % self._every == 0,
            keep=first or self._refitter.wants(self._step),
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
        initial = {
            f"initial/{name}": variable
            for snapshot in self._snapshots[1:]
            for name, variable in [
                *snapshot.probes.variables.items(),
                *((f"weights/{i}", was) for i, (_, was) in enumerate(snapshot.plan.other_weights)),
            ]
        }
        return {**self.probes.variables, **subsets, **initial}

    # What the joint calls: the protocol `capture.steps.Observer`.

    def prepare(self, data_spec: Any) -> None:
        x, y, _ = self._unpacked_spec(data_spec)
        self.choose_taps(x)
        asked = self._settings
        known = {"task": asked.task, "num_classes": asked.num_classes}
        known = self.known if self.built else known
        targets = targets_of(asked, known, x, y, self._evidence())
        if self.built and about(targets) != about(self.targets):
            raise ValueError(
                f"The probes were built for {about(self.targets)}. Received: labels of "
                f"{about(targets)}. Use a new LinearProbeCallback for other labels."
            )
        if self.built:
            self._take_targets(targets)
        else:
            self.targets = targets
            self._choose_positions(axes_of(targets))
            self._check_memory()
            with self.host.distribute_strategy.scope():
                initial = [target for target in targets if target.baseline == "initial"]
                self._add_snapshot(self.plan, [t for t in targets if t not in initial])
                if initial:
                    self._add_snapshot(self.plan.with_weights_as_now(), initial)
            if self._pending is not None:
                self.restore(self._pending)
                self._pending = None
        if "train" in (at_hand := self._labels_at_hand()):
            self._look_at_training_labels(at_hand["train"][0])

    def _unpacked_spec(self, data_spec: Any) -> tuple[Any, Any, Any]:
        """The spec of what probes see of a batch."""
        if not callable(self._settings.unpack):
            return self.unpack(data_spec)
        function = tf.function(self.unpack, autograph=False)
        made = function.get_concrete_function(data_spec).structured_outputs
        return tf.nest.map_structure(
            lambda of: None if of is None else tf.TensorSpec(of.shape, of.dtype), made
        )

    def _take_targets(self, targets: list[Target]) -> None:
        """Reads labels as the host's loss, which may have changed, says now."""
        named = {target.key: target for target in targets}
        if targets != self.targets:
            self.targets = targets
            for snapshot in self._snapshots:
                snapshot.targets = [named[target.key] for target in snapshot.targets]
                snapshot.forward = None

    def _evidence(self) -> Evidence:
        # The loss of a host says nothing of the outputs of a network within it.
        outputs = self.plan.graph.outputs if self.probed is self.host else None
        labels = [y for y, _ in self._labels_at_hand().values()]
        return Evidence(outputs, getattr(self.host, "loss", None), labels)

    @property
    def _rows_per_example(self) -> int:
        """Number of labels of an example."""
        positions = self.targets[0].positions
        return 1 if positions is None else positions.per_example

    def _labels_at_hand(self) -> dict[str, tuple[Any, Any]]:
        return labels_at_hand(self.host) if self._settings.unpack is None else {}

    def _look_at_training_labels(self, y: Any) -> None:
        """Refuses labels that no probe can be fitted to, and takes the scale of numbers."""
        for target in self.targets:
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
                        f"{reason}, among the labels that fit was given. Probes learn nothing from "
                        "these: give others with target=, or leave the callback out."
                    )

    def _take_scale(self, target: Target, labels: tf.Tensor) -> None:
        """Takes the scale of numbers from some of them, where it is not known yet."""
        if target.task.scaled:
            found = (s.probes for s in self._snapshots if target.key in s.probes.targets)
            next(found).set_scale(target.key, labels.numpy())

    def _add_snapshot(self, plan: TapPlan, targets: list[Target]) -> None:
        tasks = {target.key: target.task for target in targets}
        optimizer = own_optimizer(self._settings.optimizer)
        probes = ProbeSet(self.plan.n_features, tasks, optimizer, self._rows_per_example)
        self._snapshots.append(Snapshot(plan, targets, probes))

    def check(self, batches: Iterable[Any]) -> None:
        missing, wrong, total = (Counter[Target]() for _ in range(3))
        examples: dict[Target, Any] = {}
        for data in batches:
            x, y, weights = self.unpack(data)
            if x is not None and not all(reduced.tap.by_example for reduced in self.plan.taps):
                # Before the first step, since an optimised graph may fail elsewhere first.
                places = self.targets[0].places(x, y)
                labels = self.targets[0].labels(x, y, places)
                self.plan.check_rows(self.plan.features_of(x, places), labels)
            for target in self.targets:
                if x is not None or not target.needs_x:
                    labels, _ = target.labels_and_weights(x, y, weights)
                    self._take_scale(target, labels)
                    state = target.task.state(labels)
                    missing[target] += int(tf.math.count_nonzero(state == MISSING))
                    total[target] += len(labels)
                    if tf.reduce_any(state == WRONG):
                        wrong[target] += int(tf.math.count_nonzero(state == WRONG))
                        examples[target] = target.raw(x, y)
        for target in self.targets:
            target.refuse(wrong[target], total[target], examples.get(target))
            if missing[target]:
                self._say(target, target.about(missing[target], total[target]))

    def keep(self, batches: Sequence[Any], spec: Any) -> None:
        pack = keras.utils.pack_x_y_sample_weight
        batches = [pack(*self.unpack(batch)) for batch in batches]
        spec = pack(*self._unpacked_spec(spec))
        if self._step == 0:
            self._every = self._resolved_every(batches)
        if self._refitter.wants(self._step):
            self._refitter.keep(self._step, batches, spec, self._snapshots)

    def _resolved_every(self, batches: Sequence[Any]) -> int:
        if self._settings.every != "auto":
            return int(self._settings.every)
        examples = sum(map(examples_in, batches))
        return costs_of(self._snapshots).every(len(batches), examples, self._steps_of_epoch)

    def layers(self) -> Iterable[keras.Operation]:
        return self.plan.layers()

    def observe(self, kind: Kind, recording: Recording, data: tuple[Any, Any, Any]) -> None:
        x, y, sample_weight = data
        if not self.isolated and not recording.on_x:
            self._look_at_rows(kind, recording, x)
        places = self.targets[0].places(x, y)
        for snapshot in self._snapshots:
            plan = snapshot.plan
            now = plan is self.plan
            if now:
                features, padding = (
                    plan.features(recording, places),
                    plan.padding(recording, places),
                )
            else:
                features, _, padding = plan.run(x, places)
            pairs = {
                t.key: t.labels_and_weights(x, y, sample_weight, places, padding)
                for t in snapshot.targets
            }
            labels = {name: of_target for name, (of_target, _) in pairs.items()}
            weights = {name: of_target for name, (_, of_target) in pairs.items()}
            for label in labels.values():
                first = next(iter(features))
                features[first] = check_rows(features[first], label, _SEVERAL_VIEWS)
                features = plan.check_rows(features, label)
            if kind == "train":
                snapshot.probes.train(features, labels, weights)
            else:
                examples = None if places is None else tf.shape(places[0])[0]
                snapshot.probes.test(features, labels, weights, examples)

    def _look_at_rows(self, kind: Kind, recording: Recording, x: Any) -> None:
        """Refuses a step that reads other rows than those of x, as far as can be told."""
        if kind == "train":
            self._refitter.takes_x = not self._has_own_step()
        sites = [reduced.tap.site for reduced in self.plan.taps]
        tensors = recording.sources or [
            recording.tensors[site] for site in sites if site in recording.tensors
        ]
        if tf.executing_eagerly() or callable(self._settings.unpack):
            self._say("rows", _ROWS_UNKNOWN)
        elif tensors and (reason := other_rows(x, tensors)):
            raise ValueError(
                f"A step of the model {reason}, so that its features are not those of the labels' "
                f"examples. {ISOLATE}"
            )

    def _say(self, what: Target | str, message: str) -> None:
        """Warns once."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(message, stacklevel=2)

    # What the callback asks for.

    def sums(self, kind: Kind) -> Sums:
        """What was measured since the epoch or evaluation began, by target, tap and name."""
        by_target = (snapshot.probes.sums(kind) for snapshot in self._snapshots)
        return {target: by_tap for sums in by_target for target, by_tap in sums.items()}

    def targets_in_units(self) -> dict[str | None, Target]:
        """Targets and baselines by key, whose tasks measure in the labels' own units."""
        tasks = {k: task for s in self._snapshots for k, task in s.probes.tasks_in_units().items()}
        return {t.key: dataclasses.replace(t, task=tasks[t.key]) for t in self.targets}

    def end_pass(self, kind: Kind, progress: Progress, last: bool = False) -> Measured:
        """Ends an epoch of training, and refits the probes, or ends an evaluation.

        Args:
            kind: Which of the two.
            progress: Takes what is going on, in words.
            last: Whether the fit ends with it, as far as is known.

        Returns:
            What was measured.
        """
        sums, refit = self.sums(kind), None
        targets = self.targets_in_units()  # as they were measured: a refit may change the scale
        probes = [snapshot.probes for snapshot in self._snapshots]
        by_target = {target: each for each in probes for target in each.targets}
        known = {t: each.tally("train", t) for t, each in by_target.items()}
        counts = {t: each.tally(kind, t) for t, each in by_target.items()}
        examples = 0
        for target in self.targets:
            of_tap = next(iter(sums[target.key].values()))
            unlabelled = int(of_tap["unlabelled"])
            examples = int(of_tap["count"] + of_tap["nonfinite"]) + unlabelled  # or positions
            if unlabelled:
                self._say(target, target.about(unlabelled, examples))
        if kind == "train" and self.steps == self._steps_before:
            self._say("steps", _NO_STEP)
        if kind == "train":
            # Those of the steps in which the probes took part stand for the others.
            steps = self._step + 1
            examples //= self._rows_per_example
            of_epoch = round(examples * steps / math.ceil(steps / self._every))
            spectra = last or not set(SPECTRUM).isdisjoint(self._settings.metrics)
            refit = self._refitter.refit(of_epoch, self._snapshots, progress, spectra)
        return Measured(
            step=self.steps,
            first_pass=kind == "train" and self._first_pass,
            sums=sums,
            certificates={k: v for each in probes for k, v in each.certificates(kind).items()},
            targets=targets,
            known=known,
            counts=counts,
            pairs={t: m for each in probes if kind == "test" for t, m in each.pairs().items()},
            refit=refit,
            spectra=dict(self.probes.spectra) if kind == "train" else {},
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
