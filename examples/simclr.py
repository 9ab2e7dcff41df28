"""Pretraining by contrast: which layers come to know the digit without a label?

As in SimCLR, the outputs of two views of an image should be near each other, and far from those of
other images. With whom it is compared, `pretraining.py` says.
"""

import keras
import tensorflow as tf
from keras import layers
from pretraining import asked_for, beside_a_twin, two_alike

BATCH, TEMPERATURE = 200, 0.2


def build_encoder(shape: tuple[int, ...]) -> keras.Model:
    """Four convolutions, and the average of the last."""
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(32, 5, 2, padding="same", activation="relu", name="conv1"),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv2"),
            layers.Conv2D(64, 3, 2, padding="same", activation="relu", name="conv3"),
            layers.Conv2D(96, 3, padding="same", activation="relu", name="conv4"),
            layers.GlobalAveragePooling2D(name="average"),
        ],
        name="encoder",
    )


def build_views(seed: int) -> keras.Model:
    """Moves, turns, zooms and lights images at random, in training alone."""
    edge = {"fill_mode": "nearest"}
    return keras.Sequential(
        [
            layers.RandomTranslation(0.1, 0.1, **edge, seed=seed),
            layers.RandomRotation(0.05, **edge, seed=seed + 1),
            layers.RandomZoom((-0.3, 0.1), (-0.3, 0.1), **edge, seed=seed + 2),
            layers.RandomContrast(0.4, value_range=(0, 1), seed=seed + 3),
        ],
        name="views",
    )


class SimCLR(keras.Model):
    """An encoder and a projection that learn which two views are of one image."""

    def __init__(self, encoder: keras.Model, views: keras.Model):
        super().__init__()
        self.encoder, self.views = encoder, views
        self.projection = keras.Sequential([layers.Dense(128, "relu"), layers.Dense(64)])
        self.mean_loss = keras.metrics.Mean("contrast")

    def train_step(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        """A step on images alone."""
        with tf.GradientTape() as tape:
            both = tf.concat([self.views(x, training=True) for _ in range(2)], 0)
            loss = ntxent(self.projection(self.encoder(both, training=True)))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.mean_loss.update_state(loss)
        return {"contrast": self.mean_loss.result()}


def ntxent(outputs: tf.Tensor) -> tf.Tensor:
    """Cross-entropy of telling a row's other view, half of the rows away, from all other rows."""
    z = tf.math.l2_normalize(outputs, -1)
    rows = tf.shape(z)[0]
    alike = z @ tf.transpose(z) / TEMPERATURE
    alike = tf.linalg.set_diag(alike, tf.fill([rows], -1e9))  # nobody is one's own other view
    partner = tf.roll(tf.range(rows), rows // 2, 0)
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(partner, alike))


def main() -> None:
    """Prints errors, and writes results and figure."""
    args, images = asked_for(__doc__, "simclr_out", epochs=15)
    encoder, of_twin = two_alike(lambda: build_encoder(images.x.shape[1:]), images.x)
    host = SimCLR(encoder, build_views(args.seed))
    host.compile("adam")
    classes = int(images.test[1].max()) + 1
    twin = keras.Sequential([build_views(args.seed), of_twin, layers.Dense(classes, "softmax")])
    beside_a_twin(host, twin, "encoder/conv*", images, BATCH, args)


if __name__ == "__main__":
    main()
