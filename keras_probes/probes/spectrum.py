"""In how many directions features vary: the effective rank, and what holds nearly all variance.

In: centred features, or their second moments. Out: two numbers for a tap.

The effective rank is the exponential of the entropy of the singular values (Roy & Vetterli 2007),
as RankMe has it (Garrido et al. 2023); the number of directions that hold 99% of the variance is
what layer saturation is made of (Shenk et al. 2019). Neither can be more than the number of
examples or of features. No feature is scaled: both are of the features as the host made them.
"""

import dataclasses

import numpy as np
import tensorflow as tf

HELD = 0.99  # of the variance
MOST = 2048  # of both features and examples; of more examples, some are looked at
SPECTRUM = ("rank", "directions")  # what is measured of a tap's features, whatever the task


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """In how many directions the features of a tap vary.

    Attributes:
        rank: The effective rank, 1 at least; 0 of features that do not vary.
        directions: Number of directions that hold 99% of the variance.
    """

    rank: float
    directions: int

    @classmethod
    def of(cls, centred: tf.Tensor) -> "Spectrum":
        """Of centred features, float32, shape (n, n_features)."""
        if min(centred.shape) > MOST:
            centred = centred[:: -(-centred.shape[0] // MOST)]
        wide = centred.shape[1] > centred.shape[0]
        # Any size of the features does: neither number depends on it.
        unit = tf.math.divide_no_nan(centred, tf.reduce_max(tf.abs(centred)))
        products = tf.matmul(unit, unit, transpose_a=not wide, transpose_b=wide)
        return cls.of_moments(products.numpy())

    @classmethod
    def of_moments(cls, moments: np.ndarray) -> "Spectrum":
        """Of their second moments, shape (n_features, n_features), or products of examples."""
        largest = np.abs(moments).max()
        if not largest > 0:
            return cls(0.0, 0)
        # By TensorFlow, whose threads don't wait busily beside those of the host.
        values = tf.linalg.eigvalsh(tf.constant(moments / largest, tf.float32))
        values = values.numpy().astype("float64")[::-1]
        # Below that, float32 does not distinguish one from none.
        values = np.where(values > 1e-6 * len(values) ** 0.5 * values[0], values, 0.0)
        shares = np.sqrt(values[values > 0])
        shares /= shares.sum()
        held = np.cumsum(values) / values.sum()
        return cls(
            float(np.exp(-np.sum(shares * np.log(shares)))), int(np.argmax(held >= HELD)) + 1
        )
