"""Which model is probed, where that is not the one which is trained but a network within it.

In: a host and what the user asked for. Out: the model, and what the names of its taps begin with.
"""

from typing import Any

import keras
import tensorflow as tf

from keras_probes.taps.graph import has_call, input_spec_of
from keras_probes.taps.select import Selector


def probed_model(
    host: keras.Model, asked: Any, layers: Selector, x_spec: Any = None
) -> tuple[keras.Model, str]:
    """Finds the model to probe.

    Args:
        host: The model that is trained.
        asked: `None`, a model within the host, or a function of the host that returns it.
        layers: Where to look. Of a host without a `call`, names begin with that of the attribute
            which holds the inner network: `"encoder/*"`.
        x_spec: Structure of `tf.TensorSpec` of the x of the data, where it is known.

    Returns:
        The model, and a prefix for the names of its taps.

    Raises:
        TypeError: `asked` is no model and no function.
        ValueError: The host has no `call`, and it is not clear which network within it is meant.
    """
    if asked is not None:
        model = asked if isinstance(asked, keras.Model) else asked(host)
        if not isinstance(model, keras.Model):
            raise TypeError(
                "Expected `model` to be a Keras model, or a function of the trained model that "
                f"returns one. Received: {type(model).__name__}."
            )
        return model, ""
    if has_call(host):
        return host, ""
    inner = {name: part for name, part in vars(host).items() if isinstance(part, keras.Model)}
    named = layers if isinstance(layers, (list, tuple)) else [layers]
    begin = {part.lstrip("!").split("/")[0] for part in named if isinstance(part, str)}
    wanted = begin & inner.keys()
    if not wanted:
        wanted = {name for name, part in inner.items() if _takes(part, x_spec)}
    if len(wanted) != 1:
        raise ValueError(
            f"The model {host.name!r} has no `call`, so that there is no forward pass of its own "
            "to probe. Say which network within it is meant, by its layers, such as "
            f'layers="{next(iter(inner), "encoder")}/*", or with model=lambda m: m.encoder. There '
            f"are {', '.join(map(repr, inner)) or 'none in its attributes'}."
        )
    name = wanted.pop()
    return inner[name], f"{name}/"


def _takes(model: keras.Model, x_spec: Any) -> bool:
    """Whether a model is known to take inputs of this shape."""
    declared = tf.nest.flatten(input_spec_of(model))
    given = tf.nest.flatten(x_spec)
    return len(declared) == len(given) and all(
        isinstance(of, tf.TensorSpec)
        and isinstance(x, tf.TensorSpec)
        and of.shape.is_compatible_with(x.shape)
        for of, x in zip(declared, given, strict=True)
    )
