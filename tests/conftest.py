import os
import shutil

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core is each worker's
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ.setdefault(threads, "1")

import keras
import numpy as np
import pytest
from hypothesis import Phase, settings
from selenium import webdriver
from sklearn.datasets import load_digits

# Each example is a random host that is trained twice: what fails is shown as it was found.
_RANDOM = {"deadline": None, "phases": (Phase.explicit, Phase.reuse, Phase.generate)}
settings.register_profile("few", max_examples=4, derandomize=True, **_RANDOM)
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


@pytest.fixture
def browser():
    """A headless Chromium, driven by Selenium."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1400,1000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as started:
        yield started
