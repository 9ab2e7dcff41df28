"""Extraction and fits on a Ray cluster: two nodes of it, here on this machine.

    python examples/cluster.py

A convnet is trained on digits, workers on both nodes extract its features, and one of the nodes is
lost while they do. What comes out is what one process makes, byte for byte. On a cluster of
machines, `ray.init(address="auto")` takes the place of `Cluster`.
"""

import filecmp
import pathlib
import threading
import time

import keras
import ray
from images import load_images
from options import options
from ray.cluster_utils import Cluster

from keras_probes import Examples, RayEngine, extract_features, fit_probes


def build_host(shape: tuple[int, ...]) -> keras.Model:
    """A small convnet."""
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(16, 3, activation="relu", name="conv1"),
            keras.layers.Conv2D(32, 3, 2, activation="relu", name="conv2"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(64, activation="relu", name="dense"),
            keras.layers.Dense(10, name="logits"),
        ]
    )


def lose(cluster: Cluster, node: object, store: pathlib.Path) -> None:
    """Kills a node as soon as a chunk is there."""
    while not list(store.glob("labels/c/*")):
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)
    print("A node is lost.")


def main() -> None:
    """Prints the errors, and whether all is as one process makes it."""
    args = options(
        __doc__.splitlines()[0], "cluster_out", epochs=1, quick="600 images"
    ).parse_args()
    (x, y), _ = load_images(args.data, args.seed, 2000 if args.quick else None)
    y = y.astype("int32")
    host = build_host(x.shape[1:])
    host.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    host.fit(x, y, epochs=args.epochs, verbose=2)

    examples = Examples(list(zip(x, y, strict=True)), batch_size=50)
    asked = {"layers": ["conv1", "conv2", "dense"], "num_classes": 10}
    alone = extract_features(host, examples, args.out / "alone", **asked)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address)
    loss = threading.Thread(target=lose, args=(cluster, node, args.out / "shared"), daemon=True)
    loss.start()
    store = extract_features(
        host, examples, args.out / "shared", **asked, engine=RayEngine(workers=2)
    )
    loss.join()
    results = fit_probes(store, engine=RayEngine(workers=1))
    ray.shutdown()
    cluster.shutdown()
    results.save(args.out)

    files = [file.relative_to(alone.path) for file in alone.path.rglob("*") if file.is_file()]
    _, other, missing = filecmp.cmpfiles(alone.path, store.path, files, shallow=False)
    same = results.frame().equals(fit_probes(alone, verbose=False).frame())
    print(f"{len(files)} files; other than those of one process: {len(other + missing)}")
    print(f"Measures are those of one process: {same}")
    print(results)


if __name__ == "__main__":
    main()
