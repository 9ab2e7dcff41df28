"""`LinearProbeCallback`, the online driver: schedules probes that train beside a host in `fit`.

In: a host, and what Keras calls back. Out: logs, `ProbeResults`, event files. Where to look is
decided in `taps`, what is measured in `probes`; the probes of one host are `HostProbes`.
"""

import copy
import dataclasses
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from keras_probes.capture.joint import Joint
from keras_probes.capture.keras_run import calling_lists, quiet_progress_bar
from keras_probes.capture.steps import Kind
from keras_probes.offline.extract import extract_features
from keras_probes.offline.fit import fit_probes
from keras_probes.offline.store import FeatureStore
from keras_probes.online.checkpoint import Backups, Checkpoint
from keras_probes.online.labelled import check_sets
from keras_probes.online.measured import rows_of, rows_of_batches
from keras_probes.online.own_data import OwnDataProbes
from keras_probes.online.probes import HostProbes, Passes, mebibytes
from keras_probes.online.riding import RidingProbes
from keras_probes.online.settings import Settings, names_of_targets
from keras_probes.online.waiting import waiting
from keras_probes.probes.probe_set import Sums
from keras_probes.probes.resolve import POSITIONS, named_targets
from keras_probes.probes.spectrum import SPECTRUM
from keras_probes.probes.tasks import METRICS, TASKS
from keras_probes.results.record import ProbeResults
from keras_probes.results.schema import (
    BASELINES,
    Details,
    Pairs,
    Row,
    name_of_baseline,
    name_of_measure,
    versions,
)
from keras_probes.taps.batches import batches_of
from keras_probes.taps.reduce import Reduce
from keras_probes.taps.select import Selector, nearest
from keras_probes.view.table import as_bars, left_out_text
from keras_probes.view.tensorboard import TensorBoardWriter

_UNSUPPORTED = (
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.ParameterServerStrategy,
    tf.distribute.TPUStrategy,
    tf.distribute.experimental.CentralStorageStrategy,
)


class LinearProbeCallback(keras.callbacks.Callback):
    """Trains a linear classifier probe at every chosen layer while the model trains.

    A probe is `softmax(W h + b)` on the features `h` of one layer (Alain & Bengio 2016, section
    3.2). It never influences the model; its error says how linearly separable the classes are at
    that depth. Probes train batch by batch, on the activations that the model computed for it.

    ```python
    probes = LinearProbeCallback()
    history = model.fit(x, y, validation_data=(x_val, y_val), callbacks=[probes])
    history.history["val_probe_error/conv1"]   # {val_}probe_{metric}/{tap}
    print(probes.results.table())
    ```

    Args:
        layers: Where to look. `"auto"`: the input and the layers that every path through the model
            runs through. `"all"`: the input and every layer. Or a tap's name (`"conv1"`,
            `"outer/inner"`, `"conv1:preactivation"`, `"dense#0"`, `"lstm[1]"`, `"input"`), a glob
            (`"*_add"`), a layer class, a layer, a predicate of a layer, or a list of these, in
            which a name or glob after `!` is left out: `["auto", "!input"]`.
        reduce: How features are made of a layer's output (section 3.4). `"auto"`: averages over the
            steps of a sequence and over sizes that differ from batch to batch; else all features up
            to 1,000, or a fixed random 1,000; `"gap"`: global average pooling; `"random"`;
            `"flatten"`; a Keras layer such as `RandomFeatures(500)`; or a mapping from globs over
            tap names to these.
        target: What the probes predict (section 3.6). `None`: the model's own labels; a key or
            index into `y`; a function (x, y) -> labels of TensorFlow operations; or a mapping from
            names to these, for several targets at once. Labels are integers, shape (batch,) or
            (batch, 1), or one-hot, shape (batch, classes). A number below 0, NaN, a row of zeros
            and the `ignore_class` of the model's loss stand for a missing label.
        task: What kind of labels these are: `"classification"`: one class for each example;
            `"multilabel"`: 0 or 1 for each of several labels, shape (batch, labels);
            `"regression"`: numbers, shape (batch,) or (batch, numbers); `"positions"`: a class at
            each position, shape (batch, steps) or (batch, height, width). Or a mapping from target
            names to these. Inferred from the labels, the model's output and its loss; labels of the
            positions of an output may be of any task. Of an example up to 64 positions are used,
            drawn by seed; of a layer on a coarser grid, the cell that each falls into.
        num_classes: Number of classes, or a mapping from target names to it. Inferred where labels
            are one-hot or arrays, and where the model's loss is a cross-entropy over an output.
        sample_weight: A function (x, y, sample_weight) -> weights of the examples, shape (batch,),
            for the probes. By default those the model gets, if they are of that shape. An example
            of weight 0 is left out.
        optimizer: Keras optimizer for the probes; a copy is used. By default Adam. That and one
            given by its name have a learning rate of 0.15, on features of length 1.
        metrics: What to report. Of every task `"error"` (the share of examples, or of answers,
            that are wrong; of numbers the share of variance unexplained, 1 - R²) and `"loss"`
            (cross-entropy in nats; of numbers half the squared error of standardised labels). Of
            classes also `"top5_error"`, `"balanced_error"` (mean over classes), `"mean_iou"`, and
            of two classes `"auroc"`; of several labels `"mean_average_precision"` and `"auroc"`; of
            numbers `"mse"` and `"mae"`, in the labels' own units. A target reports those that its
            task has. Of the features themselves `"rank"`, the effective rank, and `"directions"`,
            the number of directions that hold 99% of the variance, of the examples that probes are
            refitted on. They are in the table in any case, of a fit that comes to its last epoch.
        mode: `"shared"`: probes read the model's own forward pass, at almost no cost, and the
            model trains as without them up to rounding. `"isolated"`: they run a second forward
            pass, at inference, and the model trains bit for bit as without them.
        every: Probes train on every k-th batch, and cost nothing on the others; with
            `steps_per_execution`, on those of every k-th execution. `"auto"`: on as many, from
            every batch to every eighth, as cost about a twentieth of the model's own training.
        baselines: What to measure beside the probes. `"shuffled"`: probes of the same layers on
            random labels, the same for an example whenever it is seen, in logs as `shuffled`
            (or `<target>_shuffled`). How much worse they do is the table's `selectivity`; what they
            get right in training, a probe knows by heart. It doubles what probes cost. Where data
            are augmented at random before the model, an example is a new one each time and nothing
            can be known by heart. `"initial"`: probes of the same layers with the weights the model
            has when they are built, in logs as `initial` (or `<target>_initial`): what the
            architecture gives away before it has learned anything. It costs a second forward pass,
            and a copy of the model's weights.
        log_dir: Directory for TensorBoard event files; `None` writes none.
        update_freq: When they get measures of training: `"epoch"`, or a number of batches, after
            which they get those of these batches besides, as with `keras.callbacks.TensorBoard`.
        backup_dir: Directory in which the probes are kept epoch by epoch while `fit` runs, as
            `keras.callbacks.BackupAndRestore` keeps the model: pass both callbacks, and a run that
            was killed goes on where it was. `None` keeps nothing.
        seed: Seed of the random feature subsets, and of the examples that probes are refitted on.
        refit: What the refit at the end of each epoch may cost, as a share of the epoch itself,
            counted in multiplications; a short epoch may always spend those of two CPU seconds. It
            takes every probe to its optimum on a sample of the epoch's examples, as near as that
            allows; 0 leaves the probes as they trained.
        model: The network to probe, where that is one within the model that is trained, or a
            function of the latter that returns it: `lambda m: m.encoder`. Of a model without a
            `call`, the network in one of its attributes is meant where `layers` begin with its
            name (`"encoder/*"`), or where it alone takes x.
        unpack: What of a batch the probes see, where the model's own step takes it apart in its own
            way: an index, or a function of the batch, to (x, y) or (x, y, sample_weight). For
            zipped (unlabelled, labelled) data: 1.
        data: Labelled data of the probes' own, for a model whose training has no labels, or others:
            (x, y) or (x, y, sample_weight) of arrays, a `tf.data.Dataset`, a `PyDataset` or
            whatever else `extract_features` takes; or a mapping from names to these, for several
            sets at once, whose names are those of their targets. After an epoch the model is run
            over them at inference, each probe is fitted to its optimum, from where it was, and
            measured. The model's own steps are left alone, bit for bit. `target`, `task`,
            `num_classes` and `sample_weight` are about these data; `mode`, `every`, `optimizer`,
            `refit`, `unpack` and `update_freq` have no meaning here.
        validation_data: What these probes are tested on, likewise; their measures are `val_` keys.
        every_epochs: With `data`: measure after every k-th epoch, and after the last.
        every_steps: With `data`: measure after every k-th batch besides, for runs of few long
            epochs. `results.history(by="step")` shows it, and TensorBoard; logs and the table have
            the latest of each epoch.

    Attributes:
        features_limit: Bytes that the features of `data` may take in memory, 1 GiB unless set
            otherwise. Beyond, they lie in temporary files, and those of a layer at a time are read.
        memory_limit: Bytes that all probes together may take, 2 GiB unless set otherwise. The
            sample of the refit takes up to 512 MiB besides, `baselines=["initial"]` a copy of the
            model's weights.

    Raises:
        ValueError: An argument is not one of its choices. What depends on the model or the data
            is checked when `fit` begins, before the first step.
    """

    features_limit = 2**30
    memory_limit = 2 * 2**30

    def __init__(
        self,
        layers: Selector = "auto",
        *,
        reduce: Reduce = "auto",
        target: Any = None,
        task: str | Mapping[str, str] | None = None,
        num_classes: int | Mapping[str, int] | None = None,
        sample_weight: Callable[[Any, Any, Any], Any] | None = None,
        optimizer: keras.optimizers.Optimizer | str | None = None,
        metrics: Sequence[str] = ("error", "loss"),
        mode: Literal["shared", "isolated"] = "shared",
        every: int | Literal["auto"] = "auto",
        baselines: Sequence[Literal["initial", "shuffled"]] = (),
        log_dir: str | os.PathLike | None = None,
        update_freq: int | Literal["epoch"] = "epoch",
        backup_dir: str | os.PathLike | None = None,
        seed: int = 0,
        refit: float = 0.1,
        model: keras.Model | Callable[[keras.Model], keras.Model] | None = None,
        unpack: int | Callable[[Any], Any] | None = None,
        data: Any = None,
        validation_data: Any = None,
        every_epochs: int = 1,
        every_steps: int | None = None,
    ):
        super().__init__()
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                "keras_probes works with Keras on TensorFlow. Received: Keras on "
                f"{keras.backend.backend()}. Set KERAS_BACKEND=tensorflow before importing keras."
            )
        if isinstance(metrics, str) or not metrics:
            raise ValueError(
                f"Expected `metrics` to be a sequence of {', '.join(map(repr, METRICS))}. "
                f"Received: metrics={metrics!r}."
            )
        for metric in metrics:
            _one_of("metrics", metric, (*METRICS, *SPECTRUM))
        for name in task.values() if isinstance(task, Mapping) else (task,):
            _one_of("task", name, (None, *TASKS, POSITIONS))
        if isinstance(baselines, str):
            raise ValueError(
                f"Expected `baselines` to be a sequence. Received: baselines={baselines!r}."
            )
        for baseline in baselines:
            _one_of("baselines", baseline, BASELINES)
        if refit == 0 and not set(SPECTRUM).isdisjoint(metrics):
            raise ValueError(
                f"The metrics {', '.join(map(repr, SPECTRUM))} are of the examples that probes are "
                f"refitted on. Received: metrics={metrics!r} with refit=0."
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"Expected `seed` to be an integer. Received: seed={seed!r}.")
        if every != "auto" and (type(every) is not int or every < 1):
            raise ValueError(
                f'Expected `every` to be "auto" or a positive integer. Received: every={every!r}.'
            )
        if isinstance(refit, bool) or not isinstance(refit, (int, float)) or not 0 <= refit < 1e6:
            raise ValueError(
                "Expected `refit` to be a share of what an epoch costs, such as 0.1, or 0 for no "
                f"refit. Received: refit={refit!r}."
            )
        if update_freq != "epoch" and (type(update_freq) is not int or update_freq < 1):
            raise ValueError(
                'Expected `update_freq` to be "epoch" or a number of batches, from 1. Received: '
                f"update_freq={update_freq!r}."
            )
        _one_of("mode", mode, ("shared", "isolated"))
        check_sets(data, validation_data)
        _check_schedule(data, every_epochs, every_steps)
        if data is not None:
            _refuse_riding_only(
                every=(every, "auto"), optimizer=(optimizer, None), refit=(refit, 0.1),
                unpack=(unpack, None), update_freq=(update_freq, "epoch"),
            )  # fmt: skip
        sets = data if isinstance(data, Mapping) else (None,)
        names = [name for of in sets for name in names_of_targets(of, target).values()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"Two targets would be named {name!r}, by their sets of data and their own "
                    "names. Rename one."
                )
        for baseline in baselines:
            for name in names:
                if name_of_baseline(baseline, name) in names:
                    raise ValueError(
                        f"A target is named {name_of_baseline(baseline, name)!r}, as the baseline "
                        f"of {name!r} would be. Rename it, or leave {baseline!r} out of baselines=."
                    )
        self.metrics = tuple(metrics)
        self.log_dir = log_dir
        self.update_freq = update_freq
        self.results = ProbeResults()
        self._settings = Settings(
            layers=layers,
            reduce=reduce,
            target=target,
            task=task,
            num_classes=num_classes,
            sample_weight=sample_weight,
            optimizer=optimizer,
            metrics=tuple(metrics),
            isolated=mode == "isolated",
            every=every,
            baselines=tuple(baselines),
            seed=seed,
            refit=float(refit),
            model=model,
            unpack=unpack,
            data=data,
            validation_data=validation_data,
            every_epochs=every_epochs,
            every_steps=every_steps,
        )
        self._online: HostProbes | None = None
        self._joint: Joint | None = None
        self._test_split = "test"  # of the evaluation that is running
        self._writer: TensorBoardWriter | None = None
        # Identifies the fit, and lets go of it: TensorBoard's files are closed with it.
        self._fit: Callable[[], keras.callbacks.CallbackList | None] = _no_fit
        self._logged: tuple[int, Sums] = (0, {})  # batches and sums that TensorBoard has
        self._epoch = 0
        self._measured_epoch: int | None = None  # the last that ended with measures of training
        self._backups = Backups(backup_dir) if backup_dir is not None else None
        self._begun = False  # whether the fit has come to its first epoch
        self._fit_params: dict[str, Any] = {}  # an `evaluate` within it sets `params` anew
        self._loaded: Checkpoint | None = None  # whose state no host has taken yet

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: all but the model, with the probes as `save` keeps them."""
        online = self._online
        known = self._loaded is not None or (online is not None and online.built)
        return {
            **vars(self),
            "_model": None,
            "_online": None,
            "_joint": None,
            "_writer": None,
            "_fit": _no_fit,
            "_loaded": self._checkpoint() if known else None,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "LinearProbeCallback":
        """A copy that looks at the same model and data: what was named or given stays the same."""
        settings = self._settings
        named = keras.tree.flatten((settings.layers, settings.model))
        operations = [asked for asked in named if isinstance(asked, keras.Operation)]
        for shared in (*operations, settings.data, settings.validation_data):
            memo[id(shared)] = shared
        copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    # What a user asks for.

    @property
    def probe_model(self) -> keras.Model:
        """The sibling model: a mapping from tap names to the host's activations -> probabilities.

        Its output is a mapping from tap names to arrays of shape (batch, num_classes), or with
        named targets a mapping from their names to such mappings. It knows no masks: averages over
        padded sequences are over all of their steps.

        Raises:
            ValueError: The probes are not built yet: `fit` builds them.
        """
        return self._built().model()

    def weights(
        self, tap: str, target: str | None = None, *, baseline: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the probe of a tap as `softmax(h @ W + b)` of the raw, reduced features h.

        Args:
            tap: Tap name.
            target: Name of the target, where they have names.
            baseline: Which baseline of the target; the probe itself by default.

        Returns:
            W, float32, shape (n_features, num_classes), and b, float32, shape (num_classes,).

        Raises:
            ValueError: Unknown tap, target or baseline, or the probes are not built yet.
        """
        online = self._built()
        _one_of("tap", tap, online.probes.taps)
        _one_of("target", target, list(dict.fromkeys(each.name for each in online.targets)))
        _one_of("baseline", baseline, (None, *self._settings.baselines))
        return online.weights(tap, target, baseline)

    def measure(
        self, model: keras.Model, *, epoch: int | None = None, step: int | None = None
    ) -> pd.DataFrame:
        """Measures the probes of `data=` on a model as it is now: in any loop, between two steps.

        Every probe is fitted to its optimum, from where it was, and tested on `validation_data`.
        The model is run at inference, and none of its state is touched.

        Args:
            model: The model; the same in every call.
            epoch: What the measurement is counted as, from 0. By default the epoch of the `fit`
                that is running; else one more than the last that was measured.
            step: Number of batches that the model has trained on. By default what its optimizer
                has counted, if it is compiled with one that is used; else the number of
                measurements before.

        Returns:
            The new measures, as `results.frame()` has them. They are in `results` as well.

        Raises:
            ValueError: The callback has no `data`, the model is another than before, or its layers
                or the data are not what was asked for.
        """
        if self._settings.data is None:
            raise ValueError(
                "measure() is for probes with labelled data of their own. Received: a callback "
                "without data=. Make it with LinearProbeCallback(data=(x, y)); or pass it to fit."
            )
        _check_model(model)
        self._check_host(model)
        if self._online is not None and self._online.host is not model:
            raise ValueError(
                f"Expected the model that these probes were measured on, {self._online.host.name!r}"
                f". Received: another one, {model.name!r}. Use a new LinearProbeCallback for it."
            )
        online = self._adopt(model)
        assert isinstance(online, OwnDataProbes)
        in_fit = self._fit() in calling_lists()
        if epoch is None:
            latest = max((row.epoch for row in self.results.rows), default=-1)
            epoch = self._epoch if in_fit else latest + 1
        online.look()
        self._loaded = None  # what it held, a host has taken
        if step is None and in_fit:
            online.count_batches()
        else:
            online.count_steps(_steps_of(model, online.measurements) if step is None else step)
        rows = self._add(online.measure(_silent, epoch), epoch, {})
        if self.log_dir is not None and not in_fit:
            self._writer = self._writer or TensorBoardWriter(self.log_dir)
            self._writer.write(self.results, epoch)
        return ProbeResults(self.results.taps, rows).frame()

    def refit(
        self,
        data: Any,
        *,
        validation: Any = 0.1,
        test: Any = 0.1,
        batch_size: int = 32,
        verbose: bool = True,
        **options: Any,
    ) -> ProbeResults:
        """Fits every tap's optimal probe to the model as it is now: the offline path, at one go.

        The features, of the same taps, reductions and targets, are kept on disk meanwhile.

        Args:
            data: What to train on: (x, y) or (x, y, sample_weight) of arrays, a `tf.data.Dataset`
                or whatever `fit` takes, and that ends.
            validation: What chooses the penalty: other data, or a fraction of `data`.
            test: What to report on that chose nothing, likewise; `None` for nothing.
            batch_size: Number of rows of a batch, for arrays.
            verbose: Whether to show progress.
            **options: Further arguments of `fit_probes`, such as `l2` and `tol`.

        Returns:
            Results as of `fit_probes`: errors, probes and certificates.

        Raises:
            ValueError: The probes are not built yet, or they have several sets of data; or as
                `extract_features` and `fit_probes`.
        """
        online, asked = self._built(), self._settings
        if isinstance(asked.data, Mapping):
            raise ValueError(
                "Expected probes of one data set. Received: probes with the sets "
                f"{', '.join(map(repr, asked.data))}. Use extract_features and fit_probes for each."
            )
        plan = online.plan
        # Of a network within the host, the host's own `fit` preprocesses the data.
        preprocess = getattr(online.host, "preprocess_samples", None)
        within = preprocess is not None and online.probed is not online.host
        with tempfile.TemporaryDirectory() as directory:

            def store(name: str, part: Any) -> FeatureStore:
                if within:
                    part = batches_of(part, batch_size, preprocess).dataset
                return extract_features(
                    online.probed,
                    part,
                    os.path.join(directory, name),
                    layers=[name.removeprefix(plan.prefix) for name in plan.n_features],
                    reduce={
                        reduced.tap.name.removeprefix(plan.prefix): reduced.reduction
                        for reduced in plan.taps
                    },
                    target=asked.target,
                    **online.known,
                    sample_weight=asked.sample_weight,
                    batch_size=batch_size,
                    seed=asked.seed,
                    verbose=verbose,
                )

            splits: dict[str, Any] = {
                name: part if part is None or isinstance(part, float) else store(name, part)
                for name, part in (("validation", validation), ("test", test))
            }
            return fit_probes(store("train", data), **splits, verbose=verbose, **options)

    def summary(
        self, model: keras.Model | None = None, print_fn: Callable[[str], Any] = print
    ) -> None:
        """Prints what is probed: tap, depth, shape, reduction, features, parameters and memory.

        Then what is asked, which layers are left out, which probes are refitted or were not, and
        why.

        Args:
            model: The model to be probed; may be left out once `fit` has begun.
            print_fn: Takes the text.

        Raises:
            ValueError: No model is known, or its input shape or number of classes is not.
        """
        if model is not None:
            _check_model(model)
            self._adopt(model)
        if self._online is None:
            raise ValueError("Pass the model to be probed: probes.summary(model).")
        if not self._online.built:
            self._online.look()
        sizes = self._online.sizes()
        table = pd.DataFrame([dataclasses.asdict(tap) for tap in self._online.plan.tap_infos()])
        table["shape"] = [tap.shape_text for tap in self._online.plan.tap_infos()]
        table["parameters"] = [f"{parameters:,}" for parameters, _ in sizes.values()]
        table["memory"] = [mebibytes(memory) for _, memory in sizes.values()]
        print_fn(table.rename(columns={"name": "tap"}).to_string(index=False))
        parameters, memory = (sum(column) for column in zip(*sizes.values(), strict=True))
        print_fn(f"{len(sizes)} taps, {parameters:,} parameters, {mebibytes(memory)}")
        print_fn(self._online.about_tasks())
        if self._online.plan.left_out:
            print_fn(left_out_text(self._online.plan.left_out))
        print_fn(self._online.about_refit(next(reversed(self.results.refits), None)))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the probes into one file: settings, weights, statistics, subsets and results.

        Args:
            path: Name of the file; it is replaced at once, or stays as it was.

        Raises:
            ValueError: The probes are not built yet.
        """
        self._checkpoint().save(path)

    @classmethod
    def load(cls, path: str | os.PathLike, **options: Any) -> "LinearProbeCallback":
        """Returns the callback that `save` wrote: pass it to `fit` or `evaluate` of its model.

        Its `results` are there at once; its weights as soon as it has seen the model.

        Args:
            path: Name of the file.
            **options: What a file can't keep: `data` and `validation_data`; `target`,
                `sample_weight`, `model` and `unpack`, where they are or hold functions or models;
                and `log_dir`, `update_freq` and `backup_dir`, which belong to a machine.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or something else, or a function is missing.
        """
        saved = Checkpoint.load(path)
        given = dict(saved.settings)
        code = given.pop("code", ["target"] if given.pop("target_is_code", False) else [])
        for name in code:
            if name not in options:
                raise ValueError(
                    f"The probes in {os.fspath(path)!r} were trained with a {name}= that a file "
                    f"can't keep. Pass it again: load(path, {name}=...)."
                )
        # What files of the first version call it.
        earlier = {"keras_probes>OnePassAdam": keras.optimizers.Adam}
        for name in ("reduce", "optimizer"):
            given[name] = keras.saving.deserialize_keras_object(given[name], earlier)
        callback = cls(**{**given, **options})
        callback.results = saved.results
        callback._loaded = saved
        return callback

    # What Keras calls.

    def set_model(self, model: keras.Model) -> None:
        _check_model(model)
        super().set_model(model)
        quiet_progress_bar(lambda: self._joint.keys if self._joint else ())

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._check_host(self.model)
        online = self._adopt(self.model)
        online.begin_fit()
        self.results = ProbeResults()
        if self.log_dir is not None:
            self._writer = self._writer or TensorBoardWriter(self.log_dir)
            self._writer.begin()
        for fit in calling_lists()[:1]:
            self._fit = weakref.ref(fit)
            if self._writer is not None:
                weakref.finalize(fit, self._writer.close)  # where an exception ends it
        self._epoch, self._begun, self._measured_epoch = 0, False, None
        self._fit_params = {"steps": None, "verbose": 0, **self.params}
        self._join("train", online)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self._epoch = epoch
        if self._backups is not None and not self._begun:
            self._go_on(self._backups.read(epoch))
        self._begun = True
        if self._online is not None:
            self._online.begin_epoch(epoch, self._fit_params["steps"])
            self._logged = (0, {})

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if self._joint is not None and self._online is not None:
            self._joint.expect("train", self._online, self._online.part_in(batch))

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if isinstance(self._online, OwnDataProbes):
            if self._online.end_batch(batch):
                with waiting(self._fit_params["verbose"]) as progress:
                    passes = self._online.measure_in_fit(progress, self._epoch)
                rows = self._add(passes, self._epoch, {})
                if rows and self._writer is not None:
                    self._writer.write_batches(ProbeResults(self.results.taps, rows))
            return
        if self._writer is not None and self.update_freq != "epoch":
            self._write_batches(self._writer, batch + 1, self.update_freq)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if self._measured_epoch != epoch and self._settings.data is not None:
            added = self._end_pass("train", {})  # in a loop of one's own
            if logs is not None:
                logs.update(added)
        elif self._measured_epoch != epoch:
            warnings.warn(
                f"The probes saw no step of epoch {epoch}: they ride in the steps of `fit`, and a "
                "loop of one's own has none of these. Call model.fit, or probe the model as it is "
                "with extract_features and fit_probes.",
                stacklevel=2,
            )
        if self._writer is not None:
            self._writer.write(self.results, epoch)

    def on_train_end(self, logs: dict | None = None) -> None:
        self._leave("test", "train")
        self._fit = _no_fit
        if self._fit_params["verbose"] and self.results.rows:
            print(as_bars(self.results))
        if self._backups is not None:
            self._backups.remove()
        if self._writer is not None:
            self._writer.end(self.results, self._epoch)

    def on_test_begin(self, logs: dict | None = None) -> None:
        fit = self._fit()
        within_fit = fit is not None and fit is next(iter(calling_lists()), None)
        if self._settings.data is not None:
            if within_fit:
                return
            raise ValueError(
                "Probes with data= of their own are tested on validation_data=, and measured by "
                f"probes.measure(model). Received: evaluate of {self.model.name!r}."
            )
        online = self._adopt(self.model) if self._loaded is not None else self._online
        known = online is not None and (online.built or online.restoring)
        if online is None or not known or online.host is not self.model:
            raise ValueError(
                "These probes have not been trained on this model. Pass the callback to its `fit` "
                f"before `evaluate`. Received: evaluate of {self.model.name!r}."
            )
        online.reset_sums("test")
        self._test_split = "validation" if within_fit else "test"
        self._join("test", online)

    def on_test_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if self._joint is not None and self._online is not None:
            self._joint.expect("test", self._online)

    def on_test_end(self, logs: dict | None = None) -> None:
        if self._settings.data is not None:
            return
        in_fit = self._fit() in calling_lists()
        self._leave(*("test",) if in_fit else ("test", "train"))
        if not in_fit and self.log_dir is not None:  # else the epoch's end writes it
            self._writer = self._writer or TensorBoardWriter(self.log_dir)
            self._writer.write(self.results, self._epoch, "test")
            self._writer.close()

    # How it is done.

    def _adopt(self, model: keras.Model) -> HostProbes:
        """Returns the probes of `model`; those of another host are dropped."""
        if self._online is None or self._online.host is not model:
            settings, loaded = self._settings, self._loaded
            if loaded is not None:
                settings = dataclasses.replace(
                    settings,
                    task=loaded.settings.get("task"),
                    num_classes=loaded.settings["num_classes"],
                )
            own = settings.data is not None
            self._online = (OwnDataProbes if own else RidingProbes)(model, settings)
            if loaded is not None:
                self._online.restore(loaded.arrays)
        if isinstance(self._online, OwnDataProbes):
            self._online.room = self.features_limit
        self._online.memory_limit = self.memory_limit
        return self._online

    def _checkpoint(self) -> Checkpoint:
        """What `load` makes the same callback of."""
        if self._loaded is not None and not (self._online and self._online.built):
            return self._loaded
        online, asked = self._built(), self._settings
        of_target = named_targets(asked.target).values()
        code = {
            "target": asked.target if any(map(callable, of_target)) else None,
            "sample_weight": asked.sample_weight,
            "model": asked.model,
            "unpack": asked.unpack if callable(asked.unpack) else None,
            "data": asked.data,
        }
        code = {name: value for name, value in code.items() if value is not None}
        settings = {
            "layers": [reduced.tap.name for reduced in online.plan.taps],
            "reduce": {reduced.tap.name: reduced.reduction for reduced in online.plan.taps},
            "target": None if "target" in code else asked.target,
            "unpack": None if "unpack" in code else asked.unpack,
            "code": list(code),
            **online.known,
            "optimizer": online.probes.optimizer if asked.data is None else None,
            "metrics": self.metrics,
            "mode": "isolated" if asked.isolated else "shared",
            "every": asked.every,
            "baselines": asked.baselines,
            "seed": asked.seed,
            "refit": asked.refit,
            "every_epochs": asked.every_epochs,
            "every_steps": asked.every_steps,
        }
        for name in ("reduce", "optimizer"):
            settings[name] = keras.saving.serialize_keras_object(settings[name])
        return Checkpoint(settings, online.state(), self.results)

    def _go_on(self, backup: Checkpoint | None) -> None:
        """Takes over the state that an earlier run of this fit came to."""
        if backup is not None:
            assert self._online is not None
            self._online.restore(backup.arrays)
            self.results = backup.results

    def _built(self) -> HostProbes:
        if self._online is None or not self._online.built:
            raise ValueError("The probes are not built yet. Pass this callback to model.fit first.")
        return self._online

    def _check_host(self, model: keras.Model) -> None:
        optimizer = self._settings.optimizer
        if optimizer is not None and optimizer is model.optimizer:
            raise ValueError(
                "The probes need an optimizer of their own. Received: optimizer= is the model's. "
                "Leave optimizer= out, or pass a new one."
            )
        strategy = model.distribute_strategy
        if isinstance(strategy, _UNSUPPORTED):
            raise ValueError(
                "Expected a model without a distribution strategy, or under "
                "tf.distribute.MirroredStrategy or OneDeviceStrategy. Received: a model under "
                f"{type(strategy).__name__}, which Keras 3 does not support either. Train on one "
                "machine, or probe the finished model with extract_features and fit_probes."
            )

    def _join(self, kind: Kind, online: HostProbes) -> None:
        own = self._joint if self._joint and self._joint.host is online.host else None
        self._joint = Joint.at(online.host) or own or Joint(online.host)
        self._joint.attach(kind, online, self._end_pass, next(iter(calling_lists()), None))

    def _leave(self, *kinds: Kind) -> None:
        if self._joint is not None and self._online is not None:
            for kind in kinds:
                self._joint.detach(kind, self._online)

    def _end_pass(self, kind: Kind, of_host: Mapping[str, Any]) -> dict[str, float]:
        """Takes what an epoch or an evaluation measured into the results; its logs."""
        assert self._online is not None
        self._loaded = None  # what it held, a host has taken
        with waiting(self._fit_params.get("verbose", 0)) as progress:
            last = self._epoch + 1 == self._fit_params.get("epochs")
            passes = self._online.end_pass(kind, progress, last)
        if kind == "train":
            self._measured_epoch = self._epoch
        # What the host logs is about its own data.
        rows = self._add(passes, self._epoch, of_host if self._settings.data is None else {})
        # Before Keras backs up the host: where its backup is there, ours is.
        if self._backups is not None and kind == "train" and self._online.built:
            self._backups.write(self._epoch + 1, self._checkpoint())
        elif self._backups is not None and self._test_split == "validation":
            self._backups.update(self._epoch + 1, self.results)
        # Of an evaluation, Keras says itself that it is of validation.
        val = "val_" if kind == "train" else ""
        return {
            (val if row.split == "validation" else "") + _log_key(row): row.value
            for row in rows
            if row.metric in self.metrics
        }

    def _add(self, passes: Passes, epoch: int, of_host: Mapping[str, Any]) -> list[Row]:
        """Takes what was measured into the results; its rows."""
        assert self._online is not None
        if passes and not self.results.taps:
            plan = self._online.plan
            self.results.taps, self.results.graph = plan.tap_infos(), plan.nodes()
            self.results.left_out = dict(plan.left_out)
            self.results.settings = {"model": self._online.host.name, **self._settings.described()}
            self.results.versions = versions()
        taps = tuple(tap.name for tap in self.results.taps)
        added: list[Row] = []
        for kind, measured in passes.items():
            split = self._test_split if kind == "test" else kind
            added += rows_of(measured, epoch, split, self.metrics, of_host)
            for key, moments in measured.pairs.items():
                of = measured.targets[key]
                self.results.pairs[of.name, of.baseline, split] = Pairs(epoch, taps, moments)
            for key, counts in measured.details().items():
                of = measured.targets[key]
                self.results.details[of.name, of.baseline, split] = Details(epoch, counts)
            if measured.refit is not None:
                self.results.refits.append(measured.refit)
        self.results.add(added)
        return added

    def _write_batches(self, writer: TensorBoardWriter, batches: int, every: int) -> None:
        """Writes what was measured since the last time, once that is `every` batches."""
        last, before = self._logged
        if batches - last < every:
            return
        online = self._built()
        sums = online.sums("train")
        targets = online.targets_in_units().values()
        rows = list(rows_of_batches(online.steps, sums, before, targets, self._epoch, self.metrics))
        if any(row.n for row in rows):
            self._logged = (batches, sums)
            writer.write_batches(ProbeResults(online.plan.tap_infos(), rows))


def _check_schedule(data: Any, every_epochs: int, every_steps: int | None) -> None:
    for name, value, unset in (
        ("every_epochs", every_epochs, 1),
        ("every_steps", every_steps, None),
    ):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"Expected `{name}` to be a positive integer. Received: {value!r}.")
        if value != unset and data is None:
            raise ValueError(
                f"{name}= says when probes with data= of their own are measured. Received: "
                f"{name}={value!r} without data. Probes that ride in fit have every=."
            )


def _refuse_riding_only(**given: tuple[Any, Any]) -> None:
    """Refuses what only probes without data of their own know, each given with its default."""
    for name, (value, default) in given.items():
        if value != default:
            raise ValueError(
                f"{name}= is about the batches of fit, and probes with data= of their own do not "
                f"see these. Received: {name}={value!r}. Leave one of the two out."
            )


def _steps_of(model: keras.Model, unknown: int) -> int:
    """Number of batches that a model has trained on, by its optimizer if it has one in use."""
    optimizer = getattr(model, "optimizer", None)
    counted = 0 if optimizer is None else int(optimizer.iterations.value.numpy())
    return counted or unknown


def _silent(text: str) -> None:
    """Shows no progress."""


def _no_fit() -> None:
    """Stands for the fit that is running where there is none."""


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        of_tf_keras = any(base.__module__.startswith("tf_keras") for base in type(model).__mro__)
        instead = " It is a model of tf_keras (Keras 2): unset TF_USE_LEGACY_KERAS and build it "
        raise TypeError(
            f"Expected a model of Keras 3. Received: {type(model).__module__}."
            f"{type(model).__name__}." + (f"{instead}with keras." if of_tf_keras else "")
        )


def _log_key(row: Row) -> str:
    return f"{name_of_measure(row.metric, row.target, row.baseline)}/{row.tap}"


def _one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        hint = (
            f" {nearest(value, choices)}" if isinstance(value, str) and None not in choices else ""
        )
        raise ValueError(
            f"Expected {name} to be one of {', '.join(map(repr, choices))}. "
            f"Received: {name}={value!r}.{hint}"
        )
