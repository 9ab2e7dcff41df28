"""Each benchmark runs, at a size that measures nothing, and prints what it promises."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

pytestmark = pytest.mark.slow  # CI runs them

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Real images as the scripts take them: 32x32, of 0..255."""
    bunch = load_digits()
    x = np.kron(bunch.images, np.ones((4, 4))).astype("uint8")[..., None].repeat(3, axis=3) * 15
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x_train=x[:600], y_train=bunch.target[:600])
    return path


def run(script, *arguments):
    command = [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)]
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=given)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_overhead_of_a_step():
    printed = run(
        "overhead.py", "step", "--host", "convnet", "--steps", 4, "--rounds", 1,
        "--every", 2,
    )  # fmt: skip
    for name in ("bare", "shared", "isolated", "kept", "by hand"):
        assert f"\n{name} " in f"\n{printed}"
    assert "GFLOP a step" in printed
    assert "refit" in printed


@pytest.mark.parametrize("what", ["first", "memory"])
def test_overhead_of_a_process(what):
    options = ("--host", "convnet", "--steps", 4, "--rounds", 1)
    printed = run("overhead.py", what, *options, "--variants", "bare", "shared")
    assert "\nshared " in printed
    assert "GFLOP a step" in printed


@pytest.mark.parametrize(
    ("host", "how"),
    [("mnist", ("--reduce", "gap")),
     pytest.param("cifar", ("--reduce", "random", "--mode", "isolated"), marks=pytest.mark.weekly),
     pytest.param("cifar", ("--reduce", "gap", "--refit", "0"), marks=pytest.mark.weekly)],
)  # fmt: skip
def test_tracking(images, tmp_path, host, how):
    figure = tmp_path / "gaps.png"
    options = ("--data", images, "--epochs", 2, "--limit", 400, "--figure", figure)
    printed = run("tracking.py", host, *how, *options)
    for name in ("first epoch, median", "later, worst", "tau, lowest", "BatchNormalization, Dense"):
        assert name in printed
    for tap in {"mnist": ("pool2", "fc2"), "cifar": ("stem_norm", "logits")}[host]:
        of_each_kind = re.findall(rf"^{tap} ", printed, flags=re.MULTILINE)
        assert len(of_each_kind) == 3
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize(
    "options", [pytest.param(("--jit",), marks=pytest.mark.weekly), ("--classes", "20")]
)
def test_fit_cost(options):
    size = ("--images", 96, "--validation", 16, "--epochs", 2, "--rounds", 1)
    printed = run("fit_cost.py", "convnet", *size, *options, "--variants", "auto", "online")
    for variant in ("auto", "online"):
        assert re.search(rf"^convnet, {variant}: [\d.]+ \(.*CPU seconds$", printed, re.MULTILINE)
    refit = re.search(r"^auto: .* the last refit on (\d+) examples", printed, re.MULTILINE)
    assert 10 <= int(refit[1]) <= 96


def test_solver(images):
    printed = run("solver.py", "--data", images, "--rounds", 1)
    assert "in all: ratio" in printed


@pytest.mark.parametrize(
    ("what", "size", "promised"),
    [
        ("extraction", ("--images", 8), "images/s"),
        ("large", ("--gigabytes", 0.04), "from disk over"),
    ],
)
def test_offline(what, size, promised):
    assert promised in run("offline.py", what, *size, "--rounds", 1)


def test_import():
    assert run("overhead.py", "import", "--rounds", 1).startswith("import keras ")


def test_scale():
    printed = run("scale.py", "--images", 2048, "--rounds", 1, "--parts", "extraction", "storage")
    for name in ("extraction, one process", "extraction, S3's", "reading"):
        assert re.search(rf"^{name}.*: [\d.]+ \(", printed, re.MULTILINE), printed
    # 2,048 images of 28 x 28, four bytes each: the workers read each of them once.
    assert "bytes read by workers: 6,422,528, parts" in printed


@pytest.mark.weekly
def test_scale_of_fits_and_units():
    printed = run("scale.py", "--images", 2048, "--rounds", 1, "--parts", "fits", "overhead")
    assert re.search(r"^16 fits.*: [\d.]+ \(", printed, re.MULTILINE), printed
    assert re.search(r"^3 units.*: [\d.]+ \(", printed, re.MULTILINE), printed
