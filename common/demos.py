"""Demonstrations of a scripted expert, and the ranges of what they hold."""

import torch
from torch.utils._pytree import tree_map

from common.cli import check
from common.storage import take, to


def collect(envs, expert, number: int, noise: float = 0.0, interrupt=False) -> dict:
    """{"obs": what `envs` observes, "actions": (n, *action)} of `number` successful episodes, on the CPU.

    expert: `expert(envs)` gives the actions, which are kept as they are. What is executed has Gaussian noise of
    standard deviation `noise`, the same for all of a chunk, so that it is seen how the expert corrects mistakes (Laskey
    et al. 2017, arXiv 1703.09327). The environments are reset first. Fewer where `interrupt` becomes true.
    """
    obs, _ = envs.reset()
    steps, kept = [], []
    begun = [0] * envs.num_envs  # the step with which each environment's episode began
    episodes = tried = 0
    while episodes < number and not (interrupt and kept):
        actions = expert(envs)
        steps.append({"obs": to(obs, "cpu"), "actions": actions.cpu()})
        obs, _, _, _, info = envs.step(actions + noise * torch.randn_like(actions[:, :1]))
        success = info["episode"]["success"].cpu() > 0
        for i in info["_episode"].cpu().nonzero().flatten().tolist():
            tried += 1
            if success[i] and episodes < number:
                episodes += 1
                kept += [take(step, slice(i, i + 1)) for step in steps[begun[i] :]]
            begun[i] = len(steps)
        check(episodes or tried < 200, "--demos: the scripted expert has solved none of 200 episodes of this task")
    demos = tree_map(lambda *parts: torch.cat(parts), *kept)
    print(f"{episodes} demonstrations, {len(demos['actions'])} actions, of {tried} episodes of the expert", flush=True)
    return demos


def ranges(demos: dict, still: float = 0.1) -> dict:
    """{"state": (2, state_dim), "action": (2, action_dim)}: the least and the greatest of each component; of one of the
    action that moves less than `still`, -1 and 1.
    """
    actions = demos["actions"].flatten(0, -2)
    found = {"state": demos["obs"]["state"].aminmax(dim=0), "action": actions.aminmax(dim=0)}
    found = {name: torch.stack((ends.min, ends.max)) for name, ends in found.items()}
    moves = found["action"][1] - found["action"][0] >= still
    found["action"] = torch.where(moves, found["action"], torch.tensor([[-1.0], [1.0]]))
    return found
