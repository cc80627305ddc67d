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
