"""Functions that workers call in tests; they are imported there."""

import os
import pathlib
import signal
import time


def double(number):
    return os.getpid(), 2 * number


def slow(number):
    time.sleep(0.2)
    return number


def mark(number, marks):
    """Says when it begins and ends."""
    (pathlib.Path(marks) / f"{number}.begun").touch()
    time.sleep(0.3)
    (pathlib.Path(marks) / f"{number}.ended").touch()


def fail(number, marks):
    """Fails on number 3 until it has been tried as often as there are marks to be made."""
    place = pathlib.Path(marks) / str(number)
    tries = len(list(place.parent.glob(f"{number}-*")))
    (place.parent / f"{number}-{tries}").touch()
    if number == 3:
        raise ValueError("number 3")
    return number


def die_once(number, marks):
    """Number 3 kills its worker the first time."""
    mark = pathlib.Path(marks) / "killed"
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number
