"""PPO for the tasks of Isaac Lab, mjlab and Gymnasium: continuous or discrete actions, an MLP or an LSTM, one file.

    python ppo_continuous_isaac.py --env-id HalfCheetah-v5 --compile
    python ppo_continuous_isaac.py --env-id Isaac-Cartpole-Direct --num-envs 4096 --physics newton_mjwarp
    python ppo_continuous_isaac.py --env-id CartPoleMasked-v0 --lstm

Measured on 2 CPU cores without a GPU (docs/isaac.md; gym_mujoco.json and isaac_small.json in benchmark/results): 1M
steps of HalfCheetah-v4, Hopper-v4 and Walker2d-v4 end at training returns of 4809, 2753 and 3475 (interquartile means
of five seeds), in 2 to 3 minutes each; CartPole-v1 is solved after 10 s, CartPoleMasked-v0 with the LSTM after about a
minute.

Flags that this script does not know go to Isaac Lab's launcher. Of the 37 details, those of Atari games (14-22) have no
place here; docs/details.md gives the reason for each.
"""

import math
import os
import time
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import torch
import torch.nn as nn

from common import checkpoint, cli, distributed
from common.cuda_graph import CudaGraph
from common.envs import isaac_eval
from common.envs.isaac import check_launcher_args, check_task, make_env
from common.files import tolerant, write_json
from common.flat_adam import FlatAdam
from common.logger import Logger, drop_run_dir, make_run_dir
from common.meter import Meter, episode_metrics
from common.provenance import run_info
from common.storage import FinalObs, in_chunks, put, take, zeros

SCRIPT = "ppo_continuous_isaac"
# Where one of these differs from a resumed checkpoint's, the episodes begin anew.
ENV_SETTINGS = ("env_id", "physics", "clip_actions", "history", "launcher_args")
# Every flag that differs from the defaults of Args, by group. The rows of Isaac Lab and mjlab are their own for rsl_rl.
MUJOCO = dict(
    num_envs=8,
    num_steps=256,
    num_iterations=0,
    total_timesteps=1_000_000,
    learning_rate=3e-4,
    desired_kl=0.0,
    num_minibatches=32,
    update_epochs=10,
    clip_vloss=False,
    vf_coef=0.5,
    max_grad_norm=0.5,
    norm_reward=True,
    hidden=(64, 64),
    activation="tanh",
    init_std=0.4,
)
CLASSIC = MUJOCO | dict(learning_rate=1e-3, norm_obs=False, norm_reward=False)
PRESETS = {
    "mujoco": MUJOCO,
    "mujoco-humanoid": MUJOCO | dict(gamma=0.97, gae_lambda=0.9),
    "classic": CLASSIC
    | dict(num_steps=32, total_timesteps=100_000, gamma=0.98, gae_lambda=0.8, num_minibatches=1, update_epochs=20),
    "memory": CLASSIC | dict(num_envs=16, num_steps=128, total_timesteps=300_000, num_minibatches=4),
    "isaac-cartpole": dict(num_steps=16, num_iterations=150, ent_coef=0.005, hidden=(32, 32), norm_obs=False),
    "mjlab-cartpole": dict(num_steps=32, num_iterations=500, ent_coef=0.01, hidden=(64, 64), norm_obs=False),
    "isaac-ant": dict(num_steps=32, learning_rate=5e-4, hidden=(400, 200, 100), norm_obs=False),
    "isaac-humanoid": dict(num_steps=32, learning_rate=1e-4, desired_kl=0.008, hidden=(400, 200, 100)),
    "isaac": dict(ent_coef=0.005),
}
# `--preset auto` takes the first that matches the id of the task.
TASKS = {
    "Isaac*Cartpole*": "isaac-cartpole",
    "Mjlab*Cartpole*": "mjlab-cartpole",
    "Isaac*Ant*": "isaac-ant",
    "Isaac*Humanoid*": "isaac-humanoid",
    "Isaac*": "isaac",
    "Mjlab*": "isaac",
    "CartPoleMasked*": "memory",
    "CartPole*": "classic",
    "Acrobot*": "classic",
    "Humanoid-*": "mujoco-humanoid",
    "*": "mujoco",
}


@dataclass
class Args(cli.RunArgs):
    preset: Literal["auto", *PRESETS] = "auto"  # group of defaults; auto: by the task's id
    exp_name: str = SCRIPT  # name of the experiment
    env_id: str = "HalfCheetah-v5"  # task: Isaac-*, IsaacContrib-*, Mjlab-*, or any id of Gymnasium
    physics: str = "newton_mjwarp"  # physics preset of Isaac Lab 3.x
    clip_actions: float = 0.0
    """clip the actions of Isaac Lab and mjlab at this (0: not); Gymnasium's are clipped at the bounds of their space"""
    history: int = 1  # stacked observations, newest last
    launcher_args: tuple[str, ...] = ()  # computed at run time: the flags for Isaac Lab's launcher

    num_envs: int = 4096  # parallel environments, over all ranks
    num_steps: int = 24  # steps per environment and iteration
    num_iterations: int = 1000  # iterations to train for (0: those of --total-timesteps)
    total_timesteps: int = 0  # environment steps to train for (0: those of --num-iterations)
    learning_rate: float = 1e-3  # Adam's step size
    desired_kl: float = 0.01  # adapt the learning rate to this KL divergence per update (0: do not)
    anneal_lr: bool = True  # let the learning rate fall linearly to zero, where no KL divergence is desired
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 4  # minibatches per epoch
    update_epochs: int = 5  # epochs per iteration
    norm_adv: bool = True  # normalise advantages per minibatch
    clip_coef: float = 0.2  # clipping of the probability ratio, and of the value update
    clip_vloss: bool = True  # clip the value loss
    ent_coef: float = 0.0  # entropy bonus
    vf_coef: float = 2.0  # value loss coefficient; the loss has CleanRL's factor 0.5, so 2.0 is rsl_rl's 1.0
    max_grad_norm: float = 1.0  # largest norm of the gradient
    target_kl: float = 0.0  # end the epochs of an iteration when the KL divergence passes this (0: never)
    norm_obs: bool = True  # normalise observations by running statistics and clip them at 10
    norm_reward: bool = False
    """divide rewards by the running standard deviation of the discounted return and clip them at 10"""
    hidden: tuple[int, ...] = (512, 256, 128)  # widths of the hidden layers of actor and critic
    activation: Literal["tanh", "elu", "relu"] = "elu"  # between the layers
    lstm: bool = False  # an LSTM in front of each network's hidden layers
    lstm_size: int = 128  # its width
    init_std: float = 1.0  # initial standard deviation of continuous actions
    min_std: float = 0.01  # smallest standard deviation

    ranks: int = 0  # processes that share the environments on a CPU (0: as many as pay); on GPUs use torchrun
    chunk_size: int = 65_536  # samples per forward pass after the rollout, as many as the memory holds
    compile: bool = False  # torch.compile the policy step and the update
    cuda_graphs: bool = False  # capture the policy step and, with one rank, the update in CUDA graphs

    batch_size: int = 0  # computed at run time: samples per iteration on this rank
    minibatch_size: int = 0  # computed at run time: samples per minibatch on this rank


# === layer init ===
def layer_init(layer, std=2**0.5, bias_const=0.0):  # detail 2: orthogonal initialisation
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


def mlp(in_dim, hidden, out_dim, out_std, hidden_std=2**0.5, activation=nn.Tanh):
    """Linear layers of the widths `hidden`, each with an activation, and a last one; weights scaled by the stds."""
    layers = []
    for width in hidden:
        layers += [layer_init(nn.Linear(in_dim, width), hidden_std), activation()]
        in_dim = width
    return nn.Sequential(*layers, layer_init(nn.Linear(in_dim, out_dim), out_std))


# === end layer init ===


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


# === gaussian ===
def gaussian_log_prob_and_entropy(mean, std, actions):  # detail 25: independent components, so both add up
    """(..., action_dim), with std (action_dim,), to (...) each."""
    half_log_2pi = 0.5 * math.log(2 * math.pi)
    logprob = (-0.5 * ((actions - mean) / std).square() - std.log() - half_log_2pi).sum(-1)
    return logprob, (std.log() + half_log_2pi + 0.5).sum().expand_as(logprob)


def gaussian_kl(old_mean, old_std, mean, std):
    """The exact divergence, old to new, (..., action_dim) to (...)."""
    moved = old_std.square() + (mean - old_mean).square()
    return (torch.log(std / old_std) + moved / (2 * std.square()) - 0.5).sum(-1)


# === end gaussian ===


class Network(nn.Module):
    """An MLP, with --lstm behind an LSTM. Takes steps (batch, in_dim), or sequences (batch, time, in_dim)."""

    def __init__(self, in_dim: int, out_dim: int, out_std: float, args: Args):
        super().__init__()
        self.lstm = nn.LSTM(in_dim, args.lstm_size, batch_first=True) if args.lstm else None
        for name, param in self.lstm.named_parameters() if args.lstm else ():  # detail 32: initialisation of the LSTM
            nn.init.constant_(param, 0.0) if "bias" in name else nn.init.orthogonal_(param, 1.0)
        activation = {"tanh": nn.Tanh, "elu": nn.ELU, "relu": nn.ReLU}[args.activation]
        self.mlp = mlp(args.lstm_size if args.lstm else in_dim, args.hidden, out_dim, out_std, activation=activation)

    def forward(self, x, state=None, starts=None):
        """The output, and of an LSTM its state afterwards; of sequences {t: state after step t} for the last step and
        every t before a start.

        state: (batch, 2, lstm_size), the hidden and the cell's. starts: (batch,) or (batch, time), 1 where an episode
        begins with the step.
        """
        if self.lstm is None:
            return self.mlp(x), None
        if x.dim() == 2:
            output, states = self(x[:, None], state, starts[:, None])
            return output[:, 0], states.popitem()[1]
        # Between two starts the LSTM takes all steps in one call.
        edges = (starts[:, 1:].any(0).nonzero().flatten() + 1).tolist()
        outputs, states = [], {}
        for begin, end in pairwise((0, *edges, x.shape[1])):
            state = state * (1 - starts[:, begin])[:, None, None]  # detail 34: reset at the start of an episode
            hidden, cell = (part[None].contiguous() for part in state.unbind(1))
            output, memory = self.lstm(x[:, begin:end], (hidden, cell))
            outputs.append(output)
            states[end - 1] = state = torch.stack((memory[0][0], memory[1][0]), 1)
        return self.mlp(torch.cat(outputs, 1)), states


class Agent(nn.Module):
    """Actor and critic take normalised observations (batch, obs_dim), or with an LSTM also (batch, time, obs_dim);
    `normalise` makes them. The actor reads the first `policy_dim` columns, the critic the last `critic_dim`: all, if
    the task observes nothing for the critic alone. The LSTMs' `state` is (batch, 4, lstm_size): the actor's hidden and
    cell state, then the critic's.
    """

    def __init__(self, envs, args: Args):
        super().__init__()
        self.obs_dim = envs.single_observation_space.shape[0]
        self.policy_dim, self.critic_dim = envs.policy_dim, envs.critic_dim
        space = envs.single_action_space
        # Sizes of the discrete components; None for continuous actions.
        self.nvec = None
        if isinstance(space, gym.spaces.Discrete):
            self.nvec = [int(space.n)]
        elif isinstance(space, gym.spaces.MultiDiscrete):
            self.nvec = space.nvec.tolist()
        self.action_shape = space.shape
        self.lstm_size = args.lstm_size if args.lstm else None
        self.dist_dim = sum(self.nvec) if self.nvec else space.shape[0]
        self.normalise = RunningMeanStd(self.obs_dim) if args.norm_obs else nn.Identity()  # detail 28
        self.return_stats = RunningMeanStd(1)
        self.critic = Network(self.critic_dim, 1, 1.0, args)  # detail 13: separate networks
        self.actor = Network(self.policy_dim, self.dist_dim, 0.01, args)  # detail 26: separate MLPs
        # detail 24: state-independent log-std, clamped, so it can neither vanish nor explode
        logstd = torch.full(self.action_shape, math.log(args.init_std))
        self.actor_logstd = nn.Parameter(logstd, requires_grad=self.nvec is None)
        self.logstd_limits = (math.log(args.min_std), math.log(10.0))

    def zero_state(self, num_envs):
        """The state with which `forward` begins an episode, (2, num_envs, lstm_size); None without an LSTM."""
        if self.lstm_size is None:
            return None
        return torch.zeros(2, num_envs, self.lstm_size, device=self.actor_logstd.device)

    def std(self):  # (action_dim,)
        return self.actor_logstd.clamp(self.logstd_limits[0], self.logstd_limits[1]).exp()

    @torch.no_grad()
    def clamp_std(self):  # beyond its limits it has no gradient, and could not come back
        self.actor_logstd.clamp_(self.logstd_limits[0], self.logstd_limits[1])

    def get_value(self, obs, state=None, starts=None):  # (..., obs_dim) -> (...,)
        value, after = self.critic(obs[..., -self.critic_dim :], state, starts)
        return value.squeeze(-1), after

    def get_dist(self, obs, state=None, starts=None):
        """The distribution of actions (..., dist_dim): means, or logits of all components side by side."""
        return self.actor(obs[..., : self.policy_dim], state, starts)

    def sample(self, dist):
        if self.nvec:
            # Adding Gumbel noise and taking the largest samples a categorical distribution.
            return self.mode(dist - torch.empty_like(dist).exponential_().log())
        return dist + self.std() * torch.randn_like(dist)  # detail 23: Gaussian actions

    def mode(self, dist):
        if self.nvec is None:
            return dist
        actions = [logits.argmax(-1) for logits in dist.split(self.nvec, -1)]
        return torch.stack(actions, -1) if self.action_shape else actions[0]

    def log_prob_and_entropy(self, dist, actions):
        if self.nvec is None:
            return gaussian_log_prob_and_entropy(dist, self.std(), actions)
        actions = actions.view(*dist.shape[:-1], len(self.nvec))
        logprob, entropy = 0.0, 0.0
        for i, logits in enumerate(dist.split(self.nvec, -1)):  # detail 37: independent MultiDiscrete components
            logp = logits.log_softmax(-1)
            logprob = logprob + logp.gather(-1, actions[..., i : i + 1]).squeeze(-1)
            entropy = entropy - (logp.exp() * logp).sum(-1)
        return logprob, entropy

    def kl(self, old_dist, old_std, dist):
        """The exact divergence, old to new, (..., dist_dim) to (...)."""
        if self.nvec is None:
            return gaussian_kl(old_dist, old_std, dist, self.std())
        kl = 0.0
        for old, new in zip(old_dist.split(self.nvec, -1), dist.split(self.nvec, -1), strict=True):
            old, new = old.log_softmax(-1), new.log_softmax(-1)
            kl = kl + (old.exp() * (old - new)).sum(-1)
        return kl

    def get_action_and_value(self, obs, action=None, state=None, starts=None):
        actor_state, critic_state = (None, None) if state is None else state.split(2, 1)
        dist, _ = self.get_dist(obs, actor_state, starts)
        value, critic_states = self.get_value(obs, critic_state, starts)
        if action is None:
            action = self.sample(dist)
        return action, *self.log_prob_and_entropy(dist, action), value, dist, critic_states

    def forward(self, obs, state=None):
        """The deterministic policy on raw observations (batch, policy_dim), in float32: what is evaluated and exported.
        With an LSTM also its state (2, batch, lstm_size), zeros where an episode begins; returns the next one too.
        """
        obs = self.normalise(nn.functional.pad(obs, (0, self.obs_dim - self.policy_dim)))
        if state is None:
            return self.mode(self.get_dist(obs)[0])
        dist, state = self.get_dist(obs, state.transpose(0, 1), torch.zeros_like(obs[:, 0]))
        return self.mode(dist), state.transpose(0, 1)


# === gae ===
def compute_gae(rewards, values, dones, next_value, gamma, gae_lambda):  # detail 5: GAE
    """Advantages (num_steps, num_envs) of Schulman et al. 2016 (arXiv 1506.02438) eq. 16. `dones[t]`: the episode ended
    with step t; the value beyond a time limit is in its reward already. `next_value` (num_envs,): of the next_obs.
    """
    advantages = torch.empty_like(rewards)
    lastgaelam = torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        nextnonterminal = 1.0 - dones[t]
        nextvalues = values[t + 1] if t + 1 < len(rewards) else next_value
        delta = rewards[t] + gamma * nextvalues * nextnonterminal - values[t]
        lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
        advantages[t] = lastgaelam
    return advantages


# === end gae ===


# === advantage normalisation ===
def normalise_advantages(mb_advantages):  # detail 7: advantages normalised per minibatch, over all ranks
    """mb_advantages (num_minibatches, ...): each minibatch shifted to mean 0 and scaled to standard deviation 1."""
    flat = mb_advantages.flatten(1)
    mean, square = distributed.mean(torch.stack((flat.mean(1), flat.square().mean(1))))
    std = (square - mean.square()).clamp(min=0).sqrt()
    return ((flat - mean[:, None]) / (std[:, None] + 1e-8)).view_as(mb_advantages)


# === end advantage normalisation ===


def ppo_loss(agent, args, minibatch):
    """The loss of one minibatch {name: (batch, ...)}, and its statistics by name."""
    memory = minibatch.get("state"), minibatch.get("starts")
    outputs = agent.get_action_and_value(minibatch["obs"], minibatch["actions"], *memory)
    # === ppo loss ===
    # Around it: args, and of agent.get_action_and_value the `outputs` for minibatch["obs"] and minibatch["actions"].
    _, newlogprob, entropy, newvalue, newdist, *_ = outputs
    mb_advantages, mb_returns, mb_values = (minibatch[name] for name in ("advantages", "returns", "values"))
    logratio = newlogprob - minibatch["logprobs"]
    ratio = logratio.exp()
    pg_loss1 = -mb_advantages * ratio
    pg_loss2 = -mb_advantages * torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()  # detail 8: clipped surrogate

    v_loss = (newvalue - mb_returns).square()
    if args.clip_vloss:  # detail 9: value clipping
        v_clipped = mb_values + torch.clamp(newvalue - mb_values, -args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - mb_returns).square())
    v_loss = 0.5 * v_loss.mean()

    entropy = entropy.mean()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss  # detail 10: one loss
    with torch.no_grad():  # detail 12: debug variables
        # The ratio of what the policy did not draw itself, such as a mirror image, says nothing about the update.
        drawn = minibatch.get("drawn", torch.ones_like(ratio))
        drawn = drawn / drawn.sum().clamp(min=1)
        stats = {
            "policy_loss": pg_loss.detach(),
            "value_loss": v_loss.detach(),
            "entropy": entropy.detach(),
            "old_approx_kl": (drawn * -logratio).sum(),
            "approx_kl": (drawn * (ratio - 1 - logratio)).sum(),
            "kl": agent.kl(minibatch["dists"], minibatch["old_std"], newdist).mean(),
            "clipfrac": (drawn * ((ratio - 1.0).abs() > args.clip_coef)).sum(),
        }
    # === end ppo loss ===
    return loss, stats


# === learning rate ===
def adapt_learning_rate(learning_rate, kl, desired_kl):
    """rsl_rl's rule, on the device: by 1.5 down above twice the desired KL, up below half of it (but not at zero)."""
    factor = torch.where(kl > 2 * desired_kl, 1 / 1.5, torch.where((kl > 0) & (kl < desired_kl / 2), 1.5, 1.0))
    return (learning_rate * factor).clamp(1e-5, 1e-2)


# === end learning rate ===


def default_preset(args: Args) -> str:
    return next(preset for pattern, preset in TASKS.items() if fnmatch(args.env_id, pattern))


def is_gymnasium(args: Args) -> bool:
    return not args.env_id.startswith(("Isaac", "Mjlab"))


def check_args(args: Args):
    cli.check_ranges(args)
    cli.check_flag(args, args.clip_actions >= 0, "clip_actions", "0 or a number above it")
    cli.check_flag(args, args.min_std <= args.init_std, "min_std", "at most --init-std")
    accelerated = args.compile or args.cuda_graphs
    cli.check(not (args.lstm and accelerated), "--lstm got --compile or --cuda-graphs beside it; it takes neither")
    cli.check_compiler(args)


def make(args: Args, num_envs: int, seed: int, **more):
    """The task of `args`; a mistake of the user ends with one sentence."""
    settings = {name: getattr(args, name) for name in ("physics", "clip_actions", "history", "launcher_args")}
    try:
        return make_env(args.env_id, num_envs, args.device, seed, **settings, **more)
    except ValueError as error:
        if not args.eval_only:
            drop_run_dir(args.log_dir)
        cli.fail(str(error))


def main(args: Args):
    # --- ranks and seeds
    T, N = args.num_steps, args.num_envs // args.ranks  # detail 1: vectorised architecture
    args.batch_size = T * N
    args.minibatch_size = args.batch_size // args.num_minibatches
    device, rank, world_size = distributed.init(args.device, small=args.minibatch_size < 2048)
    args.device = str(device)
    seed = args.seed + distributed.SEEDS * rank
    torch.manual_seed(args.seed)  # the same networks on every rank

    # --- environments
    num_iterations = args.num_iterations or math.ceil(args.total_timesteps / (T * args.num_envs))
    video_dir = str(Path(args.log_dir) / "videos") if args.capture_video and rank == 0 else ""
    envs = make(args, N, seed, video_dir=video_dir)

    # --- agent
    agent = Agent(envs, args).to(device)
    checkpoint.begin_with(agent, args, SCRIPT)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    desired_kl = torch.tensor(args.desired_kl, device=device)
    optimizer = FlatAdam(agent.parameters(), learning_rate, eps=1e-5)  # detail 3: Adam's epsilon

    @torch.no_grad()
    def policy(obs, state, done):
        dist, state = agent.get_dist(agent.normalise(obs), state, done)
        return agent.sample(dist), state

    # === update ===
    # Around it: args, agent, policy, optimizer, learning_rate, desired_kl (a number or a tensor), device, world_size.
    def update(minibatch):
        loss, stats = ppo_loss(agent, args, minibatch)
        optimizer.compute_gradients(loss)
        (kl,) = optimizer.all_reduce(stats["kl"])  # the gradient and, beside it, the divergence: means of all ranks
        if args.desired_kl:  # detail 4: the learning rate follows the KL divergence, or else is annealed
            learning_rate.copy_(adapt_learning_rate(learning_rate, kl, desired_kl))
        grad_norm = optimizer.clip_gradients(args.max_grad_norm)  # detail 11: global gradient clipping
        optimizer.step()
        agent.clamp_std()
        return stats | {"kl": kl, "grad_norm": grad_norm}

    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # the gradient becomes part of the graph
        policy = torch.compile(policy)
        update = torch.compile(update)
    if args.cuda_graphs and device.type == "cuda":
        policy = CudaGraph(policy)
        if world_size == 1:
            update = CudaGraph(update)
    # === end update ===

    def flat(x):  # what is shuffled of (T, N, ...): steps, (T * N, ...); with an LSTM whole sequences, (N, T, ...)
        return x.transpose(0, 1) if args.lstm else x.flatten(0, 1)  # detail 35: sequential rollouts in minibatches

    # --- storage, allocated once
    obs = zeros(envs.single_observation_space, (T, N), device)
    actions = zeros(envs.single_action_space, (T, N), device)
    rewards = torch.zeros(T, N, device=device)
    terminations = torch.zeros(T, N, dtype=torch.bool, device=device)
    truncations = torch.zeros(T, N, dtype=torch.bool, device=device)
    final_obs = FinalObs()
    starts = torch.zeros(T, N, device=device)  # 1 where an episode begins with the step
    next_start = torch.ones(N, device=device)
    running_return = torch.zeros(N, device=device)
    state = torch.zeros(N, 4, args.lstm_size, device=device) if args.lstm else None  # detail 33: zero at the start

    # --- resume
    torch.manual_seed(seed)
    learned = {"agent": agent, "optimizer": optimizer}
    run = checkpoint.Run(SCRIPT, args, learned, ENV_SETTINGS, envs.exact_resume)
    if run.own:
        envs.load_state_dict(run.own["envs"])
        next_obs = run.own["next_obs"].to(device)
        next_start = run.own["next_start"].to(device)
        running_return = run.own["running_return"].to(device)
        state = run.own["state"].to(device) if args.lstm else None
    else:
        next_obs, _ = envs.reset(seed=seed, options={"random_phase": True})

    logger = Logger(run.dir, args, num_iterations * T * args.num_envs, run.global_step, enabled=rank == 0)
    interrupt = checkpoint.Interrupt()
    episodes = Meter()
    losses = Meter()
    task_log = Meter()  # what Isaac Lab and mjlab log themselves
    stopped = False

    while run.iteration < num_iterations and not stopped:
        # --- anneal
        progress = run.iteration / num_iterations
        if args.anneal_lr and not args.desired_kl:  # detail 4: linear annealing
            learning_rate.fill_(args.learning_rate * (1 - progress))

        # --- rollout: the actions alone; what else is known of a step follows for all of them in one batch
        actor_state = state[:, :2] if args.lstm else None
        for t in range(T):
            put(obs, t, next_obs)
            starts[t] = next_start
            actions[t], actor_state = policy(next_obs, actor_state, next_start)
            # detail 27: the environment gets a copy of the action and clips what it must; the raw one is stored
            next_obs, rewards[t], terminations[t], truncations[t], info = envs.step(actions[t])
            next_start = info["_episode"].float()
            final_obs.add(truncations[t], info["final_obs"])
            episodes.add(episode_metrics(info), info["_episode"])
            if info.get("log"):
                task_log.add({f"env/{name.replace('/', '_')}": value for name, value in info["log"].items()})
        run.global_step += T * args.num_envs

        if args.norm_reward:  # detail 30: rewards scaled by the standard deviation of the discounted return
            discounted = torch.empty_like(rewards)
            for t in range(T):
                running_return = running_return * args.gamma * (1 - starts[t]) + rewards[t]
                discounted[t] = running_return
            agent.return_stats.update(discounted.view(-1, 1))
            rewards.mul_(torch.rsqrt(agent.return_stats.var.float() + 1e-8)).clamp_(-10, 10)  # detail 31: clipped

        # --- values and log-probabilities
        with torch.no_grad():
            dones = (terminations | truncations).float()
            b_obs = flat(agent.normalise(obs))
            b_actions = flat(actions)
            if args.lstm:
                samples = agent.get_action_and_value(b_obs, b_actions, state, flat(starts))
            else:
                samples = in_chunks(agent.get_action_and_value, args.chunk_size, b_obs, b_actions)
            _, b_logprobs, _, b_values, b_dists, critic_states = samples
            limits = truncations.nonzero(as_tuple=True)
            limit_obs = final_obs.take_all()
            limit_state, critic_state = None, None
            if args.lstm:
                critic_state = critic_states[T - 1]
                limit_state = torch.zeros(len(limit_obs), 2, args.lstm_size, device=device)
                for row, (t, n) in enumerate(truncations.nonzero().tolist()):
                    limit_state[row] = critic_states[t][n]

            # --- bootstrap and advantages
            # A time limit is no failure: its reward includes the value of the true last observation.
            goes_on = torch.zeros(len(limit_obs), device=device)
            limit_value, _ = agent.get_value(agent.normalise(limit_obs), limit_state, goes_on)
            rewards[limits] += args.gamma * limit_value
            next_value, _ = agent.get_value(agent.normalise(next_obs), critic_state, next_start)
            values = b_values.T if args.lstm else b_values.view(T, N)
            b_advantages = flat(compute_gae(rewards, values, dones, next_value, args.gamma, args.gae_lambda))
            b_returns = b_advantages + b_values
            old_std = agent.std()
        batch = {"obs": b_obs, "actions": b_actions, "logprobs": b_logprobs, "dists": b_dists}
        batch |= {"returns": b_returns, "values": b_values}
        if args.lstm:  # detail 36: the states are rebuilt from those at the start of the rollout
            batch |= {"state": state, "starts": flat(starts)}
            state = torch.cat((actor_state, critic_state), 1)

        # --- update
        for _ in range(args.update_epochs):
            # detail 6: shuffled, without replacement
            b_inds = torch.randperm(len(b_obs), device=device).view(args.num_minibatches, -1)
            mb_advantages = b_advantages[b_inds]
            if args.norm_adv:
                mb_advantages = normalise_advantages(mb_advantages)
            for mb_inds, advantages in zip(b_inds, mb_advantages, strict=True):
                minibatch = take(batch, mb_inds) | {"advantages": advantages, "old_std": old_std}
                stats = update(minibatch)
                losses.add(stats)
            if args.target_kl and stats["kl"] > args.target_kl:
                break
        if args.norm_obs:  # after the update, so that the first minibatch's ratio is exactly 1
            agent.normalise.update(obs.view(-1, agent.obs_dim))
        run.iteration += 1

        # --- log
        stopped = distributed.any_rank(interrupt, device)
        last = run.iteration == num_iterations or stopped
        if run.iteration % args.log_interval == 0 or last:
            nan_resets, nan_updates = distributed.total(torch.stack((envs.nan_resets, optimizer.not_finite)))
            metrics = {
                "charts/SPS": run.steps_per_second(),
                "charts/learning_rate": learning_rate,
                "charts/elapsed": time.time() - run.start_time,
                "charts/nan_resets": nan_resets,
                "charts/nan_updates": nan_updates,
                "losses/explained_variance": 1 - (b_returns - b_values).var() / b_returns.var(),
            }
            if agent.nvec is None:
                metrics["charts/action_std"] = agent.std().mean()
            metrics |= {f"losses/{name}": value for name, value in losses.means().items()}
            metrics |= episodes.means()
            metrics |= task_log.means(over_ranks=False)
            logger.log(metrics, run.global_step)
        logger.progress(run.global_step)

        # --- checkpoint and evaluate
        name = f"model_{run.iteration}.pt"
        evaluate_now = args.eval_interval and run.iteration % args.eval_interval == 0 and not last
        if last or evaluate_now or run.iteration % args.checkpoint_interval == 0:
            own = {"envs": envs.state_dict(), "next_obs": next_obs}
            own |= {"next_start": next_start, "running_return": running_return}
            own |= {"state": state} if args.lstm else {}
            run.save(own, name, *(["final_model.pt"] if run.iteration == num_iterations else []))
        if evaluate_now and rank == 0:
            result = run_evaluation(agent, args, envs)
            with tolerant("the evaluation", run.dir):
                write_json(run.dir / "eval" / f"model_{run.iteration}.json", result)
            logger.log({f"eval/{k}": v for k, v in result.items() if isinstance(v, float)}, run.global_step)
            run.keep_best(result["score"], name)
            if not is_gymnasium(args):  # a simulator runs once per process, so it was evaluated in
                next_obs, _ = envs.reset(options={"random_phase": True})
                next_start = torch.ones_like(next_start)
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
            export(agent, run.dir / "policy.onnx")
        result = run_evaluation(agent, args, envs)
        run.keep_best(result["score"], "final_model.pt")
        with tolerant("the final evaluation", run.dir, saved):
            report(agent, args, result, run.dir, "final_model", args.save_video)
            write_json(run.dir / "summary.json", summary | result | run_info())
        print(f"{run.global_step:,} steps in {summary['wall_seconds']:.0f} s; everything is in {run.dir}")
    logger.close()
    envs.close()


def run_evaluation(agent: Agent, args: Args, envs) -> dict:
    """`evaluate` of the deterministic policy in new environments, or in `envs`, where a process can have only one."""
    own = is_gymnasium(args)
    if own:
        envs = make(args, min(args.eval_episodes, 16), args.seed)
    state = agent.zero_state(envs.num_envs)
    result = isaac_eval.evaluate(agent, envs, args.eval_episodes, args.seed + 10_000, state)
    if own:
        envs.close()
    return result | {"score": result["mean_return"]}


def record_video(agent: Agent, args: Args, path: Path) -> Path | None:
    """The start of an episode of the deterministic policy as an mp4, in an environment of its own. Isaac Lab, of which
    a process can hold only one, films by its own recorder, with --capture-video.
    """
    if args.env_id.startswith("Isaac"):
        return None
    settings = {"history": args.history, "clip_actions": args.clip_actions, "render_mode": "rgb_array"}
    make_envs = partial(make_env, args.env_id, 1, args.device, args.seed, **settings)
    return isaac_eval.record_video(agent, make_envs, path, args.seed + 20_000, agent.zero_state(1))


def report(agent: Agent, args: Args, result: dict, run_dir: Path, name: str, save_video: bool):
    """Writes the figures of an evaluation, and a video."""
    write_json(run_dir / "eval" / f"{name}.json", result)
    if save_video:
        record_video(agent, args, run_dir / "videos" / f"{name}.mp4")


def export(agent: Agent, path: Path):
    """policy.onnx: raw observations to the deterministic action, with an LSTM also its state to the next one."""
    obs = torch.zeros(1, agent.policy_dim)
    if agent.lstm_size is None:
        checkpoint.export_onnx(agent, obs, path)
    else:
        names = ("obs", "state"), ("actions", "next_state")
        checkpoint.export_onnx(agent, (obs, agent.zero_state(1).cpu()), path, *names)


def evaluate_checkpoint(args: Args):
    """--eval-only: metrics and video of --model-path."""
    state = checkpoint.load(args.model_path, SCRIPT)
    path, run_dir = Path(args.model_path), Path(args.log_dir)
    video_dir = str(run_dir / "videos") if args.capture_video else ""
    envs = make(args, min(args.eval_episodes, 16), args.seed + 10_000, video_dir=video_dir)
    agent = Agent(envs, args).to(args.device)
    checkpoint.load_agent(agent, state, "--model-path")
    result = run_evaluation(agent, args, envs)
    envs.close()
    report(agent, args, result, run_dir, path.stem, args.save_video)
    print(f"everything is in {run_dir}")


if __name__ == "__main__":
    launcher_flags = []
    args = checkpoint.parse_run_args(Args, SCRIPT, PRESETS, default_preset, unknown=launcher_flags)
    if launcher_flags:
        try:
            check_launcher_args(args.env_id, launcher_flags, [field.name for field in fields(Args)])
        except ValueError as error:
            cli.fail(str(error))
    args.launcher_args = tuple(launcher_flags or args.launcher_args)
    if not args.ranks:
        # Ranks meet at every update, which costs about a millisecond: they pay where updates are far apart.
        steps_per_update = args.num_envs * args.num_steps / max(1, args.update_epochs * args.num_minibatches)
        alone = args.device != "cpu" or args.eval_only or not is_gymnasium(args) or steps_per_update < 100
        args.ranks = (
            1 if alone else distributed.even_ranks(args.num_envs // (max(1, args.num_minibatches) if args.lstm else 1))
        )
    check_args(args)
    if args.eval_only:
        evaluate_checkpoint(args)
    else:
        if os.environ.get("RANK", "0") == "0":
            try:
                check_task(args.env_id, args.physics)  # a mistake leaves no empty folder behind
            except ValueError as error:
                cli.fail(str(error))
            args.log_dir = str(make_run_dir(args, args.env_id))
            what = f"{args.num_envs} environments, {args.ranks} ranks, {args.device}"
            print(f"{args.env_id}, preset {args.preset}: {what}, into {args.log_dir}")
        distributed.launch(main, args, args.ranks)
