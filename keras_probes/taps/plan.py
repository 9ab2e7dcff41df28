"""What is looked at: the taps of one host with the reduction of each.

In: a host and the user's `layers=` and `reduce=`. Out: a `TapPlan`, which turns the tensors that
are recorded while the host runs into features. Online and offline probes share it.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_probes.places import Places, values_at
from keras_probes.results.schema import Node, TapInfo
from keras_probes.taps.batches import any_batch_size
from keras_probes.taps.graph import (
    HostGraph,
    Tap,
    call_at_inference,
    input_spec_of,
    merged,
    trace,
)
from keras_probes.taps.record import Recording, record_calls
from keras_probes.taps.reduce import (
    AtPositions,
    GlobalAverage,
    Reduce,
    StopGradient,
    Token,
    UnfitTapError,
    reduction_at_positions,
    reduction_for,
)
from keras_probes.taps.select import Selector, glob_match, nearest, select

_OTHER_ROWS = "another_number_of_examples_than_labels.use_mode_isolated"
ISOLATE = 'Use mode="isolated", where probes have a forward pass of their own.'


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

    @property
    def sizes(self) -> tuple[int | None, ...] | None:
        """Those of the host's tensor, the batch apart, if the reduction needs them as they are."""
        sizes = (self.tap.shape or (None,))[1:]
        free = None in sizes or isinstance(self.reduction, (GlobalAverage, Token, AtPositions))
        return None if free else sizes

    def features(
        self,
        activation: tf.Tensor,
        mask: tf.Tensor | None = None,
        places: Places | None = None,
    ) -> tf.Tensor:
        """Float32, shape (batch, n_features), from the host's tensor (batch, ...).

        Args:
            activation: The host's tensor.
            mask: Which of its steps count, bool, shape (batch, steps).
            places: The positions that labels are of, if they are; each is a row.
        """
        if not isinstance(activation, tf.Tensor):  # while the sibling model is made
            return self.reduction(self.stop_gradient(activation))
        if self.sizes is not None and not activation.shape.is_fully_defined():
            # What is known of it while tracing may be too little for the reduction.
            activation = tf.ensure_shape(activation, (activation.shape[0], *self.sizes))
        if places is not None:
            # Likewise of the channels; the grid may be of any size.
            axes = 1 + places[0].shape[-1]
            channels = (self.tap.shape or ())[axes:]
            activation = tf.ensure_shape(activation, (*activation.shape[:axes], *channels))
            return self.reduction.at(self.stop_gradient(activation), places)
        stopped = self.stop_gradient(activation)
        if mask is not None:
            stopped._keras_mask = tf.cast(mask, tf.bool)
        # A Keras layer as reduction follows the global dtype policy.
        return tf.cast(self.reduction(stopped), tf.float32)


@dataclasses.dataclass(frozen=True)
class TapPlan:
    """The taps of one host, in graph order.

    Attributes:
        host: The model.
        graph: What the host computes.
        input_spec: Structure of `tf.TensorSpec` that the host was traced with.
        taps: The chosen taps, each with its reduction.
        prefix: What the names of taps begin with.
        left_out: By name, why what `layers=` picks otherwise is not probed.
        other_weights: Variables that `features_of` takes in place of those of the host, by pairs:
            (the host's, the other).
    """

    host: keras.Model
    graph: HostGraph
    input_spec: Any
    taps: tuple[ReducedTap, ...]
    prefix: str = ""
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
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
        tapped = [reduced.tap.site.layer for reduced in self.taps]
        masked = [self.graph.masked.get(name) for name in self.n_features]
        return list(dict.fromkeys([self.host, *tapped, *filter(None, masked)]))

    def features(self, recording: Recording, places: Places | None = None) -> dict[str, tf.Tensor]:
        """Returns the features of each tap, float32, shape (batch, n_features).

        Args:
            recording: What was recorded while the host ran.
            places: The positions that labels are of, if they are; each is a row.

        Raises:
            ValueError: The host did not compute one of the taps, or called its layer more or less
                often than at inference, so that it can't be told which call is meant.
        """
        times = recording.calls[self.host] or 1  # or its layers alone are called
        for reduced in self.taps:
            tap = reduced.tap
            if tap.site not in recording.tensors:
                raise ValueError(
                    f"This step of the model does not compute tap {tap.name!r}, which its `call` "
                    f"at inference does. {ISOLATE}"
                )
            called = recording.calls[tap.site.layer]
            expected = self.graph.calls[tap.site.layer] * times
            if called != expected:
                raise ValueError(
                    f"The layer of tap {tap.name!r} is called {called} times in this step and "
                    f"{expected} times at inference, so that it can't be told which call to probe. "
                    f"{ISOLATE}"
                )
        features = {}
        for reduced in self.taps:
            name, tensor = reduced.tap.name, recording.tensors[reduced.tap.site]
            masked = self.graph.masked.get(name)
            mask = None if masked is None else recording.mask_taken.get(masked)
            features[name] = reduced.features(tensor, mask, places)
        return features

    def padding(self, recording: Recording, places: Places | None) -> tf.Tensor | None:
        """Which positions the host's masks leave out, bool, shape (batch * P,); `None` if none.

        Args:
            recording: What was recorded while the host ran.
            places: The positions, of a sequence; masks know of no others.
        """
        if places is None or places[0].shape[-1] != 1:
            return None
        layers = {self.graph.masked.get(name) for name in self.n_features} - {None}
        masks = [recording.mask_taken.get(layer) for layer in layers]
        known = [mask for mask in masks if mask is not None and mask.shape.rank == 2]
        if not known:
            return None
        return tf.reduce_any([~values_at(tf.cast(of, tf.bool), places) for of in known], axis=0)

    def check_rows(
        self, features: Mapping[str, tf.Tensor], labels: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Looks at taps of which it was not known that they have a row for each example.

        Args:
            features: As `features` returns them.
            labels: A label for each example, shape (batch,).

        Returns:
            The features, to be used in place of those given: what is computed of them waits for it.

        Raises:
            ValueError, InvalidArgumentError: One has another number of rows.
        """
        checked = dict(features)
        for name in (t.tap.name for t in self.taps if not t.tap.by_example):
            message = (
                f"Tap {name!r} has no row for each example. Leave it out with layers=[..., "
                f'"!{name}"].'
            )
            checked[name] = check_rows(features[name], labels, message)
        return checked

    def check_sizes(self, input_spec: Any) -> None:
        """Looks whether the taps come in the same sizes from other data.

        Args:
            input_spec: Structure of `tf.TensorSpec` of the x of these data.

        Raises:
            ValueError: One that needs them does not.
        """
        spec = _traced_spec(self.host, input_spec)
        if spec == self.input_spec:
            return
        found = {tap.name: tap.shape for tap in trace(self.host, spec, self.prefix).taps}
        for reduced in self.taps:
            name, shape = reduced.tap.name, found.get(reduced.tap.name)
            if reduced.sizes is None or shape is None:
                continue
            if not tf.TensorShape(shape[1:]).is_compatible_with(reduced.sizes):
                raise ValueError(
                    f"The probe of tap {name!r} was built for the shape {(None, *reduced.sizes)}. "
                    f"Received: {shape}. Give data of that size, or average over the sizes that "
                    'change with reduce="gap".'
                )

    def features_of(self, x: Any, places: Places | None = None) -> dict[str, tf.Tensor]:
        """The features of each tap at inference, as `run` says."""
        return self.run(x, places)[0]

    def run(
        self, x: Any, places: Places | None = None
    ) -> tuple[dict[str, tf.Tensor], Any, tf.Tensor | None]:
        """Runs the host at inference.

        Args:
            x: What the host takes.
            places: As for `features`.

        Returns:
            The features of each tap, as `features`, what the host returns, and `padding`.
        """
        values = [(own, tf.convert_to_tensor(other)) for own, other in self.other_weights]
        # A stateless scope takes any assignment to a Keras variable upon itself.
        with record_calls(self.host, self.layers()) as recording, keras.StatelessScope(values):
            outputs = call_at_inference(self.host, x)
        return self.features(recording, places), outputs, self.padding(recording, places)

    def at_positions(self, layers: Selector, reduce: Reduce, seed: int, axes: int) -> "TapPlan":
        """The plan of the same host for labels that are of positions.

        Args:
            layers: Where to look, as for `make_plan`; likewise the next two.
            reduce: What is kept of the channels.
            seed: Of random subsets.
            axes: Number of axes of the positions.

        Raises:
            TypeError, ValueError: As `make_plan`; a tap that was asked for has no such positions.
        """
        return _planned(self, layers, reduce, seed, axes)

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


def check_rows(features: tf.Tensor, labels: tf.Tensor, message: str) -> tf.Tensor:
    """Returns the features; raises an error unless there are as many rows as labels."""
    if not features.shape[:1].is_compatible_with(labels.shape[:1]):
        raise ValueError(message)
    rows = tf.shape(features)[0], tf.shape(labels)[0]
    with tf.control_dependencies([tf.debugging.assert_equal(*rows, message)]):
        checked = tf.identity(features)
    # XLA drops the assertion; it fails here, and says the name.
    return tf.reshape(checked, (rows[1], features.shape[1]), name=_OTHER_ROWS)


def make_plan(
    host: keras.Model,
    input_spec: Any,
    layers: Selector,
    reduce: Reduce,
    seed: int,
    prefix: str = "",
) -> TapPlan:
    """Chooses the taps of a host and how features are made of them.

    Args:
        host: The model; one that is not built yet gets built, as its first step would do.
        input_spec: Structure of `tf.TensorSpec` of the x of the data; `None` for what the host
            declares, which may leave sizes open that the data tell.
        layers: Where to look, as `LinearProbeCallback` takes it.
        reduce: How features are made, likewise.
        seed: Seed of random feature subsets.
        prefix: What the names of taps begin with.

    Returns:
        The `TapPlan`.

    Raises:
        TypeError, ValueError: A selector or reduction is unknown, matches nothing or is
            ambiguous, or a tap's static shape is not enough.
    """
    spec = _traced_spec(host, input_spec)
    return _planned(
        TapPlan(host, trace(host, spec, prefix), spec, (), prefix), layers, reduce, seed
    )


def _planned(
    plan: TapPlan, layers: Selector, reduce: Reduce, seed: int, positions: int | None = None
) -> TapPlan:
    """A plan with the taps that are asked for, as `make_plan` or `TapPlan.at_positions` says."""
    graph = plan.graph
    selected = select(graph, layers)
    _check_globs(selected.taps, reduce)
    reduced: list[ReducedTap] = []
    left_out = dict(selected.left_out)
    for tap in selected.taps:
        try:
            reduced.append(_reduced(len(reduced), tap, reduce, seed, positions))
        except UnfitTapError as unfit:
            if tap.name in selected.named:
                raise
            left_out[tap.name] = unfit.reason
    if not reduced:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"`layers` picks nothing that can be probed. {reasons}")
    return dataclasses.replace(plan, taps=tuple(reduced), left_out=left_out)


def _traced_spec(host: keras.Model, input_spec: Any) -> Any:
    """What a host is traced with: the spec of data, if they are known, or what it declares."""
    declared = input_spec_of(host)
    return declared if input_spec is None else merged(any_batch_size(input_spec), declared)


def _reduced(place: int, tap: Tap, reduce: Reduce, seed: int, positions: int | None) -> ReducedTap:
    # Every layer gets a name, so that no automatic name is used up.
    name = _layer_name("reduce", place, tap)
    if positions is None:
        reduction = reduction_for(tap, reduce, seed=seed, name=name)
    else:
        reduction = reduction_at_positions(tap, positions, reduce, seed=seed, name=name)
    stop_gradient = StopGradient(name=_layer_name("stop_gradient", place, tap))
    n_features = reduction.compute_output_shape(tap.shape)[-1]
    reduction.build(tap.shape)
    if reduction.trainable_weights:
        raise ValueError(
            f"Expected a reduction without trainable weights, since nothing would train them. "
            f"Received: {type(reduction).__name__} for tap {tap.name!r}."
        )
    return ReducedTap(tap, stop_gradient, reduction, n_features)


def _check_globs(taps: Iterable[Tap], reduce: Reduce) -> None:
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
