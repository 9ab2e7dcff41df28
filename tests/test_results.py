"""The record: intervals, frame, table, files."""

import dataclasses
import hashlib
import json
import math
import os

import numpy as np
import pandas as pd
import pytest

from keras_probes import ProbeResults
from keras_probes.results.schema import COLUMNS, NUMBERS, Row, TapInfo, wilson_interval

TAPS = [
    TapInfo("input", 0, "Input", (8, 8, 1), "Flatten", 64),
    TapInfo("outer/conv <1>, x", 3, "Conv2D", (None, 8), "GlobalAverage", 8),
]


def row(**changes):
    values = {
        "epoch": 0,
        "step": 5,
        "split": "train",
        "target": None,
        "tap": "input",
        "metric": "error",
        "value": 0.25,
        "n": 40,
    }
    return Row(**{**values, **changes})


def interval(metric, value, n):
    low, high = wilson_interval(value, n) if metric == "error" else (math.nan, math.nan)
    return {"ci_low": low, "ci_high": high}


def filled(targets=(None,), baselines=(None,)):
    rows = [
        row(epoch=epoch, step=10 * epoch + 10, split=split, target=target, tap=tap.name,
            metric=metric, value=value / (epoch + 1), n=n, certificate=(math.nan, 1e-3)[epoch],
            baseline=baseline, **interval(metric, value / (epoch + 1), n))
        for epoch in range(2)
        for split, n in (("train", 400), ("validation", 100))
        for target in targets
        for baseline in baselines
        for metric, value in (("error", 0.3), ("loss", 1 / 3))
        for tap in TAPS
    ]  # fmt: skip
    return ProbeResults(TAPS, rows)


@pytest.mark.parametrize(
    ("error", "n", "low", "high"),
    [
        # Agresti & Coull 1998 and any calculator: k of n, Wilson, 95%.
        (0.0, 10, 0.0, 0.27753),
        (1.0, 10, 0.72247, 1.0),
        (0.5, 10, 0.23659, 0.76341),
        (0.1, 1000, 0.08290, 0.12015),
    ],
)
def test_wilson_interval(error, n, low, high):
    got = wilson_interval(error, n)
    assert got == pytest.approx((low, high), abs=1e-5)
    assert got[0] <= error <= got[1]


@pytest.mark.parametrize(("error", "n"), [(math.nan, 10), (0.5, 0)])
def test_no_interval_without_a_measure(error, n):
    assert all(math.isnan(bound) for bound in wilson_interval(error, n))


def test_frame_is_tidy():
    frame = filled().frame()
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == 16
    errors = frame[frame["metric"] == "error"]
    assert (errors["ci_low"] < errors["value"]).all()
    assert (errors["value"] < errors["ci_high"]).all()
    losses = frame[frame["metric"] == "loss"]
    assert losses["ci_low"].isna().all()
    assert set(frame.loc[frame["tap"] == TAPS[1].name, "depth"]) == {3}


def test_an_empty_record_has_its_columns():
    empty = ProbeResults()
    assert list(empty.frame().columns) == list(COLUMNS)
    assert "0 measures" in repr(empty)
    assert "0 measures" in empty._repr_html_()
    with pytest.raises(ValueError, match="Nothing to show"):
        empty.table()


def test_table_has_a_row_a_tap_in_graph_order():
    table = filled().table()
    assert list(table.index) == [tap.name for tap in TAPS]
    assert list(table["shape"]) == ["8 x 8 x 1", "? x 8"]
    assert list(table["validation error"]) == [0.15, 0.15]  # the latest epoch
    low, high = wilson_interval(0.15, 100)
    assert table["validation ±95%"].iloc[0] == pytest.approx((high - low) / 2)
    assert "test error" not in table
    assert "nonfinite" not in table


def test_history_has_a_column_an_epoch():
    results = filled()
    results.add([row(tap=TAPS[1].name, split="validation", epoch=1, value=0.01)])  # the latest
    results.add([row(split="validation", epoch=2, value=math.nan, n=0)])
    history = results.history()
    assert list(history.index) == [tap.name for tap in TAPS]
    assert list(history.columns) == [0, 1, 2]
    np.testing.assert_allclose(
        history.to_numpy(), [[0.3, 0.15, np.nan], [0.3, 0.01, np.nan]], equal_nan=True
    )
    assert results.history("loss", split="train").iloc[0, 1] == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="Nothing to show"):
        results.history("top5_error")


def test_table_of_another_epoch_and_metric():
    results = filled()
    assert list(results.table(epoch=0)["train error"]) == [0.3, 0.3]
    losses = results.table("loss")
    assert list(losses["train loss"]) == pytest.approx([1 / 6, 1 / 6])
    assert not any("±" in column for column in losses)


def test_table_marks_taps_with_examples_that_were_not_finite():
    results = filled()
    results.add([row(epoch=2, value=math.nan, n=0, nonfinite=40)])
    table = results.table()
    assert math.isnan(table.loc["input", "train error"])
    assert table.loc["input", "nonfinite"] == 40
    assert "nonfinite" in str(results)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"metric": "top5_error"}, ["top5_error", "error, loss"]),
        ({"epoch": 9}, ["epoch=9", "0, 1"]),
        ({"target": "digit"}, ["'digit'"]),
    ],
)
def test_table_errors_say_what_there_is(options, parts):
    with pytest.raises(ValueError, match="Received|Nothing to show") as raised:
        filled().table(**options)
    for part in parts:
        assert part in str(raised.value)


def test_several_targets_have_a_table_each():
    results = filled(("digit", "is_even"))
    with pytest.raises(ValueError, match="'digit', 'is_even'"):
        results.table()
    assert len(results.table(target="digit")) == 2
    assert "is_even" in str(results)
    assert "<h4>is_even</h4>" in results._repr_html_()


def test_baselines_are_columns_beside_their_target():
    results = filled(baselines=[None, "initial", "shuffled"])
    assert list(results.frame()["baseline"].unique()) == [None, "initial", "shuffled"]
    table = results.table()
    for split in ("train", "validation"):
        assert list(table[f"{split} initial"]) == list(table[f"{split} error"])
        assert list(table[f"{split} selectivity"]) == [0.0, 0.0]
    assert str(results).count("without features") == 1  # a baseline has no table of its own


def test_html_escapes_names():
    page = filled()._repr_html_()
    assert "outer/conv &lt;1&gt;, x" in page
    assert "<1>" not in page


@pytest.mark.parametrize("targets", [(None,), ("a", "b")])
def test_save_and_load(tmp_path, targets):
    results = filled(targets)
    results.add([row(value=math.nan, n=0, nonfinite=3), row(value=math.inf, metric="loss")])
    results.settings, results.versions = {"mode": "shared", "every": 1}, {"keras": "3.15.1"}
    results.save(tmp_path / "deep" / "results")
    loaded = ProbeResults.load(tmp_path / "deep" / "results")
    assert loaded.taps == results.taps
    assert (loaded.settings, loaded.versions) == (results.settings, results.versions)
    pd.testing.assert_frame_equal(loaded.frame(), results.frame(), check_exact=True)
    # All but the numbers, which may be NaN and so differ from themselves.
    numbers = dict.fromkeys(NUMBERS, 0)
    assert [dataclasses.replace(r, **numbers) for r in loaded.rows] == [
        dataclasses.replace(r, **numbers) for r in results.rows
    ]


def test_files_from_before_baselines_were_a_column(tmp_path):
    """They had the names of targets; intervals were not in them."""
    results = filled(("a", "a_initial", "a_shuffled", "b_initial"))
    results.settings = {"baselines": "initial"}
    results.save(tmp_path)
    manifest = json.loads((tmp_path / "probes.json").read_text())
    file = manifest["files"]["measures"]
    frame = pd.read_csv(tmp_path / file["name"]).drop(columns=["baseline", "ci_low", "ci_high"])
    frame.to_csv(tmp_path / file["name"], index=False)
    file["sha256"] = hashlib.sha256((tmp_path / file["name"]).read_bytes()).hexdigest()
    (tmp_path / "probes.json").write_text(json.dumps(manifest))
    loaded = ProbeResults.load(tmp_path)
    assert loaded.targets == ["a", "a_shuffled", "b"]
    expected = results.measured(target="a_initial")
    columns = ["value", "ci_low", "ci_high"]
    got = loaded.measured(target="a", baseline="initial")
    pd.testing.assert_frame_equal(got[columns], expected[columns])


def test_saving_again_replaces_and_leaves_one_file_of_measures(tmp_path):
    filled().save(tmp_path)
    more = filled()
    more.add([row(epoch=7)])
    more.save(tmp_path)
    assert len(list(tmp_path.glob("measures-*"))) == 1
    assert len(ProbeResults.load(tmp_path)) == 17


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_save_that_is_interrupted_leaves_the_earlier_one(tmp_path, monkeypatch, fails_at):
    filled().save(tmp_path)
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    more = filled()
    more.add([row(epoch=7)])
    with pytest.raises(KeyboardInterrupt):
        more.save(tmp_path)
    assert len(ProbeResults.load(tmp_path)) == 16


def test_damaged_or_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"probes\.json"):
        ProbeResults.load(tmp_path)
    filled().save(tmp_path)
    (measures,) = tmp_path.glob("measures-*")
    text = measures.read_text()
    measures.write_text(text.replace("0.3", "0.1", 1))
    with pytest.raises(ValueError, match="damaged.*checksum"):
        ProbeResults.load(tmp_path)
    measures.unlink()
    with pytest.raises(FileNotFoundError, match="measures-"):
        ProbeResults.load(tmp_path)
    manifest = json.loads((tmp_path / "probes.json").read_text())
    measures.write_text(text)
    (tmp_path / "probes.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match="format 1.*format 99"):
        ProbeResults.load(tmp_path)
    (tmp_path / "probes.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        ProbeResults.load(tmp_path)


def test_numbers_survive_to_the_last_bit(tmp_path):
    values = np.random.default_rng(0).random(200) * 10.0 ** np.arange(-100, 100)
    results = ProbeResults(TAPS, [row(metric="loss", value=float(v)) for v in values])
    results.save(tmp_path)
    assert [r.value for r in ProbeResults.load(tmp_path).rows] == values.tolist()
