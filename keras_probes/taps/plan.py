"""What is looked at: the taps of one host with the reduction of each.

In: a host and the user's `layers=` and `reduce=`. Out: a `TapPlan`, which turns the tensors that
are recorded while the host runs into features. Online and offline probes share it.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_probes.results.schema import Node, TapInfo
from keras_probes.taps.graph import HostGraph, Tap, call_at_inference, trace
from keras_probes.taps.record import Recording, record_calls
from keras_probes.taps.reduce import Reduce, StopGradient, reduction_for
from keras_probes.taps.select import Selector, glob_match, nearest, select


@dataclasses.dataclass(frozen=True)
class ReducedTap:
    """A tap with what makes features of it.

    Attributes:
        tap: Where to look.
        stop_gradient: The diode between the host and the probe.
        reduction: Keras layer, (batch, ...) -> float32 (batch, n_features).
        n_features: Number of features.
    """

    tap: Tap
    stop_gradient: StopGradient
    reduction: keras.layers.Layer
    n_features: int

    def features(self, activation: tf.Tensor) -> tf.Tensor:
        """Float32, shape (batch, n_features), from the host's tensor (batch, ...)."""
        return self.reduction(self.stop_gradient(activation))


@dataclasses.dataclass(frozen=True)
class TapPlan:
    """The taps of one host, in graph order.

    Attributes:
        host: The model.
        graph: What the host computes.
        taps: The chosen taps, each with its reduction.
        other_weights: Variables that `features_of` takes in place of those of the host, by pairs:
            (the host's, the other).
    """

    host: keras.Model
    graph: HostGraph
    taps: tuple[ReducedTap, ...]
    other_weights: tuple[tuple[keras.Variable, keras.Variable], ...] = ()

    @property
    def n_features(self) -> dict[str, int]:
        """Number of features by tap name."""
        return {t.tap.name: t.n_features for t in self.taps}

    def tap_infos(self) -> list[TapInfo]:
        """What the results say of each tap."""
        return [
            TapInfo(
                name=t.tap.name,
                depth=t.tap.depth,
                layer=t.tap.layer_type,
                shape=(t.tap.shape or (None,))[1:],
                reduction=type(t.reduction).__name__,
                features=t.n_features,
            )
            for t in self.taps
        ]

    def nodes(self) -> list[Node]:
        """Every layer of the host and every tap, in graph order, as the results keep them."""
        taps = {tap.name: tap for tap in self.graph.taps}
        names = {name: name for name in self.graph.inputs}  # by first name, the one that is shown
        for name in reversed(self.n_features):
            if self.graph.same[name] not in self.n_features:
                names[self.graph.same[name]] = name
        above = {names[name]: inputs for name, inputs in self.graph.inputs.items()}
        for name in self.n_features:
            above.setdefault(name, (self.graph.same[name],))  # a second name that is probed as well
        return [
            Node(
                name=name,
                layer=taps[name].layer_type,
                shape=(taps[name].shape or (None,))[1:],
                inputs=tuple(names[of] for of in above[name]),
            )
            for name in sorted(above, key=list(taps).index)
        ]

    def layers(self) -> list[keras.Operation]:
        """The host and the layers to listen to while it runs, each once."""
        return list(dict.fromkeys([self.host, *(t.tap.site.layer for t in self.taps)]))

    def features(self, recording: Recording) -> dict[str, tf.Tensor]:
        """Returns the features of each tap, float32, shape (batch, n_features).

        Args:
            recording: What was recorded while the host ran.

        Raises:
            ValueError: The host did not compute one of the taps, or called its layer more or less
                often than at inference, so that it can't be told which call is meant.
        """
        for reduced in self.taps:
            tap = reduced.tap
            if tap.site not in recording.tensors:
                raise ValueError(
                    f"This step of the model does not compute tap {tap.name!r}, which its `call` "
                    "at inference does. Leave it out of `layers`."
                )
            called = recording.calls[tap.site.layer]
            expected = self.graph.calls[tap.site.layer] * recording.calls[self.host]
            if recording.calls[self.host] and called != expected:
                raise ValueError(
                    f"The layer of tap {tap.name!r} is called {called} times in this step and "
                    f"{expected} times at inference, so that it can't be told which call to probe. "
                    'Use mode="isolated", or leave it out of `layers`.'
                )
        return {t.tap.name: t.features(recording.tensors[t.tap.site]) for t in self.taps}

    def features_of(self, x: Any) -> dict[str, tf.Tensor]:
        """The features of each tap at inference, as `run` says."""
        return self.run(x)[0]

    def run(self, x: Any) -> tuple[dict[str, tf.Tensor], Any]:
        """Runs the host at inference.

        Args:
            x: What the host takes.

        Returns:
            The features of each tap, as `features`, and what the host returns.
        """
        values = [(own, tf.convert_to_tensor(other)) for own, other in self.other_weights]
        # A stateless scope takes any assignment to a Keras variable upon itself.
        with record_calls(self.host, self.layers()) as recording, keras.StatelessScope(values):
            outputs = call_at_inference(self.host, x)
        return self.features(recording), outputs

    def with_weights_as_now(self) -> "TapPlan":
        """The same taps of the host as it is now, whatever becomes of it."""
        pairs = [
            (own, keras.Variable(own, trainable=False, dtype=own.dtype, name=f"was_{place}"))
            for place, own in enumerate(self.host.weights)
        ]
        return dataclasses.replace(self, other_weights=tuple(pairs))

    def inputs(self) -> dict[str, keras.KerasTensor]:
        """Returns a Keras input for the host's tensor at each tap, by tap name."""
        return {
            t.tap.name: keras.Input(
                (t.tap.shape or ())[1:], dtype=t.tap.dtype, name=t.tap.name.replace("/", "|")
            )
            for t in self.taps
        }


def make_plan(
    host: keras.Model, input_spec: Any, layers: Selector, reduce: Reduce, seed: int
) -> TapPlan:
    """Chooses the taps of a host and how features are made of them.

    Args:
        host: The model; one that is not built yet gets built, as its first step would do.
        input_spec: Structure of `tf.TensorSpec` the host is called with.
        layers: Where to look, as `LinearProbeCallback` takes it.
        reduce: How features are made, likewise.
        seed: Seed of random feature subsets.

    Returns:
        The `TapPlan`.

    Raises:
        TypeError, ValueError: A selector or reduction is unknown, matches nothing or is
            ambiguous, or a tap's static shape is not enough.
    """
    graph = trace(host, input_spec)
    taps = select(graph, layers)
    _check_globs(taps, reduce)
    reduced = []
    for place, tap in enumerate(taps):
        # Every layer gets a name, so that no automatic name is used up.
        reduction = reduction_for(tap, reduce, seed=seed, name=_layer_name("reduce", place, tap))
        stop_gradient = StopGradient(name=_layer_name("stop_gradient", place, tap))
        n_features = reduction.compute_output_shape(tap.shape)[1]
        reduction.build(tap.shape)
        if reduction.trainable_weights:
            raise ValueError(
                f"Expected a reduction without trainable weights, since nothing would train them. "
                f"Received: {type(reduction).__name__} for tap {tap.name!r}."
            )
        reduced.append(ReducedTap(tap, stop_gradient, reduction, n_features))
    return TapPlan(host, graph, tuple(reduced))


def _check_globs(taps: list[Tap], reduce: Reduce) -> None:
    names = [tap.name for tap in taps]
    for glob in reduce if isinstance(reduce, Mapping) else ():
        if not any(glob_match(name, glob) for name in names):
            raise ValueError(
                f"A glob in `reduce` matches none of the taps. Received: {glob!r}. "
                + nearest(glob, names)
            )


def _layer_name(role: str, place: int, tap: Tap) -> str:
    """A unique name that Keras accepts; tap names may hold slashes, which it does not."""
    return f"{role}_{place}_{re.sub(r'[^A-Za-z0-9_.-]', '_', tap.name)}"
