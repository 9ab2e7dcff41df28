"""Joining a host's steps: runs observers on the tensors of the batch that the host just computed.

In: a host inside `fit` or `evaluate`, and observers. Out: each observer called once a step, within
the host's own compiled step or, isolated from it, after a second forward pass of its own; and the
observers' numbers in the epoch's logs.

This is the only file that touches the internals of Keras's trainer. What it relies on, each held by
a test: `fit` makes `train_function` before `on_train_begin` and looks it up at every step,
`evaluate` likewise with `test_function` and `on_test_begin`; both call the callbacks'
`on_*_batch_begin` right before the step, and hand what the last step returned to
`_get_metrics_result_or_logs`, once an epoch.
"""

import contextlib
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Literal, NamedTuple, Protocol

import keras
import numpy as np
import tensorflow as tf

from keras_probes.taps.graph import call_at_inference
from keras_probes.taps.record import Recording, record_calls

Kind = Literal["train", "test"]


class Part(NamedTuple):
    """What part an observer takes in a step.

    Attributes:
        observe: Whether it runs in the step.
        keep: Whether it is given the step's batches before that.
    """

    observe: bool = True
    keep: bool = False


_EPOCH_LOGS = "_get_metrics_result_or_logs"
_OF_REPLICAS = "_value_specs"
_LOGS_AS_LIST = "_flatten_metrics_in_order"


class Observer(Protocol):
    """What rides along in a host's steps.

    Attributes:
        isolated: Whether it wants a forward pass of its own, at inference, before the host's step.
    """

    isolated: bool

    def prepare(self, data_spec: Any) -> None:
        """Gets ready for batches of this spec; called before the first step of a fit."""

    def check(self, batches: Iterable[Any]) -> None:
        """Looks at data of a fit before the host trains on any, to refuse it.

        Args:
            batches: Each as the host's step takes it, or with `None` in the place of x.
        """

    def keep(self, batches: Sequence[Any], spec: Any) -> None:
        """Takes the batches of a step it asked to be shown, before the host's step does.

        Args:
            batches: As the host's step takes them: several if a step runs several.
            spec: Structure of `tf.TensorSpec` of any batch of these data.
        """

    def layers(self) -> Iterable[keras.Operation]:
        """The layers it wants to listen to; asked after `prepare`."""

    def observe(self, kind: Kind, recording: Recording, data: Any) -> None:
        """Takes in one batch; runs within a traced step."""


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
        self._attached: dict[Kind, dict[Observer, EndPass]] = {"train": {}, "test": {}}
        self._expected: dict[Kind, dict[Observer, Part]] = {"train": {}, "test": {}}
        # Weakly, so that whoever waits for the end of a run sees it, after an exception too.
        self._runs: weakref.WeakValueDictionary[Kind, Any] = weakref.WeakValueDictionary()
        self._unprepared: set[tuple[Kind, Observer]] = set()
        self._guards: dict[Kind, Any] = {}
        self._observed: dict[tuple, tuple[Callable, Any]] = {}  # key -> (plain, what stands for it)
        self._last: dict[Kind, tuple[Any, list[Observer]]] = {}  # what the last step returned
        self._relays: dict[str, _Relay] = {}  # by spec

    @classmethod
    def at(cls, host: keras.Model) -> "Joint | None":
        """Returns the joint that is in place on `host`, if any."""
        return getattr(vars(host).get(_EPOCH_LOGS), "joint", None)

    def attach(self, kind: Kind, observer: Observer, end_pass: EndPass, run: object) -> None:
        """Joins `observer` to the steps of `kind`; once the host's function for them is made.

        Args:
            kind: Which steps.
            observer: What to run in them.
            end_pass: Called once when the epoch or evaluation of these steps ends.
            run: Identifies the `fit` or `evaluate`, see `calling_lists`. Observers that a run
                before it left attached, since it was interrupted, are let go.
        """
        if run is not None and run is not self._runs.get(kind):
            self._runs[kind] = run
            self._attached[kind].clear()
        self._attached[kind][observer] = end_pass
        self._unprepared.add((kind, observer))
        self._expected[kind].clear()
        self._last.pop(kind, None)
        function = getattr(self.host, f"{kind}_function")
        if function is not self._guards.get(kind):
            self._guards[kind] = self._guard(kind, function)
            setattr(self.host, f"{kind}_function", self._guards[kind])
        if Joint.at(self.host) is not self:
            self._replace_epoch_logs()

    def detach(self, kind: Kind, observer: Observer) -> None:
        """Takes `observer` off; the last one to go leaves the host as it was."""
        self._attached[kind].pop(observer, None)
        if not self._attached[kind]:
            self._restore(kind)
            if kind == "test" and _evaluate_returns_list(self.host):
                self._keep_off_list()
        if not any(self._attached.values()):
            self._restore_epoch_logs()

    def expect(self, kind: Kind, observer: Observer, part: Part = Part()) -> None:  # noqa: B008
        """Says that the host's next step of `kind` belongs to a run `observer` takes part in.

        Args:
            kind: Which steps.
            observer: What to run in it.
            part: What part it takes; in a step without any, the host is as if nobody were there.
        """
        if observer in self._attached[kind]:
            self._expected[kind][observer] = part

    # The compiled functions.

    def _guard(self, kind: Kind, plain: Callable) -> Callable:
        def guard(iterator: Any) -> Any:
            observers, self._expected[kind] = self._expected[kind], {}
            if not observers:
                if not self._running():
                    self._remove()
                return plain(iterator)
            try:
                logs = self._step(kind, observers, plain, iterator)
            except (StopIteration, tf.errors.OutOfRangeError):  # the data has run out
                self._relays.clear()
                raise
            except BaseException:
                self._relays.clear()  # a batch that no step took is not the next fit's
                self._remove()
                raise
            self._last[kind] = (logs, list(observers))
            return logs

        guard.plain = plain  # type: ignore[attr-defined]
        return guard

    def _step(self, kind: Kind, parts: dict[Observer, Part], plain: Callable, iterator: Any) -> Any:
        observers = [observer for observer, part in parts.items() if part.observe]
        keeping = [observer for observer, part in parts.items() if part.keep]
        if not observers and not keeping:
            return plain(iterator)
        spec = iterator.element_spec
        of_replica = keras.tree.map_structure(_of_replica, spec)
        fresh = [o for o in parts if (kind, o) in self._unprepared]
        for observer in fresh:
            observer.prepare(of_replica)
            self._unprepared.remove((kind, observer))
        if kind == "train" and fresh:
            for labels in _labels_at_hand(self.host):
                for observer in fresh:
                    observer.check((None, part) for part in _in_parts(labels))
        replicated = _is_replicated(spec)
        if kind == "train" and (fresh or keeping) and not replicated:
            iterator = self._shown(fresh, keeping, iterator, spec)

        shared = [o for o in observers if not o.isolated]
        isolated = [o for o in observers if o.isolated]
        step = self._shared(kind, shared, plain) if shared else plain
        if isolated or (replicated and kind == "train"):
            keeping = keeping if replicated else []
            step = self._one_by_one(kind, isolated, keeping, step, spec)
        return step(iterator)

    def _shown(
        self, fresh: list[Observer], keeping: list[Observer], iterator: Iterator, spec: Any
    ) -> Iterator:
        """Shows observers the batches of a step, and returns an iterator of the same."""
        batches = list(itertools.islice(iterator, self.host.steps_per_execution))
        for observer in fresh if batches else []:
            observer.check(batches)
        for observer in keeping if batches else []:
            observer.keep(batches, spec)
        return self._relayed(batches, spec)

    def _relayed(self, batches: Sequence[Any], spec: Any) -> Iterator:
        """An iterator over batches at hand, for the host's function: any other would be retraced.

        Args:
            batches: As many as the function takes, or fewer where the data have run out.
            spec: That of the host's own iterator.
        """
        if len(batches) < self.host.steps_per_execution:
            relay = _Relay(spec)  # it comes to its end
        else:
            relay = self._relays.get(str(spec)) or _Relay(spec)
            self._relays[str(spec)] = relay
        relay.put(batches)
        return relay.iterator

    def _shared(self, kind: Kind, observers: list[Observer], plain: Callable) -> Callable:
        """The host's function, compiled anew with the observers inside of its step."""
        host_step = getattr(self.host, f"{kind}_step")

        def step(data: Any) -> Any:
            with record_calls(self.host, _layers(observers)) as recording:
                outputs = host_step(data)
            for observer in observers:
                observer.observe(kind, recording, data)
            return outputs

        def make() -> Callable:
            if kind == "train":
                _build_optimizer(self.host)
            with _instance_attribute(self.host, f"{kind}_step", step):
                getattr(self.host, f"make_{kind}_function")(force=True)
            made = getattr(self.host, f"{kind}_function")
            setattr(self.host, f"{kind}_function", self._guards[kind])
            return made

        return self._cached((kind, "shared", *map(id, observers)), plain, make)

    def _one_by_one(
        self,
        kind: Kind,
        observers: list[Observer],
        keeping: list[Observer],
        step: Callable,
        spec: Any,
    ) -> Callable:
        """A function of an iterator: for each batch the observers' forward pass, then `step`.

        The two are compiled apart, so that neither changes how the other is. The step is the host's
        own function, and gets an iterator of what it would get: which of its traces serves a batch,
        those made by earlier runs decide, and last bits change with it. Of batches of several
        replicas no iterator can be made again: they are kept here, and a step of them is compiled.
        """

        def look(data: Any) -> None:
            x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
            with record_calls(self.host, _layers(observers)) as recording, keras.StatelessScope():
                call_at_inference(self.host, x)
            for observer in observers:
                observer.observe(kind, recording, data)

        def look_everywhere(data: Any) -> None:
            self.host.distribute_strategy.run(look, (data,))

        def on_replicas(data: Any) -> Any:
            # A host's own `train_function` may be traced twice, and each time ask for the batch.
            once = self.host.steps_per_execution > 1
            return step(iter([data]) if once else itertools.repeat(data))

        def on_batch(data: Any) -> Any:
            return step(self._relayed([data], spec))

        def make() -> tuple[Callable, Callable]:
            compiled = self._compiled(on_replicas, spec) if _is_replicated(spec) else on_batch
            return self._compiled(look_everywhere, spec), compiled

        key = (kind, "one by one", str(spec), *map(id, observers))
        look_at, take_step = self._cached(key, step, make)

        def in_turn(iterator: Iterator) -> Any:
            logs = None
            for batch in range(self.host.steps_per_execution):
                try:
                    data = next(iterator)
                except StopIteration:
                    if batch:
                        break
                    raise
                for observer in keeping:
                    observer.keep(
                        self._of_replicas(data), keras.tree.map_structure(_of_replica, spec)
                    )
                if observers:
                    look_at(data)
                logs = take_step(data)
            return logs

        return in_turn

    def _of_replicas(self, data: Any) -> list[Any]:
        """A global batch as the batches of its replicas."""
        parts = tf.nest.flatten(data)
        local = map(self.host.distribute_strategy.experimental_local_results, parts)
        return [tf.nest.pack_sequence_as(data, of_one) for of_one in zip(*local, strict=True)]

    def _compiled(self, function: Callable, spec: Any) -> Callable:
        """Compiles a function of a batch for the shapes of the whole data, not of one batch.

        The host's step then sees the sizes it would see without observers: with a batch size known
        while tracing, the compiler folds constants otherwise, and last bits change.
        """
        if self.host.run_eagerly:
            return function
        return tf.function(function, input_signature=[spec], autograph=False)

    def _cached(self, key: tuple, plain: Callable, make: Callable[[], Any]) -> Any:
        """Compiles once for each function it stands for: `compile()` makes the host a new one."""
        if key not in self._observed or self._observed[key][0] is not plain:
            self._observed[key] = (plain, make())
        return self._observed[key][1]

    # The logs.

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
        runs = list(self._runs.values())
        return any(frame.f_locals.get("callbacks") in runs for frame in _callers())

    def _remove(self) -> None:
        for kind in ("train", "test"):
            self._attached[kind].clear()
            self._restore(kind)
        self._restore_epoch_logs()


class _Relay:
    """An iterator over what is put into it, which ends when nothing is left.

    A dataset made for each step would take as long as the step of a small host.

    Args:
        spec: Of the batches.
    """

    def __init__(self, spec: Any):
        parts = tf.nest.flatten(spec, expand_composites=True)
        with tf.device("cpu:0"):
            self._queue = tf.queue.FIFOQueue(-1, [part.dtype for part in parts])

        def take(_: tf.Tensor) -> Any:
            taken = self._queue.dequeue()
            taken = taken if len(parts) > 1 else [taken]
            for tensor, part in zip(taken, parts, strict=True):
                tensor.set_shape(part.shape)
            return tf.nest.pack_sequence_as(spec, taken, expand_composites=True)

        # Tuning takes a thread, for which the end of the iterator would have to wait.
        options = tf.data.Options()
        options.autotune.enabled = False
        options.experimental_optimization.apply_default_optimizations = False
        counter = tf.data.Dataset.counter().take_while(lambda _: self._queue.size() > 0)
        self.iterator = iter(counter.map(take).with_options(options))

    def put(self, batches: Iterable[Any]) -> None:
        """Puts batches behind those that are there."""
        for batch in batches:
            self._queue.enqueue(tf.nest.flatten(batch, expand_composites=True))


def _is_replicated(spec: Any) -> bool:
    return any(hasattr(part, _OF_REPLICAS) for part in tf.nest.flatten(spec))


def _of_replica(spec: Any) -> Any:
    """The spec of what one replica gets of a batch."""
    return getattr(spec, _OF_REPLICAS, [spec])[0]


def has_own_step(host: keras.Model) -> bool:
    """Whether the host's `train_step` is its own and not Keras's."""
    return type(host).train_step is not keras.Model.train_step


def _build_optimizer(host: keras.Model) -> None:
    """Makes the optimizer's slots: TensorFlow throws away the first trace of what makes variables.

    Left to the host where it has a step of its own, which may do without.
    """
    if not has_own_step(host) and not host.optimizer.built:
        with host.distribute_strategy.scope():
            host.optimizer.build(host.trainable_variables)


def _layers(observers: Iterable[Observer]) -> list[keras.Operation]:
    """Each layer that some observer wants to listen to, once."""
    return list(dict.fromkeys(layer for observer in observers for layer in observer.layers()))


@contextlib.contextmanager
def _instance_attribute(host: keras.Model, name: str, value: Any) -> Iterator[None]:
    """Shadows a method of `host` for a while, out of sight of Keras's attribute tracking."""
    own = vars(host)
    had_own, original = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had_own:
            own[name] = original
        else:
            del own[name]


def _evaluate_returns_list(host: keras.Model) -> bool:
    """Whether the `evaluate` of `host` that is running was called without `return_dict=True`."""
    for frame in _callers():
        if frame.f_code.co_name == "evaluate" and frame.f_locals.get("self") is host:
            return not frame.f_locals.get("return_dict", False)
    return False


def _labels_at_hand(host: keras.Model) -> Iterator[Any]:
    """The labels, for training and validation, of the running `fit` of `host` if it has arrays."""
    for frame in _callers():
        if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is host:
            for labels in (frame.f_locals.get("y"), frame.f_locals.get("val_y")):
                arrays = keras.tree.flatten(labels)
                if arrays and all(hasattr(array, "__array__") for array in arrays):
                    yield keras.tree.map_structure(np.asarray, labels)
            return


def _in_parts(arrays: Any, rows: int = 2**16) -> Iterator[Any]:
    """Slices of a structure of arrays, so that a look at them needs little memory."""
    for start in range(0, max(map(len, keras.tree.flatten(arrays))), rows):
        yield keras.tree.map_structure(lambda array, s=start: array[s : s + rows], arrays)


def calling_lists() -> list[keras.callbacks.CallbackList]:
    """Returns the lists of callbacks that are calling, from the innermost out.

    To be called within a callback. Each `fit`, and each `evaluate` outside of one, has its own
    list, which so identifies it; Keras gives a callback no other way to it.
    """
    callers = (frame.f_locals.get("self") for frame in _callers())
    lists = (caller for caller in callers if isinstance(caller, keras.callbacks.CallbackList))
    return list(dict.fromkeys(lists))


def quiet_progress_bar(joint: Callable[[], Joint | None]) -> None:
    """Keeps the observers' keys off the progress bar of the run that is being set up.

    To be called within a callback's `set_model`. Logs reach all callbacks alike, and the bar would
    print every key at the end of an epoch, several lines of them.

    Args:
        joint: Returns the joint whose `keys` to hide.
    """
    for run in calling_lists()[:1]:
        for bar in run.callbacks:
            if isinstance(bar, keras.callbacks.ProgbarLogger):
                for method in ("on_epoch_end", "on_test_end"):
                    vars(bar)[method] = _without_keys(getattr(bar, method), joint)


def _callers() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        yield frame


def _without_keys(method: Callable, joint: Callable[[], Joint | None]) -> Callable:
    def quiet(*args: Any, logs: Any = None) -> None:
        # Keras passes the logs last and by position.
        if logs is None:
            args, logs = args[:-1], args[-1]
        keys = getattr(joint(), "keys", ())
        method(*args, {k: v for k, v in (logs or {}).items() if k.removeprefix("val_") not in keys})

    return quiet
