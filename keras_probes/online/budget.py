"""What probes may cost, as a share of what their host costs.

In: the sizes of a host, its batches and its probes. Out: in how many steps the probes take part,
and how far they are refitted.

All is counted in multiplications: the same on every machine, and in a run that was killed and
resumed. What else takes time is given as the multiplications that take as long on a CPU.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

from keras_probes.probes.probe_set import parameters_of
from keras_probes.probes.refit import pass_cost, prepare_cost

STEPS_SHARE = 0.05  # of an epoch, for the probes' own steps
MAX_EVERY = 8  # with fewer steps, a probe learns too little of an epoch
MIN_STEPS = 10**10  # for these, whatever an epoch costs: about a third of a CPU second
MIN_REFIT = 5 * 10**10  # likewise for the refit
STEP_COST = 800  # of a feature of an example in a step: its draw and its statistics
STEP_CALLS = 10**8  # of a step: its many small calls
PARAMETER_COST = 500  # of a parameter in a step, which reads and writes it two dozen times
PASSES = 12  # of the solver, as they are planned

Sizes = Sequence[tuple[int, int]]  # features and classes of each probe


@dataclasses.dataclass(frozen=True)
class Costs:
    """What is computed in an epoch.

    Attributes:
        work: Multiplications of a forward pass of the host, for one example.
        passes: Number of forward passes that probes need: one for each state of the host.
        sizes: Of all probes.
        rows: Number of labels of an example, each with features of its own.
    """

    work: int
    passes: int
    sizes: Sizes
    rows: int = 1

    def of_host(self, examples: float) -> float:
        """The host's own training on so many examples: forward, and twice that back."""
        return 3 * self.work * examples

    def every(self, batches: int, examples: int, steps: int | None) -> int:
        """In every so-manieth step probes take part; in all of an epoch of unknown length.

        Args:
            batches: Number of batches of a step.
            examples: Number of examples in them.
            steps: Number of steps in the epoch, where it is known.
        """
        if steps is None:
            return 1
        features = sum(features for features, _ in self.sizes)
        parameters = sum(parameters_of(*size) for size in self.sizes)
        step = (
            STEP_COST * features * examples * self.rows
            + (PARAMETER_COST * parameters + STEP_CALLS) * batches
        )
        allowed = max(STEPS_SHARE * self.of_host(examples), MIN_STEPS / max(steps, 1))
        return min(math.ceil(step / allowed), MAX_EVERY)

    def refit(self, share: float, examples: int, available: int) -> tuple[int, int]:
        """On how many examples to refit, and with how many passes over them at most.

        Args:
            share: How much it may cost, as a share of the host's epoch.
            examples: Number of examples that the host trained on.
            available: Number of examples that are there to refit on.
        """
        prepared = self.rows * sum(prepare_cost(features) for features, _ in self.sizes)
        once = self.work * self.passes + prepared
        budget = max(share * self.of_host(examples), MIN_REFIT)
        too_many = bisect.bisect_right(
            range(available + 1), budget,
            key=lambda n: n * once + PASSES * self._of_pass(n),
        )  # fmt: skip
        n = max(2, too_many - 1)
        return n, max(2, int((budget - n * once) // self._of_pass(n)))

    def _of_pass(self, n: int) -> int:
        """A pass of the solver over n examples, for all probes."""
        return sum(pass_cost(n * self.rows, *size) for size in self.sizes)
