"""The public face: names, signature, what an import costs, and what the package speaks of."""

import inspect
import json
import subprocess
import sys

import keras
import pytest

import keras_probes
from keras_probes import LinearProbeCallback


def test_names():
    assert sorted(keras_probes.__all__) == [
        "AtPositions",
        "Examples",
        "FeatureStore",
        "Flatten",
        "GlobalAverage",
        "LinearProbeCallback",
        "ProbeResults",
        "RandomFeatures",
        "RayEngine",
        "SpatialPool",
        "Token",
        "diagnose",
        "extract_features",
        "fit_probes",
        "image_folder",
        "plot_probed_model",
    ]
    assert all(hasattr(keras_probes, name) for name in keras_probes.__all__)


def test_signature_of_the_callback():
    parameters = inspect.signature(LinearProbeCallback).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert defaults == {
        "layers": "auto",
        "reduce": "auto",
        "target": None,
        "task": None,
        "num_classes": None,
        "sample_weight": None,
        "optimizer": None,
        "metrics": ("error", "loss"),
        "mode": "shared",
        "every": "auto",
        "baselines": (),
        "log_dir": None,
        "update_freq": "epoch",
        "backup_dir": None,
        "seed": 0,
        "refit": 0.1,
        "model": None,
        "unpack": None,
        "data": None,
        "validation_data": None,
        "every_epochs": 1,
        "every_steps": None,
    }
    assert [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == ["layers"]
    assert issubclass(LinearProbeCallback, keras.callbacks.Callback)


def test_public_functions_have_docstrings():
    for name in keras_probes.__all__:
        public = getattr(keras_probes, name)
        assert inspect.getdoc(public)
        for attribute, member in vars(public).items():
            ours = not attribute.startswith("_") and inspect.isfunction(member)
            inherited = hasattr(keras.callbacks.Callback, attribute) or hasattr(
                keras.layers.Layer, attribute
            )
            if ours and not inherited:
                assert inspect.getdoc(getattr(public, attribute)), (name, attribute)


def test_an_import_loads_no_heavy_package():
    code = (
        "import sys, json, keras; before = set(sys.modules); import keras_probes;"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    loaded = json.loads(printed.splitlines()[-1])
    heavy = {
        "cloudpickle",
        "fsspec",
        "ray",
        "upath",
        "matplotlib",
        "plotly",
        "tensorboard",
        "zarr",
        "pydot",
        "jinja2",
        "sklearn",
        "scipy",
        "tqdm",
    }
    assert not heavy & set(loaded)


def test_another_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"jax.*KERAS_BACKEND=tensorflow"):
        LinearProbeCallback()
