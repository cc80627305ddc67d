"""The newest observations and what goes with them, bounded in memory, to learn from more than once."""

import gymnasium as gym
import torch

from common.storage import put, take, zeros


class Replay:
    """A ring of `capacity` rows of {name: a tensor, or a dict of them, by its space}, allocated once.

    replay = Replay({"obs": envs.single_observation_space, "labels": envs.single_action_space}, 60_000, "cpu")
    replay.add({"obs": obs, "labels": labels})
    minibatch = replay.sample(256)
    """

    def __init__(self, spaces: dict[str, gym.Space], capacity: int, device: str | torch.device):
        self.capacity, self.device = capacity, device
        self.count = 0  # rows that were ever added
        self.rows = {name: zeros(space, (capacity,), device) for name, space in spaces.items()}

    def add(self, rows: dict):
        """rows: (n, ...) in every tensor, n at most `capacity`; they take the place of the oldest."""
        n = len(rows["labels"])
        put(self.rows, (self.count + torch.arange(n, device=self.device)) % self.capacity, rows)
        self.count += n

    def sample(self, size: int) -> dict:
        """`size` rows, drawn evenly and with replacement from those that are kept."""
        return take(self.rows, torch.randint(min(self.count, self.capacity), (size,), device=self.device))


def shifted(obs, reach: int):
    """Observations whose pictures `pixels` (batch, height, width, channels), each for itself, are moved by up to
    `reach` pixels; their borders are repeated.
    """
    if not reach:
        return obs
    pixels = obs["pixels"] if isinstance(obs, dict) else obs
    each = torch.arange(len(pixels), device=pixels.device)[:, None]
    by = torch.randint(-reach, reach + 1, (2, len(pixels), 1), device=pixels.device)
    rows, columns = (
        (torch.arange(n, device=by.device) + k).clamp(0, n - 1) for n, k in zip(pixels.shape[1:3], by, strict=True)
    )
    pixels = pixels[each[..., None], rows[:, :, None], columns[:, None, :]]
    return obs | {"pixels": pixels} if isinstance(obs, dict) else pixels
