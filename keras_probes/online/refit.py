"""The refit at an epoch's end: on which examples, how far, and what it came to.

In: batches of an epoch, and the probes that trained on it. Out: probes at their optimum for the
host as it is, and a `Refit` that says so.

What a refit may cost is a share of what the host's own epoch cost, counted in multiplications: the
same on every machine, and in a run that was killed and resumed. The sample is as large as that
allows with `PASSES` passes of the solver over it.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_probes.forward import ForwardPass
from keras_probes.online.sample import MAX_EXAMPLES, Sample, examples_in
from keras_probes.probes.probe_set import ProbeSet
from keras_probes.probes.targets import Target
from keras_probes.results import Refit
from keras_probes.taps.plan import TapPlan

MIN_BUDGET = 10**9  # multiplications, whatever the epoch cost: about 0.1 CPU seconds
PASSES = 24  # with fewer, a probe is far from its optimum
EXAMPLES_PER_FEATURE = 4  # of a tap; more change nothing that an interval can tell
EXAMPLES_PER_CLASS = 100

Progress = Callable[[str], None]


@dataclasses.dataclass
class Snapshot:
    """The probes that see the same features: those of the host as it is, or as it was at first."""

    plan: TapPlan
    targets: list[Target]
    probes: ProbeSet
    forward: ForwardPass | None = None


class Refitter:
    """Keeps a sample of each epoch, and refits probes on it when that ends.

    Args:
        share: How much a refit may cost, as a share of the host's own epoch; 0 for no refit.
        seed: Seed of the draw of examples.

    Attributes:
        reason: Why no probe is refitted; empty if they are.
    """

    def __init__(self, share: float, seed: int):
        self._share = share
        self._sample = Sample(seed)
        self.begin(0, None, 1)
        self.reason = "" if share else "refit=0"

    def begin(self, epoch: int, steps: int | None, every: int) -> None:
        """Begins an epoch.

        Args:
            epoch: Its number, from 0.
            steps: Number of its steps, where it is known.
            every: The probes take part in every so-manieth of them.
        """
        self._epoch, self._steps, self._every = epoch, steps, every
        self._sample.begin(epoch)

    def wants(self, step: int) -> bool:
        """Whether to be shown the batches of this step: a number, from 0, among the probes' own."""
        return not self.reason and self._sample.wants(step)

    def keep(
        self, step: int, batches: Sequence[Any], spec: Any, snapshots: Sequence[Snapshot]
    ) -> None:
        """Takes the batches of a step into the sample.

        Args:
            step: Its number, as for `wants`.
            batches: As the host's step takes them.
            spec: Structure of `tf.TensorSpec` of any batch of these data.
            snapshots: What is probed.
        """
        for snapshot in snapshots:
            if snapshot.forward is None or snapshot.forward.spec != spec:
                snapshot.forward = ForwardPass(snapshot.plan, snapshot.targets, spec)
        if step == 0 and self._steps is not None:
            of_host = self._steps * sum(map(examples_in, batches))
            wanted, _ = self._planned(of_host, MAX_EXAMPLES, snapshots)
            self._sample.stride = max(1, of_host // self._every // wanted)
        features = len(snapshots) * sum(snapshots[0].plan.n_features.values())
        self._sample.add(step, batches, 4 * features)

    def refit(self, examples: int, snapshots: Sequence[Snapshot], progress: Progress) -> Refit:
        """Refits all probes.

        Args:
            examples: Number of examples of the epoch that the probes trained on.
            snapshots: The probes.
            progress: Takes what is going on, in words.

        Returns:
            What became of it.
        """
        begun = time.perf_counter()
        reason, n = self.reason, 0
        left_out: dict[str, str] = {}
        if not reason and len(self._sample) < 2:
            reason = "the data can't be kept: they are sparse or ragged, or of one example"
        if not reason:
            n, passes = self._planned(self._every * examples, len(self._sample), snapshots)
            batches = self._sample.drawn(n)
            for snapshot in snapshots:
                progress(f"forward pass over {n:,} examples")
                features, labels, weights = self._forward(snapshot, batches)
                snapshot.probes.refit(
                    features, labels, weights, kept=min(1.0, n / max(examples, 1)), passes=passes,
                    epoch=self._epoch, progress=progress,
                )  # fmt: skip
                found = snapshot.probes.certificates("test")
                missing = {tap for t in labels for tap in features if (t, tap) not in found}
                left_out |= dict.fromkeys(missing, "no labelled examples with finite features")
        if reason:
            left_out = dict.fromkeys(snapshots[0].plan.n_features, reason)
        self._sample.begin(self._epoch)
        return Refit(self._epoch, n, time.perf_counter() - begun, left_out)

    def _planned(
        self, examples: int, available: int, snapshots: Sequence[Snapshot]
    ) -> tuple[int, int]:
        """On how many examples to refit, and with how many passes over them.

        Args:
            examples: Number of examples that the host trained on.
            available: Number of examples in the sample.
            snapshots: The probes.
        """
        probes = [snapshot.probes for snapshot in snapshots]
        costs = [each.refit_cost() for each in probes]
        work = snapshots[0].plan.graph.work
        once = work * len(snapshots) + sum(once for once, _ in costs)
        a_pass = sum(a_pass for _, a_pass in costs)
        budget = max(self._share * 3 * work * examples, MIN_BUDGET)
        useful = max(
            EXAMPLES_PER_FEATURE * features + EXAMPLES_PER_CLASS * classes
            for each in probes
            for features, classes in each.sizes()
        )
        n = max(2, min(available, useful, int(budget // (once + PASSES * a_pass))))
        return n, max(2, int((budget - n * once) // (n * a_pass)))

    def _forward(
        self, snapshot: Snapshot, batches: Sequence[Any]
    ) -> tuple[dict[str, tf.Tensor], dict[str | None, tf.Tensor], dict[str | None, tf.Tensor]]:
        """Features by tap, labels and weights by target."""
        assert snapshot.forward is not None
        parts = defaultdict(list)
        for batch in batches:
            for name, part in snapshot.forward(batch).items():
                parts[name].append(part)
        rows = {name: tf.concat(parts.pop(name), axis=0) for name in list(parts)}
        labels = {t.name: rows["labels", t.name] for t in snapshot.targets}
        weights = {
            name: rows.get(("weights", name), tf.ones(len(of_target)))
            for name, of_target in labels.items()
        }
        return {tap: rows["tap", tap] for tap in snapshot.plan.n_features}, labels, weights
