"""The optimizer of the probes: a copy of the user's, or Adam in one pass over memory.

In: what the user passed as `optimizer=`. Out: a Keras optimizer that nobody else uses.
"""

from typing import Any

import keras
import tensorflow as tf

LEARNING_RATE = 0.15  # of Adam, on features of length 1


@keras.saving.register_keras_serializable(package="keras_probes")
class OnePassAdam(keras.optimizers.Adam):
    """Keras's Adam, by the one operation that TensorFlow has for it.

    Where there are many classes, what a probe costs is the memory it moves: Keras spells the update
    out, and goes over weights and slots a dozen times.
    """

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Takes a step; arguments as of `keras.optimizers.Adam.apply`."""
        step = tf.cast(tf.convert_to_tensor(self.iterations) + 1, tf.float32)
        self._powers: Any = tf.pow(self.beta_1, step), tf.pow(self.beta_2, step)
        super().apply(grads, trainable_variables)
        self._powers = None  # they are of the graph that is being traced

    def update_step(
        self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor
    ) -> None:
        """Moves a variable; arguments as of `keras.optimizers.Adam.update_step`."""
        place = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[place].value.handle,
            v=self._velocities[place].value.handle,
            beta1_power=self._powers[0],
            beta2_power=self._powers[1],
            lr=tf.cast(learning_rate, variable.dtype),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=tf.cast(gradient, variable.dtype),
        )


def own_optimizer(
    optimizer: keras.optimizers.Optimizer | str | None,
) -> keras.optimizers.Optimizer:
    """Returns an optimizer for the probes alone: Adam by default, else a fresh copy.

    Raises:
        ValueError: It is neither an optimizer nor the name of one.
    """
    if optimizer is None:
        return OnePassAdam(LEARNING_RATE, name="probe_optimizer")
    config: dict[str, Any] = {"class_name": optimizer, "config": {}}
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
