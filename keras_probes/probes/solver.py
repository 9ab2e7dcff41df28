r"""The optimal probe: multinomial logistic regression with an l2 penalty, and how near it came.

In: standardised features z, labels and weights of examples, in blocks. Out: W and b, with a
certificate.

**Problem.** n examples with features z_i in R^d, labels y_i among K classes and weights s_i >= 0
that sum to S; u_i = z_i W + b, p_i = softmax(u_i). Minimise over W in R^(d x K) and b in R^K

    F(W, b) = 1/S sum_i s_i (logsumexp(u_i) - u_i[y_i]) + l2/2 (|W - A|^2 + |b - a|^2)

where the centre is A = 0, a = the log of the class frequencies: what a probe says that knows
nothing of the features. With R_i = s_i (p_i - e[y_i]) the gradients are

    dF/dW = Z'R / S + l2 (W - A),   dF/db = 1'R / S + l2 (b - a).

An earlier probe v, the optimum for other examples, may stand in for these: as `trust` times a
problem like this one, to second order. That adds trust/2 (w - v)' (H + l2) (w - v) to F, where w is
W and b, and H the Hessian of the loss at v as "Method" approximates it. It does so only while v is
not much farther above the optimum than the optimum of n other examples is by chance: (d + 1) K / n
nats in the mean (Wilks 1938). Beyond `CHANCE` times that, the features have become others.

**Certificate.** F is strongly convex, so that at any point (Nesterov 2004, equation 2.1.19)

    F - (|dF/dW|^2 + |dF/db|^2) / (2 l2 (1 + trust))  <=  F*.

The best such lower bound of all points visited, and 0, bounds how far F is above its optimum.

**Method.** L-BFGS (Nocedal & Wright 2006, algorithm 7.4). Its initial inverse Hessian is that of
the mean softmax: with Z'SZ/S near Q diag(lam) Q' + rest (I - QQ'), and theta_c the mean of
p_c (1 - p_c), the Hessian is about lam x theta + l2. Q comes of a randomised sketch of rank `RANK`
(Nystroem; Frangella, Tropp & Udell 2023), which costs a few passes where all of Z'SZ would cost
many, and needs as few steps. The pairs that L-BFGS keeps are of the loss alone, so that they serve
every penalty of a path. Tried and dropped: the whole eigenbasis (as many passes, a hundred times
the cost), Newton's method with conjugate gradients, pairs kept from one epoch to the next.

Several taps of one width are solved side by side, T of them: a pass over few features costs more
in calls than in products. All arrays have T as their first axis.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
import tensorflow as tf

# z: float32 (T, rows, d); labels: int32 (rows,); weights: float32 (T, rows).
Block: TypeAlias = tuple[tf.Tensor, tf.Tensor, tf.Tensor]

PAIRS = 10  # that L-BFGS keeps
RANK = 32  # of the sketch of Z'SZ
EXACT = 64  # up to so many features it is no sketch
SMOOTHING = 0.5  # examples more of each class: the log of none is nothing to pull to
MIN_VARIANCE = 1e-6  # of the largest, in any direction
MIN_CURVATURE = 1e-7  # of a class; below, float32 can't tell
SAFETY = 0.2  # the estimated distance from the optimum is up to a few times too small
CHANCE = 2.0  # times the mean: by chance it is hardly ever more
MAX_BACKTRACKS = 20
_ARMIJO = 1e-4
_ROUNDING = {"float32": 3e-8, "float64": 1e-15}  # relative error of F from point to point
_ERROR = {"float32": 1e-7, "float64": 1e-15}  # relative error of F at most


@dataclasses.dataclass(frozen=True)
class Fit:
    """Probes on standardised features, and how near they are to their optima.

    Attributes:
        weights: W over b, float64, shape (T, d + 1, K).
        l2: The penalties, shape (T,).
        objective: F, in nats, shape (T,).
        began: F of the earlier probes, or at the start if there are none, likewise.
        gradient_norm: Euclidean norm of the gradient of F in W and b, shape (T,).
        certificate: Upper bound on F - F*, in nats, shape (T,).
        lower: Lower bound on F*, in nats, shape (T,).
        trust: How much earlier probes counted, shape (T,); 0 where they stood for nothing.
        steps: Number of steps, shape (T,).
        converged: Whether the tolerance was reached, shape (T,).
    """

    weights: np.ndarray
    l2: np.ndarray
    objective: np.ndarray
    began: np.ndarray
    gradient_norm: np.ndarray
    certificate: np.ndarray
    lower: np.ndarray
    trust: np.ndarray
    steps: np.ndarray
    converged: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Point:
    """F and what comes of it at some weights; each of T probes has its own."""

    weights: np.ndarray  # (T, d + 1, K)
    loss: np.ndarray  # (T,)
    of_loss: np.ndarray  # (T, d + 1, K): gradient of the loss
    curvature: np.ndarray  # (T, K): theta
    penalty: np.ndarray  # (T,)
    gradient: np.ndarray  # (T, d + 1, K): of F

    @property
    def objective(self) -> np.ndarray:
        return self.loss + self.penalty

    def where(self, taken: np.ndarray, other: "_Point") -> "_Point":
        """This point for the probes that are `taken`, `other` for the rest."""
        return _Point(
            *(_chosen(taken, *of) for of in zip(_arrays(self), _arrays(other), strict=True))
        )


class Problem:
    """The examples that T probes are fitted to.

    Args:
        blocks: Yields the examples, standardised, from the first on whenever it is gone through.
        shape: (T, d, K).
        basis: Of a problem with nearly the same features; by default it costs a pass.

    Attributes:
        passes: How often the examples were read.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        shape: tuple[int, int, int],
        basis: "Basis | None" = None,
    ):
        taps, features, classes = shape
        self.shape = (taps, features + 1, classes)
        self.passes = 0
        self.pairs: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque(
            maxlen=PAIRS
        )
        self._blocks = blocks
        self._counts = np.full((taps, classes), SMOOTHING)
        for _, labels, weights in blocks:
            of_class = tf.one_hot(labels, classes, dtype=tf.float64)
            self._counts += tf.matmul(tf.cast(weights, tf.float64), of_class).numpy()
        self.total = self._counts.sum(axis=1) - classes * SMOOTHING
        self.basis = basis or Basis.of(self._read(), features, self.total)

    def of_examples(self, places: np.ndarray) -> "Problem":
        """The same of some examples alone; for a problem whose examples are one block."""
        ((z, labels, weights),) = self._blocks
        block = tf.gather(z, places, axis=1), tf.gather(labels, places)
        taps, width, classes = self.shape
        weights = tf.gather(weights, places, axis=1)
        return Problem([(*block, weights)], (taps, width - 1, classes), self.basis)

    def guess(self) -> np.ndarray:
        """What a probe says that knows nothing of the features: W = 0, b the log frequencies."""
        weights = np.zeros(self.shape)
        weights[:, -1] = np.log(self._counts / self._counts.sum(axis=1, keepdims=True))
        return weights

    def losses(
        self, weights: np.ndarray, dtype: str = "float32"
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One pass: mean cross-entropy, its gradient and the curvature of each class.

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
            sums = _sums(dtype)(tf.cast(z, dtype), labels, tf.cast(of_rows, dtype), kernel, bias)
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
    def of(cls, blocks: Iterable[Block], features: int, total: np.ndarray) -> "Basis":
        """Sketches Z'SZ/S in one pass; exact up to `EXACT` features."""
        rank = features if features <= EXACT else RANK
        probe = _drawn(features, rank)
        omega = tf.constant(probe, tf.float32)
        sketch, trace = np.zeros((len(total), features, rank)), np.zeros(len(total))
        for z, _, weights in blocks:
            weighted = z * weights[..., None]
            sketch += tf.matmul(weighted, tf.matmul(z, omega), transpose_a=True).numpy()
            trace += tf.reduce_sum(weighted * z, axis=(1, 2)).numpy()
        sketch /= total[:, None, None]
        # Algorithm 16 of Martinsson & Tropp 2020: a small shift keeps the core positive.
        shift = 1e-6 * np.maximum(np.linalg.norm(sketch, axis=(1, 2)), 1e-30)[:, None, None]
        shifted = sketch + shift * probe
        core = np.einsum("ij,tik->tjk", probe, shifted)
        values, vectors = _eigh((core + core.swapaxes(1, 2)) / 2)
        half = shifted @ (vectors / np.sqrt(np.maximum(values, shift[:, 0] * 1e-3)[:, None]))
        squares, turn = _eigh(half.swapaxes(1, 2) @ half)
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


class _Descent:
    """L-BFGS on T objectives, side by side: each has its own direction and step length.

    Args:
        problem: The examples.
        l2: The penalties, shape (T,) or one for all.
        start: W over b to begin at, shape (T, d + 1, K).
        near: Earlier probes, likewise.
        trust: How many times the problem they stand for counts, shape (T,) or one for all.
    """

    def __init__(
        self,
        problem: Problem,
        l2: np.ndarray | float,
        start: np.ndarray,
        near: np.ndarray,
        trust: np.ndarray | float,
    ):
        taps = problem.shape[:1]
        self.l2 = np.broadcast_to(np.asarray(l2, "float64"), taps)
        self.dtype = "float32"
        self._problem, self._near = problem, near
        self._centre = problem.guess()
        self._scale = np.ones(taps)  # of the basis, as the last step found it
        self._l2_near, self._curvature_near = np.zeros(taps), np.zeros((*taps, problem.shape[2]))
        self.point = self._at(near)
        self.began, gradient = self.point.objective, self.point.gradient
        above = _inner(gradient, self._preconditioned(gradient, self.point)) / 2
        by_chance = problem.shape[1] * problem.shape[2] / problem.total
        self.trust = np.where(above <= CHANCE * by_chance, trust, 0.0)
        self._l2_near = self.trust * self.l2
        self._curvature_near = self.trust[:, None] * self.point.curvature
        self._pairs: collections.deque[tuple[np.ndarray, np.ndarray, np.ndarray]] = (
            collections.deque(maxlen=PAIRS)
        )
        for pair in problem.pairs:
            self._remember(*pair)
        self.point = self.point if start is near else self._at(start)
        self.lower = self._lower_bound(self.point)
        self.steps, self._backtracks = np.zeros(taps, int), np.zeros(taps, int)
        self._length, self._taken = np.ones(taps), np.ones(taps, bool)
        self._direction = np.zeros(problem.shape)

    def aim(self, moving: np.ndarray) -> None:
        """Finds the directions of the next step, where the last was taken."""
        if (moving & self._taken).any():
            self._direction = _chosen(self._taken, self._towards_optimum(), self._direction)
        self._slope = _inner(self.point.gradient, self._direction)

    def certificate(self) -> np.ndarray:
        """How far F can be above its optimum: bounds, shape (T,)."""
        return np.maximum(self.point.objective * (1 + _ERROR[self.dtype]) - self.lower, 0.0)

    def left(self) -> np.ndarray:
        """An estimate of how far F is above its optimum: what a parabola has left to fall."""
        return self._slope / 2

    def stuck(self) -> np.ndarray:
        """Which of the probes can go no further: what is left is much below the rounding of F."""
        return (self.left() <= 1e-2 * self._rounding()) | (self._backtracks >= MAX_BACKTRACKS)

    def step(self, advance: np.ndarray) -> None:
        """Takes a step, or a shorter one the next time; those that do not advance stay."""
        point, slope = self.point, self._slope
        tried = self._at(point.weights - (advance * self._length)[:, None, None] * self._direction)
        slope_there = _inner(tried.gradient, self._direction)
        rise = tried.objective - point.objective
        # Where F no longer distinguishes points for rounding, the slope does (Hager & Zhang 2005,
        # section 4, "approximate Wolfe").
        fallen = rise <= -_ARMIJO * self._length * slope
        flat = (rise <= self._rounding()) & (-slope_there <= (1 - 2 * _ARMIJO) * slope)
        taken = advance & (fallen | flat)
        bound = np.maximum(self.lower, self._lower_bound(tried))
        self.lower = np.where(advance, bound, self.lower)
        if taken.any():
            self._learn(tried, taken)
            self.point = tried.where(taken, point)
        # Where the parabola through both slopes has its lowest point, within bounds.
        flatter = slope - slope_there
        shrunk = np.where(flatter > 0, slope / np.where(flatter > 0, flatter, 1.0), 0.5)
        self._length = np.where(taken, 1.0, self._length * np.clip(shrunk, 0.1, 0.5))
        self._backtracks = np.where(taken, 0, self._backtracks + advance)
        self._taken = taken
        self.steps += taken

    def use_float64(self) -> None:
        """Goes on with what float32 does not distinguish, at twice the time of a pass."""
        self.dtype = "float64"
        self.point = self._at(self.point.weights)
        self._length, self._taken = np.ones_like(self._length), np.ones_like(self._taken)
        self._backtracks = np.zeros_like(self._backtracks)

    def _at(self, weights: np.ndarray) -> _Point:
        """F at some weights: one pass."""
        loss, of_loss, curvature = self._problem.losses(weights, self.dtype)
        away = weights - self._centre
        penalty = self.l2 / 2 * _inner(away, away)
        gradient = of_loss + self.l2[:, None, None] * away
        if self._l2_near.any():
            far = weights - self._near
            pull = self._pull(far)
            penalty, gradient = penalty + _inner(far, pull) / 2, gradient + pull
        return _Point(
            weights, loss, of_loss, np.maximum(curvature, MIN_CURVATURE), penalty, gradient
        )

    def _lower_bound(self, point: _Point) -> np.ndarray:
        """A number that F is nowhere below, by what is known at a point."""
        below = _inner(point.gradient, point.gradient) / (2 * (self.l2 + self._l2_near))
        # F is known up to rounding. Neither part of it is below 0.
        return np.maximum(point.objective * (1 - _ERROR[self.dtype]) - below, 0.0)

    def _rounding(self) -> np.ndarray:
        return _ROUNDING[self.dtype] * np.abs(self.point.objective)

    def _learn(self, after: _Point, taken: np.ndarray) -> None:
        """Keeps what a step tells of the curvature of the loss; nothing of those not taken."""
        before = self.point
        step, change = after.weights - before.weights, after.of_loss - before.of_loss
        valid = taken & (_inner(step, change) > 0)  # as it is but for rounding
        keep = valid[:, None, None]
        self._problem.pairs.append((step * keep, change * keep))
        step, change, inverse = self._remember(*self._problem.pairs[-1])
        # By how much the curvature lately seen is above that of the mean softmax.
        along = _inner(change, self._preconditioned(change, after))
        ratio = 1 / np.where(inverse * along > 0, inverse * along, 1.0)
        self._scale = np.where(inverse * along > 0, ratio, self._scale)

    def _remember(
        self, step: np.ndarray, of_loss: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Keeps a pair, with the change of F's gradient along it for that of the loss's."""
        change = of_loss + self.l2[:, None, None] * step
        if self._l2_near.any():
            change += self._pull(step)
        along = _inner(step, change)
        inverse = np.where(along > 0, 1 / np.where(along > 0, along, 1.0), 0.0)
        self._pairs.append((step, change, inverse))
        return self._pairs[-1]

    def _towards_optimum(self) -> np.ndarray:
        """The L-BFGS inverse Hessian times the gradient: two loops over the pairs."""
        direction = self.point.gradient.copy()
        shares = []
        for step, change, inverse in reversed(self._pairs):
            shares.append(inverse * _inner(step, direction))
            direction -= shares[-1][:, None, None] * change
        direction = self._preconditioned(direction, self.point) * self._scale[:, None, None]
        for (step, change, inverse), share in zip(self._pairs, reversed(shares), strict=True):
            back = share - inverse * _inner(change, direction)
            direction += back[:, None, None] * step
        return direction

    def _pull(self, far: np.ndarray) -> np.ndarray:
        """The gradient of what the earlier probes stand for, so far from them."""
        return self._problem.basis.product(far, self._curvature_near, self._l2_near)

    def _preconditioned(self, gradient: np.ndarray, point: _Point) -> np.ndarray:
        """The basis's inverse Hessian at a point, times `gradient`."""
        curvature = point.curvature + self._curvature_near
        return self._problem.basis.solution(gradient, curvature, self.l2 + self._l2_near)


def fit_softmax(
    problem: Problem,
    l2: np.ndarray | float,
    *,
    start: np.ndarray | None = None,
    near: np.ndarray | None = None,
    trust: np.ndarray | float = 0.0,
    tol: float = 1e-6,
    certify: bool = True,
    max_passes: int = 500,
    only: np.ndarray | None = None,
) -> Fit:
    """Minimises F for each of T probes.

    Args:
        problem: The examples.
        l2: The penalties, more than 0, shape (T,) or one for all.
        start: W over b, shape (T, d + 1, K), to begin at; by default what guessing says.
        near: Earlier probes that stand in for other examples, likewise.
        trust: How many times as much as the examples that are here, shape (T,) or one for all.
        tol: How far F may be above its optimum, in nats.
        certify: Whether to go on until that is proved. If not, the solver's own estimate decides.
        max_passes: Number of passes over the examples after which to give up.
        only: Which of the probes to move, shape (T,); all by default.

    Returns:
        The `Fit`.
    """
    last = problem.passes + max_passes
    start = problem.guess() if start is None else start
    descent = _Descent(problem, l2, start, start if near is None else near, trust)
    moving = np.ones(problem.shape[0], bool) if only is None else only.copy()
    while True:
        descent.aim(moving)
        at_optimum = descent.certificate() <= tol if certify else descent.left() <= SAFETY * tol
        moving &= ~at_optimum
        if problem.passes >= last or not moving.any():
            break
        advance = moving & ~descent.stuck()
        if advance.any():
            descent.step(advance)
        elif certify and descent.dtype == "float32":
            descent.use_float64()
        else:
            break
    point = descent.point
    return Fit(
        weights=point.weights,
        l2=descent.l2,
        objective=point.objective,
        began=descent.began,
        gradient_norm=np.sqrt(_inner(point.gradient, point.gradient)),
        certificate=descent.certificate(),
        lower=descent.lower,
        trust=descent.trust,
        steps=descent.steps,
        converged=at_optimum,
    )


def _eigh(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors, by TensorFlow.

    The threads of NumPy's LAPACK wait for each other busily: where others compute too, as the host
    does, the small ones of here took a hundred times as long.
    """
    values, vectors = tf.linalg.eigh(tf.constant(symmetric))
    return values.numpy(), vectors.numpy()


def _inner(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Inner products, probe by probe: shape (T,)."""
    return np.einsum("tdk,tdk->t", one, other)


def _chosen(taken: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.where(taken.reshape(-1, *[1] * (one.ndim - 1)), one, other)


def _arrays(point: _Point) -> list[np.ndarray]:
    return [getattr(point, field.name) for field in dataclasses.fields(point)]


@functools.cache
def _sums(dtype: str) -> Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]]:
    """What a block adds to the loss, Z'R (transposed), 1'R and the curvature.

    Returns:
        A compiled function of z, shape (T, rows, d); labels, int32, shape (rows,); weights, shape
        (T, rows); W transposed, shape (T, K, d); and b, shape (T, K, 1).
    """

    # Classes before rows: products are the fastest that way round, and so are sums over classes.
    def sums(
        z: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        logits = tf.matmul(kernel, z, transpose_b=True) + bias
        is_label = tf.one_hot(labels, tf.shape(kernel)[1], axis=0, dtype=z.dtype)
        # By hand: TensorFlow's cross-entropy would find the exponentials a second time.
        logits -= tf.reduce_max(logits, axis=1, keepdims=True)
        p = tf.exp(logits)
        total = tf.reduce_sum(p, axis=1, keepdims=True)
        p /= total
        of_label = tf.reduce_sum(logits * is_label, axis=1)
        losses = weights * (tf.math.log(total[:, 0]) - of_label)
        weighted = weights[:, None] * p
        residual = weighted - weights[:, None] * is_label
        return (
            tf.reduce_sum(tf.cast(losses, tf.float64), axis=1),
            tf.matmul(residual, z),
            tf.reduce_sum(residual, axis=2),
            tf.reduce_sum(weighted - weighted * p, axis=2),
        )

    # Compiled once for all sizes, and called without the search for the right trace.
    shapes = ((None,) * 3, (None,), (None,) * 2, (None,) * 3, (None, None, 1))
    dtypes = (dtype, "int32", dtype, dtype, dtype)
    specs = [tf.TensorSpec(*spec) for spec in zip(shapes, dtypes, strict=True)]
    return tf.function(sums, autograph=False).get_concrete_function(*specs)


@functools.cache
def _drawn(features: int, rank: int) -> np.ndarray:
    """Orthonormal directions for a sketch, shape (features, rank)."""
    if rank == features:
        return np.eye(features)
    return np.linalg.qr(np.random.default_rng(0).normal(size=(features, rank)))[0]
