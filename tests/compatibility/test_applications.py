"""Every architecture of keras.applications: taps that "auto" finds, and a step that trains them.

The taps are listed in `applications.json`, written anew by
`python -m tests.compatibility.test_applications`. CI takes the smallest network of each family; all
of them, weekly or by hand: `pytest -m weekly tests/compatibility/test_applications.py`.
"""

import json
import pathlib

import keras
import numpy as np
import pytest

from keras_probes import LinearProbeCallback
from keras_probes.taps.graph import input_spec_of, trace
from keras_probes.taps.select import select

GOLDEN = pathlib.Path(__file__).with_name("applications.json")
CLASSES = 5
NAMES = sorted(
    name for name, make in vars(keras.applications).items() if callable(make) and name[0].isupper()
)
# Those that are built of different things are enough for every run.
DIFFERENT = {"ConvNeXtTiny", "MobileNetV3Small", "ResNet50", "Xception"}
EACH = [
    pytest.param(name, marks=pytest.mark.slow if name in DIFFERENT else pytest.mark.weekly)
    for name in NAMES
]


def build(name):
    """The architecture without weights, for the smallest images it takes."""
    keras.utils.clear_session()  # automatic names begin anew
    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, name)
    for size in (32, 71, 75):
        try:
            return make(weights=None, input_shape=(size, size, 3), classes=CLASSES)
        except ValueError as error:
            if "must be at least" not in str(error):
                raise
    raise AssertionError(f"{name} takes no small image")


def found(host):
    return [tap.name for tap in select(trace(host, input_spec_of(host)), "auto").taps]


@pytest.mark.parametrize("name", EACH)
def test_auto_finds_the_known_taps_and_a_step_trains_them(name):
    host = build(name)
    names = found(host)
    assert names == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *host.input_shape[1:])).astype("float32")
    # XLA takes minutes to compile some of these.
    host.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
    probes = LinearProbeCallback(reduce="gap")
    logs = host.fit(x, np.array([1, 3]), callbacks=[probes], verbose=0).history
    assert {f"probe_loss/{tap}" for tap in names} == {k for k in logs if "probe_loss" in k}
    assert all(np.isfinite(logs[f"probe_loss/{tap}"]).all() for tap in names)
    assert probes._online.probes.steps == 1
    assert all(np.any(probes.weights(tap)[1]) for tap in names)


if __name__ == "__main__":
    taps = {name: found(build(name)) for name in NAMES}
    GOLDEN.write_text(json.dumps(taps, indent=1) + "\n", encoding="utf-8")
