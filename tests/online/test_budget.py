"""What probes may cost: by hand."""

import pytest

from keras_probes.online import budget
from keras_probes.online.budget import Costs

SMALL = Costs(work=10**6, passes=1, sizes=[(1000, 10)] * 10)
LARGE = Costs(work=10**9, passes=1, sizes=[(1000, 10)] * 10)


def test_probes_take_part_in_every_step_of_a_large_host_and_in_few_of_a_small_one():
    assert LARGE.every(1, 64, steps=10_000) == 1
    assert SMALL.every(1, 64, steps=10_000) == budget.MAX_EVERY
    # 10,000 features of 64 examples, and 100,100 parameters, for a twentieth of three passes.
    costs = Costs(work=3 * 10**7, passes=1, sizes=SMALL.sizes)
    step = budget.STEP_COST * 10_000 * 64 + budget.PARAMETER_COST * 100_100 + budget.STEP_CALLS
    assert costs.every(1, 64, steps=10**6) == -(-step // (0.05 * 3 * 3 * 10**7 * 64)) == 3


def test_a_short_epoch_costs_little_whatever_its_share():
    assert SMALL.every(1, 32, steps=3) == 1
    assert SMALL.every(1, 32, steps=10**6) == budget.MAX_EVERY
    assert SMALL.every(1, 32, steps=None) == 1


def test_parameters_count_a_batch_and_not_an_example():
    many = Costs(work=10**8, passes=1, sizes=[(1000, 1000)] * 10)
    assert many.every(1, 8, steps=10**6) > many.every(1, 64, steps=10**6)
    assert many.every(8, 64, steps=10**6) == many.every(1, 8, steps=10**6)


@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
def test_a_refit_costs_no_more_than_its_share(share):
    for costs in (LARGE, Costs(work=10**8, passes=2, sizes=[(500, 100)] * 4)):
        n, passes = costs.refit(share, 10_000, 10_000)
        once = costs.work * costs.passes + sum(
            budget.prepare_cost(features) for features, _ in costs.sizes
        )
        a_pass = sum(budget.pass_cost(n, *size) for size in costs.sizes)
        assert n * once + passes * a_pass <= share * 3 * costs.work * 10_000
        assert passes >= budget.PASSES


def test_a_refit_takes_no_more_examples_than_there_are():
    assert LARGE.refit(1e3, 10_000, 300)[0] == 300
    assert SMALL.refit(1e-9, 300, 300)[0] > 100  # a small host is worth its while
    assert Costs(work=10**13, passes=1, sizes=[(10, 2)]).refit(1e-9, 300, 300)[0] == 2
