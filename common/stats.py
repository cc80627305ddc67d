"""Means and rates with their 95% intervals."""

import math

import torch


def mean_ci95(values) -> tuple[float, float]:
    """Mean and half width of its 95% interval (normal approximation); the width is NaN for fewer than two values."""
    values = torch.as_tensor(values).detach().double().flatten()
    if len(values) == 0:
        return math.nan, math.nan
    half_width = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), half_width


def wilson_ci95(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval (lo, hi) for a rate of which `k` of `n` were seen; (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = 1.96
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
