"""The record of what probes measured: both drivers fill it, every view reads it.

In: one `Row` a measure. Out: a tidy frame, the probes, files; by way of `view`, all else.
"""

import os
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import keras
import pandas as pd

from keras_probes.results.schema import (
    COLUMNS,
    NUMBERS,
    SPLITS,
    Details,
    Node,
    Pairs,
    Probe,
    Refit,
    Row,
    TapInfo,
)

if TYPE_CHECKING:
    from keras_probes.results.agreement import Agreement
    from keras_probes.results.compare import Comparison
    from keras_probes.view.diagnose import Findings

_Kind = tuple[str | None, str, str | None]  # target, metric, baseline
_Pass = tuple[str | None, str | None, str]  # target, baseline, split


class ProbeResults:
    """What probes measured, for every tap, target, split and epoch.

    Args:
        taps: The taps in graph order.
        rows: Measures to begin with.
        probes: The probes themselves, by target and tap, where they are kept.
        reductions: By tap, the Keras configuration of what makes its features.
        graph: The layers of the host and the taps, in graph order.
        settings: What was asked for, by name, as text, numbers and truth values.
        versions: Of the libraries that measured it.
        refits: How probes that train online were refitted, epoch by epoch.
        pairs: By target, baseline and split: how errors went together in the last evaluation.
        details: Likewise: what it counted by class or by label.
        class_names: Names of the classes, or labels, of a single target, where they are known.
        left_out: By name, why what `layers=` picks otherwise is not probed.
    """

    def __init__(
        self,
        taps: Sequence[TapInfo] = (),
        rows: Iterable[Row] = (),
        *,
        probes: Mapping[tuple[str | None, str], Probe] | None = None,
        reductions: Mapping[str, Any] | None = None,
        graph: Iterable[Node] = (),
        settings: Mapping[str, Any] | None = None,
        versions: Mapping[str, str] | None = None,
        refits: Iterable[Refit] = (),
        left_out: Mapping[str, str] | None = None,
        pairs: Mapping[_Pass, Pairs] | None = None,
        details: Mapping[_Pass, Details] | None = None,
        class_names: Sequence[str] | None = None,
    ):
        self.taps = list(taps)
        self._rows: list[Row] = []
        # The latest row of each tap: by target, metric and baseline, then by split, epoch and step.
        self._passes: dict[_Kind, dict[tuple[str, int, int], dict[str, Row]]] = {}
        self.add(rows)
        self.probes = dict(probes or {})
        self.reductions = dict(reductions or {})
        self.graph = list(graph)
        self.settings = dict(settings or {})
        self.versions = dict(versions or {})
        self.refits = list(refits)
        self.left_out = dict(left_out or {})
        self.pairs = dict(pairs or {})
        self.details = dict(details or {})
        self.class_names = list(class_names) if class_names else None

    def add(self, rows: Iterable[Row]) -> None:
        """Takes further measures into the record."""
        for row in rows:
            self._rows.append(row)
            passes = self._passes.setdefault((row.target, row.metric, row.baseline), {})
            passes.setdefault((row.split, row.epoch, row.step), {})[row.tap] = row

    @property
    def rows(self) -> Sequence[Row]:
        """All measures, in order of time."""
        return self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def frame(self) -> pd.DataFrame:
        """Returns all measures, tidy: one row for each.

        Returns:
            A frame with the columns `epoch`, `step`, `split`, `target`, `baseline` (of what was
            measured beside the probes), `tap`, `depth`, `metric`,
            `value`, `n`, `ci_low` and `ci_high` (95% interval of an error, NaN for a loss),
            `nonfinite` (examples left out since a feature was NaN or infinite), `unlabelled`
            (those left out since their label is missing or is no class), `certificate`
            (nats the probe's training objective may be above its optimum, NaN if not known), and
            `majority` and `chance` (the same measure of who sees no feature, with and without
            knowing the class frequencies), and `host` (that of the host itself, NaN if it is not
            known). In order of time, then depth.
        """
        return self._frame(self.rows)

    def _frame(self, rows: Sequence[Row]) -> pd.DataFrame:
        depths = {tap.name: tap.depth for tap in self.taps}
        records = []
        for row in rows:
            records.append({**vars(row), "depth": depths[row.tap]})
        frame = pd.DataFrame.from_records(records, columns=list(COLUMNS))
        for column in ("target", "baseline"):  # pandas 3 would make NaN of None beside a name
            names = [getattr(row, column) for row in rows]
            frame[column] = pd.Series(names, frame.index, dtype=object)
        return frame.astype(dict.fromkeys(NUMBERS, "float64"))

    def measured(
        self,
        metric: str = "error",
        *,
        split: str | None = None,
        epoch: int | None = None,
        target: str | None = None,
        baseline: str | None = None,
    ) -> pd.DataFrame:
        """Returns what a split's latest measures were, one row a tap in graph order.

        Args:
            metric: Which measure.
            split: `"train"`, `"validation"` or `"test"`; by default the last of these that was
                measured.
            epoch: Which epoch, from 0; by default the split's latest.
            target: Which target; may be left out if there is only one.
            baseline: Which baseline of it, `"initial"` or `"shuffled"`; the probes by default.

        Returns:
            A frame indexed by tap, with the other columns of `frame()`.

        Raises:
            ValueError: There are several targets and none is named, or nothing of this was
                measured.
        """
        if not self.rows:
            raise ValueError(
                "Nothing to show: no epoch of `fit` has ended with these probes in it."
            )
        name = self.resolve_target(target)
        passes = self._passes.get((name, metric, baseline), {})
        found = {of_pass for of_pass, at, _ in passes if epoch in (None, at)}
        wanted = split or next((s for s in reversed(SPLITS) if s in found), None)
        latest = self.latest(metric, name, baseline=baseline, split=wanted, epoch=epoch)
        if not latest:
            of_target = [row for row in self.rows if row.target == name]
            raise ValueError(
                f"Nothing to show for metric={metric!r}, epoch={epoch!r}, target={target!r}"
                + (f", baseline={baseline!r}" if baseline else "")
                + (f", split={split!r}" if split else "")
                + f". Measured: metrics {_known(row.metric for row in of_target)}, epochs "
                f"{_known(row.epoch for row in of_target)}, splits "
                f"{_known(row.split for row in of_target)}."
            )
        taps = [tap.name for tap in self.taps if tap.name in latest]
        return self._frame([latest[tap] for tap in taps]).set_index("tap")

    def latest(
        self,
        metric: str,
        target: str | None,
        *,
        baseline: str | None = None,
        split: str | None = None,
        epoch: int | None = None,
    ) -> dict[str, Row]:
        """Returns the latest row of each tap, by its name; none where nothing was measured.

        Args:
            metric: Which measure.
            target: Which target, by its own name.
            baseline: Which baseline of it; the probes by default.
            split: Which split; any by default.
            epoch: Which epoch, from 0; any by default.
        """
        latest: dict[str, Row] = {}
        passes = self._passes.get((target, metric, baseline), {})
        for (of_split, of_epoch, _), rows in passes.items():
            if split in (None, of_split) and epoch in (None, of_epoch):
                latest |= rows
        return latest

    def history(
        self,
        metric: str = "error",
        *,
        split: str | None = None,
        target: str | None = None,
        baseline: str | None = None,
        by: Literal["epoch", "step"] = "epoch",
    ) -> pd.DataFrame:
        """Returns a measure at every epoch.

        Args:
            metric: Which measure.
            split: Which split; by default the last measured of train, validation and test.
            target: Which target; may be left out if there is only one.
            baseline: Which baseline of it; the probes by default.
            by: `"step"` for what was measured several times in an epoch, as with `every_steps=`.

        Returns:
            A frame with a row a tap, in graph order, and a column an epoch, from 0; or a column for
            each number of batches after which something was measured.

        Raises:
            ValueError: As `measured`.
        """
        latest = self.measured(metric, split=split, target=target, baseline=baseline)
        passes = self._passes[self.resolve_target(target), metric, baseline]
        values: dict[int, dict[str, float]] = defaultdict(dict)
        for (of_split, epoch, step), rows in passes.items():
            if of_split == latest["split"].iloc[0]:
                moment = step if by == "step" else epoch
                values[moment] |= {tap: row.value for tap, row in rows.items()}
        table = pd.DataFrame(values, index=latest.index).sort_index(axis="columns")
        return table.rename_axis(columns=by)

    @property
    def targets(self) -> list[str | None]:
        """The names of the targets; `[None]` of a single, unnamed one."""
        return list(dict.fromkeys(target for target, *_ in self._passes))

    def resolve_target(self, target: str | None) -> str | None:
        """Returns the name of the target that is meant; `None` means the only one.

        Raises:
            ValueError: There are several and none is named, or it is unknown.
        """
        names = self.targets
        if target is None and len(names) > 1:
            raise ValueError(
                f"There are several targets. Name one of {', '.join(map(repr, names))} as target=."
            )
        if target is not None and target not in names:
            raise ValueError(f"Unknown target. Received: target={target!r}. Measured: {names}.")
        return target if target is not None else next(iter(names), None)

    def table(
        self, metric: str = "error", *, epoch: int | None = None, target: str | None = None
    ) -> pd.DataFrame:
        """Returns one row a tap in graph order, as the paper's table 4a.

        Args:
            metric: Which measure to show.
            epoch: Which epoch, from 0; by default each split's latest.
            target: Which target; may be left out if there is only one.

        Returns:
            A frame indexed by tap, with `depth`, `layer`, `shape`, `reduction`, `features`, and
            for each measured split its value and, for an error, `±95%`: half the width of its
            confidence interval. Where a callback had these `baselines=`, `initial` is the measure
            of probes of the model's first weights, and `selectivity` how much worse probes do on
            random labels. `nonfinite` and `unlabelled` are there if examples had to be left out:
            their number in the splits shown. Where it is known, `certificate` is how many nats the
            training objective of the probes may be above its optimum, those of the last split
            shown; `converged` is whether it is known to be within the tolerance. Probes of
            `fit_probes` have their `l2` besides; those of a callback their `code_length`
            (prequential, in bits a label).

        Raises:
            ValueError: There are several targets and none is named, or nothing of this metric,
                epoch or target was measured.
        """
        from keras_probes.view.table import table

        return table(self, metric, epoch=epoch, target=target)

    def compare(
        self, tap: str, other: str, *, split: str | None = None, target: str | None = None
    ) -> "Comparison":
        """Compares the errors of two layers, by a test that knows they saw the same examples.

        Args:
            tap: Name of a tap.
            other: Name of the one to compare it with.
            split: Which split; by default the last measured of train, validation and test.
            target: Which target; may be left out if there is only one.

        Returns:
            How much more the error of `tap` is, with its 95% interval and p-value, by McNemar's
            exact test of classes and a paired t-test of other tasks. Without what pairs need, as of
            training examples and of results that earlier versions saved, both are taken for
            independent: `test` says so.

        Raises:
            ImportError: SciPy is not installed.
            ValueError: An unknown tap, or nothing of this was measured.
        """
        from keras_probes.results.compare import compare

        return compare(self, tap, other, split=split, target=target)

    def compare_with(
        self,
        other: "ProbeResults",
        *,
        metric: str = "error",
        split: str | None = None,
        other_split: str | None = None,
        target: str | None = None,
    ) -> "Agreement":
        """Compares two runs, such as probes that trained online with optimal ones.

        Args:
            other: The results of the other run.
            metric: Which measure.
            split: Which split; by default the last of train, validation and test that each run
                measured.
            other_split: Which split of the other run, if not the same.
            target: Which target of both; may be left out if there is only one.

        Returns:
            Whether layers have the same order in both, by Kendall's tau-b with its 95% interval
            (Fieller, Hartley & Pearson 1957), and a `table` of the two measures of each layer with
            their difference. Layers that only one run measured are left out, and named.

        Raises:
            ImportError: SciPy is not installed.
            ValueError: Fewer than two layers were measured in both runs, there are several targets
                and none is named, or nothing of this was measured.
        """
        from keras_probes.results.agreement import compare_with

        return compare_with(
            self, other, metric=metric, split=split, other_split=other_split, target=target
        )

    def per_class(
        self, tap: str, *, split: str | None = None, target: str | None = None
    ) -> pd.DataFrame:
        """Returns the errors of a layer's probe by class, or by label of several.

        They are those of the last evaluation; of training, `fit_probes` has them.

        Args:
            tap: Tap name.
            split: Which split; by default the last of test, validation and train that has them.
            target: Which target; may be left out if there is only one.

        Returns:
            A frame with a row for each class or label: `n` examples, their `error` (the share that
            the probe gets wrong) with its 95% interval `ci_low` and `ci_high`; and of classes
            `answered`, how many examples are said to be of it, and `iou`, intersection over union.

        Raises:
            ValueError: An unknown tap, or nothing was counted by class.
        """
        from keras_probes.results.by_class import per_class

        return per_class(self, tap, split=split, target=target)

    def confusion(
        self, tap: str, *, split: str | None = None, target: str | None = None
    ) -> pd.DataFrame:
        """Returns the confusion matrix of a layer's probe: examples by class and by answer.

        Args:
            tap: Tap name.
            split: As of `per_class`.
            target: Likewise.

        Returns:
            A frame with a row for each class and a column for each answer.

        Raises:
            ValueError: As `per_class`, or there are too many classes.
        """
        from keras_probes.results.by_class import confusion

        return confusion(self, tap, split=split, target=target)

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draws error against depth, as the paper's figures 3 and 4b.

        Args:
            ax: The matplotlib Axes to draw into; a new one by default.
            **options: `metric`, `split`, `epochs` and `target`, as for `view.plots.plot_depth`,
                which has figures of curves over epochs and of both beside it.

        Returns:
            The Axes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: Nothing of this was measured.
        """
        from keras_probes.view.plots import plot_depth

        return plot_depth(self, ax, **options)

    def diagnose(self, *, target: str | None = None) -> "Findings":
        """Says what is wrong with the host or its probes, with the numbers it rests on.

        Args:
            target: Which target; may be left out if there is only one.

        Returns:
            A list of findings, the worst first, as of `diagnose(results)`.
        """
        from keras_probes.view.diagnose import diagnose

        return diagnose(self, target=target)

    def report(
        self, path: str | os.PathLike, *, metric: str = "error", title: str = ""
    ) -> pathlib.Path:
        """Writes one page with everything: findings, curves, the coloured graph and the table.

        It opens in any browser, offline; a slider shows the graph and the errors of every epoch.

        Args:
            path: Name of the HTML file.
            metric: Which measure.
            title: Of the page; by default it names the model.

        Returns:
            The path.

        Raises:
            ImportError: Plotly or Jinja2 is not installed.
            ValueError: Nothing of this was measured.
        """
        from keras_probes.view.report import write_report

        return write_report(self, path, metric=metric, title=title)

    def probe(self, tap: str, target: str | None = None) -> keras.Model:
        """Returns a tap's probe as a small Keras model.

        Args:
            tap: Tap name.
            target: Name of the target, where they have names.

        Returns:
            A model from reduced features, float32, shape (batch, n_features), to the probe's
            answers, shape (batch, outputs): of classes, their probabilities.

        Raises:
            ValueError: These results hold no such probe.
        """
        probe = self._probe(tap, target)
        inputs = keras.Input((len(probe.kernel),), name="features")
        dense = keras.layers.Dense(
            len(probe.bias),
            activation=probe.activation,
            kernel_initializer="zeros",
            name="probe",
        )
        model = keras.Model(inputs, dense(inputs), name="linear_probe")
        model.set_weights([probe.kernel, probe.bias])
        return model

    def attach(self, model: keras.Model, target: str | None = None) -> keras.Model:
        """Returns a model from the host's raw input to every probe's prediction.

        Args:
            model: The host the probes were fitted to.
            target: Name of the target, where they have names.

        Returns:
            A Keras model from what the host takes to the probes' answers by tap, each of shape
            (batch, outputs): of classes, their probabilities.

        Raises:
            ValueError: These results hold no such probes, or `model` has no such taps.
        """
        from keras_probes.offline.attach import AttachedProbes  # sees taps, which results do not

        probes = {tap.name: self._probe(tap.name, target) for tap in self.taps}
        return AttachedProbes(model, probes, self.reductions)

    def _probe(self, tap: str, target: str | None) -> Probe:
        if (target, tap) not in self.probes:
            held = ", ".join(repr(t) if n is None else f"{t!r} of {n!r}" for n, t in self.probes)
            raise ValueError(
                f"No probe for tap={tap!r}, target={target!r}. "
                + (f"These results hold probes for {held}." if held else "These results hold no "
                   "probes: those of fit_probes do; a callback has probe_model and weights().")
            )  # fmt: skip
        return self.probes[target, tap]

    def __str__(self) -> str:
        """The tables, as text."""
        from keras_probes.view.table import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        """The tables, as notebooks show them."""
        from keras_probes.view.table import as_html

        return as_html(self)

    def __repr__(self) -> str:
        epochs = len({row.epoch for row in self.rows})
        return f"<ProbeResults: {len(self.taps)} taps, {epochs} epochs, {len(self)} measures>"

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the record into a directory.

        `probes.json` names the files beside it: the measures as CSV and, where there are any, the
        probes as NumPy's npz. It is put in place last and at once, so that a save that is
        interrupted leaves an earlier one whole.

        Args:
            directory: Made if it is not there.
        """
        from keras_probes.results.files import save

        save(self, directory)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "ProbeResults":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: There is no saved record in the directory.
            ValueError: The files are damaged, or of a format this version does not know.
        """
        from keras_probes.results.files import load

        return load(directory)


def _known(values: Iterable[Any]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))
