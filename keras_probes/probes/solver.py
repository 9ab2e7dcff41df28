r"""The optimal probe: multinomial logistic regression with an l2 penalty, and how near it came.

In: standardised features z, labels and weights of the training rows, in blocks. Out: W and b, with
a certificate.

**Problem.** n examples with features z_i in R^d, labels y_i among K classes and weights s_i >= 0
that sum to S; u_i = z_i W + b, p_i = softmax(u_i). Minimise over W in R^(d x K) and b in R^K

    F(W, b) = 1/S sum_i s_i (logsumexp(u_i) - u_i[y_i]) + l2/2 |W - A|^2

where A, the centre, is 0 unless there is an earlier probe to stay near. It is convex. With
R_i = s_i (p_i - e[y_i]) its gradients are

    dF/dW = G + l2 (W - A),   G = Z'R / S,      dF/db = r = 1'R / S.

**Certificate.** The Fenchel dual of F has a point for every prediction p' whose mean, class by
class, is the mean of the labels; its value is a lower bound of F everywhere (weak duality):

    1/S sum_i s_i entropy(p'_i) + <G', A> - |G'|^2 / (2 l2)  <=  F*,   G' = Z'(s (p' - e[y])) / S.

Where r = 0, p' = p will do, and the bound lies |dF/dW|^2 / (2 l2) below F(W, b). For r that is
small but not 0, p' = (1 - t) p + t q with one q for all rows mends the means; entropy is concave,
so that

    F* >= (1 - t) (loss - <G, W> - <r, b>) + <G', A> - |G'|^2 / (2 l2),
    G' = (1 - t) G + t (m q' - C),

since the mean entropy of p is loss - <G, W> - <r, b>. Here C = Z'(s e[y]) / S, m = Z's / S, t is
the least number for which q >= 0, and t q = t (mean of s e[y]) - (1 - t) r. The bound holds
whatever way the point was found.

**Tightness.** Alone, the bound at a point overstates its distance from the optimum by as much as
the curvature of F exceeds l2, a hundredfold where l2 is small. So the solver looks ahead: it goes
on from the point it will return, until the best lower bound it meets is close, compared to how far
F has fallen since. Both numbers are known, so that it knows how tight its certificate is.

**Method.** L-BFGS (Nocedal & Wright 2006, algorithm 7.4), whose initial inverse Hessian is that of
the mean softmax: with Z'SZ/S = Q diag(lam) Q', and U diag(theta) U' the mean of diag(p_i) - p_i
p_i', the Hessian is about lam x theta + l2 in the basis Q x U, times what the last step tells of
its size. Q serves all penalties; U is taken anew at every step. The pairs that L-BFGS keeps are of
the loss alone: with l2 times the step added to the change of the gradient they serve any penalty,
and go on from one fit of a path to the next, which saves a third of its passes. Tried and dropped:
Newton's method with conjugate gradients (as many passes, and the last ones to no use), the diagonal
of the mean softmax only (a third more).
"""

import collections
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import tensorflow as tf

# float32 (rows, d), int32 (rows,), float32 (rows,)
Block: TypeAlias = tuple[tf.Tensor, tf.Tensor, tf.Tensor]

MEMORY = 20  # pairs that L-BFGS keeps
LOOK_AHEAD = {"float32": 20, "float64": 100}  # steps at most, to tighten a certificate
SURE = 0.2  # the estimated distance is up to a few times too small
TIGHT = 6.0  # times the true gap that a certificate may be, as far as can be known
EIGENBASIS_UP_TO = 3000  # features; beyond, finding the basis costs more than it saves
_ARMIJO = 1e-4
_ROUNDING = {"float32": 3e-8, "float64": 1e-15}  # relative error of F


@dataclasses.dataclass(frozen=True)
class Fit:
    """A probe on standardised features, and how near it is to the optimum.

    Attributes:
        kernel: W, float64, shape (d, K).
        bias: b, float64, shape (K,).
        l2: The penalty.
        objective: F(W, b), in nats.
        gradient_norm: Euclidean norm of the gradient of F in W and b.
        certificate: Upper bound on F(W, b) - F*, in nats; NaN if none was asked for.
        iterations: Number of steps.
        converged: Whether the certificate is within the tolerance.
    """

    kernel: np.ndarray
    bias: np.ndarray
    l2: float
    objective: float
    gradient_norm: float
    certificate: float
    iterations: int
    converged: bool


@dataclasses.dataclass(frozen=True)
class _Point:
    """F and what comes of it at some W and b; the last row of `weights` and `gradient` is b's."""

    weights: np.ndarray  # (d + 1, K)
    away: np.ndarray  # (d, K): W - A
    loss: float
    gradient: np.ndarray  # (d + 1, K)
    softmax: np.ndarray  # (K, K): mean of diag(p) - p p'
    l2: float
    dtype: str  # of the products

    @property
    def objective(self) -> float:
        return self.loss + self.l2 / 2 * float(np.sum(self.away**2))

    @property
    def bound(self) -> float:
        """|dF/dW|^2 / (2 l2)."""
        return float(np.sum(self.gradient[:-1] ** 2)) / (2 * self.l2)

    @functools.cached_property
    def of_classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues theta, above 0, and eigenvectors U of the softmax matrix."""
        theta, vectors = np.linalg.eigh(self.softmax)
        return np.maximum(theta, 1e-8), vectors


class Problem:
    """The training rows of one tap and target.

    Args:
        blocks: Yields the rows, standardised, from the first on at every call.
        n_features: d.
        num_classes: K; each has a row.

    Attributes:
        centre: A, shape (d, K), 0 unless set otherwise.
        passes: How often the rows were read.
        pairs: Steps W and b took lately, and how the gradient of the loss changed along each.
    """

    def __init__(self, blocks: Callable[[], Iterable[Block]], n_features: int, num_classes: int):
        self.passes = 0
        self.pairs: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque(
            maxlen=MEMORY
        )
        self._blocks = blocks
        self._shape = (n_features + 1, num_classes)
        self.centre = np.zeros((n_features, num_classes))
        self._sum_of_squares()

    def of(self, blocks: Sequence[Block]) -> "Problem":
        """The same of some of the rows, which share the basis; there is no certificate for them."""
        part = copy.copy(self)
        part._blocks = lambda: blocks
        part.total = float(sum(np.sum(weights, dtype="float64") for _, _, weights in blocks))
        return part

    def _sum_of_squares(self) -> None:
        """One pass: the eigenbasis of Z'SZ/S, and what labels and features have in common."""
        d, classes = self._shape[0] - 1, self._shape[1]
        full = d <= EIGENBASIS_UP_TO
        gram = np.zeros((d, d) if full else d)
        in_common, counts = np.zeros((d, classes)), np.zeros(classes)
        for z, labels, weights in self._read():
            weighted = z * weights[:, None]
            if full:
                gram += tf.matmul(weighted, z, transpose_a=True).numpy()
            else:
                gram += tf.reduce_sum(weighted * z, axis=0).numpy()
            of_class = tf.one_hot(labels, classes) * weights[:, None]
            in_common += tf.matmul(z, of_class, transpose_a=True).numpy()
            counts += np.sum(of_class.numpy(), axis=0, dtype="float64")
        self.total = float(counts.sum())
        self.frequencies = counts / self.total
        self._in_common = in_common / self.total
        self._basis: tf.Tensor | None = None
        variances = gram / self.total
        if full:
            variances, basis = np.linalg.eigh(variances)
            self._basis = tf.constant(basis, tf.float32)
        self._variances = np.maximum(variances, 0.0)

    def start(self) -> np.ndarray:
        """W = 0 and the b that is best for it."""
        weights = np.zeros(self._shape)
        weights[-1] = np.log(self.frequencies)
        return weights

    def evaluate(self, weights: np.ndarray, l2: float, dtype: str = "float32") -> _Point:
        """One pass over the rows; products are of `dtype`, sums over blocks of float64."""
        kernel, bias = tf.constant(weights[:-1].T, dtype), tf.constant(weights[-1], dtype)
        loss, gradient = 0.0, np.zeros(self._shape)
        softmax = np.zeros(self._shape[1:] * 2)
        for z, labels, row_weights in self._read():
            sums = _sums(tf.cast(z, dtype), labels, tf.cast(row_weights, dtype), kernel, bias)
            loss += float(sums[0])
            gradient[:-1] += sums[1].numpy().T
            gradient[-1] += sums[2].numpy()
            softmax += sums[3].numpy()
        gradient /= self.total
        away = weights[:-1] - self.centre
        gradient[:-1] += l2 * away
        return _Point(weights, away, loss / self.total, gradient, softmax / self.total, l2, dtype)

    def learn(self, before: _Point, after: _Point) -> None:
        """Keeps what a step tells of the curvature of the loss."""
        step = after.weights - before.weights
        change = after.gradient - before.gradient
        change[:-1] -= before.l2 * step[:-1]
        if np.sum(step * change) > 0:  # as it is but for rounding
            self.pairs.append((step, change))

    def direction(self, point: _Point) -> np.ndarray:
        """The L-BFGS inverse Hessian times the gradient: two loops over the pairs."""
        direction = point.gradient.copy()
        shares = []
        for step, of_loss in reversed(self.pairs):
            change = of_loss.copy()
            change[:-1] += point.l2 * step[:-1]
            curvature = np.sum(step * change)
            share = np.sum(step * direction) / curvature
            direction -= share * change
            shares.append((step, change, curvature, share))
        direction = self._scaled(direction, point)
        if shares:  # by how much the lately seen curvature is above that of the mean softmax
            _, change, curvature, _ = shares[0]
            direction *= curvature / np.sum(change * self._scaled(change, point))
        for step, change, curvature, share in reversed(shares):
            direction += step * (share - np.sum(change * direction) / curvature)
        return direction

    def _scaled(self, gradient: np.ndarray, at: _Point) -> np.ndarray:
        """An approximate inverse Hessian at a point, times `gradient`, shape (d + 1, K)."""
        theta, classes = at.of_classes
        rotated = gradient @ classes
        scale = self._variances[:, None] * theta + at.l2
        if self._basis is None:
            rotated[:-1] /= scale
        else:
            rotated[:-1] = _rotated(self._basis, rotated[:-1], scale).numpy()
        rotated[-1] /= theta
        return rotated @ classes.T

    def precise(self, point: _Point) -> _Point:
        """The point in float64, with the best b for its W, so that r = 0 but for rounding."""
        for _ in range(3):  # a Newton step squares the error of b, which is small already
            weights = point.weights.copy()
            weights[-1] -= np.linalg.pinv(point.softmax, hermitian=True) @ point.gradient[-1]
            point = self.evaluate(weights, point.l2, "float64")
            if np.max(np.abs(point.gradient[-1])) <= 1e-2 * point.bound:
                break  # the error of b is no part of the bound
        return point

    def lower_bound(self, point: _Point) -> float:
        """A number that no F(W, b) is below: see the module's description."""
        kernel, bias = point.weights[:-1], point.weights[-1]
        by_kernel = point.gradient[:-1] - point.l2 * point.away
        by_bias = point.gradient[-1]
        entropy = point.loss - np.sum(by_kernel * kernel) - by_bias @ bias
        t = max(0.0, float(np.max(by_bias / np.maximum(self.frequencies + by_bias, 1e-300))))
        q = t * self.frequencies - (1 - t) * by_bias  # times t
        mean = self._in_common.sum(axis=1)
        mended = (1 - t) * by_kernel + np.outer(mean, q) - t * self._in_common
        bound = (1 - t) * entropy + np.sum(mended * self.centre)
        bound -= np.sum(mended**2) / (2 * point.l2)
        return max(float(bound), 0.0)  # neither part of F is below 0

    def _read(self) -> Iterable[Block]:
        self.passes += 1
        return self._blocks()


def fit_softmax(
    problem: Problem,
    l2: float,
    *,
    start: np.ndarray | None = None,
    tol: float = 1e-6,
    certify: bool = True,
    max_iterations: int = 500,
) -> Fit:
    """Minimises F.

    Args:
        problem: The training rows.
        l2: The penalty, more than 0.
        start: W over b, shape (d + 1, K), to begin at.
        tol: How far F may be above its optimum, in nats.
        certify: Whether to prove it. If not, the solver's own estimate of the distance decides.
        max_iterations: Number of steps after which to give up, those of looking ahead included.

    Returns:
        The `Fit`.
    """
    point = problem.evaluate(problem.start() if start is None else start, l2)
    found: _Point | None = None  # what to return, once it is near enough
    steps = iterations = ahead = 0
    certificate = math.nan
    while True:
        given_up = steps >= max_iterations
        direction = problem.direction(point)
        slope = float(np.sum(point.gradient * direction))
        # Half the slope is what a parabola of this curvature has left to fall.
        if found is None and (slope / 2 <= SURE * tol or given_up):
            found, ahead = point, 0
            if not certify:
                break
        at_end = given_up or (found is not None and found.objective <= tol)  # and F* >= 0
        if found is not None and (at_end or point.bound <= (TIGHT - 1) * _fallen(found, point)):
            if at_end or found.objective - point.objective + point.bound <= tol:
                found, certificate = _certified(problem, found, point)
            if certificate <= tol or given_up:
                break
            found, ahead = point, 0  # the estimate was too good; this one is nearer
        # A fall much below the rounding of F is no way on.
        sunk = slope / 2 <= 1e-2 * _ROUNDING[point.dtype] * abs(point.objective)
        following = None if sunk else _line_search(problem, point, direction, slope)
        if following is None or ahead == LOOK_AHEAD[point.dtype]:
            if point.dtype == "float64":  # rounding ends here for good
                found, certificate = _certified(problem, found or point, point)
                break
            # What float32 does not tell apart float64 does, at twice the time.
            following = problem.evaluate(point.weights, l2, "float64")
            found = found and problem.evaluate(found.weights, l2, "float64")
        else:
            problem.learn(point, following)
            steps += 1
            ahead += found is not None
            iterations += found is None
        point = following
    converged = certificate <= tol if certify else steps < max_iterations
    return Fit(
        kernel=found.weights[:-1],
        bias=found.weights[-1],
        l2=l2,
        objective=found.objective,
        gradient_norm=float(np.linalg.norm(found.gradient)),
        certificate=certificate,
        iterations=iterations,
        converged=converged,
    )


def _fallen(found: _Point, point: _Point) -> float:
    """How far F has fallen between two points, at least."""
    return found.objective - point.objective - _ROUNDING[point.dtype] * abs(point.objective)


def _certified(problem: Problem, found: _Point, ahead: _Point) -> tuple[_Point, float]:
    """How far `found` can be from the optimum, by the lower bound ahead of it; it in float64."""
    found = problem.evaluate(found.weights, found.l2, "float64")
    bound = problem.lower_bound(problem.precise(ahead))
    # F itself is known up to rounding, and no better is its distance from anything.
    return found, max(found.objective - bound, 0.0) + 1e-15 * abs(found.objective)


def _line_search(
    problem: Problem, point: _Point, direction: np.ndarray, slope: float
) -> _Point | None:
    """Backtracks to a point that is low enough; `None` if there is none.

    Where F no longer tells points apart for rounding, the slope does (Hager & Zhang 2005, section
    4, "approximate Wolfe").
    """
    step = 1.0
    for _ in range(20):
        tried = problem.evaluate(point.weights - step * direction, point.l2, point.dtype)
        rise = tried.objective - point.objective
        if rise <= -_ARMIJO * step * slope:
            return tried
        slope_there = float(np.sum(tried.gradient * direction))
        rounding = _ROUNDING[point.dtype] * abs(point.objective)
        if rise <= rounding and -slope_there <= (1 - 2 * _ARMIJO) * slope:
            return tried
        # Where the parabola through both slopes has its lowest point, within bounds.
        flatter = slope - slope_there
        step *= float(np.clip(slope / flatter, 0.1, 0.5)) if flatter > 0 else 0.5
    return None


# In TensorFlow, as the passes are: NumPy's threads keep spinning for a while, and slow them down.
def _rotated(basis: tf.Tensor, columns: np.ndarray, scale: np.ndarray) -> tf.Tensor:
    """Q ((Q' columns) / scale), float32."""
    turned = tf.matmul(basis, tf.constant(columns, tf.float32), transpose_a=True)
    return tf.matmul(basis, turned / tf.constant(scale, tf.float32))


@tf.function(reduce_retracing=True, autograph=False)
def _sums(
    z: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """What a block adds to the loss, Z'R (transposed), 1'R and the softmax matrix.

    Args:
        z: Shape (rows, d).
        labels: int32, shape (rows,).
        weights: Shape (rows,).
        kernel: W transposed, shape (K, d): products with it are the fastest that way round.
        bias: Shape (K,).
    """
    logits = tf.matmul(z, kernel, transpose_b=True) + bias
    is_label = tf.one_hot(labels, tf.shape(kernel)[0], dtype=z.dtype)
    # By hand: TensorFlow's cross-entropy would find the exponentials a second time.
    logits -= tf.reduce_max(logits, axis=1, keepdims=True)
    p = tf.exp(logits)
    total = tf.reduce_sum(p, axis=1, keepdims=True)
    p /= total
    losses = weights * (tf.math.log(total[:, 0]) - tf.reduce_sum(logits * is_label, axis=1))
    residual = weights[:, None] * (p - is_label)
    weighted = weights[:, None] * p
    softmax = tf.linalg.diag(tf.reduce_sum(weighted, 0)) - tf.matmul(weighted, p, transpose_a=True)
    return (
        tf.reduce_sum(tf.cast(losses, tf.float64)),
        tf.matmul(residual, z, transpose_a=True),
        tf.reduce_sum(residual, axis=0),
        softmax,
    )
