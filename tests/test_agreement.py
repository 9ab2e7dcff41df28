"""Two runs compared, against SciPy, numbers by hand and simulated layers."""

import math

import numpy as np
import pytest
import scipy.stats
from hosts import compiled, convnet
from made import results_of

from keras_probes import LinearProbeCallback, ProbeResults
from keras_probes.results.agreement import interval_of_tau
from keras_probes.results.schema import Row, TapInfo

TAPS = ["a", "b", "c", "d", "e", "f"]
HERE, THERE = [0.9, 0.5, 0.4, 0.45, 0.2, 0.1], [0.85, 0.52, 0.4, 0.35, 0.25, 0.11]


def run(errors, taps=TAPS, **options):
    return results_of(dict(zip(taps, errors, strict=True)), **options)


def test_by_hand():
    found = run(HERE).compare_with(run(THERE))
    # Of 15 pairs of layers, c and d alone have changed places: (14 - 1) / 15.
    assert found.tau == pytest.approx(13 / 15)
    z, half = math.log((1 + 13 / 15) / (1 - 13 / 15)) / 2, 1.959964 * math.sqrt(0.437 / 2)
    bounds = [math.tanh(z - half), math.tanh(z + half)]
    assert [found.ci_low, found.ci_high] == pytest.approx(bounds)
    assert found.p == pytest.approx(scipy.stats.kendalltau(HERE, THERE).pvalue)
    assert (found.n, found.left_out) == (6, {})
    assert list(found.table.index) == TAPS
    assert found.table["value"].tolist() == HERE
    assert found.table["other"].tolist() == THERE
    assert found.table["difference"].tolist() == pytest.approx(np.subtract(HERE, THERE))
    assert found.mean_difference == pytest.approx(np.mean(np.subtract(HERE, THERE)))
    assert found.largest == "d"


def test_the_interval_of_a_difference_is_that_of_two_samples():
    row = run(HERE, n=4000).compare_with(run(THERE, n=1000)).table.loc["b"]
    half = 1.96 * math.sqrt(0.5 * 0.5 / 4000 + 0.52 * 0.48 / 1000)
    assert row["ci_low"] == pytest.approx(-0.02 - half, abs=2e-4)
    assert row["ci_high"] == pytest.approx(-0.02 + half, abs=2e-4)


def test_the_other_way_round():
    found, back = run(HERE).compare_with(run(THERE)), run(THERE).compare_with(run(HERE))
    order = ["tau", "ci_low", "ci_high", "p"]
    assert [getattr(found, name) for name in order] == [getattr(back, name) for name in order]
    assert back.table["difference"].tolist() == pytest.approx(-found.table["difference"])
    assert back.table["ci_low"].tolist() == pytest.approx(-found.table["ci_high"])


def test_ties_by_tau_b():
    tied = [0.9, 0.5, 0.5, 0.45, 0.1, 0.1]
    found = run(tied).compare_with(run(THERE))
    # 13 pairs of 15 are not tied, and all have the same order.
    assert found.tau == pytest.approx(13 / math.sqrt(13 * 15))
    assert found.p == pytest.approx(scipy.stats.kendalltau(tied, THERE).pvalue)
    assert found.ci_low < found.tau <= found.ci_high
    equal = run([0.5] * 6).compare_with(run(THERE))
    assert np.isnan([equal.tau, equal.ci_low, equal.ci_high, equal.p]).all()
    assert "tau = nan (interval not known)" in str(equal)


@pytest.mark.parametrize("n", [5, 8, 20])
def test_the_same_order_throughout_is_not_held_for_sure(n):
    taps, falling = [f"layer{place}" for place in range(n)], np.linspace(0.9, 0.1, n)
    found = run(falling, taps).compare_with(run(falling**2, taps))
    assert (found.tau, found.ci_high) == (pytest.approx(1), pytest.approx(1))
    # The lower end is that of n layers of which two neighbours have changed places.
    changed = falling.copy()
    changed[[0, 1]] = changed[[1, 0]]
    assert found.ci_low == pytest.approx(run(falling, taps).compare_with(run(changed, taps)).ci_low)
    backwards = run(falling, taps).compare_with(run(falling[::-1], taps))
    assert (backwards.tau, backwards.ci_low) == (pytest.approx(-1), pytest.approx(-1))
    assert backwards.ci_high == pytest.approx(-found.ci_low)


@pytest.mark.parametrize("n", [2, 4])
def test_of_fewer_than_five_layers_the_interval_is_not_known(n):
    found = run(HERE[:n], TAPS[:n]).compare_with(run(THERE[:n], TAPS[:n]))
    assert np.isnan([found.ci_low, found.ci_high]).all()
    assert found.p == pytest.approx(scipy.stats.kendalltau(HERE[:n], THERE[:n]).pvalue)
    assert found.n == n


@pytest.mark.parametrize("n", [10, 20, 40])
@pytest.mark.parametrize("truth", [0.0, 0.4, -0.7])
def test_the_interval_holds_the_truth_as_often_as_it_says(truth, n):
    rng, slope = np.random.default_rng(0), math.sin(math.pi / 2 * truth)
    inside, runs = 0, 500
    for _ in range(runs):
        x = rng.normal(size=n)
        y = slope * x + math.sqrt(1 - slope**2) * rng.normal(size=n)
        low, high = interval_of_tau(scipy.stats.kendalltau(x, y).statistic, n)
        inside += low <= truth <= high
    assert 0.91 <= inside / runs <= 0.98


def test_layers_that_one_run_alone_has_are_left_out_and_named():
    errors = [*HERE[:5], math.nan]
    here, there = run(errors), run(THERE, ["e", "c", "b", "q", "a", "f"])
    found = here.compare_with(there)
    assert list(found.table.index) == ["a", "b", "c", "e"]  # as in the graph of the first run
    assert found.table["other"].tolist() == [0.25, 0.4, 0.52, 0.85]
    assert found.left_out == {
        "d": "not in the other run",
        "f": "no example could be measured",
        "q": "in the other run only",
    }
    for shown in (str(found), found._repr_html_().replace("&#x27;", "'")):
        assert "left out: 'd' (not in the other run), 'f' (no example" in shown


def test_runs_without_two_layers_in_common_are_refused():
    expected = "Received: 'a', 'b', and in the other run 'b', 'c'. Give both the same layers="
    with pytest.raises(ValueError, match=expected):
        run([0.3, 0.2], ["a", "b"]).compare_with(run([0.3, 0.2], ["b", "c"]))


def test_splits():
    here, there = run(HERE), run(THERE, split="test")
    there.add(run(np.square(THERE)).rows)
    last = here.compare_with(there)
    assert (last.split, last.other_split) == ("validation", "test")
    assert last.table["other"].tolist() == THERE
    both = here.compare_with(there, split="validation")
    assert (both.split, both.other_split) == ("validation", "validation")
    assert both.table["other"].tolist() == pytest.approx(np.square(THERE))
    named = here.compare_with(there, split="validation", other_split="test")
    assert str(named) == str(last)
    with pytest.raises(ValueError, match="split='test'"):
        here.compare_with(there, split="test")


def test_targets_and_metrics():
    taps = [TapInfo(tap, depth, "Dense", (8,), "Flatten", 8) for depth, tap in enumerate(TAPS)]
    of_both = [
        ProbeResults(
            taps,
            [
                Row(0, 1, "validation", target, tap, "loss", value, 100)
                for target, values in targets.items()
                for tap, value in zip(TAPS, values, strict=True)
            ],
        )
        for targets in ({"digit": HERE, "is_even": THERE}, {"digit": THERE, "is_even": HERE})
    ]  # fmt: skip
    found = of_both[0].compare_with(of_both[1], metric="loss", target="digit")
    assert found.table["value"].tolist() == HERE
    assert found.table["other"].tolist() == THERE
    assert found.table[["ci_low", "ci_high"]].isna().all(axis=None)  # none is known of a loss
    assert "validation loss, and validation loss of the other" in str(found)
    with pytest.raises(ValueError, match="several targets"):
        of_both[0].compare_with(of_both[1], metric="loss")


def test_online_against_optimal(digits):
    (x, y), (x_val, y_val) = digits
    model = compiled(convnet())
    probes = LinearProbeCallback(["input", "conv", "norm", "pool", "dense", "out"])
    model.fit(x, y, epochs=3, validation_data=(x_val, y_val), callbacks=[probes], verbose=0)
    optimal = probes.refit((x, y), validation=(x_val, y_val), test=(x_val, y_val), verbose=False)
    found = probes.results.compare_with(optimal)
    assert (found.split, found.other_split, found.n) == ("validation", "test", 6)
    errors = [results.measured()["value"] for results in (probes.results, optimal)]
    assert found.tau == pytest.approx(scipy.stats.kendalltau(*errors).statistic)
    assert -1 < found.ci_low < found.tau < found.ci_high <= 1
    assert found.table["difference"].tolist() == pytest.approx(errors[0] - errors[1])
    assert probes.results.compare_with(probes.results).tau == pytest.approx(1)
