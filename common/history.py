"""A memory for policies that have none: the newest observation beside older ones of the same episode."""

import torch


class History:
    """Vectors (num_envs, width) of the last steps, of which `stack` gives the newest and those 1, 2, 4, ... steps
    before it; where the episode is younger, its first one.
    """

    def __init__(self, num_envs: int, width: int, length: int, device):
        ages = [2**i for i in reversed(range(length - 1))] + [0]
        self.frames = torch.zeros(num_envs, ages[0] + 1, width, device=device)  # oldest first
        self._kept = ages[0] - torch.tensor(ages, device=device)

    def stack(self, vector: torch.Tensor, begun: torch.Tensor | None = None) -> torch.Tensor:
        """(num_envs, length * width), newest last. `vector` is that of a step later than the last one; or, with
        `begun` (num_envs,) bool, the first of an episode where that is true, and elsewhere not read.
        """
        if begun is None:
            self.frames = torch.cat((self.frames[:, 1:], vector[:, None]), 1)
        else:
            self.frames = torch.where(begun[:, None, None], vector[:, None], self.frames)
        return self.frames.index_select(1, self._kept).flatten(1)
