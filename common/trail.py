"""A memory for policies that have none: how something observed has changed within the episode."""

import torch

FIRST_AGE = 4  # steps; what lies nearer is in velocities


class Trail:
    """Of vectors (num_envs, width), one per step, `stack` appends to the newest how much its `columns` differ from what
    they were 4, 8, 16, ... steps ago, `ages` times; where the episode is younger, from its first ones.
    """

    def __init__(self, num_envs: int, columns: slice, ages: int, device):
        self.columns = columns
        steps = [FIRST_AGE * 2**i for i in range(ages)]
        length = max(steps, default=0) + 1
        self.frames = torch.zeros(num_envs, length, columns.stop - columns.start, device=device)  # newest last
        self._older = length - 1 - torch.tensor(steps, dtype=torch.long, device=device)

    def stack(self, vector: torch.Tensor, begun: torch.Tensor | None = None) -> torch.Tensor:
        """(num_envs, width + ages * columns). `vector` is that of a step later than the last one; or, with `begun`
        (num_envs,) bool, the first of an episode where that is true, and elsewhere the same once more.
        """
        newest = vector[:, None, self.columns]
        if begun is None:
            self.frames = torch.cat((self.frames[:, 1:], newest), 1)
        else:
            self.frames = torch.where(begun[:, None, None], newest, self.frames)
        changes = newest - self.frames.index_select(1, self._older)
        return torch.cat((vector, changes.flatten(1)), 1)
