"""A sign of life where `fit` waits for the probes at the end of an epoch.

In: words. Out: the same behind Keras's progress bar, in a terminal or a notebook, taken away again.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras


@contextlib.contextmanager
def waiting(verbose: Any) -> Iterator[Callable[[str], None]]:
    """Yields a function that shows a text in the place of the last one.

    Args:
        verbose: As `fit` was called with: only `1` and `"auto"` have a bar to write behind.
    """
    shown = ""

    def show(text: str) -> None:
        nonlocal shown
        if verbose in (1, "auto") and keras.config.is_interactive_logging_enabled():
            # As Keras's own bar goes back: it knows nothing of what stands behind it.
            back = "\b" * len(shown)
            sys.stdout.write(back + text.ljust(len(shown)) + "\b" * max(0, len(shown) - len(text)))
            sys.stdout.flush()
            shown = text

    try:
        yield lambda text: show(f" - refitting probes: {text}")
    finally:
        show("")
