"""Many calls of one function, on whatever runs them.

In: an engine, a function and the arguments of each call. Out: what each call returned, or why it
failed for good, in the order in which calls end. A call may run several times: what it does must
come to the same.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeAlias

from keras_probes.engines.on_ray import RayEngine

TRIES = 3  # of a call, the first one among them
AHEAD = 2  # calls per worker that are handed over at a time
UNKNOWN_WORKERS = 32  # of an executor that does not say how many it has

Engine: TypeAlias = concurrent.futures.Executor | RayEngine


class Workers(Protocol):
    """What runs calls.

    Attributes:
        count: How many calls it runs at a time.
    """

    count: int

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Starts a call."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
        args: Of the call.
        result: What it returned.
        error: Why it failed, each time; `None` if it did not.
    """

    args: tuple
    result: Any = None
    error: Exception | None = None


def run(
    engine: Engine | None, function: Callable[..., Any], calls: Iterable[tuple]
) -> Generator[Outcome]:
    """Runs calls of a function.

    Those that fail are tried again, `TRIES` times in all, the last time alone, since a call that
    ends its worker may take others with it. In this process, where another try would come to the
    same, there is one.

    Args:
        engine: Where to; `None` for this process.
        function: What to call; on an engine, one that can be imported there.
        calls: Arguments, taken as workers become free.

    Yields:
        The outcome of each call, as it comes.
    """
    if engine is None:
        yield from map(functools.partial(_here, function), calls)
        return
    with _workers(engine) as workers:
        new = ((args, 1) for args in calls)
        again = collections.deque[tuple[tuple, int]]()
        running: dict[Future, tuple[tuple, int]] = {}
        try:
            while True:
                while len(running) < AHEAD * workers.count and not _any_last(running.values()):
                    call = again[0] if again else next(new, None)
                    if call is None or (running and _any_last([call])):
                        break
                    if again:
                        again.popleft()
                    running[workers.submit(function, *call[0])] = call
                if not running:
                    return
                done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                for future in done:
                    args, tries = running.pop(future)
                    try:
                        yield Outcome(args, future.result())
                    except Exception as error:
                        if tries == TRIES:
                            yield Outcome(args, error=error)
                        else:
                            again.append((args, tries + 1))
        finally:  # nothing goes on behind the caller's back
            for future in running:
                future.cancel()
            concurrent.futures.wait(running)


def _any_last(calls: Iterable[tuple[tuple, int]]) -> bool:
    return any(tries == TRIES for _, tries in calls)


def _here(function: Callable[..., Any], args: tuple) -> Outcome:
    try:
        return Outcome(args, function(*args))
    except Exception as error:
        return Outcome(args, error=error)


def check_engine(engine: Any) -> None:
    """Raises a `TypeError` if it is none."""
    if engine is not None and not isinstance(engine, Engine):
        raise TypeError(
            "Expected `engine` to be None, a keras_probes.RayEngine, or an Executor as of "
            f"concurrent.futures. Received: {engine!r}."
        )


@contextlib.contextmanager
def _workers(engine: Engine) -> Iterator[Workers]:
    if isinstance(engine, RayEngine):
        with engine.started() as actors:
            yield actors
    elif type(engine) is ProcessPoolExecutor:
        with contextlib.closing(_Processes(_count(engine))) as processes:
            yield processes
    else:
        yield _OfExecutor(engine)


def _count(executor: concurrent.futures.Executor) -> int:
    return getattr(executor, "_max_workers", UNKNOWN_WORKERS)


class _OfExecutor:
    """Any executor, which is its owner's to start and to end."""

    def __init__(self, executor: concurrent.futures.Executor):
        self.count = _count(executor)
        self._executor = executor

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        return self._executor.submit(function, *args)


class _Processes:
    """As many processes as a pool has, started afresh.

    A pool forks by default, and TensorFlow does not run in a fork of a process that has used it.
    And a pool is of no use any more when one of its processes has died; this one starts another.
    """

    def __init__(self, count: int):
        self.count = count
        self._pool = self._started()

    def _started(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.count, mp_context=context, initializer=_end_with_parent)

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        try:
            return self._pool.submit(function, *args)
        except BrokenProcessPool:
            self.close()
            self._pool = self._started()
            return self._pool.submit(function, *args)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this process with the one that started it, which may have been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
