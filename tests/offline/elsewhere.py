"""Hosts and data that workers make or read; they are imported there."""

import itertools
import os
import pathlib
import signal

import keras
import numpy as np
from hosts import dense_net

ROWS, BATCH = 2130, 50  # two chunks of 1,050 rows and one of 30


def arrays(rows=ROWS):
    rng = np.random.default_rng(0)
    return rng.random((rows, 8, 8, 1), "float32"), rng.integers(0, 10, rows)


class Batches(keras.utils.PyDataset):
    """Batches by number, which say who has read them."""

    def __init__(self, marks=None, sizes=None, bad=None, killer=None):
        super().__init__()
        self.marks, self.bad, self.killer = marks, bad, killer
        self.edges = np.cumsum([0, *(sizes or [BATCH] * (ROWS // BATCH) + [ROWS % BATCH])])

    def __len__(self):
        return len(self.edges) - 1

    def __getitem__(self, i):
        if self.marks is not None:
            with open(pathlib.Path(self.marks) / str(os.getpid()), "a") as file:
                file.write(f"{i}\n")
        if i == self.bad:
            raise OSError(f"batch {i} is not readable")
        if i == self.killer and not (mark := pathlib.Path(self.marks) / "killed").exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = arrays()
        here = slice(self.edges[i], self.edges[i + 1])
        return x[here], y[here]


def in_order():
    x, y = arrays()
    for at in range(0, ROWS, BATCH):
        yield x[at : at + BATCH], y[at : at + BATCH]


class Host(keras.Model):
    """A host whose file no worker can make a model of."""

    def __init__(self):
        super().__init__(name="host")
        self.hidden = keras.layers.Dense(5, name="dense", kernel_initializer="ones")
        self.out = keras.layers.Dense(10, name="out", kernel_initializer="ones")

    def call(self, x):
        return self.out(self.hidden(keras.ops.reshape(x, (-1, 64))))


class Fileless(Host):
    """A host that has no file."""

    def save(self, path):
        raise NotImplementedError("not to a file")


def unloadable():
    model = Host()
    model(np.zeros((1, 8, 8, 1), "float32"))
    return model


def fileless():
    model = Fileless()
    model(np.zeros((1, 8, 8, 1), "float32"))
    return model


_seeds = itertools.count()


def another_each_time():
    return dense_net(seed=next(_seeds))
