"""The probed layers as a graph of their own, against graphs drawn by hand."""

from made import results_of

from keras_probes.view.layout import folded, layout_of


def test_a_chain():
    layout = layout_of(results_of({"input": 0.3, "a": 0.2, "b": 0.1}))
    assert layout.inputs == {"input": (), "a": ("input",), "b": ("a",)}
    assert layout.columns == {"input": 0, "a": 1, "b": 2}
    assert layout.trunk == ("input", "a", "b")
    assert layout.ends == ["b"]


def test_results_without_a_graph_are_a_chain():
    results = results_of({"input": 0.3, "a": 0.2, "b": 0.1})
    results.graph = []
    assert layout_of(results).inputs == {"input": (), "a": ("input",), "b": ("a",)}


def test_what_is_not_probed_is_folded_and_a_skip_is_no_line_of_its_own():
    inputs = {"input": (), "conv": ("input",), "relu": ("conv",), "add": ("input", "relu"),
              "out": ("add",)}  # fmt: skip
    results = results_of(dict.fromkeys(["input", "relu", "out"], 0.1), inputs=inputs,
                         unprobed=["conv", "add"])  # fmt: skip
    assert layout_of(results).inputs == {"input": (), "relu": ("input",), "out": ("relu",)}
    every = folded(results.graph, {"input", "relu", "out"})
    assert every["out"] == ("input", "relu")


def test_branches_stand_beside_each_other_and_heads_are_ends():
    inputs = {
        "input": (), "a": ("input",), "left": ("a",), "left2": ("left",), "right": ("a",),
        "merge": ("left2", "right"), "aux": ("merge",), "c": ("merge",), "d": ("c",),
    }  # fmt: skip
    layout = layout_of(results_of(dict.fromkeys(inputs, 0.1), inputs=inputs))
    assert layout.columns["left"] == layout.columns["right"] == 2
    assert layout.columns["merge"] == 4
    assert layout.trunk == ("input", "a", "left", "left2", "merge", "c", "d")
    assert layout.ends == ["aux", "d"]
