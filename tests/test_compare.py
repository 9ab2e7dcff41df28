"""Two layers compared, against statsmodels, SciPy and probes read by hand."""

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from hosts import dense_net
from made import results_of
from statsmodels.stats.contingency_tables import mcnemar

from keras_probes import LinearProbeCallback, ProbeResults, extract_features, fit_probes
from keras_probes.probes.probe_set import pair_moments
from keras_probes.results.compare import INDEPENDENT, MCNEMAR, PAIRED_T
from keras_probes.results.schema import Pairs


def compared(errors, counted=None):
    """Results of two taps from the errors of examples, shape (2, n)."""
    counted = np.ones(errors.shape) if counted is None else counted
    means = np.sum(errors * counted, axis=1) / counted.sum(axis=1)
    results = results_of(dict(zip("ab", means, strict=True)), n=errors.shape[1])
    moments = pair_moments(tf.constant(errors, tf.float32), tf.constant(counted, tf.float32))
    results.pairs[None, None, "validation"] = Pairs(0, ("a", "b"), moments.numpy())
    return results


@pytest.mark.parametrize("seed", range(4))
def test_classes_by_mcnemars_exact_test(seed):
    rng = np.random.default_rng(seed)
    hard = rng.uniform(size=400)
    wrong = np.array([hard + rng.normal(0, 0.1, 400) > at for at in (0.7, 0.74)])
    found = compared(wrong).compare("a", "b")
    table = [[np.sum(a & b) for b in (wrong[1], ~wrong[1])] for a in (wrong[0], ~wrong[0])]
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert found.difference == pytest.approx(wrong[0].mean() - wrong[1].mean())
    assert found.ci_low < found.difference < found.ci_high
    assert (found.test, found.n) == (MCNEMAR, 400)
    back = compared(wrong).compare("b", "a")
    assert (back.difference, back.p) == (pytest.approx(-found.difference), pytest.approx(found.p))
    assert "McNemar" in str(found)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        both, one, other = rng.multinomial(300, [0.2, 0.06, 0.02, 0.72])[:3]
        wrong = np.zeros((2, 300))
        wrong[:, :both] = wrong[0, both : both + one] = 1
        wrong[1, both + one : both + one + other] = 1
        found = compared(wrong).compare("a", "b")
        inside += found.ci_low <= 0.04 <= found.ci_high
    assert 0.93 <= inside / 400 <= 0.98


def test_other_errors_by_a_paired_t_test():
    rng = np.random.default_rng(0)
    hard = rng.exponential(size=300)
    errors = np.array([hard + rng.normal(0, 0.1, 300) ** 2, hard]) * 0.3
    found = compared(errors).compare("a", "b")
    expected = scipy.stats.ttest_rel(*errors)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-3)
    assert found.p_above == pytest.approx(expected.pvalue / 2, rel=1e-3)
    interval = expected.confidence_interval()
    assert (found.ci_low, found.ci_high) == pytest.approx((interval.low, interval.high), rel=1e-3)
    assert found.test == PAIRED_T


def test_only_examples_that_both_have_count():
    rng = np.random.default_rng(0)
    wrong, counted = rng.uniform(size=(2, 200)) < 0.3, rng.uniform(size=(2, 200)) < 0.8
    found = compared(wrong * 1.0, counted * 1.0).compare("a", "b")
    both = counted.all(axis=0)
    a, b = wrong[:, both]
    assert found.n == both.sum()
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_equal_layers_do_not_differ():
    wrong = np.tile(np.random.default_rng(0).uniform(size=200) < 0.3, (2, 1))
    found = compared(wrong).compare("a", "b")
    assert (found.difference, found.p) == (0.0, 1.0)
    squares = compared(wrong * 0.5).compare("a", "b")
    assert (squares.difference, squares.p, squares.test) == (0.0, 1.0, PAIRED_T)


def test_without_pairs_samples_are_taken_for_independent():
    results = results_of({"a": 0.3, "b": 0.25}, n=1000)
    found = results.compare("a", "b")
    assert found.test == INDEPENDENT
    deviation = np.sqrt((0.3 * 0.7 + 0.25 * 0.75) / 1000)
    assert found.p == pytest.approx(2 * scipy.stats.norm.sf(0.05 / deviation), rel=0.05)
    # Those of another epoch say nothing of this one.
    wrong = compared(np.zeros((2, 10)))
    wrong.add([row for row in results_of({"a": [0, 0.3], "b": [0, 0.2]}).rows if row.epoch])
    assert wrong.compare("a", "b").test == INDEPENDENT
    with pytest.raises(ValueError, match="Unknown tap. Received: 'c'. Measured: 'a', 'b'"):
        results.compare("a", "c")


def host():
    keras.utils.set_random_seed(0)
    model = dense_net()
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


@pytest.mark.parametrize("mode", ["shared", "isolated"])
def test_online_the_examples_are_those_of_the_last_validation(digits, mode, tmp_path):
    (x, y), (x_val, y_val) = digits
    model, probes = host(), LinearProbeCallback(["input", "dense"], mode=mode)
    model.fit(x, y, 32, 2, callbacks=[probes], validation_data=(x_val, y_val), verbose=0)
    hidden = keras.Model(model.inputs, model.get_layer("dense").output).predict(x_val, verbose=0)
    features = {"input": x_val.reshape(len(x_val), -1), "dense": hidden}
    wrong = {}
    for tap, z in features.items():
        kernel, bias = probes.weights(tap)
        wrong[tap] = (z @ kernel + bias).argmax(axis=1) != y_val
    a, b = wrong["input"], wrong["dense"]
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    found = probes.results.compare("input", "dense")
    assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert found.n == len(y_val)
    assert probes.results.compare("input", "dense", split="train").test == INDEPENDENT
    probes.results.save(tmp_path)
    assert ProbeResults.load(tmp_path).compare("input", "dense") == found


def test_offline_too(digits, tmp_path):
    (x, y), _ = digits
    store = extract_features(host(), (x, y), tmp_path / "s", verbose=False)
    results = fit_probes(store, l2=1e-2, verbose=False)
    found = results.compare("input", "dense")
    assert (found.test, found.n) == (MCNEMAR, round(0.1 * len(x)))
    errors = results.measured()["value"]
    assert found.difference == pytest.approx(errors["input"] - errors["dense"])
