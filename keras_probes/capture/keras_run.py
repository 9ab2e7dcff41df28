"""What Keras does not tell a callback: which run is calling it, and with what.

In: the stack of calls below a callback. Out: the running `fit` or `evaluate`, its labels, how it
returns. Held by tests: both keep their callbacks in a `CallbackList` called `callbacks`, and `fit`
its labels in `y` and `val_y`, its weights in `sample_weight` and `val_sample_weight`.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from types import FrameType
from typing import Any

import keras

from keras_probes.taps.batches import arrays_of


def calling_lists() -> list[keras.callbacks.CallbackList]:
    """Returns the lists of callbacks that are calling, from the innermost out.

    To be called within a callback. Each `fit`, and each `evaluate` outside of one, has its own
    list, which so identifies it.
    """
    callers = (frame.f_locals.get("self") for frame in _callers())
    lists = (caller for caller in callers if isinstance(caller, keras.callbacks.CallbackList))
    return list(dict.fromkeys(lists))


def is_running(runs: Collection[Any]) -> bool:
    """Whether a `fit` or `evaluate` with one of these lists of callbacks is still going on."""
    return any(frame.f_locals.get("callbacks") in runs for frame in _callers())


def evaluate_returns_list(host: keras.Model) -> bool:
    """Whether the `evaluate` of `host` that is running was called without `return_dict=True`."""
    running = _running(host, "evaluate")
    return running is not None and not running.get("return_dict", False)


def labels_at_hand(host: keras.Model) -> dict[str, tuple[Any, Any]]:
    """The labels of the running `fit` of `host`, for training and validation, if it has arrays.

    Returns:
        By split: labels, and their sample weights, `None` where these are no arrays.
    """
    running = _running(host, "fit") or {}
    found = {
        split: tuple(arrays_of(running.get(prefix + of)) for of in ("y", "sample_weight"))
        for split, prefix in (("train", ""), ("validation", "val_"))
    }
    return {
        split: (labels, weights) for split, (labels, weights) in found.items() if labels is not None
    }


def quiet_progress_bar(hidden: Callable[[], Iterable[str]]) -> None:
    """Keeps keys off the progress bar of the run that is being set up.

    To be called within a callback's `set_model`. Logs reach all callbacks alike, and the bar would
    print every key at the end of an epoch, several lines of them.

    Args:
        hidden: Returns the keys to hide, without `val_`.
    """
    for run in calling_lists()[:1]:
        for bar in run.callbacks:
            if isinstance(bar, keras.callbacks.ProgbarLogger):
                for method in ("on_epoch_end", "on_test_end"):
                    vars(bar)[method] = _without_keys(getattr(bar, method), hidden)


def _without_keys(method: Callable, hidden: Callable[[], Iterable[str]]) -> Callable:
    def quiet(*args: Any, logs: Any = None) -> None:
        # Keras passes the logs last and by position.
        if logs is None:
            args, logs = args[:-1], args[-1]
        keys = set(hidden())
        method(*args, {k: v for k, v in (logs or {}).items() if k.removeprefix("val_") not in keys})

    return quiet


def _running(host: keras.Model, method: str) -> dict[str, Any] | None:
    """The arguments and variables of the innermost call of a method of `host`."""
    for frame in _callers():
        if frame.f_code.co_name == method and frame.f_locals.get("self") is host:
            return dict(frame.f_locals)
    return None


def _callers() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        yield frame
