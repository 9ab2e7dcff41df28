"""Linear classifier probes for Keras: what does each layer of a model know?

After Alain & Bengio (2016), "Understanding intermediate layers using linear classifier probes".
"""

from keras_probes.callback import LinearProbeCallback
from keras_probes.engines.on_ray import RayEngine
from keras_probes.examples import Examples, image_folder
from keras_probes.offline.extract import extract_features
from keras_probes.offline.fit import fit_probes
from keras_probes.offline.store import FeatureStore
from keras_probes.results.record import ProbeResults
from keras_probes.taps.reduce import (
    AtPositions,
    Flatten,
    GlobalAverage,
    RandomFeatures,
    SpatialPool,
    Token,
)
from keras_probes.view.diagnose import diagnose
from keras_probes.view.graph import plot_probed_model

__version__ = "0.1.0"

__all__ = [
    "AtPositions",
    "Examples",
    "FeatureStore",
    "Flatten",
    "GlobalAverage",
    "LinearProbeCallback",
    "ProbeResults",
    "RandomFeatures",
    "RayEngine",
    "SpatialPool",
    "Token",
    "diagnose",
    "extract_features",
    "fit_probes",
    "image_folder",
    "plot_probed_model",
]
