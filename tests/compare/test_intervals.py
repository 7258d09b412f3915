"""Intervals over seeds and records, on simulated experiments whose truth is known."""

import numpy as np
import pytest

from neftune_hf.compare.intervals import linearised_log, mean_interval

# Standard deviations of the seed effect, the record effect and the residual.
EFFECTS = {
    "seeds": (1, 0, 0.1),
    "records": (0, 1, 1),
    "both": (0.3, 1, 1),
    "a little": (0.1, 1, 0.5),
    "rest": (0, 0, 1),
}


def simulate(truth, effects, seeds=3, records=40, number=0):
    rng = np.random.default_rng(number)
    of_seed, of_record, rest = effects
    table = of_seed * rng.standard_normal((seeds, 1)) + of_record * rng.standard_normal((1, records))
    return truth + table + rest * rng.standard_normal((seeds, records))


def rate(happens, experiments=600):
    return sum(happens(number) for number in range(experiments)) / experiments


@pytest.mark.parametrize("effects", EFFECTS.values(), ids=EFFECTS)
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_intervals_cover_the_truth_at_their_rate(effects, seeds):
    if seeds == 1:
        effects = (0, *effects[1:])  # with one seed, the interval does not cover the seed effect

    def covers(number):
        interval = mean_interval(simulate(0.3, effects, seeds, number=number))
        return interval.low <= 0.3 <= interval.high

    assert 0.92 <= rate(covers) <= 1


def test_a_sum_of_two_samples_is_covered_too():
    def covers(number):
        rng = np.random.default_rng(number)
        seed = rng.standard_normal((3, 1))  # shared by both, like a model's losses on two sets of records
        interval = mean_interval(1 + seed + rng.standard_normal((3, 30)), seed + rng.standard_normal((3, 60)))
        return interval.low <= 1 <= interval.high

    assert 0.92 <= rate(covers) <= 0.98


def test_a_planted_difference_is_found_and_none_is_not():
    def found(truth):
        return rate(lambda number: mean_interval(simulate(truth, (0.02, 0.3, 0.3), number=number)).excludes_zero)

    assert found(0.5) > 0.95
    assert found(0.0) < 0.08


def test_a_ratio_of_means_is_that_of_two_tables():
    rng = np.random.default_rng(0)
    baseline = rng.lognormal(3, 0.5, (3, 50))
    values = 1.2 * baseline * rng.lognormal(0, 0.1, (3, 50))
    ratio = np.exp((linearised_log(values) - linearised_log(baseline)).mean())
    assert ratio == pytest.approx(values.mean() / baseline.mean())

    def covers(number, is_paired):
        rng = np.random.default_rng(number)
        record = rng.lognormal(3, 0.5, (1, 50))
        baseline = record * rng.lognormal(0, 0.1, (3, 50))
        record = record if is_paired else rng.lognormal(3, 0.5, (1, 50))
        values = 1.2 * record * rng.lognormal(0, 0.2, (3, 50)) / np.exp(0.02 - 0.005)
        one, other = linearised_log(values), linearised_log(baseline)
        interval = mean_interval(one - other) if is_paired else mean_interval(one, -other)
        return interval.low <= np.log(1.2) <= interval.high

    assert rate(lambda number: covers(number, is_paired=True)) >= 0.92  # more if neither seeds nor records matter
    assert rate(lambda number: covers(number, is_paired=False)) >= 0.92


def test_the_p_value_belongs_to_the_interval():
    """It is below 5 % exactly if the interval excludes 0, and uniform if there is no difference."""
    intervals = [mean_interval(simulate(0.1, (0.05, 0.3, 0.3), number=number)) for number in range(200)]
    assert [interval.p_value < 0.05 for interval in intervals] == [interval.excludes_zero for interval in intervals]
    assert any(interval.excludes_zero for interval in intervals)
    none = [mean_interval(simulate(0, (0, 0, 1), seeds=1, number=number)).p_value for number in range(600)]
    assert np.mean(np.array(none) < 0.5) == pytest.approx(0.5, abs=0.07)
    assert mean_interval(np.zeros((2, 3))).p_value == 1
    assert mean_interval(np.ones((2, 3))).p_value == 0
