"""Probes on a host: a model that takes the host's input and returns every probe's prediction.

In: a host, and probes that were fitted to its features. Out: a `keras.Model`.
"""

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_probes.results.schema import Probe
from keras_probes.taps.graph import input_spec_of
from keras_probes.taps.plan import make_plan


class AttachedProbes(keras.Model):
    """A host and its probes, at inference.

    Args:
        host: The host.
        probes: The probes by tap.
        reductions: By tap: the configuration of what makes its features.

    Input: what the host takes.
    Output: by tap, the probe's answers, float32, shape (batch, outputs).
    """

    def __init__(
        self,
        host: keras.Model,
        probes: Mapping[str, Probe],
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
            if n_features != len(probes[tap].kernel):
                raise ValueError(
                    f"Expected tap {tap!r} to have {len(probes[tap].kernel)} features, as when its "
                    f"probe was fitted. Received: a model where it has {n_features}."
                )
        self._probes = {tap: probes[tap] for tap in self._plan.n_features}

    def call(self, inputs: Any) -> dict[str, tf.Tensor]:
        features = self._plan.features_of(inputs)
        return {
            tap: keras.activations.get(probe.activation)(
                tf.matmul(features[tap], probe.kernel) + probe.bias
            )
            for tap, probe in self._probes.items()
        }
