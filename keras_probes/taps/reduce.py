"""Activations to features: what is kept of a tap's tensor for its probe (paper, section 3.4).

In: a host's activation, shape (batch, ...). Out: features, float32, shape (batch, n_features).

Reductions are Keras layers without trainable weights; they are part of the saved probe model.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_probes.places import Places, values_at
from keras_probes.taps.graph import Tap
from keras_probes.taps.select import glob_match, nearest

AUTO_FEATURES = 1000  # at most this many a tap by default; what the paper takes for Inception v3

Reduce: TypeAlias = str | keras.layers.Layer | Mapping[str, "str | keras.layers.Layer"]


class UnfitTapError(ValueError):
    """No features can be made of a tap; says why, for those who asked for it by name.

    Attributes:
        reason: Why, in few words.
    """

    reason = "its sizes differ from batch to batch"


class UnknownSizeError(UnfitTapError):
    """A tap's sizes differ from batch to batch, and its reduction needs them."""


@keras.saving.register_keras_serializable(package="keras_probes")
class StopGradient(keras.layers.Layer):
    """Identity that no gradient passes: the diode of the paper's appendix A."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"autocast": False, **kwargs})
        self.supports_masking = True

    def call(self, inputs):
        return ops.stop_gradient(inputs)

    def compute_output_shape(self, input_shape):
        return input_shape


class _Reduction(keras.layers.Layer):
    """A layer that takes what the host computed as it is, in any dtype, and yields float32."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        self.supports_masking = True  # a mask of the host's is no mistake

    def compute_mask(self, inputs, mask=None) -> None:
        return None  # features have no time steps


@keras.saving.register_keras_serializable(package="keras_probes")
class Flatten(_Reduction):
    """All features of a tap, as one vector.

    Input: any dtype, shape (batch, ...), static but for the batch.
    Output: float32, shape (batch, n_features).
    """

    def call(self, inputs):
        return ops.cast(ops.reshape(inputs, (-1, _size(inputs.shape))), "float32")

    def compute_output_shape(self, input_shape):
        return (input_shape[0], _size(input_shape))


@keras.saving.register_keras_serializable(package="keras_probes")
class RandomFeatures(_Reduction):
    """A fixed random subset of a tap's features (paper, section 3.4, first suggestion).

    Which features are kept is drawn once, without replacement, from `seed` alone, and is a weight
    of the layer: it is saved with it and never changes. A tap with no more than `n` features keeps
    them all, in their order.

    Args:
        n: How many features to keep.
        seed: Seed of the draw. With `None`, a callback uses its own, so that taps of one shape are
            seen at the same places.

    Input: any dtype, shape (batch, ...), static but for the batch.
    Output: float32, shape (batch, min(n, size)).
    """

    def __init__(self, n: int = AUTO_FEATURES, seed: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.n = _positive_integer("n", n)
        self.seed = seed

    def build(self, input_shape):
        size = _size(input_shape)
        kept = min(self.n, size)
        subset = np.random.default_rng(self.seed or 0).choice(size, kept, replace=False)
        self.indices = self.add_weight(
            name="indices",
            shape=(kept,),
            dtype="int32",
            initializer=lambda _, dtype: ops.convert_to_tensor(np.sort(subset), dtype),
            trainable=False,
        )

    def call(self, inputs):
        flat = ops.reshape(inputs, (-1, _size(inputs.shape)))
        return ops.cast(ops.take(flat, self.indices, axis=1), "float32")

    def compute_output_shape(self, input_shape):
        return (input_shape[0], min(self.n, _size(input_shape)))

    def get_config(self):
        return {**super().get_config(), "n": self.n, "seed": self.seed}


class _Positional(_Reduction):
    """A reduction that tells channels from positions."""

    def __init__(self, data_format: str | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if data_format not in (None, "channels_last", "channels_first"):
            raise ValueError(
                'Expected `data_format` to be "channels_last" or "channels_first". '
                f"Received: data_format={data_format!r}."
            )
        self.data_format = data_format

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "data_format": self.data_format}

    def _channel_axis(self, rank: int) -> int:
        first = (self.data_format or keras.config.image_data_format()) == "channels_first"
        return 1 if first and rank > 2 else rank - 1

    def _position_axes(self, rank: int) -> tuple[int, ...]:
        return tuple(axis for axis in range(1, rank) if axis != self._channel_axis(rank))


@keras.saving.register_keras_serializable(package="keras_probes")
class GlobalAverage(_Positional):
    """The mean over all positions of each channel (paper, section 3.4, third suggestion).

    Serves sequences, images and volumes; a tap without positions passes through. Time steps that
    the host's mask leaves out do not count.

    Args:
        data_format: `"channels_last"` or `"channels_first"`; by default Keras's own setting. A
            callback fills in the one of the tapped layer.

    Input: any dtype, shape (batch, ..., channels) or (batch, channels, ...).
    Output: float32, shape (batch, channels).
    """

    def call(self, inputs, mask=None):
        x = ops.cast(inputs, "float32")  # half precision would lose digits in a long sum
        positions = self._position_axes(len(inputs.shape))
        if not positions:
            return ops.reshape(x, (-1, 1)) if len(inputs.shape) == 1 else x
        if mask is None:
            return ops.mean(x, axis=positions)
        weights = _weights(mask, x)
        total = ops.sum(x * weights, axis=positions)
        return ops.divide_no_nan(total, ops.sum(weights, axis=positions))

    def compute_output_shape(self, input_shape):
        if len(input_shape) == 1:
            return (input_shape[0], 1)
        return (input_shape[0], input_shape[self._channel_axis(len(input_shape))])


@keras.saving.register_keras_serializable(package="keras_probes")
class SpatialPool(_Positional):
    """Averages over the cells of the finest grid that keeps within a number of features.

    What benchmarks over many layers do (Goyal et al. 2019, "Scaling and benchmarking
    self-supervised visual representation learning"): layers of any resolution come to about the
    same number of features, and keep some of where things are. A grid has k cells along each axis
    of positions, or as many as there are positions; cells overlap where k is no divisor, as in
    adaptive pooling. Time steps that the host's mask leaves out do not count.

    Args:
        max_features: Most features that a tap may come to, channels times cells.
        data_format: As for `GlobalAverage`.

    Input: any dtype, shape (batch, ..., channels) or (batch, channels, ...), static but for the
        batch.
    Output: float32, shape (batch, channels * cells), all cells of a channel side by side.
    """

    def __init__(
        self, max_features: int = AUTO_FEATURES, data_format: str | None = None, **kwargs: Any
    ):
        super().__init__(data_format, **kwargs)
        self.max_features = _positive_integer("max_features", max_features)

    def call(self, inputs, mask=None):
        grid, axis = self._grid(inputs.shape), self._channel_axis(len(inputs.shape))
        x = ops.moveaxis(ops.cast(inputs, "float32"), axis, -1)
        if mask is None:
            return ops.reshape(_pooled(x, grid), (-1, x.shape[-1] * int(np.prod(grid))))
        weights = _weights(mask, x)
        pooled = ops.divide_no_nan(_pooled(x * weights, grid), _pooled(weights, grid))
        return ops.reshape(pooled, (-1, x.shape[-1] * int(np.prod(grid))))

    def compute_output_shape(self, input_shape):
        if None in input_shape[1:]:
            return (input_shape[0], None)
        channels = input_shape[self._channel_axis(len(input_shape))]
        return (input_shape[0], channels * int(np.prod(self._grid(input_shape))))

    def get_config(self):
        return {**super().get_config(), "max_features": self.max_features}

    def _grid(self, shape) -> list[int]:
        """Number of cells along each axis of positions."""
        sizes = [int(shape[axis]) for axis in self._position_axes(len(shape))]
        channels = int(shape[self._channel_axis(len(shape))])
        for k in range(max(sizes, default=1), 0, -1):
            grid = [min(k, size) for size in sizes]
            if channels * np.prod(grid) <= self.max_features:
                return grid
        raise ValueError(
            f"SpatialPool(max_features={self.max_features}) keeps every channel. Received: "
            f"{channels} channels. Raise max_features, or use RandomFeatures."
        )


def _weights(mask: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """A mask as float32 in the shape of x.

    It is (batch, time): it says nothing of channels or of further positions.
    """
    for axis in range(len(mask.shape), len(x.shape)):
        mask = ops.expand_dims(mask, axis)
    return ops.broadcast_to(ops.cast(mask, "float32"), ops.shape(x))


def _pooled(x: tf.Tensor, grid: list[int]) -> tf.Tensor:
    """Averages cells: (batch, *sizes, channels) -> (batch, channels, *grid)."""
    for cells in grid:
        size = x.shape[1]
        matrix = np.zeros((size, cells), "float32")
        for cell in range(cells):
            here = slice(cell * size // cells, -(-(cell + 1) * size // cells))
            matrix[here, cell] = 1.0 / (here.stop - here.start)
        x = ops.tensordot(x, matrix, axes=[[1], [0]])  # the axis moves to the end
    return x


@keras.saving.register_keras_serializable(package="keras_probes")
class Token(_Reduction):
    """All features of one step of a sequence: a class token, or the last step that counts.

    Args:
        index: Which step, from 0; or from -1 backwards, from the last one that the host's mask does
            not leave out.

    Input: any dtype, shape (batch, steps, ...), static but for batch and steps.
    Output: float32, shape (batch, n_features).
    """

    def __init__(self, index: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        if isinstance(index, bool) or int(index) != index:
            raise ValueError(f"Expected `index` to be an integer. Received: index={index!r}.")
        self.index = int(index)

    def call(self, inputs, mask=None):
        size = self.compute_output_shape(inputs.shape)[1]
        if mask is None or self.index >= 0:
            return ops.cast(ops.reshape(inputs[:, self.index], (-1, size)), "float32")
        steps = ops.where(mask, ops.arange(ops.shape(inputs)[1], dtype="int32"), -1)
        place = ops.maximum(ops.max(steps, axis=1) + 1 + self.index, 0)
        flat = ops.reshape(inputs, (-1, ops.shape(inputs)[1], size))
        taken = ops.take_along_axis(flat, place[:, None, None], axis=1)
        return ops.cast(taken[:, 0], "float32")

    def compute_output_shape(self, input_shape):
        if len(input_shape) < 3:
            raise ValueError(
                f"Token takes a step of a sequence, (batch, steps, ...). Received: {input_shape}."
            )
        steps = input_shape[1]
        if steps is not None and not -steps <= self.index < steps:
            raise ValueError(f"There is no step {self.index}. Received: {steps} steps.")
        if None in input_shape[2:]:
            return (input_shape[0], None)
        return (input_shape[0], _size((input_shape[0], *input_shape[2:])))

    def get_config(self):
        return {**super().get_config(), "index": self.index}


@keras.saving.register_keras_serializable(package="keras_probes")
class AtPositions(_Positional):
    """The channels of a tap at each of its positions, for labels that are of positions.

    Of many channels a fixed random subset is kept, as `RandomFeatures` does.

    Args:
        n: How many channels to keep.
        seed: Seed of the draw.
        data_format: As for `GlobalAverage`.

    Input: any dtype, shape (batch, ..., channels) or (batch, channels, ...).
    Output: float32, shape (batch, ..., min(n, channels)).
    """

    def __init__(
        self,
        n: int = AUTO_FEATURES,
        seed: int | None = None,
        data_format: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(data_format, **kwargs)
        self.n, self.seed = _positive_integer("n", n), seed

    def build(self, input_shape):
        channels = int(input_shape[self._channel_axis(len(input_shape))])
        kept = min(self.n, channels)
        subset = np.random.default_rng(self.seed or 0).choice(channels, kept, replace=False)
        self.indices = self.add_weight(
            name="indices",
            shape=(kept,),
            dtype="int32",
            initializer=lambda _, dtype: ops.convert_to_tensor(np.sort(subset), dtype),
            trainable=False,
        )

    def call(self, inputs):
        return ops.cast(ops.take(self._channels_last(inputs), self.indices, axis=-1), "float32")

    def at(self, inputs: tf.Tensor, places: Places) -> tf.Tensor:
        """The features at some positions, float32, shape (batch * P, n_features).

        Args:
            inputs: As for a call.
            places: Which ones; on a grid of other sizes, the cells that they fall into.
        """
        rows = values_at(self._channels_last(inputs), places)
        return tf.cast(tf.gather(rows, self.indices, axis=1), tf.float32)

    def compute_output_shape(self, input_shape):
        axis = self._channel_axis(len(input_shape))
        channels = input_shape[axis]
        grid = [size for at, size in enumerate(input_shape) if at not in (0, axis)]
        return (input_shape[0], *grid, None if channels is None else min(self.n, channels))

    def get_config(self):
        return {**super().get_config(), "n": self.n, "seed": self.seed}

    def _channels_last(self, inputs: tf.Tensor) -> tf.Tensor:
        return ops.moveaxis(inputs, self._channel_axis(len(inputs.shape)), -1)


def _positive_integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"Expected `{name}` to be a positive integer. Received: {name}={value!r}.")
    return int(value)


def _size(shape) -> int:
    """Number of features of one example: the product of all but the batch dimension."""
    return int(np.prod([int(d) for d in shape[1:]], dtype=np.int64)) if len(shape) > 1 else 1


def reduction_for(tap: Tap, reduce: Reduce, *, seed: int, name: str) -> keras.layers.Layer:
    """Makes the reduction layer of one tap.

    Args:
        tap: The tap; its shape decides what `"auto"` does.
        reduce: `"auto"` (averages over the steps of a sequence, by its mask, and where a size is
            unknown; else all features up to 1,000, or a random 1,000 of them), `"gap"`,
            `"random"`, `"flatten"`, a Keras layer, or a mapping from globs over tap names to
            these; the first glob that fits decides, and a tap that fits none is left to `"auto"`.
        seed: Seed of random subsets: the same places of every tap of one size.
        name: Name for the layer. Every layer here is named, so that no automatic name is used up.

    Returns:
        A fresh Keras layer, (batch, ...) -> float32 (batch, n_features).

    Raises:
        UnknownSizeError: The tap's sizes are not known well enough for it.
        ValueError: Unknown reduction, or it does not fit the tap.
        TypeError: `reduce` has none of these forms.
    """
    if isinstance(reduce, Mapping):
        fits = (kind for glob, kind in reduce.items() if glob_match(tap.name, glob))
        reduce = next(fits, "auto")
    if isinstance(reduce, keras.layers.Layer):
        layer = _named_copy(tap, reduce, seed, name)
    elif isinstance(reduce, str):
        layer = _by_name(tap, reduce, seed, name)
    else:
        raise TypeError(
            'Expected `reduce` to be "auto", "gap", "random", "flatten", a Keras layer, or a '
            f"mapping from globs to these. Received: reduce={reduce!r}."
        )
    _check_shape(tap, layer)
    return layer


def reduction_at_positions(
    tap: Tap, axes: int, reduce: Reduce, *, seed: int, name: str
) -> keras.layers.Layer:
    """Makes what gives a tap's channels at the positions that labels are of.

    Args:
        tap: The tap.
        axes: Number of axes of these positions: 1 of a sequence, 2 of an image.
        reduce: As for `reduction_for`; here, channels are all that is left to choose.
        seed: Seed of random subsets of channels.
        name: Name for the layer.

    Returns:
        A fresh Keras layer, (batch, ...) -> float32 (batch, ..., n_features).

    Raises:
        UnfitTapError: The tap has no such positions.
        ValueError: Another reduction was asked for.
    """
    if isinstance(reduce, Mapping):
        fits = (kind for glob, kind in reduce.items() if glob_match(tap.name, glob))
        reduce = next(fits, "auto")
    if isinstance(reduce, AtPositions):
        layer: AtPositions = _named_copy(tap, reduce, seed, name)
    elif reduce == "auto":
        layer = AtPositions(seed=seed, data_format=_data_format(tap), name=name)
    else:
        raise ValueError(
            "Labels are of positions, where the features are the channels of a layer. Expected "
            f'reduce="auto", or AtPositions(n) for n channels at most. Received: {reduce!r} for '
            f"tap {tap.name!r}."
        )
    shape = tap.shape
    if shape is None or len(shape) != axes + 2 or layer.compute_output_shape(shape)[-1] is None:
        unfit = UnfitTapError(
            f"Labels have {axes} axes of positions. Expected tap {tap.name!r} to have as many, "
            f"beside batch and channels. Received: shape {shape}. Leave it out of layers=."
        )
        unfit.reason = "it has no such positions as the labels"
        raise unfit
    return layer


def _by_name(tap: Tap, kind: str, seed: int, name: str) -> keras.layers.Layer:
    if kind == "auto":
        kind = _best_for(tap)
    if kind == "random":
        return RandomFeatures(seed=seed, name=name)
    if kind == "flatten":
        return Flatten(name=name)
    if kind == "gap":
        return GlobalAverage(_data_format(tap), name=name)
    raise ValueError(
        'Unknown reduction. Expected "auto", "gap", "random", "flatten", a Keras layer or a '
        f"mapping from globs to these. Received: reduce={kind!r}. "
        + nearest(kind, ["auto", "gap", "random", "flatten"])
    )


def _best_for(tap: Tap) -> str:
    """What `"auto"` does: averages of sequences and of unknown sizes; else places, all or some."""
    # Which of a padded sequence's steps holds what differs from example to example. Of the model's
    # own input nobody says whether an axis is time: it may be the rows of an image.
    is_sequence = tap.shape is not None and len(tap.shape) == 3 and tap.site.role != "input"
    if is_sequence or not _is_static(tap):
        return "gap"
    return "flatten" if _size(tap.shape) <= AUTO_FEATURES else "random"


def _named_copy(tap: Tap, layer: keras.layers.Layer, seed: int, name: str) -> keras.layers.Layer:
    """One instance may serve many taps, each of its own shape: every tap gets a copy."""
    config = {**layer.get_config(), "name": name}
    if isinstance(layer, RandomFeatures) and layer.seed is None:
        config["seed"] = seed
    if isinstance(layer, _Positional) and layer.data_format is None:
        config["data_format"] = _data_format(tap)
    return type(layer).from_config(config)


def _check_shape(tap: Tap, layer: keras.layers.Layer) -> None:
    of_any_size = isinstance(layer, (GlobalAverage, Token, AtPositions))
    if tap.shape is not None and (_is_static(tap) or of_any_size):
        try:
            shape = tuple(layer.compute_output_shape(tap.shape))
        except ValueError as error:
            raise ValueError(f"Tap {tap.name!r} of shape {tap.shape}: {error}") from error
        if shape[-1] is not None and (len(shape) == 2 or isinstance(layer, AtPositions)):
            return
        if _is_static(tap):
            raise ValueError(
                f"The reduction {type(layer).__name__} turns tap {tap.name!r} of shape {tap.shape} "
                f"into shape {shape}. Expected (batch, n_features)."
            )
    averaged = isinstance(layer, GlobalAverage)
    instead = "" if averaged else f'Average over them with reduce={{{tap.name!r}: "gap"}}, or give '
    raise UnknownSizeError(
        f"Tap {tap.name!r} has the shape {tap.shape}, with sizes that differ from batch to batch, "
        f"so that {type(layer).__name__} can't tell its number of features. "
        f"{instead or 'Give '}batches of one size, or leave it out with layers=[..., "
        f'"!{tap.name}"].'
    )


def _is_static(tap: Tap) -> bool:
    return tap.shape is not None and None not in tap.shape[1:]


def _data_format(tap: Tap) -> str | None:
    return getattr(tap.site.layer, "data_format", None)
