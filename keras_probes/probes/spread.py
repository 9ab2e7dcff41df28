"""By how much features are scaled before a probe sees them.

In: mean, variance and reach of each feature. Out: what to multiply it by. Both drivers ask here, so
that an l2 penalty means the same to either.

Dividing by the standard deviation alone blows up what hardly ever varies: a pixel lit in one image
of thousands is, where it is lit, a hundred deviations from its mean, and the error of the probe on
that image is its doing. So a feature is divided by its standard deviation or a fourth of its reach,
whichever is more. That leaves normally distributed features as they are, and no unit matters.
"""

import tensorflow as tf

LARGEST = 1e18  # of a feature that counts as finite: the square of more is none in float32
REACH = 4.0  # standardised features stay within it where the statistics were taken


def inverse_spread(
    mean: tf.Tensor, variance: tf.Tensor, reach: tf.Tensor, rounding: float
) -> tf.Tensor:
    """Returns what to multiply centred features by; 0 for those that do not vary.

    Args:
        mean: Mean of each feature, shape (..., n_features).
        variance: Its variance.
        reach: Its largest distance from the mean.
        rounding: Relative error of the statistics: variance below its square is none.
    """
    varies = variance > tf.square(rounding * mean) + 1e-30
    squared = tf.maximum(variance, tf.square(reach / REACH))
    return tf.where(varies, tf.math.rsqrt(tf.where(varies, squared, 1.0)), 0.0)
