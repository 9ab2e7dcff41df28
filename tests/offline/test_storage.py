"""Stores and results behind URLs: a real S3 server on this machine, and fsspec's memory."""

import pathlib
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
from hosts import dense_net
from moto.server import ThreadedMotoServer
from offline import elsewhere
from upath import UPath

from keras_probes import FeatureStore, ProbeResults, extract_features, fit_probes
from keras_probes.storage import location, replacing


@pytest.fixture(scope="module")
def bucket():
    """The URL of a bucket."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        UPath("s3://bucket").fs.mkdir("bucket")
        yield "s3://bucket"
    server.stop()


def contents(path):
    path = location(path)
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def extract(path, given=None, model=None, **options):
    options = {"layers": ["input", "dense"], "batch_size": 50, "num_classes": 10, **options}
    given = elsewhere.arrays() if given is None else given
    return extract_features(model or dense_net(), given, path, verbose=False, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a store on a disk."""
    path = tmp_path_factory.mktemp("stores") / "whole"
    extract(path)
    return path


@pytest.fixture(params=["s3", "memory"])
def place(request, bucket):
    """A URL that nothing is at."""
    root = {"s3": bucket, "memory": "memory://"}[request.param]
    return f"{root}/{request.node.name.split('[')[0]}"


@pytest.mark.parametrize("engine", ["here", "threads"])
def test_the_bytes_are_those_of_a_disk(engine, place, whole):
    path = f"{place}/{engine}"
    extract(path, engine=ThreadPoolExecutor(2) if engine == "threads" else None)
    assert contents(path) == contents(whole)


def test_other_processes_write_to_s3(bucket, whole):
    path = f"{bucket}/processes"
    store = extract(path, elsewhere.Batches(), engine=ProcessPoolExecutor(2))
    assert contents(path) == contents(whole)
    alone = fit_probes(FeatureStore(whole), verbose=False)
    there = fit_probes(store, engine=ProcessPoolExecutor(2), verbose=False)
    assert there.frame().equals(alone.frame())


def test_broken_off_it_goes_on(place, whole):
    with pytest.raises(RuntimeError, match="batch 25 is not readable"):
        extract(place, elsewhere.Batches(bad=25), engine=ThreadPoolExecutor(2))
    assert not FeatureStore(place).complete
    extract(place)
    assert contents(place) == contents(whole)


def test_a_chunk_that_is_damaged_or_missing_is_named(place, whole):
    store = extract(place)
    file = location(place) / "tap_000_input" / "c" / "1" / "0"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"Chunk 1 of tap 'input', rows 1050 to 2099, is damaged"):
        store.features("input")[:]
    file.unlink()
    with pytest.raises(ValueError, match=r"not complete: 1 chunks"):
        FeatureStore(place).features("input")
    extract(place)
    assert contents(place) == contents(whole)


def test_something_else_is_there(place):
    extract(place, layers="dense")
    with pytest.raises(ValueError, match="is of something else: its taps are dense"):
        extract(place)
    other = location(f"{place}-other")
    (other / "thesis.tex").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="Choose another path"):
        extract(f"{place}-other")


def test_nothing_is_there(place):
    with pytest.raises(FileNotFoundError, match="which is not a feature store"):
        FeatureStore(place)
    with pytest.raises(FileNotFoundError, match=r"Expected a directory that ProbeResults\.save"):
        ProbeResults.load(place)


def test_results_are_kept_there_too(place, whole):
    results = fit_probes(FeatureStore(whole), verbose=False)
    results.save(place)
    results.save(place)  # in place of the first
    loaded = ProbeResults.load(place)
    assert loaded.frame().equals(results.frame())
    for key, probe in results.probes.items():
        np.testing.assert_array_equal(loaded.probes[key].kernel, probe.kernel)
    (file,) = location(place).glob("measures-*")
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match="is damaged"):
        ProbeResults.load(place)


def test_a_host_that_is_there(place, whole, tmp_path):
    dense_net().save(tmp_path / "host.keras")
    host = location(f"{place}.keras")
    host.write_bytes((tmp_path / "host.keras").read_bytes())
    extract(place, model=str(host))
    assert contents(place) == contents(whole)


def test_what_is_put_is_whole_or_not_there(place):
    file = location(place) / "file"

    def broken_off():
        with replacing(file) as half:
            half.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert not file.exists()
    with replacing(file) as new:
        new.write(b"whole")
    assert file.read_bytes() == b"whole"


def test_paths_of_a_disk_stay_what_they_are(tmp_path):
    assert location(str(tmp_path)) == tmp_path
    assert type(location("features/")) is type(pathlib.Path())


def test_without_what_reads_urls_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(ImportError, match=r"'s3://b/x' is a URL.*keras_probes\[remote\]"):
        FeatureStore("s3://b/x")
