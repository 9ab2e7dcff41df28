"""A callback's state in one file: what was asked of it, its arrays and its results.

In: settings that JSON can hold, NumPy arrays, `ProbeResults`. Out: a zip archive, and back again.
There is no pickle in it, and it is written at once or not at all.
"""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import tempfile
import zipfile
from typing import Any

import numpy as np

from keras_probes.results.record import ProbeResults
from keras_probes.storage import replacing

_FORMAT = 1
_SETTINGS, _ARRAYS, _RESULTS = "settings.json", "arrays.npz", "results/"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is in the file.

    Attributes:
        settings: What the callback was made with, as JSON has it.
        arrays: Weights, statistics, optimizer slots and subsets by name.
        results: What was measured so far.
    """

    settings: dict[str, Any]
    arrays: dict[str, Any]
    results: ProbeResults

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file; an earlier one under this name is there until all of it is."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(path) as file,
            zipfile.ZipFile(file, "w") as archive,
            tempfile.TemporaryDirectory() as results,
        ):
            settings = {"format": _FORMAT, **self.settings}
            archive.writestr(_SETTINGS, json.dumps(settings, indent=1))
            with archive.open(_ARRAYS, "w", force_zip64=True) as arrays:
                np.savez(arrays, **self.arrays)
            self.results.save(results)
            for part in sorted(pathlib.Path(results).iterdir()):
                archive.write(part, _RESULTS + part.name)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Checkpoint":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, something else, or of a newer format.
        """
        try:
            with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as directory:
                settings = json.loads(archive.read(_SETTINGS))
                if settings.pop("format", None) != _FORMAT:
                    raise ValueError(
                        f"Expected a file of format {_FORMAT}. Received: {os.fspath(path)!r}, of "
                        "another. Load it with the version of keras_probes that wrote it."
                    )
                with np.load(io.BytesIO(archive.read(_ARRAYS)), allow_pickle=False) as arrays:
                    found = {name: arrays[name] for name in arrays.files}
                for name in archive.namelist():
                    if name.startswith(_RESULTS):
                        archive.extract(name, directory)  # each part is checked against its CRC
                results = ProbeResults.load(os.path.join(directory, _RESULTS))
        except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"Expected a file that LinearProbeCallback.save wrote. Received: "
                f"{os.fspath(path)!r}, which is damaged or something else: {error}."
            ) from error
        return cls(settings, found, results)


class Backups:
    """The checkpoints with which the last epochs of a fit began, in one directory.

    Args:
        directory: Where they are kept; made when the first is written.
    """

    def __init__(self, directory: str | os.PathLike):
        self._directory = pathlib.Path(directory)

    def write(self, epoch: int, checkpoint: Checkpoint) -> None:
        """Keeps the state with which `epoch` begins, and the one before it.

        The host's own backup of an epoch may be written before ours or after it: whichever of the
        two epochs it goes on at, its probes are there.
        """
        shutil.rmtree(self._results(epoch), ignore_errors=True)
        checkpoint.save(self._path(epoch))
        kept = {self._path(epoch).stem, self._path(epoch - 1).stem}
        for path in self._directory.glob("epoch-*"):
            if path.stem not in kept:
                _remove(path)

    def update(self, epoch: int, results: ProbeResults) -> None:
        """Keeps what was measured since `write`, in which the probes themselves stayed the same."""
        results.save(self._results(epoch))

    def read(self, epoch: int) -> Checkpoint | None:
        """Returns the state with which `epoch` begins; `None` where nothing came before it.

        Raises:
            ValueError: There are backups, but none of this epoch.
        """
        if self._path(epoch).exists():
            checkpoint = Checkpoint.load(self._path(epoch))
            with contextlib.suppress(FileNotFoundError):
                later = ProbeResults.load(self._results(epoch))
                checkpoint = dataclasses.replace(checkpoint, results=later)
            return checkpoint
        kept = sorted(path.name for path in self._directory.glob("epoch-*.probes"))
        if epoch and kept:
            raise ValueError(
                f"There is no backup of the probes for epoch {epoch}, at which this fit begins. "
                f"Received: backup_dir={str(self._directory)!r} with {', '.join(kept)}. Choose an "
                "empty directory to begin with new probes, or one backup_dir for each host."
            )
        return None

    def remove(self) -> None:
        """Deletes all of them, since the fit has come to its end."""
        for path in self._directory.glob("epoch-*"):
            _remove(path)

    def _path(self, epoch: int) -> pathlib.Path:
        return self._directory / f"epoch-{epoch:05d}.probes"

    def _results(self, epoch: int) -> pathlib.Path:
        return self._path(epoch).with_suffix(".results")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
