"""Joining a host's steps: runs observers on the tensors of the batch that the host just computed.

In: a host inside `fit` or `evaluate`, and observers. Out: each observer called once a step, see
`steps`, and the observers' numbers in the epoch's logs.

This folder is the only place that touches the internals of Keras's trainer. What it relies on, each
held by a test: `fit` makes `train_function` before `on_train_begin` and looks it up at every step,
`evaluate` likewise with `test_function` and `on_test_begin`; both call the callbacks'
`on_*_batch_begin` right before the step, and hand what the last step returned to
`_get_metrics_result_or_logs`, once an epoch.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_probes.capture.keras_run import evaluate_returns_list, is_running
from keras_probes.capture.steps import Kind, Part, Steps

_EPOCH_LOGS = "_get_metrics_result_or_logs"
_LOGS_AS_LIST = "_flatten_metrics_in_order"

# Ends an epoch or an evaluation: takes which of the two and the host's own logs, and returns
# numbers to add to these.
EndPass = Callable[[Kind, Mapping[str, Any]], Mapping[str, float]]


class Joint:
    """Where observers are joined to one host's train and test steps.

    While an observer is attached, the host's compiled functions are replaced by guards. A guard
    runs the observed step only if an observer said, in its `on_*_batch_begin`, that the call which
    follows is its own; any other call (a plain `fit` after an interrupted one, `train_on_batch`,
    an `evaluate` by another callback) gets the host's plain function. So what an exception leaves
    behind is inert, and the first such call takes it off.

    Args:
        host: The model.
    """

    def __init__(self, host: keras.Model):
        self.host = host
        self.keys: set[str] = set()  # of all logs that observers have added
        self._attached: dict[Kind, dict[Any, EndPass]] = {"train": {}, "test": {}}
        self._expected: dict[Kind, dict[Any, Part | None]] = {"train": {}, "test": {}}
        # Weakly, so that whoever waits for the end of a run sees it, after an exception too.
        self._runs: weakref.WeakValueDictionary[Kind, Any] = weakref.WeakValueDictionary()
        self._guards: dict[Kind, Any] = {}
        self._last: dict[Kind, tuple[Any, list[Any]]] = {}  # what the last step returned
        self._steps = Steps(host)

    @classmethod
    def at(cls, host: keras.Model) -> "Joint | None":
        """Returns the joint that is in place on `host`, if any."""
        return getattr(vars(host).get(_EPOCH_LOGS), "joint", None)

    def attach(self, kind: Kind, observer: Any, end_pass: EndPass, run: object) -> None:
        """Joins `observer` to the steps of `kind`; once the host's function for them is made.

        Args:
            kind: Which steps.
            observer: What to run in them, an `Observer`; anything else can be told of their end.
            end_pass: Called once when the epoch or evaluation of these steps ends.
            run: Identifies the `fit` or `evaluate`, see `calling_lists`. Observers that a run
                before it left attached, since it was interrupted, are let go.
        """
        if run is not None and run is not self._runs.get(kind):
            self._runs[kind] = run
            self._attached[kind].clear()
        self._attached[kind][observer] = end_pass
        self._steps.expect(kind, observer)
        self._expected[kind].clear()
        self._last.pop(kind, None)
        function = getattr(self.host, f"{kind}_function")
        if function is None:  # no `fit` has made one: a loop of one's own, whose steps nobody sees
            return
        if function is not self._guards.get(kind):
            self._guards[kind] = self._guard(kind, function)
            setattr(self.host, f"{kind}_function", self._guards[kind])
        if Joint.at(self.host) is not self:
            self._replace_epoch_logs()

    def detach(self, kind: Kind, observer: Any) -> None:
        """Takes `observer` off; the last one to go leaves the host as it was."""
        self._attached[kind].pop(observer, None)
        if not self._attached[kind]:
            self._restore(kind)
            if kind == "test" and evaluate_returns_list(self.host):
                self._keep_off_list()
        if not any(self._attached.values()):
            self._restore_epoch_logs()

    def expect(self, kind: Kind, observer: Any, part: Part | None = Part()) -> None:  # noqa: B008
        """Says that the host's next step of `kind` belongs to a run `observer` takes part in.

        Args:
            kind: Which steps.
            observer: What to run in it.
            part: What part it takes; `None` of what is only told of the end of the run. In a step
                without any, the host is as if nobody were there.
        """
        if observer in self._attached[kind]:
            self._expected[kind][observer] = part

    def _guard(self, kind: Kind, plain: Callable) -> Callable:
        """What stands in for the host's function."""

        def guard(iterator: Any) -> Any:
            parts, self._expected[kind] = self._expected[kind], {}
            if not parts:
                if not self._running():
                    self._remove()
                return plain(iterator)
            try:
                taken = {observer: part for observer, part in parts.items() if part is not None}
                logs = self._steps.take(kind, taken, plain, iterator)
            except (StopIteration, tf.errors.OutOfRangeError):  # the data has run out
                self._steps.forget_batches()
                raise
            except BaseException:
                self._steps.forget_batches()
                self._remove()
                raise
            self._last[kind] = (logs, list(parts))
            return logs

        guard.plain = plain  # type: ignore[attr-defined]
        return guard

    def _replace_epoch_logs(self) -> None:
        epoch_logs = getattr(self.host, _EPOCH_LOGS)

        def with_observers(logs: Any) -> Any:
            result = epoch_logs(logs)
            ended = next((kind for kind, (last, _) in self._last.items() if logs is last), None)
            if ended is None or logs is None:
                if not self._running():
                    self._remove()  # where `compile` took the guards, no step did it
                return result
            _, observers = self._last.pop(ended)
            added: dict[str, float] = {}
            try:
                for observer in observers:
                    added.update(self._attached[ended][observer](ended, result))
            except BaseException:
                self._remove()
                raise
            self.keys |= added.keys()
            return {**result, **added}

        with_observers.joint = self  # type: ignore[attr-defined]
        vars(self.host)[_EPOCH_LOGS] = with_observers

    def _keep_off_list(self) -> None:
        """Keeps the observers' logs off the list that the running `evaluate` goes on to make."""
        own, as_list = vars(self.host), getattr(self.host, _LOGS_AS_LIST)

        def without_observers(logs: dict[str, Any]) -> Any:
            own.pop(_LOGS_AS_LIST, None)
            return as_list({key: v for key, v in logs.items() if key not in self.keys})

        own[_LOGS_AS_LIST] = without_observers

    def _restore(self, kind: Kind) -> None:
        guard = self._guards.pop(kind, None)
        if guard is not None and getattr(self.host, f"{kind}_function") is guard:
            setattr(self.host, f"{kind}_function", guard.plain)

    def _restore_epoch_logs(self) -> None:
        if Joint.at(self.host) is self:
            del vars(self.host)[_EPOCH_LOGS]

    def _running(self) -> bool:
        """Whether a `fit` or `evaluate` that observers are attached to is still going on."""
        return is_running(list(self._runs.values()))

    def _remove(self) -> None:
        for kind in ("train", "test"):
            self._attached[kind].clear()
            self._restore(kind)
        self._restore_epoch_logs()
