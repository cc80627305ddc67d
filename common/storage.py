"""Observations as a tensor or a dict of tensors: allocated by space, written, selected and evaluated in chunks."""

import gymnasium as gym
import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

FOLD = 16  # steps whose observations FinalObs keeps whole before it takes the rows it needs


def zeros(space: gym.Space, shape: tuple[int, ...], device) -> torch.Tensor | dict[str, torch.Tensor]:
    """Zeros of `shape` + the space's shape and dtype; a dict for a Dict space."""
    if isinstance(space, gym.spaces.Dict):
        return {name: zeros(part, shape, device) for name, part in space.items()}
    return torch.zeros(*shape, *space.shape, dtype=getattr(torch, space.dtype.name), device=device)


def put(storage, index, value):
    """`storage[index] = value`, for dicts entry by entry."""
    if isinstance(storage, dict):
        for name, part in storage.items():
            put(part, index, value[name])
    else:
        storage[index] = value


def zeros_like(tree, num_steps: int):
    """Zeros (num_steps, ...) for every tensor of `tree`: storage of what has no space."""
    return tree_map(lambda x: x.new_zeros(num_steps, *x.shape), tree)


def take(tree, index):
    """`tree[index]`, in every tensor of a dict."""
    if isinstance(tree, dict):  # written out, as this is called for every minibatch
        return {name: take(part, index) for name, part in tree.items()}
    return tree[index]


def flatten(tree):
    """The first two dimensions of every tensor as one."""
    return tree_map(lambda x: x.flatten(0, 1), tree)


def to(tree, device):
    """Every tensor on `device`."""
    return tree_map(lambda x: x.to(device), tree)


def in_chunks(function, size: int, *trees):
    """`function(*trees)` for at most `size` rows at a time; its results (tensors, tuples, dicts) are concatenated."""
    rows = len(tree_leaves(trees)[0])
    if rows <= size:
        return function(*trees)
    chunks = [[take(tree, slice(i, i + size)) for tree in trees] for i in range(0, rows, size)]
    parts = [tree_flatten(function(*chunk)) for chunk in chunks]
    columns = zip(*(leaves for leaves, _ in parts), strict=True)
    return tree_unflatten([None if column[0] is None else torch.cat(column) for column in columns], parts[0][1])


def micro_batches(minibatch: dict, size: int) -> list[dict]:
    """`minibatch` in parts of at most `size` rows (0: whole); what has no rows, `old_std`, is in each."""
    rows = len(minibatch["logprobs"])
    if not 0 < size < rows:
        return [minibatch]
    by_row = {name: value for name, value in minibatch.items() if name != "old_std"}
    return [take(by_row, slice(i, i + size)) | {"old_std": minibatch["old_std"]} for i in range(0, rows, size)]


class FinalObs:
    """The true last observations of episodes that a time limit ended, those rows alone, in the order of time.

    Which rows they are is asked once in FOLD steps, because on a GPU the question waits for all that was queued.
    """

    def __init__(self):
        self.pending, self.rows = [], []

    def add(self, truncated: torch.Tensor, final_obs):
        """truncated: (num_envs,) bool; final_obs: (num_envs, ...), valid in those rows."""
        self.pending.append((truncated, final_obs))
        if len(self.pending) == FOLD:
            self._fold()

    def _fold(self):
        if self.pending:
            counts = torch.stack([truncated for truncated, _ in self.pending]).sum(1).tolist()
            for (truncated, final_obs), count in zip(self.pending, counts, strict=True):
                if count or not self.rows:
                    self.rows.append(take(final_obs, truncated))
        self.pending = []

    def take_all(self):
        """All rows (limits, ...), in the order of `truncations.nonzero()`. Begins anew."""
        self._fold()
        rows, self.rows = self.rows, []
        return tree_map(lambda *parts: torch.cat(parts), *rows)
