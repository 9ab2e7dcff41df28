"""What the examples that train a network end in."""

import pathlib
from typing import Any

from keras_probes import ProbeResults


def write(results: ProbeResults, out: pathlib.Path, **figure: Any) -> None:
    """Prints the findings, and writes results, figure and report.

    Args:
        results: What the probes measured.
        out: The directory.
        **figure: Options of the figure, as `ProbeResults.plot` takes them.
    """
    print(f"\n{results.diagnose()}")
    results.save(out)
    results.plot(**figure).figure.savefig(out / "errors.png", dpi=150)
    results.report(out / "probes.html")
