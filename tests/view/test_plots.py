"""Figures: the data they draw, and that names are where they belong."""

import itertools

import matplotlib
import numpy as np
import pytest
from made import results_of

from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import Details, Probe, wilson_interval
from keras_probes.view.plots import (
    MOST_LABELS,
    plot_confusion,
    plot_curves,
    plot_depth,
    plot_heatmap,
    plot_per_class,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BRANCHES = {"input": (), "left": ("input",), "right": ("input",), "out": ("left", "right")}
ERRORS = {"input": [0.5, 0.45], "left": [0.4, 0.2], "right": [0.3, 0.25], "out": [0.2, 0.1]}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def drawn(ax):
    """Places and heights of the markers, by the label in the legend."""
    return {
        container.get_label(): (container[0].get_xdata(), container[0].get_ydata())
        for container in ax.containers
    }


def test_error_against_depth_with_its_interval_and_the_hosts_own():
    ax = results_of(ERRORS, inputs=BRANCHES, host=0.07).plot()
    x, y = drawn(ax)["epoch 2"]
    np.testing.assert_array_equal(x, [0, 1, 1, 2])  # branches beside each other
    np.testing.assert_allclose(y, [0.45, 0.2, 0.25, 0.1])
    assert labels(ax.xaxis) == ["input", "left | right", "out"]
    (bars,) = ax.containers[0][2]
    ends = np.array([[segment[0, 1], segment[1, 1]] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, [wilson_interval(e, 1000) for e in (0.45, 0.2, 0.25, 0.1)])
    lines = {tuple(line.get_xdata()): list(line.get_ydata()) for line in ax.lines[:4]}
    assert lines[1, 2] == [0.25, 0.1]
    assert sum(len(line.get_xdata()) == 2 and line.get_linestyle() == "-" for line in ax.lines) == 4
    host = next(line for line in ax.lines if line.get_label() == "the model itself")
    assert list(host.get_ydata()) == [0.07, 0.07]
    assert "guessing" not in {line.get_label() for line in ax.lines}  # far above all
    assert ax.get_ylabel() == "validation error"


def test_several_moments_on_axes_given():
    _, ax = plt.subplots()
    results = results_of(ERRORS, inputs=BRANCHES, majority=0.6)
    assert plot_depth(results, ax, epochs=[0, 1]) is ax
    assert list(drawn(ax)) == ["epoch 1", "epoch 2"]
    np.testing.assert_allclose(drawn(ax)["epoch 1"][1], [0.5, 0.4, 0.3, 0.2])
    assert "guessing" in {line.get_label() for line in ax.lines}


def test_two_results_on_one_axis_are_told_apart():
    _, ax = plt.subplots()
    for name, host in (("before", 0.9), ("after", 0.1)):
        plot_depth(results_of(ERRORS, host=host), ax, label=name)
    assert list(drawn(ax)) == ["before", "after"]
    assert ax.containers[0][0].get_color() != ax.containers[1][0].get_color()
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(names) == ["after", "before", "the model itself"]


def test_probes_of_a_finished_model_have_no_epoch():
    results = results_of({"input": [0.5], "out": [0.1]})
    results.probes = {(None, tap): Probe(np.eye(2), np.zeros(2)) for tap in ("input", "out")}
    assert list(drawn(results.plot())) == ["fitted probes"]


def test_curves_over_epochs():
    ax = plot_curves(results_of(ERRORS, host=0.07))
    curves = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in ax.lines}
    assert curves == {
        "input": (1, 2, 0.5, 0.45), "left": (1, 2, 0.4, 0.2), "right": (1, 2, 0.3, 0.25),
        "out": (1, 2, 0.2, 0.1), "the model itself": (1, 2, 0.07, 0.07),
    }  # fmt: skip
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(curves)


def test_heat_map():
    ax = plot_heatmap(results_of(ERRORS))
    (mesh,) = ax.collections
    np.testing.assert_allclose(mesh.get_array(), list(ERRORS.values()))
    assert labels(ax.yaxis) == list(ERRORS)


def test_a_hundred_layers_are_legible():
    errors = {f"a_layer_with_a_long_name_{k}": [0.9 - k / 200] * 3 for k in range(100)}
    results = results_of(errors)
    for plot in (plot_depth, plot_curves, plot_heatmap):
        ax = plot(results)
        ax.figure.canvas.draw()
        for axis in (ax.xaxis, ax.yaxis):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
            assert len(boxes) <= MOST_LABELS
            for one, other in itertools.pairwise(boxes):
                assert not one.overlaps(other)
        assert ax.get_legend() is None or len(ax.get_legend().get_texts()) < 5


@pytest.mark.parametrize("plot", [plot_depth, plot_curves, plot_heatmap])
def test_what_was_not_measured_is_an_error(plot):
    with pytest.raises(ValueError, match="Nothing to show for metric='loss'"):
        plot(results_of(ERRORS), metric="loss")
    with pytest.raises(ValueError, match="Nothing to show"):
        plot(ProbeResults())


def test_a_single_epoch_is_a_point():
    ax = plot_curves(results_of({"input": 0.5, "out": 0.2}))
    assert all(line.get_marker() == "o" for line in ax.lines)


def with_counts(matrix):
    """Results of one tap with a confusion matrix."""
    results = results_of({"input": 0.3})
    results.details[None, None, "validation"] = Details(0, {"input": {"confusion": matrix}})
    return results


def test_errors_by_class_the_highest_first():
    matrix = np.array([[8.0, 2, 0], [0, 10, 0], [5, 0, 5]])
    results = with_counts(matrix)
    results.class_names = ["cat", "dog", "eel"]
    ax = plot_per_class(results, "input")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["dog", "cat", "eel"]
    (points,) = ax.containers
    np.testing.assert_allclose(points.lines[0].get_xdata(), [0.0, 0.2, 0.5])
    assert ax.get_ylabel() == "class"


def test_confusion_is_by_shares_with_counts_where_they_are_legible():
    matrix = np.array([[8.0, 2], [1, 9]])
    ax = plot_confusion(with_counts(matrix), "input")
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.8, 0.2], [0.1, 0.9]])
    assert [text.get_text() for text in ax.texts] == ["8", "2", "1", "9"]
    many = plot_confusion(with_counts(np.eye(30)), "input")
    assert not many.texts
    with pytest.raises(ValueError, match="Unknown tap"):
        plot_confusion(with_counts(matrix), "other")
