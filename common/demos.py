"""The warm start: demonstrations of a scripted expert, the ranges of what they hold, and updates that clone them."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map

from common import cli, distributed
from common.flat_adam import FlatAdam
from common.meter import Meter
from common.storage import take, to


@dataclass
class DemosConfig:
    """The flags of the warm start."""

    demos: int = 0  # successful episodes of the scripted expert that are cloned first (0: no warm start)
    demo_noise: float = 0.0  # standard deviation of noise on what the expert does, but not on what is cloned
    bc_steps: int = 400  # updates of that warm start
    bc_batch: int = 64  # chunks in each of them
    bc_learning_rate: float = 2e-3  # Adam's step size in the warm start, after 50 updates; it falls to a tenth


def check(args: DemosConfig):
    """The ranges of the flags."""
    for name in ("bc_steps", "bc_batch", "bc_learning_rate"):
        cli.check_flag(args, getattr(args, name) > 0, name, "a number above 0")
    for name in ("demos", "demo_noise"):
        cli.check_flag(args, getattr(args, name) >= 0, name, "0 or a number above it")


def wanted(network, args, envs, expert) -> bool:
    """Whether `expert` is to be cloned: with --demos, unless the model has learned the task.

    `network` gets the ranges of states and actions that --model has or, without any and without an expert (None), those
    of random steps.
    """
    known = network.read_ranges(args.model, args.embodiment)
    if known.get("task") == args.env_id:
        print(f"{args.model} has learned {args.env_id} already, so there is no warm start", flush=True)
        return False
    if not args.demos and not known:
        lacks = f"--model got {args.model!r}, which has no statistics of states and actions"
        cli.check(expert is None, f"{lacks}; give --demos N, from which they are taken")
        network.set_ranges(**ranges(to(wander(envs), envs.device)))
    return args.demos > 0


def collect(envs, expert, number: int, noise: float = 0.0, interrupt=False) -> dict:
    """{"obs": what `envs` observes, "actions": (n, *action)} of `number` successful episodes, on the CPU.

    expert: `expert(envs)` gives the actions, (num_envs, chunk, action_dim) or (num_envs, action_dim), which are kept as
    they are. What is executed has Gaussian noise of standard deviation `noise`, the same for all of a chunk, so that it
    is seen how the expert corrects mistakes (Laskey et al. 2017, arXiv 1703.09327). The environments are reset first.
    Fewer where `interrupt` becomes true.
    """
    obs, _ = envs.reset()
    steps, kept = [], []
    begun = [0] * envs.num_envs  # the step with which each environment's episode began
    episodes = tried = 0
    while episodes < number and not (interrupt and kept):
        actions = expert(envs)
        steps.append({"obs": to(obs, "cpu"), "actions": actions.cpu()})
        drawn = torch.randn_like(actions[:, :1] if actions.dim() == 3 else actions)
        obs, _, _, _, info = envs.step(actions + noise * drawn)
        success = info["episode"]["success"].cpu() > 0
        for i in info["_episode"].cpu().nonzero().flatten().tolist():
            tried += 1
            if success[i] and episodes < number:
                episodes += 1
                kept += [take(step, slice(i, i + 1)) for step in steps[begun[i] :]]
            begun[i] = len(steps)
        cli.check(episodes or tried < 200, "--demos: the scripted expert has solved none of 200 episodes of this task")
    demos = tree_map(lambda *parts: torch.cat(parts), *kept)
    print(f"{episodes} demonstrations, {len(demos['actions'])} actions, of {tried} episodes of the expert", flush=True)
    return demos


def wander(envs, steps: int = 64) -> dict:
    """{"obs", "actions"} as of `collect`, of `steps` steps of uniformly random actions, from a reset."""
    obs, _ = envs.reset()
    kept = []
    for _ in range(steps):
        actions = 2 * torch.rand(envs.action_space.shape, device=envs.device) - 1
        kept.append(to({"obs": obs, "actions": actions}, "cpu"))
        obs, *_ = envs.step(actions)
    return tree_map(lambda *parts: torch.cat(parts), *kept)


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


def clone(loss_of: Callable[[dict], torch.Tensor], parameters, demos: dict, args, interrupt=False):
    """`args.bc_steps` updates of `parameters` by `loss_of(minibatch)`, of `demos` on the device that computes, all
    ranks together. Fewer where `interrupt` becomes true.
    """
    device = demos["actions"].device
    learning_rate = torch.tensor(args.bc_learning_rate, device=device)
    optimizer = FlatAdam(parameters, learning_rate)
    size = max(1, args.bc_batch // args.ranks)
    meter, said = Meter(), time.time()
    for step in range(args.bc_steps):
        fall = 0.55 + 0.45 * math.cos(math.pi * step / args.bc_steps)
        learning_rate.fill_(args.bc_learning_rate * fall * min(1, (step + 1) / 50))
        loss = loss_of(take(demos, torch.randint(len(demos["actions"]), (size,), device=device)))
        optimizer.compute_gradients(loss)
        optimizer.all_reduce()
        optimizer.clip_gradients(args.max_grad_norm)
        optimizer.step()
        meter.add({"loss": loss.detach()})
        if distributed.any_rank(time.time() - said > 15 or step + 1 == args.bc_steps, device):
            said = time.time()
            found = {name: round(value.item(), 4) for name, value in meter.means().items()}
            if os.environ.get("RANK", "0") == "0":
                print(f"warm start, {step + 1} of {args.bc_steps} updates: {found}", flush=True)
        if distributed.any_rank(interrupt, device):
            break
