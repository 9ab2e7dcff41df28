"""A host made ready to run over data, in this process or in a worker's.

In: a model, and what is asked of it. Out: the rows of a batch, and what a store says of the host.
"""

import dataclasses
import hashlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_probes.forward import ForwardPass
from keras_probes.offline.store import ArrayName, FeatureStore
from keras_probes.probes.targets import Target
from keras_probes.probes.tasks.task import WRONG
from keras_probes.taps.plan import TapPlan, make_plan
from keras_probes.taps.reduce import AtPositions, RandomFeatures, Reduce
from keras_probes.taps.select import Selector

Rows = dict[ArrayName, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of a host.

    Attributes:
        layers: Where to look.
        reduce: What is kept of a layer's output.
        seed: Of random subsets.
        dtype: How features are kept.
        spec: Structure of `tf.TensorSpec` of the batches, of any size.
    """

    layers: Selector
    reduce: Reduce
    seed: int
    dtype: str
    spec: Any

    def plan(self, model: keras.Model) -> TapPlan:
        """The taps, for labels of examples."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(self.spec)
        return make_plan(model, x, self.layers, self.reduce, self.seed)


class Prepared:
    """A host with its taps and targets.

    Args:
        plan: The taps, as `Asked.plan` has them.
        asked: What is asked of the host.
        targets: What the probes are to predict.

    Attributes:
        plan: The taps, for labels of examples or of positions.
        targets: As given.
        rows_each: How many labels, and so rows, an example has.
        weighted: Whether rows have weights.
    """

    def __init__(self, plan: TapPlan, asked: Asked, targets: list[Target]):
        self.targets = targets
        self.plan, self.rows_each = _at_positions(plan, asked, targets)
        self._forward = ForwardPass(self.plan, targets, asked.spec, asked.dtype)
        self.weighted = self._forward.weighted

    def about(self) -> dict[str, Any]:
        """What a store says of the host, and what must be the same in every worker."""
        host = self.plan.host
        return {
            "taps": [dataclasses.asdict(tap) for tap in self.plan.tap_infos()],
            "reductions": {
                t.tap.name: keras.saving.serialize_keras_object(t.reduction) for t in self.plan.taps
            },
            "host": {"name": host.name, "class": type(host).__name__, "sha256": _sha256(host)},
        }

    def subsets(self) -> dict[str | None, np.ndarray]:
        """Random subsets, int32, by tap."""
        return {
            t.tap.name: t.reduction.indices.numpy()
            for t in self.plan.taps
            if isinstance(t.reduction, (RandomFeatures, AtPositions))
        }

    def rows(self, batch: Any) -> Rows:
        """All arrays of a batch."""
        return self._checked(self._forward(batch))

    def labels(self, batch: Any) -> Rows:
        """Its labels alone, which takes no forward pass."""
        return self._checked(self._forward.labels(batch))

    def _checked(self, parts: dict[ArrayName, tf.Tensor]) -> Rows:
        """Parts as NumPy has them, each label one of its task or missing."""
        for target in self.targets:
            state = target.task.state(parts["labels", target.name]).numpy()
            target.refuse(int(np.count_nonzero(state == WRONG)), len(state))
        return {name: part.numpy() for name, part in parts.items()}


def compare_labels(store: FeatureStore, chunk: int, known: Any, rows: Rows) -> None:
    """Raises a `ValueError` if the labels of a chunk that is there are not those of its rows."""
    for target, labels in known.items():
        received = rows["labels", target]
        if not np.array_equal(labels, received, equal_nan=labels.dtype.kind == "f"):
            raise ValueError(
                f"The store {str(store.path)!r} is of other data, or of these in another order: "
                f"labels of chunk {chunk} differ. Data must come in the same order in every call, "
                "without shuffling. Choose another path, or delete the store."
            )


def _at_positions(plan: TapPlan, asked: Asked, targets: list[Target]) -> tuple[TapPlan, int]:
    """Those taps that have positions, where the labels are of these.

    Returns:
        The plan, and how many labels, and so rows, an example has.
    """
    found = {target.positions for target in targets}
    if found == {None}:
        return plan, 1
    first = targets[0].positions
    if len(found) > 1 or first is None:
        raise ValueError(
            "Expected the labels of all targets to be of examples, or all of positions of one "
            "grid. Received: others. Extract them into a store for each."
        )
    at_positions = plan.at_positions(asked.layers, asked.reduce, asked.seed, first.axes)
    return at_positions, first.per_example


def _sha256(model: keras.Model) -> str:
    """Hash of a host's weights: values, shapes and dtypes, in order."""
    digest = hashlib.sha256()
    for weight in model.weights:
        digest.update(f"{weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(np.ascontiguousarray(weight.numpy()).tobytes())
    return digest.hexdigest()
