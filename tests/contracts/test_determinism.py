"""Promise 5: same seeds, same data, same machine: same results, bit for bit."""

import numpy as np
import pandas as pd
import pytest
from hosts import MODES, compiled, convnet

from keras_probes import LinearProbeCallback


@pytest.mark.parametrize("mode", MODES)
def test_two_runs_are_the_same_bit_for_bit(digits, mode):
    (x, y), validation = digits
    runs = []
    for _ in range(2):
        probes = LinearProbeCallback(["conv", "dense"], reduce={"conv": "random"}, mode=mode)
        compiled(convnet()).fit(
            x, y, epochs=2, validation_data=validation, callbacks=[probes], verbose=0
        )
        runs.append((probes.results.frame(), [probes.weights(t.name) for t in probes.results.taps]))
    pd.testing.assert_frame_equal(runs[0][0], runs[1][0], check_exact=True)
    for (W1, b1), (W2, b2) in zip(runs[0][1], runs[1][1], strict=True):
        np.testing.assert_array_equal(W1, W2)
        np.testing.assert_array_equal(b1, b2)
