"""Where to look: turns what the user names in `layers=` into taps.

In: a `HostGraph` and selectors. Out: a `Selection`: taps in graph order, each once.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import keras

from keras_probes.taps.graph import HostGraph, Tap

Selector: TypeAlias = (
    str
    | type[keras.layers.Layer]
    | keras.Operation
    | Callable[[keras.layers.Layer], bool]
    | Sequence["Selector"]
)

_FORMS = (
    '"auto", "all", a tap\'s name, a glob such as "conv*", a layer class, a layer, '
    'a function of a layer that returns a bool, or a list of these, in which "!name" leaves out '
    "a name or glob"
)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What `layers=` stands for.

    Attributes:
        taps: The taps in graph order, each once.
        named: Names of those that were asked for by their own name.
        left_out: By name, why what was selected otherwise can't be probed.
    """

    taps: tuple[Tap, ...]
    named: frozenset[str]
    left_out: dict[str, str]


def select(graph: HostGraph, layers: Selector) -> Selection:
    """Resolves `layers=`.

    Args:
        graph: What the host computes.
        layers: `"auto"` (the cut points), `"all"` (the input and every layer output), the name of a
            tap, a glob over names, a layer class, a layer instance, a predicate of a layer, or a
            list of these. A name or glob reaches into nested models with `outer/inner`; a glob
            meets pre-activations only if it has a `:` in it. In a list, a name or glob after `!`
            takes out of what the others pick.

    Returns:
        The `Selection`.

    Raises:
        TypeError: `layers` has none of these forms.
        ValueError: A selector matches nothing, a name stands for several tensors, or for one that
            no linear probe can read.
    """
    parts = list(_flat(layers))
    wanted = [part for part in parts if not _takes_out(part)]
    if not wanted:
        raise ValueError(f"`layers` picks nothing. Expected {_FORMS}. Received: {layers!r}.")
    chosen = set[str]().union(*(_matches(graph, part) for part in wanted))
    named = {part for part in wanted if isinstance(part, str)} & chosen
    for name in (part[1:] for part in parts if isinstance(part, str) and _takes_out(part)):
        if name in graph.unread:  # out as it is
            continue
        out = _named(graph, name)
        if not out & chosen:
            raise ValueError(f"In `layers`, '!{name}' takes out nothing that the others pick.")
        chosen -= out
    taps = [tap for tap in graph.taps if tap.name in chosen]
    for tap in taps:
        if tap.unreadable and tap.name in named:
            raise ValueError(
                f"Tap {tap.name!r} in `layers` can't be probed: it is {tap.unreadable}."
            )
    left_out = {tap.name: tap.unreadable for tap in taps if tap.unreadable}
    if "all" in wanted:
        left_out |= graph.unread
    readable = tuple(tap for tap in taps if not tap.unreadable)
    return Selection(readable, frozenset(named), left_out)


def _flat(layers: Selector) -> Iterator[Any]:
    if isinstance(layers, (list, tuple)):
        for part in layers:
            yield from _flat(part)
    else:
        yield layers


def _takes_out(part: Any) -> bool:
    return isinstance(part, str) and part.startswith("!")


def is_glob(pattern: str) -> bool:
    """Whether `pattern` is a glob: tap names themselves may hold brackets, but no `*` or `?`."""
    return "*" in pattern or "?" in pattern


def glob_match(name: str, pattern: str) -> bool:
    """Whether a tap's name fits a glob of `*` and `?`; a bracket stands for itself."""
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def nearest(name: str, names: Iterable[str]) -> str:
    """Says which of `names` resemble `name`, or lists a few of them."""
    names = list(names)
    if not names:
        return "The model has no layer that a probe can read."
    # Compared without regard to case and to the layers around: `Conv1` and `inner` are near too.
    keys = {n.lower(): n for n in names} | {n.rsplit("/", 1)[-1].lower(): n for n in names}
    near = difflib.get_close_matches(name.lower(), keys, n=3, cutoff=0.5)
    if near:
        return "Did you mean " + ", ".join(dict.fromkeys(repr(keys[n]) for n in near)) + "?"
    shown = ", ".join(repr(n) for n in names[:8])
    return f"There are {shown}{', ...' if len(names) > 8 else ''}."


def _matches(graph: HostGraph, selector: Selector) -> set[str]:
    """Names of the taps that one selector picks; never empty."""
    if isinstance(selector, str):
        return _named(graph, selector)

    if isinstance(selector, type):
        picked = {t.name for t in _outputs(graph) if isinstance(t.site.layer, selector)}
        if issubclass(selector, keras.layers.InputLayer):
            picked = _inputs(graph, None)
        what = f"no layer of the model is a {selector.__name__}"
    elif isinstance(selector, keras.Operation):
        picked = {t.name for t in _outputs(graph) if t.site.layer is selector}
        if isinstance(selector, keras.layers.InputLayer):
            picked = _inputs(graph, selector)
        what = (
            f"the layer {selector.name!r} is not called by this model (a layer of a clone or of "
            "another model is another object)"
        )
    elif callable(selector):
        picked = {
            t.name
            for t in _outputs(graph)
            if isinstance(t.site.layer, keras.layers.Layer) and selector(t.site.layer)
        }
        what = "the predicate is false for every layer of the model"
    else:
        raise TypeError(f"Expected `layers` to be {_FORMS}. Received: {selector!r}.")
    if not picked:
        kinds = sorted({t.layer_type for t in _outputs(graph)})
        raise ValueError(
            f"A selector in `layers` matches nothing: {what}. Received: {selector!r}. "
            f"The model has layers of type {', '.join(kinds)}."
        )
    return picked


def _outputs(graph: HostGraph) -> list[Tap]:
    return [tap for tap in graph.taps if tap.site.role == "output"]


def _inputs(graph: HostGraph, of: keras.layers.InputLayer | None) -> set[str]:
    """Names of the input taps: all, or that of one `InputLayer`."""
    return {
        tap.name
        for tap in graph.taps
        if tap.site.role == "input"
        and (of is None or tap.site.layer.inputs[tap.site.index]._keras_history.operation is of)
    }


def _named(graph: HostGraph, name: str) -> set[str]:
    if name == "auto":
        if not graph.auto:
            raise ValueError(
                'layers="auto" finds no layer that every path through the model runs through. Name '
                f"the layers to probe. {nearest(name, [t.name for t in graph.taps])}"
            )
        return set(graph.auto)
    if name == "all":
        return set(graph.distinct)
    if is_glob(name):
        picked = {
            tap.name
            for tap in graph.taps
            if glob_match(tap.name, name) and (":" in name or tap.site.role != "preactivation")
        }
        if not picked:
            raise ValueError(
                f"A glob in `layers` matches no tap. Received: {name!r}. "
                + nearest(name.replace("*", "").replace("?", ""), [t.name for t in graph.taps])
            )
        return picked

    names = {tap.name for tap in graph.taps}
    if name in names:
        return {name}
    same_base = [tap.name for tap in graph.taps if tap.base_name == name]
    if same_base:
        choices = ", ".join(map(repr, same_base))
        raise ValueError(
            f"The name {name!r} in `layers` is ambiguous: the layer is called several times or "
            f"returns several tensors. Name one or more of {choices}."
        )
    unread = {layer.rsplit("/", 1)[-1]: why for layer, why in graph.unread.items()}
    if why := unread.get(name.rsplit("/", 1)[-1]):
        raise ValueError(f"The layer {name!r} in `layers` can't be probed: {why}.")
    raise ValueError(
        f"Unknown layer in `layers`. Received: {name!r}. {nearest(name, sorted(names))}"
    )
