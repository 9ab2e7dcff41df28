"""Probes on labelled data of their own, measured while their host stands still.

In: a host, and labelled sets. Out: each probe at its optimum for the host as it is, and what that
comes to on these sets. The host's own steps are left alone: a measurement is a forward pass at
inference over the sets, and the fits.
"""

import contextlib
import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_probes.capture.joint import Kind
from keras_probes.forward import ForwardPass, Part
from keras_probes.online.asked import about, targets_of
from keras_probes.online.labelled import LabelledSet, Source, labelled_sets
from keras_probes.online.probes import HostProbes, Passes
from keras_probes.online.refit import Progress, Snapshot
from keras_probes.online.rows import Rows
from keras_probes.online.settings import Settings
from keras_probes.probes.resolve import Evidence, check_names, named_targets
from keras_probes.probes.spectrum import SPECTRUM
from keras_probes.probes.targets import Target
from keras_probes.results.schema import Refit
from keras_probes.taps.graph import call_at_inference
from keras_probes.taps.within import probed_model

TOL = 1e-3  # nats: what a loss on 100,000 examples is known to
TEST_ROWS = 8192  # about so many rows are measured at a time


class OwnDataProbes(HostProbes):
    """Probes on data of their own.

    Args:
        host: The model.
        settings: What to probe and how, with `data`.

    Attributes:
        room: How many bytes the features of a set may take in memory; beyond, they are on disk.
    """

    room: float
    _source = "data="

    def __init__(self, host: keras.Model, settings: Settings):
        super().__init__(host, settings)
        self._sets: list[LabelledSet] = []
        self._forward: dict[tuple[str, Source], ForwardPass] = {}
        self._epoch = 0
        self._batches_of_epoch: int | None = None
        self._steps_before, self._batches = 0, 0  # batches before the epoch, and of it
        # Both are saved with the probes, so that a run which is killed goes on as it would have.
        self._host_steps = _counter("host_steps")
        self._measurements = _counter("measurements")

    @property
    def steps(self) -> int:
        """Number of batches that the host has trained on, as far as the probes were told."""
        return int(self._host_steps.value.numpy())

    @property
    def measurements(self) -> int:
        """How often the probes were measured."""
        return int(self._measurements.value.numpy())

    def look(self) -> None:
        """Reads the labels, picks the taps and makes the probes, unless they are there already.

        Raises:
            TypeError, ValueError: What the user asked for does not fit the host or the data.
        """
        if self._sets:
            return
        try:
            self._sets = self._looked_at()
        except BaseException:
            self._snapshots, self.targets, self._plan = [], [], None
            self._forward.clear()
            raise

    def _looked_at(self) -> list[LabelledSet]:
        """The sets of data, once the probes are made for them."""
        asked = self._settings
        preprocess = getattr(self.host, "preprocess_samples", None)
        sets = labelled_sets(asked.data, asked.validation_data, preprocess)
        for of_set in sets:
            for source in of_set.sources:
                self._look_at_x(source)
        targets = [self._targets_of(of_set) for of_set in sets]
        names = [target.name for of_set in targets for target in of_set]
        check_names(names, task=asked.task, num_classes=asked.num_classes)
        self._build(targets)
        for of_set, snapshot in zip(sets, self._snapshots, strict=False):  # of the host as it is
            asked_of_it = targets[snapshot.of_set]
            for source in of_set.sources:
                self._look_at_labels(source, asked_of_it)
                with _about(source):  # what fails of the first batch does so before a fit
                    self._run(snapshot, source, source.first)
            self._look_at_training_labels(_together(of_set.data), asked_of_it)
        return sets

    def begin_fit(self) -> None:
        if self._is_built():
            self.look()
        elif "initial" in self._settings.baselines:
            raise ValueError(
                'baselines=["initial"] is about the weights that a model begins with. Received: '
                f"{self.host.name!r}, which has none before its first batch. Call it once, or give "
                "it a keras.Input."
            )

    def _is_built(self) -> bool:
        """Whether there is something to look at: the labelled x must not decide of which sizes."""
        try:
            model, _ = probed_model(self.host, self._settings.model, self._settings.layers)
        except ValueError:
            return True  # the x of the data may tell which model is meant
        return bool(model.built)

    def begin_epoch(self, epoch: int, steps: int | None) -> None:
        self._epoch, self._batches_of_epoch = epoch, steps
        self._steps_before, self._batches = self.steps, 0

    def part_in(self, batch: int) -> None:
        """None: the host's steps are its own."""

    def count_steps(self, steps: int) -> None:
        """Says how many batches the host has trained on in all."""
        self._host_steps.assign(steps)

    def end_batch(self, batch: int) -> bool:
        """Says that this batch of the epoch is done; whether to measure after it."""
        # Of several at a time, Keras counts on where the data have run out.
        ends = math.inf if self._batches_of_epoch is None else self._batches_of_epoch
        before, self._batches = self._batches, int(min(batch + 1, ends))
        every = self._settings.every_steps
        if every is None or self._batches == ends:  # the end of the epoch measures
            return False
        return (self._steps_before + before) // every < (
            self._steps_before + self._batches
        ) // every

    def count_batches(self) -> None:
        """Counts the batches of the epoch so far."""
        self.count_steps(self._steps_before + self._batches)

    def end_pass(self, kind: Kind, progress: Progress, last: bool = False) -> Passes:
        self.count_batches()
        due = kind == "train" and (self._epoch + 1) % self._settings.every_epochs == 0
        return self.measure_in_fit(progress, self._epoch, last) if due or last else {}

    def measure_in_fit(self, progress: Progress, epoch: int, spectra: bool = False) -> Passes:
        """As `measure`; what goes wrong is a warning, since the host's training goes on."""
        self.count_batches()
        try:
            return self.measure(progress, epoch, spectra)
        except Exception as error:
            warnings.warn(
                f"The probes could not be measured in epoch {epoch + 1}, and training goes on. "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
            return {}

    def measure(self, progress: Progress, epoch: int, spectra: bool = False) -> Passes:
        """Fits all probes to the host as it is, and tests them.

        Args:
            progress: Takes what is going on, in words.
            epoch: What the measurement is counted as.
            spectra: Whether to find in how many directions features vary.

        Returns:
            What was measured, by split.
        """
        self.look()
        begun = time.perf_counter()
        spectra |= not set(SPECTRUM).isdisjoint(self._settings.metrics)
        examples = 0
        for snapshot in self._snapshots:
            rows = self._rows(snapshot, self._set_of(snapshot).data, progress)
            examples = max(examples, len(rows) // snapshot.probes.rows_per_example)
            snapshot.probes.refit(
                rows.features, rows.labels, rows.weights, kept=1.0, passes=None, tol=TOL,
                epoch=self.measurements, seed=self._settings.seed, progress=progress,
                spectra=spectra and snapshot.plan is self.plan,  # as it is now
            )  # fmt: skip
            _test(snapshot, rows)
        train = self._measured("test", self._snapshots, self.steps)
        tested = [s for s in self._snapshots if self._set_of(s).validation is not None]
        for snapshot in tested:
            validation = self._set_of(snapshot).validation
            assert validation is not None
            _test(snapshot, self._rows(snapshot, validation, progress))
        self._measurements.assign_add(1)
        seconds = time.perf_counter() - begun
        train = dataclasses.replace(
            train,
            known=train.counts,
            spectra={
                target.key: dict(snapshot.probes.spectra)
                for snapshot in self._snapshots
                for target in snapshot.targets
            },
            refit=Refit(epoch, examples, seconds, self._without_fit(train.certificates)),
        )
        found = {"train": train}
        if tested:
            measured = self._measured("test", tested, self.steps)
            found["validation"] = dataclasses.replace(measured, known=train.counts)
        return found

    def about_refit(self, last: Refit | None) -> str:
        when = "after each epoch"
        if self._settings.every_epochs > 1:
            when = f"after every {self._settings.every_epochs} epochs, and the last"
        if self._settings.every_steps is not None:
            when += f", and after every {self._settings.every_steps:,} batches"
        if last is not None and last.left_out:
            taps = ", ".join(f"{tap!r} ({reason})" for tap, reason in last.left_out.items())
            return f"Not fitted in the last measurement: {taps}."
        return f"All probes are fitted to data of their own {when} of fit, and by measure(model)."

    def _look_at_x(self, source: Source) -> None:
        """Picks the taps by the first data, and refuses what does not fit the host."""
        x, *_ = keras.utils.unpack_x_y_sample_weight(source.spec)
        try:
            if self._plan is None:
                self.choose_taps(x)
            else:
                self.plan.check_sizes(x)
        except Exception as error:
            if not hasattr(self, "probed") or _takes(self.probed, x):
                raise  # it is the host, or what was asked of it
            raise ValueError(
                f"The x of {source.what} does not fit the model {self.probed.name!r}: {error}"
            ) from error

    def _targets_of(self, of_set: LabelledSet) -> list[Target]:
        """What is asked of a set; its name is that of its target."""
        specs = [keras.utils.unpack_x_y_sample_weight(s.spec)[:2] for s in of_set.sources]
        asked = self._settings.of_set(of_set.name)
        known = {"task": asked.task, "num_classes": asked.num_classes}
        targets: list[Target] = []
        plain = set(named_targets(asked.target).values()) == {None}
        names = of_set.data.class_names if plain else None
        # What the host answers says nothing of the labels of other data.
        labels = [y for y, _ in of_set.data.labels]
        evidence = Evidence(None, None, labels, len(names) if names else None)
        for source, (x, y) in zip(of_set.sources, specs, strict=True):
            without = any(not callable(select) for select in named_targets(asked.target).values())
            if y is None and without:
                raise ValueError(
                    f"Expected {source.what} to have labels: (x, y), or batches of these. "
                    "Received: x alone. Probes learn from labels of their own here."
                )
            with _about(source):
                found = targets_of(asked, known, x, y, evidence)
            if targets and about(found) != about(targets):
                raise ValueError(
                    f"Expected {source.what} to have labels as {of_set.data.what}, of "
                    f"{about(targets)}. Received: labels of {about(found)}."
                )
            targets = targets or found
        return targets

    def _look_at_labels(self, source: Source, targets: Sequence[Target]) -> None:
        """Refuses labels that are none, of the first batch with x and of the others without."""
        assert source.first is not None
        others = ((None, *labels) for labels in source.labels[1:])
        with _about(source):
            self._look_at(itertools.chain([source.first], others), targets)

    def _set_of(self, snapshot: Snapshot) -> LabelledSet:
        return self._sets[snapshot.of_set]

    def _rows(self, snapshot: Snapshot, source: Source, progress: Progress) -> Rows:
        """Runs the host over data."""
        rows = Rows(self.room)
        for place, batch in enumerate(source):
            if place % 10 == 0:
                progress(f"forward pass over {source.what}, batch {place + 1}")
            rows.add(self._run(snapshot, source, batch))
        return rows

    def _run(self, snapshot: Snapshot, source: Source, batch: Any) -> Mapping[Part, tf.Tensor]:
        """Runs the host over a batch of a source."""
        key = snapshot.name, source
        if key not in self._forward:
            self._forward[key] = ForwardPass(snapshot.plan, snapshot.targets, source.spec)
        return self._forward[key](keras.utils.pack_x_y_sample_weight(*batch))

    def _without_fit(self, certificates: Any) -> dict[str, str]:
        """Why the probes of a tap were not fitted, by its name."""
        keys = [target.key for target in self.targets]
        taps = self.plan.n_features
        missing = [tap for tap in taps if any((key, tap) not in certificates for key in keys)]
        return dict.fromkeys(missing, "no two examples with a label, a weight and finite features")

    def _evidence(self) -> Evidence:
        return Evidence(None)

    def _variables(self) -> dict[str, keras.Variable]:
        counters = {"host_steps": self._host_steps, "measurements": self._measurements}
        return {**super()._variables(), **counters}


@contextlib.contextmanager
def _about(source: Source) -> Iterator[None]:
    """Says of which data an error is."""
    try:
        yield
    except (ValueError, tf.errors.OpError) as error:
        raise ValueError(f"{source.what}: {error}") from error


def _takes(model: keras.Model, x: Any) -> bool:
    """Whether a model can be called with inputs of a spec."""
    try:
        tf.function(lambda of: call_at_inference(model, of), autograph=False).get_concrete_function(
            x
        )
    except Exception:
        return False
    return True


def _together(source: Source) -> Any:
    """The labels of all examples; of sizes that differ, those of the first batch."""
    parts = [y for y, _ in source.labels]
    sizes = [{of.shape[1:] for of in keras.tree.flatten(y)} for y in parts if y is not None]
    if len(sizes) < len(parts) or sizes[1:] != sizes[:-1]:
        return parts[0]
    return keras.tree.map_structure(lambda *some: np.concatenate(some), *parts)


def _counter(name: str) -> keras.Variable:
    return keras.Variable(0, dtype="int64", trainable=False, name=name)


def _test(snapshot: Snapshot, rows: Rows) -> None:
    """Measures the probes on some rows."""
    probes, each = snapshot.probes, snapshot.probes.rows_per_example
    probes.reset_sums("test")
    size = max(1, TEST_ROWS // each) * each
    for start in range(0, len(rows), size):
        some = slice(start, start + size)
        labels, weights = (
            {key: of[some] for key, of in parts.items()} for parts in (rows.labels, rows.weights)
        )
        n = len(next(iter(labels.values())))
        features = {tap: tf.constant(of[some]) for tap, of in rows.features.items()}
        probes.test(features, labels, weights, None if each == 1 else n // each)
