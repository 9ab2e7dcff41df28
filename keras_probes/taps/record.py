"""Seeing a layer's tensors: records what goes through each layer while a host is called.

In: a host, and code that calls it. Out: a `Recording`, the tensors by `Site`.

Keras runs a layer as `Layer.__call__` -> `self.call`, and an instance attribute `call` is honoured
there, even on a built and locked layer. So the recorder hangs on the layers only while a call is
traced, is seen by no tracker or serializer, and works where `layer.output` does not exist
(subclassed hosts) or means something else (layers called twice).
"""

import contextlib
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import keras
import tensorflow as tf

Role = Literal["input", "preactivation", "output"]


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a tensor is seen.

    Attributes:
        layer: The layer, or Keras operation, that is called; the host itself for its input.
        role: What the tensor is to that call; `"preactivation"` goes into the layer's `activation`.
        call: Which call of the layer in one forward pass, from 0.
        index: Which tensor of the flattened structure, from 0.
    """

    layer: keras.Operation
    role: Role
    call: int = 0
    index: int = 0


@dataclasses.dataclass
class Recording:
    """Tensors seen in one forward pass, in the order in which they came to be.

    Attributes:
        tensors: The tensor at each site.
        paths: The names of the layers being called around each site and its own, joined by `/`;
            the host's own name is left out.
        sources: The host's input, a sparse or ragged one by its parts.
        masks: What was handed to layers as a mask.
        calls: How often each layer was called within the host's own call, and the host itself.
        hidden: Layers whose outputs exist only within another's loop or branch, with that layer.

    What a step calls besides the host (a layer on generated images, what is recomputed for the
    gradient) is left out, unless it does not call the host at all.
    """

    tensors: dict[Site, tf.Tensor] = dataclasses.field(default_factory=dict)
    paths: dict[Site, str] = dataclasses.field(default_factory=dict)
    sources: list[tf.Tensor] = dataclasses.field(default_factory=list)
    masks: list[tf.Tensor] = dataclasses.field(default_factory=list)
    calls: Counter[keras.Operation] = dataclasses.field(default_factory=Counter)
    hidden: dict[keras.Operation, keras.Operation] = dataclasses.field(default_factory=dict)


def operations_of(host: keras.Model) -> list[keras.Operation]:
    """Returns the host, all its layers at any nesting, and its `keras.ops` nodes."""
    found: dict[int, keras.Operation] = {}
    for layer in host._flatten_layers():
        found[id(layer)] = layer
        for node in getattr(getattr(layer, "_functional", layer), "operations", ()):
            found.setdefault(id(node), node)
    return list(found.values())


@contextlib.contextmanager
def record_calls(host: keras.Model, layers: Iterable[keras.Operation]) -> Iterator[Recording]:
    """Records the tensors of `layers` while `host` is called in the body of the `with`.

    Replicas run a step in threads of their own, one within the other's: each records its own calls.
    Only tensors of the graph that is being built at entry count (all, when running eagerly): those
    of a loop's body, a branch or a scratch graph cannot be used outside of it.

    Args:
        host: The host; its own input is recorded too where it is among `layers`.
        layers: The layers and operations to listen to.

    Yields:
        The `Recording`, filled as the calls happen.
    """
    recorder = _Recorder(host)
    with contextlib.ExitStack() as restored:
        for layer in layers:
            # What Keras calls a layer of int8 weights by.
            quantized = getattr(layer, "quantization_mode", None) is not None
            name = "quantized_call" if quantized else "call"
            restored.enter_context(_heard(layer, name, recorder.around_call))
            if callable(vars(layer).get("activation")):
                restored.enter_context(_heard(layer, "activation", recorder.around_activation))
        yield recorder.recording


class _Heard:
    """What stands in the place of a layer's attribute while some thread records it."""

    def __init__(self, own: dict[str, Any], attribute: str, original: Callable):
        self.kept = {attribute: original} if attribute in own else {}
        self.original = original
        self.by_thread: dict[int, Callable] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.by_thread.get(threading.get_ident(), self.original)(*args, **kwargs)


@contextlib.contextmanager
def _heard(layer: keras.Operation, attribute: str, around: Callable) -> Iterator[None]:
    """Puts `around(layer, original)` in the place of a layer's attribute, for this thread.

    Past Keras's trackers; the last thread to leave puts the original back.
    """
    own, thread = vars(layer), threading.get_ident()
    heard = own.get(attribute)
    if not isinstance(heard, _Heard):
        heard = own[attribute] = _Heard(own, attribute, getattr(layer, attribute))
    before = heard.by_thread.get(thread)
    heard.by_thread[thread] = around(layer, before or heard.original)
    try:
        yield
    finally:
        del heard.by_thread[thread]
        if before is not None:
            heard.by_thread[thread] = before
        if not heard.by_thread:
            del own[attribute]
            own.update(heard.kept)


class _Recorder:
    def __init__(self, host: keras.Model):
        self.recording = Recording()
        self._host = host
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        self._calls: Counter[keras.Operation] = Counter()  # of those that count
        self._stack: list[keras.Operation] = []
        self._in_host = False

    def around_call(self, layer: keras.Operation, original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if layer is self._host:
                inputs = args[0] if args else next(iter(kwargs.values()))
                return self._call_host(_in_order(layer, inputs), lambda: original(*args, **kwargs))
            masks = [value for name, value in kwargs.items() if name.endswith("mask")]
            self.recording.masks += keras.tree.flatten(masks)
            self._stack.append(layer)
            try:
                outputs = original(*args, **kwargs)
                usable = self._add(layer, "output", outputs)
                self._calls[layer] += usable
                self.recording.calls[layer] += usable and self._in_host
                if not usable and len(self._stack) > 1:
                    self.recording.hidden[layer] = self._stack[-2]
            finally:
                self._stack.pop()
            return outputs

        return call

    def _call_host(self, inputs: list, call: Callable[[], Any]) -> Any:
        parts = tf.nest.flatten(inputs, expand_composites=True)
        parts = [part for part in parts if isinstance(part, tf.Tensor) and self._is_here(part)]
        if self._in_host or not parts:
            return call()
        if not self.recording.calls[self._host]:  # what was called before it was not the host's
            self.recording.tensors.clear()
            self.recording.paths.clear()
            self._calls.clear()
            self.recording.sources = parts
        self._in_host = True
        self._add(self._host, "input", inputs)
        self._calls[self._host] += 1
        self.recording.calls[self._host] += 1
        try:
            return call()
        finally:
            self._in_host = False

    def around_activation(self, layer: keras.Operation, original: Callable) -> Callable:
        def activation(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._add(layer, "preactivation", inputs)
            return original(inputs, *args, **kwargs)

        return activation

    def _add(self, layer: keras.Operation, role: Role, structure: Any) -> bool:
        """Records the tensors of `structure`; whether it held any of this graph."""
        seen = False
        path = "/".join(outer.name for outer in self._stack) or role
        # A recurrent layer calls its cell once outside the loop, to learn its output's shape.
        if any(isinstance(outer, keras.layers.RNN) and outer is not layer for outer in self._stack):
            return seen
        for index, tensor in enumerate(keras.tree.flatten(structure)):
            if isinstance(tensor, tf.Tensor) and self._counts(tensor):
                seen = True
                site = Site(layer, role, self._calls[layer], index)
                self.recording.tensors.setdefault(site, tensor)
                self.recording.paths.setdefault(site, path)
        return seen

    def _counts(self, tensor: tf.Tensor) -> bool:
        host_or_none = self._in_host or not self.recording.calls[self._host]
        return host_or_none and self._is_here(tensor)

    def _is_here(self, tensor: tf.Tensor) -> bool:
        return self._graph is None or getattr(tensor, "graph", None) is self._graph


def _in_order(host: keras.Model, inputs: Any) -> list:
    """The tensors of a host's input in the order of its own inputs.

    A dict is matched by name, as a Functional model does: its keys may come in another order than
    the model's inputs, and there may be more of them.
    """
    own = getattr(host, "inputs", None)
    if isinstance(inputs, dict) and own:
        structure = host.input
        names = sorted(structure) if isinstance(structure, dict) else [t.name for t in own]
        if all(name in inputs for name in names):
            return [inputs[name] for name in names]
    return keras.tree.flatten(inputs)
