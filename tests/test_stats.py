"""Intervals against figures worked out by hand or taken from tables."""

import math

import pytest
import torch

from common.stats import mean_ci95, wilson_ci95


def test_intervals():
    mean, half = mean_ci95([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(3.182 * math.sqrt(5 / 3) / 2)
    assert mean_ci95(torch.tensor([True, False]))[0] == 0.5
    assert mean_ci95([2.0])[0] == 2.0 and math.isnan(mean_ci95([2.0])[1])
    assert math.isnan(mean_ci95([])[0])
    assert wilson_ci95(0, 128) == pytest.approx((0.0, 0.02914), abs=1e-4)
    assert wilson_ci95(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson_ci95(10, 10)[1] == 1.0 and wilson_ci95(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("n", [2, 3, 5, 20, 31, 32, 33, 300])
def test_the_mean_of_few_values_lies_within_its_interval_as_often_as_of_many(n):
    """An interval of 1.96 standard errors has the mean of three seeds in it in 81% of cases."""
    samples = torch.randn(20_000, n, generator=torch.Generator().manual_seed(0))
    half = mean_ci95(samples[0])[1] / samples[0].std().item()  # of any sample, in its standard deviations
    inside = (samples.mean(1).abs() < half * samples.std(1)).double().mean().item()
    assert inside == pytest.approx(0.95, abs=0.006)  # four standard deviations
