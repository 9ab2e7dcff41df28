"""`FeatureStore`: the features of every tap on disk, as Zarr v3, which xarray and others read.

In: chunks of rows, each with the features of all taps and their labels. Out: array-likes that are
read lazily, chunk by chunk.

A store is a Zarr group with an array a tap, and arrays for labels and sample weights beside them,
all in chunks of the same rows, each with a CRC-32C checksum and no compression. A chunk's file
is put in place whole (Zarr writes a temporary file and renames it), so that what is there after a
crash can be used. Nothing in it tells of time or process: the same data give the same bytes.
"""

import functools
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from keras_probes.probes.tasks import TASKS, Task
from keras_probes.results.schema import TapInfo
from keras_probes.storage import is_local, location, remove

FORMAT = 2
DTYPES = ("float32", "float16", "bfloat16")
JOBS = "jobs"  # the directory of what workers need, while they run
_MANIFEST = "keras_probes"  # the attribute of the group that holds all but the arrays
# Zarr v3 has no bfloat16: its bits are kept.
_ON_DISK = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
# What a row reads as that was never written: a NaN, and no label.
_FILL = {"float32": np.nan, "float16": np.nan, "uint16": 0x7FC0, "int32": -1}

# What must be the same to go on with a store; names of models are given by order of creation.
_IDENTITY = (
    "host", "first_example", "rows", "rows_per_example", "taps", "reductions", "targets",
    "weighted", "dtype",
)  # fmt: skip

# Beside them, where the store is not complete: other versions make other bytes.
_MAKERS = ("keras_probes", "keras", "tensorflow")

# A chunk of nothing but NaN is written like any other.
_WRITE = {"write_empty_chunks": True}

# What an array of rows holds, and of which tap or target.
ArrayName = tuple[Literal["tap", "labels", "weights", "predictions"], str | None]


class FeatureStore:
    """The features that `extract_features` kept of a host, one array a tap.

    ```python
    store = FeatureStore("features/")
    store.features("conv1")[:100]  # float32, shape (100, n_features)
    store.labels()                 # int32, shape (n,)
    ```

    Args:
        path: Directory that `extract_features` wrote.

    Attributes:
        path: The directory.
        taps: The taps in graph order, `TapInfo`.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`, as features are kept on disk.
        targets: The task of each target; the key is its name, `None` if it has none.
        class_names: Names of the classes, where they are known.
        host: Of the model: its `name`, its `class` and `sha256`, a hash of its weights.
        versions: Of the libraries that wrote the store.

    Raises:
        FileNotFoundError: There is no store at `path`.
        ValueError: The store is of a format this version does not know.
    """

    def __init__(self, path: str | os.PathLike):
        zarr = _zarr()
        self.path = location(path)
        try:
            self._group = _group(self.path, "r")
            manifest = self._group.attrs[_MANIFEST]
        except (
            FileNotFoundError,
            KeyError,
            NotADirectoryError,
            zarr.errors.BaseZarrError,
        ) as error:
            raise FileNotFoundError(
                "Expected a directory that extract_features wrote. "
                f"Received: {str(path)!r}, which is not a feature store ({error!r})."
            ) from error
        if manifest["format"] > FORMAT:
            raise ValueError(
                f"Expected a feature store of format {FORMAT} or older. Received: format "
                f"{manifest['format']} in {str(path)!r}. Update keras_probes to read it."
            )
        self.manifest: dict[str, Any] = _of_today(manifest)
        self.dtype: str = manifest["dtype"]
        self.taps = [TapInfo.from_json(tap) for tap in self.manifest["taps"]]
        self.targets: dict[str | None, Task] = {
            target["name"]: TASKS[target["task"]](target["outputs"])
            for target in self.manifest["targets"]
        }
        self.class_names: list[str] | None = manifest["class_names"]
        self.host: dict[str, str] = manifest["host"]
        self.versions: dict[str, str] = manifest["versions"]
        self._keys = _keys(self.manifest)
        self._seen_whole = False

    def __repr__(self) -> str:
        rows = f"{len(self):,} rows" if self.complete else "not complete"
        return f"<FeatureStore {str(self.path)!r}: {len(self.taps)} taps, {rows}, {self.dtype}>"

    def __reduce__(self) -> tuple[type, tuple]:
        """Opened anew where it comes to, as in another process."""
        return FeatureStore, (self.path.absolute(),)

    def __len__(self) -> int:
        """Number of rows, one for each example; 0 as long as it is not known."""
        return self.manifest["rows"] or 0

    @property
    def rows_per_example(self) -> int:
        """How many rows in a row are of one example: its positions, where labels are of these."""
        return self.manifest["rows_per_example"]

    @property
    def chunk_rows(self) -> int:
        """Number of rows of a chunk."""
        return self.manifest["chunk_rows"]

    @property
    def complete(self) -> bool:
        """Whether all rows are there."""
        return self.manifest["rows"] is not None and not self.missing_chunks()

    def features(self, tap: str) -> "StoredArray":
        """Returns a tap's features: an array-like, float, shape (n, n_features), read when indexed.

        Features kept as float16 or bfloat16 come out in that dtype.

        Raises:
            ValueError: Unknown tap, or the store is not complete.
        """
        self.check_tap(tap)
        return self._array(("tap", tap))

    def kept(self, tap: str) -> np.ndarray | None:
        """Places in a tap's flattened output of the random subset that was kept, int32, or None."""
        key = _subset_key(self._keys["tap", tap])
        return self._group[key][:] if key in self._group else None

    def labels(self, target: str | None = None) -> np.ndarray:
        """Returns the labels of all rows: classes, int32, shape (n,), below 0 where there is none.

        Those of other tasks have other shapes.

        Raises:
            ValueError: Unknown target, or the store is not complete.
        """
        return self._of_target("labels", target)[:]

    def sample_weight(self, target: str | None = None) -> np.ndarray | None:
        """Returns the sample weights of all rows, float32, shape (n,); `None` if there are none."""
        return self._of_target("weights", target)[:] if self.manifest["weighted"] else None

    def predictions(self, target: str | None = None) -> np.ndarray | None:
        """Returns the host's own answers for all rows, as labels.

        They are `None` where the host has no output with a column for each of the probes'.
        """
        known = target in self.manifest["predicted"]
        return self._of_target("predictions", target)[:] if known else None

    def check_tap(self, tap: str) -> None:
        """Raises a `ValueError` if there is no such tap."""
        names = [info.name for info in self.taps]
        if tap not in names:
            held = ", ".join(map(repr, names))
            raise ValueError(f"Unknown tap. Received: tap={tap!r}. The store holds {held}.")

    def check_same_features(self, other: "FeatureStore") -> None:
        """Raises a `ValueError` if another store's features can't be compared with these."""
        self._refuse(
            other.manifest,
            ("host", "taps", "reductions", "targets"),
            f"Features of {str(self.path)!r} and {str(other.path)!r} can't be compared",
            "Extract both from the same host, with the same taps, reductions and seed.",
        )

    def check_complete(self) -> None:
        """Raises a `ValueError` if rows are missing; looks once, since reads check their chunks."""
        if self._seen_whole:
            return
        missing = self.missing_chunks()
        if self.manifest["rows"] is None or missing:
            raise ValueError(
                f"The store {str(self.path)!r} is not complete"
                + (f": {len(missing)} chunks of {self.chunk_rows} rows are missing" * bool(missing))
                + ". Run extract_features again with the same arguments; it goes on where it was."
            )
        self._seen_whole = True

    def missing_chunks(self) -> list[int]:
        """Numbers of the chunks of which some array has no file; empty if no length is known."""
        missing = set(range(-(-len(self) // self.chunk_rows)))
        there = (_chunks_there(self.path / key) for key in self._keys.values())
        return sorted(missing - functools.reduce(operator.and_, there))

    # What `extract_features` uses.

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        manifest: Mapping[str, Any],
        subsets: Mapping[str | None, np.ndarray],
    ) -> "FeatureStore":
        """Makes an empty store, or opens the one that is there if it is for the same.

        Args:
            path: The directory, made if it is not there.
            manifest: What the store is to say of itself; `rows` may be `None`.
            subsets: Random subsets, int32, by tap.

        Raises:
            ValueError: A store of something else is at `path`; the difference is named.
            FileExistsError: Something that is no store is there.
        """
        at = location(path)
        if at.exists() and (not at.is_dir() or any(at.iterdir())) and not _is_ours(at):
            raise FileExistsError(
                "Expected `path` to be a feature store, or a directory that is empty or not there. "
                f"Received: path={str(path)!r}. Choose another path, or empty this one."
            )
        if not _has_manifest(at):
            _make_arrays(at, manifest, subsets)
        store = cls(at)
        store._refuse(
            manifest,
            _IDENTITY,
            f"The store {str(path)!r} is of something else",
            "Choose another path, or delete the store to extract anew.",
        )
        if not store.complete:
            makers = {name: manifest["versions"][name] for name in _MAKERS}
            store._refuse(
                {"versions": {**store.versions, **makers}},
                ["versions"],
                f"The store {str(path)!r} was begun with other libraries",
                "Go on with those, choose another path, or delete the store.",
            )
        store._group = _group(at, "r+")
        return store

    def write(self, chunk: int, arrays: Mapping[ArrayName, np.ndarray]) -> None:
        """Puts a chunk in place.

        Args:
            chunk: Its number.
            arrays: Its rows: of each tap, of the labels of each target, of the weights of each
                target if there are sample weights, and of the host's predictions where it has any.

        Raises:
            OSError: The disk is full, or can't be written for another reason. Chunks that were
                written before stay whole.
        """
        start = chunk * self.chunk_rows
        try:
            self.grow(start + len(next(iter(arrays.values()))))
            for name, key in self._keys.items():
                array, rows = self._group[key].with_config(_WRITE), arrays[name]
                stop = start + len(rows)
                array[start:stop] = rows.view("uint16") if rows.dtype.name == "bfloat16" else rows
        except OSError as error:
            raise OSError(
                error.errno,
                f"Could not write chunk {chunk} of the store {str(self.path)!r}: {error.strerror}. "
                "What is written so far is whole. Make room, then run extract_features again with "
                "the same arguments; it goes on from there",
            ) from error

    def grow(self, rows: int) -> None:
        """Makes room for rows whose number was not known."""
        if self.manifest["rows"] is None:
            for key in self._keys.values():
                array = self._group[key]
                if array.shape[0] < rows:
                    array.resize((rows, *array.shape[1:]))

    def finish(self, rows: int) -> None:
        """Says how many rows there are, once that is known."""
        for key in self._keys.values():
            array = self._group[key]
            if array.shape[0] != rows:
                array.resize((rows, *array.shape[1:]))
        if self.manifest["rows"] != rows:
            self.manifest["rows"] = rows
            self._group.attrs[_MANIFEST] = self.manifest
        if self.complete:  # nobody is writing any more
            for left_over in self.path.rglob("*.partial") if is_local(self.path) else ():
                left_over.unlink(missing_ok=True)
            remove(self.path / JOBS)

    def labels_of_chunk(self, chunk: int) -> dict[str | None, np.ndarray] | None:
        """The labels of a chunk by target, if it is there and whole; reads all of it to know."""
        if not self._has_files(chunk):
            return None
        rows = slice(chunk * self.chunk_rows, (chunk + 1) * self.chunk_rows)
        read = {}
        for name, key in self._keys.items():
            try:
                read[name] = self._group[key][rows]
            except Exception:  # whatever a damaged file makes of the reader
                return None
        return {target: read["labels", target] for target in self.targets}

    def _refuse(
        self, manifest: Mapping[str, Any], keys: Iterable[str], what: str, remedy: str
    ) -> None:
        """Raises a `ValueError` that names where two manifests differ, if they do."""
        found: list[str] = []
        for key in keys:  # a tap that differs need not be told twice
            found = found or list(_differences(key, self.manifest[key], manifest[key]))
        if found:
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise ValueError(f"{what}: {'; '.join(found[:5])}{more}. {remedy}")

    def _has_files(self, chunk: int) -> bool:
        return all(
            _chunk_file(self.path / key, chunk, self._group[key].ndim).exists()
            for key in self._keys.values()
        )

    def _array(self, name: ArrayName) -> "StoredArray":
        self.check_complete()
        array = self._group[self._keys[name]]
        dtype = self.dtype if name[0] == "tap" else array.dtype.name
        what = name[0] if name[1] is None else f"{name[0]} {name[1]!r}"
        return StoredArray(array, self.path, dtype, what)

    def _of_target(
        self, kind: Literal["labels", "weights", "predictions"], target: str | None
    ) -> "StoredArray":
        if target not in self.targets:
            raise ValueError(
                f"Unknown target. Received: target={target!r}. The store has labels for "
                f"{', '.join(map(repr, self.targets))}."
            )
        return self._array((kind, target))


class StoredArray:
    """An array on disk, read when it is indexed by rows.

    Args:
        array: The Zarr array.
        root: Directory of the store.
        dtype: Of what comes out; bfloat16 lies on disk as its bits, uint16.
        what: What it is called in errors.

    Attributes:
        shape: Its shape.
        dtype: Its NumPy dtype.
    """

    def __init__(self, array: Any, root: Any, dtype: str, what: str):
        self.shape: tuple[int, ...] = array.shape
        self.dtype = np.dtype(tf.bfloat16.as_numpy_dtype if dtype == "bfloat16" else dtype)
        self.ndim = len(self.shape)
        self._array, self._root, self._what = array, root, what
        # Of a store that is not on a disk: a request for each chunk would cost as much as reading.
        self._there = set() if is_local(root) else _chunks_there(root / array.path)

    def _file(self, chunk: int) -> Any:
        return _chunk_file(self._root / self._array.path, chunk, self.ndim)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<{self._what}: {self.dtype.name}, shape {self.shape}, in {str(self._root)!r}>"

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Reads rows: an integer, a slice, or integers or booleans as NumPy has it.

        Raises:
            ValueError: A chunk is damaged or missing; it is named.
        """
        if isinstance(rows, (list, np.ndarray)):
            rows = np.arange(len(self))[np.asarray(rows)]  # negative numbers and masks resolved
            read = self._read(lambda: self._array.oindex[rows], np.unique(rows))
        else:
            read = self._read(lambda: self._array[rows], np.atleast_1d(np.arange(len(self))[rows]))
        return read.view(self.dtype) if self.dtype.name == "bfloat16" else read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        read = self[:]
        return read if dtype is None else read.astype(dtype, copy=False)

    def _read(self, read: Callable[[], Any], rows: np.ndarray) -> np.ndarray:
        chunks = np.unique(rows // self._array.chunks[0])
        # Zarr takes a missing chunk for one that was never written, and fills it in.
        for chunk in chunks:
            if chunk not in self._there if self._there else not self._file(chunk).exists():
                raise self._damaged(chunk, "is missing")
        try:
            return np.asarray(read())
        except Exception as error:
            for chunk in chunks:
                try:
                    self._array.get_block_selection((int(chunk),))
                except Exception as of_chunk:
                    raise self._damaged(chunk, "is damaged") from of_chunk
            raise error

    def _damaged(self, chunk: int, how: str) -> ValueError:
        size = self._array.chunks[0]
        stop = min(len(self), (chunk + 1) * size)
        return ValueError(
            f"Chunk {chunk} of {self._what}, rows {chunk * size} to {stop - 1}, {how}: "
            f"{self._file(chunk)}. Run extract_features again with the "
            "same arguments: it computes what is not whole anew."
        )


def _of_today(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest as it is written now: in format 1, all targets were of classification."""
    of_first = manifest["format"] == 1
    targets = [
        {"name": t["name"], "task": "classification", "outputs": t["num_classes"]}
        for t in (manifest["targets"] if of_first else ())
    ]
    return {**manifest, "targets": targets, "rows_per_example": 1} if of_first else dict(manifest)


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError(
            'A feature store needs zarr. Install it with: pip install "keras_probes[offline]"'
        ) from error
    return zarr


def _group(path: Any, mode: Literal["r", "r+", "a"]) -> Any:
    """Opens the Zarr group of a store."""
    zarr = _zarr()
    if not is_local(path):
        path = zarr.storage.FsspecStore.from_url(
            str(path), storage_options=dict(path.storage_options), read_only=mode == "r"
        )
    return zarr.open_group(path, mode=mode, zarr_format=3)


def _has_manifest(path: Any) -> bool:
    if not (path / "zarr.json").exists():
        return False
    return _MANIFEST in _group(path, "r").attrs


def _is_ours(path: Any) -> bool:
    """Whether a directory is a store, or one whose making was interrupted."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else [""]
    own = re.compile(r"zarr\.(json|\w+\.partial)|(tap|labels|weights|predictions)(_\d{3}_.*)?")
    return _has_manifest(path) or all(own.fullmatch(name) for name in names)


def _keys(manifest: Mapping[str, Any]) -> dict[ArrayName, str]:
    """Names of the arrays of rows: numbered, since names may hold what a path may not."""

    def key(kind: str, place: int, name: str | None) -> str:
        return (
            kind if name is None else f"{kind}_{place:03d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}"
        )

    keys: dict[ArrayName, str] = {}
    for place, tap in enumerate(manifest["taps"]):
        keys["tap", tap["name"]] = key("tap", place, tap["name"])
    for place, target in enumerate(manifest["targets"]):
        name = target["name"]
        keys["labels", name] = key("labels", place, name)
        if manifest["weighted"]:
            keys["weights", name] = key("weights", place, name)
        if name in manifest["predicted"]:
            keys["predictions", name] = key("predictions", place, name)
    return keys


def _subset_key(tap_key: str) -> str:
    return f"{tap_key}_kept"


def _make_arrays(
    path: Any, manifest: Mapping[str, Any], subsets: Mapping[str | None, np.ndarray]
) -> None:
    """Makes a group with empty arrays; its manifest comes last, so that it says they are there."""
    group = _group(path, "a")
    rows, chunk_rows = manifest["rows"] or 0, manifest["chunk_rows"]
    for (kind, name), key in _keys(manifest).items():
        about: dict[str, Any] = {kind: name}
        if kind != "tap":
            of_target = next(target for target in manifest["targets"] if target["name"] == name)
            task = TASKS[of_target["task"]](of_target["outputs"])
            shape, dtype = (task.label_shape, task.label_dtype)
            if kind == "weights":
                shape, dtype = (), "float32"
            dims = ("row", *[f"{key}_label"] * len(shape))
            _make(group, key, (rows, *shape), (chunk_rows, *shape), dtype, dims, about)
            continue
        width = next(tap["features"] for tap in manifest["taps"] if tap["name"] == name)
        dims = ("row", f"{key}_feature")
        about["dtype"] = manifest["dtype"]
        dtype = _ON_DISK[manifest["dtype"]]
        _make(group, key, (rows, width), (chunk_rows, width), dtype, dims, about)
        if name in subsets:
            subset = subsets[name]
            made = _make(group, _subset_key(key), (width,), (width,), "int32", dims[1:], {})
            made[:] = subset
    group.attrs[_MANIFEST] = dict(manifest)


def _make(
    group: Any,
    key: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: str,
    dims: tuple[str, ...],
    about: Mapping[str, Any],
) -> Any:
    """Makes an array, or opens the one that another worker or an earlier call has made."""
    zarr = _zarr()
    try:
        return group.create_array(
            key,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            compressors=[zarr.codecs.Crc32cCodec()],
            fill_value=_FILL[dtype],
            dimension_names=dims,
            attributes=about,
        )
    except zarr.errors.ContainsArrayError:
        return group[key]


def _chunk_file(array: Any, chunk: int, ndim: int) -> Any:
    return array.joinpath("c", str(chunk), *["0"] * (ndim - 1))


def _chunks_there(array: Any) -> set[int]:
    """Numbers of the chunks of an array that have a file."""
    root = array / "c"
    files = (str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())
    return {int(re.split(r"[/\\]", file)[0]) for file in files if not file.endswith(".partial")}


def _differences(what: str, stored: Any, received: Any) -> Iterator[str]:
    """Says where two parts of manifests differ, down to the innermost names."""
    if isinstance(stored, Mapping) and isinstance(received, Mapping):
        for key in {**stored, **received}:
            yield from _differences(f"{what}.{key}", stored.get(key), received.get(key))
    elif what == "taps":
        old, new = ({tap["name"]: tap for tap in taps} for taps in (stored, received))
        if list(old) != list(new):
            yield f"its taps are {', '.join(old)}; received: {', '.join(new)}"
        else:
            for name in old:
                yield from _differences(f"tap {name!r}", old[name], new[name])
    elif stored != received and what != "host.name" and (what != "rows" or (stored and received)):
        yield f"its {what} is {stored!r}; received: {received!r}"
