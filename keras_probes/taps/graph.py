"""The host's graph: one symbolic forward pass, with every tensor a probe could look at.

In: a host and the spec of its input. Out: a `HostGraph`: taps in graph order, each with its
canonical name, shape and depth, and which of them are cut points.

The pass is traced at inference and never run, so it reads and writes no state of the host. Working
on the traced TensorFlow operations rather than on Keras nodes serves every kind of host alike:
Functional, Sequential, nested and subclassed.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_probes.taps.record import Recording, Site, operations_of, record_calls

# Operations that read how large a tensor is, not what it holds: no path of data.
_SHAPE_OPS = frozenset({"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"})
# Operations whose output holds the values of their first input, moved, padded or retyped.
_SAME_VALUE_OPS = frozenset(
    {"Cast", "ExpandDims", "Identity", "MirrorPad", "Pad", "PadV2", "PreventGradient"}
    | {"Reshape", "Snapshot", "Squeeze", "StopGradient", "Transpose"}
)


@dataclasses.dataclass(frozen=True)
class Tap:
    """A named place in the host that a probe can read.

    Attributes:
        name: Canonical name: `conv1`, `outer/inner`, `dense#1`, `lstm[1]`, `conv1:preactivation`.
        base_name: The name without which call and which output: `dense`, `lstm`.
        site: Where the tensor is seen while a step is traced.
        shape: Shape, the batch first, `None` where unknown; `None` if even the rank is unknown.
        dtype: Dtype of the host's tensor.
        depth: Number of layers on the longest path from the input to here; the input is at 0.
    """

    name: str
    base_name: str
    site: Site
    shape: tuple[int | None, ...] | None
    dtype: str
    depth: int

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
            through, less those that only repeat another's values under a different shape. Along
            them X -> Y -> Z is a Markov chain, which is what orders them (paper, section 3.1).
        distinct: Names of the input and the layer outputs, one for each tensor: a nested model's
            output is that of its last layer.
        outputs: The structure that calling the host returns, of `tf.TensorSpec`.
    """

    taps: tuple[Tap, ...]
    auto: frozenset[str]
    distinct: frozenset[str]
    outputs: Any


def input_spec_of(host: keras.Model) -> Any:
    """Returns the structure of `tf.TensorSpec` a host takes; `None` if only data will tell."""
    inputs = getattr(host, "inputs", None)
    if not inputs:
        return None
    structure = host.inputs[0] if isinstance(host, keras.Sequential) else host.input
    return keras.tree.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), structure)


def trace(host: keras.Model, input_spec: Any) -> HostGraph:
    """Records one symbolic inference pass of `host`.

    Args:
        host: The model. One that is not built yet gets built, as its first step would do.
        input_spec: Structure of `tf.TensorSpec`, as the host is called with.

    Returns:
        The `HostGraph`.
    """
    fixed_batch = any(i.shape[0] is not None for i in getattr(host, "inputs", None) or ())

    def free_batch(spec: Any) -> Any:
        if fixed_batch or not isinstance(spec, tf.TensorSpec) or not spec.shape.rank:
            return spec
        return tf.TensorSpec((None, *spec.shape[1:]), spec.dtype)

    recording = Recording()
    outputs: Any = None

    def forward(inputs: Any) -> Any:
        nonlocal recording, outputs
        # A stateless scope takes any assignment to a Keras variable upon itself.
        with keras.StatelessScope(), record_calls(host, operations_of(host)) as recording:
            outputs = call_at_inference(host, inputs)
        return outputs

    function = tf.function(forward, autograph=False)
    graph = function.get_concrete_function(keras.tree.map_structure(free_batch, input_spec)).graph
    return _read(graph, recording, outputs)


def call_at_inference(host: keras.Model, inputs: Any) -> Any:
    """Calls the host with `training=False` where it knows that argument, as `test_step` does."""
    if getattr(host, "_call_has_training_arg", True):
        return host(inputs, training=False)
    return host(inputs)


def _read(graph: tf.Graph, recording: Recording, outputs: Any) -> HostGraph:
    inputs = [t for site, t in recording.tensors.items() if site.role == "input"]
    batch = inputs[0].shape[:1].as_list() if inputs[0].shape.rank else None
    depths = _depths(graph, inputs, recording.tensors.values())
    seen = {
        site: tensor
        for site, tensor in recording.tensors.items()
        if id(tensor) in depths and _is_per_example(tensor, batch)
    }
    taps = tuple(_taps(seen, recording.paths, depths))
    output_tensors = [t for t in keras.tree.flatten(outputs) if isinstance(t, tf.Tensor)]
    cuts = {cut for output in output_tensors for cut in _cut_points(graph, inputs, output)}

    auto, distinct = set(), set()
    roots: set[int] = set()
    known: set[int] = set()
    for tap in taps:
        tensor = seen[tap.site]
        if tap.site.role == "preactivation":
            continue
        if id(tensor) not in known:
            known.add(id(tensor))
            distinct.add(tap.name)
        if id(tensor) in cuts and _root(tensor) not in roots:
            roots.add(_root(tensor))
            auto.add(tap.name)
    specs = keras.tree.map_structure(
        lambda t: tf.TensorSpec(t.shape, t.dtype) if isinstance(t, tf.Tensor) else t, outputs
    )
    return HostGraph(taps, frozenset(auto), frozenset(distinct), specs)


def _is_per_example(tensor: tf.Tensor, batch: list[int | None] | None) -> bool:
    """Whether `tensor` is numeric and has a row for each example."""
    numeric = tensor.dtype.is_floating or tensor.dtype.is_integer
    if tensor.shape.rank is None:
        return numeric
    return numeric and tensor.shape.rank > 0 and tensor.shape[:1].as_list() == batch


def _data_inputs(operation: tf.Operation) -> Iterator[tf.Tensor]:
    """The tensors whose values an operation's output depends on, shapes and masks apart."""
    if operation.type not in _SHAPE_OPS:
        yield from (t for t in operation.inputs if t.dtype != tf.bool)


def _depths(
    graph: tf.Graph, inputs: Iterable[tf.Tensor], recorded: Iterable[tf.Tensor]
) -> dict[int, int]:
    """Longest path from an input, counted in recorded tensors, for each tensor that has one."""
    is_recorded = {id(t) for t in recorded}
    depths = {id(t): 0 for t in inputs}
    for operation in graph.get_operations():  # in topological order
        above = [depths[id(t)] for t in _data_inputs(operation) if id(t) in depths]
        if above:
            for tensor in operation.outputs:
                depths.setdefault(id(tensor), max(above) + (id(tensor) in is_recorded))
    return depths


def _cut_points(graph: tf.Graph, inputs: list[tf.Tensor], output: tf.Tensor) -> set[int]:
    """The tensors that every path of data from `inputs` to `output` runs through.

    Tensors on such a path are laid out in topological order. One of them is a cut exactly where no
    edge jumps over its position: a path that jumps u -> w over v reaches the output without v, and
    a path that avoids v has to jump over it somewhere.
    """
    operations = graph.get_operations()
    needed = {id(output)}
    for operation in reversed(operations):
        if any(id(t) in needed for t in operation.outputs):
            needed.update(id(t) for t in _data_inputs(operation))

    positions = {id(t): position for position, t in enumerate(inputs) if id(t) in needed}
    edges = [(-1, position) for position in positions.values()]
    for operation in operations:
        above = [positions[id(t)] for t in _data_inputs(operation) if id(t) in positions]
        for tensor in operation.outputs if above else ():
            if id(tensor) in needed and id(tensor) not in positions:
                positions[id(tensor)] = len(positions) + len(inputs)
                edges += [(start, positions[id(tensor)]) for start in above]

    jumps: dict[int, int] = defaultdict(int)  # change in the number of edges overhead
    for start, end in edges:
        jumps[start + 1] += 1
        jumps[end] -= 1
    cuts, overhead, last = set(), 0, -1
    for tensor_id, position in sorted(positions.items(), key=lambda item: item[1]):
        overhead += sum(jumps[p] for p in range(last + 1, position + 1))
        last = position
        if overhead == 0:
            cuts.add(tensor_id)
    return cuts


def _root(tensor: tf.Tensor) -> int:
    """Identifies the tensor whose values `tensor` repeats, perhaps in another shape."""
    while tensor.op.type in _SAME_VALUE_OPS:
        tensor = tensor.op.inputs[0]
    return id(tensor)


def _taps(
    tensors: dict[Site, tf.Tensor], paths: dict[Site, str], depths: dict[int, int]
) -> Iterator[Tap]:
    """Names the recorded tensors: `#k` for repeated calls of a path, `[j]` for several outputs."""
    calls: dict[tuple[str, str], list[tuple[keras.Operation, int]]] = defaultdict(list)
    indices: dict[tuple[keras.Operation, str, int], set[int]] = defaultdict(set)
    for site in tensors:
        call = (site.layer, site.call)
        if call not in calls[paths[site], site.role]:
            calls[paths[site], site.role].append(call)
        indices[site.layer, site.role, site.call].add(site.index)

    for site, tensor in tensors.items():
        same_path = calls[paths[site], site.role]
        several = len(indices[site.layer, site.role, site.call]) > 1 or site.index > 0
        suffix = ":preactivation" if site.role == "preactivation" else ""
        which_call = f"#{same_path.index((site.layer, site.call))}" if len(same_path) > 1 else ""
        which_output = f"[{site.index}]" if several else ""
        yield Tap(
            name=paths[site] + which_call + which_output + suffix,
            base_name=paths[site] + suffix,
            site=site,
            shape=None if tensor.shape.rank is None else tuple(tensor.shape.as_list()),
            dtype=tensor.dtype.name,
            depth=depths[id(tensor)],
        )
