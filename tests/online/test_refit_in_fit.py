"""The refit at the end of each epoch, and `refit`: what they bring, what they say."""

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from hosts import MODES, compiled
from keras import layers

from keras_probes import LinearProbeCallback, extract_features, fit_probes
from keras_probes.online import sample

TAPS = ["norm", "pool", "dense"]


def host():
    """BatchNormalization, whose moving averages at Keras's momentum are far off at first."""
    return compiled(
        keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(6, 3, padding="same", name="conv"),
                layers.BatchNormalization(name="norm"),
                layers.ReLU(name="relu"),
                layers.GlobalAveragePooling2D(name="pool"),
                layers.Dense(12, activation="relu", name="dense"),
                layers.Dense(10, activation="softmax", name="out"),
            ]
        ),
        "adam",
    )


def fitted(model, *data, refit=0.1, **options):
    probes = LinearProbeCallback(TAPS, reduce={"norm": "gap", "*": "flatten"}, refit=refit)
    model.fit(*data, callbacks=[probes], verbose=0, **options)
    return probes


@pytest.fixture(scope="module")
def refitted_and_not(digits, tmp_path_factory):
    """Results of both, and of the optimal probes of the same host, after two epochs."""
    (x, y), validation = digits
    found = {}
    for name, share in (("refitted", 0.1), ("not", 0)):
        keras.utils.set_random_seed(7)
        model = host()
        probes = fitted(model, x, y, 16, 2, refit=share, validation_data=validation)
        found[name] = probes.results
    stores = [
        extract_features(
            model, data, tmp_path_factory.mktemp("store") / "features", layers=TAPS,
            reduce={"norm": "gap", "*": "flatten"}, verbose=False,
        )
        for data in ((x, y), validation)
    ]  # fmt: skip
    found["optimal"] = fit_probes(stores[0], validation=stores[1], test=None, verbose=False)
    return found


def test_they_are_at_the_optimum_of_the_host_as_it_is(refitted_and_not):
    errors = {name: r.table()["validation error"] for name, r in refitted_and_not.items()}
    assert (errors["not"] - errors["optimal"]).min() > 0.2
    assert (errors["refitted"] - errors["optimal"]).abs().max() < 0.06


def test_rows_and_table_tell_how_near(refitted_and_not):
    frame = refitted_and_not["refitted"].frame()
    by_split = frame.groupby("split")["certificate"]
    assert by_split.min()["train"] > 0.05  # those that trained in the epoch
    assert 0 < by_split.max()["validation"] <= 0.01  # those that were refitted at its end
    table = refitted_and_not["refitted"].table()
    assert table["converged"].all()
    assert not refitted_and_not["not"].frame()["certificate"].notna().any()
    assert not refitted_and_not["not"].table()["converged"].any()


def test_without_validation_the_table_marks_them(digits):
    table = fitted(host(), *digits[0], 16).results.table()
    assert not table["converged"].any()
    assert (table["certificate"] > 0.01).all()


def batches(digits):
    return tf.data.Dataset.from_tensor_slices(digits[0]).batch(20)


def generator(digits):
    (x, y), _ = digits
    while True:
        for start in range(0, 320, 20):
            yield x[start : start + 20], y[start : start + 20]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "options"),
    [
        (batches, {}),
        (lambda digits: batches(digits).repeat(), {"steps_per_epoch": 16}),
        (lambda digits: batches(digits).filter(lambda x, y: True), {}),  # of unknown length
        (generator, {"steps_per_epoch": 16}),
    ],
    ids=["dataset", "endless", "of unknown length", "generator"],
)
@pytest.mark.parametrize("at_once", [1, 3])
def test_whatever_fit_reads(digits, data, options, at_once):
    model = host()
    model.compile("adam", "sparse_categorical_crossentropy", steps_per_execution=at_once)
    probes = fitted(model, data(digits), epochs=2, validation_data=digits[1], **options)
    frame = probes.results.frame().query("metric in ('error', 'loss')")
    assert (frame.groupby(["epoch", "split"]).size() == 2 * len(TAPS)).all()
    assert (frame[frame["split"] == "validation"]["certificate"] < 0.01).all()


def test_a_certificate_is_of_the_probes_as_they_were_refitted(digits):
    (x, y), validation = digits
    model = host()
    probes = fitted(model, x, y, validation_data=validation)
    model.evaluate(*validation, callbacks=[probes], verbose=0)
    assert probes.results.frame().query("split == 'test'")["certificate"].notna().all()

    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.evaluate(*validation, callbacks=[probes], verbose=0)

    model.fit(x, y, 160, callbacks=[probes, Evaluate()], verbose=0)
    within = probes.results.frame().query("split == 'test'")
    assert len(within) == 2 * 2 * len(TAPS)
    assert within["certificate"].isna().all()


def test_refit_is_the_offline_path_at_one_go(digits, refitted_and_not):
    (x, y), validation = digits
    keras.utils.set_random_seed(7)
    probes = fitted(host(), x, y, 16, 2, refit=0, validation_data=validation)
    got = probes.refit((x, y), validation=validation, test=None, verbose=False)
    pd.testing.assert_frame_equal(got.frame(), refitted_and_not["optimal"].frame())
    fractions = probes.refit((x, y), validation=0.2, test=0.3, l2=1e-2, verbose=False)
    assert set(fractions.frame()["n"]) == {160, 64, 96}


def test_refit_keeps_subsets_and_targets(digits):
    (x, y), _ = digits
    targets = {"digit": None, "odd": lambda x, y: y % 2}
    probes = LinearProbeCallback("conv", target=targets, num_classes={"odd": 2}, seed=3)
    model = host()
    model.fit(x, y, callbacks=[probes], verbose=0)
    results = probes.refit((x, y), test=None, l2=1e-2, tol=1e-3, verbose=False)
    assert set(results.probes) == {("digit", "conv"), ("odd", "conv")}
    features = probes._online.plan.features_of(tf.constant(x))["conv"]
    logits = features @ results.probes["odd", "conv"].kernel + results.probes["odd", "conv"].bias
    error = np.mean(np.argmax(logits, axis=1) != y % 2)
    table = results.table(target="odd").loc["conv"]
    expected = 0.9 * table["train error"] + 0.1 * table["validation error"]
    assert error == pytest.approx(expected, abs=1e-3)


def test_refit_while_the_model_trains_leaves_it_alone(digits):
    (x, y), _ = digits
    found = []

    class Refit(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(64)
            found.append(self.probes.refit(data, test=None, l2=1e-2, tol=1e-2, verbose=False))

    histories = []
    for others in ([], [Refit()]):
        keras.utils.set_random_seed(5)
        probes = LinearProbeCallback(TAPS, reduce="gap")
        for other in others:
            other.probes = probes
        history = host().fit(x, y, 32, 2, callbacks=[probes, *others], shuffle=False, verbose=0)
        histories.append(history.history)
    assert histories[0] == histories[1]
    assert [set(results.table().index) for results in found] == [set(TAPS)] * 2
    first, last = (results.table()["train error"] for results in found)
    assert (first != last).any()  # each of the host as it was then


def test_refit_before_fit():
    with pytest.raises(ValueError, match="not built yet"):
        LinearProbeCallback().refit((np.zeros((4, 8, 8, 1)), np.zeros(4)))


def test_rows_tell_what_a_guess_comes_to(refitted_and_not, digits):
    (_, y), (_, yv) = digits
    most = np.bincount(y).argmax()
    for results in refitted_and_not.values():
        frame = results.frame()
        errors = frame[frame["metric"] == "error"].groupby("split")[["majority", "chance"]].last()
        assert errors.loc["train", "majority"] == pytest.approx(np.mean(y != most))
        assert errors.loc["validation", "majority"] == pytest.approx(np.mean(yv != most))
        assert (errors["chance"] == 0.9).all()
        assert f"{np.mean(yv != most):.4f} by the training labels alone, 0.9000 by chance" in str(
            results
        )
        assert "by the training labels alone" in results._repr_html_()


def test_the_code_length_is_of_the_first_pass(digits):
    (x, y), validation = digits
    model = host()
    probes = LinearProbeCallback(TAPS, reduce="gap")
    history = model.fit(x, y, 16, 2, callbacks=[probes], validation_data=validation, verbose=0)
    assert not any("code_length" in key for key in history.history)
    frame = probes.results.frame()
    codes = frame[frame["metric"] == "code_length"].set_index("tap")
    assert (set(codes["epoch"]), set(codes["split"])) == ({0}, {"train"})
    for tap in TAPS:
        bits = history.history[f"probe_loss/{tap}"][0] / np.log(2)
        assert codes.loc[tap, "value"] == pytest.approx(bits)
        assert probes.results.table().loc[tap, "code_length"] == pytest.approx(bits)
    assert codes["chance"].unique() == pytest.approx([np.log2(10)])
    model.fit(x, y, 16, callbacks=[probes], verbose=0)  # these examples they know already
    assert "code_length" not in set(probes.results.frame()["metric"])


@pytest.mark.parametrize(
    ("mode", "at_once", "seen"),
    [
        ("shared", 1, [0, 3, 6, 9]),
        ("isolated", 2, [0, 1, 6, 7]),
        pytest.param("shared", 2, [0, 1, 6, 7], marks=pytest.mark.slow),
        pytest.param("isolated", 1, [0, 3, 6, 9], marks=pytest.mark.slow),
    ],
)
def test_every_third_batch(digits, mode, at_once, seen):
    (x, y), validation = digits
    model = host()
    model.compile("adam", "sparse_categorical_crossentropy", steps_per_execution=at_once)
    probes = LinearProbeCallback(TAPS, reduce="gap", mode=mode, every=3)
    history = model.fit(
        x, y, 32, 2, callbacks=[probes], shuffle=False, validation_data=validation, verbose=0
    ).history
    frame = probes.results.frame()
    assert set(frame[frame["split"] == "train"]["n"]) == {32 * len(seen)}
    assert set(frame[frame["split"] == "validation"]["n"]) == {160}
    assert probes._online.probes.steps == 2 * len(seen)
    known = np.concatenate([y[32 * step : 32 * step + 32] for step in seen])
    np.testing.assert_array_equal(
        probes._online.probes.tally("train", None), np.bincount(known, minlength=10)
    )
    assert len(history["probe_error/pool"]) == len(history["val_probe_error/pool"]) == 2
    assert frame.query("split == 'validation'")["certificate"].notna().all()
    assert int(model.optimizer.iterations) == 20


def test_batches_that_are_left_out_are_the_hosts_own(digits):
    """What the host computes there is its plain step's, compiled without probes."""
    (x, y), _ = digits
    logs = []
    for callbacks in ([], [LinearProbeCallback(TAPS, reduce="gap", mode="isolated", every=2)]):
        keras.utils.set_random_seed(3)
        logs.append(host().fit(x, y, 32, 2, callbacks=callbacks, shuffle=False, verbose=0).history)
    assert {key: logs[1][key] for key in logs[0]} == logs[0]


def test_a_thousand_classes_are_refitted_and_certified(digits):
    (x, y), validation = digits
    probes = LinearProbeCallback("pool", num_classes=1000)
    host().fit(x, y, epochs=2, callbacks=[probes], validation_data=validation, verbose=0)
    of_probes = probes.results.frame().query("metric in ['error', 'loss']")
    assert of_probes["certificate"].notna().all()
    assert probes.results.table()["converged"].all()


def test_without_a_refit_the_results_say_so(digits):
    (x, y), validation = digits
    probes = fitted(host(), x, y, refit=0, validation_data=validation)
    (record,) = probes.results.refits
    assert (record.examples, record.left_out) == (0, dict.fromkeys(TAPS, "refit=0"))
    (finding,) = [f for f in probes.results.diagnose() if f.code == "KP006"]
    assert finding.taps == tuple(TAPS)


def test_the_summary_says_which_probes_are_refitted(digits):
    (x, y), _ = digits

    def said(probes, model):
        lines = []
        probes.summary(model, lines.append)
        return lines[-1]

    model = host()
    every = (
        "All probes are refitted at the end of each epoch, for up to 0.1 of what the epoch costs, "
        "or two CPU seconds"
    )
    assert said(LinearProbeCallback(TAPS), model) == every + "."
    assert said(LinearProbeCallback(TAPS, refit=0), model) == "No probe is refitted: refit=0."
    probes = fitted(model, x, y)
    assert said(probes, model) == every + "."

    class Own(keras.Sequential):
        def train_step(self, data):
            return super().train_step((-9 * data[0], data[1]))

    own = compiled(Own([keras.Input((8, 8, 1)), *model.layers]), "adam")
    probes = LinearProbeCallback(TAPS)
    assert said(probes, own).startswith(every + ", if the model's own train_step calls it with x")
    assert said(LinearProbeCallback(TAPS, mode="isolated"), own) == every + "."
    own.fit(x, y, callbacks=[probes], verbose=0)
    assert said(probes, own).startswith("No probe is refitted: the model's own train_step")

    spoiled = np.full_like(x, np.nan)
    probes = fitted(model, spoiled, y)
    assert "'norm' (no labelled examples with finite features)" in said(probes, model)


@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_sparse_and_ragged_batches_are_kept(digits, kind):
    """Where Keras passes them to the model as they are."""
    (x, y), _ = digits
    rows = x.reshape(len(x), 64)

    class Sums(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = layers.Dense(12, activation="relu", name="hidden")
            self.out = layers.Dense(10, activation="softmax", name="out")

        def call(self, x):
            if isinstance(x, tf.RaggedTensor):
                x = x.to_tensor(shape=(None, 64))
            elif isinstance(x, tf.SparseTensor):
                x = tf.sparse.to_dense(x)
            return self.out(self.hidden(tf.reshape(x, (-1, 64))))

    given = tf.RaggedTensor.from_tensor(rows) if kind == "ragged" else tf.sparse.from_dense(rows)
    data = tf.data.Dataset.from_tensor_slices((given, y)).batch(32)
    model = compiled(Sums(), "adam")
    probes = LinearProbeCallback("hidden")
    model.fit(data, epochs=2, callbacks=[probes], verbose=0)
    assert [record.left_out for record in probes.results.refits] == [{}, {}]
    assert [record.examples for record in probes.results.refits] == [320, 320]


@pytest.mark.parametrize(
    ("batch_size", "at_once"), [(320, 1), (7, 1), (16, 64)], ids=["whole", "ragged", "execution"]
)
def test_the_sample_always_has_something(digits, monkeypatch, batch_size, at_once):
    """However large a step is beside the room that there is."""
    monkeypatch.setattr(sample, "MAX_EXAMPLES", 90)
    (x, y), validation = digits
    model = host()
    model.compile("adam", "sparse_categorical_crossentropy", steps_per_execution=at_once)
    probes = fitted(model, x, y, batch_size, 2, validation_data=validation)
    for record in probes.results.refits:
        assert 40 <= record.examples <= 90
        assert record.left_out == {}
        assert record.seconds > 0
    of_probes = probes.results.frame().query("metric in ['error', 'loss']")
    assert of_probes["certificate"].notna().all()


def test_data_that_cycle_through_their_classes(digits):
    """No class is missing among the examples that choose, or among the others."""
    (x, y), validation = digits
    order = np.argsort(y, kind="stable")
    least = np.bincount(y).min()
    order = np.stack([order[y[order] == k][:least] for k in range(10)], axis=1).ravel()
    chosen = []

    class Fit(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            (heads,) = probes._online.probes._heads()
            chosen.append(float(heads.l2.numpy().min()))

    probes = LinearProbeCallback("pool")
    model = host()
    model.fit(x[order], y[order], 10, 4, shuffle=False, callbacks=[probes, Fit()],
              validation_data=validation, verbose=0)  # fmt: skip
    assert max(chosen) < 1e-2  # with a class that only the others have, any penalty is too weak
    assert probes.results.table().loc["pool", "validation error"] < 0.65


def test_an_evaluate_within_a_fit_leaves_its_rows_and_its_sample_alone(digits, capsys):
    (x, y), validation = digits

    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch in (1, 19):  # the last one too
                self.model.evaluate(*validation, callbacks=[probes], verbose=1)

        def on_epoch_end(self, epoch, logs=None):
            self.model.evaluate(*validation, callbacks=[probes], verbose=1)

    found = []
    for others in ([], [Evaluate()]):
        keras.utils.set_random_seed(5)
        probes = LinearProbeCallback(TAPS, reduce="gap")
        history = host().fit(
            x, y, 16, 3, callbacks=[probes, *others], shuffle=False, verbose=0,
            validation_data=validation,
        ).history  # fmt: skip
        ours = {key: values for key, values in history.items() if "probe" in key}
        found.append((ours, [record.examples for record in probes.results.refits]))
    assert found[0] == found[1]
    assert "at each layer" not in capsys.readouterr().out  # the fit itself was silent


def test_a_loaded_callback_knows_certificates_and_class_frequencies(digits, tmp_path):
    (x, y), validation = digits
    model = host()
    probes = fitted(model, x, y, 16, validation_data=validation)
    model.evaluate(*validation, callbacks=[probes], verbose=0)
    probes.save(tmp_path / "probes")
    loaded = LinearProbeCallback.load(tmp_path / "probes")
    model.evaluate(*validation, callbacks=[loaded], verbose=0)
    of_test = "split == 'test'"
    expected = probes.results.frame().query(of_test).reset_index(drop=True)
    got = loaded.results.frame().query(of_test)[len(expected) :].reset_index(drop=True)
    pd.testing.assert_frame_equal(got, expected)
    assert got["certificate"].notna().all()
    assert got["majority"].notna().all()


def test_a_second_fit_on_fewer_examples_is_not_held_near_the_old_probe(digits):
    """Where all examples are in the sample, they alone decide."""
    (x, y), _ = digits
    model = host()
    model.trainable = False
    probes = LinearProbeCallback("pool", reduce="gap")
    model.fit(x, y, 16, 2, callbacks=[probes], verbose=0)
    model.fit(x[:60], 9 - y[:60], 12, 2, callbacks=[probes], verbose=0)  # other labels, and fewer
    fresh = LinearProbeCallback("pool", reduce="gap")
    model.fit(x[:60], 9 - y[:60], 12, 2, callbacks=[fresh], verbose=0)
    got, expected = (
        of.model.evaluate(x[:60], 9 - y[:60], callbacks=[of], return_dict=True, verbose=0)
        for of in (probes, fresh)
    )
    assert got["probe_loss/pool"] == pytest.approx(expected["probe_loss/pool"], abs=0.15)


@pytest.mark.parametrize(("rate", "batch_size"), [(1e-3, 16), (1e-2, 4), (1e-4, 64)])
def test_training_rows_are_sane(digits, rate, batch_size):
    """A probe that validates well does not run away between two refits."""
    (x, y), validation = digits
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, activation="relu", name="conv1"),
            layers.Conv2D(16, 3, activation="relu", name="conv2"),
            layers.Flatten(),
            layers.Dense(10, activation="softmax", name="out"),
        ]
    )
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    probes = LinearProbeCallback()
    history = model.fit(
        x, y, batch_size, 6, callbacks=[probes], validation_data=validation, verbose=0
    ).history
    for tap in probes.results.table().index:
        losses = history[f"probe_loss/{tap}"]
        assert max(losses[1:]) <= 1.2 * losses[0]
        assert losses[-1] < losses[0]
        assert history[f"probe_error/{tap}"][-1] < history[f"val_probe_error/{tap}"][-1] + 0.05


@pytest.mark.parametrize("batch_size", [16, 4])
def test_training_rows_of_averages_are_sane(digits, batch_size):
    """They rest on what hardly varies, and know of it only once the host has moved on."""
    (x, y), validation = digits
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, name="conv1"),
            layers.ReLU(),
            layers.Conv2D(64, 3, name="conv2"),
            layers.Flatten(),
            layers.Dense(10, activation="softmax", name="out"),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy")
    probes = LinearProbeCallback(["conv1", "conv2"], reduce="gap")
    history = model.fit(
        x, y, batch_size, 6, callbacks=[probes], validation_data=validation, verbose=0
    ).history
    for tap in ("conv1", "conv2"):
        assert max(history[f"probe_loss/{tap}"]) < 1.2 * np.log(10)
        assert max(history[f"val_probe_loss/{tap}"]) < 0.6 * np.log(10)


def rendered(printed):
    """The lines that a terminal shows of a text with returns and backspaces."""
    lines = []
    for line in printed.split("\n"):
        shown, at = [], 0
        for letter in line:
            if letter in "\b\r":
                at = at - 1 if letter == "\b" else 0
            else:
                shown[at : at + 1] = [letter]
                at += 1
        lines.append("".join(shown))
    return lines


def test_the_wait_at_an_epochs_end_shows_what_is_going_on(digits, capsys):
    (x, y), _ = digits
    probes = LinearProbeCallback(TAPS, reduce="gap")
    model = host()
    model.fit(x, y, callbacks=[probes], verbose=1)
    printed = capsys.readouterr().out
    assert " - refitting probes: forward pass over 320 examples" in printed
    assert " - refitting probes: 0 of 3" in printed
    assert not any("refitting" in line for line in rendered(printed))  # it is taken away again
    model.fit(x, y, callbacks=[probes], verbose=2)
    assert "refitting" not in capsys.readouterr().out


def test_a_control_tells_what_is_known_by_heart(digits, tmp_path):
    (x, y), validation = digits
    # Refitted, they would be told that nothing is to be learned.
    probes = LinearProbeCallback(["input", "pool"], baselines=["shuffled"], refit=0)
    model = host()
    history = model.fit(
        x, y, 16, 6, callbacks=[probes], validation_data=validation, verbose=0
    ).history
    for split, prefix in (("train", ""), ("validation", "val_")):
        errors = {name: history[f"{prefix}probe_{name}error/input"] for name in ("", "shuffled_")}
        table = probes.results.table()
        expected = errors["shuffled_"][-1] - errors[""][-1]
        assert table.loc["input", f"{split} selectivity"] == pytest.approx(expected)
    assert history["val_probe_shuffled_error/input"][-1] > 0.8
    assert history["probe_shuffled_error/input"][-1] < 0.8  # 64 features of 320 examples
    assert history["probe_shuffled_error/pool"][-1] > 0.75  # 6 features
    assert str(probes.results).count("by the training labels alone") == 1  # no table of its own
    of_random = probes.results.measured(split="train", baseline="shuffled")
    assert of_random["value"]["pool"] > 0.75

    probes.save(tmp_path / "probes")
    loaded = LinearProbeCallback.load(tmp_path / "probes")
    model.evaluate(*validation, callbacks=[loaded], verbose=0)
    assert {row.baseline for row in loaded.results.rows} == {None, "shuffled"}
    for baseline in (None, "shuffled"):
        got, expected = (each.weights("pool", baseline=baseline) for each in (loaded, probes))
        assert all(map(np.array_equal, got, expected))


def test_controls_of_named_targets(digits):
    (x, y), _ = digits
    probes = LinearProbeCallback(
        "pool", target={"digit": None, "odd": lambda x, y: y % 2}, num_classes={"odd": 2},
        baselines=("shuffled",),
    )  # fmt: skip
    logs = host().fit(x, y, callbacks=[probes], verbose=0).history
    names = ("digit", "digit_shuffled", "odd", "odd_shuffled")
    assert {key for key in logs if "error" in key} == {f"probe_{n}_error/pool" for n in names}
    of_random = probes.results.measured(target="odd", baseline="shuffled")
    assert of_random["chance"]["pool"] == 0.5
    assert probes.results.targets == ["digit", "odd"]
    refit = probes.refit((x, y), test=None, l2=1.0, tol=1e-2, verbose=False)
    assert {name for name, _ in refit.probes} == {"digit", "odd"}


@pytest.mark.parametrize("mode", MODES)
def test_what_the_first_weights_give_away(digits, tmp_path, mode):
    (x, y), (x_val, y_val) = digits
    keras.utils.set_random_seed(3)
    plain = host()
    keras.utils.set_random_seed(3)
    model, at_first = host(), host()
    at_first.set_weights(model.get_weights())
    probes = LinearProbeCallback(TAPS, mode=mode, baselines=["initial", "shuffled"])

    def fit(model, *callbacks):
        options = {"shuffle": False, "verbose": 0, "validation_data": (x_val, y_val)}
        return model.fit(x, y, 16, 3, callbacks=list(callbacks), **options).history

    history, alone = fit(model, probes), fit(plain)
    assert all(np.array_equal(history[key], alone[key]) for key in alone)

    def error(model, weights):
        features = keras.Model(model.inputs, model.get_layer("dense").output).predict(
            x_val, verbose=0
        )
        kernel, bias = weights
        return np.mean((features @ kernel + bias).argmax(1) != y_val)

    weights = probes.weights("dense", baseline="initial")
    assert history["val_probe_initial_error/dense"][-1] == pytest.approx(error(at_first, weights))
    assert error(model, weights) > error(at_first, weights)
    table = probes.results.table()
    for split, prefix in (("train", ""), ("validation", "val_")):
        expected = history[f"{prefix}probe_initial_error/dense"][-1]
        assert table.loc["dense", f"{split} initial"] == expected
    assert str(probes.results).count("by the training labels alone") == 1  # no table of its own

    probes.save(tmp_path / "probes")
    loaded = LinearProbeCallback.load(tmp_path / "probes")
    logs = model.evaluate(x_val, y_val, callbacks=[loaded], return_dict=True, verbose=0)
    assert logs["probe_initial_error/dense"] == history["val_probe_initial_error/dense"][-1]


class Scaling(keras.Model):
    """A step of its own, that may make something else of x before it calls the model."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.pool = layers.Flatten()
        self.dense = layers.Dense(12, activation="relu", name="dense")
        self.out = layers.Dense(10, activation="softmax", name="out")

    def call(self, x):
        return self.out(self.dense(self.pool(x)))

    def train_step(self, data):
        x, y = data
        return super().train_step((x if self.scale == 1 else self.scale * x, y))

    def test_step(self, data):
        x, y = data
        return super().test_step((x if self.scale == 1 else self.scale * x, y))


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("scale", [1, -9])
def test_a_step_that_makes_something_else_of_x_is_not_taken_for_the_host(digits, scale, eager):
    (x, y), validation = digits
    model = compiled(Scaling(scale), "adam", run_eagerly=eager)
    probes = LinearProbeCallback("dense")
    model.fit(x, y, 16, 3, callbacks=[probes], validation_data=validation, verbose=0)
    table = probes.results.table()
    assert ("certificate" in table) == (scale == 1)
    assert table.loc["dense", "validation error"] < 0.7


@pytest.mark.parametrize("eager", [False, True])
def test_what_a_mixed_policy_casts_x_to_is_still_x(digits, eager):
    """Keras casts x before `call`, so that it is another tensor than the data's."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = compiled(Scaling(1), "adam", run_eagerly=eager)
    finally:
        keras.config.set_dtype_policy("float32")
    probes = LinearProbeCallback("dense")
    model.fit(*digits[0], 16, 1, callbacks=[probes], validation_data=digits[1], verbose=0)
    assert probes.results.refits[-1].left_out == {}
    assert probes.results.table().loc["dense", "certificate"] <= 1e-2
