"""The optimizer of the probes: a copy of the user's, or Adam.

In: what the user passed as `optimizer=`. Out: a Keras optimizer that nobody else uses.
"""

from typing import Any

import keras

LEARNING_RATE = 0.15  # on features of length 1


def own_optimizer(
    optimizer: keras.optimizers.Optimizer | str | None,
) -> keras.optimizers.Optimizer:
    """Returns an optimizer for the probes alone: Adam by default, else a fresh copy.

    One that is given by its name has the learning rate of the default.

    Raises:
        ValueError: It is neither an optimizer nor the name of one.
    """
    if optimizer is None:
        return keras.optimizers.Adam(LEARNING_RATE, name="probe_optimizer")
    # A name means the kind of steps; Keras's own rates are far too small for features of length 1.
    config: dict[str, Any] = {
        "class_name": optimizer,
        "config": {"learning_rate": LEARNING_RATE},
    }
    if isinstance(optimizer, keras.optimizers.Optimizer):
        config = keras.optimizers.serialize(optimizer)
    config["config"]["name"] = "probe_optimizer"  # a name of our own uses up no automatic one
    made = keras.optimizers.deserialize(config) if isinstance(config["class_name"], str) else None
    if not isinstance(made, keras.optimizers.Optimizer):
        raise ValueError(
            'Expected `optimizer` to be a Keras optimizer, its name such as "sgd", or None. '
            f"Received: optimizer={optimizer!r}."
        )
    return made
