"""What a worker does: it loads a job and its host once, then runs one chunk after another.

In: the address of a job, which lies beside the store, and units. Out: chunks of the store.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import pickle
import platform
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_probes.offline.prepared import Asked, Prepared, compare_labels
from keras_probes.offline.store import JOBS, FeatureStore
from keras_probes.offline.units import Numbers, Read, Unit
from keras_probes.probes.targets import Target
from keras_probes.results.schema import versions
from keras_probes.storage import is_local, make_directory, remove

_JOB, _MODEL = "job.pkl", "model.keras"
_LOADING = threading.Lock()

Builder = Callable[[], keras.Model]


@dataclasses.dataclass(frozen=True)
class Job:
    """An extraction, as each of its workers needs to know it.

    Attributes:
        asked: What is asked of the host.
        targets: What the probes are to predict.
        build: Returns the host; `None` where its file lies beside the job.
        data: Those of which workers read batches by number; else `None`.
        batch_size: Number of examples of a batch, for arrays.
        manifest: Of the store.
    """

    asked: Asked
    targets: list[Target]
    build: Builder | None
    data: Any
    batch_size: int
    manifest: Mapping[str, Any]


@contextlib.contextmanager
def beside(store: FeatureStore, job: Job, model: keras.Model) -> Iterator[Any]:
    """Puts a job and its host beside a store, for as long as workers need them.

    Yields:
        The address of the job, for `extract_chunk`.

    Raises:
        TypeError: The job can't be pickled.
        ValueError: The host can't be saved.
    """
    import cloudpickle  # comes with the extra that zarr comes with

    try:
        pickled = cloudpickle.dumps(job)
    except Exception as error:
        raise TypeError(
            "Expected data and functions that can be sent to workers. Received some that can't be "
            f"pickled: {error!r}. Pass data whose batches or examples are read by number, and "
            "functions that hold no open file, lock or model."
        ) from error
    address = store.path.absolute() / JOBS / uuid.uuid4().hex
    make_directory(address)
    try:
        if job.build is None:
            _save(model, address / _MODEL)
        (address / _JOB).write_bytes(pickle.dumps((_versions(), pickled)))
        yield address
    finally:
        remove(address)
        if is_local(address):
            with contextlib.suppress(OSError):
                address.parent.rmdir()  # of the last driver


def extract_chunk(address: Any, unit: Unit) -> int:
    """Runs a host over the examples of a chunk, unless that is there and whole.

    Args:
        address: Of the job.
        unit: The chunk.

    Returns:
        Number of its examples.

    Raises:
        ValueError: The worker's libraries or host are not the driver's, or its labels are none.
        OSError: The disk is full.
    """
    with _LOADING:
        worker = _worker(address)
    return worker.extract(unit)


@functools.lru_cache(maxsize=1)
def _worker(address: Any) -> "_Worker":
    return _Worker(address)


class _Worker:
    """A host in a worker's process, ready for one chunk after another."""

    def __init__(self, address: Any):
        theirs, pickled = pickle.loads((address / _JOB).read_bytes())
        if theirs != _versions():
            raise ValueError(
                "Expected workers with the libraries of the process that started them. Received: "
                f"{theirs} there, {_versions()} here. Install the same everywhere."
            )
        self._job: Job = pickle.loads(pickled)
        model = self._host(address) if self._job.build is None else self._job.build()
        self._preprocess = getattr(model, "preprocess_samples", None)
        asked = self._job.asked
        self._prepared = Prepared(asked.plan(model), asked, self._job.targets)
        about = json.loads(json.dumps(self._prepared.about()))
        path = address.parents[1]
        self._store = FeatureStore.create(path, {**self._job.manifest, **about}, {})

    def _host(self, address: Any) -> keras.Model:
        try:  # the driver's own model, so that its functions are safe
            return load_host(address / _MODEL, safe_mode=False)
        except Exception as error:
            raise ValueError(
                f"A worker could not load the model: {error!r}. Pass a function that builds it, "
                "weights and all, in place of the model."
            ) from error

    def extract(self, unit: Unit) -> int:
        """As `extract_chunk`."""
        store, prepared, each = self._store, self._prepared, self._prepared.rows_each
        known = store.labels_of_chunk(unit.chunk)
        if known is not None and isinstance(unit.part, Numbers):  # those are to be read yet
            return len(next(iter(known.values()))) // each
        batches = unit.batches(self._job.data, self._job.batch_size, self._preprocess)
        run = prepared.rows if known is None else prepared.labels
        parts = [run(batch) for batch in batches]
        skip = each * unit.part.skip if isinstance(unit.part, Read) else 0
        here = slice(skip, skip + store.chunk_rows)
        rows = {name: np.concatenate([part[name] for part in parts])[here] for name in parts[0]}
        if known is None:
            store.write(unit.chunk, rows)
        else:
            compare_labels(store, unit.chunk, known, rows)
        return len(next(iter(rows.values()))) // each


def _versions() -> dict[str, str]:
    return {"python": ".".join(platform.python_version_tuple()[:2]), **versions()}


def _save(model: keras.Model, path: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / _MODEL
        try:
            model.save(file)
        except Exception as error:
            raise ValueError(
                f"Expected a model that can be saved, since workers load it. Received: "
                f"{model.name!r}, which can't: {error!r}. Pass a function that builds it, weights "
                "and all, in place of the model."
            ) from error
        path.write_bytes(file.read_bytes())


def load_host(path: Any, safe_mode: bool = True) -> keras.Model:
    """Loads a host from its `.keras` file, wherever that is."""
    with tempfile.TemporaryDirectory() as directory:
        file = pathlib.Path(directory) / _MODEL
        file.write_bytes(path.read_bytes())
        return keras.saving.load_model(file, compile=False, safe_mode=safe_mode)
