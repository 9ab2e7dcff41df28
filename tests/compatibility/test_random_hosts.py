"""Random hosts under random schedules: what holds for the named ones holds for any.

CI runs the few examples of the default profile; by hand, with other examples each time:
`pytest -n0 -m slow --hypothesis-profile=many tests/compatibility/test_random_hosts.py`.
Whatever that finds becomes a test with a name.
"""

import dataclasses
import tempfile
from typing import Any

import keras
import numpy as np
import pytest
from hosts import compiled
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from keras_probes import LinearProbeCallback, RandomFeatures, SpatialPool, Token
from keras_probes.taps.graph import input_spec_of, trace
from keras_probes.taps.select import select

pytestmark = pytest.mark.slow  # CI runs it

N, VALIDATION, CLASSES = 48, 20, 3
Blocks = tuple[tuple, ...]


@dataclasses.dataclass(frozen=True)
class Example:
    """A host, how it is probed, and what happens to it; printed, it can be built again.

    Attributes:
        kind: What the host takes: "images", "sequences" or "tokens".
        policy: Its dtype policy.
        blocks: Its layers; a block's first element names its kind, `_BUILDERS` builds it.
        end: How the last block's output becomes a vector.
        eager: Whether it runs eagerly.
        layers: A selector, or an integer k for every k-th tensor there is.
        reduce: As the callback takes it.
        isolated: The callback's mode.
        schedule: What happens after the first fit.
    """

    kind: str
    policy: str
    blocks: Blocks
    end: str
    eager: bool
    layers: Any
    reduce: Any
    isolated: bool
    schedule: tuple[tuple, ...]

    @property
    def exact(self):
        """Whether the host does the same twice: an Embedding's gradient adds up in any order."""
        return self.kind != "tokens"


# What examples are made of.

_SIMPLE = {
    "images": ["conv", "norm", "relu", "drop", "depthwise", "shared", "composite", "sequential"],
    "sequences": ["dense", "layer norm", "relu", "drop", "lstm", "attention", "conv1d", "shared"],
}
_SIMPLE["tokens"] = _SIMPLE["sequences"]


def _blocks(kind):
    """Blocks that keep the positions, nested at most twice; pools come between them."""
    leaf = st.tuples(st.sampled_from(_SIMPLE[kind]))

    def within(inner):
        several = st.lists(inner, min_size=1, max_size=2).map(tuple)
        merges = st.sampled_from(["add", "concatenate", "multiply"])
        return st.one_of(
            st.tuples(st.just("branches"), merges, several, several),
            st.tuples(st.just("residual"), several),
            st.tuples(st.just("nested"), several),
        )

    inner = st.one_of(leaf, within(st.one_of(leaf, within(leaf))))
    return st.lists(st.one_of(inner, st.just(("pool",))), min_size=1, max_size=5).map(tuple)


def _reductions(kind):
    plain = ["auto", "gap", "random", "flatten", {"*": "gap"}]
    own = [SpatialPool(20)] if kind == "images" else [Token(-1), Token(0)]
    return st.sampled_from([*plain, RandomFeatures(7), *own])


_ACTIONS = st.one_of(
    st.tuples(st.just("fit"), st.integers(1, 2), st.booleans(), st.sampled_from([16, 20])),
    st.tuples(st.just("interrupt"), st.integers(0, 2)),
    st.sampled_from(
        [("evaluate",), ("evaluate probes",), ("predict",), ("recompile",), ("save",), ("batch",)]
    ),
)


@st.composite
def examples(draw):
    kind = draw(st.sampled_from(["images", "sequences", "tokens"]))
    return Example(
        kind=kind,
        policy=draw(st.sampled_from(["float32", "float32", "mixed_bfloat16", "float64"])),
        blocks=draw(_blocks(kind)),
        end=draw(st.sampled_from(["flatten", "average"])),
        eager=draw(st.booleans()),
        layers=draw(st.sampled_from(["auto", "all", "*e*", 2, 3])),
        reduce=draw(_reductions(kind)),
        isolated=draw(st.booleans()),
        schedule=tuple(draw(st.lists(_ACTIONS, max_size=3))),
    )


# How they are built.


class Composite(layers.Layer):
    """A layer of layers, as users subclass them."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(width, activation="relu", name="inner")
        self.norm = layers.LayerNormalization(name="norm")

    def build(self, shape):
        self.inner.build(shape)
        self.norm.build((*shape[:-1], self.inner.units))

    def call(self, x):
        return self.norm(self.inner(x))


def _twice(h):
    layer = layers.Dense(h.shape[-1], activation="tanh")
    return layer(layer(h))


def _branches(h, merge, left, right):
    a, b = _stack(h, left), _stack(h, right)
    if merge == "concatenate":
        return layers.Concatenate()([a, b])
    same = layers.Dense(a.shape[-1])(b)
    return (layers.Add() if merge == "add" else layers.Multiply())([a, same])


def _nested(h, blocks):
    inner = keras.Input(h.shape[1:], dtype=h.dtype)
    return keras.Model(inner, _stack(inner, blocks))(h)


def _sequential(h):
    parts = [layers.Conv2D(4, 1), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([keras.Input(h.shape[1:], dtype=h.dtype), *parts])(h)


def _pool(h):
    if h.shape[1] < 2:
        return h
    return layers.MaxPooling2D()(h) if len(h.shape) == 4 else layers.AveragePooling1D(2)(h)


_BUILDERS = {
    "conv": lambda h: layers.Conv2D(4, 3, padding="same", activation="relu")(h),
    "depthwise": lambda h: layers.DepthwiseConv2D(3, padding="same")(h),
    "norm": lambda h: layers.BatchNormalization()(h),
    "layer norm": lambda h: layers.LayerNormalization()(h),
    "relu": lambda h: layers.ReLU()(h),
    "drop": lambda h: layers.Dropout(0.3)(h),
    "dense": lambda h: layers.Dense(5, activation="gelu")(h),
    "lstm": lambda h: layers.LSTM(4, return_sequences=True)(h),
    "attention": lambda h: layers.MultiHeadAttention(2, 3, dropout=0.2)(h, h),
    "conv1d": lambda h: layers.Conv1D(4, 3, padding="same")(h),
    "shared": _twice,
    "composite": lambda h: Composite(4)(h),
    "sequential": _sequential,
    "pool": _pool,
    "branches": _branches,
    "residual": lambda h, blocks: layers.Add()([h, layers.Dense(h.shape[-1])(_stack(h, blocks))]),
    "nested": _nested,
}


def _stack(h, blocks):
    for kind, *options in blocks:
        h = _BUILDERS[kind](h, *options)
    return h


def build(example):
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    keras.config.set_dtype_policy(example.policy)
    try:
        if example.kind == "tokens":
            x = keras.Input((6,), dtype="int64")
            h = layers.Embedding(9, 4, mask_zero=True)(x)
        else:
            x = h = keras.Input((8, 8, 1) if example.kind == "images" else (6, 4))
        h = _stack(h, example.blocks)
        average = {4: layers.GlobalAveragePooling2D, 3: layers.GlobalAveragePooling1D}
        h = layers.Flatten()(h) if example.end == "flatten" else average[len(h.shape)]()(h)
        out = layers.Dense(CLASSES, activation="softmax", dtype="float32", name="out")(h)
        return compile_(keras.Model(x, out), example)
    finally:
        keras.config.set_dtype_policy("float32")


def compile_(host, example):
    # Adam would make of a rounding error in a gradient of zero a step of full length.
    optimizer = "adam" if example.exact else "sgd"
    return compiled(host, optimizer, jit_compile=False, run_eagerly=example.eager)


def data_of(kind, n):
    rng = np.random.default_rng(n)
    if kind == "tokens":
        x = rng.integers(1, 9, (n, 6))
        x[np.arange(6) >= rng.integers(2, 7, n)[:, None]] = 0
        return x, x[:, 0] % CLASSES
    x = rng.normal(size=(n, 8, 8, 1) if kind == "images" else (n, 6, 4)).astype("float32")
    return x, rng.integers(0, CLASSES, n)


# What happens to them.


class StopError(Exception):
    pass


class Interrupt(keras.callbacks.Callback):
    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch:
            raise StopError


def run(example, probes=None):
    """The host after its schedule, all that it reported, and what the probes did beside it."""
    host = build(example)
    (x, y), validation = data_of(example.kind, N), data_of(example.kind, VALIDATION)
    reported, probed = [], []

    def fit(epochs=1, validated=True, batch_size=16, *beside):
        callbacks = [*beside] if probes is None else [probes, *beside]
        given = {"validation_data": validation} if validated else {}
        logs = host.fit(
            x, y, batch_size, epochs, 0, callbacks=callbacks, shuffle=False, **given
        ).history
        note(logs, ("", "val_") if validated else ("",))

    def note(logs, prefixes):
        own = {key: values for key, values in logs.items() if "probe" not in key}
        reported.append(own)
        if probes is not None:
            probed.append(({key: logs[key] for key in logs if key not in own}, prefixes))

    fit()
    for action, *how in example.schedule:
        if action == "fit":
            fit(*how)
        elif action == "interrupt":
            with pytest.raises(StopError):
                fit(1, True, 16, Interrupt(*how))
        elif action == "recompile":
            compile_(host, example)
        elif action == "save" and probes is not None:
            with tempfile.TemporaryDirectory() as directory:
                probes.save(f"{directory}/probes")
                probes = LinearProbeCallback.load(f"{directory}/probes")
        elif action == "evaluate":
            reported.append(host.evaluate(*validation, verbose=0, return_dict=True))
        elif action == "evaluate probes":
            callbacks = [] if probes is None else [probes]
            logs = host.evaluate(*validation, verbose=0, return_dict=True, callbacks=callbacks)
            note(logs, ("",))
        elif action == "predict":
            reported.append({"predict": host.predict(validation[0], verbose=0)})
        elif action == "batch":
            reported.append(host.train_on_batch(x[:16], y[:16], return_dict=True))
    # What an interrupt leaves on a host, its next plain fit takes off.
    reported.append(host.fit(x[:16], y[:16], verbose=0).history)
    return host, reported, probed


@given(examples())
def test_hosts_are_untouched_reports_complete_and_nothing_is_left_behind(example):
    plain, expected, _ = run(example)
    functions = sorted(name for name in vars(plain) if callable(vars(plain)[name]))
    graph = trace(plain, input_spec_of(plain))
    chosen = (
        [tap.name for tap in graph.taps if not tap.unreadable][:: example.layers]
        if isinstance(example.layers, int)
        else example.layers
    )
    names = [tap.name for tap in select(graph, chosen).taps]
    reduce = _fitting(example.reduce, [tap for tap in graph.taps if tap.name in names])
    mode = "isolated" if example.isolated else "shared"
    host, reported, probed = run(example, LinearProbeCallback(chosen, reduce=reduce, mode=mode))

    assert sorted(name for name in vars(host) if callable(vars(host)[name])) == functions
    assert all("call" not in vars(layer) for layer in host._flatten_layers())
    for logs, prefixes in probed:
        assert set(logs) == {
            f"{prefix}probe_{metric}/{name}"
            for prefix in prefixes
            for metric in ("error", "loss")
            for name in names
        }
        assert all(np.isfinite(values).all() for values in logs.values())
    if example.isolated:
        _compare(reported, expected, example)
        _compare(_variables(host), _variables(plain), example)


def _fitting(reduce, taps):
    """The reduction where it applies: a token has to be one of several, channels have to fit."""
    if isinstance(reduce, Token):
        unfit = [tap for tap in taps if tap.shape is None or len(tap.shape) != 3]
    elif isinstance(reduce, SpatialPool):
        unfit = [tap for tap in taps if tap.shape[-1] > reduce.max_features]
    else:
        return reduce
    return {tap.name: "auto" if tap in unfit else reduce for tap in taps}


def _compare(got, wanted, example):
    off = 0 if example.exact else 5e-2 if example.policy == "mixed_bfloat16" else 1e-4
    pairs = zip(keras.tree.flatten(got), keras.tree.flatten(wanted), strict=True)
    assert all(np.allclose(a, b, rtol=off, atol=off) for a, b in pairs)


def _variables(host):
    return [v.numpy() for v in (*host.variables, *host.optimizer.variables)]
