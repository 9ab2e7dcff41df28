"""TensorBoard: writes each epoch's measures as scalars, and what they look like.

In: a `ProbeResults`. Out: event files, one run for each tap, so that TensorBoard's first page shows
one chart a metric and split, with the curves of all taps in it, in depth order, and that of the
host itself; one run with the table and the pictures of each epoch; and the settings, as HParams.
"""

import html
import io
import itertools
import math
import os
import re
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import pandas as pd
import tensorflow as tf

from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import Row, name_of_measure
from keras_probes.view.graph import graph_of, rendered
from keras_probes.view.plots import plot_depth
from keras_probes.view.table import ONCE, first_metric

_TOGETHER = "all layers"  # the run of what is about all of them
_HOST = "the model itself"
_SETTINGS = ""  # HParams finds the measures in the runs below its own


class TensorBoardWriter:
    """Writes results below a log directory, as `probes/<depth> <tap>` and `probes/all layers`.

    Tags are `probe_<metric>/<split>`, with a named target `probe_<target>_<metric>/<split>`. The
    step is the epoch, as in Keras's own TensorBoard callback; where a further fit begins at an
    epoch that was written before, it goes on from the last. Measures of some batches are
    `probe_<metric>_by_batch/train`, and the number of batches is their step; the table and the
    pictures are `probe_<metric>_by_layer/<what>`. TensorBoard sorts tags, and shows the curves of
    all layers' errors first.

    Args:
        log_dir: The log directory; it may be that of Keras's callback.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike):
        try:
            import tensorboard  # noqa: F401  (TensorFlow writes scalars through it)
        except ImportError as error:
            raise ImportError(
                'log_dir= needs TensorBoard. Install it with: pip install "keras_probes[view]"'
            ) from error
        self._directory = os.path.join(os.fspath(log_dir), "probes")
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._last, self._ahead, self._begun = -1, 0, False
        self._drawn = -1  # the last step with pictures
        self._described = False  # whether the settings are written

    def begin(self) -> None:
        """Says that another fit begins."""
        self._begun = False

    def write(self, results: ProbeResults, epoch: int, split: str | None = None) -> None:
        """Writes all measures of `epoch`, or those of a split, and flushes them to disk.

        Pictures are drawn of the first nine epochs, then of every tenth, from a hundred on of every
        hundredth, and of a split: TensorBoard shows ten of them.
        """
        latest = itertools.takewhile(lambda row: row.epoch == epoch, reversed(results.rows))
        rows = [row for row in reversed(list(latest)) if split in (None, row.split)]
        if not rows:
            return
        rows = list({(_tag(row), row.tap): row for row in rows}.values())  # the latest of each
        if not self._begun:
            self._ahead, self._begun = max(0, self._last + 1 - epoch), True
        self._last = step = epoch + self._ahead
        self._describe(results)
        self._write_scalars(results, rows, step)
        for tag, of_host in {_tag(row): row.host for row in rows}.items():
            if math.isfinite(of_host):
                with self._writer(_HOST).as_default():
                    tf.summary.scalar(tag, of_host, step=step)
        self._write_tables(results, epoch, step)
        if split is not None or (step + 1) % 10 ** (len(str(step + 1)) - 1) == 0:
            self._draw(results, epoch, step)
        for writer in self._writers.values():
            writer.flush()

    def write_batches(self, results: ProbeResults) -> None:
        """Writes measures of some batches, all up to the same step."""
        self._write_scalars(results, results.rows, results.rows[0].step, "_by_batch")

    def end(self, results: ProbeResults, epoch: int) -> None:
        """Draws the pictures of the last epoch, if they are not there, and closes the files."""
        if self._begun and self._drawn != self._last:
            self._draw(results, epoch, self._last)
        self.close()

    def close(self) -> None:
        """Closes the event files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _describe(self, results: ProbeResults) -> None:
        if not self._described and results.settings:
            from tensorboard.plugins.hparams import api

            with self._writer(_SETTINGS).as_default():
                api.hparams(results.settings)
            self._described = True

    def _write_scalars(
        self, results: ProbeResults, rows: Iterable[Row], step: int, suffix: str = ""
    ) -> None:
        places = {tap.name: place for place, tap in enumerate(results.taps)}
        for row in rows:
            if row.metric in ONCE:
                continue  # it is in the table: there is no curve
            # A slash would make a run of its own depth, and `..` leave the directory.
            run = f"{places[row.tap]:03d} {re.sub(r'[^A-Za-z0-9_.#:-]', '_', row.tap)}"
            with self._writer(run).as_default():
                tf.summary.scalar(_tag(row, suffix), row.value, step=step)

    def _write_tables(self, results: ProbeResults, epoch: int, step: int) -> None:
        """Those of the measure asked for first."""
        with self._writer(_TOGETHER).as_default():
            for target in results.targets:
                metric = first_metric(results, target)
                table = results.table(metric, epoch=epoch, target=target)
                tf.summary.text(f"{_by_layer(metric, target)}/table", _markdown(table), step=step)

    def _draw(self, results: ProbeResults, epoch: int, step: int) -> None:
        """Its errors by depth and the coloured graph, as far as what draws them is installed."""
        self._drawn = step
        if find_spec("matplotlib") is None:
            return
        with self._writer(_TOGETHER).as_default():
            for target in results.targets:
                metric = first_metric(results, target)
                name = _by_layer(metric, target)
                curve = _depth_curve(results, metric=metric, epochs=[epoch], target=target)
                tf.summary.image(f"{name}/depth", _image(curve), step=step)
                if shutil.which("dot") and find_spec("pydot") and results.graph:
                    graph = graph_of(
                        results, condensed=True, metric=metric, epoch=epoch, target=target
                    )
                    tf.summary.image(f"{name}/graph", _image(rendered(graph, "png")), step=step)

    def _writer(self, run: str) -> tf.summary.SummaryWriter:
        if run not in self._writers:
            directory = os.path.join(self._directory, run)
            self._writers[run] = tf.summary.create_file_writer(directory)
        return self._writers[run]


def _tag(row: Row, suffix: str = "") -> str:
    return f"{name_of_measure(row.metric, row.target, row.baseline)}{suffix}/{row.split}"


def _by_layer(metric: str, target: str | None) -> str:
    return f"{name_of_measure(metric, target)}_by_layer"


def _depth_curve(results: ProbeResults, **asked: Any) -> bytes:
    from matplotlib.figure import Figure  # not pyplot: a fit may run where there is no screen

    size = max(5.0, 2.0 + 0.22 * len(results.taps)), 4.2
    figure, png = Figure(figsize=size, layout="constrained"), io.BytesIO()
    plot_depth(results, figure.add_subplot(), **asked)
    figure.savefig(png, dpi=100)
    return png.getvalue()


def _image(png: bytes) -> tf.Tensor:
    return tf.image.decode_png(png, channels=4)[None]


def _markdown(table: pd.DataFrame) -> str:
    """A table as TensorBoard's text takes it; names are escaped, and so are bars."""
    shown = table.reset_index().map(lambda cell: f"{cell:.4g}" if isinstance(cell, float) else cell)
    lines = [list(shown.columns), ["---"] * shown.shape[1], *shown.to_numpy().tolist()]
    return "\n".join(
        "| " + " | ".join(html.escape(str(c)).replace("|", "&#124;") for c in line) + " |"
        for line in lines
    )
