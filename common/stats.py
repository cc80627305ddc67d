"""Means and rates with their 95% intervals."""

import math

import torch

# Student's t for 95% within, by degrees of freedom from 1 on, and that of many.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
T += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
Z = 1.960


def mean_ci95(values) -> tuple[float, float]:
    """Mean and half width of its 95% interval (Student's); the width is NaN for fewer than two values."""
    values = torch.as_tensor(values).detach().double().flatten()
    n = len(values)
    if n < 2:
        return (values.item() if n else math.nan), math.nan
    t = T[n - 2] if n - 2 < len(T) else Z + (Z**3 + Z) / (4 * (n - 1))  # Abramowitz and Stegun 1964, 26.7.5
    return values.mean().item(), t * values.std().item() / math.sqrt(n)


def wilson_ci95(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval (lo, hi) for a rate of which `k` of `n` were seen; (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    p = k / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half_width = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)
