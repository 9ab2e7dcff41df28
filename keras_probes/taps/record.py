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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import keras
import tensorflow as tf

Role = Literal["input", "preactivation", "output"]

# Layers that take whole numbers as names of things, not as amounts.
_OF_IDS = (
    keras.layers.Embedding,
    keras.layers.CategoryEncoding,
    keras.layers.Hashing,
    keras.layers.IntegerLookup,
)
# Layers that scale and shift each channel at inference: to a linear probe, their input once more.
_AFFINE = (
    keras.layers.BatchNormalization,
    keras.layers.Normalization,
    keras.layers.Rescaling,
)


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
class Notes:
    """What was seen besides tensors, which naming and choosing taps takes.

    Attributes:
        paths: The names of the layers being called around each site and its own, joined by `/`;
            the host's own name is left out.
        keys: What a tensor is called among several at one site: its key in a dict, or its place.
        masks: What was handed to layers as a mask.
        mask_of: By the id of a tensor, that and the mask it had when a layer took it; attention
            takes masks off.
        ids: What was handed to layers that look it up, as token ids are.
        maps: Attention maps: how much each step attends to each other one.
        repeats: By the id of a tensor, the one that it is but for the scale of its channels.
        unseen: Layers that were called and whose outputs can't be used, with the reason.
    """

    paths: dict[Site, str] = dataclasses.field(default_factory=dict)
    keys: dict[Site, str] = dataclasses.field(default_factory=dict)
    masks: list[tf.Tensor] = dataclasses.field(default_factory=list)
    mask_of: dict[int, tuple[tf.Tensor, tf.Tensor]] = dataclasses.field(default_factory=dict)
    ids: list[tf.Tensor] = dataclasses.field(default_factory=list)
    maps: list[tf.Tensor] = dataclasses.field(default_factory=list)
    repeats: dict[int, tf.Tensor] = dataclasses.field(default_factory=dict)
    unseen: dict[keras.Operation, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Recording:
    """Tensors seen in one forward pass, in the order in which they came to be.

    Attributes:
        tensors: The tensor at each site.
        sources: The host's input, a sparse or ragged one by its parts.
        on_x: Whether that is the x of the data, as it is or as Keras casts it.
        mask_taken: By layer, the first mask of what it took.
        calls: How often each layer was called, and the host itself.
        notes: What was seen besides.

    What a step calls besides the host (a layer on generated images, what is recomputed for the
    gradient) is left out, unless it does not call the host at all. So are calls of the host before
    the first one on x, if there is such a call.
    """

    tensors: dict[Site, tf.Tensor] = dataclasses.field(default_factory=dict)
    sources: list[tf.Tensor] = dataclasses.field(default_factory=list)
    on_x: bool = False
    mask_taken: dict[keras.Operation, tf.Tensor] = dataclasses.field(default_factory=dict)
    calls: Counter[keras.Operation] = dataclasses.field(default_factory=Counter)
    notes: Notes = dataclasses.field(default_factory=Notes)


def operations_of(host: keras.Model) -> list[keras.Operation]:
    """Returns the host, all its layers at any nesting, and its `keras.ops` nodes."""
    found: dict[int, keras.Operation] = {}
    for layer in host._flatten_layers():
        found[id(layer)] = layer
        for node in getattr(getattr(layer, "_functional", layer), "operations", ()):
            found.setdefault(id(node), node)
    return list(found.values())


@contextlib.contextmanager
def record_calls(
    host: keras.Model, layers: Iterable[keras.Operation], x: Any = None
) -> Iterator[Recording]:
    """Records the tensors of `layers` while `host` is called in the body of the `with`.

    Replicas run a step in threads of their own, one within the other's: each records its own calls.
    Only tensors of the graph that is being built at entry count (all, when running eagerly): those
    of a loop's body, a branch or a scratch graph cannot be used outside of it.

    Args:
        host: The host; its own input is recorded too where it is among `layers`.
        layers: The layers and operations to listen to.
        x: That of the data of a step.

    Yields:
        The `Recording`, filled as the calls happen.
    """
    recorder = _Recorder(host, tf.nest.flatten(x, expand_composites=True))
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
    def __init__(self, host: keras.Model, given: list[Any]):
        self.recording = Recording()
        self._host = host
        self._given = [part for part in given if isinstance(part, tf.Tensor)]
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        self._stack: list[keras.Operation] = []
        self._in_host = False

    def around_call(self, layer: keras.Operation, original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if layer is self._host:
                inputs = args[0] if args else next(iter(kwargs.values()))
                return self._call_host(*_in_order(layer, inputs), lambda: original(*args, **kwargs))
            masks = [value for name, value in kwargs.items() if name.endswith("mask")]
            self.recording.notes.masks += keras.tree.flatten(masks)
            self._note_masks(layer, args, kwargs)
            self._stack.append(layer)
            try:
                outputs = original(*args, **kwargs)
                usable = self._add(layer, "output", outputs)
                self.recording.calls[layer] += usable
                if not usable:
                    self.recording.notes.unseen[layer] = self._why_unseen(outputs)
                self._describe(layer, args, outputs)
            finally:
                self._stack.pop()
            return outputs

        return call

    def _call_host(self, inputs: list, keys: list[str], call: Callable[[], Any]) -> Any:
        parts = tf.nest.flatten(inputs, expand_composites=True)
        parts = [part for part in parts if isinstance(part, tf.Tensor) and self._is_here(part)]
        if self._in_host or not parts:
            return call()
        on_x = all(any(_is_same(part, given) for given in self._given) for part in parts)
        # What was called before was not the host, or not on the data.
        if not self.recording.calls[self._host] or (on_x and not self.recording.on_x):
            self.recording.tensors.clear()
            self.recording.notes.paths.clear()
            self.recording.calls.clear()
            self.recording.notes.mask_of.clear()
            self.recording.mask_taken.clear()
            self.recording.sources, self.recording.on_x = parts, on_x
        self._in_host = True
        self._add(self._host, "input", inputs, keys)
        self.recording.calls[self._host] += 1
        try:
            return call()
        finally:
            self._in_host = False

    def _note_masks(self, layer: keras.Operation, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Notes the masks of what a layer takes: Keras's own, and those that KerasHub hands on."""
        pairs = [(t, getattr(t, "_keras_mask", None)) for t in keras.tree.flatten((args, kwargs))]
        pairs += [(tensor, kwargs.get("padding_mask")) for tensor in args]
        for tensor, mask in pairs:
            if not (isinstance(tensor, tf.Tensor) and isinstance(mask, tf.Tensor)):
                continue
            if self._counts(tensor) and mask.shape.rank == 2:
                self.recording.notes.mask_of.setdefault(id(tensor), (tensor, mask))
                self.recording.mask_taken.setdefault(layer, mask)

    def _why_unseen(self, outputs: Any) -> str:
        if not any(isinstance(tensor, tf.Tensor) for tensor in keras.tree.flatten(outputs)):
            return f"it returns {type(outputs).__name__}, in which no tensor can be found"
        outer = self._stack[-2].name if len(self._stack) > 1 else self._host.name
        return f"what it computes stays in a loop or branch of {outer!r}; probe that layer"

    def _describe(self, layer: keras.Operation, args: tuple, outputs: Any) -> None:
        """Notes what kind of tensors a layer takes and returns."""
        if isinstance(layer, _OF_IDS):
            self.recording.notes.ids += [t for t in keras.tree.flatten(args) if self._is_here(t)]
        single = bool(args) and all(
            isinstance(of, tf.Tensor) and self._is_here(of) for of in (args[0], outputs)
        )
        if isinstance(layer, _AFFINE) and single:
            self.recording.notes.repeats[id(outputs)] = args[0]
        inner = len(self._stack) > 1 and not isinstance(self._stack[-2], keras.Model)
        if isinstance(layer, keras.layers.Softmax) and inner and single and outputs.shape.rank == 4:
            self.recording.notes.maps.append(outputs)

    def around_activation(self, layer: keras.Operation, original: Callable) -> Callable:
        def activation(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._add(layer, "preactivation", inputs)
            return original(inputs, *args, **kwargs)

        return activation

    def _add(
        self,
        layer: keras.Operation,
        role: Role,
        structure: Any,
        keys: list[str] | None = None,
    ) -> bool:
        """Records the tensors of `structure`; whether it held any of this graph."""
        seen = False
        keys = keys or _keys(structure)
        path = "/".join(outer.name for outer in self._stack) or role
        # A recurrent layer calls its cell once outside the loop, to learn its output's shape.
        if any(isinstance(outer, keras.layers.RNN) and outer is not layer for outer in self._stack):
            return seen
        for index, tensor in enumerate(keras.tree.flatten(structure)):
            if isinstance(tensor, tf.Tensor) and self._counts(tensor):
                seen = True
                site = Site(layer, role, self.recording.calls[layer], index)
                self.recording.tensors.setdefault(site, tensor)
                self.recording.notes.paths.setdefault(site, path)
                self.recording.notes.keys.setdefault(site, keys[index])
        return seen

    def _counts(self, tensor: tf.Tensor) -> bool:
        host_or_none = self._in_host or not self.recording.calls[self._host]
        return host_or_none and self._is_here(tensor)

    def _is_here(self, tensor: tf.Tensor) -> bool:
        return self._graph is None or getattr(tensor, "graph", None) is self._graph


def _is_same(tensor: tf.Tensor, given: tf.Tensor) -> bool:
    """Whether a tensor is the one that is given, or what Keras casts it to."""
    if tensor is given or not given.dtype.is_floating:
        return tensor is given
    if tf.executing_eagerly():
        same_shape = tensor.shape == given.shape
        return same_shape and bool(tf.reduce_all(tensor == tf.cast(given, tensor.dtype)))
    while tensor is not given and tensor.op.type == "Cast":
        tensor = tensor.op.inputs[0]
    return tensor is given


def _keys(structure: Any) -> list[str]:
    """What the tensors of a structure are called: by their keys in a dict, else by their places."""
    places = range(len(keras.tree.flatten(structure)))
    by_key = isinstance(structure, Mapping) and len(structure) == len(places)
    return [str(key) for key in (sorted(structure) if by_key else places)]


def _in_order(host: keras.Model, inputs: Any) -> tuple[list, list[str]]:
    """The tensors of a host's input in the order of its own inputs, and their names.

    A dict is matched by name, as a Functional model does: its keys may come in another order than
    the model's inputs, and there may be more of them.
    """
    own = getattr(host, "inputs", None)
    if isinstance(inputs, dict) and own:
        structure = host.input
        names = sorted(structure) if isinstance(structure, dict) else [t.name for t in own]
        if all(name in inputs for name in names):
            return [inputs[name] for name in names], names
    return keras.tree.flatten(inputs), _keys(inputs)
