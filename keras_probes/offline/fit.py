"""`fit_probes`, the second half of the offline driver: the optimal probe for every tap.

In: a `FeatureStore`. Out: `ProbeResults` with probes, their errors, and for each a certificate of
how far it can be from the optimum.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from keras_probes.engines.run import Engine, check_engine, run
from keras_probes.offline.store import FeatureStore, StoredArray
from keras_probes.probes.path import PENALTIES, choose_penalty
from keras_probes.probes.probe_set import MOST_PAIRED, pair_moments
from keras_probes.probes.problem import Block, Problem
from keras_probes.probes.solver import Fit, minimise
from keras_probes.probes.spectrum import SPECTRUM, Spectrum
from keras_probes.probes.spread import LARGEST, inverse_spread
from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import (
    Details,
    Node,
    Pairs,
    Probe,
    Row,
    interval_of_mean,
    versions,
)

PATH_TOL = 1e-3  # nats; enough to compare validation losses
SPECTRUM_ROWS = 25_600  # about so many tell in how many directions features vary
MOST_FEATURES = 4096  # whose second moments are looked at
READ_ROWS = 8192  # about so many rows are in the works at a time

Split = Literal["train", "validation", "test"]


def fit_probes(
    store: FeatureStore,
    *,
    validation: FeatureStore | float | None = 0.1,
    test: FeatureStore | float | None = 0.1,
    l2: float | Sequence[float] | Literal["auto"] = "auto",
    tol: float = 1e-6,
    taps: Sequence[str] | None = None,
    memory: int = 512 * 2**20,
    max_iterations: int = 1000,
    seed: int = 0,
    engine: Engine | None = None,
    verbose: bool = True,
) -> ProbeResults:
    """Finds the optimal linear probe of every tap, and proves how near it came.

    A probe minimises the mean loss of its task, such as the cross-entropy of classes, plus
    `l2 / 2 * |W|^2` on features standardised by the training rows (`probes/spread.py` says how);
    the problem is convex and `probes/solver.py` writes it out. With several penalties, the one with
    the least validation loss is taken.

    Args:
        store: The features, and the rows to train on.
        validation: Rows that choose the penalty: another store of the same host, or the fraction
            of `store` to keep apart for it.
        test: Rows to report on that chose nothing, likewise.
        l2: The penalty; several, from which the validation loss picks; or `"auto"` for those
            from 1 down to 1e-8, half a decade apart, until that loss has risen twice.
        tol: How far the training objective may be above its optimum, in nats.
        taps: Names of the taps to fit; all by default.
        memory: Bytes of features to hold at once, by each worker. Taps that take more are read
            from the store again and again, with the same result.
        max_iterations: Passes over the examples, about one per step of the solver, after which it
            gives up.
        seed: Seed of the split.
        engine: Where to fit: a `RayEngine`, or any `concurrent.futures.Executor`; by default this
            process. There is a call for each tap and target, those that take longest first, and
            results are the same bit for bit on machines of one kind.
        verbose: Whether to show a progress bar and each tap's result as it comes.

    Returns:
        Results with all measures of its task on each split, and of each probe the penalty, the
        number of iterations, the norm of the gradient and the certificate: an upper bound on its
        training objective minus the optimum, in nats. Taps whose fit failed are in
        `results.left_out`, with the reason.

    Raises:
        TypeError: `store` or `engine` is none.
        ValueError: An argument is out of its range, a tap is unknown, or a store is not complete or
            of another host. Where no fit came to its end, what the first one failed with: labels
            are of one class only, or a chunk is damaged.

    Warns:
        UserWarning: A fit failed; a probe's certificate is above `tol`; features are not finite; or
            a class has no example to train on.
    """
    from tqdm import tqdm  # comes with the extra that zarr comes with

    if not isinstance(store, FeatureStore):
        raise TypeError(
            "Expected a FeatureStore: what extract_features returns, or FeatureStore(path). "
            f"Received: {store!r}."
        )
    check_engine(engine)
    penalties = _penalties(l2, validation)
    for tap in taps if taps is not None else ():
        store.check_tap(tap)
    job = _Job(store, validation, test, penalties, tol, memory, max_iterations, seed)
    job.splits()  # what is wrong with them is an error here
    chosen = [tap for tap in store.taps if taps is None or tap.name in taps]
    in_order = [(job, tap.name, target) for tap in chosen for target in store.targets]
    longest = {tap.name: tap.features for tap in chosen}
    calls = (
        in_order
        if engine is None
        else sorted(in_order, key=lambda call: -longest[call[1]] * store.targets[call[2]].outputs)
    )
    fits: dict[tuple[str, str | None], _Fitted] = {}
    failed: dict[tuple[str, str | None], Exception] = {}
    with tqdm(total=len(calls), desc="fitting probes", unit=" fits", disable=not verbose) as bar:
        for outcome in run(engine, _fit, calls):
            _, tap, target = outcome.args
            if outcome.error is not None:
                failed[tap, target] = outcome.error
            else:
                fits[tap, target] = outcome.result
                if verbose:
                    bar.write(outcome.result.summary)
            bar.update()
    _features.cache_clear()
    if not fits:
        raise next(iter(failed.values()))
    for remark in dict.fromkeys(remark for fit in fits.values() for remark in fit.remarks):
        warnings.warn(remark, stacklevel=2)
    reasons = _reasons(failed)
    for tap, reason in reasons.items():
        warnings.warn(f"No probe of tap {tap!r}. {reason}", stacklevel=2)
    results = ProbeResults(
        [tap for tap in chosen if any(tap.name == fitted for fitted, _ in fits)],
        reductions={tap.name: store.manifest["reductions"][tap.name] for tap in chosen},
        graph=map(Node.from_json, store.manifest["graph"]),
        settings={
            "model": store.host["name"],
            "features": store.dtype,
            "l2": l2 if isinstance(l2, str) else ", ".join(f"{p:g}" for p in penalties),
            "tol": tol,
            "seed": seed,
        },
        versions={**store.versions, **versions()},
        left_out={**store.manifest.get("left_out", {}), **reasons},
        class_names=store.class_names,
    )
    _add(results, {(t, tap): fits[tap, t] for _, tap, t in in_order if (tap, t) in fits}, store)
    return results


def _fit(job: "_Job", tap: str, target: str | None) -> "_Fitted":
    """Fits the probe of a tap and target, on whatever machine this is."""
    features = _features(job, tap)
    fit = _TapFit(features, target, job)
    errors = {
        split: of_split
        for split, of_split in fit.errors.items()
        if split != "train" or len(features.splits) == 1
    }
    return _Fitted(
        fit.probe(), [*fit.rows(), *features.rows_of_spectrum(target)], fit.details(), errors,
        [*features.remarks, *fit.remarks], fit.summary(),
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def _features(job: "_Job", tap: str) -> "_Features":
    """Read once where a tap's targets are fitted one after another."""
    return _Features(tap, job.splits(), job.memory)


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """The probe of a tap and target.

    Attributes:
        probe: It.
        rows: All measures.
        details: What was counted by class or label, by split and name.
        errors: Of each example of a split, NaN where it does not count.
        remarks: What the user is to be warned of.
        summary: A line on it.
    """

    probe: Probe
    rows: list[Row]
    details: dict["Split", dict[str, np.ndarray]]
    errors: dict["Split", np.ndarray]
    remarks: list[str]
    summary: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """What the fits of a call have in common; small, since it travels with each of them."""

    store: FeatureStore
    validation: FeatureStore | float | None
    test: FeatureStore | float | None
    penalties: tuple[float, ...]
    tol: float
    memory: int
    max_passes: int
    seed: int

    def splits(self) -> dict["Split", "_Rows"]:
        """Who trains, validates and tests."""
        return _splits(self.store, self.validation, self.test, self.seed)


def _add(
    results: ProbeResults, fits: dict[tuple[str | None, str], _Fitted], store: FeatureStore
) -> None:
    """Takes fits into results."""
    details: dict[tuple[str | None, Split], dict] = defaultdict(dict)
    errors: dict[tuple[str | None, Split], dict[str, np.ndarray]] = defaultdict(dict)
    for (target, tap), fit in fits.items():
        results.add(fit.rows)
        results.probes[target, tap] = fit.probe
        for split, counts in fit.details.items():
            details[target, split][tap] = counts
        for split, of_split in fit.errors.items():
            errors[target, split][tap] = of_split
    for (target, split), of_taps in errors.items():
        if len(of_taps) <= MOST_PAIRED:
            shape = (len(of_taps), -1, store.rows_per_example)
            of_rows = np.stack(list(of_taps.values())).reshape(shape)
            n = np.isfinite(of_rows).sum(axis=2)
            of_each = np.nansum(of_rows, axis=2) / np.maximum(n, 1)
            counts = (n > 0).astype("float32")
            moments = pair_moments(tf.constant(of_each.astype("float32")), tf.constant(counts))
            results.pairs[target, None, split] = Pairs(0, tuple(of_taps), moments.numpy())
    for (target, split), by_tap in details.items():
        results.details[target, None, split] = Details(0, by_tap)


def _reasons(failed: dict[tuple[str, str | None], Exception]) -> dict[str, str]:
    """Why taps have no probe, by name."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for (tap, target), error in failed.items():
        of_target = "" if target is None else f"Of target {target!r}: "
        reasons[tap].append(f"{of_target}{type(error).__name__}: {error}")
    return {tap: " ".join(of_tap) for tap, of_tap in reasons.items()}


def _penalties(l2: Any, validation: Any) -> tuple[float, ...]:
    auto = isinstance(l2, str) and l2 == "auto"
    penalties = tuple((PENALTIES if auto else np.atleast_1d(l2).astype(float)).tolist())
    if not penalties or not all(np.isfinite(penalty) and penalty > 0 for penalty in penalties):
        raise ValueError(
            'Expected `l2` to be "auto", or one or more penalties above 0: without a penalty the '
            f"optimum may not exist. Received: l2={l2!r}."
        )
    if len(penalties) > 1 and validation is None:
        raise ValueError(
            "Several penalties need validation rows to choose by. Received: validation=None and "
            f"l2={l2!r}. Pass validation=0.1 or a store, or one penalty."
        )
    return tuple(sorted(penalties, reverse=True))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a split: which ones of which store."""

    store: FeatureStore
    places: np.ndarray  # sorted

    def labels(self, target: str | None) -> np.ndarray:
        return self.store.labels(target)[self.places]

    def weights(self, target: str | None) -> np.ndarray:
        weights = self.store.sample_weight(target)
        return np.ones(len(self.places), "float32") if weights is None else weights[self.places]

    def predictions(self, target: str | None) -> np.ndarray | None:
        predicted = self.store.predictions(target)
        return None if predicted is None else predicted[self.places]

    def blocks(self, stored: StoredArray) -> Iterator[tuple[np.ndarray, slice]]:
        """Reads features, float32, and the place of each block among the split's rows.

        The next block is read while one is in use.
        """
        step = max(1, READ_ROWS // self.store.chunk_rows) * self.store.chunk_rows
        edges = np.searchsorted(self.places, range(0, len(stored) + step, step))
        starts = [i for i, (low, high) in enumerate(itertools.pairwise(edges)) if low < high]

        def read(i: int) -> tuple[np.ndarray, slice]:
            here = slice(int(edges[i]), int(edges[i + 1]))
            block = stored[i * step : (i + 1) * step]
            if here.stop - here.start < len(block):
                block = block[self.places[here] - i * step]
            return block.astype("float32", copy=False), here

        with concurrent.futures.ThreadPoolExecutor(1, "keras_probes_reader") as pool:
            ahead = [pool.submit(read, i) for i in starts[:1]]
            for i in [*starts[1:], None]:
                block = ahead.pop().result()
                if i is not None:
                    ahead.append(pool.submit(read, i))
                yield block


def _splits(
    store: FeatureStore,
    validation: FeatureStore | float | None,
    test: FeatureStore | float | None,
    seed: int,
) -> dict[Split, _Rows]:
    store.check_complete()
    each = store.rows_per_example
    # Rows of one example stay together: they tell of each other.
    examples = np.random.default_rng(seed).permutation(len(store) // each)
    order = (examples[:, None] * each + np.arange(each)).ravel()
    given: tuple[tuple[Split, Any], ...] = (("validation", validation), ("test", test))
    splits: dict[Split, _Rows] = {}
    for name, wanted in given:
        if isinstance(wanted, FeatureStore):
            wanted.check_complete()
            wanted.check_same_features(store)
            splits[name] = _Rows(wanted, np.arange(len(wanted)))
        elif wanted is not None:
            if (
                isinstance(wanted, bool)
                or not isinstance(wanted, (int, float))
                or not 0 < wanted < 1
            ):
                raise ValueError(
                    f"Expected `{name}` to be a feature store, a fraction between 0 and 1, or "
                    f"None. Received: {name}={wanted!r}."
                )
            count = each * max(1, round(wanted * len(store) / each))
            splits[name] = _Rows(store, np.sort(order[:count]))
            order = order[count:]
    if not len(order):
        raise ValueError(
            f"No rows are left to train on. Received: {len(store)} rows, "
            f"validation={validation!r}, test={test!r}."
        )
    return {"train": _Rows(store, np.sort(order)), **splits}


class _Features:
    """One tap's features, standardised by the finite training rows, split by split.

    What fits into memory is read once and held; the rest is read anew at every pass.
    """

    def __init__(self, tap: str, splits: dict[Split, _Rows], memory: int):
        self.tap, self.splits = tap, splits
        # Opened once: that looks for every chunk's file, which is no work for every pass.
        self._stored = {split: rows.store.features(tap) for split, rows in splits.items()}
        self.mean, self.scale = self._statistics()
        self._held: dict[Split, list[tuple[tf.Tensor, slice]]] = {}
        self._checked: set[Split] = set()  # splits whose `finite` is known
        self.finite = {
            split: np.ones(len(rows.places), "float32") for split, rows in splits.items()
        }
        for split, rows in sorted(splits.items(), key=lambda item: len(item[1].places)):
            memory -= 4 * len(rows.places) * len(self.mean)
            if memory >= 0:
                self._held[split] = list(self._read(split))
            else:
                for _ in self._read(split):  # to know which rows are finite
                    pass
        self.remarks = list(self._about_nonfinite())

    def blocks(self, split: Split) -> Iterable[tuple[tf.Tensor, slice]]:
        """Standardised features, float32, and the place of each block among the split's rows."""
        return self._held[split] if split in self._held else self._read(split)

    @property
    def _stride(self) -> int:
        """Of the rows, every so-manieth tells of the spectrum."""
        return max(1, len(self.splits["train"].places) // SPECTRUM_ROWS)

    @functools.cached_property
    def spectrum(self) -> Spectrum | None:
        """In how many directions the training rows vary; `None` of very many features."""
        if len(self.mean) > MOST_FEATURES:
            return None
        moments = np.zeros((len(self.mean), len(self.mean)), "float32")
        for z, _ in self.blocks("train"):
            some = z[:: self._stride]
            moments += tf.matmul(some, some, transpose_a=True).numpy()
        unit = np.divide(1, self.scale, out=np.zeros_like(self.scale), where=self.scale > 0)
        return Spectrum.of_moments(unit[:, None] * moments * unit)

    def rows_of_spectrum(self, target: str | None) -> Iterator[Row]:
        """That as measures, which stand beside those of a target."""
        n = int(self.finite["train"].sum()) // self._stride
        left_out = int(np.sum(self.finite["train"] == 0))
        for metric in SPECTRUM if self.spectrum is not None else ():
            value = float(getattr(self.spectrum, metric))
            yield Row(0, 0, "train", target, self.tap, metric, value, n, nonfinite=left_out)

    def _read(self, split: Split) -> Iterator[tuple[tf.Tensor, slice]]:
        mean, scale = self.mean.astype("float32"), self.scale.astype("float32")
        for block, here in self.splits[split].blocks(self._stored[split]):
            if split not in self._checked:
                self.finite[split][here] = (np.abs(block) <= LARGEST).all(axis=1)
            finite = self.finite[split][here] > 0
            # In place: the block is ours, and copies would cost as much as the reading.
            block -= mean
            block *= scale
            if not finite.all():
                block[~finite] = 0.0
            yield tf.constant(block), here
        self._checked.add(split)

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and inverse spread in float64, merged block by block (Chan et al. 1979)."""
        count, mean, squares = 0, np.zeros(()), np.zeros(())
        low, high = np.inf, -np.inf
        for raw, _ in self.splits["train"].blocks(self._stored["train"]):
            block = raw[(np.abs(raw) <= LARGEST).all(axis=1)].astype("float64")
            if not len(block):
                continue
            total = count + len(block)
            of_block = block.mean(axis=0)
            shift = of_block - mean
            squares = squares + ((block - of_block) ** 2).sum(axis=0)
            squares = squares + shift**2 * (count * len(block) / total)
            mean, count = mean + shift * (len(block) / total), total
            low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
        if not count:
            raise ValueError(
                f"Tap {self.tap!r} has no training row with finite features. Leave it out of "
                "taps=, or find out where the host computes NaN or infinite values."
            )
        reach = np.maximum(high - mean, mean - low)
        # A spread that is no more than the rounding of float32 features is none.
        scale = inverse_spread(mean, squares / count, reach, rounding=3e-7)
        return mean, scale.numpy()

    def _about_nonfinite(self) -> Iterator[str]:
        for split, finite in self.finite.items():
            rows = self.splits[split].places[finite == 0]
            if len(rows):
                shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
                yield (
                    f"Tap {self.tap!r} has NaN or infinite features in {len(rows)} {split} rows: "
                    f"{shown}. They are left out and counted as nonfinite. If they were stored as "
                    "float16, values past 65,504 are infinite: extract as float32 or bfloat16."
                )


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The training examples of one tap and target, as the solver reads them."""

    features: _Features
    labels: np.ndarray
    weights: np.ndarray

    def __iter__(self) -> Iterator[Block]:
        for z, here in self.features.blocks("train"):
            labels = tf.constant(self.labels[here])
            yield z[None], labels, tf.constant(self.weights[None, here], tf.float32)


class _TapFit:
    """The probe of one tap and target: its penalty, its fit and its measures."""

    def __init__(
        self,
        features: _Features,
        target: str | None,
        job: _Job,
    ):
        self._together = job.store.rows_per_example
        task = job.store.targets[target]
        task = task.of_all().measuring(task.measurable)
        self.remarks: list[str] = []
        self._features, self._target = features, target
        raw = {split: rows.labels(target) for split, rows in features.splits.items()}
        self._task, self._labels = task, raw
        if task.scaled:
            scale = task.scale_of(raw["train"])
            self._scale = np.eye(2, 1)[::-1] * np.ones(task.outputs) if scale is None else scale
            self._task = task.in_units(self._scale)
            self._labels = {
                split: task.standardised(labels, self._scale).astype("float32")
                for split, labels in raw.items()
            }
        self._weights = {split: rows.weights(target) for split, rows in features.splits.items()}
        self._host = {
            split: self._host_error(rows.predictions(target), raw[split])
            for split, rows in features.splits.items()
        }
        self._tallies = {
            split: self._task.tally_of(labels) for split, labels in self._labels.items()
        }
        # Of each example, NaN where it does not count, as last measured.
        self.errors: dict[Split, np.ndarray] = {
            split: np.full(len(labels), np.nan, "float32") for split, labels in raw.items()
        }
        # Which examples have a label: float32, 0 or 1.
        self._labelled = {
            split: (self._task.state(tf.constant(labels)).numpy() == 0).astype("float32")
            for split, labels in self._labels.items()
        }
        weights = self._weights["train"] * features.finite["train"]
        weights = weights * self._labelled["train"]
        self._check_labels(self._task.tally_of(self._labels["train"][weights > 0]))
        blocks = _Blocks(features, self._labels["train"], weights)
        problem = Problem(blocks, len(features.mean), self._task)
        self._fit = self._solve(problem, job)
        self._sums = {
            split: self._measured(split, self._fit.weights[0]) for split in features.splits
        }
        if not self._fit.converged[0]:
            self.remarks.append(self._about_distance(job.tol))

    def _solve(self, problem: Problem, job: _Job) -> Fit:
        row, chosen, start = np.array(job.penalties), np.zeros(1, int), None
        if len(row) > 1:
            # From the strongest on: past the lowest loss it only rises, and fits take ever longer.
            chosen, start = choose_penalty(
                [(problem, self._validation_loss)],
                row,
                chosen,
                tol=max(job.tol, PATH_TOL),
                max_passes=job.max_passes,
                patience=2,
                both=False,
            )
        return minimise(problem, row[chosen], start=start, tol=job.tol, max_passes=job.max_passes)

    def _validation_loss(self, weights: np.ndarray) -> np.ndarray:
        return np.array([self._task.measure("loss", self._measured("validation", weights[0]))])

    def _measured(self, split: Split, weights: np.ndarray) -> dict[str, float]:
        """The sums of W over b on a split; keeps the error of each of its examples."""
        kernel, bias = tf.constant(weights[:-1], tf.float32), tf.constant(weights[-1], tf.float32)
        totals = np.zeros(self._task.size)
        errors = self.errors[split]
        labelled = self._labelled[split]
        for z, here in self._features.blocks(split):
            outputs = (tf.matmul(z, kernel) + bias)[None]
            labels = tf.constant(self._labels[split][here])
            of_rows = tf.constant(self._weights[split][here])
            finite = tf.constant(self._features.finite[split][here])[None]
            sums, of_each = self._task.batch_sums(outputs, labels, of_rows, finite)
            totals += sums.numpy()[0]
            counts = labelled[here] * finite.numpy()[0] > 0
            errors[here] = np.where(counts, of_each.numpy()[0], np.nan)
        return self._task.named(totals)

    def details(self) -> dict[Split, dict[str, np.ndarray]]:
        """What was counted by class or label, by split and name; nothing where nothing was."""
        names = self._task.details
        found: dict[Split, dict[str, Any]] = {
            split: {name: sums[name] for name in names if name in sums}
            for split, sums in self._sums.items()
        }
        return {split: counts for split, counts in found.items() if counts}

    def probe(self) -> Probe:
        """The probe on raw features."""
        weights = self._fit.weights[0]
        kernel = self._features.scale[:, None] * weights[:-1]
        bias = weights[-1] - self._features.mean @ kernel
        if self._task.scaled:
            centre, spread = self._scale
            kernel, bias = kernel * spread, bias * spread + centre
        return Probe(kernel.astype("float32"), bias.astype("float32"), self._task.activation)

    def rows(self) -> list[Row]:
        """All measures."""
        fit = {
            "l2": float(self._fit.l2[0]),
            "iterations": int(self._fit.steps[0]),
            "objective": float(self._fit.objective[0]),
            "gradient_norm": float(self._fit.gradient_norm[0]),
            "converged": float(self._fit.converged[0]),
        }
        rows = []
        task = self._task
        for split, sums in self._sums.items():
            of_split = {metric: task.measure(metric, sums) for metric in task.measurable}
            for metric, value in {**of_split, **(fit if split == "train" else {})}.items():
                majority, chance, low, high = (math.nan,) * 4
                if metric in of_split:
                    tallies = self._tallies["train"], self._tallies[split]
                    majority, chance = task.guesses(metric, *tallies)
                    low, high = self._interval(split, metric, value)
                rows.append(
                    Row(
                        epoch=0,
                        step=int(self._fit.steps[0]),
                        split=split,
                        target=self._target,
                        tap=self._features.tap,
                        metric=metric,
                        value=value,
                        n=int(sums["count"]),
                        ci_low=low,
                        ci_high=high,
                        nonfinite=int(sums["nonfinite"]),
                        unlabelled=int(sums["unlabelled"]),
                        certificate=float(self._fit.certificate[0]),
                        majority=majority,
                        chance=chance,
                        host=self._host[split] if metric == "error" else math.nan,
                    )
                )
        return rows

    def _interval(self, split: Split, metric: str, value: float) -> tuple[float, float]:
        """That of the task, or where labels are of positions, by how much examples vary."""
        if self._together == 1:
            return self._task.interval(metric, value, self._sums[split])
        if metric != "error":
            return math.nan, math.nan
        errors = self.errors[split].reshape(-1, self._together).astype("float64")
        of_examples = np.nanmean(errors[np.isfinite(errors).any(axis=1)], axis=1)
        totals = of_examples.sum(), np.sum(of_examples**2)
        return interval_of_mean(value, len(of_examples), *totals)

    def _host_error(self, predicted: np.ndarray | None, labels: np.ndarray) -> float:
        """The host's own error; NaN if its predictions are not known."""
        return math.nan if predicted is None else self._task.host_error(predicted, labels)

    def summary(self) -> str:
        """A line on the probe."""
        errors = [
            f"{split} {self._task.measure('error', sums):.4f}" for split, sums in self._sums.items()
        ]
        name = "" if self._target is None else f" ({self._target})"
        return (
            f"{self._features.tap}{name}: error {', '.join(errors)}; l2 {self._fit.l2[0]:.1e}, "
            f"at most {self._fit.certificate[0]:.0e} above the optimum"
        )

    def _check_labels(self, tally: np.ndarray) -> None:
        rows = f"{len(self._labels['train'])} rows of tap {self._features.tap!r}"
        if reason := self._task.untrainable(tally):
            raise ValueError(f"{reason} in {rows}. Is the data set whole?")
        if lacking := self._task.lacking(tally):
            self.remarks.append(lacking)

    def _about_distance(self, tol: float) -> str:
        return (
            f"The probe of tap {self._features.tap!r} is not proven optimal: its objective may be "
            f"{self._fit.certificate[0]:.1e} above the optimum, more than tol={tol:g}, after "
            f"{self._fit.steps[0]} steps at l2={self._fit.l2[0]:g}. Raise max_iterations or "
            "l2; a tol below 1e-12 is beyond the rounding of float64."
        )
