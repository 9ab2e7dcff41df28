"""Extraction and fits on engines: the bytes and numbers of one process, whatever happens."""

import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import keras
import numpy as np
import pytest
import ray
import tensorflow as tf
from hosts import dense_net
from offline import elsewhere

from keras_probes import FeatureStore, RayEngine, extract_features, fit_probes
from keras_probes.offline import worker
from keras_probes.offline.store import JOBS

ENGINES = {
    "threads": lambda: ThreadPoolExecutor(2),
    "processes": lambda: ProcessPoolExecutor(2),
    "ray": lambda: RayEngine(2),
}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Ray, whose workers import what tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
        yield
        ray.shutdown()


def contents(path):
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def extract(path, given=None, model=None, **options):
    options = {"layers": ["input", "dense"], "batch_size": 50, "num_classes": 10, **options}
    given = elsewhere.arrays() if given is None else given
    return extract_features(model or dense_net(), given, path, verbose=False, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of an extraction in one process."""
    path = tmp_path_factory.mktemp("stores") / "whole"
    extract(path)
    return path


DATA = {
    "arrays": elsewhere.arrays,
    "numbers": elsewhere.Batches,
    "tf.data": lambda: tf.data.Dataset.from_tensor_slices(elsewhere.arrays()).batch(50),
    "in order": elsewhere.in_order,
}


class Recording(ThreadPoolExecutor):
    """An executor that keeps what it was given."""

    def __init__(self):
        super().__init__(1)
        self.calls = []

    def submit(self, function, *args):
        self.calls.append(args)
        return super().submit(function, *args)


@pytest.mark.parametrize("kind", DATA)
def test_any_data_make_the_bytes_of_one_process(kind, whole, tmp_path):
    extract(tmp_path / "s", DATA[kind](), engine=ThreadPoolExecutor(2))
    assert contents(tmp_path / "s") == contents(whole)


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_other_processes_make_the_same_bytes_and_read_their_own_batches(engine, whole, tmp_path):
    (tmp_path / "marks").mkdir()
    extract(tmp_path / "s", elsewhere.Batches(tmp_path / "marks"), engine=ENGINES[engine]())
    assert contents(tmp_path / "s") == contents(whole)
    read = {
        int(f.name): list(map(int, f.read_text().split())) for f in (tmp_path / "marks").iterdir()
    }
    here = read.pop(os.getpid())
    assert set(here) <= {0, 1, 42}  # the first ones, for their shapes, and the last, for its size
    assert sum(map(len, read.values())) == 43
    assert set().union(*read.values()) == set(range(43))


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_fits_are_those_of_one_process_bit_for_bit(engine, whole, capfd):
    alone = fit_probes(FeatureStore(whole), verbose=False)
    elsewhere_ = fit_probes(FeatureStore(whole), engine=ENGINES[engine]())
    assert "2/2" in capfd.readouterr().err
    assert elsewhere_.frame().equals(alone.frame())
    assert [tap.name for tap in elsewhere_.taps] == ["input", "dense"]
    for key, probe in alone.probes.items():
        np.testing.assert_array_equal(elsewhere_.probes[key].kernel, probe.kernel)
        np.testing.assert_array_equal(elsewhere_.probes[key].bias, probe.bias)
    for key, pairs in alone.pairs.items():
        np.testing.assert_array_equal(elsewhere_.pairs[key].moments, pairs.moments)


def test_the_longest_fits_come_first_and_results_in_order(tmp_path):
    target = {"digit": None, "even": lambda x, y: y % 2}
    store = extract(
        tmp_path / "s", layers=["dense", "out", "input"], target=target,
        num_classes={"digit": 10, "even": 2},
    )  # fmt: skip
    engine = Recording()
    results = fit_probes(store, engine=engine, verbose=False)
    assert [call[1:] for call in engine.calls] == [
        ("input", "digit"), ("dense", "digit"), ("input", "even"), ("out", "digit"),
        ("dense", "even"), ("out", "even"),
    ]  # fmt: skip
    assert [tap.name for tap in results.taps] == ["input", "dense", "out"]
    assert results.frame().equals(fit_probes(store, verbose=False).frame())


@pytest.mark.parametrize("kind", ["numbers", "in order"])
def test_an_executor_of_another_library(kind, whole, tmp_path):
    """Its processes are its own, so that all that they are given is pickled."""
    loky = pytest.importorskip("joblib.externals.loky")
    extract(tmp_path / "s", DATA[kind](), engine=loky.get_reusable_executor(1))
    assert contents(tmp_path / "s") == contents(whole)


@pytest.mark.parametrize("sizes", [[50] * 42 + [30], [700, 700, 730], [30] * 71, [2000, 130]])
def test_batches_that_come_in_order_may_be_of_any_size(sizes, tmp_path):
    def generator():
        x, y = elsewhere.arrays()
        for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
            yield x[start : start + size], y[start : start + size]

    extract(tmp_path / "here", generator())
    extract(tmp_path / "s", generator(), engine=ThreadPoolExecutor(2))
    assert contents(tmp_path / "s") == contents(tmp_path / "here")


def test_an_executor_that_is_broken_off_goes_on_where_it_was(whole, tmp_path):
    """In one process it ends what workers began, and the other way about."""
    with pytest.raises(RuntimeError, match=r"Rows 1,050 to 2,099 .* 3 tries.*OSError: batch 25 is"):
        extract(tmp_path / "s", elsewhere.Batches(bad=25), engine=ThreadPoolExecutor(2))
    assert not FeatureStore(tmp_path / "s").complete
    kept = tmp_path / "s" / "tap_000_input" / "c" / "0" / "0"
    written = kept.stat().st_mtime_ns
    extract(tmp_path / "s", engine=ThreadPoolExecutor(2))
    assert contents(tmp_path / "s") == contents(whole)
    assert kept.stat().st_mtime_ns == written


def test_a_damaged_chunk_is_computed_anew(whole, tmp_path):
    extract(tmp_path / "s")
    file = tmp_path / "s" / "tap_000_input" / "c" / "1" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    extract(tmp_path / "s", elsewhere.Batches(), engine=ThreadPoolExecutor(2))
    assert contents(tmp_path / "s") == contents(whole)


def test_other_labels_are_refused(whole):
    x, y = elsewhere.arrays()
    before = contents(whole)
    with pytest.raises(RuntimeError, match="labels of chunk 2 differ"):
        extract(whole, (x, np.r_[y[:-1], (y[-1] + 1) % 10]), engine=ThreadPoolExecutor(2))
    assert contents(whole) == before


@pytest.mark.parametrize("engine", ["processes", pytest.param("ray", marks=pytest.mark.weekly)])
def test_a_worker_that_is_killed_in_the_middle_of_a_chunk(engine, whole, tmp_path):
    (tmp_path / "marks").mkdir()
    data = elsewhere.Batches(tmp_path / "marks", killer=25)
    extract(tmp_path / "s", data, engine=ENGINES[engine]())
    assert (tmp_path / "marks" / "killed").exists()
    assert contents(tmp_path / "s") == contents(whole)


def driver(path, rest):
    script = f"""
        import os, sys
        sys.path[:0] = {sys.path!r}
        from concurrent.futures import ProcessPoolExecutor
        from keras_probes import RayEngine
        from offline import elsewhere
        from offline.test_elsewhere import extract

        if __name__ == "__main__":
            {rest}
    """
    file = path.with_suffix(".py")
    file.write_text(textwrap.dedent(script))
    return subprocess.Popen([sys.executable, file], stderr=subprocess.PIPE, text=True)


def test_a_driver_that_is_killed_is_called_again(whole, tmp_path):
    path = tmp_path / "s"
    rest = f"extract({str(path)!r}, elsewhere.Batches(), engine=ProcessPoolExecutor(1))"
    run = driver(path, rest)
    first = path / "tap_001_dense" / "c" / "0" / "0"
    while not first.exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert list((path / JOBS).iterdir())  # it left its job
    extract(path, elsewhere.Batches(), engine=ThreadPoolExecutor(2))
    assert contents(path) == contents(whole)


def test_two_drivers_at_a_time(whole, tmp_path):
    path = tmp_path / "s"
    rest = f"extract({str(path)!r}, elsewhere.in_order(), engine=ProcessPoolExecutor(1))"
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    both = [driver(tmp_path / str(i) / "script", rest) for i in range(2)]
    assert [run.wait() for run in both] == [0, 0], [run.stderr.read() for run in both]
    assert contents(path) == contents(whole)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (elsewhere.fileless, ValueError, "can be saved.*not to a file.*Pass a function"),
        (elsewhere.unloadable, RuntimeError, "could not load.*Pass a function"),
    ],
)
def test_a_host_that_no_worker_can_load_is_built_there(build, error, message, tmp_path):
    extract(tmp_path / "here", model=build())
    with pytest.raises(error, match=message):
        extract(tmp_path / "s", model=build(), engine=ThreadPoolExecutor(2))
    extract(tmp_path / "s", model=build, engine=ThreadPoolExecutor(2))
    assert contents(tmp_path / "s") == contents(tmp_path / "here")


def test_a_host_by_its_path(whole, tmp_path):
    dense_net().save(tmp_path / "host.keras")
    for engine in (None, ThreadPoolExecutor(2)):
        path = tmp_path / str(engine is None)
        extract(path, model=str(tmp_path / "host.keras"), engine=engine)
        assert contents(path) == contents(whole)


def bad():
    lock = threading.Lock()
    return {
        "builder": (
            {"model": elsewhere.another_each_time},
            RuntimeError,
            "is of something else: its host.sha256",
        ),
        "no model": ({"model": "dense".upper}, TypeError, "function that returns a model.*'DENSE'"),
        "pickle": (
            {"target": lambda x, y: y + 0 * bool(lock)},
            TypeError,
            "can't be pickled.*lock",
        ),
        "sizes": (
            {"given": elsewhere.Batches(sizes=[50, 60, *[50] * 40, 20])},
            RuntimeError,
            "batches of one size.*60 examples in batch 1, 50 in batch 0",
        ),
        "labels": (
            {"given": (elsewhere.arrays()[0], elsewhere.arrays()[1] + 1)},
            RuntimeError,
            "integers from 0 to 9",
        ),
        "engine": ({"engine": 4}, TypeError, "Expected `engine` to be None"),
    }


@pytest.mark.parametrize("case", bad())
def test_bad_input(case, tmp_path):
    options, error, message = bad()[case]
    with pytest.raises(error, match=message):
        extract(tmp_path / "s", **{"engine": ThreadPoolExecutor(2), **options})
    assert not (tmp_path / "s" / JOBS).exists()


def test_workers_with_other_libraries_are_refused(tmp_path, monkeypatch):
    here = itertools.chain([{"keras": "1"}], itertools.repeat({"keras": "2"}))
    monkeypatch.setattr(worker, "_versions", here.__next__)
    with pytest.raises(RuntimeError, match="{'keras': '1'} there, {'keras': '2'} here. Install"):
        extract(tmp_path / "s", engine=ThreadPoolExecutor(1))


def test_a_store_that_another_version_began_is_refused(tmp_path):
    with pytest.raises(RuntimeError):
        extract(tmp_path / "s", elsewhere.Batches(bad=25), engine=ThreadPoolExecutor(2))
    file = tmp_path / "s" / "zarr.json"
    file.write_text(file.read_text().replace(f'"keras": "{keras.__version__}"', '"keras": "3.0"'))
    before = contents(tmp_path / "s")
    with pytest.raises(ValueError, match="versions.keras is '3.0'"):
        extract(tmp_path / "s", elsewhere.Batches(), engine=ThreadPoolExecutor(2))
    assert contents(tmp_path / "s") == before


def test_one_fit_that_fails_loses_no_other(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s")
    file = tmp_path / "s" / "tap_000_input" / "c" / "1" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    alone = fit_probes(FeatureStore(whole), taps=["dense"], verbose=False)
    for engine in (None, ThreadPoolExecutor(2)):
        with pytest.warns(UserWarning, match="No probe of tap 'input'.*Chunk 1 .* is damaged"):
            results = fit_probes(FeatureStore(tmp_path / "s"), engine=engine, verbose=False)
        assert "is damaged" in results.left_out["input"]
        assert results.frame().equals(alone.frame())
        with pytest.raises(ValueError, match="Chunk 1 .* is damaged"):
            fit_probes(FeatureStore(tmp_path / "s"), taps=["input"], engine=engine, verbose=False)
