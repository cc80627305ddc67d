"""Means of what happens many times between two log lines, kept on the device until they are read."""

import torch
import torch.distributed as dist

FOLD = 64  # entries that are kept as they come before they are summed up in one go


class Meter:
    """Means by name over all entries, on all ranks.

    episodes.add({"charts/episodic_return": returns}, info["_episode"])
    episodes.means()
    """

    def __init__(self):
        self.sums, self.pending, self.num_pending = {}, {}, 0

    def add(self, values: dict[str, torch.Tensor | float], where: torch.Tensor | None = None):
        """values: scalars, or tensors (n,) of which the rows `where` (n,) bool count."""
        self.pending.setdefault(tuple(values), []).append((values, where))
        self.num_pending += 1
        if self.num_pending == FOLD:
            self._fold()

    def _fold(self):
        for names, entries in self.pending.items():
            table = torch.stack([torch.stack([torch.as_tensor(e[n]) for e, _ in entries]).float() for n in names])
            if entries[0][1] is not None:
                where = torch.stack([where for _, where in entries])
                total = torch.where(where, table, 0.0).flatten(1).sum(1)
                count = where.sum()
            else:
                total = table.sum(1)
                count = torch.full((), len(entries), device=table.device)
            total = torch.cat((total, count[None])).double()
            self.sums[names] = self.sums[names] + total if names in self.sums else total
        self.pending, self.num_pending = {}, 0

    def means(self, over_ranks: bool = True) -> dict[str, torch.Tensor]:
        """{name: mean}, without the names of which nothing counted. Begins anew. With `over_ranks` all ranks must call
        it and have the same names.
        """
        self._fold()
        found = {}
        for names, total in self.sums.items():
            if over_ranks and dist.is_initialized():
                dist.all_reduce(total)
            if total[-1] > 0:
                found |= dict(zip(names, total[:-1] / total[-1], strict=True))
        self.sums = {}
        return found


def episode_metrics(info: dict) -> dict[str, torch.Tensor]:
    """The entries (num_envs,) of `info["episode"]` under the names of the log."""
    names = {"r": "charts/episodic_return", "l": "charts/episodic_length"}
    return {names.get(key, f"env/{key}"): value for key, value in info["episode"].items()}
