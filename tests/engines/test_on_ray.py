"""Ray where none was started: the engine starts it, and ends it."""

import os
import sys

import pytest
import ray
from engines import calls

from keras_probes import RayEngine
from keras_probes.engines.run import run


def test_it_is_started_and_ended(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    found = run(RayEngine(1), calls.double, [(1,)])
    assert next(found).result[1] == 2
    assert ray.is_initialized()
    assert list(found) == []
    assert not ray.is_initialized()


def test_gpus_that_are_not_there():
    with pytest.raises(ValueError, match="Expected GPUs for the workers.*there are 0"):
        list(run(RayEngine(1, gpus=1), calls.double, [(1,)]))
    assert not ray.is_initialized()
