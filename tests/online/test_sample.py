"""Which batches of an epoch are kept."""

import numpy as np
import pytest
import tensorflow as tf

from keras_probes.online import sample as sampling
from keras_probes.online.sample import Sample


def batch(step, size=8):
    """Examples of 4 * 4 + 4 bytes that tell which step they are of."""
    return tf.fill((size, 4), float(step)), tf.fill((size,), step)


def kept(steps, *, at_once=1, sizes=8, feature_bytes=12, stride=1, seed=0):
    """A sample of an epoch."""
    sample = Sample(seed)
    sample.begin(0)
    sample.stride = stride
    for step in range(0, steps, at_once):
        if sample.wants(step // at_once):
            many = range(step, min(step + at_once, steps))
            batches = [batch(s, sizes if isinstance(sizes, int) else sizes[s]) for s in many]
            sample.add(step // at_once, batches, feature_bytes)
    return sample


def steps_of(batches):
    return sorted(int(labels[0]) for _, labels in batches)


@pytest.fixture
def room(monkeypatch):
    def limit(examples=10**6, size=10**9):
        monkeypatch.setattr(sampling, "MAX_EXAMPLES", examples)
        monkeypatch.setattr(sampling, "MAX_BYTES", size)

    return limit


def test_all_of_an_epoch_that_there_is_room_for(room):
    room(examples=80)
    sample = kept(10)
    assert len(sample) == 80
    assert steps_of(sample.drawn(80)) == list(range(10))


def test_spread_over_a_longer_one_whatever_its_length(room):
    room(examples=40)
    assert steps_of(kept(11).drawn(40)) == [0, 4, 8]
    assert steps_of(kept(10).drawn(40)) == [0, 2, 4, 6, 8]
    assert steps_of(kept(1000).drawn(40)) == [0, 256, 512, 768]
    assert steps_of(kept(10, stride=3).drawn(40)) == [0, 3, 6, 9]
    assert steps_of(kept(16, at_once=2).drawn(40)) == [0, 1, 8, 9]


def test_bytes_count_of_the_batches_as_they_come_and_of_features(room):
    room(size=10 * 8 * 32)
    assert len(kept(10)) == 80
    assert len(kept(10, feature_bytes=44)) == 40
    growing = kept(8, sizes=[2, 4, 8, 16, 16, 16, 16, 16])
    assert 8 < len(growing) * 32 <= 10 * 8 * 32


def test_a_step_that_is_too_large_is_cut(room):
    room(examples=5)
    assert len(kept(3)) == 5
    assert len(kept(8, at_once=4)) == 5
    room(size=33)
    assert len(kept(3)) == 1
    room(size=1)
    assert len(kept(3)) == 1


def test_the_room_is_kept_to_and_never_much_less_is_used(room):
    room(examples=100)
    for steps in range(1, 60):
        sample = kept(steps, sizes=[8] * (steps - 1) + [5])
        assert min(45, 8 * steps - 3) <= len(sample) <= 100


def test_what_is_drawn_is_drawn_by_seed(room):
    room()
    one, same, other = (kept(20, seed=seed) for seed in (1, 1, 2))
    assert steps_of(one.drawn(40)) == steps_of(same.drawn(40))
    assert steps_of(one.drawn(40)) != steps_of(other.drawn(40))
    batches = one.drawn(43)
    assert sum(len(labels) for _, labels in batches) == 43
    assert len(np.unique(steps_of(batches))) == 6
