"""What workers bring, and what they cost: extraction and fits on Ray against one process.

    TF_NUM_INTRAOP_THREADS=1 OMP_NUM_THREADS=1 python benchmarks/scale.py

With these settings one process has one core, and so has each worker. Rounds take both sides in
turns; the ratio is that of the two sides of a round, and its median over rounds is what to quote.
Seconds are those of a clock, from the call to the finished store or results, with the start of the
workers in them; Ray itself runs already, as on a cluster.
"""

import argparse
import functools
import os
import pathlib
import shutil
import statistics
import tempfile
import time

import keras
import numpy as np
import ray
from hosts import convnet
from moto.server import ThreadedMotoServer
from upath import UPath

from keras_probes import FeatureStore, RayEngine, extract_features, fit_probes

BATCH, CHUNK = 64, 1024


class Images(keras.utils.PyDataset):
    """Noise by number, which costs as much as images, with a record of who has read how much."""

    def __init__(self, count: int, record: str):
        super().__init__()
        self.count, self.record = count, pathlib.Path(record)

    def __len__(self) -> int:
        return -(-self.count // BATCH)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        n = min(BATCH, self.count - index * BATCH)
        x, y = rng.random((n, 28, 28, 1), "float32"), rng.integers(0, 10, n)
        with open(self.record / str(os.getpid()), "a") as file:
            file.write(f"{x.nbytes}\n")
        return x, y


def timed(call, *args, **options) -> tuple[float, object]:
    """Seconds that a call takes, and what it returns."""
    begun = time.perf_counter()
    result = call(*args, **options)
    return time.perf_counter() - begun, result


def quote(name: str, pairs: list[tuple[float, float]], more: str = "") -> None:
    """Prints the median of both sides and of their ratio."""
    one, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    print(
        f"{name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"{one:.1f} s against {other:.1f} s{more}", flush=True,
    )  # fmt: skip


class Bench:
    """Extraction and fits of one host and data, into places that are new each time."""

    def __init__(self, images: int, root: str):
        self.root, self.record = pathlib.Path(root), pathlib.Path(root) / "record"
        self.record.mkdir()
        self.host, self.images = convnet(), Images(images, str(self.record))
        self.places = 0

    def extract(self, engine: RayEngine | None, at: str | None = None, **options) -> FeatureStore:
        """Extracts all features to a new place."""
        self.places += 1
        place = f"{at or self.root}/{self.places}"
        data = options.pop("data", self.images)
        return extract_features(
            self.host, data, place, num_classes=10, verbose=False, engine=engine, **options
        )

    def forget(self) -> None:
        """Makes room for the next."""
        for place in self.root.iterdir():
            if place != self.record:
                shutil.rmtree(place)


def extraction(bench: Bench, rounds: int) -> None:
    """Two workers against one process, and what each of them has read."""
    pairs = []
    for _ in range(rounds):
        alone, _ = timed(bench.extract, None)
        for file in bench.record.iterdir():
            file.unlink()
        shared, _ = timed(bench.extract, RayEngine(2))
        pairs.append((alone, shared))
        bench.forget()
    quote("extraction, one process against two workers", pairs)
    files = bench.record.iterdir()
    read = {int(file.name): sum(map(int, file.read_text().split())) for file in files}
    here = read.pop(os.getpid())
    total = sum(read.values())
    parts = ", ".join(f"{part / total:.2f}" for part in sorted(read.values()))
    print(f"bytes read by workers: {total:,}, parts {parts}; by who starts them: {here:,}")


def digit(x, y, place):
    """The digit, turned."""
    del x
    return (y + place) % 10


def fits(bench: Bench, rounds: int) -> None:
    """Sixteen fits of one process against those of two workers."""
    part = Images(min(bench.images.count, 8 * CHUNK), str(bench.record))
    targets = {f"digit{place}": functools.partial(digit, place=place) for place in range(2)}
    store = bench.extract(None, data=part, target=targets)
    taps = [tap.name for tap in store.taps][-8:]
    options = {"taps": taps, "l2": 1e-3, "validation": None, "verbose": False}
    pairs = []
    for _ in range(rounds):
        alone, _ = timed(fit_probes, store, **options)
        shared, _ = timed(fit_probes, store, engine=RayEngine(2), **options)
        pairs.append((alone, shared))
    bench.forget()
    quote(f"{len(taps) * len(targets)} fits, one process against two workers", pairs)


def overhead(bench: Bench, rounds: int) -> None:
    """A hundred units on one worker against one process, without the start of the worker."""
    units = max(2, bench.images.count // CHUNK * 100 // 60)
    hundred, single = (Images(n * CHUNK, str(bench.record)) for n in (units, 1))
    pairs, starts = [], []
    for _ in range(rounds):
        alone, _ = timed(bench.extract, None, data=hundred)
        first_here, _ = timed(bench.extract, None, data=single)
        first, _ = timed(bench.extract, RayEngine(1), data=single)
        on_engine, _ = timed(bench.extract, RayEngine(1), data=hundred)
        starts.append(first - first_here)
        pairs.append((on_engine - starts[-1], alone))
        bench.forget()
    more = f"; the start of a worker takes {statistics.median(starts):.1f} s"
    quote(f"{units} units, one worker against one process", pairs, more)


def storage(bench: Bench, rounds: int) -> None:
    """A store behind S3's interface against one on this disk."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "any"
    UPath("s3://bucket").fs.mkdir("bucket")
    some = Images(min(bench.images.count, 8 * CHUNK), str(bench.record))
    writes, reads = [], []
    for _ in range(rounds):
        both = [timed(bench.extract, None, at, data=some) for at in ("s3://bucket", None)]
        writes.append(tuple(taken for taken, _ in both))
        read = [timed(np.asarray, store.features("conv1")) for _, store in both]
        reads.append(tuple(taken for taken, _ in read))
        bench.forget()
    quote("extraction, S3's interface against a disk", writes)
    quote("reading a tap, S3's interface against a disk", reads)
    server.stop()


PARTS = {"extraction": extraction, "fits": fits, "overhead": overhead, "storage": storage}


def main() -> None:
    """Prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=60 * CHUNK)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    paths = [os.environ.get("PYTHONPATH", ""), os.path.dirname(os.path.abspath(__file__))]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(args.images, root)
        for part in args.parts:
            PARTS[part](bench, args.rounds)
    ray.shutdown()


if __name__ == "__main__":
    main()
