"""The convex solver against scikit-learn, on features of a small CIFAR-10 network.

    python benchmarks/solver.py --data cifar10.npz

At five depths, with 1,000 random features and with global average pooling, both solve the same
problem on the same standardised features, to the same objective within 1e-6. scikit-learn gets the
loosest of several tolerances that gets it there, found beforehand and not timed. Also: what a path
of ten penalties costs, and the certificate beside the true gap, by SciPy in float64.
"""

import argparse
import time
import warnings

import keras
import numpy as np
import scipy.optimize
import tensorflow as tf
from keras import layers
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from keras_probes.offline.fit import PATH_TOL
from keras_probes.probes.path import PENALTIES
from keras_probes.probes.problem import Problem
from keras_probes.probes.solver import minimise
from keras_probes.probes.tasks import Classification

CLASSES = 10


def network(x, y):
    """A convnet with BatchNormalization, trained for a few epochs; features at five depths."""
    keras.utils.set_random_seed(0)
    h = inputs = keras.Input(x.shape[1:])
    depths = []
    for width, strides in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        h = layers.Conv2D(width, 3, strides, padding="same", use_bias=False)(h)
        h = layers.ReLU()(layers.BatchNormalization()(h))
        depths.append(h)
    outputs = layers.Dense(CLASSES, activation="softmax")(layers.GlobalAveragePooling2D()(h))
    model = keras.Model(inputs, outputs)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y, epochs=3, batch_size=64, verbose=0)
    return keras.Model(inputs, depths).predict(x, verbose=0)


def feature_sets(x, y):
    rng = np.random.default_rng(0)
    for depth, h in enumerate(network(x, y)):
        flat = h.reshape(len(h), -1)
        kept = rng.choice(flat.shape[1], min(1000, flat.shape[1]), replace=False)
        for name, features in (("random", flat[:, kept]), ("pooled", h.mean(axis=(1, 2)))):
            features = features.astype("float32")
            spread = features.std(axis=0)
            z = (features - features.mean(axis=0)) / np.where(spread > 1e-6, spread, np.inf)
            yield f"{name} {depth} ({z.shape[1]})", z


def objective(z, y, kernel, bias, l2):
    u = log_softmax(z.astype("float64") @ kernel + bias, axis=1)
    return -u[np.arange(len(y)), y].mean() + l2 / 2 * np.sum(kernel**2)


def optimum(z, y, start, l2, prior=None):
    """The optimum in float64, by SciPy, from where a solver ended.

    With a `prior`, shape (classes,), the bias is pulled to it, as ours is; without, it is free.
    """
    z, onehot = z.astype("float64"), np.eye(CLASSES)[y]
    pulled = np.append(np.ones(z.shape[1]), prior is not None)[:, None]
    centre = np.zeros(start.shape)
    centre[-1] = 0.0 if prior is None else prior

    def function(flat):
        w = flat.reshape(-1, CLASSES)
        u = z @ w[:-1] + w[-1]
        residual = (softmax(u, axis=1) - onehot) / len(y)
        value = -(log_softmax(u, axis=1) * onehot).sum(axis=1).mean()
        away = pulled * (w - centre)
        gradient = np.vstack([z.T @ residual, residual.sum(axis=0)]) + l2 * away
        return value + l2 / 2 * np.sum(away**2), gradient.ravel()

    options = {"maxiter": 400, "ftol": 0, "gtol": 1e-8, "maxcor": 50}
    return scipy.optimize.minimize(
        function, start.ravel(), jac=True, method="L-BFGS-B", options=options
    ).fun


def problem(z, y):
    block = tf.constant(z[None]), tf.constant(y, tf.int32), tf.ones((1, len(y)))
    return Problem([block], z.shape[1], Classification(CLASSES))


def ours(z, y, l2):
    return minimise(problem(z, y), l2)


def path(z, y):
    """Ten penalties, then the one in the middle to the end, as fit_probes does."""
    given, start = problem(z, y), None
    starts = {}
    ten = PENALTIES[:10]
    for l2 in ten:
        fit = minimise(given, l2, start=start, tol=PATH_TOL, certify=False)
        start = starts[l2] = fit.weights
    chosen = min(ten, key=lambda l2: abs(np.log(l2 / 1e-2)))
    return minimise(given, chosen, start=starts[chosen])


def theirs(z, y, l2, dtype, tol):
    model = LogisticRegression(C=1 / (len(y) * l2), tol=tol, max_iter=10_000)
    return model.fit(z.astype(dtype), y)


def loosest(z, y, l2, goal):
    """The cheapest settings that bring scikit-learn to the goal."""
    for dtype, tol in (*(("float32", t) for t in (1e-4, 3e-5, 1e-5)), ("float64", 1e-5)):
        model = theirs(z, y, l2, dtype, tol)
        reached = objective(z, y, model.coef_.T, model.intercept_, l2)
        if reached <= goal:
            break
    return (dtype, tol), reached


def timed(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="x_train and y_train, as Keras's .npz")
    parser.add_argument("--l2", type=float, default=1e-2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    with np.load(args.data) as data:
        x, y = data["x_train"] / np.float32(255), data["y_train"].ravel().astype(int)
    print(f"{len(x):,} rows, l2 {args.l2:g}; seconds are medians of {args.rounds} rounds")
    total = np.zeros(3)
    for name, z in feature_sets(x, y):
        fit = ours(z, y, args.l2)  # also compiles
        path(z, y)
        best = optimum(z, y, fit.weights[0], args.l2, problem(z, y).guess()[0, -1])
        gap, certificate = float(fit.objective[0]) - best, float(fit.certificate[0])
        free = optimum(z, y, fit.weights[0], args.l2)
        settings, reached = loosest(z, y, args.l2, free * (1 + 1e-6))
        seconds = np.median(
            [
                [timed(ours, z, y, args.l2), timed(theirs, z, y, args.l2, *settings),
                 timed(path, z, y)]
                for _ in range(args.rounds)
            ],
            axis=0,
        )  # fmt: skip
        total += seconds
        print(
            f"{name:>18}: ours {seconds[0]:6.2f} s, scikit-learn {seconds[1]:6.2f} s "
            f"({settings[0]}, tol {settings[1]:g}), ratio {seconds[1] / seconds[0]:5.1f}; "
            f"path {seconds[2] / seconds[0]:.2f} of one fit; objective {best:.7f}, "
            f"above it: ours {gap:.1e} (certificate {certificate:.1e}, "
            f"{certificate / max(gap, 1e-16):.1f} times), scikit-learn {reached - free:.1e}",
            flush=True,
        )
    print(f"in all: ratio {total[1] / total[0]:.1f}; a path {total[2] / total[0]:.2f} of one fit")


if __name__ == "__main__":
    main()
