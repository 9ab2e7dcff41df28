"""Which batches of an epoch are kept."""

import numpy as np
import pytest
import tensorflow as tf

from keras_probes.sample import Sample

KIB = 1024


def batch(step, size=8):
    """Examples of 4 * 4 + 4 bytes that tell which step they are of."""
    return tf.fill((size, 4), float(step)), tf.fill((size,), step)


def kept(
    sample, steps, memory, known=True, at_once=1, size=8, ragged=None, feature_bytes=12, most=10**6
):
    """Steps whose batches are kept of an epoch."""
    sample.begin(memory, -(-steps // at_once) if known else None)
    for step in range(0, steps, at_once):
        if sample.wants(step // at_once):
            many = range(step, min(step + at_once, steps))
            sizes = [ragged if ragged and s == steps - 1 else size for s in many]
            sample.add([batch(s, n) for s, n in zip(many, sizes, strict=True)], feature_bytes, most)
    return [int(labels[0]) for _, labels in sample.batches]


def test_all_of_an_epoch_that_there_is_room_for():
    assert kept(Sample(), 10, 10 * 8 * 32) == list(range(10))
    assert kept(Sample(), 10, 10 * 8 * 32, ragged=3) == list(range(10))


def test_every_nth_step_of_a_longer_one():
    one = Sample()
    assert kept(one, 10, 5 * 8 * 32) == [0, 2, 4, 6, 8]
    assert kept(one, 11, 5 * 8 * 32) == [0, 3, 6, 9]
    assert kept(one, 16, 8 * 8 * 32, at_once=2) == [0, 1, 4, 5, 8, 9, 12, 13]
    assert kept(one, 4, 10**6) == [0, 1, 2, 3]  # each epoch anew


def test_the_last_ones_where_its_length_is_not_known():
    assert kept(Sample(), 10, 4 * 8 * 32, known=False) == [6, 7, 8, 9]


def test_features_take_of_the_room():
    assert kept(Sample(), 10, 10 * KIB, feature_bytes=KIB - 20) == [0]
    assert kept(Sample(), 10, 5 * KIB, feature_bytes=KIB - 20) == []
    assert kept(Sample(), 10, 0) == []


def test_never_more_than_are_of_use():
    assert kept(Sample(), 10, 10**9, most=16) == [0, 5]
    assert kept(Sample(), 10, 10**9, most=0) == []


@pytest.mark.parametrize("known", [True, False])
def test_the_room_is_kept_to(known):
    one = Sample()
    for steps in range(1, 40):
        kept(one, steps, 100 * 32, known=known, ragged=5)
        assert sum(len(labels) for _, labels in one.batches) <= 100
        assert np.all(np.diff([int(labels[0]) for _, labels in one.batches]) > 0)
