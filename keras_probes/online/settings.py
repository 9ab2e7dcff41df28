"""What the user asked for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_probes.probes.resolve import named_targets
from keras_probes.taps.reduce import Reduce
from keras_probes.taps.select import Selector

_RIDING = ("mode", "every", "refit")  # what probes on data of their own do not know


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
    data: Any = None
    validation_data: Any = None
    every_epochs: int = 1
    every_steps: int | None = None

    def described(self) -> dict[str, Any]:
        """What was asked for, as results keep it."""
        asked = {**vars(self), "mode": "isolated" if self.isolated else "shared"}
        del asked["isolated"]
        for name in _RIDING if self.data is not None else ("every_epochs",):
            del asked[name]
        for name in ("data", "validation_data"):
            given = asked[name]
            names = ", ".join(given) if isinstance(given, Mapping) else type(given).__name__
            asked[name] = None if given is None else names
        return {name: _described(value) for name, value in asked.items() if value not in (None, ())}

    def of_set(self, name: str | None) -> "Settings":
        """What was asked of a set of examples: targets are named by it, alone or with their own."""
        if name is None:
            return self
        names = names_of_targets(name, self.target)

        def given(argument: Any) -> Any:
            if not isinstance(argument, Mapping):
                return argument
            return {of: argument[of] for of in names.values() if of in argument}

        return dataclasses.replace(
            self,
            target={names[own]: select for own, select in named_targets(self.target).items()},
            task=given(self.task),
            num_classes=given(self.num_classes),
        )

    def unpacking(self) -> Callable[[Any], tuple[Any, Any, Any]]:
        """What takes a batch apart, to (x, y, sample_weight)."""
        unpack, select = keras.utils.unpack_x_y_sample_weight, self.unpack
        if select is None:
            return unpack
        if callable(select):
            return lambda data: unpack(select(data))
        return lambda data: unpack(data[select])


def names_of_targets(of_set: str | None, target: Any) -> dict[str | None, str | None]:
    """What the targets of a set of examples are called, by their own names."""
    return {own: "_".join(filter(None, (of_set, own))) or None for own in named_targets(target)}


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
