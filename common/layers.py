"""Layers that torch.nn has not."""

import torch
import torch.nn as nn


class NormReLU(nn.Module):
    """ReLU of features (batch, width) that are normalised over the width, without parameters."""

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)).relu()


class Residual(nn.Module):
    """IMPALA's block: what it gives is added to what it takes, (batch, channels, height, width)."""

    def __init__(self, channels: int):
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.convolutions = nn.Sequential(nn.ReLU(), first, nn.ReLU(), second)

    def forward(self, x):
        return x + self.convolutions(x)
