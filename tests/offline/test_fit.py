"""`fit_probes`, against scikit-learn on the same rows, and from disk as from memory."""

import json
import shutil

import keras
import numpy as np
import pandas as pd
import pytest
from hosts import convnet, dense_net
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from keras_probes import FeatureStore, ProbeResults, extract_features, fit_probes
from keras_probes.offline import fit
from keras_probes.probes.tasks import Classification

FIT_METRICS = {
    "l2", "iterations", "objective", "gradient_norm", "converged", "rank", "directions"
}  # fmt: skip


@pytest.fixture(scope="module")
def data(digits):
    (x, y), (x_val, y_val) = digits
    return np.concatenate([x, x_val]), np.concatenate([y, y_val])


def extract(path, data, model=None, **options):
    given = {"layers": ["input", "dense"], "verbose": False, **options}
    return extract_features(model or dense_net(), data, path, **given)


def quiet(store, **options):
    return fit_probes(store, **{"verbose": False, **options})


@pytest.fixture(scope="module")
def store(data, tmp_path_factory):
    return extract(tmp_path_factory.mktemp("stores") / "s", data)


@pytest.fixture(scope="module")
def results(store):
    return quiet(store)


def value(results, tap, metric, split="train", target=None):
    frame = results.frame()
    frame = frame[(frame.tap == tap) & (frame.metric == metric) & (frame.split == split)]
    if target is not None:
        frame = frame[frame.target == target]
    (only,) = frame["value"]
    return only


def test_results_hold_every_measure_of_every_tap_and_split(results, store):
    frame = results.frame()
    for tap in ("input", "dense"):
        for split in ("train", "validation", "test"):
            rows = frame[(frame.tap == tap) & (frame.split == split)]
            of_fit = FIT_METRICS if split == "train" else set()
            assert set(rows.metric) == {*Classification(10).measurable} | of_fit
            counts = {"validation": round(len(store) * 0.1), "test": round(len(store) * 0.1)}
            expected = counts.get(split, len(store) - sum(counts.values()))
            assert set(rows.n) == {expected}
    assert 0 < value(results, "input", "error", "test") < 0.5


def test_results_have_the_graph_of_the_host(results, tmp_path):
    names = [node.name for node in results.graph]
    assert set(names) >= {tap.name for tap in results.taps}
    assert all(set(node.inputs) <= set(names) for node in results.graph)
    results.save(tmp_path)
    assert ProbeResults.load(tmp_path).graph == results.graph


def test_same_probe_as_scipy_finds(data, tmp_path):
    x, y = data
    train = extract(tmp_path / "train", (x[:300], y[:300]))
    held_out = extract(tmp_path / "test", (x[300:], y[300:]))
    results = quiet(train, validation=None, test=held_out, l2=1e-2, tol=1e-10)
    h = train.features("input")[:]
    mean, std = h.mean(axis=0, dtype="float64"), h.std(axis=0, dtype="float64")
    spread = np.maximum(std, np.abs(h - mean).max(axis=0) / 4)
    spread[std == 0] = np.inf

    def scaled(features):
        return (features - mean) / spread

    z, onehot = scaled(h), np.eye(10)[y[:300]]
    counts = onehot.sum(axis=0) + 0.5
    prior = np.vstack([np.zeros((z.shape[1], 10)), np.log(counts / counts.sum())])

    def objective(flat):
        w = flat.reshape(-1, 10)
        log_p = log_softmax(z @ w[:-1] + w[-1], axis=1)
        residual = (np.exp(log_p) - onehot) / len(z)
        value = -(log_p * onehot).sum() / len(z) + 1e-2 / 2 * np.sum((w - prior) ** 2)
        gradient = np.vstack([z.T @ residual, residual.sum(axis=0)]) + 1e-2 * (w - prior)
        return value, gradient.ravel()

    options = {"maxiter": 5000, "maxfun": 10000, "ftol": 0, "gtol": 1e-10}
    best = minimize(objective, prior.ravel(), jac=True, method="L-BFGS-B", options=options).x
    best = best.reshape(-1, 10)
    h_test = scaled(held_out.features("input")[:])
    p = softmax(h_test @ best[:-1] + best[-1], axis=1)
    error = np.mean(p.argmax(axis=1) != y[300:])
    assert value(results, "input", "error", "test") == pytest.approx(error)
    loss = -np.log(p[np.arange(len(h_test)), y[300:]]).mean()
    assert value(results, "input", "loss", "test") == pytest.approx(loss, rel=1e-4)
    ours = results.probe("input").predict(held_out.features("input")[:], verbose=0)
    # At l2 1e-2, an objective within 1e-10 leaves W within 1.4e-4, and logits within 1e-3.
    np.testing.assert_allclose(ours, p, atol=5e-4)


def test_auto_takes_the_penalty_with_the_least_validation_loss(store, results):
    for tap in ("input", "dense"):
        chosen = value(results, tap, "l2")
        losses = {
            l2: value(quiet(store, l2=l2, taps=[tap]), tap, "loss", "validation")
            for l2 in (fit.PENALTIES[0], 10 * chosen, chosen, chosen / 10, fit.PENALTIES[-1])
        }
        assert fit.PENALTIES[-1] < chosen < fit.PENALTIES[0]
        assert min(losses, key=losses.__getitem__) == chosen


def test_few_features_that_vary_together_take_a_penalty_as_small_as_they_need(tmp_path):
    """A hundredth of their spread tells the class: W has to be some hundred."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 2000)
    both = rng.normal(size=2000)
    x = np.stack([both, both + 0.01 * (y - 0.5) + 0.003 * rng.normal(size=2000)], axis=1)
    inputs = keras.Input((2,))
    host = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    fitted = quiet(extract(tmp_path / "s", (x.astype("float32"), y), host, layers=["input"]))
    assert value(fitted, "input", "l2") < 3e-5
    bayes = 0.048  # Phi(-0.005 / 0.003)
    assert value(fitted, "input", "error", "test") == pytest.approx(bayes, abs=0.05)


def test_from_disk_as_from_memory_bit_for_bit(store, results, monkeypatch):
    monkeypatch.setattr(fit, "READ_ROWS", 100)
    streamed = quiet(store, memory=0)
    held = quiet(store)
    pd.testing.assert_frame_equal(streamed.frame(), held.frame(), check_exact=True)
    for key, probe in held.probes.items():
        np.testing.assert_array_equal(streamed.probes[key].kernel, probe.kernel)
    for tap in ("input", "dense"):  # another order of sums: the same but for rounding
        assert value(held, tap, "loss") == pytest.approx(value(results, tap, "loss"), abs=1e-4)


def test_attached_probes_predict_from_raw_input(data, tmp_path):
    model = convnet()
    store = extract(
        tmp_path / "s", data, model, layers=["conv", "dense"], reduce={"conv": "random"}
    )
    results = quiet(store, l2=1e-2)
    results.save(tmp_path / "results")
    attached = ProbeResults.load(tmp_path / "results").attach(model)
    predicted = attached.predict(data[0], verbose=0)
    assert list(predicted) == ["conv", "dense"]
    for tap in predicted:
        expected = results.probe(tap).predict(store.features(tap)[:], verbose=0)
        np.testing.assert_allclose(predicted[tap], expected, atol=1e-5)
    with pytest.raises(ValueError, match="Unknown layer"):
        results.attach(dense_net())


def test_saved_and_loaded_they_are_the_same(results, tmp_path):
    results.save(tmp_path)
    loaded = ProbeResults.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.frame(), results.frame(), check_exact=True)
    assert loaded.reductions == json.loads(json.dumps(results.reductions))
    for key, probe in results.probes.items():
        np.testing.assert_array_equal(loaded.probes[key].kernel, probe.kernel)
        np.testing.assert_array_equal(loaded.probes[key].bias, probe.bias)
    file = next(tmp_path.glob("probes-*.npz"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        ProbeResults.load(tmp_path)


def test_a_probe_that_is_not_there(results):
    with pytest.raises(ValueError, match="No probe for tap='conv'.*'input', 'dense'"):
        results.probe("conv")
    with pytest.raises(ValueError, match="probe_model and weights"):
        ProbeResults().probe("conv")


def test_the_table_tells_the_certificate(results):
    table = results.table()
    assert table["converged"].all()
    assert (table["certificate"] <= 1e-6).all()
    assert "e-07" in str(results)


def test_not_converged_is_a_warning_and_marked(store):
    with pytest.warns(UserWarning, match=r"not proven optimal.*Raise max_iterations or l2"):
        results = quiet(store, l2=1e-4, max_iterations=1, taps=["input"])
    assert not results.table()["converged"].any()
    assert (results.measured()["certificate"] > 1e-6).all()


def test_a_tolerance_that_rounding_does_not_reach_is_a_warning(store):
    with pytest.warns(UserWarning, match="beyond the rounding of float64"):
        quiet(store, l2=1e-2, tol=1e-18, taps=["dense"])


def test_features_that_are_not_finite_are_left_out_and_named(data, tmp_path):
    x, y = data
    x = x.copy()
    x[[3, 70], 0, 0] = np.nan
    x[5, 1, 1] = np.inf
    bad = extract(tmp_path / "bad", (x, y), layers="input")
    clean = np.delete(np.arange(len(x)), [3, 5, 70])
    good = extract(tmp_path / "good", (x[clean], y[clean]), layers="input")
    with pytest.warns(UserWarning, match=r"'input' has NaN or .* in 3 train rows: 3, 5, 70\."):
        results = quiet(bad, validation=None, test=None, l2=1e-2)
    expected = quiet(good, validation=None, test=None, l2=1e-2)
    assert value(results, "input", "loss") == pytest.approx(value(expected, "input", "loss"))
    assert set(results.frame().nonfinite) == {3}
    assert (results.table()["nonfinite"] == 3).all()


def test_a_tap_without_one_finite_row(data, tmp_path):
    x, y = data
    nothing = extract(tmp_path / "s", (x * np.nan, y), layers="input")
    with pytest.raises(ValueError, match="no training row with finite features"):
        quiet(nothing)


def test_features_of_any_scale(data, tmp_path):
    """Each feature on a scale of its own, one constant, one nearly so far from 0."""
    x, y = data
    scales = np.logspace(-12, 12, 64).reshape(8, 8, 1)
    plain = quiet(extract(tmp_path / "a", data, layers="input"), l2=1e-2)
    scaled = quiet(
        extract(tmp_path / "b", ((x * scales).astype("float32"), y), layers="input"), l2=1e-2
    )
    assert value(scaled, "input", "loss") == pytest.approx(value(plain, "input", "loss"), rel=1e-4)
    x = x.copy()
    x[:, 0, 0] = 1e6 + np.random.default_rng(0).normal(0, 0.01, len(x))[:, None]
    assert value(quiet(extract(tmp_path / "c", (x, y), layers="input")), "input", "converged") == 1


def test_classes_without_training_rows(data, tmp_path):
    x, y = data
    train = extract(tmp_path / "train", (x[y < 7], y[y < 7]), num_classes=10)
    test = extract(tmp_path / "test", data)
    with pytest.warns(UserWarning, match="3 of 10 classes have no training row: 7, 8, 9"):
        results = quiet(train, validation=None, test=test, l2=1e-2)
    predicted = results.probe("input").predict(test.features("input")[:], verbose=0).argmax(1)
    assert set(predicted) <= set(range(7))
    assert value(results, "input", "error", "test") == pytest.approx(np.mean(predicted != y))
    assert value(results, "input", "loss", "test") < 5


def test_one_class(data, tmp_path):
    x, _ = data
    with pytest.raises(ValueError, match="at least 2 classes. Received: 1"):
        quiet(extract(tmp_path / "s", (x, np.zeros(len(x)))))


def test_sample_weights_weigh(data, tmp_path):
    x, y = data
    weights = (np.arange(len(x)) % 2).astype("float32")
    half = extract(tmp_path / "s", (x, y, weights), layers="input")
    results = quiet(half, validation=None, test=None, l2=1e-2)
    predicted = results.probe("input").predict(half.features("input")[:], verbose=0)
    losses = -np.log(predicted[np.arange(len(y)), y])
    expected = np.average(losses, weights=weights)
    assert value(results, "input", "loss") == pytest.approx(expected, rel=1e-4)
    assert losses[1::2].mean() < losses[::2].mean()


def test_several_targets(data, tmp_path):
    target = {"digit": None, "even": lambda x, y: 1 - y % 2}
    both = extract(tmp_path / "s", data, target=target, num_classes={"even": 2}, layers="input")
    results = quiet(both, l2=1e-2)
    assert value(results, "input", "error", "test", "even") < 0.3
    assert results.probe("input", "even").output_shape == (None, 2)
    assert results.attach(dense_net(), "digit").predict(data[0][:4], verbose=0)["input"].shape == (
        4,
        10,
    )
    with pytest.raises(ValueError, match="'input' of 'digit'"):
        results.probe("input")


def test_results_come_while_it_runs(store, capfd):
    fit_probes(store, l2=1e-2)
    shown = capfd.readouterr()
    assert "dense: error train 0." in shown.out + shown.err
    assert "2/2" in shown.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2": -1.0}, "penalties above 0"),
        ({"l2": [0.1, 0.0]}, "penalties above 0"),
        ({"l2": []}, "penalties above 0"),
        ({"validation": None}, "need validation rows"),
        ({"validation": 1.5}, "a fraction between 0 and 1"),
        ({"test": 0}, "a fraction between 0 and 1"),
        ({"taps": ["conv"]}, "Unknown tap.*'conv'"),
        ({"validation": 0.6, "test": 0.6}, "No rows are left"),
    ],
    ids=str,
)
def test_bad_arguments(store, options, message):
    with pytest.raises(ValueError, match=message):
        quiet(store, **options)


def test_a_path_in_the_place_of_a_store(store):
    with pytest.raises(TypeError, match=r"FeatureStore\(path\)"):
        fit_probes(store.path)


def test_validation_from_another_host(store, data, tmp_path):
    other = extract(tmp_path / "s", data, dense_net(9))
    with pytest.raises(ValueError, match=r"can't be compared: its host.sha256 .*same host"):
        quiet(store, validation=other)


def test_a_store_that_is_not_complete_or_damaged(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "s")
    file = tmp_path / "s" / "tap_000_input" / "c" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="Chunk 0 of tap 'input'.*is damaged"):
        quiet(FeatureStore(tmp_path / "s"), taps=["input"])
    file.unlink()
    with pytest.raises(ValueError, match="not complete"):
        quiet(FeatureStore(tmp_path / "s"))


def test_two_fits_are_the_same_bit_for_bit(store, results):
    again = quiet(store)
    pd.testing.assert_frame_equal(again.frame(), results.frame(), check_exact=True)
    keras.utils.set_random_seed(99)
    for key, probe in quiet(store).probes.items():
        np.testing.assert_array_equal(probe.kernel, results.probes[key].kernel)


def test_the_hosts_own_error_stands_beside_each_probes(data, tmp_path):
    x, y = data
    model = dense_net()
    targets = {"digit": None, "is_even": lambda x, y: 1 - y % 2}
    options = {"target": targets, "num_classes": {"is_even": 2}}
    store = extract(tmp_path / "s", data, model, **options)
    predicted = model.predict(x, verbose=0).argmax(axis=1)
    np.testing.assert_array_equal(store.predictions("digit"), predicted)
    assert store.predictions("is_even") is None  # no output has two columns
    results = quiet(store, validation=extract(tmp_path / "v", (x[:50], y[:50]), model, **options))
    measured = results.measured(split="validation", target="digit")["host"]
    np.testing.assert_allclose(measured, np.mean(predicted[:50] != y[:50]))
    assert results.measured("loss", target="digit")["host"].isna().all()
    assert results.measured(target="is_even")["host"].isna().all()
