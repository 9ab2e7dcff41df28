"""Calls on a Ray cluster, or on this machine's own cores by way of Ray.

In: functions and their arguments. Out: futures. Each worker is an actor that lives until all calls
are done, so that what it loads, it loads once.
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any


@dataclasses.dataclass(frozen=True)
class RayEngine:
    """Where to run calls: on workers that Ray starts, and replaces when they die.

    `ray.init` is the user's: with `address="auto"` it joins a cluster. Where none was made, Ray is
    started on this machine for the length of the work, and ended.

    Attributes:
        workers: Number of workers, each on one core.
        gpus: Number of GPUs of each; 0.5 lets two share one.

    Raises:
        ValueError: A number that is out of its range.
    """

    workers: int
    gpus: float = 0

    def __post_init__(self) -> None:
        whole = isinstance(self.workers, int) and not isinstance(self.workers, bool)
        if not whole or self.workers < 1 or not self.gpus >= 0:
            raise ValueError(
                "Expected RayEngine(workers=, gpus=) with a whole number of workers from 1 on, and "
                f"of GPUs for each, from 0 on. Received: {self!r}."
            )

    @contextlib.contextmanager
    def started(self) -> Iterator["_Actors"]:
        """The workers, for as long as they are needed.

        Raises:
            ImportError: Ray is not installed.
        """
        ray = _ray()
        own = not ray.is_initialized()
        if own:
            cores = max(self.workers, os.cpu_count() or 1)
            ray.init(num_cpus=cores, include_dashboard=False, logging_level="warning")
        try:
            there = ray.cluster_resources().get("GPU", 0)
            if own and self.gpus > there:
                raise ValueError(
                    f"Expected GPUs for the workers. Received: {self!r}, and there are {there:g}."
                )
            with contextlib.closing(_Actors(self.workers, self.gpus)) as actors:
                yield actors
        finally:
            if own:
                ray.shutdown()


class _Actors:
    """Actors that take calls.

    Attributes:
        count: How many there are to be.
    """

    def __init__(self, count: int, gpus: float):
        self.count = count
        self._new = _ray().remote(num_cpus=1, num_gpus=gpus)(_Worker).remote
        self._changed = threading.Condition()
        self._starting: set[Any] = set()
        self._calls: dict[Any, int] = {}  # of actors that are up, how many each is busy with
        self._failed: BaseException | None = None  # why the last one did not start
        for _ in range(count):
            self._start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """Gives a call to the actor that has fewest, once there is one.

        Raises:
            RuntimeError: No actor could be started.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._calls or not self._starting)
            if not self._calls:
                raise RuntimeError(f"No Ray worker could be started: {self._failed}")
            actor = min(self._calls, key=self._calls.__getitem__)
            self._calls[actor] += 1
        future: Future = Future()
        future.set_running_or_notify_cancel()  # it can't be called back
        call = actor.call.remote(function, *args).future()
        call.add_done_callback(lambda ended: self._ended(actor, ended, future))
        return future

    def close(self) -> None:
        """Ends all actors."""
        with self._changed:
            actors = [*self._calls, *self._starting]
            self._calls.clear()
            self._starting.clear()
        for actor in actors:
            _ray().kill(actor)

    def _start(self) -> None:
        """Starts an actor; calls come to it only once it is up: there may be no room for it."""
        with self._changed:
            actor = self._new()
            self._starting.add(actor)
        actor.call.remote(int).future().add_done_callback(lambda up: self._came(actor, up))

    def _came(self, actor: Any, up: Future) -> None:
        with self._changed:
            if actor in self._starting:
                self._starting.remove(actor)
                self._failed = up.exception()
                if self._failed is None:
                    self._calls[actor] = 0
            self._changed.notify_all()

    def _ended(self, actor: Any, call: Future, future: Future) -> None:
        """Passes on what a call came to; an actor that has died is replaced."""
        error = call.exception()
        with self._changed:
            if actor in self._calls:
                self._calls[actor] -= 1
                if isinstance(error, _ray().exceptions.RayActorError):
                    del self._calls[actor]
                    self._start()
        if error is None:
            future.set_result(call.result())
        else:
            future.set_exception(getattr(error, "cause", None) or error)


class _Worker:
    """What an actor is: a process that calls functions."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls one."""
        return function(*args)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            'RayEngine needs Ray. Install it with: pip install "keras_probes[ray]"'
        ) from error
    return ray
