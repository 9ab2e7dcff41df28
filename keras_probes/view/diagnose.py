"""Diagnoses: what the errors at the layers say is wrong, and the numbers that say so.

In: a `ProbeResults`. Out: findings, each with a code that has a page in `docs/diagnostics/`.

Errors are compared by tests at the level of `ALPHA`, corrected for the several comparisons of a
check (Holm 1979). Two layers are measured on the same examples: where it is known how their errors
went together, the test is a paired one (`results/compare.py`), else it takes them for independent.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np
import pandas as pd

from keras_probes.results.compare import compare_rows, deviation_of, pairs_of
from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import Pairs
from keras_probes.view.layout import Layout, layout_of
from keras_probes.view.table import CONVERGED

ALPHA = 0.05
MARGIN = 0.02  # of error: what is no difference to speak of
GUESSES = 0.05  # of guessing's error: what is known to be better by less is a guess
OVERFITTED = 0.05  # of error, between training and validation
COLLAPSED = 0.1  # of the rank that a layer could have, by the best one before
ONE_DIRECTION = 1.2  # of a rank: hardly more than one
SHORTEST = {"dead": 2, "plateau": 3}  # segments, in taps
FEWEST = 5  # taps of a trunk whose trend is looked at
DRAWS = 2000

Severity = Literal["problem", "warning", "note"]
_Key = TypeVar("_Key")


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong, or worth to know.

    Attributes:
        code: `"KP001"` and so on.
        title: What it is.
        severity: `"problem"`: the host does not learn as it could. `"warning"`: look at it.
            `"note"`: the measures are to be read with care.
        taps: The layers it is about, in graph order.
        numbers: What it rests on, by name.
        text: What was found, with the numbers.
        advice: What to do.
    """

    code: str
    title: str
    severity: Severity
    taps: tuple[str, ...]
    numbers: dict[str, float]
    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.code} {self.severity}: {self.title}. {self.text} {self.advice}"


class Findings(list[Finding]):
    """Findings, the worst first.

    Attributes:
        not_applicable: By code, why a check could not be made.
    """

    def __init__(self, findings: Iterable[Finding] = (), not_applicable: dict | None = None):
        super().__init__(findings)
        self.not_applicable: dict[str, str] = not_applicable or {}

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "nothing found"


class NotApplicableError(Exception):
    """The measures a check needs are not there; says which."""


@dataclasses.dataclass(frozen=True)
class _Measures:
    """What checks look at: the latest errors."""

    results: ProbeResults
    target: str | None
    layout: Layout
    all_taps: pd.DataFrame  # of the split that decides, by tap

    @functools.cached_property
    def pairs(self) -> Pairs | None:
        return pairs_of(self.results, self.all_taps.iloc[0])

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """The same of the taps that could be measured."""
        return self.all_taps[self.all_taps["n"] > 0]

    @property
    def trunk(self) -> list[str]:
        return [tap for tap in self.layout.trunk if tap in self.frame.index]

    def error(self, tap: str) -> float:
        return float(self.frame["value"][tap])

    def n(self, tap: str) -> int:
        return int(self.frame["n"][tap])

    def above(self, tap: str, other: str) -> float:
        """p-value of the error of `tap` being no more than that of `other`."""
        return compare_rows(self.pairs, self.frame.loc[tap], self.frame.loc[other]).p_above

    def lost(self, trunk: Sequence[str]) -> tuple[dict[str, str], list[str]]:
        """The best layer before each one of a trunk, and which are surely worse than that."""
        before = {
            tap: min(trunk[:place], key=self.error) for place, tap in enumerate(trunk) if place
        }
        return before, _holm({tap: self.above(tap, best) for tap, best in before.items()})

    def deviation(self, tap: str) -> float:
        """Standard deviation of the error of `tap`."""
        return deviation_of(self.frame.loc[tap])

    def guess(self) -> float:
        """The error of who sees no feature: of classes, that of the majority."""
        return float(self.frame["majority"].iloc[-1])

    def guesses(self, tap: str) -> bool:
        """Whether a tap is known to be better than guessing by no more than `GUESSES` of that."""
        best = self.error(tap) - 1.645 * self.deviation(tap)
        return self.guess() - best < GUESSES * self.guess()

    def learned(self, tap: str) -> float:
        """p-value of the error of `tap` being no less than that of guessing."""
        return _p_above(self.guess() - self.error(tap), self.deviation(tap))


def diagnose(results: ProbeResults, *, target: str | None = None) -> Findings:
    """Says what is wrong with the host or its probes, with the numbers it rests on.

    Args:
        results: What probes measured. The split that decides is the last measured of train,
            validation and test; the moment is the latest.
        target: Which target; may be left out if there is only one.

    Returns:
        Findings, the worst first; `not_applicable` names the checks that could not be made.

    Raises:
        ImportError: SciPy is not installed, and layers were evaluated on the same examples.
        ValueError: No error was measured, or there are several targets and none is named.
    """
    measures = _Measures(
        results,
        results.resolve_target(target),
        layout_of(results),
        results.measured("error", target=target),
    )
    found, not_applicable = [], {}
    for code, check in CHECKS.items():
        try:
            if measures.frame.empty and check is not _not_finite:
                raise NotApplicableError("no layer has an example with finite features")
            found += list(check(measures))
        except NotApplicableError as reason:
            not_applicable[code] = str(reason)
    order = ("problem", "warning", "note")
    return Findings(sorted(found, key=lambda f: order.index(f.severity)), not_applicable)


def _dead_segment(m: _Measures) -> Iterator[Finding]:
    """KP001: layers that what comes after them does without, or that tell nothing (figure 6)."""
    trunk = _long_enough(m, 3)
    best_before, lost = m.lost(trunk)
    best = min(trunk, key=m.error)
    if m.learned(best) * len(trunk) > ALPHA:
        return  # nothing learns: there are no others
    for segment in _runs(trunk[1:], lambda tap: tap in lost or m.guesses(tap)):
        before, last = best_before[segment[0]], trunk[-1]
        after = trunk[trunk.index(segment[-1]) + 1 :]
        regained = [tap for tap in after if m.error(tap) <= m.error(before) + MARGIN]
        guessing = [tap for tap in segment if m.guesses(tap)]
        # What a chain has lost does not come back: where it is there, it came another way.
        bypassed = bool(regained) and segment[-1] in lost
        if len(segment) < SHORTEST["dead"] or not (bypassed or guessing):
            continue
        numbers = {"before": m.error(before), "least": min(map(m.error, segment)),
                   "most": max(map(m.error, segment)), "guess": m.guess()}  # fmt: skip
        text = (
            f"From {segment[0]!r} to {segment[-1]!r}, {len(segment)} layers, the error is "
            f"{numbers['least']:.3f} to {numbers['most']:.3f}, after {numbers['before']:.3f} at "
            f"{before!r}"
        )
        if guessing:
            text += f"; guessing comes to {numbers['guess']:.3f}"
        if bypassed:
            numbers["after"] = m.error(regained[0])
            text += f"; at {regained[0]!r} it is {numbers['after']:.3f} again"
        why = (
            "A skip connection carries the signal past them: they are not used and hardly get a "
            "gradient. Shorten the segment, or give it normalization or skips of its own."
            if bypassed
            else f"Nothing of the labels is left there, up to {last!r} or to a branch beside. "
            "Look for saturated or dead activations, a learning rate too high, or a wrong input."
        )
        yield Finding("KP001", "Dead segment", "problem", tuple(segment), numbers, text + ".", why)


def _rises(m: _Measures) -> Iterator[Finding]:
    """KP002: the error rises from a layer to the next."""
    trunk = _long_enough(m, 2)
    pairs = list(itertools.pairwise(trunk))
    for above, tap in _holm({pair: m.above(pair[1], pair[0]) for pair in pairs}):
        numbers = {"before": m.error(above), "at": m.error(tap), "p": m.above(tap, above)}
        yield Finding(
            "KP002", "Error rises with depth", "warning", (above, tap), numbers,
            f"From {above!r} to {tap!r} it goes from {numbers['before']:.3f} to "
            f"{numbers['at']:.3f} (p = {numbers['p']:.1g}).",
            "A linear probe reads less of the labels there. In the middle of a block that "
            "is common; at its end, look at the width of the layer and at how it is trained.",
        )  # fmt: skip


def _plateau(m: _Measures) -> Iterator[Finding]:
    """KP003: layers that add nothing."""
    trunk = _long_enough(m, SHORTEST["plateau"] + 1)
    noise = 1.645 * math.sqrt(2) * min(m.deviation(tap) for tap in trunk)
    if noise >= MARGIN:
        raise NotApplicableError(
            f"errors on {m.n(trunk[-1])} examples are not known to within {MARGIN:g}"
        )
    place = 0
    while place < len(trunk) - 1:
        first = trunk[place]
        run = [first]
        for tap in trunk[place + 1 :]:
            if not _is_same(m, tap, first):
                break
            run.append(tap)
        if len(run) > SHORTEST["plateau"]:
            errors = [m.error(tap) for tap in run]
            yield Finding(
                "KP003", "Plateau", "note", tuple(run[1:]),
                {"least": min(errors), "most": max(errors), "margin": MARGIN},
                f"The {len(run) - 1} layers after {first!r}, up to {run[-1]!r}, change the error "
                f"by less than {MARGIN:g}: it is {min(errors):.3f} to {max(errors):.3f}.",
                "For these labels they could be left out, or the head be put before them.",
            )  # fmt: skip
        place += len(run) - 1 or 1


def _falls_towards_the_head(m: _Measures) -> Iterator[Finding]:
    """KP004: accuracy only falls from a layer on."""
    trunk = _long_enough(m, 3)
    best, last = min(trunk, key=m.error), trunk[-1]
    # The best of all was picked: as many comparisons as there are layers.
    p = min(1.0, m.above(last, best) * len(trunk))
    after = trunk[trunk.index(best) :]
    if p <= ALPHA and len(after) > 2 and m.error(last) - m.error(best) > MARGIN:
        numbers = {"best": m.error(best), "last": m.error(last), "p": p}
        yield Finding(
            "KP004", "Accuracy falls towards the head", "warning", tuple(after), numbers,
            f"The error is least at {best!r}, {numbers['best']:.3f}, and {numbers['last']:.3f} at "
            f"{last!r}, {len(after) - 1} layers on (p = {p:.1g}).",
            "The layers after it lose what was there: train longer, or look for a head that is too "
            "narrow, too regularised, or trained on other labels than the probes.",
        )  # fmt: skip


def _overfitted(m: _Measures) -> Iterator[Finding]:
    """KP005: probes that do far better on what they were trained on."""
    split, epoch = m.frame["split"].iloc[0], int(m.frame["epoch"].max())
    if split == "train":
        raise NotApplicableError("only training examples were measured")
    try:
        train = m.results.measured("error", split="train", epoch=epoch, target=m.target)
    except ValueError:
        raise NotApplicableError(f"no training error was measured in epoch {epoch + 1}") from None
    taps = [tap for tap in m.frame.index if tap in train.index and train["n"][tap]]
    errors = {tap: float(train["value"][tap]) for tap in taps}
    sure = _holm(
        {tap: compare_rows(None, m.frame.loc[tap], train.loc[tap]).p_above for tap in taps}
    )
    far = [tap for tap in taps if tap in sure and m.error(tap) - errors[tap] > OVERFITTED]
    if far:
        worst = max(far, key=lambda tap: m.error(tap) - errors[tap])
        numbers = {"train": errors[worst], split: m.error(worst), "taps": float(len(far))}
        yield Finding(
            "KP005", "Over-fitted probes", "note", tuple(far), numbers,
            f"{len(far)} of {len(taps)} probes do far better on training examples, most of all at "
            f"{worst!r}: {errors[worst]:.3f} against {m.error(worst):.3f} ({split}).",
            "Their error says less about the layer than about the number of examples. Use fewer "
            'features (reduce="gap", RandomFeatures) or more examples.',
        )  # fmt: skip


def _not_at_optimum(m: _Measures) -> Iterator[Finding]:
    """KP006: probes that are not known to be at their optimum."""
    certificates = m.frame["certificate"]
    far = [tap for tap in m.frame.index if not certificates[tap] <= CONVERGED]
    if far:
        worst = float(certificates[far].max())
        known = f"may be up to {worst:.2g} nats above their optimum, or it is not known how far."
        unknown = "are not known to be near their optimum."
        yield Finding(
            "KP006", "Probes not at their optimum", "note", tuple(far), {"certificate": worst},
            f"{len(far)} of {len(certificates)} probes {unknown if math.isnan(worst) else known}",
            "Their error is at least in part their own. Give validation data, a larger refit=, or "
            "fit them with refit(); results.refits says what was left out, and why.",
        )  # fmt: skip


def _auxiliary_head(m: _Measures) -> Iterator[Finding]:
    """KP007: an auxiliary head is ahead of the main one."""
    heads = [tap for tap in m.layout.ends if tap in m.frame.index]
    if len(heads) < 2 or not m.trunk or m.trunk[-1] not in heads:
        raise NotApplicableError("fewer than two heads are probed")
    main = m.trunk[-1]
    for tap in _holm({tap: m.above(main, tap) for tap in heads if tap != main}):
        numbers = {"auxiliary": m.error(tap), "main": m.error(main), "p": m.above(main, tap)}
        yield Finding(
            "KP007", "Auxiliary head ahead of the main one", "warning", (tap, main), numbers,
            f"The error is {numbers['auxiliary']:.3f} at {tap!r} and {numbers['main']:.3f} at "
            f"{main!r} (p = {numbers['p']:.1g}).",
            "Early in training that is common. Later, the layers after the branch do not help: "
            "lower the auxiliary loss's weight, or train them longer.",
        )  # fmt: skip


def _not_monotonic(m: _Measures) -> Iterator[Finding]:
    """KP008: the error does not fall with depth (Kendall's tau along the trunk)."""
    trunk = _long_enough(m, FEWEST)
    errors = np.array([m.error(tap) for tap in trunk])
    spread = np.array([m.deviation(tap) for tap in trunk])
    drawn = np.random.default_rng(0).normal(errors, spread, (DRAWS, len(trunk)))
    tau = float(_kendall(errors[None])[0])
    low, high = (float(q) for q in np.quantile(_kendall(drawn), (ALPHA / 2, 1 - ALPHA / 2)))
    if high >= 0:
        yield Finding(
            "KP008", "Error does not fall with depth", "warning", tuple(trunk),
            {"tau": tau, "ci_low": low, "ci_high": high},
            f"Kendall's tau of error and depth is {tau:.2f} along {len(trunk)} layers (of errors "
            f"drawn anew, 95% have {low:.2f} to {high:.2f}); -1 is a fall at every layer.",
            "Layers of a trained model read its labels better and better. This one is "
            "not trained yet, or not for these labels.",
        )  # fmt: skip


def _not_finite(m: _Measures) -> Iterator[Finding]:
    """KP009: features that are NaN or infinite."""
    counts = m.all_taps["nonfinite"]
    bad = [tap for tap in m.all_taps.index if counts[tap] > 0]
    if bad:
        shares = counts[bad] / (counts[bad] + m.all_taps["n"][bad])
        worst = float(shares.max())
        yield Finding(
            "KP009", "Features not finite", "problem", tuple(bad),
            {"taps": float(len(bad)), "share": worst},
            f"{len(bad)} of {len(counts)} layers have NaN or infinite features, {bad[0]!r} first, "
            f"in up to {worst:.0%} of the examples.",
            "The model has diverged, or overflows: lower the learning rate, clip gradients, or "
            "look at the first of these layers. Probes are measured on the other examples.",
        )  # fmt: skip


def _collapsed(m: _Measures) -> Iterator[Finding]:
    """KP010: layers that are worse since their features vary in few directions only."""
    ranks = {tap: row.value for tap, row in m.results.latest("rank", m.target).items()}
    trunk = [tap for tap in _long_enough(m, 2) if tap in ranks]
    if len(trunk) < 2:
        raise NotApplicableError("the rank of the features was not measured")
    best_before, lost = m.lost(trunk)
    for segment in _runs(trunk, lambda tap: tap in lost):
        before, worst = best_before[segment[0]], max(segment, key=m.error)
        least = min(segment, key=ranks.__getitem__)
        rank, of_before = ranks[least], ranks[before]
        numbers = {"rank": rank, "rank_before": of_before, "error": m.error(worst),
                   "error_before": m.error(before)}  # fmt: skip
        text = (
            f"From {segment[0]!r} to {segment[-1]!r} the error is up to {m.error(worst):.3f}, "
            f"after {m.error(before):.3f} at {before!r}. The effective rank of the features is "
            f"down to {rank:.1f} at {least!r}, after {of_before:.1f}"
        )
        most = min(of_before, next(t.features for t in m.results.taps if t.name == least))
        if rank < max(ONE_DIRECTION, COLLAPSED * most):
            yield Finding(
                "KP010", "Collapsed features", "problem", tuple(segment), numbers, text + ".",
                "The examples look alike there: what told them apart is gone, and no later layer "
                "brings it back. Look for saturated activations, a bottleneck, or a learning rate "
                "too high.",
            )  # fmt: skip
        elif any(map(m.guesses, segment)):
            yield Finding(
                "KP010", "Features vary, but tell less to a linear probe", "note", tuple(segment),
                numbers, text + ".",
                "The layer has not collapsed: what it knows may be there in a form that no linear "
                "probe reads. Look at the layers after it.",
            )  # fmt: skip


CHECKS: dict[str, Callable[[_Measures], Iterator[Finding]]] = {
    "KP001": _dead_segment,
    "KP002": _rises,
    "KP003": _plateau,
    "KP004": _falls_towards_the_head,
    "KP005": _overfitted,
    "KP006": _not_at_optimum,
    "KP007": _auxiliary_head,
    "KP008": _not_monotonic,
    "KP009": _not_finite,
    "KP010": _collapsed,
}


def _long_enough(m: _Measures, taps: int) -> list[str]:
    if len(m.trunk) < taps:
        raise NotApplicableError(
            f"the trunk has {len(m.trunk)} probed layers, and this takes {taps} of them"
        )
    return m.trunk


def _runs(taps: Sequence[str], belongs: Callable[[str], bool]) -> Iterator[list[str]]:
    """Longest runs of taps that follow each other and belong."""
    run: list[str] = []
    for tap in taps:
        if belongs(tap):
            run.append(tap)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _p_above(difference: float, deviation: float) -> float:
    """One-sided p-value of a difference being no more than 0."""
    if deviation == 0 or math.isnan(deviation):
        return 0.0 if difference > 0 and deviation == 0 else 1.0
    return 0.5 * math.erfc(difference / deviation / math.sqrt(2))


def _is_same(m: _Measures, tap: str, other: str) -> bool:
    """Whether two errors are known to differ by less than `MARGIN` (two one-sided tests)."""
    deviation = math.hypot(m.deviation(tap), m.deviation(other))
    return abs(m.error(tap) - m.error(other)) + 1.645 * deviation < MARGIN


def _holm(p_values: dict[_Key, float]) -> list[_Key]:
    """What is significant at `ALPHA` for all together (Holm 1979), in the order given."""
    significant = set()
    for place, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > ALPHA / (len(p_values) - place):
            break
        significant.add(key)
    return [key for key in p_values if key in significant]


def _kendall(errors: np.ndarray) -> np.ndarray:
    """Kendall's tau-a of each row with its order, shape (rows,)."""
    i, j = np.triu_indices(errors.shape[1], 1)
    return np.mean(np.sign(errors[:, j] - errors[:, i]), axis=1)
