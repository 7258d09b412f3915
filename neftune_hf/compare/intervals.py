"""Confidence intervals over training seeds and evaluation records together."""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """An estimate with its confidence interval.

    Attributes:
        estimate, low, high: In the unit of the data.
        p_value: Of the two-sided test that the truth is 0, by the same t distribution as the interval.
    """

    estimate: float
    low: float
    high: float
    p_value: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def mean_interval(*samples: np.ndarray, confidence: float = 0.95) -> Interval:
    """The sum of the means of `samples`, with an interval over seeds and records.

    Each sample is a table of shape (seeds, records) with the same records for every seed. A value is the sum of four
    terms: the mean, a seed effect, a record effect, and a residual. Both effects are random, so the variance of the
    table's mean is

        var(seed effect) / seeds + var(record effect) / records + var(residual) / (seeds * records),

    estimated by a two-way analysis of variance. The interval uses a t distribution with Satterthwaite's degrees of
    freedom. A bootstrap over three seeds would be too narrow: on data with a seed effect alone it covers the truth in
    3 of 4 experiments instead of 19 of 20.

    With one seed the seed effect is unknown, and the interval is over records alone.

    Args:
        *samples (`np.ndarray` of shape `(seeds, records)`): All with the same seeds; their records may differ.
        confidence (`float`): The probability that the interval covers the truth.

    Example:

    ```python
    >>> import numpy as np
    >>> from neftune_hf.compare.intervals import mean_interval
    >>> mean_interval(np.array([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]])).estimate
    2.0
    ```
    """
    tables = [np.asarray(sample, dtype=np.float64) for sample in samples]
    estimate = float(sum(table.mean() for table in tables))
    terms = _mean_squares(tables)
    variance = _variance(terms)
    if variance == 0:
        return Interval(estimate, estimate, estimate, float(estimate == 0))
    freedom = variance**2 / sum(value**2 / degrees for value, degrees in terms)
    error = math.sqrt(variance)
    half = stats.t.ppf((1 + confidence) / 2, freedom) * error
    p_value = 2 * stats.t.sf(abs(estimate) / error, freedom)
    return Interval(estimate, float(estimate - half), float(estimate + half), float(p_value))


def linearised_log(values: np.ndarray) -> np.ndarray:
    """A table whose mean is log(mean of `values`), for [`mean_interval`]; differences of two are for their ratio.

    By the delta method, each element is its first-order contribution, so the records stay paired.

    Args:
        values (`np.ndarray` of shape `(seeds, records)`): Positive on average.
    """
    mean = values.mean()
    return math.log(mean) + values / mean - 1


def _mean_squares(tables: list[np.ndarray]) -> list[tuple[float, int]]:
    """Terms of the variance of the sum of the means, with degrees of freedom; the residual terms are negative."""
    seeds, terms = tables[0].shape[0], []
    for table in tables:
        records = table.shape[1]
        by_record = table.mean(axis=0)
        terms.append((by_record.var(ddof=1) / records, records - 1))
        if seeds > 1:
            rest = table - by_record - table.mean(axis=1, keepdims=True) + table.mean()
            degrees = (seeds - 1) * (records - 1)
            terms.append((-(rest**2).sum() / degrees / (seeds * records), degrees))
    if seeds > 1:
        by_seed = sum(table.mean(axis=1) for table in tables)
        terms.insert(1, (np.var(by_seed, ddof=1) / seeds, seeds - 1))
    return terms


def _variance(terms: list[tuple[float, int]]) -> float:
    """The sum of the terms, but at least the largest one, because the estimate can be negative."""
    return float(max(sum(value for value, _ in terms), *(value for value, _ in terms)))
