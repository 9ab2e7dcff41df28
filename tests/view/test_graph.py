"""The coloured graph: what Graphviz was told, and the SVG read back."""

import re
import shutil
import xml.etree.ElementTree as ET

import keras
import pytest
from hosts import compiled
from keras import layers
from made import results_of
from PIL import Image

from keras_probes import LinearProbeCallback, plot_probed_model
from keras_probes.view.graph import color_scale, graph_of

pytestmark = pytest.mark.skipif(
    shutil.which("dot") is None, reason="Graphviz is not installed: apt-get install graphviz"
)
SVG = {"svg": "http://www.w3.org/2000/svg"}


def texts(svg):
    return [text.text.replace("\xa0", " ") for text in svg.iterfind(".//svg:text", SVG)]


def edges(svg):
    """Pairs of node names, as Graphviz titles them."""
    titles = (g.find("svg:title", SVG).text for g in svg.iterfind(".//svg:g[@class='edge']", SVG))
    return {tuple(title.split("->")) for title in titles}


def fill(svg, name):
    group = svg.find(f".//svg:g[@id='{name}']", SVG)
    return group.find("svg:path", SVG).get("fill")


@pytest.fixture
def probed(digits):
    """A host with a branch, a nested model and names that need care."""
    (x, y), validation = digits
    inputs = keras.Input((8, 8, 1), name="a <script> & b")
    inner = keras.Sequential([layers.Conv2D(3, 3, padding="same", name="conv")], name="inner")
    h = inner(inputs)
    h = layers.Add(name="add")([h, layers.Conv2D(3, 1, name="skip")(inputs)])
    out = layers.Dense(10, activation="softmax", name="out")(layers.Flatten()(h))
    host = compiled(keras.Model(inputs, out, name="host"))
    probes = LinearProbeCallback(["input", "inner/conv", "add", "out"], reduce="flatten")
    host.fit(x, y, epochs=2, validation_data=validation, callbacks=[probes], verbose=0)
    return host, probes.results


def test_layers_probes_colours_and_key(probed, tmp_path):
    host, results = probed
    path = plot_probed_model(host, results, tmp_path / "new" / "model.svg")
    svg = ET.fromstring(path.read_bytes())
    written = texts(svg)
    for name in ("input", "inner/conv", "skip", "add", "flatten", "out"):
        assert name in written
    assert "Conv2D  8 x 8 x 3" in written
    values = results.measured()["value"]
    color_of = color_scale(results, "error", "validation", None)
    for place, value in enumerate(values):
        assert f"{value:.3f}" in written
        assert fill(svg, f"layer-{place}").lower() == color_of(value)
    # The diode: a triangle and a bar on the edge to the probe.
    hanging = [g for g in svg.iterfind(".//svg:g[@class='edge']", SVG)
               if re.search(r"->p\d", g.find("svg:title", SVG).text)]  # fmt: skip
    assert len(hanging) == 4
    assert all(len(g.findall("svg:polygon", SVG)) >= 2 for g in hanging)
    assert ("n0", "n2") in edges(svg)  # the skip
    assert f"{min(values):.3f}" in "".join(written)


def test_the_condensed_form_has_nothing_but_probed_layers(probed, tmp_path):
    host, results = probed
    svg = ET.fromstring(
        plot_probed_model(host, results, tmp_path / "model.svg", condensed=True).read_bytes()
    )
    assert "flatten" not in texts(svg)
    assert {e for e in edges(svg) if "p" not in e[1]} == {
        ("n0", "n1"), ("n1", "n2"), ("n0", "n2"), ("n2", "n3")
    }  # fmt: skip


def test_moments_share_a_scale(probed):
    _, results = probed
    first, last = (graph_of(results, epoch=epoch).to_string() for epoch in (0, 1))
    assert first != last
    key = re.compile(r"[\d.]+ </TD><TD BGCOLOR.*?</TABLE>")
    assert key.search(first)[0] == key.search(last)[0]


def test_png(probed, tmp_path):
    host, results = probed
    with Image.open(plot_probed_model(host, results, tmp_path / "model.png")) as image:
        assert image.format == "PNG"
        assert min(image.size) > 200


def test_colours_go_from_blue_over_green_to_red():
    color_of = color_scale(results_of({"a": 0.9, "b": 0.1}), "error", "validation", None)
    low, middle, high = (
        tuple(int(color_of(v)[i : i + 2], 16) for i in (1, 3, 5)) for v in (0.1, 0.3, 0.9)
    )
    assert low[2] == max(low)
    assert middle[1] == max(middle)
    assert high[0] == max(high)


def test_bad_input(probed, tmp_path, monkeypatch):
    host, results = probed
    with pytest.raises(ValueError, match=r"end in \.svg or \.png.*model\.pdf"):
        plot_probed_model(host, results, tmp_path / "model.pdf")
    other = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="other")], name="other_host")
    with pytest.raises(ValueError, match="'other_host', which has no layer 'conv'"):
        plot_probed_model(other, results, tmp_path / "model.svg")
    results.graph = []
    with pytest.raises(ValueError, match="hold no graph"):
        plot_probed_model(host, results, tmp_path / "model.svg")
    assert not list(tmp_path.iterdir())


def test_without_graphviz_the_error_says_how_to_get_it(probed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImportError, match="apt-get install graphviz"):
        plot_probed_model(*probed, tmp_path / "model.svg")
