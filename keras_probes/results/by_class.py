"""What a probe gets wrong by class, and what it takes for what.

In: a `ProbeResults`. Out: frames.
"""

import numpy as np
import pandas as pd

from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import SPLITS, wilson_interval


def per_class(
    results: ProbeResults, tap: str, *, split: str | None = None, target: str | None = None
) -> pd.DataFrame:
    """As `ProbeResults.per_class` says."""
    counts = _counts(results, tap, split, target)
    if "wrong_by_label" in counts:
        return _by_name(results, "label", counts["answers_by_label"], counts["wrong_by_label"])
    if "confusion" in counts:
        matrix = counts["confusion"]
        n, right, answered = matrix.sum(axis=1), np.diagonal(matrix), matrix.sum(axis=0)
    else:
        n, right, answered = (counts[name] for name in ("labelled", "right", "answered"))
    frame = _by_name(results, "class", n, n - right)
    union = n + answered - right
    iou = np.divide(right, union, out=np.full(len(n), np.nan), where=union > 0)
    return frame.assign(answered=answered.astype(int), iou=iou)


def confusion(
    results: ProbeResults, tap: str, *, split: str | None = None, target: str | None = None
) -> pd.DataFrame:
    """As `ProbeResults.confusion` says."""
    counts = _counts(results, tap, split, target)
    if "confusion" not in counts:
        raise ValueError(
            "There is no confusion matrix of these: they are several labels at once, or more than "
            "100 classes. per_class(tap) has errors and answers by class."
        )
    matrix = counts["confusion"].astype(int)
    names = _names(results, len(matrix))
    rows = pd.Index(names, name="class")
    return pd.DataFrame(matrix, index=rows, columns=pd.Index(names, name="answer"))


def _counts(
    results: ProbeResults, tap: str, split: str | None, target: str | None
) -> dict[str, np.ndarray]:
    name = results.resolve_target(target)
    known = [of for of in SPLITS if (name, None, of) in results.details]
    wanted = split if split is not None else next(reversed(known), None)
    if wanted not in known:
        raise ValueError(
            f"Nothing was counted by class for split={split!r}, target={target!r}: only "
            "evaluations of classes or labels are. "
            f"Counted: {', '.join(map(repr, known)) or 'nothing'}."
        )
    counts = results.details[name, None, wanted].counts
    if tap not in counts:
        raise ValueError(
            f"Unknown tap. Received: {tap!r}. Measured: {', '.join(map(repr, counts))}."
        )
    return dict(counts[tap])


def _by_name(results: ProbeResults, kind: str, n: np.ndarray, wrong: np.ndarray) -> pd.DataFrame:
    error = np.divide(wrong, n, out=np.full(len(n), np.nan), where=n > 0)
    bounds = [wilson_interval(float(e), int(of)) for e, of in zip(error, n, strict=True)]
    frame = pd.DataFrame(bounds, columns=["ci_low", "ci_high"])
    frame.insert(0, "error", error)
    frame.insert(0, "n", n.astype(int))
    return frame.set_axis(pd.Index(_names(results, len(n)), name=kind))


def _names(results: ProbeResults, n: int) -> list[str] | list[int]:
    names = results.class_names
    return names if names is not None and len(names) == n else list(range(n))
