"""In how many directions features vary, against a singular value decomposition in float64."""

import numpy as np
import pytest
import tensorflow as tf

from keras_probes.probes.spectrum import Spectrum


def by_svd(x):
    singular = np.linalg.svd(x.astype("float64") - x.mean(axis=0), compute_uv=False)
    p = singular[singular > 1e-6] / singular.sum()
    held = np.cumsum(singular**2) / np.sum(singular**2)
    return np.exp(-np.sum(p * np.log(p))), np.flatnonzero(held >= 0.99)[0] + 1


@pytest.mark.parametrize(("n", "d"), [(500, 40), (60, 200), (100, 100)])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_it_is_that_of_the_singular_values(n, d, decay):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -decay
    x = (x @ np.linalg.qr(rng.normal(size=(d, d)))[0] + 5).astype("float32")
    found = Spectrum.of(tf.constant(x - x.mean(axis=0)))
    rank, directions = by_svd(x)
    assert found.rank == pytest.approx(rank, rel=3e-2)  # below 1e-3 of the largest is none
    assert found.directions == directions


def test_features_of_few_directions_and_of_none():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(300, 3)) @ np.linalg.qr(rng.normal(size=(20, 3)))[0].T
    found = Spectrum.of(tf.constant(flat - flat.mean(axis=0), tf.float32))
    assert found.rank == pytest.approx(3, abs=0.05)
    assert found.directions == 3
    assert Spectrum.of(tf.zeros((10, 4))) == Spectrum(0.0, 0)
    line = Spectrum.of(tf.constant(np.outer(np.linspace(-1, 1, 50), np.ones(8)), tf.float32))
    assert (line.rank, line.directions) == (pytest.approx(1.0, abs=1e-3), 1)
