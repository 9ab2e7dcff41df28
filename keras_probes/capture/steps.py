"""A host's steps with observers in them: within the host's own compiled step, or before it.

In: a host's function for a step, its iterator, and observers. Out: what the function returns, each
observer called once a batch on the tensors that the host computed, or on those of a forward pass of
its own.
"""

import contextlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import keras
import tensorflow as tf

from keras_probes.capture.keras_run import labels_at_hand
from keras_probes.capture.relay import Relays
from keras_probes.taps.graph import call_at_inference
from keras_probes.taps.record import Recording, record_calls

Kind = Literal["train", "test"]

_OF_REPLICAS = "_value_specs"


class Part(NamedTuple):
    """What part an observer takes in a step.

    Attributes:
        observe: Whether it runs in the step.
        keep: Whether it is given the step's batches before that.
    """

    observe: bool = True
    keep: bool = False


class Observer(Protocol):
    """What rides along in a host's steps.

    Attributes:
        isolated: Whether it wants a forward pass of its own, at inference, before the host's step.
        probed: The model whose calls it listens to, after `prepare`: the host, or one within it.
        unpack: Takes a batch as the host's step does; returns (x, y, sample_weight).
    """

    isolated: bool
    probed: keras.Model
    unpack: Callable[[Any], tuple[Any, Any, Any]]

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
            batches: As the host's step takes them: several if a step runs several, or if there are
                several replicas.
            spec: Structure of `tf.TensorSpec` of any batch of these data.
        """

    def layers(self) -> Iterable[keras.Operation]:
        """The layers it wants to listen to; asked after `prepare`."""

    def observe(self, kind: Kind, recording: Recording, data: tuple[Any, Any, Any]) -> None:
        """Takes in one batch, as `unpack` returns it; runs within a traced step."""


class Steps:
    """The steps of one host, with observers in them.

    Args:
        host: The model.
    """

    def __init__(self, host: keras.Model):
        self._host = host
        self._new: set[tuple[Kind, Observer]] = set()
        self._made: dict[tuple, tuple[Callable, Any]] = {}  # key -> (plain, what stands for it)
        self._relays = Relays()

    def expect(self, kind: Kind, observer: Observer) -> None:
        """Says that the next step with this observer is the first of its run."""
        self._new.add((kind, observer))

    def forget_batches(self) -> None:
        """Lets go of batches that a step which failed did not take."""
        self._relays.clear()

    def take(
        self, kind: Kind, parts: Mapping[Observer, Part], plain: Callable, iterator: Any
    ) -> Any:
        """Runs a step of the host.

        Args:
            kind: Which one.
            parts: What part each observer takes in it.
            plain: The host's own function of an iterator.
            iterator: The host's, over its data.

        Returns:
            What the host's function returns.
        """
        observers = [observer for observer, part in parts.items() if part.observe]
        keeping = [observer for observer, part in parts.items() if part.keep]
        if not observers and not keeping:
            return plain(iterator)
        spec = iterator.element_spec
        replicated = any(hasattr(part, _OF_REPLICAS) for part in tf.nest.flatten(spec))
        of_replica = keras.tree.map_structure(_of_replica, spec)
        fresh = self._prepared(kind, parts, of_replica)
        shared = [o for o in observers if not o.isolated]
        isolated = [o for o in observers if o.isolated]
        step = self._shared(kind, shared, plain, of_replica) if shared else plain
        one_by_one = bool(isolated) or (replicated and kind == "train")
        if not (one_by_one or fresh or keeping):
            return step(iterator)

        batches = list(itertools.islice(iterator, self._host.steps_per_execution))
        if not batches:
            raise StopIteration
        if fresh or keeping:
            each = [part for batch in batches for part in self._of_replicas(batch)]
            for observer in fresh:
                observer.check(each)
            for observer in keeping:
                observer.keep(each, of_replica)
        if not one_by_one:
            return step(self._relayed(batches, spec))
        look, take = self._apart(kind, isolated, step, spec, replicated)
        for batch in batches:
            look(batch)
            logs = take(batch)
        return logs

    def _prepared(self, kind: Kind, observers: Iterable[Observer], spec: Any) -> list[Observer]:
        """Gets those ready that are new; returns those to show the data of training to."""
        fresh = [observer for observer in observers if (kind, observer) in self._new]
        for observer in fresh:
            observer.prepare(spec)
            self._new.remove((kind, observer))
        if kind == "test" or not fresh:
            return []
        for labels in labels_at_hand(self._host).values():
            for observer in fresh:
                if observer.unpack is keras.utils.unpack_x_y_sample_weight:
                    observer.check((None, *part) for part in _in_parts(labels))
        return fresh

    def _shared(
        self, kind: Kind, observers: list[Observer], plain: Callable, spec: Any
    ) -> Callable:
        """The host's function, compiled anew with the observers inside of its step."""
        host = self._host
        host_step = getattr(host, f"{kind}_step")

        def step(data: Any) -> Any:
            parts = {observer: observer.unpack(data) for observer in observers}
            with contextlib.ExitStack() as recorded:
                recordings = {
                    observer: recorded.enter_context(
                        record_calls(observer.probed, observer.layers(), part[0])
                    )
                    for observer, part in parts.items()
                }
                outputs = host_step(data)
            for observer, recording in recordings.items():
                observer.observe(kind, recording, parts[observer])
            return outputs

        def make() -> Callable:
            if kind == "train":
                _build_state(host, spec)
            in_place = getattr(host, f"{kind}_function")
            with _instance_attribute(host, f"{kind}_step", step):
                getattr(host, f"make_{kind}_function")(force=True)
            made = getattr(host, f"{kind}_function")
            setattr(host, f"{kind}_function", in_place)
            return made

        return self._cached((kind, "shared", *map(id, observers)), plain, make)

    def _apart(
        self, kind: Kind, observers: list[Observer], step: Callable, spec: Any, replicated: bool
    ) -> tuple[Callable, Callable]:
        """Two functions of a batch: the observers' forward pass, and `step`.

        The two are compiled apart, so that neither changes how the other is. The step is the host's
        own function, and gets an iterator of what it would get: which of its traces serves a batch,
        those made by earlier runs decide, and last bits change with it. Of batches of several
        replicas no iterator can be made again: a step of them is compiled.
        """
        host = self._host

        alike = defaultdict(list)  # one forward pass serves those that look at the same
        for observer in observers:
            alike[observer.probed, observer.unpack].append(observer)

        def look(data: Any) -> None:
            for (probed, unpack), some in alike.items():
                part = unpack(data)
                with record_calls(probed, _layers(some)) as recording, keras.StatelessScope():
                    call_at_inference(probed, part[0])
                for observer in some:
                    observer.observe(kind, recording, part)

        def look_everywhere(data: Any) -> None:
            host.distribute_strategy.run(look, (data,))

        def on_replicas(data: Any) -> Any:
            # A host's own `train_function` may be traced twice, and each time ask for the batch.
            once = host.steps_per_execution > 1
            return step(iter([data]) if once else itertools.repeat(data))

        def on_batch(data: Any) -> Any:
            return step(self._relayed([data], spec))

        def make() -> tuple[Callable, Callable]:
            looking = self._compiled(look_everywhere, spec) if observers else lambda _: None
            return looking, self._compiled(on_replicas, spec) if replicated else on_batch

        return self._cached((kind, "apart", str(spec), *map(id, observers)), step, make)

    def _compiled(self, function: Callable, spec: Any) -> Callable:
        """Compiles a function of a batch for the shapes of the whole data, not of one batch.

        The host's step then sees the sizes it would see without observers: with a batch size known
        while tracing, the compiler folds constants otherwise, and last bits change.
        """
        if self._host.run_eagerly:
            return function
        return tf.function(function, input_signature=[spec], autograph=False)

    def _cached(self, key: tuple, plain: Callable, make: Callable[[], Any]) -> Any:
        """Compiles once for each function it stands for: `compile()` makes the host a new one."""
        if key not in self._made or self._made[key][0] is not plain:
            self._made[key] = (plain, make())
        return self._made[key][1]

    def _relayed(self, batches: Sequence[Any], spec: Any) -> Iterator:
        """An iterator over batches at hand: as many as the function takes, or the last ones."""
        ends = len(batches) < self._host.steps_per_execution
        return self._relays.iterator(batches, spec, ends=ends)

    def _of_replicas(self, data: Any) -> list[Any]:
        """A global batch as the batches of its replicas."""
        parts = tf.nest.flatten(data)
        local = map(self._host.distribute_strategy.experimental_local_results, parts)
        return [tf.nest.pack_sequence_as(data, of_one) for of_one in zip(*local, strict=True)]


def has_own_step(host: keras.Model) -> bool:
    """Whether the host's `train_step` is its own and not Keras's."""
    return type(host).train_step is not keras.Model.train_step


def _build_state(host: keras.Model, spec: Any) -> None:
    """Makes the optimizer's slots and the metrics, before a step is traced that would.

    TensorFlow throws away the first trace of what makes variables. Left to the host where it has a
    step of its own, which may do without.

    Args:
        host: The model.
        spec: Structure of `tf.TensorSpec` of a batch.
    """
    if has_own_step(host):
        return
    with host.distribute_strategy.scope():
        if not host.optimizer.built:
            host.optimizer.build(host.trainable_variables)
        # As Keras itself does under a strategy. What can't be built so, the first trace builds.
        with contextlib.suppress(Exception):
            host._symbolic_build(data_batch=spec)


def _of_replica(spec: Any) -> Any:
    """The spec of what one replica gets of a batch."""
    return getattr(spec, _OF_REPLICAS, [spec])[0]


def _layers(observers: Iterable[Observer]) -> list[keras.Operation]:
    """Each layer that some observer wants to listen to, once."""
    return list(dict.fromkeys(layer for observer in observers for layer in observer.layers()))


def _in_parts(arrays: Any, numbers: int = 2**22) -> Iterator[Any]:
    """Slices of a structure of arrays and `None`, so that a look at them needs little memory.

    Args:
        arrays: The structure.
        numbers: How many numbers a slice has at most.
    """
    some = [array for array in keras.tree.flatten(arrays) if array is not None]
    rows = max(1, numbers // max(math.prod(array.shape[1:]) for array in some))
    for start in range(0, max(map(len, some)), rows):
        part = slice(start, start + rows)
        yield keras.tree.map_structure(lambda of, at=part: None if of is None else of[at], arrays)


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
