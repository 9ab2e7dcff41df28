"""`extract_features`, the first half of the offline driver: a host's features to disk, once.

In: a finished host and data. Out: a `FeatureStore`. The taps, their names and reductions are those
of the callback; `fit_probes` does the rest.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import keras
import numpy as np

from keras_probes.engines.run import TRIES, Engine, Outcome, check_engine, run
from keras_probes.offline.prepared import Asked, Prepared, Rows, compare_labels
from keras_probes.offline.store import DTYPES, FORMAT, ArrayName, FeatureStore
from keras_probes.offline.units import Unit, Units
from keras_probes.offline.worker import Builder, Job, beside, extract_chunk, load_host
from keras_probes.probes.resolve import Evidence, resolve_targets
from keras_probes.results.schema import versions
from keras_probes.storage import location
from keras_probes.taps.batches import batches_of, examples_in, labels_of
from keras_probes.taps.reduce import Reduce
from keras_probes.taps.select import Selector

# About so many rows a chunk: few enough to lose little in a crash, enough to read fast.
CHUNK_ROWS = 1024


def extract_features(
    model: keras.Model | str | os.PathLike | Builder,
    data: Any,
    path: str | os.PathLike,
    *,
    layers: Selector = "auto",
    reduce: Reduce = "auto",
    target: Any = None,
    task: str | Mapping[str, str] | None = None,
    num_classes: int | Mapping[str, int] | None = None,
    sample_weight: Callable[[Any, Any, Any], Any] | None = None,
    class_names: list[str] | None = None,
    batch_size: int = 32,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    seed: int = 0,
    engine: Engine | None = None,
    verbose: bool = True,
) -> FeatureStore:
    """Runs a model once over data and keeps the features of every tap on disk.

    The model is called at inference, and none of its state is touched. Interrupted anywhere, the
    same call goes on at the last whole chunk, and what comes out is byte for byte the same; data
    are read again from their beginning, without being run through the model.

    Args:
        model: The host, which need not be compiled; the path of its `.keras` file; or a function
            that returns it, weights and all, the same each time.
        data: (x, y) or (x, y, sample_weight) of arrays, a `tf.data.Dataset`, a `PyDataset` such as
            `Examples`, a generator: whatever `fit` takes, and that ends. Its order must not change
            from one call to the next. Where the model's own `fit` preprocesses data, as KerasHub's
            tasks do, it is done here as well.
        path: Directory of the store, or its URL, such as `"s3://bucket/features"`.
        layers: Where to look, as for `LinearProbeCallback`.
        reduce: What is kept of a layer's output, likewise.
        target: What the probes are to predict, likewise.
        task: What kind of labels these are, likewise.
        num_classes: Number of classes, or a mapping from target names to it, where it can't be
            inferred.
        sample_weight: The weights of examples, likewise.
        class_names: Names of the classes; by default those the data set knows.
        batch_size: Number of rows of a batch, for arrays.
        dtype: How features are kept. Halves take half the disk; float16 overflows past 65,504.
        seed: Seed of random feature subsets.
        engine: Where to run the model: a `RayEngine`, or any `concurrent.futures.Executor`; by
            default this process. Workers write chunks of their own. They read batches that have
            numbers, as those of a `PyDataset`, themselves; other data are read here and sent.
        verbose: Whether to show a progress bar.

    Returns:
        The store.

    Raises:
        TypeError, ValueError: An argument does not fit the model or the data; labels are none of
            the classes; or the store at `path` is of something else.
        OSError: The disk is full. What is written stays, and the same call goes on from there.
        RuntimeError: Workers failed several times to extract some chunk; likewise.
    """
    check_engine(engine)
    if dtype not in DTYPES:
        raise ValueError(
            f"Expected dtype to be one of {', '.join(map(repr, DTYPES))}. Received: {dtype!r}."
        )
    host, build = _host_of(model)
    batches = batches_of(data, batch_size, getattr(host, "preprocess_samples", None))
    asked = Asked(layers, reduce, seed, dtype, batches.spec)
    plan = asked.plan(host)
    class_names = class_names or getattr(data, "class_names", None)
    labels = labels_of(data)
    evidence = Evidence(
        plan.graph.outputs,
        getattr(host, "loss", None),
        [] if labels is None else labels[:1],
        len(class_names) if class_names and target is None else None,
    )
    x_spec, y_spec, _ = keras.utils.unpack_x_y_sample_weight(batches.spec)
    targets = resolve_targets(
        target, num_classes, x_spec, y_spec, evidence, task=task, weigh=sample_weight, seed=seed
    )
    prepared = Prepared(plan, asked, targets)
    iterator = iter(batches.dataset)
    first = next(iterator, None)
    if first is None:
        raise ValueError("The data are empty. Expected at least one example.")
    in_order = itertools.chain([first], iterator)
    each, size = prepared.rows_each, examples_in(first)
    per_chunk = math.ceil(CHUNK_ROWS / (size * each))
    manifest = {
        "format": FORMAT,
        "rows": None if batches.rows is None else batches.rows * each,
        "rows_per_example": each,
        "chunk_rows": size * each * per_chunk,
        "dtype": dtype,
        "graph": [dataclasses.asdict(node) for node in prepared.plan.nodes()],
        "left_out": dict(prepared.plan.left_out),
        "targets": [
            {"name": t.name, "task": t.task.name, "outputs": t.task.outputs} for t in targets
        ],
        "weighted": prepared.weighted,
        "predicted": [t.name for t in targets if t.predictions(plan.graph.outputs) is not None],
        "class_names": class_names,
        "first_example": _sha256_of_first(first),
        "versions": versions("zarr"),
        **prepared.about(),
    }
    # As it will be read back: JSON has lists for tuples.
    manifest = json.loads(json.dumps(manifest))
    store = FeatureStore.create(path, manifest, prepared.subsets())
    with _progress(batches.rows, verbose) as progress:
        if engine is None:
            rows = _extract_here(store, prepared, in_order, progress)
        else:
            units = Units(data, batches.rows, in_order, size, per_chunk)
            job = Job(asked, targets, build, units.numbered, batch_size, manifest)
            was_complete = store.complete
            try:
                _extract_on(engine, store, job, host, units, progress)
            except RuntimeError:
                if not was_complete and FeatureStore(path).complete:
                    return FeatureStore(path)  # by another call, which cleared up behind it
                raise
            rows = each * (units.examples or 0)
    store.finish(rows)
    return FeatureStore(path)


def _host_of(model: Any) -> tuple[keras.Model, Builder | None]:
    """The host, and what builds it in a worker where that is not its file."""
    if isinstance(model, keras.Model):
        return model, None
    if isinstance(model, (str, os.PathLike)):
        return load_host(location(model)), None
    host = model() if callable(model) else None
    if not isinstance(host, keras.Model):
        raise TypeError(
            "Expected a Keras model, the path of a .keras file, or a function that returns a "
            f"model. Received: {model!r}" + (f", which returns {host!r}." if host else ".")
        )
    return host, model


def _extract_here(
    store: FeatureStore, prepared: Prepared, batches: Iterable[Any], progress: Any
) -> int:
    """Runs a host over data in this process; returns the number of rows."""
    with _Writer(store) as writer:
        for batch in batches:
            examples = examples_in(batch)
            wanted = writer.wants(examples * prepared.rows_each)
            writer.add(prepared.rows(batch) if wanted else prepared.labels(batch))
            progress.update(examples)
    return writer.rows


def _extract_on(
    engine: Engine, store: FeatureStore, job: Job, host: keras.Model, units: Units, progress: Any
) -> None:
    """Has workers run a host over data."""

    def calls(address: os.PathLike) -> Iterator[tuple[os.PathLike, Unit]]:
        for unit in units:
            store.grow(store.rows_per_example * (units.examples or 0))
            yield address, unit

    with (
        beside(store, job, host) as address,
        contextlib.closing(run(engine, extract_chunk, calls(address))) as outcomes,
    ):
        for outcome in outcomes:
            if outcome.error is not None:
                raise _failed(outcome, store)
            progress.update(outcome.result)


def _failed(outcome: Outcome, store: FeatureStore) -> Exception:
    start = outcome.args[1].chunk * store.chunk_rows
    error = RuntimeError(
        f"Rows {start:,} to {start + store.chunk_rows - 1:,} could not be extracted, in {TRIES} "
        f"tries. The last one: {type(outcome.error).__name__}: {outcome.error}\nWhat is written "
        f"so far is whole. Run extract_features again with the same arguments; it goes on from "
        "there."
    )
    error.__cause__ = outcome.error
    return error


class _Writer:
    """Gathers rows into chunks and writes them in the background, while the host goes on.

    Chunks that are there from an earlier run are not written; their labels are compared, so that
    data in another order are noticed.

    Args:
        store: Where to.

    Attributes:
        rows: Number of rows seen.
    """

    def __init__(self, store: FeatureStore):
        self.rows = 0
        self._store = store
        self._parts: list[Rows] = []
        self._known = functools.lru_cache(maxsize=2)(store.labels_of_chunk)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "keras_probes_writer")
        self._writing: concurrent.futures.Future | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self._end_chunk(self.rows // self._store.chunk_rows)
                self._wait()
        finally:
            self._pool.shutdown()

    def wants(self, rows: int) -> bool:
        """Whether the features of the next `rows` rows are needed."""
        size = self._store.chunk_rows
        chunks = range(self.rows // size, (self.rows + rows - 1) // size + 1)
        return any(self._known(chunk) is None for chunk in chunks)

    def add(self, rows: Rows) -> None:
        """Takes the next rows: all arrays of them if they were wanted, else labels."""
        size, length = self._store.chunk_rows, len(next(iter(rows.values())))
        taken = 0
        while taken < length:
            stop = min(length, taken + size - self.rows % size)
            self._parts.append({name: array[taken:stop] for name, array in rows.items()})
            self.rows += stop - taken
            taken = stop
            if self.rows % size == 0:
                self._end_chunk(self.rows // size - 1)

    def _end_chunk(self, chunk: int) -> None:
        parts, self._parts = self._parts, []
        if not parts:
            return
        known = self._known(chunk)
        if known is not None:
            compare_labels(
                self._store, chunk, known, _joined(parts, [("labels", of) for of in known])
            )
        else:
            self._wait()
            self._writing = self._pool.submit(self._write, chunk, parts)

    def _write(self, chunk: int, parts: list[Rows]) -> None:
        self._store.write(chunk, _joined(parts))

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()


def _progress(rows: int | None, verbose: bool) -> Any:
    from tqdm import tqdm  # comes with the extra that zarr comes with

    return tqdm(total=rows, unit=" images", desc="extracting features", disable=not verbose)


def _sha256_of_first(batch: Any) -> str:
    x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
    first = [np.ascontiguousarray(leaf[:1]).tobytes() for leaf in keras.tree.flatten(x)]
    return hashlib.sha256(b"".join(first)).hexdigest()


def _joined(parts: list[Rows], names: Iterable[ArrayName] | None = None) -> Rows:
    names = parts[0] if names is None else names
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
