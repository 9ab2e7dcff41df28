import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import pytest
from hypothesis import Phase, settings
from sklearn.datasets import load_digits

# Each example is a random host that is trained twice: what fails is shown as it was found.
_RANDOM = {"deadline": None, "phases": (Phase.explicit, Phase.reuse, Phase.generate)}
settings.register_profile("few", max_examples=15, derandomize=True, **_RANDOM)
settings.register_profile("many", max_examples=200, **_RANDOM)
settings.load_profile("few")


@pytest.fixture(autouse=True)
def _same_seeds():
    """Every test starts from the same seeds and automatic names."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(7)


@pytest.fixture(scope="session")
def digits():
    """Real images: x float32 in 0..1, shape (n, 8, 8, 1), and y int64; 320 and 160 of them."""
    bunch = load_digits()
    x, y = bunch.images[..., None].astype("float32") / 16, bunch.target
    order = np.random.default_rng(0).permutation(len(x))[:480]
    return (x[order[:320]], y[order[:320]]), (x[order[320:]], y[order[320:]])
