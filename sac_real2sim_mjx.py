"""SAC on many simulations at once teaches a Franka Panda to pick up scanned objects and place them, in MuJoCo.

    python sac_real2sim_mjx.py                                      # a box, on a laptop
    python sac_real2sim_mjx.py --env-id Pendulum-v1                 # any task of Gymnasium with continuous actions
    python sac_real2sim_mjx.py --eval-only --model-path runs/.../checkpoints/final_model.pt

SAC is that of Haarnoja et al. 2018 (arXiv 1812.05905) in CleanRL's words; what large batches of simulations ask for, as
found in FastTD3 (Seo et al. 2025, arXiv 2505.22642), its sibling FastSAC and PQL (Li et al. 2023, arXiv 2307.12983), is
a flag each, with its source. `ddpg_real2sim_mjx.py` differs from this file by its actor and its discount alone.

Measured on one shared CPU core (benchmark/results/real2sim.json): after 487,000 steps, 6 minutes of CPU time, the
deterministic policy holds the box at the goal in 98.2%, 95.5% and 89.1% of 512 fresh episodes, three seeds. Nothing has
been measured on a GPU yet.
"""

import copy
import math
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import torch
import torch.nn as nn

from common import checkpoint, cli, distributed
from common.cuda_graph import CudaGraph
from common.envs import isaac_eval, real2sim_eval
from common.envs.isaac import make_env
from common.envs.real2sim import ENV_SETTINGS, Real2SimConfig, Real2SimEnv
from common.files import tolerant, write_json
from common.flat_adam import FlatAdam
from common.logger import Logger, make_run_dir
from common.meter import Meter, episode_metrics
from common.provenance import run_info

SCRIPT = "sac_real2sim_mjx"
# Every flag that differs from the defaults of Args, by group.
PRESETS = {
    "laptop": dict(observation="full", eval_interval=100, eval_episodes=256, checkpoint_interval=100),
    "gpu": dict(observation="full", num_envs=4096, batch_size=8192, tau=0.1, hidden=(512, 256, 128))
    | dict(distributional=True, buffer_size=4_194_304, save_replay=False, total_timesteps=50_000_000)
    | dict(learning_starts=40_960, checkpoint_interval=100, v_min=-10, v_max=10),  # at most 1 / (1 - gamma)
    # CleanRL's sac_continuous_action.py, but an update of the actor per step where it makes two every second step.
    "gymnasium": dict(num_envs=1, num_steps=64, total_timesteps=1_000_000, buffer_size=1_000_000, save_replay=False)
    | dict(learning_starts=5000, updates_per_step=1, batch_size=256, gamma=0.99, n_step=1, tau=0.005)
    | dict(policy_frequency=1, learning_rate=3e-4, critic_learning_rate=1e-3, alpha_learning_rate=1e-3, alpha=1.0)
    | dict(target_entropy=-1.0, log_std_max=2.0, activation="relu", layer_norm=False, norm_obs=False),
}


@dataclass
class Args(cli.RunArgs, Real2SimConfig):
    preset: Literal["auto", *PRESETS] = "auto"
    """group of defaults; auto: gymnasium with an --env-id of Gymnasium, else gpu on a GPU and laptop without"""
    exp_name: str = SCRIPT  # name of the experiment
    env_id: str = "Real2Sim-v0"  # task: Real2Sim-v0, or any id of Gymnasium with continuous actions

    num_envs: int = 64  # parallel environments, over all ranks
    num_steps: int = 16  # steps per environment and iteration
    num_iterations: int = 0  # iterations to train for (0: those of --total-timesteps)
    total_timesteps: int = 600_000  # environment steps to train for (0: those of --num-iterations)
    buffer_size: int = 500_000  # steps in the replay buffer, over all environments
    save_replay: bool = True
    """checkpoints hold the replay buffer, so that a resumed run is the same run; without, it is filled anew"""
    learning_starts: int = 6400
    """environment steps before the first update (CleanRL), with random actions unless --model-path or --resume gives a
    policy"""
    updates_per_step: int = 4  # updates of the critics per step of all environments (FastTD3, PQL)
    batch_size: int = 256  # samples per update, over all ranks
    gamma: float = 0.9  # discount: each next stage of the reward is a few steps away (0.97 in FastSAC, 0.99 in CleanRL)
    n_step: int = 3
    """rewards summed before the target critic takes over (3 in PQL, 1 in FastSAC and CleanRL), without the entropies
    of the steps between"""
    tau: float = 0.01  # share of the critics in the target critics' step (0.005 CleanRL, 0.05 PQL, 0.1 FastTD3)
    policy_frequency: int = 2  # updates of the critics per update of the actor (2 in TD3 and FastTD3, 4 in FastSAC)
    learning_rate: float = 3e-4  # Adam's step size for the actor
    critic_learning_rate: float = 3e-4  # Adam's step size for the critics
    alpha_learning_rate: float = 3e-4  # Adam's step size for the temperature
    anneal_lr: bool = False  # let the learning rates fall linearly to zero
    alpha: float = 0.01  # initial temperature (0.001 in FastSAC, 1 in CleanRL)
    autotune: bool = True  # adapt the temperature to the target entropy (Haarnoja et al. 2018, section 5)
    target_entropy: float = -0.5  # per dimension of the action, in nats (-1 in Haarnoja et al. 2018, 0 in FastSAC)
    log_std_min: float = -5.0  # smallest log standard deviation (-5 in CleanRL and FastSAC)
    log_std_max: float = 0.0  # largest log standard deviation (2 in CleanRL, 0 in FastSAC)
    num_critics: int = 2  # independent critics (Fujimoto et al. 2018, arXiv 1802.09477)
    critic_aggregation: Literal["min", "mean"] = "min"
    """of several critics' values: their minimum (clipped double Q, Fujimoto et al. 2018) or their mean (FastSAC)"""
    distributional: bool = False  # critics of the return's distribution (C51, Bellemare et al. 2017, arXiv 1707.06887)
    num_atoms: int = 101  # atoms of that distribution (101 in FastTD3 and FastSAC)
    v_min: float = -50.0  # the lowest return it can represent
    v_max: float = 50.0  # the highest return it can represent
    reward_scale: float = 1.0  # rewards are multiplied by this before they are learned from
    max_grad_norm: float = math.inf  # largest norm of each network's gradient (inf: not clipped)
    norm_obs: bool = True  # normalise observations by running statistics and clip them at 10 (FastTD3)
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers of actor and critics
    activation: Literal["relu", "silu"] = "silu"  # between the layers (ReLU in CleanRL, SiLU in FastSAC)
    layer_norm: bool = True  # LayerNorm before each activation (FastSAC; Ball et al. 2023, arXiv 2302.02948)

    ranks: int = 0  # processes that share the environments on a CPU (0: as many as pay); on GPUs use torchrun
    compile: bool = False  # torch.compile the policy step and the updates
    cuda_graphs: bool = False  # capture the policy step and, with one rank, the updates in CUDA graphs


# === running mean std ===
class RunningMeanStd(nn.Module):
    """Mean and variance of all vectors seen, merged batch by batch (Chan et al. 1979), over all ranks."""

    def __init__(self, dim: int, epsilon: float = 1e-8):
        super().__init__()
        self.epsilon = epsilon  # added to the variance: what hardly moves is not blown up
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: torch.Tensor):  # (batch, dim)
        x = x.double()
        sums = distributed.total(torch.stack((torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0))))
        n = sums[0, 0]
        mean = sums[1] / n
        var = (sums[2] / n - mean.square()).clamp(min=0)
        total = self.count + n
        delta = mean - self.mean
        self.var.copy_((self.var * self.count + var * n + delta.square() * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalised = (x - self.mean.float()) * torch.rsqrt(self.var.float() + self.epsilon)
        return normalised.clamp(-10, 10)  # detail 29: observation clipping


# === end running mean std ===


# === replay ===
class Replay:
    """The newest steps of every environment, in a ring each, on the device.

    A slot holds an observation and what came of it: action, reward, and whether the episode ended with the step. The
    slot behind it holds the observation that followed. Where a time limit ended the episode, that is the true last one,
    and the slot is no step; the next episode begins behind it. So the last observations take memory only where there
    is one, and the rings of two environments are not at the same slot.
    """

    def __init__(self, num_envs: int, capacity: int, obs_dim: int, action_dim: int, device):
        """capacity: slots per environment, one of which is always the one to be written next."""
        self.num_envs, self.capacity = num_envs, capacity
        self.each = torch.arange(num_envs, device=device)
        self.written = torch.zeros(num_envs, dtype=torch.long, device=device)  # slots of each ring, ever
        self.obs = torch.zeros(num_envs, capacity, obs_dim, device=device)
        self.actions = torch.zeros(num_envs, capacity, action_dim, device=device)
        self.rewards = torch.zeros(num_envs, capacity, device=device)
        self.terminated = torch.zeros(num_envs, capacity, dtype=torch.bool, device=device)
        self.truncated = torch.zeros(num_envs, capacity, dtype=torch.bool, device=device)
        self.is_step = torch.zeros(num_envs, capacity, dtype=torch.bool, device=device)

    def add(self, obs, actions, rewards, terminated, truncated, following):
        """One step of all environments. `following` (num_envs, obs_dim): the next observation, and where the episode
        was truncated its true last one.
        """
        slot = self.written % self.capacity
        after = (self.written + 1) % self.capacity
        self.obs[self.each, slot] = obs
        self.actions[self.each, slot] = actions
        self.rewards[self.each, slot] = rewards
        self.terminated[self.each, slot] = terminated
        self.truncated[self.each, slot] = truncated
        self.is_step[self.each, slot] = True
        self.obs[self.each, after] = following
        self.is_step[self.each, after] = False
        self.written += 1 + truncated.long()

    def sample(self, size: int, n_step: int, gamma: float) -> dict[str, torch.Tensor]:
        """`size` steps, drawn evenly, each with what its n-step return needs: {name: (size, ...)}.

        returns: sum of the next `n_step` discounted rewards, or of fewer, up to the end of the episode, its truncation,
        or the newest step. next_obs: the observation behind them. discounts: what its value is multiplied by, gamma to
        the number of rewards, and 0 where the episode terminated. weights: 0 for a slot that is no step, else 1.
        """
        env = torch.randint(self.num_envs, (size,), device=self.each.device)
        newest = self.written[env]  # the slot behind the newest step
        kept = newest.clamp(max=self.capacity - 1)
        age = (1 + torch.rand(size, device=env.device) * kept).long().clamp(max=kept)
        return self.returns(env, newest - age, n_step, gamma)

    def returns(self, env, first, n_step: int, gamma: float) -> dict[str, torch.Tensor]:
        """What `sample` gives, of the steps in the slots `first` (size,) of the environments `env`."""
        ring = (env * self.capacity)[:, None]
        window = first[:, None] + torch.arange(n_step + 1, device=env.device)  # (size, n_step + 1)
        rows = ring + window % self.capacity
        steps = rows[:, :-1]
        ended = (self.terminated | self.truncated).view(-1)[steps]
        goes_on = ~ended & (window[:, 1:] < self.written[env, None])
        counts = torch.ones_like(ended)  # whether a reward belongs to the return
        counts[:, 1:] = goes_on[:, :-1].cumprod(1).bool()
        length = counts.sum(1)
        powers = gamma ** torch.arange(n_step, device=env.device)
        last = steps.gather(1, length[:, None] - 1).squeeze(1)
        following = rows.gather(1, length[:, None]).squeeze(1)
        return {
            "obs": self.obs.flatten(0, 1)[rows[:, 0]],
            "actions": self.actions.flatten(0, 1)[rows[:, 0]],
            "returns": (self.rewards.view(-1)[steps] * counts * powers).sum(1),
            "next_obs": self.obs.flatten(0, 1)[following],
            "discounts": gamma**length * ~self.terminated.view(-1)[last],
            "weights": self.is_step.view(-1)[rows[:, 0]].float(),
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All that was written."""
        used = min(int(self.written.max()) + 1, self.capacity)
        names = ("obs", "actions", "rewards", "terminated", "truncated", "is_step")
        return {name: getattr(self, name)[:, :used].clone() for name in names} | {"written": self.written.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]):
        """Restores `state_dict()` of a buffer of the same size."""
        self.written.copy_(state["written"])
        for name in state.keys() - {"written"}:
            getattr(self, name)[:, : state[name].shape[1]] = state[name].to(self.each.device)


# === end replay ===


# === networks ===
def mlp(in_dim, hidden, out_dim, args):
    """Linear layers of the widths `hidden`, each with an activation, and a last one, with torch's initialisation."""
    activation = {"relu": nn.ReLU, "silu": nn.SiLU}[args.activation]
    layers = []
    for width in hidden:
        norm = [nn.LayerNorm(width)] if args.layer_norm else []
        layers += [nn.Linear(in_dim, width), *norm, activation()]
        in_dim = width
    return nn.Sequential(*layers, nn.Linear(in_dim, out_dim))


class Critics(nn.Module):
    """Independent critics of observation and action: their values, or the logits of the return's distribution."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        out_dim = args.num_atoms if args.distributional else 1
        self.nets = nn.ModuleList(
            mlp(obs_dim + action_dim, args.hidden, out_dim, args) for _ in range(args.num_critics)
        )

    def forward(self, obs, actions):  # (batch, obs_dim), (batch, action_dim) -> (num_critics, batch, atoms or 1)
        inputs = torch.cat((obs, actions), -1)
        return torch.stack([net(inputs) for net in self.nets])


# === end networks ===


class Agent(nn.Module):
    """Actor and critics take normalised observations (batch, obs_dim), which `normalise` makes. Actions lie within
    [-1, 1]; `to_env` stretches them to the bounds of the environment's.
    """

    def __init__(self, envs, args: Args):
        super().__init__()
        obs_dim = envs.single_observation_space.shape[0]
        space = envs.single_action_space
        action_dim = space.shape[0]
        self.sizes = obs_dim, action_dim
        self.normalise = RunningMeanStd(obs_dim) if args.norm_obs else nn.Identity()
        self.actor = mlp(obs_dim, args.hidden, 2 * action_dim, args)
        self.critics = Critics(obs_dim, action_dim, args)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.log_std_min, self.log_std_max = args.log_std_min, args.log_std_max
        self.distributional, self.aggregation = args.distributional, args.critic_aggregation
        self.register_buffer("atoms", torch.linspace(args.v_min, args.v_max, args.num_atoms))
        low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
        bounded = torch.isfinite(low) & torch.isfinite(high)
        self.register_buffer("action_scale", torch.where(bounded, (high - low) / 2, 1.0))
        self.register_buffer("action_bias", torch.where(bounded, (high + low) / 2, 0.0))

    def to_env(self, actions):
        return actions * self.action_scale + self.action_bias

    def get_dist(self, obs):
        """Mean and standard deviation (batch, action_dim) each, of the action before tanh."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        span = self.log_std_max - self.log_std_min
        return mean, (self.log_std_min + 0.5 * span * (torch.tanh(log_std) + 1)).exp()

    def get_action(self, obs):
        """A random action (batch, action_dim), and its log-probability (batch,)."""
        mean, std = self.get_dist(obs)
        noise = torch.randn_like(mean)
        raw = mean + std * noise
        logprob = -0.5 * noise.square() - std.log() - 0.5 * math.log(2 * math.pi)
        # log(1 - tanh(raw)^2), the logarithm of tanh's slope, in a form that does not cancel
        slope = 2 * (math.log(2) - raw - nn.functional.softplus(-2 * raw))
        return torch.tanh(raw), (logprob - slope).sum(-1)

    def get_next_action(self, obs):
        """A random action, and what its improbability is worth: the entropy's part of the value beyond it (batch,)."""
        actions, logprob = self.get_action(obs)
        return actions, self.log_alpha.exp() * logprob

    # === values ===
    def expected(self, outputs):
        """Critics' outputs (num_critics, batch, atoms or 1) as values (num_critics, batch)."""
        return (outputs.softmax(-1) * self.atoms).sum(-1) if self.distributional else outputs.squeeze(-1)

    def get_value(self, obs, actions):
        """(batch,): the least, or the mean, of what the critics think an action is worth."""
        values = self.expected(self.critics(obs, actions))
        return values.amin(0) if self.aggregation == "min" else values.mean(0)

    @torch.no_grad()
    def update_targets(self, tau: float):
        for target, param in zip(self.target_critics.parameters(), self.critics.parameters(), strict=True):
            target.lerp_(param, tau)

    # === end values ===

    def forward(self, obs):
        """The deterministic policy on raw observations: what is evaluated and exported."""
        mean, _ = self.get_dist(self.normalise(obs))
        return self.to_env(torch.tanh(mean))


# === critic loss ===
def project(atoms, moved, probs):
    """The distribution `probs` (batch, n) at the places `moved` (batch, n) as one at `atoms` (n,), which are evenly
    spaced: each probability is shared by the two nearest atoms (Bellemare et al. 2017, algorithm 1).
    """
    last = len(atoms) - 1
    position = ((moved - atoms[0]) / (atoms[1] - atoms[0])).clamp(0, last)
    below = position.floor().long()
    upper_share = position - below
    projected = torch.zeros_like(probs)
    projected.scatter_add_(1, below, probs * (1 - upper_share))
    return projected.scatter_add_(1, (below + 1).clamp(max=last), probs * upper_share)


def critic_loss(agent, args, minibatch):
    """The critics' loss on one minibatch {name: (batch, ...)}, summed over critics, and its statistics by name."""
    with torch.no_grad():
        next_actions, next_cost = agent.get_next_action(minibatch["next_obs"])
        next_outputs = agent.target_critics(minibatch["next_obs"], next_actions)
        next_values = agent.expected(next_outputs)  # (num_critics, batch)
        returns, discounts = args.reward_scale * minibatch["returns"], minibatch["discounts"]
    outputs = agent.critics(minibatch["obs"], minibatch["actions"])
    if args.distributional:
        with torch.no_grad():
            moved = returns[:, None] + discounts[:, None] * (agent.atoms - next_cost[:, None])
            next_probs = next_outputs.softmax(-1)
            if args.critic_aggregation == "min":  # the distribution whose mean is the least (FastTD3)
                each = torch.arange(len(returns), device=returns.device)
                next_probs = next_probs[next_values.argmin(0), each]
            else:
                next_probs = next_probs.mean(0)
            target_probs = project(agent.atoms, moved, next_probs)
            targets = (target_probs * agent.atoms).sum(-1)
        losses = -(target_probs * outputs.log_softmax(-1)).sum(-1)
    else:
        next_value = next_values.amin(0) if args.critic_aggregation == "min" else next_values.mean(0)
        targets = returns + discounts * (next_value - next_cost)
        losses = (outputs.squeeze(-1) - targets).square()
    weights = minibatch["weights"]
    loss = (losses * weights).sum() / weights.sum().clamp(min=1)
    return loss, {"qf_loss": loss.detach(), "qf_target": targets.mean()}


# === end critic loss ===


def actor_loss(agent, args, minibatch):
    """The actor's loss on one minibatch, the temperature's, and their statistics by name."""
    actions, logprob = agent.get_action(minibatch["obs"])
    alpha = agent.log_alpha.exp()
    values = agent.get_value(minibatch["obs"], actions)
    loss = (alpha.detach() * logprob - values).mean()
    entropy = -logprob.mean().detach()
    alpha_loss = alpha * (entropy - args.target_entropy * actions.shape[-1])
    stats = {
        "actor_loss": loss.detach(),
        "alpha": alpha.detach(),
        "entropy": entropy,
        "qf_values": values.mean().detach(),
    }
    return loss, alpha_loss, stats


def default_preset(args: Args) -> str:
    on_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    return "gymnasium" if is_gymnasium(args) else "gpu" if on_gpu else "laptop"


def is_gymnasium(args: Args) -> bool:
    return args.env_id != "Real2Sim-v0"


def check_args(args: Args):
    robots = args.env_id.startswith(("Isaac", "Mjlab"))
    cli.check_flag(args, not robots, "env_id", "Real2Sim-v0 or an id of Gymnasium")
    cli.check_flag(args, args.observation != "rgb", "observation", "compact or full, as this script has no CNN")
    cli.check_ranges(args)
    for name in ("updates_per_step", "batch_size", "n_step", "policy_frequency", "num_critics"):
        cli.check_flag(args, getattr(args, name) > 0, name, "a number above 0")
    for name in ("critic_learning_rate", "alpha_learning_rate", "alpha", "reward_scale"):
        cli.check_flag(args, 0 < getattr(args, name) < math.inf, name, "a number above 0")
    cli.check_flag(args, math.isfinite(args.target_entropy), "target_entropy", "a number")
    cli.check_flag(args, args.learning_starts >= 0, "learning_starts", "0 or a number above it")
    cli.check_flag(args, 0 < args.tau <= 1, "tau", "a number above 0 and up to 1")
    cli.check_flag(args, args.batch_size % args.ranks == 0, "batch_size", f"a multiple of the {args.ranks} ranks")
    least = args.num_envs * args.n_step
    cli.check_flag(args, args.buffer_size >= least, "buffer_size", f"at least --num-envs times --n-step, {least}")
    cli.check_flag(args, args.num_atoms > 1, "num_atoms", "a number above 1")
    cli.check_flag(args, args.v_min < args.v_max, "v_min", "a number below --v-max")
    cli.check_flag(args, args.log_std_min < args.log_std_max, "log_std_min", "a number below --log-std-max")
    cli.check_compiler(args)


def make(args: Args, num_envs: int, seed: int, **more):
    """The task of `args`; a mistake of the user ends with one sentence."""
    try:
        if not is_gymnasium(args):
            threads = distributed.cores_per_rank()
            return Real2SimEnv(num_envs, args.device, seed, cfg=args, physics_threads=threads)
        envs = make_env(args.env_id, num_envs, args.device, seed, **more)
        if not isinstance(envs.single_action_space, gym.spaces.Box):
            raise ValueError(f"--env-id {args.env_id} has discrete actions; this script takes continuous ones")
    except ValueError as error:
        cli.fail(str(error))
    return envs


def main(args: Args):
    # --- ranks and seeds
    T, N = args.num_steps, args.num_envs // args.ranks
    batch_size = args.batch_size // args.ranks
    device, rank, world_size = distributed.init(args.device, small=batch_size < 2048)
    args.device = str(device)
    seed = args.seed + distributed.SEEDS * rank
    torch.manual_seed(args.seed)  # the same networks on every rank

    # --- environments
    num_iterations = args.num_iterations or math.ceil(args.total_timesteps / (T * args.num_envs))
    if rank == 0 and args.learning_starts > num_iterations * T * args.num_envs:
        print(f"warning: this run ends before --learning-starts {args.learning_starts}: nothing is learned")
    envs = make(args, N, seed)

    # --- agent
    agent = Agent(envs, args).to(device)
    checkpoint.begin_with(agent, args, SCRIPT)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    critic_learning_rate = torch.tensor(args.critic_learning_rate, device=device)
    alpha_learning_rate = torch.tensor(args.alpha_learning_rate, device=device)
    actor_optimizer = FlatAdam(agent.actor.parameters(), learning_rate, eps=1e-8)
    critic_optimizer = FlatAdam(agent.critics.parameters(), critic_learning_rate, eps=1e-8)
    alpha_optimizer = FlatAdam([agent.log_alpha], alpha_learning_rate, eps=1e-8)

    @torch.no_grad()
    def policy(obs):
        return agent.get_action(agent.normalise(obs))[0]

    # === critic update ===
    # Around it: args, agent, critic_optimizer.
    def update_critics(minibatch):
        loss, stats = critic_loss(agent, args, minibatch)
        critic_optimizer.compute_gradients(loss)
        critic_optimizer.all_reduce()
        grad_norm = critic_optimizer.clip_gradients(args.max_grad_norm)
        critic_optimizer.step()
        agent.update_targets(args.tau)
        return stats | {"qf_grad_norm": grad_norm}

    # === end critic update ===

    def update_actor(minibatch):
        loss, alpha_loss, stats = actor_loss(agent, args, minibatch)
        actor_optimizer.compute_gradients(loss)
        actor_optimizer.all_reduce()
        grad_norm = actor_optimizer.clip_gradients(args.max_grad_norm)
        actor_optimizer.step()
        if args.autotune:
            alpha_optimizer.compute_gradients(alpha_loss)
            alpha_optimizer.all_reduce()
            alpha_optimizer.clip_gradients(math.inf)
            alpha_optimizer.step()
        return stats | {"actor_grad_norm": grad_norm}

    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # the gradient becomes part of the graph
        policy = torch.compile(policy)
        update_critics = torch.compile(update_critics)
        update_actor = torch.compile(update_actor)
    if args.cuda_graphs and device.type == "cuda":
        policy = CudaGraph(policy)
        if world_size == 1:
            update_critics = CudaGraph(update_critics)
            update_actor = CudaGraph(update_actor)

    # --- storage, allocated once
    try:
        replay = Replay(N, args.buffer_size // args.num_envs + 1, *agent.sizes, device)
    except RuntimeError as error:  # of the CPU's allocator, and torch.OutOfMemoryError of a GPU's
        cli.fail(f"--buffer-size got {args.buffer_size}, for which there is no memory ({str(error).splitlines()[0]})")
    collected = 0  # environment steps that went into the buffer
    updates = 0  # of the critics
    steps_at_random = 0 if args.model_path else args.learning_starts  # environment steps with random actions

    # --- resume
    torch.manual_seed(seed)
    learned = {"agent": agent, "optimizer": critic_optimizer}
    learned |= {"actor_optimizer": actor_optimizer, "alpha_optimizer": alpha_optimizer}
    run = checkpoint.Run(SCRIPT, args, learned, ("env_id", "buffer_size", *ENV_SETTINGS), envs.exact_resume)
    if run.own:
        envs.load_state_dict(run.own["envs"])
        next_obs = run.own["next_obs"].to(device)
        updates = run.own["updates"]
        steps_at_random = run.own.get("steps_at_random", steps_at_random)
        if "replay" in run.own:
            replay.load_state_dict(run.own["replay"])
            collected = run.own["collected"]
    else:
        next_obs, _ = envs.reset(seed=seed, options={"random_phase": True})
    if args.resume and rank == 0 and not collected:
        print(f"the replay buffer is empty, so the next update comes after {args.learning_starts} steps")

    logger = Logger(run.dir, args, num_iterations * T * args.num_envs, run.global_step, enabled=rank == 0)
    interrupt = checkpoint.Interrupt()
    episodes = Meter()
    losses = Meter()
    stopped = False

    while run.iteration < num_iterations and not stopped:
        # --- anneal
        if args.anneal_lr:
            left = 1 - run.iteration / num_iterations
            learning_rate.fill_(args.learning_rate * left)
            critic_learning_rate.fill_(args.critic_learning_rate * left)
            alpha_learning_rate.fill_(args.alpha_learning_rate * left)

        observed = []
        for _ in range(T):
            # --- rollout: one step of all environments
            obs = next_obs
            if run.global_step < steps_at_random:
                actions = 2 * torch.rand_like(replay.actions[:, 0]) - 1
            else:
                actions = policy(obs)
            next_obs, rewards, terminated, truncated, info = envs.step(agent.to_env(actions))
            # Where an episode ended, next_obs is the first of the next one.
            following = torch.where(truncated[:, None], info["final_obs"], next_obs)
            replay.add(obs, actions, rewards, terminated, truncated, following)
            observed.append(obs)
            episodes.add(episode_metrics(info), info["_episode"])
            run.global_step += args.num_envs
            collected += args.num_envs
            if collected < args.learning_starts:
                continue

            # --- update
            samples = replay.sample(args.updates_per_step * batch_size, args.n_step, args.gamma)
            samples["obs"] = agent.normalise(samples["obs"])
            samples["next_obs"] = agent.normalise(samples["next_obs"])
            for first in range(0, args.updates_per_step * batch_size, batch_size):
                minibatch = {name: rows[first : first + batch_size] for name, rows in samples.items()}
                losses.add(update_critics(minibatch))
                updates += 1
                if updates % args.policy_frequency == 0:
                    losses.add(update_actor(minibatch))
        if args.norm_obs:
            agent.normalise.update(torch.cat(observed))
        run.iteration += 1

        # --- log
        stopped = distributed.any_rank(interrupt, device)
        last = run.iteration == num_iterations or stopped
        if run.iteration % args.log_interval == 0 or last:
            not_finite = critic_optimizer.not_finite + actor_optimizer.not_finite + alpha_optimizer.not_finite
            nan_resets, nan_updates = distributed.total(torch.stack((envs.nan_resets, not_finite)))
            metrics = {
                "charts/SPS": run.steps_per_second(),
                "charts/learning_rate": learning_rate,
                "charts/updates": updates,
                "charts/elapsed": time.time() - run.start_time,
                "charts/nan_resets": nan_resets,
                "charts/nan_updates": nan_updates,
            }
            metrics |= {f"losses/{name}": value for name, value in losses.means().items()}
            metrics |= episodes.means()
            logger.log(metrics, run.global_step)
        logger.progress(run.global_step)

        # --- checkpoint and evaluate
        name = f"model_{run.iteration}.pt"
        evaluate_now = args.eval_interval and run.iteration % args.eval_interval == 0 and not last
        if last or evaluate_now or run.iteration % args.checkpoint_interval == 0:
            own = {"envs": envs.state_dict(), "next_obs": next_obs}
            own |= {"updates": updates, "steps_at_random": steps_at_random}
            if args.save_replay:
                own |= {"replay": replay.state_dict(), "collected": collected}
            run.save(own, name, *(["final_model.pt"] if run.iteration == num_iterations else []))
        if evaluate_now and rank == 0:
            result = run_evaluation(agent, args, envs)
            with tolerant("the evaluation", run.dir):
                write_json(run.dir / "eval" / f"model_{run.iteration}.json", result)
            logger.log({f"eval/{k}": v for k, v in result.items() if isinstance(v, float)}, run.global_step)
            run.keep_best(result["score"], name)
        if args.capture_video and run.iteration % args.video_interval == 0 and rank == 0:
            with tolerant("the video", run.dir):
                path = record_video(agent, args, run.dir / "videos" / f"model_{run.iteration}.mp4")
                logger.video("videos/policy", path, run.global_step)

    # --- what the run leaves
    summary = run.summary(device)
    interrupt.restore()
    distributed.leave()
    if rank == 0 and stopped:
        print(f"stopped after iteration {run.iteration}; continue with --resume {run.dir}")
    elif rank == 0:
        saved = "the final model is saved"
        with tolerant("policy.onnx", run.dir, saved):
            checkpoint.export_onnx(agent, next_obs[:1].cpu(), run.dir / "policy.onnx")
        result = run_evaluation(agent, args, envs)
        run.keep_best(result["score"], "final_model.pt")
        with tolerant("the final evaluation", run.dir, saved):
            report(agent, args, result, run.dir, "final_model", args.save_video)
            write_json(run.dir / "summary.json", summary | result | run_info())
        print(f"{run.global_step:,} steps in {summary['wall_seconds']:.0f} s; everything is in {run.dir}")
    logger.close()
    envs.close()


def run_evaluation(agent: Agent, args: Args, envs) -> dict:
    """`evaluate` of the deterministic policy in environments of their own."""
    if not is_gymnasium(args):
        result = real2sim_eval.evaluate(agent, args, envs.device, args.eval_episodes)
        return result | {"score": result["success_rate"] + 1e-4 * result["mean_return"]}
    envs = make(args, min(args.eval_episodes, 16), args.seed)
    result = isaac_eval.evaluate(agent, envs, args.eval_episodes, args.seed + 10_000)
    envs.close()
    return result | {"score": result["mean_return"]}


def record_video(agent: Agent, args: Args, path: Path) -> Path | None:
    """The deterministic policy as an mp4, in an environment of its own."""
    if not is_gymnasium(args):
        return real2sim_eval.record_video(agent, args, path)
    make_envs = partial(make_env, args.env_id, 1, args.device, args.seed, render_mode="rgb_array")
    return isaac_eval.record_video(agent, make_envs, path, args.seed + 20_000)


def report(agent: Agent, args: Args, result: dict, run_dir: Path, name: str, save_video: bool):
    """Writes the figures of an evaluation, and a video."""
    if not is_gymnasium(args):
        return real2sim_eval.report(agent, args, result, run_dir, name, save_video)
    write_json(run_dir / "eval" / f"{name}.json", result)
    if save_video:
        record_video(agent, args, run_dir / "videos" / f"{name}.mp4")


def evaluate_checkpoint(args: Args):
    """--eval-only: metrics and video of --model-path."""
    state = checkpoint.load(args.model_path, SCRIPT)
    path, run_dir = Path(args.model_path), Path(args.log_dir)
    envs = make(args, 1, args.seed)
    agent = Agent(envs, args).to(args.device)
    checkpoint.load_agent(agent, state, "--model-path")
    result = run_evaluation(agent, args, envs)
    envs.close()
    report(agent, args, result, run_dir, path.stem, args.save_video)
    print(f"everything is in {run_dir}")


if __name__ == "__main__":
    args = checkpoint.parse_run_args(Args, SCRIPT, PRESETS, default_preset)
    if not args.ranks:
        alone = args.device != "cpu" or args.eval_only or is_gymnasium(args)
        args.ranks = 1 if alone else distributed.even_ranks(math.gcd(args.num_envs, args.batch_size))
    check_args(args)
    if args.eval_only:
        evaluate_checkpoint(args)
    else:
        if os.environ.get("RANK", "0") == "0":
            make(args, 1, args.seed).close()  # a mistake leaves no empty folder behind
            args.log_dir = str(make_run_dir(args, args.env_id))
            what = f"{args.num_envs} environments, {args.ranks} ranks, {args.device}"
            print(f"{args.env_id}, preset {args.preset}: {what}, into {args.log_dir}")
        distributed.launch(main, args, args.ranks)
