"""Probes that ride in the steps of a host's `fit` and `evaluate`, on the batches it computes.

In: batches, as a host computes them. Out: trained probes and what they measured. This is the
observer that `capture` calls; the callback decides when.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_probes.capture.keras_run import labels_at_hand
from keras_probes.capture.steps import Kind, Part, has_own_step
from keras_probes.online.asked import targets_of
from keras_probes.online.probes import HostProbes, Passes, rows_per_example
from keras_probes.online.refit import Progress, Refitter, costs_of
from keras_probes.online.settings import Settings
from keras_probes.probes.resolve import Evidence
from keras_probes.probes.spectrum import SPECTRUM
from keras_probes.results.schema import Refit
from keras_probes.taps.batches import examples_in
from keras_probes.taps.graph import has_call, input_spec_of
from keras_probes.taps.plan import ISOLATE, check_rows
from keras_probes.taps.record import Recording
from keras_probes.taps.rows import other_rows

_SEVERAL_VIEWS = (
    f"This step of the model computes another number of examples than there are labels. {ISOLATE}"
)
_ROWS_UNKNOWN = (
    "The model's own step calls it with something else than the x that probes know. Eagerly, and "
    "with unpack=function, it can't be told whether that has the same examples in the same order, "
    'as labels need it. If not, use mode="isolated".'
)
_NO_STEP = (
    "No batch of this epoch reached the probes: the model's own train_function does not call its "
    'train_step. Use mode="isolated".'
)


class RidingProbes(HostProbes):
    """Probes that train on the batches of their host.

    Args:
        host: The model.
        settings: What to probe and how.

    Attributes:
        isolated: Whether they run a forward pass of their own.
        unpack: Takes a batch as the host's step does; returns (x, y, sample_weight).
    """

    def __init__(self, host: keras.Model, settings: Settings):
        super().__init__(host, settings)
        self.isolated = settings.isolated
        self.unpack = settings.unpacking()
        self._refitter = Refitter(settings.refit, settings.seed)
        self._first_pass = True  # whether the probes had seen no example before this epoch
        self._steps_of_epoch: int | None = None  # number of steps of the epoch, where it is known
        self._steps_before = 0  # number of steps the probes took before this epoch
        self._step = 0  # the one of them that is running
        self._every = 1  # probes take part in every so-manieth

    def look(self) -> None:
        if has_call(self.host) and input_spec_of(self.host) is None:
            raise ValueError(
                f"The input shape of {self.host.name!r} is not known before its first batch. Call "
                "summary() after fit, or give the model a keras.Input."
            )
        self.choose_taps()

    def begin_fit(self) -> None:
        pass  # the first step does

    def begin_epoch(self, epoch: int, steps: int | None) -> None:
        at_once = self.host.steps_per_execution
        self._steps_of_epoch = None if steps is None else math.ceil(steps / at_once)
        self._refitter.begin(epoch, self._steps_of_epoch)
        self._steps_before = self.steps
        self._first_pass = not self.restoring and not self._steps_before
        self.reset_sums("train")

    def part_in(self, batch: int) -> Part:
        self._step = batch // self.host.steps_per_execution
        first = self._step == 0
        return Part(
            observe=first or self._step % self._every == 0,
            keep=first or self._refitter.wants(self._step),
        )

    def about_refit(self, last: Refit | None) -> str:
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

    # What the joint calls: the protocol `capture.steps.Observer`.

    def prepare(self, data_spec: Any) -> None:
        x, y, _ = self._unpacked_spec(data_spec)
        self.choose_taps(x)
        asked = self._settings
        known = {"task": asked.task, "num_classes": asked.num_classes}
        known = self.known if self.built else known
        targets = targets_of(asked, known, x, y, self._evidence())
        if self.built:
            self._check_same_targets(targets)
            self._take_targets(targets)
        else:
            self._build([targets])
        if "train" in (at_hand := self._labels_at_hand()):
            self._look_at_training_labels(at_hand["train"][0], targets)

    def _unpacked_spec(self, data_spec: Any) -> tuple[Any, Any, Any]:
        """The spec of what probes see of a batch."""
        if not callable(self._settings.unpack):
            return self.unpack(data_spec)
        function = tf.function(self.unpack, autograph=False)
        made = function.get_concrete_function(data_spec).structured_outputs
        return tf.nest.map_structure(
            lambda of: None if of is None else tf.TensorSpec(of.shape, of.dtype), made
        )

    def _evidence(self) -> Evidence:
        # The loss of a host says nothing of the outputs of a network within it.
        outputs = self.plan.graph.outputs if self.probed is self.host else None
        labels = [y for y, _ in self._labels_at_hand().values()]
        return Evidence(outputs, getattr(self.host, "loss", None), labels)

    def _labels_at_hand(self) -> dict[str, tuple[Any, Any]]:
        return labels_at_hand(self.host) if self._settings.unpack is None else {}

    def check(self, batches: Iterable[Any]) -> None:
        self._look_at(map(self.unpack, batches), self.targets)

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

    def end_pass(self, kind: Kind, progress: Progress, last: bool = False) -> Passes:
        # As it was measured: a refit may change the scale of numbers.
        measured = self._measured(kind, self._snapshots, self.steps)
        examples = 0
        for target in self.targets:
            of_tap = next(iter(measured.sums[target.key].values()))
            unlabelled = int(of_tap["unlabelled"])
            examples = int(of_tap["count"] + of_tap["nonfinite"]) + unlabelled  # or positions
            if unlabelled:
                self._say(target, target.about(unlabelled, examples))
        if kind == "test":
            return {"test": measured}
        if self.steps == self._steps_before:
            self._say("steps", _NO_STEP)
        # Those of the steps in which the probes took part stand for the others.
        steps = self._step + 1
        examples //= rows_per_example(self.targets)
        of_epoch = round(examples * steps / math.ceil(steps / self._every))
        spectra = last or not set(SPECTRUM).isdisjoint(self._settings.metrics)
        refit = self._refitter.refit(of_epoch, self._snapshots, progress, spectra)
        probes = [snapshot.probes for snapshot in self._snapshots]
        return {
            "train": dataclasses.replace(
                measured,
                first_pass=self._first_pass,
                certificates={k: v for of in probes for k, v in of.certificates("train").items()},
                spectra={key: dict(self.probes.spectra) for key in measured.targets},
                refit=refit,
            )
        }
