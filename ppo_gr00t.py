"""PPO fine-tunes GR00T N1.5, a vision-language-action model, on a Panda that picks what a sentence says.

    python ppo_gr00t.py                                  # a tiny GR00T on a CPU: clones an expert, then PPO
    python ppo_gr00t.py --policy gaussian-residual       # a Gaussian on top of the frozen model's actions
    python ppo_gr00t.py --policy mlp                     # no GR00T: from the state
    python ppo_gr00t.py --model-path nvidia/GR00T-N1.5-3B --tune lora --precision bf16
    python ppo_gr00t.py --eval-only --model-path runs/.../checkpoints/final_model.pt

The action head is a flow: it integrates a velocity from noise to a chunk of actions in K steps. PPO needs the
probability of what was drawn, so the integration is made a stochastic one with the same marginals (Flow-SDE, arXiv
2510.25889), whose steps are Gaussian; `step_stds` is its noise schedule. The task, its reward and its expert are in
common/envs/pick*.py, what belongs to the model in common/gr00t*.py. docs/gr00t.md has the formula, what is exact about
it, and what was measured: on one core clones with 45, 28 and 46% of success come to 82, 42 and 78% in 12 minutes by the
flow, to 90, 59 and 87% in 8 by the residual; the mlp to 100% in 3 (benchmark/results/gr00t.json).
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

from common import checkpoint, cli, demos, distributed, gr00t, gr00t_network
from common.cuda_graph import CudaGraph
from common.demos import DemosConfig
from common.envs.pick import ENV_SETTINGS, PickConfig
from common.envs.vla import SENTENCES, evaluate, expert, make, record_video, report
from common.evaluation import random_state_kept
from common.files import tolerant, write_json
from common.flat_adam import FlatAdam
from common.gr00t_network import TUNE, Gr00tConfig, Network, parts_at, stages
from common.logger import Logger, make_run_dir
from common.meter import Meter, episode_metrics
from common.provenance import run_info
from common.storage import FinalObs, flatten, in_chunks, micro_batches, put, take, to, zeros_like

SCRIPT = "ppo_gr00t"
# Every flag that differs from the defaults of Args, by group.
TINY = dict(difficulty=0.0, max_episode_steps=56, reward="dense", gamma=0.92, demos=300, bc_steps=600, num_steps=32)
TINY |= dict(num_iterations=150, critic_iterations=2, clip_vloss=False, log_interval=1, eval_interval=10, ranks=1)
PRESETS = {
    "laptop": TINY
    | dict(tune="dit", sde_steps="last", noise_correlation=1.0, learning_rate=6e-5, critic_learning_rate=2e-3),
    "residual": TINY | dict(policy="gaussian-residual", residual_std=0.15, critic_learning_rate=1e-3),
    "mlp": dict(policy="mlp", observation="state", chunk=1, difficulty=0.0, max_episode_steps=64, reward="dense")
    | dict(num_envs=256, num_steps=32, num_iterations=100, num_minibatches=8, update_epochs=5, desired_kl=0.01)
    | dict(learning_rate=1e-3, gamma=0.93, gae_lambda=0.9, init_std=0.6, eval_interval=20),
    "gpu": dict(num_envs=64, num_iterations=200, precision="bf16", tune="lora", bc_tune="head", chunk_size=32)
    | dict(learning_rate=5e-6, critic_learning_rate=1e-4, critic_iterations=2, critic_hidden=(2048, 1024, 512))
    | dict(micro_batch_size=32),
}


@dataclass
class Args(cli.RunArgs, PickConfig, Gr00tConfig, DemosConfig):
    preset: Literal["auto", *PRESETS] = "auto"
    """group of defaults; auto: mlp with --policy mlp or without GR00T's packages, gpu on a GPU, residual with --policy
    gaussian-residual, else laptop"""
    exp_name: str = SCRIPT  # name of the experiment
    env_id: Literal[*SENTENCES] = "Pick-v0"  # name of the task
    policy: Literal["gr00t", "gaussian-residual", "mlp"] = "gr00t"
    """gr00t: PPO on the flow itself; gaussian-residual: on a Gaussian around the frozen flow's action; mlp: no GR00T"""
    sde_steps: Literal["one", "last", "all"] = "one"
    """which steps of the integration have noise: one drawn at random for each chunk, the last, or all, at K times the
    price"""
    noise_level: float = 0.5  # a of the Flow-SDE; 0 is the model's own integration
    noise_correlation: float = 0.0
    """of the noise of a chunk's actions, independent of which averages out; 1: one noise for all of a chunk, whose mean
    alone has a probability then"""
    min_std: float = 0.03  # smallest standard deviation of such a step or of a Gaussian policy (normalised actions)
    residual_std: float = 0.2  # initial standard deviation of a residual, in the same units
    bc_tune: Literal[*TUNE] = "all"  # what the warm start trains
    critic_iterations: int = 0  # iterations at the beginning in which the critic alone learns
    critic_hidden: tuple[int, ...] = (128, 128)  # widths of GR00T's critic; at full size 2048 1024 512, which is 10M
    critic_learning_rate: float = 0.0  # its own step size, in an optimiser of its own (0: the policy's, in one)

    num_envs: int = 32  # parallel environments, over all ranks
    num_steps: int = 8  # steps per environment and iteration; each executes a chunk of actions
    num_iterations: int = 1000  # iterations to train for (0: those of --total-timesteps)
    total_timesteps: int = 0  # environment steps to train for (0: those of --num-iterations)
    learning_rate: float = 3e-4  # Adam's step size
    desired_kl: float = 0.0  # adapt the learning rate to this KL divergence per update (0: do not)
    anneal_lr: bool = True  # let the learning rate fall linearly to zero, where no KL divergence is desired
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation
    num_minibatches: int = 4  # minibatches per epoch
    micro_batch_size: int = 0  # samples that go through the network at once; gradients add up (0: a whole minibatch)
    update_epochs: int = 4  # epochs per iteration
    norm_adv: bool = True  # normalise advantages per minibatch
    clip_coef: float = 0.2  # clipping of the probability ratio, and of the value update
    clip_vloss: bool = True  # clip the value loss
    ent_coef: float = 0.0  # entropy bonus
    vf_coef: float = 1.0  # value loss coefficient; the loss has CleanRL's factor 0.5
    max_grad_norm: float = 1.0  # largest norm of the gradient
    target_kl: float = 0.0  # end the epochs of an iteration when the KL divergence passes this (0: never)
    norm_obs: bool = True  # normalise observations by running statistics and clip them at 10, of --policy mlp
    hidden: tuple[int, ...] = (128, 128)  # widths of the hidden layers of the mlp, of the residual and of their critic
    init_std: float = 1.0  # initial standard deviation of actions of --policy mlp

    ranks: int = 0  # processes that share the environments on a CPU (0: as many as pay); on GPUs use torchrun
    chunk_size: int = 4096  # samples per forward pass after the rollout, as many as the memory holds
    compile: bool = False  # torch.compile the policy step and the update of --policy mlp
    cuda_graphs: bool = False  # capture them in CUDA graphs

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


# --- the noise of the flow. Any other schedule has the same marginals: the drift of `transition` follows from it.


def step_stds(num_steps: int, noise_level: float, min_std: float) -> torch.Tensor:
    """(num_steps,): sigma sqrt(dt) of the step from t to t + dt, in units of a normalised action. Here t = 0 is noise,
    t = 1 the action, dt = 1 / num_steps, and sigma = noise_level sqrt((1 - t) / max(t, dt)).
    """
    t = torch.arange(num_steps) / num_steps
    dt = 1 / num_steps
    std = noise_level * ((1 - t) / t.clamp(min=dt) * dt).sqrt()
    return std.clamp(min=min_std) if noise_level else std


def chunk_mix(horizon: int, chunk: int, correlation: float) -> torch.Tensor:
    """(horizon, n), from n independent numbers to the noise of one action after the other. Those of the `chunk` that is
    executed have this correlation; if it is 1, one number moves them all.
    """
    if correlation == 1:
        return (torch.arange(horizon) < chunk).float()[:, None]
    covariance = torch.eye(horizon)
    covariance[:chunk, :chunk] += correlation * (1 - torch.eye(chunk))
    return torch.linalg.cholesky(covariance)


class FlowAgent(nn.Module):
    """GR00T as a policy with probabilities. An observation is what `encode` makes of the environment's: features that
    do not depend on what is trained, so that the update need not compute them again. Normalised actions are -1 to 1.
    """

    def __init__(self, envs, args: Args):
        super().__init__()
        spaces = envs.single_observation_space.spaces
        learns = {*sum(stages(args).values(), TUNE[args.bc_tune])}
        self.network = net = Network(args, spaces, envs.single_action_space.shape, SENTENCES[args.env_id], learns)
        self.critic = mlp(net.feature_dim, args.critic_hidden, 1, 1.0, activation=nn.ReLU)  # detail 13: on its features
        self.num_flow_steps = net.num_flow_steps  # K
        self.sde_steps = args.sde_steps
        self.generator = None  # of the noise from which the model's own actions are integrated; None: torch's
        noisy = torch.zeros(net.horizon, net.width)
        net.executed(noisy).fill_(1)
        self.register_buffer("noisy", noisy)  # the part of the model's output that is executed, and gets noise
        self.register_buffer("step_std", step_stds(net.num_flow_steps, args.noise_level, args.min_std))
        mix = chunk_mix(net.horizon, net.chunk, args.noise_correlation)
        self.register_buffer("mix", mix)
        # What of a chunk is independent: as many rows as actions or, where one noise moves them all, its mean. That
        # alone has a density then.
        self.register_buffer("unmix", torch.linalg.pinv(mix[: net.chunk, : net.chunk]))

    # --- the Flow-SDE

    def transition(self, context, state, x, step, std):
        """Mean of x after the integration's `step` (batch,), with noise of `std` (batch,) = s sqrt(dt), or 0.

        With x0 = x - t v, x1 = x + (1 - t) v and t' = t + dt it is x0 (1 - t' - s^2 dt / (2 (1 - t))) + x1 t', where
        s^2 is a matrix if the noise is correlated. Without noise that is x + dt v, Euler's step, and so it is outside
        of what is executed.
        """
        K = self.num_flow_steps
        v = self.network.velocity(context, state, x, step * self.network.num_buckets // K)
        t = (step / K)[:, None, None]
        std = std[:, None, None] * self.noisy
        start, end = x - t * v, x + (1 - t) * v
        drift = std.square() / (2 * (1 - t)) * (self.mix @ (self.mix.T @ start))
        return start * (1 - t - 1 / K) + end * (t + 1 / K) - drift

    @torch.no_grad()
    def integrate(self, context, state, x, std):
        """x (batch, horizon, width) at the K + 1 times, with noise of `std` (batch, K) in the steps."""
        points = [x]
        for k in range(self.num_flow_steps):
            step = torch.full((len(x),), k, device=x.device)
            mean = self.transition(context, state, points[-1], step, std[:, k])
            drawn = torch.randn(len(x), self.mix.shape[1], x.shape[2], device=x.device)
            points.append(mean + std[:, k, None, None] * self.noisy * (self.mix @ drawn))
        return torch.stack(points, 1)

    @torch.no_grad()
    def flow_action(self, context, state):
        """The model's own action, (batch, chunk, action_dim)."""
        x = torch.randn(len(state), *self.noisy.shape, generator=self.generator).to(context.device)
        without = torch.zeros(len(x), self.num_flow_steps, device=x.device)
        return self.network.executed(self.integrate(context, state, x, without)[:, -1])

    def sample(self, obs):
        """A chunk to execute, `action`, and what its probability depends on: of each noisy `step` where it began, `x`,
        and where it led, `next`: (batch, noisy steps, ...).
        """
        K, batch = self.num_flow_steps, len(obs["state"])
        context = self.network.context(obs)
        x = torch.randn(batch, *self.noisy.shape, device=context.device)
        step = torch.arange(K, device=x.device).expand(batch, K)
        if self.sde_steps == "one":
            step = torch.randint(K, (batch, 1), device=x.device)
        elif self.sde_steps == "last":  # of what an earlier noise does, the steps after it undo a part
            step = step[:, -1:]
        std = torch.zeros(batch, K, device=x.device)
        std.scatter_(1, step, self.step_std[step])  # detail 23: Gaussian, in each such step
        points = self.integrate(context, obs["state"], x, std)
        rows = torch.arange(batch, device=x.device)[:, None]
        drawn = {"step": step, "x": points[rows, step], "next": self.network.executed(points[rows, step + 1])}
        return drawn | {"action": self.network.executed(points[:, -1])}

    def log_prob_and_entropy(self, dist, action):
        """Sums over steps and components, in float32. `dist`: of `get_dist`."""
        std = self.step_std[action["step"]][..., None, None]
        log_mix = self.mix.diagonal()[: len(self.unmix), None].log()
        log_scale = (std.log() + log_mix + 0.5 * math.log(2 * math.pi)).expand_as(dist)
        logprob = (-0.5 * (self.unmix @ (action["next"] / std) - dist).square() - log_scale).sum((1, 2, 3))  # detail 25
        return logprob, (log_scale + 0.5).sum((1, 2, 3))

    def get_dist(self, context, obs, action):
        """Means of the noisy steps in units of their std, unmixed: (batch, steps, chunk or 1, action_dim)."""
        means = []
        for i in range(action["step"].shape[1]):
            step = action["step"][:, i]
            std = self.step_std[step]
            mean = self.transition(context, obs["state"], action["x"][:, i], step, std)
            means.append(self.unmix @ (self.network.executed(mean) / std[:, None, None]))
        return torch.stack(means, 1)

    def kl(self, old_dist, old_std, dist):
        """Of Gaussians of the same std, summed over the steps."""
        return 0.5 * (dist - old_dist).square().sum((1, 2, 3))

    # --- what PPO asks of an agent

    def set_trainable(self, parts):
        self.network.set_trainable(parts)
        self.critic.requires_grad_("critic" in parts)

    def encode(self, obs):
        return self.network.encode(obs)

    def to_env(self, action, obs):
        """What `sample` gives, as the environment takes it."""
        return self.network.robot_action(action["action"])

    def get_value(self, obs):
        return self.critic(self.network.embedding(self.network.context(obs), obs)).squeeze(-1)

    def get_action_and_value(self, obs, action=None):
        action = self.sample(obs) if action is None else action
        context = self.network.context(obs)
        dist = self.get_dist(context, obs, action)
        value = self.critic(self.network.embedding(context, obs)).squeeze(-1)
        return action, *self.log_prob_and_entropy(dist, action), value, dist

    def normalise(self, obs):  # `encode` has done it
        return obs

    def update_stats(self, obs):
        pass

    def std(self):
        return self.step_std

    def clamp_std(self):
        pass

    def forward(self, obs):
        """The deterministic policy on raw observations: what is evaluated."""
        encoded = self.encode(obs)
        action = self.flow_action(self.network.context(encoded), encoded["state"])
        return self.network.robot_action(action)


class Agent(nn.Module):
    """Gaussian actions. --policy mlp: of a state (batch, obs_dim), normalised. --policy gaussian-residual, with `flow`:
    of what the critic of the frozen GR00T sees, one that is added to all actions of its chunk.
    """

    def __init__(self, envs, args: Args, flow: FlowAgent | None = None):
        super().__init__()
        self.flow = flow
        self.action_shape = envs.single_action_space.shape
        n = math.prod(self.action_shape)
        if flow is None:
            width = envs.single_observation_space.shape[0]
            init_std = args.init_std
        else:
            flow.requires_grad_(False)
            width = flow.network.feature_dim + flow.network.state_dim + n
            n = flow.network.action_dim
            init_std = args.residual_std
        normalised = args.norm_obs and flow is None  # detail 28: observation normalisation
        self.stats = RunningMeanStd(width, 1e-5) if normalised else None
        self.critic = mlp(width, args.hidden, 1, 1.0, activation=nn.ELU)
        self.actor = mlp(width, args.hidden, n, 0.01, activation=nn.ELU)  # detail 26: separate MLPs
        # detail 24: state-independent log-std, clamped, so it can neither vanish nor explode
        self.actor_logstd = nn.Parameter(torch.full((n,), math.log(init_std)))
        self.logstd_limits = (math.log(args.min_std), math.log(10.0))

    @torch.no_grad()
    def encode(self, obs):
        """Of the frozen GR00T what the critic sees, the state and its action, once for all; other observations stay."""
        if self.flow is None:
            return obs
        encoded = self.flow.encode(obs)
        net = self.flow.network
        context = net.context(encoded)
        action = self.flow.flow_action(context, encoded["state"])
        state = encoded["state"][:, 0, : net.state_dim]
        embedding = torch.cat((net.embedding(context, encoded), state, action.flatten(1)), 1)
        return {"embedding": embedding, "action": action}

    def normalise(self, obs):
        return obs if self.stats is None else self.stats(obs)

    def update_stats(self, obs):
        if self.stats is not None:
            self.stats.update(obs)

    def std(self):  # (action_dim,)
        return self.actor_logstd.clamp(self.logstd_limits[0], self.logstd_limits[1]).exp()

    @torch.no_grad()
    def clamp_std(self):  # beyond its limits it has no gradient, and could not come back
        self.actor_logstd.clamp_(self.logstd_limits[0], self.logstd_limits[1])

    def get_value(self, obs):  # (batch, obs_dim) or a dict -> (batch,)
        return self.critic(obs["embedding"] if self.flow else obs).squeeze(-1)

    def get_dist(self, obs):
        """The distribution of actions: means (batch, action_dim)."""
        return self.actor(obs["embedding"] if self.flow else obs)

    def sample(self, dist):
        return dist + self.std() * torch.randn_like(dist)  # detail 23: Gaussian actions

    def log_prob_and_entropy(self, dist, actions):
        return gaussian_log_prob_and_entropy(dist, self.std(), actions)

    def kl(self, old_dist, old_std, dist):
        return gaussian_kl(old_dist, old_std, dist, self.std())

    def get_action_and_value(self, obs, action=None):
        dist = self.get_dist(obs)
        if action is None:
            action = self.sample(dist)
        return action, *self.log_prob_and_entropy(dist, action), self.get_value(obs), dist

    def to_env(self, action, obs):
        if self.flow:
            return self.flow.network.robot_action(obs["action"] + action[:, None])
        return action.view(-1, *self.action_shape)

    def forward(self, obs):
        """The deterministic policy on raw observations: what is evaluated and exported."""
        obs = self.normalise(self.encode(obs))
        return self.to_env(self.get_dist(obs), obs)


def make_agent(envs, args: Args):
    """The agent of --policy, on the CPU, and its GR00T (None of --policy mlp)."""
    if args.policy == "mlp":
        return Agent(envs, args), None
    flow = FlowAgent(envs, args)
    return (flow if args.policy == "gr00t" else Agent(envs, args, flow)), flow


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
    action, logprob, *rest = agent.get_action_and_value(minibatch["obs"], minibatch["actions"])
    # The sum over hundreds of components can be far off for a sample; its exponential shall stay finite.
    outputs = action, minibatch["logprobs"] + (logprob - minibatch["logprobs"]).clamp(-20, 20), *rest
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
    stats["ratio_error"] = (ratio - 1).abs().max().detach()
    return loss, stats


# --- the warm start


def flow_matching_loss(flow: FlowAgent, obs, actions):
    """Of encoded observations and normalised chunks (batch, chunk, dim): the squared error of the velocity on the line
    from noise to data (Lipman et al. 2023, arXiv 2210.02747), of what is executed, at times drawn as GR00T's were.
    """
    net = flow.network
    t = net.training_times(len(actions)).to(actions.device)
    data = torch.zeros(len(actions), *flow.noisy.shape, device=actions.device)
    net.executed(data).copy_(actions)
    noise = torch.randn_like(data)
    x = torch.lerp(noise, data, t[:, None, None])
    v = net.velocity(net.context(obs), obs["state"], x, (t * net.num_buckets).long())
    return net.executed(v - (data - noise)).square().mean()


def learn_task(flow, args, envs, interrupt) -> dict:
    """The warm start, unless the model has learned the task: demonstrations, their statistics, and --bc-steps of flow
    matching. Gives what was done.
    """
    net = flow.network
    own_expert = expert(args, envs.device)
    if not demos.wanted(net, args, envs, own_expert):
        return {}
    start = time.time()
    number = math.ceil(args.demos / args.ranks)
    data = to(demos.collect(envs, own_expert, number, args.demo_noise, interrupt), envs.device)
    net.set_ranges(**{name: distributed.mean(ends) for name, ends in demos.ranges(data).items()})
    flow.set_trainable(TUNE[args.bc_tune])

    def loss_of(minibatch):
        return flow_matching_loss(flow, flow.encode(minibatch["obs"]), net.normalise_action(minibatch["actions"]))

    demos.clone(loss_of, flow.parameters(), data, args, interrupt)
    minutes = (time.time() - start) / 60
    if os.environ.get("RANK", "0") == "0":
        with tolerant("the warm start", Path(args.log_dir)):
            net.save(Path(args.log_dir) / "warm_start", args.env_id)
    return {"demos": args.demos, "bc_steps": args.bc_steps, "warm_start_minutes": minutes}


# === learning rate ===
def adapt_learning_rate(learning_rate, kl, desired_kl):
    """rsl_rl's rule, on the device: by 1.5 down above twice the desired KL, up below half of it (but not at zero)."""
    factor = torch.where(kl > 2 * desired_kl, 1 / 1.5, torch.where((kl > 0) & (kl < desired_kl / 2), 1.5, 1.0))
    return (learning_rate * factor).clamp(1e-5, 1e-2)


# === end learning rate ===


def default_preset(args: Args) -> str:
    if args.policy == "mlp":
        return "mlp"
    if gr00t.missing():
        print(f"{gr00t.missing()} is not installed, so --policy mlp is trained, without GR00T; {gr00t.INSTALL}")
        return "mlp"
    on_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    return "gpu" if on_gpu else "laptop" if args.policy == "gr00t" else "residual"


def check_args(args: Args):
    cli.check_ranges(args)
    cli.check_compiler(args)
    demos.check(args)
    gr00t_network.check_flags(args)
    cli.check_flag(args, not args.demos or expert(args, "cpu"), "demos", f"0, as {args.env_id} has no scripted expert")
    cli.check_flag(args, 0 <= args.noise_correlation <= 1, "noise_correlation", "a number from 0 to 1")
    cli.check_flag(args, args.critic_learning_rate >= 0, "critic_learning_rate", "0 or a number above it")
    if args.policy == "mlp":
        cli.check_flag(args, args.min_std <= args.init_std, "min_std", "at most --init-std")
        cli.check_flag(args, args.observation == "state", "observation", "state; --policy mlp sees no pictures")
    else:
        cli.check_flag(args, args.noise_level > 0, "noise_level", "a number above 0, or PPO has nothing to weigh")
    if os.environ.get("RANK", "0") == "0":
        try:
            make(args, 1, args.device, threads=1).close()
        except ValueError as error:
            cli.fail(str(error))


def main(args: Args):
    # --- ranks and seeds
    T, N = args.num_steps, args.num_envs // args.ranks  # detail 1: vectorised architecture
    args.batch_size = T * N
    args.minibatch_size = args.batch_size // args.num_minibatches
    device, rank, world_size = distributed.init(args.device, small=args.minibatch_size < 2048)
    seed = args.seed + distributed.SEEDS * rank
    torch.manual_seed(args.seed)  # the same networks on every rank

    # --- environments
    num_iterations = args.num_iterations or math.ceil(args.total_timesteps / (T * args.num_envs))
    envs = make(args, N, device, seed, distributed.cores_per_rank())

    # --- agent
    agent, flow = make_agent(envs, args)
    agent.to(device)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    critic_learning_rate = torch.tensor(args.critic_learning_rate, device=device)
    desired_kl = torch.tensor(args.desired_kl, device=device)

    def begin_stage(parts):  # in which these parts of GR00T learn: its optimiser, or with one apart for the critic
        if flow:
            flow.set_trainable(parts)
        of_critic = [*agent.critic.parameters()] if args.critic_learning_rate else []
        of_rest = [p for p in agent.parameters() if p.requires_grad and p not in {*of_critic}]
        found = {"optimizer": (of_rest, learning_rate), "critic_optimizer": (of_critic, critic_learning_rate)}
        # detail 3: Adam's epsilon
        return {name: FlatAdam(params, rate, eps=1e-5) for name, (params, rate) in found.items() if params}

    @torch.no_grad()
    def policy(obs):
        return agent.sample(obs) if agent is flow else agent.sample(agent.get_dist(agent.normalise(obs)))

    # === update ===
    # Around it: args, agent, policy, optimizers, learning_rate, desired_kl (a number or a tensor), device, world_size.
    def update(minibatch):
        parts = micro_batches(minibatch, args.micro_batch_size)
        found = []
        for part in parts:
            loss, stats = ppo_loss(agent, args, part)
            for optimizer in optimizers.values():
                optimizer.compute_gradients(loss / len(parts), accumulate=bool(found))
            found.append(stats)
        stats = {name: torch.stack([stats[name] for stats in found]).mean() for name in found[0]}
        first, *others = optimizers.values()
        (kl,) = first.all_reduce(stats["kl"])  # the gradient and, beside it, the divergence: means of all ranks
        if args.desired_kl:  # detail 4: the learning rate follows the KL divergence, or else is annealed
            learning_rate.copy_(adapt_learning_rate(learning_rate, kl, desired_kl))
        for optimizer in others:
            optimizer.all_reduce()
        norms = [optimizer.clip_gradients(args.max_grad_norm) for optimizer in (first, *others)]  # detail 11: clipping
        for optimizer in (first, *others):
            optimizer.step()
        agent.clamp_std()
        return stats | {"kl": kl, "grad_norm": norms[0]}

    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # the gradient becomes part of the graph
        policy = torch.compile(policy)
        update = torch.compile(update)
    if args.cuda_graphs and device.type == "cuda":
        policy = CudaGraph(policy)
        if world_size == 1:
            update = CudaGraph(update)
    # === end update ===

    # --- storage, allocated once, but for what follows from observations and actions
    rewards = torch.zeros(T, N, device=device)
    terminations = torch.zeros(T, N, dtype=torch.bool, device=device)
    truncations = torch.zeros(T, N, dtype=torch.bool, device=device)
    final_obs = FinalObs()

    # --- warm start
    torch.manual_seed(seed)
    interrupt = checkpoint.Interrupt()
    warm_start = {}
    if flow and not args.resume:
        warm_start = learn_task(flow, args, envs, interrupt)

    # --- resume
    reached = checkpoint.load(args.resume, SCRIPT)["iteration"] - 1 if args.resume else 0
    unfrozen = parts_at(args, reached)
    optimizers = begin_stage(unfrozen)
    run = checkpoint.Run(SCRIPT, args, {"agent": agent} | optimizers, ENV_SETTINGS, envs.exact_resume)
    if run.own:
        envs.load_state_dict(run.own["envs"])
        raw_obs, next_obs = to(run.own["raw_obs"], device), to(run.own["next_obs"], device)
    else:
        raw_obs, _ = envs.reset(seed=seed, options={"random_phase": True})
        next_obs = agent.encode(raw_obs)  # what the agent makes of the environment's, as it is stored
    obs = zeros_like(next_obs, T)
    actions = None
    if warm_start:
        own = {"envs": envs.state_dict(), "raw_obs": raw_obs, "next_obs": next_obs}
        run.save(own, "model_0.pt")
        if rank == 0 and not interrupt:
            with tolerant("the evaluation", run.dir):
                write_json(run.dir / "eval" / "model_0.json", run_evaluation(agent, args, envs) | warm_start)
        run.steps_per_second()  # counts from here

    memory = gr00t.GpuMemory(device, args.memory_limit)
    logger = Logger(run.dir, args, num_iterations * T * args.num_envs, run.global_step, enabled=rank == 0)
    episodes = Meter()
    losses = Meter()
    stopped = distributed.any_rank(interrupt, device)

    while run.iteration < num_iterations and not stopped:
        # --- unfreeze
        if parts_at(args, run.iteration) != unfrozen:  # Adam begins anew
            unfrozen = parts_at(args, run.iteration)
            optimizers = begin_stage(unfrozen)
            run.learned = {"agent": agent} | optimizers
            learning_rate.fill_(args.learning_rate)
            next_obs = agent.encode(raw_obs)
            obs = zeros_like(next_obs, T)

        # --- anneal
        if args.anneal_lr and not args.desired_kl:  # detail 4: linear annealing
            learning_rate.fill_(args.learning_rate * (1 - run.iteration / num_iterations))

        # --- rollout: the actions alone; what else is known of a step follows for all of them in one batch
        for t in range(T):
            put(obs, t, next_obs)
            action = policy(next_obs)
            actions = zeros_like(action, T) if actions is None else actions
            put(actions, t, action)
            # detail 27: the environment gets a copy of the action and clips what it must; the raw one is stored
            raw_obs, rewards[t], terminations[t], truncations[t], info = envs.step(agent.to_env(action, next_obs))
            next_obs = agent.encode(raw_obs)
            final_obs.add(truncations[t], info["final_obs"])
            episodes.add(episode_metrics(info), info["_episode"])
        run.global_step += T * args.num_envs

        # --- values and log-probabilities
        with torch.no_grad():
            dones = (terminations | truncations).float()
            b_obs = agent.normalise(flatten(obs))
            b_actions = flatten(actions)
            samples = in_chunks(agent.get_action_and_value, args.chunk_size, b_obs, b_actions)
            _, b_logprobs, _, b_values, b_dists = samples
            limits = truncations.nonzero(as_tuple=True)
            limit_obs = final_obs.take_all()

            # --- bootstrap and advantages
            # A time limit is no failure: its reward includes the value of the true last observation.
            if len(limits[0]):
                limit_obs = in_chunks(agent.encode, args.chunk_size, limit_obs)
                limit_values = in_chunks(agent.get_value, args.chunk_size, agent.normalise(limit_obs))
                rewards[limits] += args.gamma * limit_values
            next_value = agent.get_value(agent.normalise(next_obs))
            values = b_values.view(T, N)
            b_advantages = flatten(compute_gae(rewards, values, dones, next_value, args.gamma, args.gae_lambda))
            b_returns = b_advantages + b_values
            if run.iteration < args.critic_iterations:
                b_advantages.zero_()
            old_std = agent.std()
        batch = {"obs": b_obs, "actions": b_actions, "logprobs": b_logprobs, "dists": b_dists}
        batch |= {"returns": b_returns, "values": b_values}
        first_ratio_error = None

        # --- update
        for _ in range(args.update_epochs):
            # detail 6: shuffled, without replacement
            b_inds = torch.randperm(args.batch_size, device=device).view(args.num_minibatches, -1)
            mb_advantages = b_advantages[b_inds]
            if args.norm_adv:
                mb_advantages = normalise_advantages(mb_advantages)
            for mb_inds, advantages in zip(b_inds, mb_advantages, strict=True):
                minibatch = take(batch, mb_inds) | {"advantages": advantages, "old_std": old_std}
                stats = update(minibatch)
                losses.add(stats)
                if first_ratio_error is None and agent is flow:  # of the rollout's probabilities and the update's
                    first_ratio_error = stats["ratio_error"]
                    if first_ratio_error > 0.05:
                        why = "the update does not compute what the rollout did"
                        raise RuntimeError(f"ratios of up to 1 +- {first_ratio_error:.2g} before any update: {why}")
            if args.target_kl and stats["kl"] > args.target_kl:
                break
        if run.iteration < args.critic_iterations:
            learning_rate.fill_(args.learning_rate)  # that the policy stood still says nothing about it
        agent.update_stats(flatten(obs))  # after the update, so that the first minibatch's ratio is exactly 1
        run.iteration += 1

        # --- log
        stopped = distributed.any_rank(interrupt, device)
        last = run.iteration == num_iterations or stopped
        if run.iteration % args.log_interval == 0 or last:
            nan_updates = next(iter(optimizers.values())).not_finite
            nan_resets, nan_updates = distributed.total(torch.stack((envs.nan_resets, nan_updates)))
            metrics = {
                "charts/SPS": run.steps_per_second(),
                "charts/learning_rate": learning_rate,
                "charts/elapsed": time.time() - run.start_time,
                "charts/nan_resets": nan_resets,
                "charts/nan_updates": nan_updates,
                "losses/explained_variance": 1 - (b_returns - b_values).var() / b_returns.var(),
            }
            metrics["charts/action_std"] = agent.std().mean()
            if agent is flow:
                metrics["losses/first_ratio_error"] = first_ratio_error
            metrics |= {f"losses/{name}": value for name, value in losses.means().items()}
            metrics |= episodes.means() | memory.read()
            logger.log(metrics, run.global_step)
        logger.progress(run.global_step)

        # --- checkpoint and evaluate
        name = f"model_{run.iteration}.pt"
        evaluate_now = args.eval_interval and run.iteration % args.eval_interval == 0 and not last
        if last or evaluate_now or run.iteration % args.checkpoint_interval == 0:
            own = {"envs": envs.state_dict(), "raw_obs": raw_obs, "next_obs": next_obs}
            run.save(own, name, *(["final_model.pt"] if run.iteration == num_iterations else []))
        if evaluate_now and rank == 0:
            result = run_evaluation(agent, args, envs)
            with tolerant("the evaluation", run.dir):
                write_json(run.dir / "eval" / f"model_{run.iteration}.json", result)
            logger.log({f"eval/{k}": v for k, v in result.items() if isinstance(v, float)}, run.global_step)
            run.keep_best(result["score"], name)
        if args.capture_video and run.iteration % args.video_interval == 0 and rank == 0:
            with tolerant("the video", run.dir), random_state_kept(device):
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
        with tolerant("the exported policy", run.dir, saved):
            if flow is None:
                checkpoint.export_onnx(agent, to(take(next_obs, slice(0, 1)), "cpu"), run.dir / "policy.onnx")
            elif agent is flow:
                flow.network.save(run.dir / "gr00t", args.env_id)
        result = run_evaluation(agent, args, envs)
        run.keep_best(result["score"], "final_model.pt")
        with tolerant("the final evaluation", run.dir, saved):
            report(agent, args, result, run.dir, "final_model", args.save_video)
            write_json(run.dir / "summary.json", summary | warm_start | result | run_info())
        print(f"{run.global_step:,} steps in {summary['wall_seconds']:.0f} s; everything is in {run.dir}")
    logger.close()
    envs.close()


def run_evaluation(agent, args: Args, envs) -> dict:
    """`evaluate` of the deterministic policy in environments of their own, the flow from the same noise each time."""
    flow = getattr(agent, "flow", agent)
    if flow:
        flow.generator = torch.Generator().manual_seed(0)
    with random_state_kept(envs.device):
        result = evaluate(agent, args, envs.device, args.eval_episodes)
    if flow:
        flow.generator = None
    return result | {"score": result["success_rate"] + 1e-4 * result["mean_return"]}


def evaluate_checkpoint(args: Args):
    """--eval-only: metrics and video of --model-path."""
    state = checkpoint.load(args.model_path, SCRIPT)
    path, run_dir = Path(args.model_path), Path(args.log_dir)
    envs = make(args, 1, args.device)
    agent, _ = make_agent(envs, args)
    agent.to(args.device)
    checkpoint.load_agent(agent, state, "--model-path")
    result = run_evaluation(agent, args, envs)
    report(agent, args, result, run_dir, path.stem, args.save_video)
    print(f"everything is in {run_dir}")


if __name__ == "__main__":
    args = checkpoint.parse_run_args(Args, SCRIPT, PRESETS, default_preset)
    if not args.ranks:
        alone = args.device != "cpu" or args.eval_only
        args.ranks = 1 if alone else distributed.even_ranks(args.num_envs)
    if args.model_path and not args.eval_only:  # in training the weights to begin with
        args.model = args.model_path
    check_args(args)
    try:
        if args.eval_only:
            evaluate_checkpoint(args)
        else:
            if os.environ.get("RANK", "0") == "0":
                args.log_dir = str(make_run_dir(args, args.env_id))
                what = f"{args.num_envs} environments, {args.ranks} ranks, {args.device}, --policy {args.policy}"
                print(f"preset {args.preset}: {what}, into {args.log_dir}")
            distributed.launch(main, args, args.ranks)
    except torch.cuda.OutOfMemoryError:
        lower = "lower --micro-batch-size, --chunk-size or --num-envs, or take --gradient-checkpointing or --tune lora"
        cli.fail(f"the GPU's memory is full; {lower}")
