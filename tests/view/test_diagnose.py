"""Each check: where it fires, where it stays silent, where it does not apply."""

import dataclasses
import itertools
import math
import pathlib

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow as tf
from made import results_of
from scipy.stats import binomtest, kendalltau, norm
from sklearn.utils import check_random_state

from keras_probes import diagnose
from keras_probes.probes.probe_set import pair_moments
from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import Pairs
from keras_probes.view.diagnose import ALPHA, CHECKS, _holm, _kendall, _p_above
from keras_probes.view.plots import plot_curves, plot_depth, plot_heatmap
from keras_probes.view.table import as_bars
from keras_probes.view.tensorboard import TensorBoardWriter

HEALTHY = {f"layer{place}": error for place, error in enumerate([0.5, 0.4, 0.3, 0.2, 0.1, 0.05])}


def codes(results):
    return {finding.code for finding in diagnose(results)}


def test_a_healthy_network_has_no_findings():
    assert diagnose(results_of(HEALTHY)) == []
    assert str(diagnose(results_of(HEALTHY))) == "nothing found"


# The pathological network: a skip from the input over the first half.
BYPASSED = {"input": 0.1, **{f"a{k}": 0.3 + 0.1 * k for k in range(5)}, "add": 0.1,
            "b0": 0.08, "b1": 0.05, "b2": 0.03}  # fmt: skip
SKIP = {"input": (), "a0": ("input",), "a1": ("a0",), "a2": ("a1",), "a3": ("a2",), "a4": ("a3",),
        "add": ("input", "a4"), "b0": ("add",), "b1": ("b0",), "b2": ("b1",)}  # fmt: skip


def test_a_segment_that_is_bypassed_is_dead():
    (finding,) = [f for f in diagnose(results_of(BYPASSED, inputs=SKIP)) if f.code == "KP001"]
    assert finding.taps == ("a0", "a1", "a2", "a3", "a4")
    assert finding.numbers["before"] == finding.numbers["after"] == 0.1
    assert (finding.numbers["least"], finding.numbers["most"]) == pytest.approx((0.3, 0.7))
    assert "0.700" in finding.text
    assert "skip connection" in finding.advice


def test_layers_that_guess_are_dead_while_others_learn():
    errors = {"input": 0.1, "a": 0.89, "b": 0.9, "c": 0.91}
    (finding,) = [f for f in diagnose(results_of(errors)) if f.code == "KP001"]
    assert finding.taps == ("a", "b", "c")
    assert "saturated" in finding.advice
    assert "KP001" not in codes(results_of(dict.fromkeys(errors, 0.9)))  # nothing learns
    assert "KP001" not in codes(results_of(errors, n=30))  # who knows


def test_a_rise_is_found_between_two_layers_if_it_is_no_chance():
    errors = {**HEALTHY, "layer4": 0.3}
    (finding,) = [f for f in diagnose(results_of(errors)) if f.code == "KP002"]
    assert finding.taps == ("layer3", "layer4")
    assert finding.numbers["p"] < 1e-6
    assert "KP002" not in codes(results_of(errors, n=30))
    assert "KP002" in diagnose(results_of({"input": 0.4})).not_applicable


def test_a_plateau_needs_enough_examples():
    errors = {"input": 0.3, "a": 0.1, "b": 0.1, "c": 0.105, "d": 0.1, "e": 0.02}
    (finding,) = [f for f in diagnose(results_of(errors, n=10000)) if f.code == "KP003"]
    assert finding.taps == ("b", "c", "d")
    few = diagnose(results_of(errors, n=100))
    assert "100 examples" in few.not_applicable["KP003"]
    assert "KP003" not in codes(results_of(HEALTHY, n=10000))


def test_accuracy_that_falls_towards_the_head():
    errors = {"input": 0.5, "a": 0.2, "b": 0.1, "c": 0.15, "d": 0.2}
    (finding,) = [f for f in diagnose(results_of(errors)) if f.code == "KP004"]
    assert finding.taps == ("b", "c", "d")
    assert "KP004" not in codes(results_of(errors, n=50))
    assert "KP004" in diagnose(results_of({"input": 0.4, "a": 0.3})).not_applicable


def with_training(errors, train, **options):
    results = results_of(errors, **options)
    rows = [*results_of(train, split="train").rows, *results.rows]
    return ProbeResults(results.taps, rows, graph=results.graph)


def test_overfitted_probes():
    train = {**HEALTHY, "layer0": 0.1}
    (finding,) = diagnose(with_training(HEALTHY, train))
    assert (finding.code, finding.taps) == ("KP005", ("layer0",))
    assert finding.numbers["train"] == 0.1
    assert finding.numbers["validation"] == 0.5
    assert codes(with_training(HEALTHY, HEALTHY)) == set()
    assert "KP005" in diagnose(results_of(HEALTHY)).not_applicable
    assert "KP005" in diagnose(results_of(HEALTHY, split="train")).not_applicable


def test_probes_that_are_not_settled():
    certificates = dict.fromkeys(HEALTHY, 0.001) | {"layer2": 0.3}
    (finding,) = diagnose(results_of(HEALTHY, certificate=certificates))
    assert (finding.code, finding.taps) == ("KP006", ("layer2",))
    assert finding.numbers == {"certificate": 0.3}
    (finding,) = diagnose(results_of(HEALTHY, certificate=certificates | {"layer2": math.nan}))
    assert finding.taps == ("layer2",)
    assert "1 of" in finding.text
    assert " nan " not in finding.text
    assert codes(results_of(HEALTHY, certificate=1e-4)) == set()
    (finding,) = diagnose(results_of(HEALTHY, certificate=math.nan))  # nothing is known of any
    assert finding.taps == tuple(HEALTHY)
    assert "are not known to be near their optimum" in finding.text


def diverged(errors, from_place):
    """Results of a host that computes NaN from a layer on."""
    made = results_of(errors)
    bad = set(list(errors)[from_place:])
    rows = [
        dataclasses.replace(row, value=math.nan, n=0, nonfinite=1000) if row.tap in bad else row
        for row in made.rows
    ]
    return ProbeResults(made.taps, rows, graph=made.graph)


def test_features_that_are_not_finite():
    (finding,) = [f for f in diagnose(diverged(HEALTHY, 2)) if f.code == "KP009"]
    assert finding.taps == ("layer2", "layer3", "layer4", "layer5")
    assert finding.numbers == {"taps": 4, "share": 1.0}
    findings = diagnose(diverged(HEALTHY, 0))
    assert [f.code for f in findings] == ["KP009"]
    assert set(findings.not_applicable) == set(CHECKS) - {"KP009"}
    (finding,) = diagnose(results_of(HEALTHY, nonfinite={**dict.fromkeys(HEALTHY, 0), "layer5": 1}))
    assert (finding.code, finding.taps) == ("KP009", ("layer5",))
    assert finding.numbers["share"] == pytest.approx(1 / 1001)
    assert "KP009" not in codes(results_of(HEALTHY))


@pytest.mark.parametrize("from_place", [0, 2])
def test_every_view_shows_a_host_that_has_diverged(from_place, tmp_path):
    made = diverged(HEALTHY, from_place)
    assert "nan" in as_bars(made)
    assert "NaN" in str(made)
    for plot in (plot_depth, plot_curves, plot_heatmap):
        plt.close(plot(made).figure)
    assert "KP009" in made.report(tmp_path / "probes.html").read_text(encoding="utf-8")
    TensorBoardWriter(tmp_path).write(made, 0)


def test_an_auxiliary_head_that_is_ahead():
    inputs = {"input": (), "a": ("input",), "aux": ("a",), "b": ("a",), "c": ("b",)}
    errors = {"input": 0.5, "a": 0.3, "aux": 0.1, "b": 0.25, "c": 0.2}
    (finding,) = [f for f in diagnose(results_of(errors, inputs=inputs)) if f.code == "KP007"]
    assert finding.taps == ("aux", "c")
    assert "KP007" not in codes(results_of({**errors, "c": 0.08}, inputs=inputs))
    assert "KP007" in diagnose(results_of(HEALTHY)).not_applicable


def test_an_error_that_does_not_fall():
    errors = dict(zip(HEALTHY, [0.3, 0.31, 0.29, 0.3, 0.31, 0.3], strict=True))
    (finding,) = [f for f in diagnose(results_of(errors)) if f.code == "KP008"]
    assert finding.numbers["ci_low"] < finding.numbers["tau"] < finding.numbers["ci_high"]
    assert finding.numbers["ci_high"] >= 0
    assert "KP008" in diagnose(results_of({"input": 0.4, "a": 0.3})).not_applicable


def with_ranks(errors, ranks):
    results = results_of(errors)
    last = results.rows[-1]
    results.add(
        dataclasses.replace(last, tap=tap, metric="rank", split="train", value=float(rank))
        for tap, rank in ranks.items()
    )
    return results


def test_a_collapsed_layer_is_told_from_one_that_is_not_linear():
    errors = {"input": 0.4, "a": 0.2, "b": 0.6, "c": 0.6}
    ranks = {"input": 50, "a": 40, "b": 3, "c": 0.7}
    (finding,) = [f for f in diagnose(with_ranks(errors, ranks)) if f.code == "KP010"]
    assert (finding.severity, finding.taps) == ("problem", ("b", "c"))
    assert finding.numbers["rank"] == 0.7
    varied = {**ranks, "b": 30, "c": 35}
    assert "KP010" not in codes(with_ranks(errors, varied))
    guessing = with_ranks({**errors, "c": 0.88}, varied)
    (finding,) = [f for f in diagnose(guessing) if f.code == "KP010"]
    assert finding.severity == "note"
    # A good classifier's head has few directions, and a low error.
    healthy = {tap: 60 - 10 * place for place, tap in enumerate(HEALTHY)}
    assert "KP010" not in codes(with_ranks(HEALTHY, {**healthy, "layer5": 1.5}))
    assert "KP010" in diagnose(results_of(HEALTHY)).not_applicable


def test_the_worst_come_first_and_each_has_its_numbers():
    found = diagnose(results_of(BYPASSED, inputs=SKIP))
    assert [f.severity for f in found] == sorted(
        (f.severity for f in found), key=["problem", "warning", "note"].index
    )
    assert all(f.numbers and f.taps and f.advice for f in found)
    assert found == results_of(BYPASSED, inputs=SKIP).diagnose()


def test_the_latest_epoch_counts():
    errors = {tap: [0.9, error] for tap, error in HEALTHY.items()}
    assert diagnose(results_of(errors)) == []


def test_nothing_is_found_where_there_is_nothing_but_chance():
    random, found = check_random_state(0), 0
    taps = [f"layer{place}" for place in range(20)]
    for _ in range(200):
        errors = dict(zip(taps, random.binomial(1000, 0.3, 20) / 1000, strict=True))
        found += bool(codes(results_of(errors)) & {"KP001", "KP002", "KP004"})
    assert binomtest(found, 200, 2 * ALPHA, alternative="greater").pvalue > 0.01


def test_p_values_against_the_normal_distribution():
    for z in (-1.0, 0.0, 2.0):
        assert _p_above(0.1 * z, 0.1) == pytest.approx(norm.sf(z))
    assert (_p_above(0.0, 0.0), _p_above(0.1, 0.0), _p_above(0.1, math.nan)) == (1.0, 0.0, 1.0)


def test_a_small_rise_is_sure_where_the_same_examples_are_missed():
    errors = {"input": 0.30, "a": 0.20, "b": 0.21, "c": 0.1}
    results = results_of(errors)
    assert "KP002" not in codes(results)
    rng = np.random.default_rng(0)
    wrong = np.array([rng.permutation(1000) < 1000 * error for error in errors.values()])
    wrong[2] = wrong[1] | (np.cumsum(~wrong[1]) <= 10) & ~wrong[1]  # 10 more are missed, none less
    moments = pair_moments(tf.constant(wrong, tf.float32), tf.ones(wrong.shape)).numpy()
    results.pairs[None, None, "validation"] = Pairs(0, tuple(errors), moments)
    (finding,) = [f for f in diagnose(results) if f.code == "KP002"]
    assert finding.taps == ("a", "b")
    assert finding.numbers["p"] == pytest.approx(2.0**-10)


def test_holm_by_hand():
    assert _holm({"a": 0.01, "b": 0.03, "c": 0.02, "d": 0.9}) == ["a"]  # 0.02 > 0.05 / 3
    assert _holm({"a": 0.001, "b": 0.02, "c": 0.016}) == ["a", "b", "c"]
    assert _holm({}) == []


def test_tau_against_scipy():
    errors = np.random.default_rng(0).permutation(9)[None].astype(float)
    assert _kendall(errors)[0] == pytest.approx(kendalltau(np.arange(9), errors[0]).statistic)


def test_every_check_has_a_page():
    pages = pathlib.Path(__file__).parents[2] / "docs" / "diagnostics"
    for code in CHECKS:
        page = (pages / f"{code}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {code}: ")
        title, severity = page.split(": ", 1)[1].split("\n\nSeverity: ")
        line = f"| [{code}]({code}.md) | {severity.split('.')[0]} | {title} |"
        assert line in (pages / "index.md").read_text(encoding="utf-8")
    assert [f"KP{place:03d}" for place in itertools.islice(itertools.count(1), len(CHECKS))] == [
        *CHECKS
    ]
