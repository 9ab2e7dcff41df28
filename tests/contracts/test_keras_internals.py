"""What the package relies on in Keras, so that a new version that breaks it is noticed here."""

import keras
import numpy as np
import pytest
from hosts import compiled, dense_net

from keras_probes.capture.keras_run import labels_at_hand


class Order(keras.callbacks.Callback):
    """Records when Keras calls what."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def on_train_begin(self, logs=None):
        assert callable(self.model.train_function)
        self.wrap("train_function")

    def on_test_begin(self, logs=None):
        assert callable(self.model.test_function)
        self.wrap("test_function")

    def on_train_batch_begin(self, batch, logs=None):
        self.calls.append("train_batch_begin")

    def on_test_batch_begin(self, batch, logs=None):
        self.calls.append("test_batch_begin")

    def on_epoch_end(self, epoch, logs=None):
        self.calls.append("epoch_end")

    def wrap(self, name):
        plain = getattr(self.model, name)

        def wrapped(iterator):
            assert iterator.element_spec is not None
            self.calls.append(name)
            self.returned = plain(iterator)
            return self.returned

        setattr(self.model, name, wrapped)
        logs = type(self.model)._get_metrics_result_or_logs

        def epoch_logs(given):
            assert given is self.returned
            self.calls.append("epoch_logs")
            return logs(self.model, given)

        vars(self.model)["_get_metrics_result_or_logs"] = epoch_logs


def test_the_order_of_calls(digits):
    (x, y), validation = digits
    order = Order()
    compiled(dense_net()).fit(
        x, y, batch_size=160, validation_data=validation, callbacks=[order], verbose=0,
        validation_batch_size=160,
    )  # fmt: skip
    assert order.calls == [
        *["train_batch_begin", "train_function"] * 2,
        "epoch_logs",
        *["test_batch_begin", "test_function"],
        "epoch_logs",
        "epoch_end",
    ]


def test_an_instance_attribute_call_is_honoured():
    layer = keras.layers.Dense(2)
    layer(np.ones((1, 3), "float32"))
    seen, original = [], layer.call

    def call(inputs):
        seen.append(1)
        return original(inputs)

    vars(layer)["call"] = call
    layer(np.ones((1, 3), "float32"))
    assert seen == [1]
    assert layer.get_config() == keras.layers.Dense.from_config(layer.get_config()).get_config()


def test_a_stateless_scope_takes_assignments_upon_itself():
    norm = keras.layers.BatchNormalization()
    norm(np.ones((1, 3), "float32"))
    before = norm.moving_mean.numpy()
    with keras.StatelessScope():
        norm(np.full((4, 3), 9.0, "float32"), training=True)
    np.testing.assert_array_equal(norm.moving_mean.numpy(), before)


class FindLabels(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        self.found = list(labels_at_hand(self.model).values())


@pytest.mark.parametrize("split", [False, True])
def test_the_labels_of_a_fit_are_in_its_frame(digits, split):
    (x, y), (x_val, y_val) = digits
    find, model = FindLabels(), compiled(dense_net())
    weights = np.arange(len(y))
    given = {"validation_split": 0.25} if split else {"validation_data": (x_val, y_val)}
    model.fit(x, y, sample_weight=weights, callbacks=[find], verbose=0, **given)
    cut = len(y) * 3 // 4 if split else len(y)
    (labels, of_labels), (validation, of_validation) = find.found
    np.testing.assert_array_equal(labels, y[:cut])
    np.testing.assert_array_equal(of_labels, weights[:cut])
    np.testing.assert_array_equal(validation, y[cut:] if split else y_val)
    if split:
        np.testing.assert_array_equal(of_validation, weights[cut:])
    else:
        assert of_validation is None


def test_an_optimizer_adds_gradients_up_over_replicas_in_one_place():
    optimizer, variable = keras.optimizers.SGD(1.0), keras.Variable([1.0])
    optimizer.build([variable])
    seen = []
    optimizer._all_reduce_sum_gradients = lambda pairs: seen.append(pairs) or pairs
    optimizer.apply([keras.ops.ones(1)], [variable])
    assert len(seen) == 1
    assert float(variable.numpy()[0]) == 0.0


def test_a_quantized_layer_is_called_by_another_name():
    layer = keras.layers.Dense(4)
    layer.build((None, 8))
    layer.quantize("int8")
    vars(layer)["quantized_call"] = lambda x, **kwargs: "quantized"
    assert layer.quantization_mode == "int8"
    assert layer(np.zeros((1, 8), "float32")) == "quantized"


def test_a_mask_is_an_attribute_of_its_tensor():
    """A reduction reads it there, and gets it from there."""
    embedded = keras.layers.Embedding(3, 2, mask_zero=True)(np.array([[1, 0]]))
    np.testing.assert_array_equal(embedded._keras_mask, [[True, False]])
    steps = keras.ops.convert_to_tensor([[[1.0], [3.0]]])
    steps._keras_mask = keras.ops.convert_to_tensor([[True, False]])
    np.testing.assert_array_equal(keras.layers.GlobalAveragePooling1D()(steps), [[1.0]])


def test_a_model_without_a_call_has_that_of_its_base():
    """By this the package knows that there is no forward pass to probe."""

    class Host(keras.Model):
        pass

    assert Host.call is keras.Model.call
    assert keras.Sequential.call is not keras.Model.call
    inputs = keras.Input((2,))
    assert type(keras.Model(inputs, inputs)).call is not keras.Model.call
