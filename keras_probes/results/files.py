"""Results on disk: one JSON file that names the others, all written whole or not at all.

In: a `ProbeResults`. Out: a directory with `probes.json`, the measures as CSV and the probes as
npz, and back again. There is no pickle in it.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import (
    BASELINES,
    NUMBERS,
    Details,
    Node,
    Pairs,
    Probe,
    Refit,
    Row,
    TapInfo,
    wilson_interval,
)
from keras_probes.storage import location, make_directory, replacing

_MANIFEST = "probes.json"
_FORMAT = 1
_ROW = tuple(field.name for field in dataclasses.fields(Row))


def save(results: ProbeResults, directory: str | os.PathLike) -> None:
    """As `ProbeResults.save` says."""
    there = location(directory)
    make_directory(there)
    rows = pd.DataFrame([dataclasses.asdict(row) for row in results.rows], columns=list(_ROW))
    contents = {"measures": (rows.to_csv(index=False).encode(), "csv")}
    if results.probes:
        arrays: dict[str, Any] = {}
        for place, probe in enumerate(results.probes.values()):
            arrays[f"kernel_{place}"], arrays[f"bias_{place}"] = probe.kernel, probe.bias
        npz = io.BytesIO()
        np.savez(npz, **arrays)
        contents["probes"] = (npz.getvalue(), "npz")
    if results.pairs:
        npz = io.BytesIO()
        np.savez_compressed(npz, *(pairs.moments for pairs in results.pairs.values()))
        contents["pairs"] = (npz.getvalue(), "npz")
    if results.details:
        contents["details"] = (_npz_of(results.details), "npz")
    files = {}
    for name, (content, ending) in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        files[name] = {"name": f"{name}-{digest[:16]}.{ending}", "sha256": digest}
        with replacing(there / files[name]["name"]) as file:
            file.write(content)
    manifest = {
        "format": _FORMAT,
        "files": files,
        "taps": [dataclasses.asdict(tap) for tap in results.taps],
        "probes": [
            {"target": target, "tap": tap, "activation": probe.activation}
            for (target, tap), probe in results.probes.items()
        ],
        "reductions": results.reductions,
        "graph": [dataclasses.asdict(node) for node in results.graph],
        "settings": results.settings,
        "versions": results.versions,
        "refits": [dataclasses.asdict(refit) for refit in results.refits],
        "left_out": results.left_out,
        "pairs": [
            {"key": key, "epoch": pairs.epoch, "taps": pairs.taps}
            for key, pairs in results.pairs.items()
        ],
        "details": [
            {"key": key, "epoch": of.epoch, "taps": list(of.counts)}
            for key, of in results.details.items()
        ],
        "class_names": results.class_names,
    }
    with replacing(there / _MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode())
    kept = {file["name"] for file in files.values()}
    stale_ones = (
        there.glob(f"{name}-*")
        for name in contents.keys() | {"measures", "probes", "pairs", "details"}
    )
    for stale in itertools.chain(*stale_ones):
        if stale.name not in kept:
            stale.unlink()


def load(directory: str | os.PathLike) -> ProbeResults:
    """As `ProbeResults.load` says."""
    there = location(directory)
    try:
        manifest = json.loads((there / _MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != _FORMAT:
            raise ValueError(
                f"Expected results of format {_FORMAT}. Received: format "
                f"{manifest.get('format')!r} in {str(directory)!r}. Load them with the version "
                "of keras_probes that wrote them."
            )
        contents = {
            name: _read_whole(there / file["name"], file["sha256"])
            for name, file in manifest["files"].items()
        }
        probes = {}
        if "probes" in contents:
            arrays = np.load(io.BytesIO(contents["probes"]), allow_pickle=False)
            for place, key in enumerate(manifest["probes"]):
                probe = Probe(
                    arrays[f"kernel_{place}"],
                    arrays[f"bias_{place}"],
                    key.get("activation", "softmax"),
                )
                probes[key["target"], key["tap"]] = probe
        return ProbeResults(
            [TapInfo.from_json(tap) for tap in manifest["taps"]],
            _rows(contents["measures"], manifest["settings"]),
            probes=probes,
            reductions=manifest["reductions"],
            graph=map(Node.from_json, manifest["graph"]),
            settings=manifest["settings"],
            versions=manifest["versions"],
            refits=[Refit(**refit) for refit in manifest.get("refits", ())],
            left_out=manifest.get("left_out"),
            pairs=_pairs(manifest, contents),
            details=_details(manifest, contents),
            class_names=manifest.get("class_names"),
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Expected a directory that ProbeResults.save wrote, with {_MANIFEST} and the "
            f"files it names. Received: {str(directory)!r}; missing: {error.filename!r}."
        ) from error
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{there / _MANIFEST} is damaged: {error!r}.") from error


def _pairs(
    manifest: dict[str, Any], contents: dict[str, bytes]
) -> dict[tuple[str | None, str | None, str], Pairs]:
    if "pairs" not in contents:
        return {}
    arrays = np.load(io.BytesIO(contents["pairs"]), allow_pickle=False)
    return {
        tuple(of["key"]): Pairs(of["epoch"], tuple(of["taps"]), arrays[f"arr_{place}"])
        for place, of in enumerate(manifest["pairs"])
    }


def _npz_of(details: Mapping[Any, Details]) -> bytes:
    """Counts by place of the pass, place of the tap, and name."""
    npz = io.BytesIO()
    arrays: dict[str, Any] = {
        f"{place}/{of_tap}/{name}": array
        for place, of in enumerate(details.values())
        for of_tap, counts in enumerate(of.counts.values())
        for name, array in counts.items()
    }
    np.savez_compressed(npz, **arrays)
    return npz.getvalue()


def _details(
    manifest: dict[str, Any], contents: dict[str, bytes]
) -> dict[tuple[str | None, str | None, str], Details]:
    if "details" not in contents:
        return {}
    arrays = np.load(io.BytesIO(contents["details"]), allow_pickle=False)
    found: dict[int, dict[str, dict[str, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    for key in arrays.files:
        place, of_tap, name = key.split("/")
        tap = manifest["details"][int(place)]["taps"][int(of_tap)]
        found[int(place)][tap][name] = arrays[key]
    return {
        tuple(of["key"]): Details(of["epoch"], found[place])
        for place, of in enumerate(manifest["details"])
    }


def _rows(csv: bytes, settings: dict[str, Any]) -> list[Row]:
    frame = pd.read_csv(
        io.BytesIO(csv),
        dtype=dict.fromkeys(("target", "baseline", "tap", "split", "metric"), str),
        float_precision="round_trip",  # pandas 2's own parser loses the last digits
        keep_default_na=False,
        na_values={column: [""] for column in NUMBERS},
    )
    if "baseline" not in frame:
        frame = _of_today(frame, settings)
    records: list[dict[str, Any]] = frame.to_dict("records")  # type: ignore[assignment]
    names = ("target", "baseline")
    return [Row(**record | {name: record[name] or None for name in names}) for record in records]


def _of_today(frame: pd.DataFrame, settings: dict[str, Any]) -> pd.DataFrame:
    """Measures as they are saved now, of those saved when baselines were targets by another name.

    At that time all were of classification.
    """
    asked = [name for name in BASELINES if name in str(settings.get("baselines", ""))]
    parts = frame["target"].str.extract(f"^(.*?)_?({'|'.join(asked) or '(?!)'})$")
    frame["baseline"] = parts[1].fillna("")
    frame["target"] = parts[0].fillna(frame["target"])
    intervals = [
        wilson_interval(value, n) if metric in ("error", "top5_error") else (math.nan, math.nan)
        for metric, value, n in zip(frame["metric"], frame["value"], frame["n"], strict=True)
    ]
    frame[["ci_low", "ci_high"]] = np.reshape(intervals, (-1, 2))
    return frame


def _read_whole(path: Any, digest: str) -> bytes:
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(
            f"{path} is damaged: its checksum is not the one in {_MANIFEST}. Save the results "
            "again."
        )
    return content
