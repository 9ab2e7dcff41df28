"""Probes on a host: a model that takes the host's input and returns every probe's prediction.

In: a host, and probes that were fitted to its features. Out: a `keras.Model`.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_probes.taps.graph import call_at_inference, input_spec_of
from keras_probes.taps.plan import make_plan
from keras_probes.taps.record import record_calls


class AttachedProbes(keras.Model):
    """A host and its probes, at inference.

    Args:
        host: The host.
        probes: By tap: W, shape (n_features, num_classes), and b, shape (num_classes,).
        reductions: By tap: the configuration of what makes its features.

    Input: what the host takes.
    Output: by tap, probabilities, float32, shape (batch, num_classes).
    """

    def __init__(
        self,
        host: keras.Model,
        probes: Mapping[str, tuple[np.ndarray, np.ndarray]],
        reductions: Mapping[str, Any],
    ):
        super().__init__(name="attached_probes", trainable=False)
        spec = input_spec_of(host)
        if spec is None:
            raise ValueError(
                f"The input shape of {host.name!r} is not known. Call it on some data first, or "
                "give it a keras.Input."
            )
        reduce = {tap: keras.saving.deserialize_keras_object(reductions[tap]) for tap in probes}
        self.host = host
        self._plan = make_plan(host, spec, list(probes), reduce, seed=0)
        for tap, n_features in self._plan.n_features.items():
            if n_features != len(probes[tap][0]):
                raise ValueError(
                    f"Expected tap {tap!r} to have {len(probes[tap][0])} features, as when its "
                    f"probe was fitted. Received: a model where it has {n_features}."
                )
        self._probes = {tap: tuple(map(tf.constant, probes[tap])) for tap in self._plan.n_features}

    def call(self, inputs: Any) -> dict[str, tf.Tensor]:
        with record_calls(self.host, self._plan.layers()) as recording, keras.StatelessScope():
            call_at_inference(self.host, inputs)
        features = self._plan.features(recording)
        return {
            tap: tf.nn.softmax(tf.matmul(features[tap], kernel) + bias)
            for tap, (kernel, bias) in self._probes.items()
        }
