"""The examples that probes are fitted to, as a convex problem: its loss, gradient and curvature.

In: standardised features z, labels and weights of examples, in blocks. Out: what `solver` minimises
(which writes the problem out), pass by pass.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from keras_probes.probes.tasks.task import Task

# z: float32 (T, rows, d); labels: as the task has them, (rows, ...); weights: float32 (T, rows).
Block: TypeAlias = tuple[tf.Tensor, tf.Tensor, tf.Tensor]

PAIRS = 10  # that L-BFGS keeps
RANK = 32  # of the sketch of Z'SZ
EXACT = 64  # up to so many features it is no sketch
MIN_VARIANCE = 1e-6  # of the largest, in any direction


class Problem:
    """The examples that T probes are fitted to.

    Args:
        blocks: Yields the examples, standardised, from the first on whenever it is gone through.
        n_features: d.
        task: Tells the loss, and how many outputs K there are.
        like: A problem with nearly the same features, whose basis serves; else it costs a pass.

    Attributes:
        shape: (T, d + 1, K), of W over b.
        passes: How often the examples were read.
        total: S, shape (T,).
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        n_features: int,
        task: Task,
        like: "Problem | None" = None,
    ):
        self.task = task
        self.passes = 0
        self.pairs: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque(
            maxlen=PAIRS
        )
        self._blocks, self._like = blocks, like
        tallies = [task.tally(labels, weights).numpy() for _, labels, weights in blocks]
        self._tally = np.sum(tallies, axis=0)
        self.total = task.total(self._tally)
        self.shape = (len(self.total), n_features + 1, task.outputs)

    @functools.cached_property
    def basis(self) -> "Basis":
        """Where the features vary most."""
        return self._like.basis if self._like else Basis.of(self._read(), self.shape[1] - 1)

    @functools.cached_property
    def quadratic(self) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
        """The mean loss of numbers to predict, which is a quadratic, about the guess; in one pass.

        Returns:
            Eigenvalues and eigenvectors of the Hessian H = 1/S [z 1]'S[z 1], shape (T, d + 1) and
            (T, d + 1, d + 1); minus the gradient at the guess in these, (T, d + 1, K); and the mean
            loss there, shape (T,).
        """
        taps, width, outputs = self.shape
        hessian, gradient = np.zeros((taps, width, width)), np.zeros((taps, width, outputs))
        loss = np.zeros(taps)
        guess = tf.constant(self.guess()[:, -1:])
        for z, labels, weights in self._read():
            wide = tf.cast(tf.concat([z, tf.ones_like(z[..., :1])], axis=2), tf.float64)
            weighted = wide * tf.cast(weights, tf.float64)[..., None]
            away = self.task.residual(guess, labels)
            hessian += tf.matmul(weighted, wide, transpose_a=True).numpy()
            gradient -= tf.matmul(weighted, away, transpose_a=True).numpy()
            loss += tf.einsum("tn,tnk->t", weighted[..., -1], tf.square(away) / 2).numpy()
        total = self.total[:, None, None]
        values, vectors = eigh(hessian / total)
        turned = vectors.swapaxes(1, 2) @ (gradient / total)
        return (np.maximum(values, 0.0), vectors), turned, loss / self.total

    def of_examples(self, places: np.ndarray) -> "Problem":
        """The same of some examples alone; for a problem whose examples are one block."""
        ((z, labels, weights),) = self._blocks
        block = tf.gather(z, places, axis=1), tf.gather(labels, places)
        weights = tf.gather(weights, places, axis=1)
        return Problem([(*block, weights)], self.shape[1] - 1, self.task, self)

    def guess(self) -> np.ndarray:
        """What a probe says that knows nothing of the features: W = 0, and b of the labels."""
        weights = np.zeros(self.shape)
        weights[:, -1] = self.task.prior(self._tally)
        return weights

    def losses(
        self, weights: np.ndarray, dtype: str = "float32"
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One pass: the mean loss, its gradient and the curvature of each output.

        Args:
            weights: W over b, shape (T, d + 1, K).
            dtype: Of the products; sums over blocks are of float64.

        Returns:
            Arrays of shape (T,), (T, d + 1, K) and (T, K).
        """
        kernel = tf.constant(weights[:, :-1].swapaxes(1, 2), dtype)
        bias = tf.constant(weights[:, -1, :, None], dtype)
        loss, gradient = np.zeros(self.shape[0]), np.zeros(self.shape)
        curvature = np.zeros((self.shape[0], self.shape[2]))
        for z, labels, of_rows in self._read():
            given = (tf.cast(z, dtype), labels, tf.cast(of_rows, dtype), kernel, bias)
            sums = _sums(self.task, dtype)(*given)
            loss += sums[0].numpy()
            gradient[:, :-1] += sums[1].numpy().swapaxes(1, 2)
            gradient[:, -1] += sums[2].numpy()
            curvature += sums[3].numpy()
        total = self.total[:, None]
        return loss / self.total, gradient / total[..., None], curvature / total

    def _read(self) -> Iterable[Block]:
        self.passes += 1
        return self._blocks


@dataclasses.dataclass(frozen=True)
class Basis:
    """Where features vary most: Z'SZ/S is about Q diag(variances) Q' + rest (I - QQ').

    Attributes:
        vectors: Q, float32, shape (T, d, r).
        variances: Shape (T, r, 1).
        rest: Mean variance in all other directions, shape (T, 1, 1).
    """

    vectors: tf.Tensor
    variances: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(cls, blocks: Iterable[Block], features: int) -> "Basis":
        """Sketches Z'SZ/S in one pass; exact up to `EXACT` features."""
        rank = features if features <= EXACT else RANK
        probe = _drawn(features, rank)
        omega = tf.constant(probe, tf.float32)
        sketch, trace, total = np.zeros(()), np.zeros(()), np.zeros(())
        for z, _, weights in blocks:
            weighted = z * weights[..., None]
            sketch = sketch + tf.matmul(weighted, tf.matmul(z, omega), transpose_a=True).numpy()
            trace = trace + tf.reduce_sum(weighted * z, axis=(1, 2)).numpy()
            total = total + tf.reduce_sum(weights, axis=1).numpy()
        sketch = sketch / total[:, None, None]
        # Algorithm 16 of Martinsson & Tropp 2020: a small shift keeps the core positive.
        shift = 1e-6 * np.maximum(np.linalg.norm(sketch, axis=(1, 2)), 1e-30)[:, None, None]
        shifted = sketch + shift * probe
        core = np.einsum("ij,tik->tjk", probe, shifted)
        values, vectors = eigh((core + core.swapaxes(1, 2)) / 2)
        half = shifted @ (vectors / np.sqrt(np.maximum(values, shift[:, 0] * 1e-3)[:, None]))
        squares, turn = eigh(half.swapaxes(1, 2) @ half)
        squares = np.maximum(squares, 1e-30)[:, None]
        # Less than that float32 does not distinguish from nothing.
        least = MIN_VARIANCE * squares.max(axis=(1, 2), keepdims=True)
        variances = np.maximum(squares - shift, least)
        left = trace / total - variances.sum(axis=(1, 2))
        return cls(
            tf.constant(half @ turn / np.sqrt(squares), tf.float32),
            variances.swapaxes(1, 2),
            np.maximum((left / max(features - rank, 1))[:, None, None], least),
        )

    def product(self, step: np.ndarray, curvature: np.ndarray, l2: np.ndarray) -> np.ndarray:
        """The approximate Hessian times `step`.

        Args:
            step: Shape (T, d + 1, K).
            curvature: theta, shape (T, K).
            l2: Shape (T,).
        """
        return self._applied(lambda hessian: hessian, step, curvature, l2)

    def solution(self, gradient: np.ndarray, curvature: np.ndarray, l2: np.ndarray) -> np.ndarray:
        """Its inverse times `gradient`; arguments as of `product`."""
        return self._applied(np.reciprocal, gradient, curvature, l2)

    def _applied(
        self,
        function: Callable[[np.ndarray], np.ndarray],
        of: np.ndarray,
        curvature: np.ndarray,
        l2: np.ndarray,
    ) -> np.ndarray:
        """A function of the approximate Hessian, times `of`."""
        theta, l2 = curvature[:, None], l2[:, None, None]
        beside = function(self.rest * theta + l2)
        result = np.empty_like(of)
        result[:, :-1] = of[:, :-1] * beside
        inner = tf.matmul(self.vectors, tf.constant(of[:, :-1], tf.float32), transpose_a=True)
        within = inner.numpy() * (function(self.variances * theta + l2) - beside)
        result[:, :-1] += tf.matmul(self.vectors, tf.constant(within, tf.float32)).numpy()
        result[:, -1:] = of[:, -1:] * function(theta + l2)
        return result


def eigh(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors, by TensorFlow.

    The threads of NumPy's LAPACK wait for each other busily: where others compute too, as the host
    does, the small ones of here took a hundred times as long.
    """
    values, vectors = tf.linalg.eigh(tf.constant(symmetric))
    return values.numpy(), vectors.numpy()


@functools.cache
def _sums(
    task: Task, dtype: str
) -> Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]]:
    """What a block adds to the loss, Z'R (transposed), 1'R and the curvature.

    Returns:
        A compiled function of z, shape (T, rows, d); labels, as the task has them; weights, shape
        (T, rows); W transposed, shape (T, K, d); and b, shape (T, K, 1).
    """

    # Outputs before rows: products are the fastest that way round, and so are sums over outputs.
    def sums(
        z: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        losses, residual, curvature = task.losses(
            tf.matmul(kernel, z, transpose_b=True) + bias, labels
        )
        residual *= weights[:, None]
        return (
            tf.reduce_sum(tf.cast(weights * losses, tf.float64), axis=1),
            tf.matmul(residual, z),
            tf.reduce_sum(residual, axis=2),
            tf.matmul(curvature, weights[..., None])[..., 0],
        )

    # Compiled once for all sizes, and called without the search for the right trace.
    shapes = ((None,) * 3, (None, *task.label_shape), (None,) * 2, (None,) * 3, (None, None, 1))
    dtypes = (dtype, task.label_dtype, dtype, dtype, dtype)
    specs = [tf.TensorSpec(*spec) for spec in zip(shapes, dtypes, strict=True)]
    return tf.function(sums, autograph=False).get_concrete_function(*specs)


@functools.cache
def _drawn(features: int, rank: int) -> np.ndarray:
    """Orthonormal directions for a sketch, shape (features, rank)."""
    if rank == features:
        return np.eye(features)
    return np.linalg.qr(np.random.default_rng(0).normal(size=(features, rank)))[0]
