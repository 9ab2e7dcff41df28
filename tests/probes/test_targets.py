"""Labels in every form, and what is said of those that are none."""

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from keras_probes.probes.resolve import Evidence, resolve_targets
from keras_probes.probes.targets import RandomTarget, Target
from keras_probes.probes.tasks import Classification
from keras_probes.probes.tasks.task import MISSING, WEIGHTLESS, WRONG

SPEC = tf.TensorSpec
X = SPEC((None, 8), "float32")
SPARSE = SPEC((None,), "int64")


def resolve(target=None, num_classes=None, y=SPARSE, outputs=None):
    outputs = SPEC((None, 4), "float32") if outputs is None else outputs
    loss = "sparse_categorical_crossentropy"
    return resolve_targets(target, num_classes, X, y, Evidence(outputs, loss))


@pytest.mark.parametrize(
    ("y", "outputs", "classes"),
    [
        (SPARSE, (None, 4), 4),
        (SPEC((None, 1), "uint8"), (None, 4), 4),
        (SPEC((None, 6), "float32"), (None, 6), 6),
        (SPEC((None, 1), "float32"), (None, 1), 2),
        (SPARSE, (None, 1), 2),
    ],
)
def test_classes_of_the_hosts_own_labels(y, outputs, classes):
    (target,) = resolve(y=y, outputs=SPEC(outputs, "float32"))
    assert target.task.outputs == classes
    assert target.name is None


def test_a_key_or_index_finds_its_output():
    y = {"a": SPARSE, "b": SPARSE}
    outputs = {"a": SPEC((None, 3), "float32"), "b": SPEC((None, 7), "float32")}
    assert resolve("b", y=y, outputs=outputs)[0].task.outputs == 7
    pair = (SPARSE, SPARSE), list(outputs.values())
    assert resolve(0, y=pair[0], outputs=pair[1])[0].task.outputs == 3


def test_numpy_integers_are_integers():
    assert resolve(num_classes=np.int64(5))[0].task.outputs == 5


def test_several_targets_at_once():
    targets = resolve(
        {"digit": None, "even": lambda x, y: 1 - y % 2, "hot": lambda x, y: tf.one_hot(y, 5)},
        {"even": 2},
    )
    assert [(t.name, t.task.outputs) for t in targets] == [("digit", 4), ("even", 2), ("hot", 5)]


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32", "bool"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_sparse_labels(dtype, shape):
    y = np.array([0, 1, 1, 0]).reshape(shape).astype(dtype)
    labels = Target(None, None, Classification(2)).labels(None, y)
    assert labels.dtype == tf.int32
    np.testing.assert_array_equal(labels, [0, 1, 1, 0])


def test_one_hot_and_smoothed_labels():
    hot = keras.utils.to_categorical([2, 0, 1], 3)
    np.testing.assert_array_equal(
        Target(None, None, Classification(3)).labels(None, hot), [2, 0, 1]
    )
    smooth = (0.9 * hot + 0.1 / 3).astype("float32")
    np.testing.assert_array_equal(
        Target(None, None, Classification(3)).labels(None, smooth), [2, 0, 1]
    )


@pytest.mark.parametrize(
    "y",
    [
        [0, 3, -1, 1.5],
        [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0.2, 0.2, 0.2]],
        [0, 7, np.nan, 2.5],
        [0, 3, 255, 256],
    ],
)
def test_what_is_no_label_is_marked(y):
    labels = np.asarray(
        Target(None, None, Classification(3, ignored=255)).labels(None, np.array(y, "float32"))
    )
    np.testing.assert_array_equal(labels, [0, WRONG, MISSING, WRONG])


def test_255_of_bytes_is_no_label():
    y = np.array([0, 2, 255], "uint8")
    (target,) = resolve_targets(None, None, X, SPEC((None,), "uint8"), Evidence(None, None, [y]))
    assert target.task == Classification(3)
    np.testing.assert_array_equal(target.labels(None, y), [0, 2, MISSING])
    np.testing.assert_array_equal(target.labels(None, y.astype("int64")), [0, 2, WRONG])


def test_labels_of_a_hinge():
    target = resolve_targets(None, None, X, SPARSE, Evidence(None, keras.losses.Hinge()))[0]
    assert target.task.outputs == 2
    np.testing.assert_array_equal(target.labels(None, np.array([-1, 1, 1])), [0, 1, 1])


@pytest.mark.parametrize(
    ("loss", "classes"),
    [
        ("sparse_categorical_crossentropy", 7),
        (keras.losses.sparse_categorical_crossentropy, 7),
        (keras.losses.CategoricalFocalCrossentropy(), 7),
        ([keras.losses.SparseCategoricalCrossentropy()], 7),
        ("binary_crossentropy", 3),
        ("mse", 3),
        (None, 3),
        (lambda y, u: u, 3),
    ],
)
def test_an_output_counts_where_the_loss_is_a_cross_entropy_over_it(loss, classes):
    outputs, at_hand = SPEC((None, 7), "float32"), [np.array([0, 2, 1, -1])]
    evidence = Evidence(outputs, loss, at_hand)
    assert resolve_targets(None, None, X, SPARSE, evidence)[0].task.outputs == classes


def test_losses_of_several_outputs():
    y = {"a": SPARSE, "b": SPARSE}
    outputs = {"a": SPEC((None, 3), "float32"), "b": SPEC((None, 7), "float32")}
    losses = {"a": "sparse_categorical_crossentropy", "b": "mse"}
    evidence = Evidence(outputs, losses, [{"a": np.array([0, 1]), "b": np.array([0, 4])}])
    assert resolve_targets("a", None, X, y, evidence)[0].task.outputs == 3
    assert resolve_targets("b", None, X, y, evidence)[0].task.outputs == 5


def test_keys_indices_and_functions_select():
    y = {"a": np.array([1, 0]), "b": np.array([0, 1])}
    np.testing.assert_array_equal(Target(None, "b", Classification(2)).labels(None, y), [0, 1])
    np.testing.assert_array_equal(
        Target(None, 1, Classification(2)).labels(None, (y["a"], y["b"])), [0, 1]
    )
    made = Target(None, lambda x, y: x[:, 0] + y["a"], Classification(3)).labels(
        np.array([[1], [2]]), y
    )
    np.testing.assert_array_equal(made, [2, 2])


def weights_of(target, given, y=(0, 1)):
    return target.labels_and_weights(None, np.array(y), given)[1]


@pytest.mark.parametrize("given", [None, np.array([2.0, 3.0]), np.array([[2.0], [3.0]])])
def test_sample_weights(given):
    weights = weights_of(Target(None, None, Classification(2)), given)
    assert weights.dtype == tf.float32
    np.testing.assert_array_equal(weights, [1, 1] if given is None else [2, 3])


def test_sample_weights_of_several_outputs():
    given = {"a": np.array([2.0, 3.0]), "b": np.array([4.0, 5.0])}
    y = {"b": np.array([0, 1])}
    found = Target(None, "b", Classification(2)).labels_and_weights(None, y, given)[1]
    np.testing.assert_array_equal(found, [4, 5])
    np.testing.assert_array_equal(
        weights_of(Target("n", lambda x, y: y, Classification(2)), given), [1, 1]
    )


def test_sample_weights_of_another_shape_are_the_hosts_own():
    np.testing.assert_array_equal(
        weights_of(Target(None, None, Classification(2)), np.ones((2, 5)) * 3), [1, 1]
    )
    last = Target(None, None, Classification(2), weigh=lambda x, y, w: w[:, -1])
    np.testing.assert_array_equal(weights_of(last, np.array([[3, 1.0], [3, 2.0]])), [1, 2])


def test_an_example_without_weight_is_left_out():
    given = np.array([0.0, 2.0, 0.0])
    labels, _ = Target(None, None, Classification(2)).labels_and_weights(
        None, np.array([1, 1, -1]), given
    )
    np.testing.assert_array_equal(labels, [WEIGHTLESS, 1, WEIGHTLESS])


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"y": None}, ValueError, ["Probes need labels", "target="]),
        ({"y": SPEC((None, 5, 4), "int32")}, ValueError, ["(None, 5, 4)", "one at each position"]),
        ({"y": SPEC((None, 3), "float32"), "num_classes": 5}, ValueError, ["(batch, 5)"]),
        ({"num_classes": 1}, ValueError, ["at least 2 classes", "1"]),
        ({"num_classes": 2.0}, ValueError, ["integer", "2.0"]),
        ({"y": {"a": SPARSE}}, ValueError, ["dict with the keys 'a'", "target="]),
        ({"y": (SPARSE, SPARSE)}, ValueError, ["tuple of 2", "target=0"]),
        ({"y": {"a": SPARSE}, "target": "b"}, ValueError, ["'b'", "keys 'a'"]),
        ({"target": lambda x, y: y % 2}, ValueError, ["is not known", "num_classes="]),
        ({"target": 1.5}, TypeError, ["Expected `target`", "1.5"]),
        ({"target": {}}, ValueError, ["names of targets"]),
        ({"target": {"": None}}, ValueError, ["names of targets"]),
        ({"outputs": SPEC((None, 5, 5, 3), "float32")}, ValueError, ["is not known"]),
        ({"target": {"z": lambda x, y: y}, "num_classes": {"q": 3}}, ValueError, ["'z'", "'q'"]),
        ({"num_classes": {"typo": 3}}, ValueError, ["names of targets", "'typo'"]),
        ({"target": lambda x, y: 1 / 0}, ValueError, ["target= fails", "ZeroDivisionError"]),
        ({"target": lambda x: x}, ValueError, ["target= fails", "TensorFlow or keras.ops"]),
        ({"target": lambda x, y: (y, y)}, ValueError, ["one array of labels", "tuple"]),
        (
            {"target": lambda x, y: tf.as_string(y), "num_classes": 3},
            ValueError,
            ["to be numbers", "string", "StringLookup"],
        ),
    ],
)
def test_errors_say_what_to_do(options, error, parts):
    with pytest.raises(error) as raised:
        resolve(**options)
    for part in parts:
        assert part in str(raised.value)


def test_random_labels_are_those_of_the_example_whatever_computes_them():
    x = np.random.default_rng(0).normal(size=(500, 5, 4)).astype("float32")
    y = np.zeros(500)
    target = RandomTarget(None, None, Classification(7))
    whole = target.labels(tf.constant(x), y).numpy()
    assert target.labels(tf.constant(x[13:14]), y[:1]).numpy() == whole[13]
    for jit in (False, True):
        compiled = tf.function(lambda part: target.labels(part, y[:100]), jit_compile=jit)
        np.testing.assert_array_equal(compiled(tf.constant(x[40:140])), whole[40:140])
    # As likely each, and nothing to do with an example that looks almost the same.
    assert scipy.stats.chisquare(np.bincount(whole, minlength=7)).pvalue > 0.01
    moved = target.labels(tf.constant(np.nextafter(x, np.float32(9))), y).numpy()
    assert 0.05 < np.mean(moved == whole) < 0.25


def test_an_example_without_a_label_has_no_random_one():
    target = RandomTarget(None, None, Classification(3, ignored=1))
    labels = target.labels(tf.zeros((4, 2)), np.array([0, 1, -1, 2])).numpy()
    np.testing.assert_array_equal(labels < 0, [False, True, True, False])


def test_random_labels_of_several_inputs_tokens_and_strings():
    a = tf.constant(np.arange(200)[:, None])
    b = tf.cast(a, "float32") / 7
    target, y = RandomTarget(None, None, Classification(3)), np.zeros(200)
    both = target.labels({"a": a, "b": b}, y).numpy()
    assert set(both) == {0, 1, 2}
    assert 0.2 < np.mean(both == target.labels({"a": a[::-1], "b": b}, y).numpy()) < 0.5
    with pytest.raises(ValueError, match=r"strings.*baselines="):
        target.labels(tf.constant(["a", "b"]), y[:2])
