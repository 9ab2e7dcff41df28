"""The host's graph: one symbolic forward pass, with every tensor a probe could look at.

In: a host and the spec of its input. Out: a `HostGraph`: taps in graph order, each with its
canonical name, shape and depth, and which of them are cut points.

The pass is traced at inference and never run, so it reads and writes no state of the host. Working
on the traced TensorFlow operations rather than on Keras nodes serves every kind of host alike:
Functional, Sequential, nested and subclassed.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_probes.taps.flow import Flow, root_of
from keras_probes.taps.record import Recording, Site, operations_of, record_calls
from keras_probes.taps.work import multiplications

# The host is traced with this many examples, which tells its batch dimension from any other: no
# layer is likely to be as wide, and a host may split its batch by every number up to 12.
_BATCH = 27720


@dataclasses.dataclass(frozen=True)
class Tap:
    """A named place in the host that a probe can read.

    Attributes:
        name: Canonical name: `conv1`, `outer/inner`, `dense#1`, `lstm[1]`, `input[age]`,
            `conv1:preactivation`.
        base_name: The name without which call and which output: `dense`, `lstm`.
        site: Where the tensor is seen while a step is traced.
        shape: Shape, the batch first, `None` where unknown; `None` if even the rank is unknown.
        dtype: Dtype of the host's tensor.
        depth: Number of layers on the longest path from the input to here; the input is at 0.
        by_example: Whether it is known to have a row for each example. If not, as after
            `TextVectorization` or a `numpy_function`, a step looks at how many rows there are.
        unreadable: Why no linear probe can read it; empty if one can.
    """

    name: str
    base_name: str
    site: Site
    shape: tuple[int | None, ...] | None
    dtype: str
    depth: int
    by_example: bool = True
    unreadable: str = ""

    @property
    def layer_type(self) -> str:
        """Class name of the tapped layer; `"Input"` for the host's input."""
        return "Input" if self.site.role == "input" else type(self.site.layer).__name__


@dataclasses.dataclass(frozen=True)
class HostGraph:
    """What one forward pass of a host computes.

    Attributes:
        taps: Every tensor a probe could read, in graph order.
        auto: Names of the cut points: the taps that every path from the input to an output runs
            through, less those that repeat another's values in another shape, or in another scale
            of each channel, as a BatchNormalization does. Along them X -> Y -> Z is a Markov chain,
            which is what orders them (paper, section 3.1).
        distinct: Names of the input and the layer outputs, one for each tensor: a nested model's
            output is that of its last layer.
        same: By name of a tap, the first name of its tensor.
        inputs: By first name, those of the tensors that it is computed from, no other tap between.
        masked: By name of a tap whose steps have a mask, the layer that takes it: its own mask, or
            the only one of what it is computed from. Layers that know of no masks lose them on the
            way; padding stays padding.
        calls: How often each layer is called.
        outputs: The structure that calling the host returns, of `tf.TensorSpec`.
        unread: By name, the layers that the host has and no probe can read, with the reason.
        work: About how many multiplications a forward pass takes for one example.
    """

    taps: tuple[Tap, ...]
    auto: frozenset[str]
    distinct: frozenset[str]
    same: Mapping[str, str]
    inputs: Mapping[str, tuple[str, ...]]
    masked: Mapping[str, keras.Operation]
    calls: Mapping[keras.Operation, int]
    outputs: Any
    unread: Mapping[str, str]
    work: int


def input_spec_of(host: keras.Model) -> Any:
    """Returns the structure of `tf.TensorSpec` a host takes; `None` if only data will tell."""
    inputs = getattr(host, "inputs", None)
    if not inputs:
        return None
    structure = host.inputs[0] if isinstance(host, keras.Sequential) else host.input
    return keras.tree.map_structure(
        lambda t: (tf.SparseTensorSpec if t.sparse else tf.TensorSpec)(t.shape, t.dtype), structure
    )


def merged(spec: Any, declared: Any) -> Any:
    """The spec of data, with what the host declares where the data leave sizes open.

    Args:
        spec: Structure of `tf.TensorSpec` of the data.
        declared: As of `input_spec_of`.
    """

    def both(of_data: Any, of_host: Any) -> Any:
        specs = isinstance(of_data, tf.TensorSpec) and isinstance(of_host, tf.TensorSpec)
        if not specs or not of_data.shape.is_compatible_with(of_host.shape):
            return of_data  # a Functional host takes (batch, 28, 28) for (batch, 28, 28, 1), too
        return tf.TensorSpec(of_data.shape.merge_with(of_host.shape), of_data.dtype)

    try:
        return keras.tree.map_structure(both, spec, declared)
    except (TypeError, ValueError):  # a dict with more keys than the host has inputs, say
        return spec


def has_call(host: keras.Model) -> bool:
    """Whether a host can be called; some have a `train_step` alone."""
    return "call" in vars(host) or type(host).call is not keras.Model.call


def trace(host: keras.Model, input_spec: Any, prefix: str = "") -> HostGraph:
    """Records one symbolic inference pass of `host`.

    Args:
        host: The model. One that is not built yet gets built, as its first step would do.
        input_spec: Structure of `tf.TensorSpec`, as the host is called with.
        prefix: What the names of taps begin with: `"encoder/"`.

    Returns:
        The `HostGraph`.

    Raises:
        ValueError: The host has no `call`.
    """
    if not has_call(host):
        raise ValueError(
            f"The model {host.name!r} has no `call`, so that there is no forward pass to probe. "
            "Pass one of the networks within it instead, such as model.encoder."
        )
    fixed = [i.shape[0] for i in getattr(host, "inputs", None) or () if i.shape[0] is not None]

    def sized(spec: Any, batch: int | None) -> Any:
        if not isinstance(spec, tf.TensorSpec) or not spec.shape.rank:
            return spec
        return tf.TensorSpec((batch, *spec.shape[1:]), spec.dtype)

    recording = Recording()
    outputs: Any = None

    def forward(inputs: Any) -> Any:
        nonlocal recording, outputs
        # A stateless scope takes any assignment to a Keras variable upon itself.
        with keras.StatelessScope(), record_calls(host, operations_of(host)) as recording:
            outputs = call_at_inference(host, inputs)
        return outputs

    def traced(batch: int | None) -> tf.Graph:
        spec = keras.tree.map_structure(lambda s: sized(s, batch), input_spec)
        return tf.function(forward, autograph=False).get_concrete_function(spec).graph

    if not all(layer.built for layer in host._flatten_layers()):
        traced(None)  # builds them, for any batch size
    batch = fixed[0] if fixed else _BATCH
    graph = traced(batch)
    recording.notes.paths = {site: prefix + path for site, path in recording.notes.paths.items()}
    read = _read(graph, recording, outputs, batch, free=not fixed)
    # What loops compute has no static shape, but each weight is of use at least once.
    work = max(multiplications(graph.get_operations()) // batch, host.count_params())
    unread = _unread(operations_of(host), recording, {tap.site.layer for tap in read.taps})
    unread = {prefix + name: reason for name, reason in unread.items()}
    return dataclasses.replace(read, unread=unread, work=work)


def call_at_inference(host: keras.Model, inputs: Any) -> Any:
    """Calls the host with `training=False` where it knows that argument, as `test_step` does."""
    if getattr(host, "_call_has_training_arg", True):
        return host(inputs, training=False)
    return host(inputs)


def _read(graph: tf.Graph, recording: Recording, outputs: Any, batch: int, free: bool) -> HostGraph:
    flow = Flow(graph, recording.sources, {id(mask) for mask in recording.notes.masks})
    depths = flow.depths(recording.tensors.values())
    rows = {batch, None}  # what is not known while tracing, a step looks at
    seen = {
        site: tensor
        for site, tensor in recording.tensors.items()
        if id(tensor) in depths and _is_per_example(tensor, rows)
    }
    free_sizes: set[int | None] = rows if free else {None}
    taps = tuple(_taps(seen, recording, depths, free_sizes))
    output_tensors = [t for t in keras.tree.flatten(outputs) if isinstance(t, tf.Tensor)]
    cuts = {cut for output in output_tensors for cut in flow.cut_points(output)}

    auto, distinct = set(), set()
    roots: set[int] = set()
    # Layers first: a pre-activation may be the output of another layer.
    by_role = sorted(taps, key=lambda tap: tap.site.role == "preactivation")
    first = {id(seen[tap.site]): tap.name for tap in reversed(by_role)}
    same = {tap.name: first[id(seen[tap.site])] for tap in taps}
    above = flow.above(seen.values())
    inputs = {
        first[id(tensor)]: tuple(first[of] for of in above[id(tensor)]) for tensor in seen.values()
    }
    for tap in taps:
        tensor = seen[tap.site]
        if tap.site.role == "preactivation":
            continue
        if same[tap.name] == tap.name:
            distinct.add(tap.name)
        root = root_of(tensor, recording.notes.repeats)
        if id(tensor) in cuts and root not in roots:
            roots.add(root)
            auto.add(tap.name)
    specs = keras.tree.map_structure(
        lambda t: tf.TensorSpec(_shape(t, free_sizes), t.dtype) if isinstance(t, tf.Tensor) else t,
        outputs,
    )
    return HostGraph(
        taps, frozenset(auto), frozenset(distinct), same, inputs,
        _masked(taps, seen, flow, recording), recording.calls, specs,
        unread={}, work=0,
    )  # fmt: skip


def _masked(
    taps: Iterable[Tap], seen: Mapping[Site, tf.Tensor], flow: Flow, recording: Recording
) -> dict[str, keras.Operation]:
    """As `HostGraph.masked`."""
    layers = {id(mask): layer for layer, mask in recording.mask_taken.items()}
    masks = flow.masks({key: mask for key, (_, mask) in recording.notes.mask_of.items()})
    masked = {}
    for tap in taps:
        found = masks.get(id(seen[tap.site]), {})
        if len(found) == 1 and tap.shape is not None and len(tap.shape) == 3:
            (mask,) = found.values()
            if id(mask) in layers and mask.shape[1] == seen[tap.site].shape[1]:
                masked[tap.name] = layers[id(mask)]
    return masked


def _unread(
    operations: Iterable[keras.Operation], recording: Recording, tapped: Container[keras.Operation]
) -> dict[str, str]:
    """The reason why a layer has no tap, by its name."""
    seen = {site.layer: tensor for site, tensor in recording.tensors.items()}
    unread = {}
    for layer in operations:
        if layer in tapped or isinstance(layer, keras.layers.InputLayer):
            continue
        if layer in seen:
            unread[layer.name] = _why_no_tap(seen[layer])
        else:
            reason = "the model never calls it at inference"
            unread[layer.name] = recording.notes.unseen.get(layer, reason)
    return unread


def _why_no_tap(tensor: tf.Tensor) -> str:
    if not (tensor.dtype.is_floating or tensor.dtype.is_integer):
        return f"its output is of dtype {tensor.dtype.name}, and not of numbers"
    if tensor.shape.rank == 0:
        return "its output is one number for all examples"
    return "its output has no row for each example, or does not depend on the model's input"


def _is_per_example(tensor: tf.Tensor, rows: set[int | None]) -> bool:
    """Whether `tensor` is numeric and has a row for each example."""
    numeric = tensor.dtype.is_floating or tensor.dtype.is_integer
    if tensor.shape.rank is None:
        return numeric
    return numeric and tensor.shape.rank > 0 and tensor.shape[0] in rows


def _shape(tensor: tf.Tensor, free: set[int | None]) -> tuple[int | None, ...] | None:
    """Static shape, with `None` for a batch dimension of one of the `free` sizes."""
    if tensor.shape.rank is None:
        return None
    sizes = tuple(tensor.shape.as_list())
    return (None, *sizes[1:]) if sizes and sizes[0] in free else sizes


def _taps(
    tensors: dict[Site, tf.Tensor],
    recording: Recording,
    depths: dict[int, int],
    free_sizes: set[int | None],
) -> Iterator[Tap]:
    """Names the recorded tensors: `#k` for repeated calls of a path, `[j]` for several outputs."""
    paths = recording.notes.paths
    ids = {root_of(tensor, {}) for tensor in recording.notes.ids}
    maps = {id(tensor) for tensor in recording.notes.maps}
    calls: dict[tuple[str, bool], list[tuple[keras.Operation, int]]] = defaultdict(list)
    indices: dict[tuple[keras.Operation, str, int], set[int]] = defaultdict(set)
    for site in tensors:
        call, before = (site.layer, site.call), site.role == "preactivation"
        if call not in calls[paths[site], before]:
            calls[paths[site], before].append(call)
        indices[site.layer, site.role, site.call].add(site.index)

    for site, tensor in tensors.items():
        same_path = calls[paths[site], site.role == "preactivation"]
        several = len(indices[site.layer, site.role, site.call]) > 1 or site.index > 0
        suffix = ":preactivation" if site.role == "preactivation" else ""
        which_call = f"#{same_path.index((site.layer, site.call))}" if len(same_path) > 1 else ""
        which_output = f"[{recording.notes.keys[site]}]" if several else ""
        unreadable = ""
        if tensor.dtype.is_integer and root_of(tensor, {}) in ids:
            unreadable = "token ids, which stand for things and are no amounts"
        elif id(tensor) in maps:
            unreadable = "an attention map"
        yield Tap(
            name=paths[site] + which_call + which_output + suffix,
            base_name=paths[site] + suffix,
            site=site,
            shape=_shape(tensor, free_sizes),
            dtype=tensor.dtype.name,
            depth=depths[id(tensor)],
            by_example=tensor.shape.rank is not None and tensor.shape[0] is not None,
            unreadable=unreadable,
        )
