"""A forward pass of its own: what probes see of a batch while the host stands still.

In: a host's taps, targets, and batches as `fit` takes them. Out: features, labels and weights. The
host is called at inference, and none of its state is touched.
"""

from collections.abc import Sequence
from typing import Any, Literal

import keras
import tensorflow as tf

from keras_probes.probes.targets import Target
from keras_probes.taps.batches import any_batch_size
from keras_probes.taps.plan import TapPlan

# What it is of a batch, and of which tap or target.
Part = tuple[Literal["tap", "labels", "weights", "predictions"], str | None]


class ForwardPass:
    """Computes the features of all taps, and the labels and weights of all targets, of a batch.

    Args:
        plan: The taps.
        targets: The targets.
        spec: Structure of `tf.TensorSpec` of the batches, (x, y) or (x, y, sample_weight); they may
            be of any size.
        dtype: Of the features.

    Attributes:
        spec: As given.
        weighted: Whether samples have weights.
    """

    def __init__(self, plan: TapPlan, targets: Sequence[Target], spec: Any, dtype: str = "float32"):
        self.spec = spec
        _, _, sample_weight = keras.utils.unpack_x_y_sample_weight(spec)
        self.weighted = sample_weight is not None or any(t.weigh is not None for t in targets)
        self._plan, self._targets, self._dtype = plan, list(targets), dtype
        self._run = self._forward
        if not plan.host.run_eagerly:
            signature = [any_batch_size(spec)]
            self._run = tf.function(self._forward, input_signature=signature, autograph=False)

    def __call__(self, batch: Any) -> dict[Part, tf.Tensor]:
        """Returns all parts of a batch.

        Args:
            batch: (x, y) or (x, y, sample_weight).

        Returns:
            Features, shape (batch, n_features); labels, as the target's task has them; weights,
            float32, shape (batch,), where samples have one; the host's predictions, as labels,
            where it has an output for the target.
        """
        features, labels, weights, predicted = self._run(batch)
        names = [target.key for target in self._targets]
        return {
            **{("tap", tap): part for tap, part in features.items()},
            **{("labels", name): part for name, part in zip(names, labels, strict=True)},
            **{("weights", name): part for name, part in zip(names, weights, strict=False)},
            **{
                ("predictions", name): part
                for name, part in zip(names, predicted, strict=True)
                if part is not None
            },
        }

    def labels(self, batch: Any) -> dict[Part, tf.Tensor]:
        """Returns the labels alone, which takes no forward pass."""
        data = keras.utils.unpack_x_y_sample_weight(batch)
        return {("labels", t.key): t.labels_and_weights(*data)[0] for t in self._targets}

    def _forward(self, batch: Any) -> tuple[dict[str, tf.Tensor], list, list, list]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        places = self._targets[0].places(x, y)
        raw, outputs, padding = self._plan.run(x, places)
        predicted = [target.predictions(outputs, places) for target in self._targets]
        pairs = [t.labels_and_weights(x, y, sample_weight, places, padding) for t in self._targets]
        labels = [of_target for of_target, _ in pairs]
        raw = self._plan.check_rows(raw, labels[0])
        features = {tap: tf.cast(part, self._dtype) for tap, part in raw.items()}
        weights = [of_target for _, of_target in pairs] if self.weighted else []
        return features, labels, weights, predicted
