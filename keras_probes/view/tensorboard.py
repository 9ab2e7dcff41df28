"""TensorBoard: writes each epoch's measures as scalars.

In: a `ProbeResults`. Out: event files, one run for each tap, so that TensorBoard's first page shows
one chart a metric and split, with the curves of all taps in it, in depth order.
"""

import os
import re

import tensorflow as tf

from keras_probes.results import ProbeResults


class TensorBoardWriter:
    """Writes results below a log directory, as `probes/<depth> <tap>`.

    Tags are `probe_<metric>/<split>`, with a named target `probe_<target>_<metric>/<split>`; the
    step is the epoch, as in Keras's own TensorBoard callback.

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

    def write(self, results: ProbeResults, epoch: int) -> None:
        """Writes all measures of `epoch` and flushes them to disk."""
        rows = [row for row in results.rows if row.epoch == epoch]
        places = {tap.name: place for place, tap in enumerate(results.taps)}
        for row in rows:
            prefix = "probe" if row.target is None else f"probe_{row.target}"
            with self._writer(row.tap, places[row.tap]).as_default():
                tf.summary.scalar(f"{prefix}_{row.metric}/{row.split}", row.value, step=epoch)
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Closes the event files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, tap: str, place: int) -> tf.summary.SummaryWriter:
        if tap not in self._writers:
            # A slash would make a run of its own depth, and `..` leave the directory.
            name = f"{place:03d} {re.sub(r'[^A-Za-z0-9_.#:-]', '_', tap)}"
            self._writers[tap] = tf.summary.create_file_writer(os.path.join(self._directory, name))
        return self._writers[tap]
