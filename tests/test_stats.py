"""Intervals against figures worked out by hand or taken from tables."""

import math

import pytest
import torch

from common.stats import mean_ci95, wilson_ci95


def test_intervals():
    mean, half = mean_ci95([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(1.96 * math.sqrt(5 / 3) / 2)
    assert mean_ci95(torch.tensor([True, False]))[0] == 0.5
    assert mean_ci95([2.0])[0] == 2.0 and math.isnan(mean_ci95([2.0])[1])
    assert math.isnan(mean_ci95([])[0])
    assert wilson_ci95(0, 128) == pytest.approx((0.0, 0.02914), abs=1e-4)
    assert wilson_ci95(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson_ci95(10, 10)[1] == 1.0 and wilson_ci95(0, 0) == (0.0, 1.0)
