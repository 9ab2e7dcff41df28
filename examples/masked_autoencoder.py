"""Pretraining by masking: which blocks of a transformer come to know the digit without a label?

A masked autoencoder sees 40% of the patches of an image and says what the others look like. Its
probes see whole images. With whom it is compared, `pretraining.py` says.
"""

import keras
import tensorflow as tf
from keras import layers
from pretraining import asked_for, beside_a_twin, two_alike

BATCH, PATCH, WIDTH, SEEN = 20, 7, 64, 0.4  # PATCH: pixels on a side


class Block(layers.Layer):
    """Self-attention and a feed-forward network, each with normalisation before."""

    def __init__(self, name: str):
        super().__init__(name=name)
        self.norms = [layers.LayerNormalization() for _ in range(2)]
        self.attention = layers.MultiHeadAttention(4, WIDTH // 4)
        self.wide, self.narrow = layers.Dense(4 * WIDTH, "relu"), layers.Dense(WIDTH)

    def call(self, h: tf.Tensor) -> tf.Tensor:
        normed = self.norms[0](h)
        h = h + self.attention(normed, normed)
        return h + self.narrow(self.wide(self.norms[1](h)))


class Positions(layers.Layer):
    """Adds what is learned of each place."""

    def build(self, shape: tuple) -> None:
        self.table = self.add_weight(shape[1:], keras.initializers.RandomNormal(stddev=1.0))

    def call(self, h: tf.Tensor) -> tf.Tensor:
        return h + self.table


class Encoder(keras.Model):
    """Three blocks over the patches of an image: all of them, or those at the places to keep."""

    def __init__(self) -> None:
        super().__init__(name="encoder")
        self.patches = layers.Conv2D(WIDTH, PATCH, PATCH, name="patches")
        self.tokens = layers.Reshape((-1, WIDTH), name="tokens")
        self.positions = Positions(name="positions")
        self.blocks = [Block(f"block{place}") for place in (1, 2, 3)]

    def call(self, images: tf.Tensor, keep: tf.Tensor | None = None) -> tf.Tensor:
        h = self.positions(self.tokens(self.patches(images)))
        if keep is not None:
            h = tf.gather(h, keep, batch_dims=1)
        for block in self.blocks:
            h = block(h)
        return h


class MaskedAutoencoder(keras.Model):
    """An encoder of some patches, and a decoder of the others."""

    def __init__(self, encoder: Encoder, channels: int, seed: int):
        super().__init__()
        self.encoder, self.draws = encoder, keras.random.SeedGenerator(seed)
        self.positions, self.decoder = Positions(), Block("decoder")
        self.pixels = layers.Dense(PATCH**2 * channels)
        self.unseen = self.add_weight((WIDTH,), name="unseen")
        self.mean_loss = keras.metrics.Mean("unseen_error")

    def error(self, images: tf.Tensor) -> tf.Tensor:
        """Mean squared error of the pixels that the encoder does not see."""
        true = keras.ops.image.extract_patches(images, PATCH, padding="valid")
        true = tf.reshape(true, (tf.shape(true)[0], -1, true.shape[-1]))
        n, places = tf.shape(true)[0], true.shape[1]
        order = tf.argsort(keras.random.uniform((n, places), seed=self.draws))
        seen, unseen = tf.split(order, [int(SEEN * places), -1], 1)
        h = self.encoder(images, keep=seen)
        h = tf.concat([h, tf.broadcast_to(self.unseen, (n, unseen.shape[1], WIDTH))], 1)
        h = tf.gather(h, tf.argsort(order), batch_dims=1)  # each at its place
        errors = tf.square(self.pixels(self.decoder(self.positions(h))) - true)
        return tf.reduce_mean(tf.gather(errors, unseen, batch_dims=1))

    def train_step(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """A step on images alone."""
        with tf.GradientTape() as tape:
            loss = self.error(images)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.mean_loss.update_state(loss)
        return {"unseen_error": self.mean_loss.result()}


def main() -> None:
    """Prints errors, and writes results and figure."""
    args, images = asked_for(__doc__, "masked_autoencoder_out", epochs=20)
    encoder, of_twin = two_alike(Encoder, images.x)
    host = MaskedAutoencoder(encoder, images.x.shape[-1], args.seed)
    host.compile(keras.optimizers.Adam(2e-3))
    classes = int(images.test[1].max()) + 1
    head = [layers.GlobalAveragePooling1D(), layers.Dense(classes, "softmax")]
    beside_a_twin(host, keras.Sequential([of_twin, *head]), "encoder/block?", images, BATCH, args)


if __name__ == "__main__":
    main()
