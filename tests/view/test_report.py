"""The report: its file read, and the page as a real browser has it."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from made import results_of
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import Node, Row, TapInfo
from keras_probes.view.graph import color_scale

NASTY = '<script>alert("1")</script>'
ERRORS = {"input": [0.8, 0.7], "a/b <i>": [0.6, 0.3], "out": [0.5, 0.1]}


@pytest.fixture
def results():
    made = results_of(ERRORS, host=0.15, certificate=1e-3)
    made.settings = {"model": "net & co", "mode": "shared"}
    made.versions = {"keras_probes": "0.1.0"}
    return made


def numbers(page):
    return [
        json.loads(found)
        for found in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)
    ]


def test_one_file_with_everything(results, tmp_path):
    path = results.report(tmp_path / "new" / "probes.html")
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 6e6
    assert "<title>Linear probes of net &amp; co</title>" in page
    (data,) = numbers(page)
    assert data["taps"] == list(ERRORS)
    np.testing.assert_allclose(np.transpose(data["values"]), list(ERRORS.values()))
    for moment, epoch in enumerate(data["epochs"]):
        measured = results.measured(epoch=epoch)
        np.testing.assert_allclose(data["low"][moment], measured["ci_low"], atol=1e-5)
        np.testing.assert_allclose(data["high"][moment], measured["ci_high"], atol=1e-5)
    for finding in results.diagnose():
        assert finding.code in page
    assert "<td>0.3000</td>" in page
    assert '<dt class="soft">mode</dt><dd>shared</dd>' in page


def test_nothing_is_fetched(results, tmp_path):
    page = results.report(tmp_path / "probes.html").read_text(encoding="utf-8")
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=(?!["']#)|url\(|@import""", markup)
    assert "default-src 'none'" in markup


def test_names_are_escaped(tmp_path):
    rows = [
        Row(epoch=0, step=1, split="validation", target=NASTY, tap="input", metric="error",
            value=0.5, n=10)
    ]  # fmt: skip
    taps = [TapInfo("input", 0, NASTY, (3,), "Flatten", 3)]
    made = ProbeResults(
        taps, rows, graph=[Node("input", NASTY, (3,), ())], settings={"model": NASTY}
    )
    page = made.report(tmp_path / "probes.html").read_text(encoding="utf-8")
    assert NASTY not in page
    assert page.count("&lt;script&gt;alert(") >= 3
    assert numbers(page)[0]["about"] == [f"{NASTY}, 3"]


def test_unknown_values_are_gaps(tmp_path):
    made = results_of({"input": [0.5, np.nan], "out": [0.2, 0.1]})
    (data,) = numbers(made.report(tmp_path / "probes.html").read_text(encoding="utf-8"))
    assert data["values"] == [[0.5, 0.2], [None, 0.1]]
    assert data["host"] == [None, None]


def test_other_metric_and_title(tmp_path):
    made = results_of({"input": 1.2, "out": 0.3})
    rows = [Row(**{**vars(row), "metric": "loss"}) for row in made.rows]
    made = ProbeResults(made.taps, rows, graph=made.graph)
    page = made.report(tmp_path / "p.html", metric="loss", title="Mine").read_text(encoding="utf-8")
    assert "<title>Mine</title>" in page
    assert numbers(page)[0]["metric"] == "loss, nats"


def test_without_graphviz_the_rest_is_there(results, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    page = results.report(tmp_path / "probes.html").read_text(encoding="utf-8")
    assert "Graphviz's program <code>dot</code>" in page
    assert numbers(page)


def test_bad_input(results, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Nothing to show for metric='top5_error'"):
        results.report(tmp_path / "probes.html", metric="top5_error")
    with pytest.raises(ValueError, match="Nothing to show"):
        ProbeResults().report(tmp_path / "probes.html")
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install .*view"):
        results.report(tmp_path / "probes.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_in_a_browser(results, tmp_path, browser):
    path = results.report(tmp_path / "probes.html")
    browser.get(path.as_uri())
    assert browser.find_elements(By.CSS_SELECTOR, "#s0-depth .main-svg")
    assert browser.find_elements(By.CSS_SELECTOR, "#s0-curves .main-svg")
    names = [t.text for t in browser.find_elements(By.CSS_SELECTOR, "#s0-depth .xtick text")]
    assert names == list(ERRORS)

    color_of = color_scale(results, "error", "validation", None)

    def shown():
        fill = browser.find_element(By.CSS_SELECTOR, "#s0-layer-2 path").get_attribute("fill")
        return (
            browser.find_element(By.ID, "s0-shown").text,
            browser.find_element(By.CSS_SELECTOR, "#s0-probe-2 text").text,
            fill.lower(),
        )

    assert shown() == ("2 of 2", "0.100", color_of(0.1))
    slider = browser.find_element(By.ID, "s0-epoch")
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown() == ("1 of 2", "0.500", color_of(0.5))
    assert slider.get_attribute("aria-valuetext") == "epoch 1 of 2"
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_keyboard_and_screen_reader(results, tmp_path, browser):
    browser.get(results.report(tmp_path / "probes.html").as_uri())
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "skip"
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    found = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"]
    }
    assert {("slider", "Epoch"), ("heading", "Findings"), ("region", "Table")} <= found
    assert {role for role, _ in found} >= {"main", "table", "rowheader", "columnheader"}
    for role in ("slider", "region", "image", "link"):
        assert all(name for kind, name in found if kind == role), role


@pytest.mark.slow
def test_on_a_phone(results, tmp_path, browser):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(results.report(tmp_path / "probes.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    for text in browser.find_elements(By.CSS_SELECTOR, "p, li, figcaption, h4"):
        assert text.rect["x"] >= 0
        assert text.rect["x"] + text.rect["width"] <= 360
