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

import copy
import math
import os
import time
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import torch
import torch.distributed as dist
import torch.nn as nn

from common import checkpoint, cli, distributed
from common.cuda_graph import CudaGraph
from common.envs.isaac import check_task, make_env
from common.envs.isaac_eval import evaluate, record_video
from common.logger import Logger, make_run_dir, peak_memory_mb, run_info, write_json
from common.physics import resolve_backend

SCRIPT = "ppo_continuous_isaac"
# Every flag that differs from the defaults of Args, which are those of `mujoco`. The rows of Isaac Lab and
# mjlab are their own for rsl_rl.
ISAAC = dict(
    num_envs=4096,
    num_steps=32,
    num_iterations=1000,
    total_timesteps=0,
    desired_kl=0.01,
    num_minibatches=4,
    update_epochs=5,
    vf_coef=2.0,
    clip_vloss=True,
    max_grad_norm=1.0,
    norm_reward=False,
    activation="elu",
    init_std=1.0,
)
PRESETS = {
    "mujoco": {},
    "mujoco-humanoid": dict(gamma=0.97, gae_lambda=0.9),
    "classic": dict(
        num_steps=32,
        total_timesteps=100_000,
        learning_rate=1e-3,
        gamma=0.98,
        gae_lambda=0.8,
        num_minibatches=1,
        update_epochs=20,
        norm_obs=False,
        norm_reward=False,
    ),
    "memory": dict(
        num_envs=16,
        num_steps=128,
        total_timesteps=300_000,
        learning_rate=1e-3,
        num_minibatches=4,
        norm_obs=False,
        norm_reward=False,
    ),
    "isaac-cartpole": ISAAC
    | dict(num_steps=16, num_iterations=150, learning_rate=1e-3, ent_coef=0.005, hidden=(32, 32), norm_obs=False),
    "mjlab-cartpole": ISAAC
    | dict(num_iterations=500, learning_rate=1e-3, ent_coef=0.01, hidden=(64, 64), norm_obs=False),
    "isaac-ant": ISAAC | dict(learning_rate=5e-4, hidden=(400, 200, 100), norm_obs=False),
    "isaac-humanoid": ISAAC | dict(learning_rate=1e-4, desired_kl=0.008, hidden=(400, 200, 100)),
    "isaac": ISAAC | dict(num_steps=24, learning_rate=1e-3, ent_coef=0.005, hidden=(512, 256, 128)),
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
    preset: Literal["auto", *PRESETS] = "auto"
    """group of defaults; auto: by the task's id"""
    exp_name: str = SCRIPT
    """name of the experiment"""
    env_id: str = "HalfCheetah-v5"
    """task: Isaac-*, IsaacContrib-*, Mjlab-*, or any id of Gymnasium"""
    physics: str = "newton_mjwarp"
    """physics preset of Isaac Lab 3.x"""
    clip_actions: float = 0.0
    """clip the actions of Isaac Lab and mjlab at this (0: not); Gymnasium's are clipped at the bounds of their space"""
    history: int = 1
    """stacked observations, newest last"""
    launcher_args: tuple[str, ...] = ()
    """computed at run time: the flags for Isaac Lab's launcher"""
    num_envs: int = 8
    """parallel environments, over all ranks"""
    num_steps: int = 256
    """steps per environment and iteration"""
    num_iterations: int = 0
    """iterations to train for (0: those of --total-timesteps); given both, that counts which the preset leaves at 0"""
    total_timesteps: int = 1_000_000
    """environment steps to train for (0: those of --num-iterations)"""
    learning_rate: float = 3e-4
    """Adam's step size"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero, where no KL divergence is desired"""
    desired_kl: float = 0.0
    """adapt the learning rate to this KL divergence per update (0: do not)"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 32
    """minibatches per epoch"""
    update_epochs: int = 10
    """epochs per iteration"""
    norm_adv: bool = True
    """normalise advantages per minibatch"""
    clip_coef: float = 0.2
    """clipping of the probability ratio, and of the value update"""
    clip_vloss: bool = False
    """clip the value loss"""
    ent_coef: float = 0.0
    """entropy bonus"""
    vf_coef: float = 0.5
    """value loss coefficient; the loss has CleanRL's factor 0.5, so 2.0 is rsl_rl's 1.0"""
    max_grad_norm: float = 0.5
    """largest norm of the gradient"""
    target_kl: float = 0.0
    """end the epochs of an iteration when the KL divergence passes this (0: never)"""
    norm_obs: bool = True
    """normalise observations by running statistics and clip them at 10"""
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return and clip them at 10"""
    hidden: tuple[int, ...] = (64, 64)
    """widths of the hidden layers of actor and critic"""
    activation: Literal["tanh", "elu", "relu"] = "tanh"
    """between the layers"""
    lstm: bool = False
    """an LSTM in front of each network's hidden layers"""
    lstm_size: int = 128
    """its width"""
    init_std: float = 0.4
    """initial standard deviation of continuous actions"""
    min_std: float = 0.01
    """smallest standard deviation"""

    ranks: int = 0
    """processes that share the environments on a CPU (0: one per core for Gymnasium if updates are rare, else one)"""
    compile: bool = False
    """torch.compile the policy step and the update"""
    cuda_graphs: bool = False
    """capture the policy step and the update's forward and backward pass in CUDA graphs"""

    batch_size: int = 0
    """computed at run time: samples per iteration on this rank"""
    minibatch_size: int = 0
    """computed at run time: samples per minibatch on this rank"""


def layer_init(layer, std=2**0.5, bias_const=0.0):  # detail 2: orthogonal initialisation
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


# === running mean std ===
class RunningMeanStd(nn.Module):
    """Mean and variance of all vectors seen, merged batch by batch (Chan et al. 1979), over all ranks."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("var", torch.ones(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, x: torch.Tensor):  # (batch, dim)
        x = x.double()
        moments = torch.stack((torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)))
        if dist.is_initialized():
            dist.all_reduce(moments)
        n, mean = moments[0, 0], moments[1] / moments[0]
        var = (moments[2] / moments[0] - mean.square()).clamp(min=0)
        total, delta = self.count + n, mean - self.mean
        self.var.copy_((self.var * self.count + var * n + delta.square() * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalised = (x - self.mean.float()) * torch.rsqrt(self.var.float() + 1e-8)
        return normalised.clamp(-10, 10)  # detail 29: observation clipping


# === end running mean std ===


class Network(nn.Module):
    """An MLP, with --lstm behind an LSTM: a map from (..., in_dim) to (..., out_dim)."""

    def __init__(self, in_dim: int, out_dim: int, out_std: float, args: Args):
        super().__init__()
        self.lstm, layers, width = None, [], in_dim
        if args.lstm:
            self.lstm, width = nn.LSTM(in_dim, args.lstm_size), args.lstm_size
            for name, param in self.lstm.named_parameters():  # detail 32: initialisation of the LSTM
                nn.init.constant_(param, 0.0) if "bias" in name else nn.init.orthogonal_(param, 1.0)
        for size in args.hidden:
            activation = {"tanh": nn.Tanh, "elu": nn.ELU, "relu": nn.ReLU}[args.activation]
            layers += [layer_init(nn.Linear(width, size)), activation()]
            width = size
        self.mlp = nn.Sequential(*layers, layer_init(nn.Linear(width, out_dim), std=out_std))

    def forward(self, x, state=None, starts=None):
        """x (batch, in_dim); with an LSTM (T, N, in_dim) from the state (2, N, lstm_size), the hidden and the cell's,
        where starts[t, n] is 1 if an episode begins with step t. Returns the output, and the LSTM's states: {t: after
        step t} for the last step and every t before a start.
        """
        if self.lstm is None:
            return self.mlp(x), {}
        # Between two starts the LSTM takes all steps in one call.
        edges = (starts[1:].any(1).nonzero().flatten() + 1).tolist() if len(x) > 1 else []
        outputs, states = [], {}
        for begin, end in pairwise((0, *edges, len(x))):
            state = state * (1 - starts[begin])[:, None]  # detail 34: reset at the start of an episode
            output, state = self.lstm(x[begin:end], (state[:1].contiguous(), state[1:].contiguous()))
            outputs.append(output)
            states[end - 1] = state = torch.cat(state)
        return self.mlp(torch.cat(outputs)), states


class Agent(nn.Module):
    """Actor and critic take normalised observations (..., obs_dim); `normalise` makes them. The actor reads the first
    `policy_dim` columns, the critic the last `critic_dim`: all, if the task observes nothing for the critic alone.
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
        self.num_params = sum(self.nvec) if self.nvec else space.shape[0]
        self.normalise = RunningMeanStd(self.obs_dim) if args.norm_obs else nn.Identity()  # detail 28
        self.return_stats = RunningMeanStd(1)
        self.critic = Network(self.critic_dim, 1, 1.0, args)  # detail 13: separate networks
        self.actor = Network(self.policy_dim, self.num_params, 0.01, args)  # detail 26: separate MLPs
        if not self.nvec:  # detail 24: state-independent log-std, clamped, so it can neither vanish nor explode
            self.actor_logstd = nn.Parameter(torch.full(space.shape, math.log(args.init_std)))
        self.min_logstd = math.log(args.min_std)

    def zero_state(self, num_envs):  # detail 33: the LSTM's state is zero at the start
        if self.lstm_size is None:
            return None
        return torch.zeros(2, num_envs, self.lstm_size, device=next(self.parameters()).device)

    def std(self):  # (action_dim,)
        return self.actor_logstd.clamp(self.min_logstd, math.log(10.0)).exp()

    @torch.no_grad()
    def clamp_std(self):  # beyond its limits it has no gradient, and could not come back
        if self.nvec is None:
            self.actor_logstd.clamp_(self.min_logstd, math.log(10.0))

    def get_value(self, obs, state=None, starts=None):  # (..., obs_dim) -> (...,)
        value, states = self.critic(obs[..., -self.critic_dim :], state, starts)
        return value.squeeze(-1), states

    def get_params(self, obs, state=None, starts=None):
        """The distribution of actions (..., num_params): means, or logits of all components side by side."""
        return self.actor(obs[..., : self.policy_dim], state, starts)

    def sample(self, params):
        if self.nvec:
            # Adding Gumbel noise and taking the largest samples a categorical distribution.
            return self.mode(params - torch.empty_like(params).exponential_().log())
        return params + self.std() * torch.randn_like(params)  # detail 23: Gaussian actions

    def mode(self, params):
        if self.nvec is None:
            return params
        actions = [logits.argmax(-1) for logits in params.split(self.nvec, -1)]
        return torch.stack(actions, -1) if self.action_shape else actions[0]

    def log_prob_and_entropy(self, params, actions):  # detail 25: independent components, so both add up
        if self.nvec is None:
            logstd, c = self.std().log(), 0.5 * math.log(2 * math.pi)
            logprob = -0.5 * ((actions - params) / logstd.exp()).square() - logstd - c
            logprob = logprob.sum(-1)
            return logprob, (logstd + c + 0.5).sum().expand_as(logprob)
        actions = actions.view(*params.shape[:-1], len(self.nvec))
        logprob, entropy = 0.0, 0.0
        for i, logits in enumerate(params.split(self.nvec, -1)):  # detail 37: independent MultiDiscrete components
            logp = logits.log_softmax(-1)
            logprob = logprob + logp.gather(-1, actions[..., i : i + 1]).squeeze(-1)
            entropy = entropy - (logp.exp() * logp).sum(-1)
        return logprob, entropy

    def kl(self, old_params, old_std, params):
        """The exact divergence of the distributions, old to new, (...,)."""
        if self.nvec is None:
            std = self.std()
            moved = old_std.square() + (params - old_params).square()
            return (torch.log(std / old_std) + moved / (2 * std.square()) - 0.5).sum(-1)
        kl = 0.0
        for old, new in zip(old_params.split(self.nvec, -1), params.split(self.nvec, -1), strict=True):
            old, new = old.log_softmax(-1), new.log_softmax(-1)
            kl = kl + (old.exp() * (old - new)).sum(-1)
        return kl

    def get_action_and_value(self, obs, action=None, state=None, starts=None):
        actor_state, critic_state = (None, None) if state is None else state.split(2)
        params, _ = self.get_params(obs, actor_state, starts)
        value, states = self.get_value(obs, critic_state, starts)
        if action is None:
            action = self.sample(params)
        return action, *self.log_prob_and_entropy(params, action), value, params, states

    def forward(self, obs, state=None):
        """The deterministic policy on raw observations (batch, policy_dim), in float32: what is evaluated and exported.
        With an LSTM also its state (2, batch, lstm_size), zeros where an episode begins; returns the next one too.
        """
        obs = self.normalise(nn.functional.pad(obs, (0, self.obs_dim - self.policy_dim)))[:, : self.policy_dim]
        if state is None:
            return self.mode(self.actor(obs)[0])
        params, states = self.actor(obs[None], state, torch.zeros_like(obs[None, :, 0]))
        return self.mode(params[0]), states[0]


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

STATS = ("policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "kl", "clipfrac")


def ppo_loss(agent, args, mb_obs, mb_actions, mb_logprobs, mb_params, mb_advantages, mb_returns, mb_values, *more):
    """The loss of one minibatch, and the STATS (7,). `more`: old_std, and of an LSTM the state and the starts."""
    old_std, *memory = more
    _, newlogprob, entropy, newvalue, params, _ = agent.get_action_and_value(mb_obs, mb_actions, *memory)
    logratio = newlogprob - mb_logprobs
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
        kl = agent.kl(mb_params, old_std, params).mean()
        clipfrac = ((ratio - 1.0).abs() > args.clip_coef).float().mean()
        stats = (pg_loss, v_loss, entropy, (-logratio).mean(), ((ratio - 1) - logratio).mean(), kl, clipfrac)
        stats = torch.stack(stats).detach()
    return loss, stats


def adapt_learning_rate(learning_rate, kl, desired_kl):
    """rsl_rl's rule, on the device: by 1.5 down above twice the desired KL, up below half of it (but not at zero)."""
    factor = torch.where(kl > 2 * desired_kl, 1 / 1.5, torch.where((kl > 0) & (kl < desired_kl / 2), 1.5, 1.0))
    return (learning_rate * factor).clamp(1e-5, 1e-2)


def default_preset(args: Args) -> str:
    return next(preset for pattern, preset in TASKS.items() if fnmatch(args.env_id, pattern))


def is_gymnasium(args: Args) -> bool:
    return not args.env_id.startswith(("Isaac", "Mjlab"))


def check_args(args: Args):
    require_that = partial(cli.check_flag, args)
    positive = ("num_envs", "num_steps", "num_minibatches", "update_epochs", "init_std", "history", "lstm_size")
    positive += ("log_interval", "checkpoint_interval", "video_interval", "eval_episodes", "learning_rate", "min_std")
    positive += ("ranks", "max_grad_norm", "clip_coef")
    for name in positive:
        require_that(getattr(args, name) > 0, name, "a number above 0")
    for name in ("desired_kl", "target_kl", "eval_interval", "vf_coef", "clip_actions", "num_iterations"):
        require_that(getattr(args, name) >= 0, name, "0 or a number above it")
    require_that(args.total_timesteps > 0 or args.num_iterations, "total_timesteps", "a number above 0")
    require_that(args.min_std <= args.init_std, "min_std", "at most --init-std")
    require_that(args.hidden and min(args.hidden) > 0, "hidden", "numbers above 0")
    require_that(0 <= args.gamma < 1, "gamma", "a number from 0 to below 1")
    require_that(0 <= args.gae_lambda <= 1, "gae_lambda", "a number from 0 to 1")
    require_that(args.num_envs % args.ranks == 0, "num_envs", f"a multiple of the {args.ranks} ranks")
    per_rank, what = args.num_envs // args.ranks * (1 if args.lstm else args.num_steps), "samples per iteration"
    what = f"a divisor of the {per_rank} {'environments' if args.lstm else what} per rank"
    require_that(per_rank % args.num_minibatches == 0, "num_minibatches", what)
    try:
        resolve_backend("auto", args.device)
    except ValueError as error:
        cli.fail(str(error))
    accelerated = args.compile or args.cuda_graphs
    cli.check(not (args.lstm and accelerated), "--lstm got --compile or --cuda-graphs beside it; it takes neither")
    cli.check_compiler(args)


def make(args: Args, num_envs: int, seed: int, **more):
    """The task of `args`; a mistake of the user ends with one sentence."""
    names = ("physics", "clip_actions", "history", "launcher_args")
    try:
        return make_env(
            args.env_id, num_envs, args.device, seed, **{name: getattr(args, name) for name in names}, **more
        )
    except ValueError as error:
        cli.fail(str(error))


def main(args: Args):
    # --- seeding and devices
    device = torch.device(args.device)
    rank, world_size = distributed.init(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
        args.device = str(device)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        cores = distributed.num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # A small minibatch is done before a second thread has woken up.
        small = args.num_envs * args.num_steps // world_size // args.num_minibatches < 2048
        torch.set_num_threads(1 if small else max(1, cores))
        distributed.keep_freed_memory()
    torch.manual_seed(args.seed)  # the same networks on every rank

    # --- environments
    num_envs = args.num_envs // world_size  # detail 1: vectorised architecture
    args.batch_size = num_envs * args.num_steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    num_iterations = args.num_iterations or math.ceil(args.total_timesteps / (args.num_envs * args.num_steps))
    video_dir = str(Path(args.log_dir) / "videos") if args.capture_video and rank == 0 else ""
    envs = make(args, num_envs, args.seed + 1000 * rank, video_dir=video_dir)

    # --- agent
    agent = Agent(envs, args).to(device)
    learning_rate, desired_kl = torch.tensor(args.learning_rate, device=device), args.desired_kl

    def policy(obs, *memory):
        with torch.no_grad():
            params, states = agent.get_params(agent.normalise(obs), *memory)
            return agent.sample(params), states

    # === update ===
    params = list(agent.parameters())
    sizes = [p.numel() for p in params]
    # All parameters are views of one vector: one tensor for Adam.
    flat_params = nn.Parameter(nn.utils.parameters_to_vector(params).detach())
    nn.utils.vector_to_parameters(flat_params, params)
    # detail 3: Adam's epsilon
    optimizer = torch.optim.Adam([flat_params], lr=learning_rate, eps=1e-5, fused=True)
    # All gradients, and the KL divergence beside them, are one vector: one all-reduce, one norm.
    flat_grad = torch.zeros(len(flat_params) + 1, device=device)
    flat_params.grad = flat_grad[:-1]

    def compute_gradients(*minibatch):
        loss, stats = ppo_loss(agent, args, *minibatch)
        grads = torch.autograd.grad(loss, params)
        torch.cat([grad.flatten() for grad in (*grads, stats[5])], out=flat_grad)
        return stats

    def apply_gradients():
        flat_grad.div_(world_size)
        if args.desired_kl:  # detail 4: the learning rate follows the KL divergence, or else is annealed
            learning_rate.copy_(adapt_learning_rate(learning_rate, flat_grad[-1], desired_kl))
        grads = flat_grad[:-1]
        norm = grads.norm()
        finite = torch.isfinite(norm)
        scale = (args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # detail 11: global gradient clipping
        grads.copy_(torch.where(finite, grads * scale, 0.0))
        adam_step()
        agent.clamp_std()
        return norm, ~finite

    def update(*minibatch):
        stats = compute_gradients(*minibatch)
        if world_size > 1:
            dist.all_reduce(flat_grad)
        return stats, *apply_gradients()

    adam_step, capture = optimizer.step, args.cuda_graphs and device.type == "cuda"
    if args.compile:
        # optimizer.step() would part the graph, so the same is written out.
        zeros = {name: torch.zeros_like(flat_params.data) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[flat_params] = {"step": torch.zeros((), device=device)} | zeros

        @torch.no_grad()
        def adam_step():
            step, mean, square = (optimizer.state[flat_params][k] for k in ("step", "exp_avg", "exp_avg_sq"))
            grads = flat_grad[:-1]
            step += 1
            mean.lerp_(grads, 1 - 0.9)
            square.mul_(0.999).addcmul_(grads, grads, value=1 - 0.999)
            denominator = (square / (1 - 0.999**step)).sqrt() + 1e-5
            change = learning_rate / (1 - 0.9**step) * mean / denominator
            for p, p_change in zip(params, change.split(sizes), strict=True):
                p.sub_(p_change.view_as(p))

        torch._dynamo.config.trace_autograd_ops = True  # the gradient becomes part of the graph
        policy = torch.compile(policy)
        if world_size > 1 or capture:
            compute_gradients, apply_gradients = torch.compile(compute_gradients), torch.compile(apply_gradients)
        else:
            update = torch.compile(update)
    if capture:
        policy, compute_gradients = CudaGraph(policy), CudaGraph(compute_gradients)
    # === end update ===

    def split(x, inds):
        """x as num_minibatches minibatches: of single samples, or with an LSTM of whole sequences."""
        if args.lstm:  # detail 35: sequential rollouts in minibatches
            return x[:, inds].unflatten(1, (args.num_minibatches, -1)).transpose(0, 1)
        return x.flatten(0, 1)[inds].unflatten(0, (-1, args.minibatch_size))

    # --- storage, allocated once
    T, N = args.num_steps, num_envs
    obs = torch.zeros(T, N, agent.obs_dim, device=device)
    final_obs = torch.zeros(T, N, agent.obs_dim, device=device)
    actions = torch.zeros(T, N, *agent.action_shape, device=device, dtype=torch.long if agent.nvec else torch.float32)
    rewards, dones, starts, episode_returns, episode_lengths = (torch.zeros(T, N, device=device) for _ in range(5))
    truncations = torch.zeros(T, N, dtype=torch.bool, device=device)
    storage = obs, starts, rewards, truncations, dones, final_obs, episode_returns, episode_lengths
    next_start, running_return = torch.ones(N, device=device), torch.zeros(N, device=device)
    # Hidden and cell state of the actor's LSTM, then of the critic's.
    state = torch.cat((agent.zero_state(N),) * 2) if args.lstm else None

    # --- resume
    iteration, global_step, elapsed, best_score, stopped = 0, 0, 0.0, -math.inf, False
    torch.manual_seed(args.seed + 1000 * rank)
    saved = checkpoint.load(args.resume, SCRIPT, "cpu", "--resume") if args.resume else None
    if saved:
        checkpoint.load_agent(agent, saved, "--resume")
        checkpoint.load_optimizer(optimizer, saved["optimizer"])
        optimizer.param_groups[0]["lr"] = learning_rate
        learning_rate.fill_(saved["learning_rate"])
        iteration, global_step = saved["iteration"], saved["global_step"]
        elapsed, best_score = saved["elapsed"], saved["best_score"]
    same = saved and len(saved["ranks"]) == world_size and saved["args"]["num_envs"] == args.num_envs
    if same and envs.exact_resume:
        mine = saved["ranks"][rank]
        envs.load_state_dict(mine["envs"])
        checkpoint.set_rng_state(mine["rng"])
        next_obs, next_start, running_return = (
            mine[k].to(device) for k in ("next_obs", "next_start", "running_return")
        )
        state = mine["state"].to(device) if args.lstm else None
    else:
        if saved and rank == 0:
            why = "is of other ranks or num-envs" if envs.exact_resume else "cannot hold the simulator's state"
            print(f"warning: the checkpoint {why}, so the episodes begin anew")
        next_obs, _ = envs.reset(seed=args.seed + 1000 * rank, options={"random_phase": True})

    run_dir = Path(args.log_dir)
    logger = Logger(run_dir, args, num_iterations * args.batch_size * world_size, global_step, enabled=rank == 0)
    interrupt = checkpoint.Interrupt().__enter__()
    start_time, start_step, log_time, log_step = time.time() - elapsed, global_step, time.time(), global_step
    episodes = torch.zeros(3, device=device)  # sums of return and length, and their number
    task_log, task_logs = {}, 0
    stats_sum, num_updates, bad_updates = torch.zeros(len(STATS), device=device), 0, torch.zeros((), device=device)

    def save(*names: str):
        mine = {"envs": envs.state_dict(), "rng": checkpoint.rng_state(), "next_obs": next_obs.cpu()}
        mine |= {"next_start": next_start.cpu(), "running_return": running_return.cpu()}
        mine |= {"state": state.cpu()} if args.lstm else {}
        ranks = distributed.gather(mine)
        if rank == 0:
            content = {"script": SCRIPT, "args": asdict(args), "iteration": iteration, "global_step": global_step}
            content |= {"elapsed": time.time() - start_time, "best_score": best_score, "ranks": ranks}
            content |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            content |= {"learning_rate": learning_rate.item()}
            for name in names:
                checkpoint.save(run_dir / "checkpoints" / name, content)

    while iteration < num_iterations:
        # --- anneal
        if args.anneal_lr and not args.desired_kl:  # detail 4: linear annealing
            learning_rate.fill_(args.learning_rate * (1 - iteration / num_iterations))

        # --- rollout: actions alone; log-probabilities and values of all steps follow in one batch
        initial_state, actor_state = state, state[:2] if args.lstm else None
        steps = []
        for t in range(T):
            step = [next_obs, next_start]
            if args.lstm:
                action, states = policy(next_obs[None], actor_state, next_start[None])
                actions[t], actor_state = action[0], states[0]
            else:
                actions[t], _ = policy(next_obs)
            # detail 27: the environment gets a copy of the action and clips what it must; the raw one is stored
            next_obs, reward, terminated, truncated, info = envs.step(actions[t])
            next_start = (terminated | truncated).float()
            step += [reward, truncated, next_start, info["final_obs"], info["episode"]["r"], info["episode"]["l"]]
            steps.append(step)
            if info.get("log"):
                task_log = {k: task_log.get(k, 0.0) + v for k, v in info["log"].items()}
                task_logs += 1
        # Each of the many small operations of a rollout counts, so the storage is filled once.
        for buffer, column in zip(storage, zip(*steps, strict=True), strict=True):
            torch.stack(column, out=buffer)
        episodes += (torch.stack((episode_returns, episode_lengths, torch.ones_like(dones))) * dones).sum((1, 2))
        global_step += args.batch_size * world_size

        # --- bootstrap and advantages
        if args.norm_reward:  # detail 30: rewards scaled by the standard deviation of the discounted return
            discounted = torch.empty_like(rewards)
            for t in range(T):
                running_return = running_return * args.gamma * (1 - starts[t]) + rewards[t]
                discounted[t] = running_return
            agent.return_stats.update(discounted.view(-1, 1))
            rewards.mul_(torch.rsqrt(agent.return_stats.var.float() + 1e-8)).clamp_(-10, 10)  # detail 31: clipped
        with torch.no_grad():
            b_obs = agent.normalise(obs)
            if args.lstm:
                memory = initial_state, starts
                _, logprobs, _, values, dist_params, states = agent.get_action_and_value(b_obs, actions, *memory)
                state = torch.cat((actor_state, states[T - 1]))
                next_value = agent.get_value(agent.normalise(next_obs[None]), state[2:], next_start[None])[0][0]
            else:
                _, logprobs, _, values, dist_params, _ = agent.get_action_and_value(b_obs, actions)
                next_value, _ = agent.get_value(agent.normalise(next_obs))
            # A time limit is no failure: its reward includes the value of the true last observation.
            if args.lstm:
                for t, critic_state in states.items():
                    last = agent.normalise(final_obs[t][None])
                    value = agent.get_value(last, critic_state, torch.zeros_like(starts[:1]))[0][0]
                    rewards[t] += args.gamma * torch.where(truncations[t], value, 0.0)
            else:
                limits = truncations.nonzero(as_tuple=True)
                rewards[limits] += args.gamma * agent.get_value(agent.normalise(final_obs[limits]))[0]
            advantages = compute_gae(rewards, values, dones, next_value, args.gamma, args.gae_lambda)
            returns = advantages + values
            old_std = agent.std() if agent.nvec is None else torch.ones(1, device=device)  # discrete: of no use
        batch = (b_obs, actions, logprobs, dist_params, advantages, returns, values)

        # --- update
        for _ in range(args.update_epochs):
            # detail 6: shuffled, without replacement
            b_inds = torch.randperm(N if args.lstm else args.batch_size, device=device)
            minibatches = [split(x, b_inds) for x in batch]
            if args.norm_adv:  # detail 7: advantages normalised per minibatch, over all ranks
                mb_advantages = minibatches[4].flatten(1)  # (num_minibatches, minibatch_size)
                moments = torch.stack((mb_advantages.mean(1), mb_advantages.square().mean(1)))
                if world_size > 1:
                    dist.all_reduce(moments)
                    moments /= world_size
                mean, std = moments[0], (moments[1] - moments[0].square()).clamp(min=0).sqrt()
                mb_advantages = (mb_advantages - mean[:, None]) / (std[:, None] + 1e-8)
                minibatches[4] = mb_advantages.view_as(minibatches[4])
            if args.lstm:  # detail 36: the states are rebuilt from those at the start of the rollout
                minibatches += split(initial_state, b_inds), split(starts, b_inds)
            for minibatch in zip(*minibatches, strict=True):
                stats, grad_norm, not_finite = update(*minibatch[:7], old_std, *minibatch[7:])
                stats_sum += stats
                bad_updates += not_finite
                num_updates += 1
            if args.target_kl and flat_grad[-1] > args.target_kl:
                break
        if args.norm_obs:  # after the update, so that the first minibatch's ratio is exactly 1
            agent.normalise.update(obs.view(-1, agent.obs_dim))
        iteration += 1

        # --- log
        stop = torch.tensor(float(bool(interrupt)), device=device)
        if world_size > 1:
            dist.all_reduce(stop)
        stopped = stop.item() > 0
        last = iteration == num_iterations or stopped
        if iteration % args.log_interval == 0 or last:
            summary = torch.cat((episodes, envs.nan_resets[None], bad_updates[None]))
            if world_size > 1:
                dist.all_reduce(summary)
            if rank == 0:
                now, count = time.time(), max(1.0, summary[2].item())
                metrics = {
                    "charts/SPS": (global_step - log_step) / (now - log_time),
                    "charts/learning_rate": learning_rate,
                    "charts/elapsed": now - start_time,
                    "charts/nan_resets": summary[3],
                    "charts/nan_updates": summary[4],
                    "losses/explained_variance": 1 - (returns - values).var() / returns.var(),
                    "losses/grad_norm": grad_norm,
                }
                metrics |= {"charts/action_std": agent.std().mean()} if agent.nvec is None else {}
                metrics |= {f"losses/{k}": v / num_updates for k, v in zip(STATS, stats_sum, strict=True)}
                if summary[2] > 0:
                    metrics |= {
                        "charts/episodic_return": summary[0] / count,
                        "charts/episodic_length": summary[1] / count,
                    }
                metrics |= {f"env/{k.replace('/', '_')}": v / task_logs for k, v in task_log.items()}
                logger.log(metrics, global_step)
                log_time, log_step = now, global_step
            episodes.zero_(), stats_sum.zero_()
            num_updates, task_log, task_logs = 0, {}, 0
        logger.progress(global_step)

        # --- checkpoint and evaluate
        names = [f"model_{iteration}.pt"] if iteration % args.checkpoint_interval == 0 or last else []
        if args.eval_interval and iteration % args.eval_interval == 0 and not last:
            score = torch.full((), -math.inf, device=device)
            if rank == 0:
                result = run_evaluation(agent, args, None if is_gymnasium(args) else envs)
                write_json(run_dir / "eval" / f"model_{iteration}.json", result)
                logger.log({f"eval/{k}": v for k, v in result.items() if isinstance(v, float)}, global_step)
                score.fill_(result["mean_return"])
            if not is_gymnasium(args) and rank == 0:  # a simulator runs once per process, so it was evaluated in
                next_obs, _ = envs.reset(options={"random_phase": True})
                next_start = torch.ones_like(next_start)
            if world_size > 1:
                dist.broadcast(score, 0)
            if score > best_score:
                best_score = score.item()
                names.append("best_model.pt")
        if args.capture_video and iteration % args.video_interval == 0 and rank == 0:
            film(agent, args, run_dir / "videos" / f"model_{iteration}.mp4")
        if iteration == num_iterations:
            names += ["final_model.pt"]
        if names:
            save(*names)
        if stopped:
            break

    # --- what the run leaves
    wall = time.time() - start_time
    if rank == 0 and stopped:
        print(f"stopped after iteration {iteration}; continue with --resume {run_dir}")
    elif rank == 0:
        export(agent, args, run_dir / "policy.onnx")
        result = run_evaluation(agent, args, None if is_gymnasium(args) else envs)
        write_json(run_dir / "eval" / "final_model.json", result)
        if args.save_video:
            film(agent, args, run_dir / "videos" / "final_model.mp4")
        final = {"iterations": iteration, "global_step": global_step, "wall_seconds": wall}
        final |= {"SPS": (global_step - start_step) / (wall - elapsed), "peak_memory_mb": peak_memory_mb(device)}
        write_json(run_dir / "summary.json", final | result | run_info())
        if result["mean_return"] > best_score:
            final_model = checkpoint.load(run_dir / "checkpoints" / "final_model.pt", SCRIPT)
            checkpoint.save(run_dir / "checkpoints" / "best_model.pt", final_model)
        print(f"{global_step:,} steps in {wall:.0f} s; everything is in {run_dir}")
    logger.close()
    envs.close()


def run_evaluation(agent: Agent, args: Args, envs=None) -> dict:
    """`evaluate` of the deterministic policy, in `envs` or, for Gymnasium, in new ones."""
    own = envs is None
    envs = envs or make(args, min(args.eval_episodes, 16), args.seed)
    result = evaluate(agent, envs, args.eval_episodes, args.seed + 10_000, agent.zero_state(envs.num_envs))
    if own:
        envs.close()
    return result


def film(agent: Agent, args: Args, path: Path):
    """The start of an episode of the deterministic policy as an mp4, in an environment of its own. Isaac Lab, of which
    a process can hold only one, films by its own recorder, with --capture-video.
    """
    if not args.env_id.startswith("Isaac"):
        settings = {"history": args.history, "clip_actions": args.clip_actions, "render_mode": "rgb_array"}
        make_envs = partial(make_env, args.env_id, 1, args.device, args.seed, **settings)
        record_video(agent, make_envs, path, args.seed + 20_000, agent.zero_state(1))


def export(agent: Agent, args: Args, path: Path):
    """policy.onnx: raw observations to the deterministic action, with an LSTM also its state to the next one."""
    agent, obs = copy.deepcopy(agent).cpu(), torch.zeros(1, agent.policy_dim)
    if args.lstm:
        example, names = (obs, agent.zero_state(1)), (("obs", "state"), ("actions", "next_state"))
        checkpoint.export_onnx(agent, example, path, *names)
    else:
        checkpoint.export_onnx(agent, obs, path)


def evaluate_checkpoint(args: Args):
    """--eval-only: metrics and video of --model-path."""
    state = checkpoint.load(args.model_path, SCRIPT, "cpu")
    path, run_dir = Path(args.model_path), Path(args.log_dir)
    video_dir = str(run_dir / "videos") if args.capture_video else ""
    envs = make(args, min(args.eval_episodes, 16), args.seed + 10_000, video_dir=video_dir)
    agent = Agent(envs, args).to(args.device)
    checkpoint.load_agent(agent, state, "--model-path")
    write_json(run_dir / "eval" / f"{path.stem}.json", run_evaluation(agent, args, envs))
    envs.close()
    if args.save_video:
        film(agent, args, run_dir / "videos" / f"{path.stem}.mp4")
    print(f"everything is in {run_dir}")


if __name__ == "__main__":
    launcher_flags = []
    args = checkpoint.parse_run_args(Args, SCRIPT, PRESETS, default_preset, unknown=launcher_flags)
    if launcher_flags and is_gymnasium(args):
        cli.parse_args(Args, PRESETS, default_preset=default_preset)  # names the nearest flag
    args.launcher_args = tuple(launcher_flags or args.launcher_args)
    if not args.ranks:
        # Ranks meet at every update, which costs about a millisecond: they pay where updates are far apart.
        steps_per_update = args.num_envs * args.num_steps / max(1, args.update_epochs * args.num_minibatches)
        alone = args.device != "cpu" or args.eval_only or not is_gymnasium(args) or steps_per_update < 100
        args.ranks = 1 if alone else math.gcd(distributed.num_cores(), args.num_envs)
    if args.num_iterations and args.total_timesteps:
        unused = "num_iterations" if "num_iterations" in PRESETS[args.preset] else "total_timesteps"
        setattr(args, unused, 0)
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
            what = f"{args.num_envs} environments, {args.ranks} ranks"
            print(f"{args.env_id}, preset {args.preset}: {what}, into {args.log_dir}")
        distributed.launch(main, args, args.ranks)
