"""Where files are: on a disk, or behind a URL that fsspec reaches, such as s3://, gs://, memory://.

In: paths as users give them. Out: locations, which have the methods of `pathlib.Path`.
"""

import contextlib
import io
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, BinaryIO


def location(path: str | os.PathLike) -> Any:
    """A location.

    Args:
        path: A path, a URL, or a `upath.UPath`, which may have options such as an endpoint.

    Returns:
        A `pathlib.Path`, or a `UPath` for what is not on a disk.

    Raises:
        ImportError: It is a URL, and what reads these is not installed.
    """
    if isinstance(path, pathlib.Path) or "://" not in str(path):
        return pathlib.Path(path)
    try:
        from upath import UPath
    except ImportError as error:
        raise ImportError(
            f"{str(path)!r} is a URL. Install what reads it with: "
            'pip install "keras_probes[remote]"'
        ) from error
    # Others write at the same time: a listing of a while ago would hide it.
    return UPath(path, use_listings_cache=False)


def is_local(where: Any) -> bool:
    """Whether a location is on a disk."""
    return isinstance(where, pathlib.Path)


def make_directory(where: Any) -> None:
    """Makes a directory and those above it; an object store has none and needs none."""
    if is_local(where):
        where.mkdir(parents=True, exist_ok=True)


def remove(where: Any) -> None:
    """Removes a directory with all in it, if it is there."""
    if is_local(where):
        shutil.rmtree(where, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            where.fs.rm(where.path, recursive=True)


@contextlib.contextmanager
def replacing(where: Any) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of another once it is whole, and not before.

    Where a rename does that on a disk, a put of the whole does it in an object store.
    """
    if not is_local(where):
        content = io.BytesIO()
        yield content
        where.write_bytes(content.getvalue())
        return
    partial = where.with_name(where.name + ".partial")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, where)
