"""The refit at an epoch's end: on which examples, how far, and what it came to.

In: batches of an epoch, and the probes that trained on it. Out: probes at their optimum for the
host as it is, and a `Refit` that says so.

The sample is as large as the budget allows, see `budget`.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from keras_probes.forward import ForwardPass
from keras_probes.online.budget import Costs
from keras_probes.online.rows import Rows
from keras_probes.online.sample import MAX_EXAMPLES, Sample
from keras_probes.probes.probe_set import ProbeSet
from keras_probes.probes.targets import Target
from keras_probes.results.schema import Refit
from keras_probes.taps.batches import examples_in
from keras_probes.taps.plan import TapPlan

Progress = Callable[[str], None]


@dataclasses.dataclass
class Snapshot:
    """The probes that see the same features: of a set of examples, and of the host as it is or was.

    Attributes:
        plan: The taps.
        targets: What is asked.
        probes: The probes.
        name: What its part of a saved state is called; empty of the first.
        of_set: Which set of examples the probes have, of several.
        forward: What computes the features.
    """

    plan: TapPlan
    targets: list[Target]
    probes: ProbeSet
    name: str = ""
    of_set: int = 0
    forward: ForwardPass | None = None


def costs_of(snapshots: Sequence[Snapshot]) -> Costs:
    """What the host and its probes cost."""
    sizes = [size for snapshot in snapshots for size in snapshot.probes.sizes()]
    rows = snapshots[0].probes.rows_per_example
    return Costs(snapshots[0].plan.graph.work, len(snapshots), sizes, rows)


class Refitter:
    """Keeps a sample of each epoch, and refits probes on it when that ends.

    Args:
        share: How much a refit may cost, as a share of the host's own epoch; 0 for no refit.
        seed: Seed of the draw of examples.

    Attributes:
        takes_x: Whether the host's step calls it with the x of its data, as far as that is known.
    """

    takes_x = True

    def __init__(self, share: float, seed: int):
        self._share, self._seed = share, seed
        self._sample = Sample(seed)
        self.begin(0, None)

    @property
    def reason(self) -> str:
        """Why no probe is refitted; empty if they are."""
        if not self._share:
            return "refit=0"
        return (
            "" if self.takes_x else "the model's own train_step calls it with something else than x"
        )

    def begin(self, epoch: int, steps: int | None) -> None:
        """Begins an epoch.

        Args:
            epoch: Its number, from 0.
            steps: Number of its steps, where it is known.
        """
        self._epoch, self._steps = epoch, steps
        self._sample.begin(epoch)

    def wants(self, step: int) -> bool:
        """Whether to be shown the batches of this step of the epoch, from 0."""
        return not self.reason and self._sample.wants(step)

    def keep(
        self, step: int, batches: Sequence[Any], spec: Any, snapshots: Sequence[Snapshot]
    ) -> None:
        """Takes the batches of a step into the sample.

        Args:
            step: Its number in the epoch, from 0.
            batches: As the host's step takes them.
            spec: Structure of `tf.TensorSpec` of any batch of these data.
            snapshots: What is probed.
        """
        for snapshot in snapshots:
            if snapshot.forward is None or snapshot.forward.spec != spec:
                snapshot.forward = ForwardPass(snapshot.plan, snapshot.targets, spec)
        if step == 0 and self._steps is not None:
            examples = self._steps * sum(map(examples_in, batches))
            wanted, _ = costs_of(snapshots).refit(self._share, examples, MAX_EXAMPLES)
            self._sample.stride = max(1, examples // wanted)
        rows = len(snapshots) * snapshots[0].probes.rows_per_example
        features = rows * sum(snapshots[0].plan.n_features.values())
        self._sample.add(step, batches, 4 * features)

    def refit(
        self, examples: int, snapshots: Sequence[Snapshot], progress: Progress, spectra: bool
    ) -> Refit:
        """Refits all probes.

        Args:
            examples: Number of examples of the epoch.
            snapshots: The probes.
            progress: Takes what is going on, in words.
            spectra: Whether to find in how many directions features vary.

        Returns:
            What became of it.
        """
        begun = time.perf_counter()
        reason, n = self.reason, 0
        left_out: dict[str, str] = {}
        if not reason and len(self._sample) < 2:
            reason = "the epoch had no two examples"
        if not reason:
            n, passes = costs_of(snapshots).refit(self._share, examples, len(self._sample))
            batches = self._sample.drawn(n)
            for snapshot in snapshots:
                progress(f"forward pass over {n:,} examples")
                assert snapshot.forward is not None
                rows = Rows()
                for batch in batches:
                    rows.add(snapshot.forward(batch))
                snapshot.probes.refit(
                    rows.features, rows.labels, rows.weights,
                    kept=min(1.0, n / max(examples, 1)), passes=passes,
                    epoch=self._epoch, seed=self._seed, progress=progress,
                    spectra=spectra and snapshot is snapshots[0],
                )  # fmt: skip
                found = snapshot.probes.certificates("test")
                missing = {
                    tap for t in rows.labels for tap in rows.features if (t, tap) not in found
                }
                left_out |= dict.fromkeys(missing, "no labelled examples with finite features")
        if reason:
            left_out = dict.fromkeys(snapshots[0].plan.n_features, reason)
        self._sample.begin(self._epoch)
        return Refit(self._epoch, n, time.perf_counter() - begun, left_out)
