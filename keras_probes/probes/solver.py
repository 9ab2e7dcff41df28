r"""The optimal probe: a generalised linear model with an l2 penalty, and how near it came.

In: standardised features z, labels and weights of examples, in blocks. Out: W and b, with a
certificate.

**Problem.** n examples with features z_i in R^d, labels y_i and weights s_i >= 0, whose terms of
the loss weigh S in all; u_i = z_i W + b in R^K. Minimise over W in R^(d x K) and b in R^K

    F(W, b) = 1/S sum_i s_i loss(u_i, y_i) + l2/2 (|W - A|^2 + |b - a|^2)

where the loss, which the task tells, is convex and nowhere below 0, such as the cross-entropy
logsumexp(u_i) - u_i[y_i]. The centre is A = 0, a = what a probe says that knows nothing of the
features, such as the log of the class frequencies. With R_i = s_i dloss/du_i the gradients are

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
the mean example: with Z'SZ/S near Q diag(lam) Q' + rest (I - QQ'), and theta_c the mean second
derivative of the loss in u_c, p_c (1 - p_c) of a softmax, the Hessian is about lam x theta + l2. Q
comes of a randomised sketch of rank `RANK` (Nystroem; Frangella, Tropp & Udell 2023), which costs a
few passes where all of Z'SZ would cost many, and needs as few steps. The pairs that L-BFGS keeps
are of the loss alone, so that they serve every penalty of a path. Tried and dropped: the whole
eigenbasis (as many passes, a hundred times the cost), Newton's method with conjugate gradients,
pairs kept from one epoch to the next.

Of numbers to predict, F is a quadratic, and its optimum is known in closed form for every penalty
once Z'SZ is taken apart into eigenvectors.

Several taps of one width are solved side by side, T of them: a pass over few features costs more
in calls than in products. All arrays have T as their first axis.
"""

import collections
import dataclasses

import numpy as np

from keras_probes.probes.problem import PAIRS, Problem

MIN_CURVATURE = 1e-7  # of a class; below, float32 can't tell
SAFETY = 0.2  # the estimated distance from the optimum is up to a few times too small
CHANCE = 2.0  # times the mean: by chance it is hardly ever more
MAX_BACKTRACKS = 20
LARGEST_GRAM = 4096  # features and a bias: least squares of more are descended on too
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
        # By how much the curvature lately seen is above that of the mean example.
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


def minimise(
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
    near = start if near is None else near
    moving = np.ones(problem.shape[0], bool) if only is None else only.copy()
    if problem.task.scaled and problem.shape[1] <= LARGEST_GRAM:
        return _solved(problem, l2, start, near, trust, tol, moving)
    descent = _Descent(problem, l2, start, near, trust)
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


def _solved(
    problem: Problem,
    l2: np.ndarray | float,
    start: np.ndarray,
    near: np.ndarray,
    trust: np.ndarray | float,
    tol: float,
    moving: np.ndarray,
) -> Fit:
    """The optimum of least squares in closed form; arguments as of `minimise`.

    With w = centre + v, F is mean loss of the centre - g'v + v'(H + l2)v / 2.
    """
    taps = problem.shape[:1]
    l2 = np.broadcast_to(np.asarray(l2, "float64"), taps)
    (values, vectors), gradient, of_centre = problem.quadratic
    centre = problem.guess()
    curvature = values[..., None] + l2[:, None, None]

    def turned(weights: np.ndarray) -> np.ndarray:
        return vectors.swapaxes(1, 2) @ (weights - centre)

    def objective(v: np.ndarray) -> np.ndarray:
        return of_centre + _inner(v, curvature * v / 2 - gradient)

    optimum, earlier = gradient / curvature, turned(near)
    began = objective(earlier)
    by_chance = problem.shape[1] * problem.shape[2] / problem.total
    trust = np.where(began - objective(optimum) <= CHANCE * by_chance, trust, 0.0)
    pull = trust[:, None, None]
    v = (optimum + pull * earlier) / (1 + pull)
    v = np.where(moving[:, None, None], v, turned(start))
    away = v - earlier
    left = curvature * v - gradient + pull * curvature * away
    reached = objective(v) + trust / 2 * _inner(away, curvature * away)
    above = _inner(left, left) / (2 * l2 * (1 + trust)) + _ERROR["float64"] * np.abs(reached)
    return Fit(
        weights=centre + vectors @ v,
        l2=l2,
        objective=reached,
        began=began,
        gradient_norm=np.sqrt(_inner(left, left)),
        certificate=above,
        lower=np.maximum(reached - above, 0.0),
        trust=trust,
        steps=moving.astype(int),
        converged=above <= tol,
    )


def _inner(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Inner products, probe by probe: shape (T,)."""
    return np.einsum("tdk,tdk->t", one, other)


def _chosen(taken: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.where(taken.reshape(-1, *[1] * (one.ndim - 1)), one, other)


def _arrays(point: _Point) -> list[np.ndarray]:
    return [getattr(point, field.name) for field in dataclasses.fields(point)]
