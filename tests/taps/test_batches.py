"""Batches come whole and in order, from whatever Keras takes."""

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

from keras_probes.taps.batches import batches_of

X, Y = np.arange(14, dtype="float32").reshape(7, 2), np.arange(7)
W = np.linspace(0, 1, 7).astype("float32")


def read(batches):
    parts = zip(*batches.dataset.as_numpy_iterator(), strict=True)
    return [np.concatenate(part) for part in parts]


@pytest.mark.parametrize("kind", [np.asarray, tf.constant], ids=["numpy", "tensor"])
def test_arrays(kind):
    batches = batches_of((kind(X), kind(Y), kind(W)), 3)
    assert batches.rows == 7
    assert batches.spec[0].shape.as_list() == [None, 2]
    for part, expected in zip(read(batches), (X, Y, W), strict=True):
        np.testing.assert_array_equal(part.reshape(expected.shape), expected)


def test_pandas():
    batches = batches_of((pd.DataFrame(X), pd.Series(Y)), 3)
    assert batches.rows == 7
    np.testing.assert_array_equal(read(batches)[0], X)


def test_a_data_set_keeps_its_batches():
    batches = batches_of(tf.data.Dataset.from_tensor_slices((X, Y)).batch(4), 3)
    assert batches.rows is None
    assert [len(x) for x, _ in batches.dataset] == [4, 3]


def test_a_torch_data_loader():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
    batches = batches_of(torch.utils.data.DataLoader(data, batch_size=3), 3)
    np.testing.assert_array_equal(read(batches)[0], X)


def test_what_keras_does_not_take():
    with pytest.raises(ValueError, match="Unrecognized data type"):
        batches_of("photos/", 3)
