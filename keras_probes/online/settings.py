"""What the user asked for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_probes.taps.reduce import Reduce
from keras_probes.taps.select import Selector


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked for, as `LinearProbeCallback` takes it."""

    layers: Selector
    reduce: Reduce
    target: Any
    task: str | Mapping[str, str] | None
    num_classes: int | Mapping[str, int] | None
    optimizer: keras.optimizers.Optimizer | str | None
    metrics: tuple[str, ...]
    isolated: bool
    sample_weight: Callable[[Any, Any, Any], Any] | None
    every: int | str
    baselines: tuple[str, ...]
    seed: int
    refit: float
    model: Any = None
    unpack: int | Callable[[Any], Any] | None = None

    def described(self) -> dict[str, Any]:
        """What was asked for, as results keep it."""
        asked = {**vars(self), "mode": "isolated" if self.isolated else "shared"}
        del asked["isolated"]
        return {name: _described(value) for name, value in asked.items() if value not in (None, ())}

    def unpacking(self) -> Callable[[Any], tuple[Any, Any, Any]]:
        """What takes a batch apart, to (x, y, sample_weight)."""
        unpack, select = keras.utils.unpack_x_y_sample_weight, self.unpack
        if select is None:
            return unpack
        if callable(select):
            return lambda data: unpack(select(data))
        return lambda data: unpack(data[select])


def _described(value: Any) -> Any:
    """A setting as JSON and TensorBoard take it: objects and functions by name."""
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_described(of_key)}" for key, of_key in value.items())
    if isinstance(value, Sequence):
        return ", ".join(str(_described(item)) for item in value)
    if isinstance(value, keras.Operation):
        return f"{type(value).__name__} {value.name}"
    return getattr(value, "__qualname__", type(value).__name__)
