"""DAgger (Ross, Gordon and Bagnell 2011): an expert labels the states that the policy itself gets into."""

import os
import time
from dataclasses import dataclass

import gymnasium as gym
import torch

from common import cli, distributed
from common.meter import Meter
from common.storage import put, take, zeros


@dataclass
class DaggerConfig:
    """The flags of the warm start, and of what is left of it in PPO."""

    bc_minutes: float = 8.0  # duration of the warm start
    bc_expert: float = 1.0  # share of the environments in which the expert acts at first; it falls to zero
    bc_batch: int = 128  # frames per gradient step of the warm start
    bc_updates: int = 4  # gradient steps after each step of all environments
    bc_frames: int = 100_000  # frames kept in the warm start, the newest; at 72 x 96 pixels 21 kB each
    bc_learning_rate: float = 1e-3  # Adam's step size in the warm start, of which it falls to a tenth
    random_shift: int = 0  # pixels by which pictures of the warm start are shifted at random
    bc_coef: float = 0.0  # weight of a cloning loss on the rollouts of PPO; falls linearly to zero
    bc_fade: float = 0.5  # share of the iterations after which it is zero
    pose_coef: float = 0.0  # with --critic state: weight of the warm start's loss of telling where the objects are


def check_args(args: DaggerConfig):
    """A value out of range ends with one sentence, exit code 2."""
    for name in ("bc_minutes", "bc_batch", "bc_updates", "bc_frames", "bc_learning_rate", "bc_fade"):
        cli.check_flag(args, getattr(args, name) > 0, name, "a number above 0")
    for name in ("bc_coef", "random_shift", "pose_coef"):
        cli.check_flag(args, getattr(args, name) >= 0, name, "0 or a number above it")
    cli.check_flag(args, 0 <= args.bc_expert <= 1, "bc_expert", "a number from 0 to 1")


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


def cloning_loss(means, labels):
    """Of means and the expert's actions (batch, action_dim). The absolute error: where the expert opens or closes a
    gripper, its least is at one of the two, and that of the squared error between them.
    """
    return (means - labels).abs().mean()


def pose_loss(agent, embedding, state):
    """Of the objects' poses that are told from the policy's `embedding` (batch, width): the mean absolute error, in
    standard deviations, from those in `state` (batch, state_dim).
    """
    told = agent.pose(embedding)
    return (told - agent.critic[0](state)[:, -told.shape[1] :]).abs().mean()


def clone_expert(agent, args, envs, expert, optimizer, next_obs, interrupt):
    """DAgger (Ross, Gordon and Bagnell 2011) for --bc-minutes: the expert labels every state that is visited, more and
    more of which are the policy's own. Gives the last observation and what was done.

    The expert acts in a share of the environments that falls from --bc-expert, by default all of them, to none in the
    first four fifths.
    """
    N = envs.num_envs
    device = envs.device
    spaces = {"obs": envs.single_observation_space, "labels": envs.single_action_space}
    replay = Replay(spaces, max(N, args.bc_frames // args.ranks), device)  # bounded in memory
    by_expert = torch.rand(N, 1, device=device) < args.bc_expert
    meter = Meter()
    start = said = time.time()
    progress = 0.0  # of all ranks, which must do the same
    while progress < 1 and not distributed.any_rank(interrupt, device):
        labels = expert(envs)
        replay.add({"obs": next_obs, "labels": labels})
        agent.update_stats(next_obs)
        with torch.no_grad():
            actions = agent.sample(torch.where(by_expert, labels, agent.get_dist(agent.normalise(next_obs))))
        next_obs, _, _, _, info = envs.step(actions)
        meter.add({"success": info["episode"]["success"]}, info["_episode"])
        # Who acts changes in the middle of an episode too: each goes on from where the other has led.
        change = torch.rand(N, 1, device=device) < 0.02
        share = args.bc_expert * (1 - 1.25 * progress)
        by_expert = torch.where(change, torch.rand(N, 1, device=device) < share, by_expert)

        optimizer.lr.fill_(args.bc_learning_rate * (1 - 0.9 * progress))
        for _ in range(args.bc_updates):
            minibatch = replay.sample(max(1, args.bc_batch // args.ranks))
            minibatch_obs = agent.normalise(shifted(minibatch["obs"], args.random_shift))
            embedding = agent.embed(minibatch_obs)
            stats = {"loss": cloning_loss(agent.actor(embedding), minibatch["labels"])}
            loss = stats["loss"]
            if agent.pose is not None:
                stats["pose_loss"] = pose_loss(agent, embedding, minibatch_obs["state"])
                loss = loss + args.pose_coef * stats["pose_loss"]
            optimizer.compute_gradients(loss)
            optimizer.all_reduce()
            optimizer.clip_gradients(args.max_grad_norm)
            optimizer.step()
            meter.add({name: value.detach() for name, value in stats.items()})
        minutes = (time.time() - start) / 60
        progress = distributed.mean(torch.tensor(minutes / args.bc_minutes, dtype=torch.float64)).item()
        if distributed.any_rank(time.time() - said > 15 or progress >= 1, device):
            said = time.time()
            found = {name: round(value.item(), 4) for name, value in meter.means().items()}
            if os.environ.get("RANK", "0") == "0":
                print(f"warm start, {minutes:.1f} min, {replay.count * args.ranks:,} frames: {found}", flush=True)
    optimizer.lr.fill_(args.learning_rate)
    for moment in optimizer.adam.state[optimizer.flat].values():  # else the first steps of PPO would still clone
        moment.zero_()
    return next_obs, {"warm_start_frames": replay.count * args.ranks, "warm_start_minutes": (time.time() - start) / 60}
