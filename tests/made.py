"""Results made by hand, for what views make of them."""

import numpy as np

from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import Node, Row, TapInfo, wilson_interval


def results_of(errors, *, inputs=None, n=1000, split="validation", unprobed=(), **fields):
    """Results of one target.

    Args:
        errors: By tap, its error, or one for each epoch.
        inputs: By node, the nodes before it; by default each tap follows the one before.
        unprobed: Names of nodes that are no taps; they have to be among `inputs`.
        fields: Further ones of every `Row`, as one value or by tap.
    """
    names = list(errors)
    if inputs is None:
        inputs = {tap: tuple(names[max(place - 1, 0) : place]) for place, tap in enumerate(names)}
    taps = [
        TapInfo(tap, place, "Input" if place == 0 else "Dense", (8,), "Flatten", 8)
        for place, tap in enumerate(names)
    ]
    graph = [Node(name, "Dense", (8,), tuple(above)) for name, above in inputs.items()]
    rows = [
        Row(
            epoch=epoch, step=10, target=None, tap=tap, metric="error", value=float(error), n=n,
            **dict(zip(("ci_low", "ci_high"), wilson_interval(min(error, 1.0), n), strict=True)),
            **{"majority": 0.9, "chance": 0.9, "split": split, "certificate": 1e-4,
               **{key: v[tap] if isinstance(v, dict) else v for key, v in fields.items()}},
        )
        for epoch in range(max(np.size(of_tap) for of_tap in errors.values()))
        for tap, of_tap in errors.items()
        for error in [np.atleast_1d(of_tap)[epoch]]
    ]  # fmt: skip
    assert set(inputs) == {*names, *unprobed}
    return ProbeResults(taps, rows, graph=graph)
