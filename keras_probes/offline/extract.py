"""`extract_features`, the first half of the offline driver: a host's features to disk, once.

In: a finished host and data. Out: a `FeatureStore`. The taps, their names and reductions are those
of the callback; `fit_probes` does the rest.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from keras_probes.forward import ForwardPass
from keras_probes.offline.store import DTYPES, FORMAT, ArrayName, FeatureStore
from keras_probes.probes.resolve import Evidence, resolve_targets
from keras_probes.probes.targets import Target
from keras_probes.probes.tasks.task import WRONG
from keras_probes.results.schema import versions
from keras_probes.taps.batches import batches_of, examples_in, labels_of
from keras_probes.taps.plan import TapPlan, make_plan
from keras_probes.taps.reduce import AtPositions, RandomFeatures, Reduce
from keras_probes.taps.select import Selector

# About so many rows a chunk: few enough to lose little in a crash, enough to read fast.
CHUNK_ROWS = 1024

Rows = dict[ArrayName, np.ndarray]


def extract_features(
    model: keras.Model,
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
    worker: tuple[int, int] = (0, 1),
    seed: int = 0,
    verbose: bool = True,
) -> FeatureStore:
    """Runs a model once over data and keeps the features of every tap on disk.

    The model is called at inference, and none of its state is touched. Interrupted anywhere, the
    same call goes on at the last whole chunk, and what comes out is byte for byte the same; data
    are read again from their beginning, without being run through the model.

    Args:
        model: The host; it need not be compiled.
        data: (x, y) or (x, y, sample_weight) of arrays, a `tf.data.Dataset`, a `PyDataset`, a
            generator: whatever `fit` takes, and that ends. Its order must not change from one call
            to the next. Where the model's own `fit` preprocesses data, as KerasHub's tasks do, it
            is done here as well.
        path: Directory of the store.
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
        worker: (i, n): this is worker i, from 0, of n that write one store, each every n-th chunk,
            at once or one after the other.
        seed: Seed of random feature subsets.
        verbose: Whether to show a progress bar.

    Returns:
        The store. With several workers, it is complete when the last one is done.

    Raises:
        TypeError, ValueError: An argument does not fit the model or the data; labels are none of
            the classes; or the store at `path` is of something else.
        OSError: The disk is full. What is written stays, and the same call goes on from there.
    """
    _check(dtype, worker)
    batches = batches_of(data, batch_size, getattr(model, "preprocess_samples", None))
    x_spec, y_spec, _ = keras.utils.unpack_x_y_sample_weight(batches.spec)
    plan = make_plan(model, x_spec, layers, reduce, seed)
    class_names = class_names or getattr(data, "class_names", None)
    labels = labels_of(data)
    evidence = Evidence(
        plan.graph.outputs,
        getattr(model, "loss", None),
        [] if labels is None else labels[:1],
        len(class_names) if class_names and target is None else None,
    )
    targets = resolve_targets(
        target, num_classes, x_spec, y_spec, evidence, task=task, weigh=sample_weight, seed=seed
    )
    plan, rows_each = _plan_at_positions(plan, targets, layers, reduce, seed)
    forward = ForwardPass(plan, targets, batches.spec, dtype)
    iterator = iter(batches.dataset)
    first = next(iterator, None)
    if first is None:
        raise ValueError("The data are empty. Expected at least one example.")
    size = examples_in(first) * rows_each
    manifest = {
        "format": FORMAT,
        "rows": None if batches.rows is None else batches.rows * rows_each,
        "rows_per_example": rows_each,
        "chunk_rows": size * math.ceil(CHUNK_ROWS / size),
        "dtype": dtype,
        "taps": [dataclasses.asdict(tap) for tap in plan.tap_infos()],
        "graph": [dataclasses.asdict(node) for node in plan.nodes()],
        "left_out": dict(plan.left_out),
        "reductions": {
            t.tap.name: keras.saving.serialize_keras_object(t.reduction) for t in plan.taps
        },
        "targets": [
            {"name": t.name, "task": t.task.name, "outputs": t.task.outputs} for t in targets
        ],
        "weighted": forward.weighted,
        "predicted": [t.name for t in targets if t.predictions(plan.graph.outputs) is not None],
        "class_names": class_names,
        "host": {"name": model.name, "class": type(model).__name__, "sha256": _sha256(model)},
        "first_example": _sha256_of_first(first),
        "versions": versions("zarr"),
    }
    # As it will be read back: JSON has lists for tuples.
    store = FeatureStore.create(path, json.loads(json.dumps(manifest)), _subsets(plan))
    with _progress(batches.rows, verbose) as progress, _Writer(store, worker) as writer:
        for batch in itertools.chain([first], iterator):
            wanted = writer.wants(examples_in(batch) * rows_each)
            parts = forward(batch) if wanted else forward.labels(batch)
            writer.add(_checked(parts, targets))
            progress.update(examples_in(batch))
    store.finish(writer.rows)
    return FeatureStore(path)


def _plan_at_positions(
    plan: TapPlan, targets: list[Target], layers: Selector, reduce: Reduce, seed: int
) -> tuple[TapPlan, int]:
    """Those taps that have positions, where the labels are of these.

    Returns:
        The plan, and how many labels, and so rows, an example has.
    """
    found = {target.positions for target in targets}
    if found == {None}:
        return plan, 1
    first = targets[0].positions
    if len(found) > 1 or first is None:
        raise ValueError(
            "Expected the labels of all targets to be of examples, or all of positions of one "
            "grid. Received: others. Extract them into a store for each."
        )
    return plan.at_positions(layers, reduce, seed, first.axes), first.per_example


def _checked(parts: dict[ArrayName, tf.Tensor], targets: list[Target]) -> Rows:
    """A batch's parts as NumPy has them, each label a class or missing."""
    rows: Rows = {name: part.numpy() for name, part in parts.items()}
    for target in targets:
        state = target.task.state(parts["labels", target.name]).numpy()
        target.refuse(int(np.count_nonzero(state == WRONG)), len(state))
    return rows


class _Writer:
    """Gathers rows into chunks and writes them in the background, while the host goes on.

    Chunks that are there from an earlier run are not written; their labels are compared, so that
    data in another order are noticed.

    Args:
        store: Where to.
        worker: (i, n): every n-th chunk, from the i-th on, is this one's.

    Attributes:
        rows: Number of rows seen.
    """

    def __init__(self, store: FeatureStore, worker: tuple[int, int]):
        self.rows = 0
        self._store, self._worker = store, worker
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
        return any(map(self._is_open, range(self.rows // size, (self.rows + rows - 1) // size + 1)))

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

    def _is_open(self, chunk: int) -> bool:
        place, workers = self._worker
        return chunk % workers == place and self._known(chunk) is None

    def _end_chunk(self, chunk: int) -> None:
        parts, self._parts = self._parts, []
        if not parts:
            return
        known = self._known(chunk)
        if known is not None:
            self._compare(chunk, known, parts)
        elif self._is_open(chunk):
            self._wait()
            self._writing = self._pool.submit(self._write, chunk, parts)

    def _write(self, chunk: int, parts: list[Rows]) -> None:
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self._store.write(chunk, arrays)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _compare(
        self, chunk: int, known: Mapping[str | None, np.ndarray], parts: list[Rows]
    ) -> None:
        for target, labels in known.items():
            received = np.concatenate([part["labels", target] for part in parts])
            if not np.array_equal(labels, received, equal_nan=labels.dtype.kind == "f"):
                raise ValueError(
                    f"The store {str(self._store.path)!r} is of other data, or of these in another "
                    f"order: labels of chunk {chunk} differ. Data must come in the same order in "
                    "every call, without shuffling. Choose another path, or delete the store."
                )


def _check(dtype: str, worker: tuple[int, int]) -> None:
    if dtype not in DTYPES:
        raise ValueError(
            f"Expected dtype to be one of {', '.join(map(repr, DTYPES))}. Received: {dtype!r}."
        )
    if len(worker) != 2 or not 0 <= worker[0] < worker[1]:
        raise ValueError(
            "Expected worker=(i, n), worker i of n, with i from 0 to n - 1. "
            f"Received: worker={worker!r}."
        )


def _progress(rows: int | None, verbose: bool) -> Any:
    from tqdm import tqdm  # comes with the extra that zarr comes with

    return tqdm(total=rows, unit=" images", desc="extracting features", disable=not verbose)


def _subsets(plan: TapPlan) -> dict[str | None, np.ndarray]:
    return {
        t.tap.name: t.reduction.indices.numpy()
        for t in plan.taps
        if isinstance(t.reduction, (RandomFeatures, AtPositions))
    }


def _sha256(model: keras.Model) -> str:
    """Hash of a host's weights: values, shapes and dtypes, in order."""
    digest = hashlib.sha256()
    for weight in model.weights:
        digest.update(f"{weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(np.ascontiguousarray(weight.numpy()).tobytes())
    return digest.hexdigest()


def _sha256_of_first(batch: Any) -> str:
    x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
    first = [np.ascontiguousarray(leaf[:1]).tobytes() for leaf in keras.tree.flatten(x)]
    return hashlib.sha256(b"".join(first)).hexdigest()
