"""The probes of one host, riding in its steps.

In: batches, as a host computes them. Out: trained probes and sums of what they got wrong. This is
the observer that `taps.capture` calls; the callback decides when.
"""

import dataclasses
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_probes.forward import ForwardPass
from keras_probes.probes.optimizer import own_optimizer
from keras_probes.probes.probe_set import ProbeSet, Sums, Width, memory_of, parameters_of
from keras_probes.probes.settle import Settled
from keras_probes.probes.targets import (
    RandomLabels,
    Target,
    expected_classes,
    named_targets,
    resolve_targets,
)
from keras_probes.results import Node, TapInfo, name_of_baseline
from keras_probes.sample import Sample
from keras_probes.taps.capture import Kind, Part
from keras_probes.taps.plan import TapPlan, make_plan
from keras_probes.taps.record import Recording
from keras_probes.taps.reduce import Reduce
from keras_probes.taps.select import Selector

LARGE = 2**25  # bytes of all probes together, from which on they wait for the host's update


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked for, as `LinearProbeCallback` takes it."""

    layers: Selector
    reduce: Reduce
    target: Any
    num_classes: int | Mapping[str, int] | None
    optimizer: keras.optimizers.Optimizer | str | None
    isolated: bool
    every: int
    baselines: tuple[str, ...]
    seed: int

    def described(self) -> dict[str, Any]:
        """What was asked for, as results keep it."""
        asked = {**vars(self), "mode": "isolated" if self.isolated else "shared"}
        del asked["isolated"]
        return {name: _described(value) for name, value in asked.items() if value not in (None, ())}


@dataclasses.dataclass
class _Side:
    """The probes that see the same features: those of the host as it is, or as it was at first."""

    plan: TapPlan
    targets: list[Target]
    probes: ProbeSet
    forward: ForwardPass | None = None


class OnlineProbes:
    """Probes that train on the batches of one host.

    They are built in two steps: the taps once the host's input is known, the probes once the data
    is, which tells what labels look like.

    Args:
        host: The model.
        settings: What to probe and how.
        report: Makes the logs of an epoch or evaluation from its sums and the host's own logs.

    Attributes:
        memory_limit: Bytes all probes together may take.
        sample_memory: Bytes that the examples they are settled on may take, with their features.
        first_pass: Whether the probes had seen no example before this epoch.
    """

    memory_limit: int
    sample_memory: int

    def __init__(
        self,
        host: keras.Model,
        settings: Settings,
        report: Callable[[Kind, Sums, Mapping[str, Any]], dict[str, float]],
    ):
        self.host = host
        self.isolated, self.every = settings.isolated, settings.every
        self.first_pass = True
        self.targets: list[Target] = []
        self._settings = settings
        self._report = report
        self._plan: TapPlan | None = None
        self._sides: list[_Side] = []
        self._model: keras.Model | None = None
        self._pending: Mapping[str, np.ndarray] | None = None  # to restore once built
        self._sample = Sample()
        # Whether a forward pass of our own sees what the host's training does.
        self._same_input = True
        self._settled: dict[tuple[str | None, str], Settled] = {}
        self._settled_at = -1  # number of steps by then

    @property
    def built(self) -> bool:
        """Whether the probes are there."""
        return bool(self._sides)

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
        return self._sides[0].probes

    def probes_of(self, target: str | None) -> ProbeSet:
        """The probes that are measured under a name: of a target, or of a baseline of one."""
        return next(side.probes for side in self._sides if target in side.probes.targets)

    @property
    def num_classes(self) -> int | dict[str, int]:
        """Number of classes, or a mapping from target names to it; once `built`."""
        asked = named_targets(self._settings.target)
        named = {t.name: t.num_classes for t in self.targets if t.name is not None}
        if None in asked:
            return self.targets[0].num_classes
        return {name: count for name, count in named.items() if name in asked}

    def choose_taps(self, input_spec: Any) -> None:
        """Looks at the host, once its input is known, and picks the taps.

        Raises:
            TypeError, ValueError: What the user asked for does not fit the host.
        """
        if self._plan is None:
            wanted = self._settings
            with self.host.distribute_strategy.scope():
                self._plan = make_plan(
                    self.host, input_spec, wanted.layers, wanted.reduce, wanted.seed
                )

    def model(self) -> keras.Model:
        """The sibling Keras model: the host's tensors by tap name -> probabilities."""
        if self._model is None:
            inputs = self.plan.inputs()
            features = {t.tap.name: t.features(inputs[t.tap.name]) for t in self.plan.taps}
            outputs = self.probes.outputs(features)
            with warnings.catch_warnings():
                # Tap names may hold slashes, which Keras names may not, so that the two differ.
                warnings.filterwarnings("ignore", "When providing `inputs` as a dict")
                self._model = keras.Model(inputs, outputs.get(None, outputs), name="linear_probes")
        return self._model

    def tap_infos(self) -> list[TapInfo]:
        """What the results say of each tap."""
        return [TapInfo(**tap) for tap in self.plan.described()]

    def nodes(self) -> list[Node]:
        """The host's layers and the taps, as the results keep them."""
        return [Node(**node) for node in self.plan.described_graph()]

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Number of parameters, and memory in bytes, of the probes of each tap.

        Raises:
            ValueError: The number of classes is not known yet.
        """
        classes: Sequence[int | None] = [t.num_classes for t in self.targets]
        if not classes:
            asked = self._settings
            known = expected_classes(asked.target, asked.num_classes, self.plan.graph.outputs)
            classes = list(known.values())
        counts = [count for count in classes if count is not None]
        if len(counts) < len(classes):
            raise ValueError(
                "The number of classes is not known before the first batch. Pass num_classes= to "
                "see the number of parameters, or call summary() after fit."
            )
        return {
            tap: (
                sum(parameters_of(width, count) for count in counts),
                sum(memory_of(width, count) for count in counts),
            )
            for tap, width in self._widths().items()
        }

    def begin_epoch(self, steps: int | None) -> None:
        """Starts the sums and the sample of an epoch of training.

        Args:
            steps: Number of its batches, where it is known.
        """
        if steps is not None:
            steps = math.ceil(steps / self.host.steps_per_execution / self.every)
        self._sample.begin(self.sample_memory, steps)
        self.first_pass = not self.restoring and not self.steps
        self.reset_sums("train")

    def reset_sums(self, kind: Kind) -> None:
        """Starts a new epoch of training, or a new evaluation."""
        for side in self._sides:
            side.probes.reset_sums(kind)

    def part_in(self, batch: int) -> Part:
        """What part to take in the step that begins with this batch of the epoch."""
        turn, rest = divmod(batch // self.host.steps_per_execution, self.every)
        if rest:
            return "rest"
        return "keep" if self._same_input and self._sample.wants(turn) else "observe"

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
            for side in self._sides[1:]
            for name, variable in [
                *side.probes.variables.items(),
                *((f"weights/{i}", was) for i, (_, was) in enumerate(side.plan.other_weights)),
            ]
        }
        return {**self.probes.variables, **subsets, **initial}

    # What the joint calls: the protocol `capture.Observer`.

    def prepare(self, data_spec: Any) -> None:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data_spec)
        self.choose_taps(x)
        wanted = self._settings
        targets = resolve_targets(wanted.target, wanted.num_classes, x, y, self.plan.graph.outputs)
        controls = [
            Target(name_of_baseline("shuffled", t.name), RandomLabels(t.num_classes), t.num_classes)
            for t in targets
            if "shuffled" in wanted.baselines
        ]
        initial = [
            dataclasses.replace(t, name=name_of_baseline("initial", t.name))
            for t in targets
            if "initial" in wanted.baselines
        ]
        targets = [*targets, *controls, *initial]
        if self.built and targets != self.targets:
            raise ValueError(
                f"The probes were built for {_classes(self.targets)}. Received: labels of "
                f"{_classes(targets)}. Use a new LinearProbeCallback for other labels."
            )
        if not self.built:
            self.targets = targets
            self._check_memory()
            with self.host.distribute_strategy.scope():
                self._add_side(self.plan, [t for t in targets if t not in initial])
                if initial:
                    self._add_side(self.plan.with_weights_as_now(), initial)
            if self._pending is not None:
                self.restore(self._pending)
                self._pending = None

    def _add_side(self, plan: TapPlan, targets: list[Target]) -> None:
        classes = {target.name: target.num_classes for target in targets}
        optimizer = own_optimizer(self._settings.optimizer)
        probes = ProbeSet(self._widths(), classes, optimizer, self._settings.seed)
        self._sides.append(_Side(plan, targets, probes))

    def check(self, batches: Iterable[Any]) -> None:
        unlabelled: Counter[Target] = Counter()
        total: Counter[Target] = Counter()
        for data in batches:
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            for target in self.targets:
                if x is not None or not callable(target.select):
                    labels = target.labels(x, y)
                    unlabelled[target] += int(tf.math.count_nonzero(labels < 0))
                    total[target] += len(labels)
        for target in self.targets:
            target.refuse(unlabelled[target], total[target])

    def keep(self, batches: Sequence[Any], spec: Any) -> None:
        for side in self._sides:
            if side.forward is None or side.forward.spec != spec:
                side.forward = ForwardPass(side.plan, side.targets, spec)
        features = len(self._sides) * sum(self.plan.n_features.values())
        most = max(side.probes.most_examples() for side in self._sides)
        self._sample.add(batches, 4 * features, most)

    def layers(self) -> Iterable[keras.Operation]:
        return self.plan.layers()

    def observe(self, kind: Kind, recording: Recording, data: Any) -> None:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if kind == "train" and not self.isolated:
            self._same_input = _takes_x(self.host, recording, x)
        waits_for = self._waits_for() if kind == "train" else []
        for side in self._sides:
            now = side.plan is self.plan
            with tf.control_dependencies([] if now else waits_for):
                features = side.plan.features(recording) if now else side.plan.features_of(x)
            labels = {target.name: target.labels(x, y) for target in side.targets}
            for label in labels.values():
                _check_rows(next(iter(features.values())), label)
            weights = {t.name: t.weights(sample_weight, labels[t.name]) for t in side.targets}
            if kind == "test":
                side.probes.test(features, labels, weights)
            else:
                # XLA compiles shared steps with the host's own.
                gather = self.isolated or not self.host.jit_compile
                with tf.control_dependencies(waits_for):
                    side.probes.train(features, labels, weights, gather=gather)

    def sums(self, kind: Kind) -> Sums:
        """What was measured since the epoch or evaluation began, by target, tap and name."""
        return {t: by_tap for side in self._sides for t, by_tap in side.probes.sums(kind).items()}

    def logs(self, kind: Kind, of_host: Mapping[str, Any]) -> dict[str, float]:
        if kind == "train":
            for side in self._sides:
                side.probes.catch_up()
        sums = self.sums(kind)
        for target in self.targets:
            of_tap = next(iter(sums[target.name].values()))
            unlabelled = int(of_tap["unlabelled"])
            total = int(of_tap["count"] + of_tap["nonfinite"]) + unlabelled
            target.refuse(unlabelled, total)
        if kind == "train":
            self._settle()
        return self._report(kind, sums, of_host)

    def certificates(self, kind: Kind) -> dict[tuple[str | None, str], float]:
        """Upper bounds on how far the probes were above their optimum, in nats.

        Args:
            kind: `"train"`: those that trained in the epoch that ends; `"test"`: as they are now.

        Returns:
            By target and tap; probes of which nothing is known are not there.
        """
        if self._settled_at != self.probes.steps:
            return {}
        return {
            key: settled.before if kind == "train" else settled.after
            for key, settled in self._settled.items()
        }

    def _settle(self) -> None:
        """Takes the probes to their optimum on the examples kept, with the host as it is now."""
        self._settled = {}
        if not (self._same_input and self._sample.batches):
            return
        for side in self._sides:
            self._settled |= self._settle_side(side)
        self._sample.batches.clear()
        self._settled_at = self.probes.steps

    def _settle_side(self, side: _Side) -> dict[tuple[str | None, str], Settled]:
        assert side.forward is not None
        parts = defaultdict(list)
        for batch in self._sample.batches:
            for name, part in side.forward(batch).items():
                parts[name].append(part)
        rows = {name: tf.concat(parts.pop(name), axis=0) for name in list(parts)}
        labels = {t.name: rows["labels", t.name] for t in side.targets}
        weights = {
            name: rows.get(("weights", name), tf.ones(len(of_target)))
            for name, of_target in labels.items()
        }
        features = {tap: rows["tap", tap] for tap in self.plan.n_features}
        return side.probes.settle(features, labels, weights)

    def _waits_for(self) -> list[tf.Tensor]:
        """What a step of the probes has to come after.

        Large probes wait until the host has updated its first weights, whose gradient comes last:
        the memory they need for a moment is then what its activations have left, and not on top.
        """
        large = sum(memory for _, memory in self.sizes().values()) >= LARGE
        first = self.host.trainable_variables[:1] if large and not self.isolated else []
        return [tf.convert_to_tensor(variable) for variable in first]

    def _widths(self) -> dict[str, Width]:
        return {t.tap.name: Width(t.n_features, t.rank) for t in self.plan.taps}

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


def _described(value: Any) -> Any:
    """A setting as JSON and TensorBoard take it: objects and functions by name."""
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_described(of_key)}" for key, of_key in value.items())
    if isinstance(value, Sequence):
        return ", ".join(str(_described(item)) for item in value)
    if isinstance(value, keras.Operation):
        return f"{type(value).__name__} {value.name}"
    return getattr(value, "__qualname__", type(value).__name__)


def _takes_x(host: keras.Model, recording: Recording, x: Any) -> bool:
    """Whether a step calls the host with the x of its data, and not with what it makes of it."""
    given = tf.nest.flatten(x, expand_composites=True)
    keras_own = type(host).train_step is keras.Model.train_step
    return keras_own or all(any(s is part for part in given) for s in recording.sources)


def _check_rows(features: tf.Tensor, labels: tf.Tensor) -> None:
    """A step that makes several views of its batch has more rows than labels."""
    message = (
        "This step of the model computes another number of examples than there are labels. Use "
        'mode="isolated", where probes have a forward pass of their own.'
    )
    if not features.shape[:1].is_compatible_with(labels.shape[:1]):
        raise ValueError(message)
    tf.debugging.assert_equal(tf.shape(features)[0], tf.shape(labels)[0], message)


def mebibytes(size: float) -> str:
    """A number of bytes in words."""
    return f"{size / 2**20:,.1f} MiB"


def _classes(targets: Iterable[Target]) -> str:
    return ", ".join(
        f"{t.num_classes} classes" + (f" ({t.name!r})" if t.name is not None else "")
        for t in targets
    )
