"""What the documents tell a user to do works."""

import inspect
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from hosts import compiled

import keras_probes

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTED = ["LinearProbeCallback", "FeatureStore"]  # whose docstrings have code


def code_blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def scripts_called(path: pathlib.Path) -> list[str]:
    """The command lines that have one of our scripts do something, a loop's variable as 1."""
    blocks = code_blocks(path.read_text(encoding="utf-8"), "bash")
    lines = re.findall(r"python ((?:examples|benchmarks)/[^\n#]*)", "\n".join(blocks))
    return [re.sub(r"\$\w+", "1", line) for line in lines]


COMMANDS = [line for path in DOCUMENTS for line in scripts_called(path)]


def host() -> keras.Model:
    """The model the documents speak of: two named convolutions, their sum, and a classifier."""
    inputs = keras.Input((8, 8, 1))
    first = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="conv1")(inputs)
    second = keras.layers.Conv2D(4, 3, padding="same", name="conv2")(first)
    x = keras.layers.Add(name="block_add")([first, second])
    x = keras.layers.Flatten()(x)
    return compiled(keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x)))


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_code_blocks_run(path, digits, tmp_path, monkeypatch, capsys):
    blocks = code_blocks(path.read_text(encoding="utf-8"))
    if not blocks:
        return
    monkeypatch.chdir(tmp_path)
    (x, y), (x_val, y_val) = digits
    names = {"model": host(), "x": x, "y": y, "x_val": x_val, "y_val": y_val}
    names |= {"x_test": x_val, "y_test": y_val, "keras": keras, "np": np}
    exec("from keras_probes import *", names)
    for block in blocks:
        exec(compile(block, f"{path.name}", "exec"), names)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_code_blocks_of_docstrings_run(name, digits, tmp_path, monkeypatch):
    (x, y), (x_val, y_val) = digits
    monkeypatch.chdir(tmp_path)
    model = host()
    keras_probes.extract_features(model, (x, y), "features/", verbose=False)
    names = {"model": model, "x": x, "y": y, "x_val": x_val, "y_val": y_val}
    exec("from keras_probes import *", names)
    (block,) = code_blocks(inspect.getdoc(getattr(keras_probes, name)))
    exec(compile(block, name, "exec"), names)


# Begins a script, and ends it when it has read its command line, as each of several.
BEGUN = """
import argparse, pathlib, runpy, shlex, sys

script, *lines = sys.argv[1:]
parse = argparse.ArgumentParser.parse_args


def parse_all(self):
    for line in lines:
        parse(self, shlex.split(line))
    sys.exit(0)


argparse.ArgumentParser.parse_args = parse_all
sys.path[0] = str(pathlib.Path(script).parent)
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted({line.split()[0] for line in COMMANDS}))
def test_commands_have_options_that_the_script_takes(script):
    lines = [line.removeprefix(script) for line in COMMANDS if line.split()[0] == script]
    run = subprocess.run(
        [sys.executable, "-c", BEGUN, ROOT / script, *lines],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def run_example(name, directory, *arguments):
    """Runs an example in a process of its own, and returns what it printed."""
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / name, "--out", "out", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.slow
def test_the_example_ends_in_the_table_and_the_files(tmp_path):
    printed = run_example("mnist_convnet.py", tmp_path, "--quick")
    taps = ["input", "conv1_preact", "conv1_postact", "conv1_postpool", "conv2_preact"]
    taps += ["conv2_postact", "conv2_postpool", "fc1_preact", "fc1_postact", "logits"]
    table = printed.split("Error of the probes")[1]
    assert re.findall(r"^(\w+) +\d+ ", table, flags=re.MULTILINE) == taps
    errors = {
        name: float(before)
        for name, before in re.findall(r"^(\w+) .* (0\.\d+) +0\.\d+ +0\.\d+$", table, re.MULTILINE)
    }
    assert f"Random features take the error from {errors['input']:.1%} at the input to" in printed
    # Figure 3: random features already separate the digits better than pixels do.
    assert errors["conv2_postpool"] < errors["input"] < 0.15
    for name in (
        "after/probes.json",
        "before/probes.json",
        "errors.csv",
        "errors.png",
        "logs",
        "probes.html",
    ):
        assert (tmp_path / "out" / name).exists()


@pytest.mark.slow
def test_the_example_of_other_questions(tmp_path):
    printed = run_example("other_questions.py", tmp_path, "--quick")
    table = printed.split("Error on 1,000 test images")[1]
    errors = {
        tap: [float(error) for error in re.findall(r"\d\.\d+", row)]
        for tap, row in re.findall(r"^(\S+) +(.*)$", table, flags=re.MULTILINE)
    }
    digit, _, quarters, _, random = range(5)
    # What the classifier is not asked for, its last layer knows least of.
    assert errors["digits"][quarters] > 2 * errors["conv2"][quarters]
    assert errors["conv2"][digit] < errors["input"][digit]
    assert all(of_tap[random] > 0.8 for tap, of_tap in errors.items() if tap != "tap")
    assert (tmp_path / "out" / "probes.html").exists()


def bars(printed):
    """Error by layer, off the lines with bars that a fit ends in."""
    found = re.findall(r"^  (\w+) +(\d\.\d+) ", printed, flags=re.MULTILINE)
    return {tap: float(error) for tap, error in found}


@pytest.mark.slow
def test_the_example_of_a_skip_connection(tmp_path):
    printed = run_example("pathological_skip.py", tmp_path, "--quick")
    errors = bars(printed)
    # What the first half has lost is there again behind the skip connection.
    assert errors["hidden0"] + 0.1 < errors["hidden11"]
    assert errors["skip"] + 0.1 < errors["hidden11"]
    ends = re.findall(r"half ends at an error of (.*?), its weights moved by (.*?)%", printed)
    assert [float(error) for error, _ in ends] == [
        pytest.approx(errors[tap], abs=0.006) for tap in ("hidden11", "hidden23")
    ]
    first, second = (float(moved) for _, moved in ends)
    assert 0 < first < second / 2
    assert (tmp_path / "out" / "probes.html").exists()
    assert len(keras_probes.ProbeResults.load(tmp_path / "out").taps) == 27


@pytest.mark.slow
def test_a_healthy_network_of_the_same_shape_has_no_dead_segment(tmp_path):
    printed = run_example("pathological_skip.py", tmp_path, "--quick", "--healthy")
    errors = bars(printed)
    assert len(errors) == 26  # the input, each of 24 layers, the head
    assert max(errors.values()) < 0.3
    assert "KP001" not in printed


@pytest.mark.slow
def test_the_example_of_resnet50(tmp_path):
    printed = run_example("resnet50.py", tmp_path, "--quick")
    assert "of a network trained here; the paper's are of the ImageNet weights" in printed
    results = keras_probes.ProbeResults.load(tmp_path / "out")
    assert len(results.taps) == 17
    assert results.table()["converged"].all()
    paper = re.findall(r"^(input|conv\d_block\d_add) .* (\d\.\d+)$", printed, flags=re.MULTILINE)
    assert paper[0] == ("input", "0.990")
    assert paper[-1] == ("conv5_block3_add", "0.310")
    assert len(paper) == 17


@pytest.mark.slow
def test_the_example_of_resnet50_with_weights_and_a_folder_of_images(tmp_path):
    keras.applications.ResNet50(weights=None).save_weights(tmp_path / "some.weights.h5")
    rng = np.random.default_rng(0)
    for name, level in (("n01", 0), ("n02", 128)):  # a dark class and a light one
        (tmp_path / "images" / name).mkdir(parents=True)
        for place in range(30):
            image = rng.integers(level, level + 128, (80, 100, 3))
            keras.utils.save_img(tmp_path / "images" / name / f"{place}.png", image, scale=False)
    arguments = ["--images", "images", "--weights", "some.weights.h5"]
    printed = run_example("resnet50.py", tmp_path, *arguments)
    assert "of the weights 'some.weights.h5', on images; the paper's are" in printed
    results = keras_probes.ProbeResults.load(tmp_path / "out")
    assert results.table().loc["input", "test error"] == 0  # averages tell light from dark
    assert len(results.taps) == 17
    assert len(keras_probes.FeatureStore(tmp_path / "out" / "features")) == 60


@pytest.mark.weekly
def test_the_example_of_inception(tmp_path):
    printed = run_example("inception.py", tmp_path, "--quick")
    assert all(f"epoch {epoch}" in printed for epoch in (1, 2, 3, 4))
    assert re.search(r"^\(aux_head itself\) ", printed, flags=re.MULTILINE)
    assert re.search(r"auxiliary head's probe, [\d.]+%, is (not )?ahead of the main", printed)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"inception-{epoch}.svg" for epoch in (1, 2, 3, 4)} < written
    assert {"errors.png", "errors.csv", "probes.html"} < written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model", "taps"),
    [pytest.param("deeper.py", "resnet101", 34, marks=pytest.mark.weekly),
     ("deeper.py", "vgg16", 21), ("sequences.py", "lstm", 5), ("sequences.py", "transformer", 12)],
)  # fmt: skip
def test_the_examples_beyond_the_paper(tmp_path, script, model, taps):
    errors = bars(run_example(script, tmp_path, "--quick", "--model", model))
    assert len(errors) == taps
    assert len(keras_probes.ProbeResults.load(tmp_path / "out").taps) == taps
    assert (tmp_path / "out" / "probes.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "task", "taps"),
    [("which_digits.py", "multilabel", 9), ("where_is_it.py", "regression", 6),
     ("which_pixels.py", "positions", 10)],
)  # fmt: skip
def test_the_examples_of_other_tasks(tmp_path, script, task, taps):
    assert len(bars(run_example(script, tmp_path, "--quick"))) == taps
    results = keras_probes.ProbeResults.load(tmp_path / "out")
    of_positions = {tap.reduction for tap in results.taps} == {"AtPositions"}
    assert of_positions == (task == "positions")
    assert results.measured("error")["value"].notna().all()
    assert (tmp_path / "out" / "probes.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("script", "taps"), [("simclr.py", 4), ("masked_autoencoder.py", 3)])
def test_the_examples_of_pretraining(tmp_path, script, taps):
    printed = run_example(script, tmp_path, "--quick", "--labels", "300")
    assert f"the order of {taps} layers has tau" in printed
    directories = [tmp_path / "out" / name for name in ("pretrained", "twin")]
    pretrained, twin = map(keras_probes.ProbeResults.load, directories)
    assert [tap.name for tap in pretrained.taps] == [tap.name for tap in twin.taps]
    for results in (pretrained, twin):
        assert results.history().shape == (taps, 2)
        assert set(results.measured(split="train")["n"]) == {300}
        assert set(results.measured(split="validation")["n"]) == {600}
    last, first = (pretrained.measured(baseline=of)["value"] for of in (None, "initial"))
    assert (last != first).any()  # it has trained
    assert last.max() < 0.6  # guessing comes to 0.9
    assert (tmp_path / "out" / "errors.png").exists()


@pytest.mark.slow
def test_the_example_of_a_frozen_model(tmp_path, digits):
    host().save(tmp_path / "model.keras")
    (x, y), (x_test, y_test) = digits
    np.savez(tmp_path / "images.npz", x_train=x[..., 0] * 255, y_train=y,
             x_test=x_test[..., 0] * 255, y_test=y_test)  # fmt: skip
    arguments = ["--model", "model.keras", "--data", "images.npz", "--reduce", "auto",
                 "--workers", "1"]  # fmt: skip
    printed = run_example("frozen_model.py", tmp_path, *arguments)
    results = keras_probes.ProbeResults.load(tmp_path / "out")
    assert str(results) in printed
    assert results.table()["converged"].all()
    assert len(keras_probes.FeatureStore(tmp_path / "out" / "features-test")) == len(x_test)


@pytest.mark.slow
def test_the_example_of_a_cluster(tmp_path):
    printed = run_example("cluster.py", tmp_path, "--quick")
    assert "A node is lost." in printed
    assert "other than those of one process: 0" in printed
    assert "Measures are those of one process: True" in printed


def test_the_version_is_in_the_changelog():
    assert f"## {keras_probes.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
