"""PPO teaches a Franka Panda to insert a peg into a hole by camera, touch and proprioception, in MuJoCo.

    python ppo_multimodal_peginsert.py                               # from Factory's state observation, on a laptop
    python ppo_multimodal_peginsert.py --observation multimodal --modalities tactile proprio
    python ppo_multimodal_peginsert.py --eval-only --model-path runs/.../checkpoints/final_model.pt

Measured on 2 CPU cores without a GPU, one seed (benchmark/results/peg_insert.json): after 4.92 million steps from state
the deterministic policy inserts in 98.0% of 256 fresh episodes at difficulty 0.5, in 87.1% at 0.75 and in 72.7% at 1,
which is Factory's clearance and randomisation. From camera, touch and proprioception it inserts in 50.0% at difficulty
0.3 with 4 mm of clearance after 328 thousand steps, from proprioception alone in 14.1%. Nothing was measured on a GPU.

Of the 37 details, some of those of Atari (14-20), LSTMs (32-36) and MultiDiscrete actions (37) have no place here;
docs/details.md gives the reason for each.
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

from common import agents, checkpoint, cli, distributed
from common.cuda_graph import CudaGraph
from common.envs import isaac, peg_isaac
from common.envs.peg_insert import ENV_SETTINGS, PegInsertConfig, PegInsertEnv
from common.envs.peg_insert_eval import evaluate, record_video, report
from common.files import tolerant, write_json
from common.flat_adam import FlatAdam
from common.logger import Logger, make_run_dir
from common.meter import Meter, episode_metrics
from common.provenance import run_info
from common.storage import FinalObs, flatten, in_chunks, put, take, to, zeros

SCRIPT = "ppo_multimodal_peginsert"
# N per taxel, of a pad's normal force and its two shears: a grip's print is large, what the hole does to it small.
TACTILE_SCALE = (0.1, 0.01, 0.01)
# Returns are larger than what values may move by in an iteration where their loss is clipped: the critic would lag. And
# with less noise the policy learns to press and to wait; with this much it learns to search.
STATE = dict(desired_kl=0.02, gamma=0.985, clip_vloss=False, init_std=0.5, min_std=0.5, curriculum_step=0.06)
PICTURES = dict(num_steps=32, update_epochs=3, desired_kl=0.05, final_kl=0.05, gamma=0.97, init_std=0.4)
PICTURES |= dict(difficulty=0.5, clearance=0.004, curriculum=False, max_episode_steps=75)
# Every flag that differs from the defaults of Args, by group.
PRESETS = {
    "laptop": STATE | dict(num_envs=128, num_iterations=600, hidden=(256, 128)),
    "multimodal": PICTURES | dict(observation="multimodal", num_envs=128, num_iterations=300, hidden=(256, 128)),
    "gpu": STATE | dict(num_envs=512, num_iterations=400),
}


@dataclass
class Args(cli.RunArgs, PegInsertConfig):
    preset: Literal["auto", *PRESETS] = "auto"
    """group of defaults; auto: gpu on a GPU, multimodal with --observation multimodal, else laptop"""
    exp_name: str = SCRIPT  # name of the experiment
    curriculum: bool = True  # every environment's difficulty rises with its successes, from 0 to --difficulty
    env_id: str = "PegInsert-v0"  # task: this one, or the Factory-PegInsert of Isaac Lab
    num_agents: int = 1  # independent agents, each with --num-envs environments and a seed and folder of its own

    num_envs: int = 4096  # parallel environments, over all ranks
    num_steps: int = 64  # steps per environment and iteration
    num_iterations: int = 1000  # iterations to train for (0: those of --total-timesteps)
    total_timesteps: int = 0  # environment steps to train for (0: those of --num-iterations)
    learning_rate: float = 1e-3  # Adam's step size
    desired_kl: float = 0.01  # adapt the learning rate to this KL divergence per update (0: do not)
    final_kl: float = 0.01  # desired_kl falls linearly to this by the end
    anneal_lr: bool = True  # let the learning rate fall linearly to zero, where no KL divergence is desired
    gamma: float = 0.995  # discount
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
    norm_reward: bool = True
    """divide rewards by the running standard deviation of the discounted return and clip them at 10"""
    hidden: tuple[int, ...] = (512, 256, 128)  # widths of the hidden layers of actor and critic
    init_std: float = 1.0  # initial standard deviation of continuous actions
    min_std: float = 0.01  # smallest standard deviation
    embedding: int = 256  # width of the fusion of the modalities

    ranks: int = 0  # processes that share the environments on a CPU (0: as many as pay); on GPUs use torchrun
    chunk_size: int = 4096  # samples per forward pass after the rollout, as many as the memory holds
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


def cnn(channels, size, widths, kernels, strides, out_dim):  # detail 21: a CNN that actor and critic share
    """(batch, channels, size, size) to (batch, out_dim): convolutions with GroupNorm, then one layer with LayerNorm."""
    layers = []
    for width, kernel, stride in zip(widths, kernels, strides, strict=True):
        layers += [layer_init(nn.Conv2d(channels, width, kernel, stride)), nn.GroupNorm(8, width), nn.ReLU()]
        channels = width
        size = (size - kernel) // stride + 1
    flat = layer_init(nn.Linear(channels * size * size, out_dim))
    return nn.Sequential(*layers, nn.Flatten(), flat, nn.LayerNorm(out_dim), nn.ReLU())


class Encoder(nn.Module):
    """A dict of modalities to one embedding (batch, embedding)."""

    def __init__(self, spaces, embedding: int):
        super().__init__()
        encoders = {
            "rgb": lambda: cnn(3, spaces["rgb"].shape[0], (16, 32, 32), (8, 4, 3), (4, 2, 1), 128),
            "tactile": lambda: cnn(6, spaces["tactile"].shape[1], (16, 32), (8, 3), (4, 2), 128),
            "proprio": lambda: nn.Sequential(mlp(spaces["proprio"].shape[0], (128,), 128, 2**0.5), nn.LayerNorm(128)),
        }
        self.encoders = nn.ModuleDict({name: encoders[name]() for name in spaces})
        fusion = layer_init(nn.Linear(128 * len(spaces), embedding))
        self.fusion = nn.Sequential(fusion, nn.LayerNorm(embedding), nn.ReLU())
        self.register_buffer("tactile_scale", torch.tensor(TACTILE_SCALE * 2)[:, None, None])

    def forward(self, obs):
        obs = dict(obs)
        if "rgb" in obs:  # detail 22: images scaled to [0, 1]
            obs["rgb"] = obs["rgb"].permute(0, 3, 1, 2) / 255  # of movedim, ONNX makes an invalid file
        if "tactile" in obs:
            obs["tactile"] = obs["tactile"] / self.tactile_scale
        return self.fusion(torch.cat([encoder(obs[name]) for name, encoder in self.encoders.items()], 1))


class Agent(nn.Module):
    """Actor and critic take normalised observations: a dict of modalities by one shared encoder, the state by none.
    `normalise` makes them.
    """

    def __init__(self, envs, args: Args):
        super().__init__()
        space = envs.single_observation_space
        self.action_shape = envs.single_action_space.shape
        self.encoder, width = nn.Identity(), space.shape and space.shape[0]
        vector = space
        if args.observation == "multimodal":  # detail 13: a shared encoder
            self.encoder, width = Encoder(space, args.embedding), args.embedding
            vector = space.spaces.get("proprio")
        self.stats = RunningMeanStd(vector.shape[0], 1e-5) if args.norm_obs and vector else None  # detail 28
        self.return_stats = RunningMeanStd(1)
        self.critic = mlp(width, args.hidden, 1, 1.0, activation=nn.ELU)
        self.actor = mlp(width, args.hidden, self.action_shape[0], 0.01, activation=nn.ELU)  # detail 26: separate MLPs
        # detail 24: state-independent log-std, clamped, so it can neither vanish nor explode
        self.actor_logstd = nn.Parameter(torch.full(self.action_shape, math.log(args.init_std)))
        self.logstd_limits = (math.log(args.min_std), math.log(10.0))

    def normalise(self, obs):
        if self.stats is None:
            return obs
        return obs | {"proprio": self.stats(obs["proprio"])} if isinstance(obs, dict) else self.stats(obs)

    def update_stats(self, obs):
        if self.stats is not None:
            self.stats.update(obs["proprio"] if isinstance(obs, dict) else obs)

    def std(self):  # (action_dim,)
        return self.actor_logstd.clamp(self.logstd_limits[0], self.logstd_limits[1]).exp()

    @torch.no_grad()
    def clamp_std(self):  # beyond its limits it has no gradient, and could not come back
        self.actor_logstd.clamp_(self.logstd_limits[0], self.logstd_limits[1])

    def embed(self, obs):  # {name: (batch, ...)} or (batch, obs_dim) -> (batch, width)
        return self.encoder(obs)

    def get_value(self, obs):  # (batch,)
        return self.critic(self.embed(obs)).squeeze(-1)

    def get_dist(self, obs):
        """The distribution of actions: means (batch, action_dim)."""
        return self.actor(self.embed(obs))

    def sample(self, dist):
        return dist + self.std() * torch.randn_like(dist)  # detail 23: Gaussian actions

    def log_prob_and_entropy(self, dist, actions):
        return gaussian_log_prob_and_entropy(dist, self.std(), actions)

    def kl(self, old_dist, old_std, dist):
        return gaussian_kl(old_dist, old_std, dist, self.std())

    def get_action_and_value(self, obs, action=None):
        embedding = self.embed(obs)
        dist = self.actor(embedding)
        value = self.critic(embedding).squeeze(-1)
        if action is None:
            action = self.sample(dist)
        return action, *self.log_prob_and_entropy(dist, action), value, dist

    def forward(self, obs):
        """The deterministic policy on raw observations: what is evaluated and exported."""
        return self.get_dist(self.normalise(obs))


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
    outputs = agent.get_action_and_value(minibatch["obs"], minibatch["actions"])
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
    on_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    return "gpu" if on_gpu else "multimodal" if args.observation == "multimodal" else "laptop"


def check_args(args: Args):
    factory = peg_isaac.is_factory(args.env_id)
    known = factory or args.env_id == "PegInsert-v0"
    cli.check_flag(args, known, "env_id", "PegInsert-v0 or the name of Isaac Lab's Factory-PegInsert task")
    agents.check(args)
    cli.check_ranges(args)
    cli.check_flag(args, args.min_std <= args.init_std, "min_std", "at most --init-std")
    cli.check_image_size(args)
    cli.check_compiler(args)
    if os.environ.get("RANK", "0") == "0":
        try:
            PegInsertEnv(1, args.device, cfg=args, physics_threads=1).close()
            if factory:
                isaac.check_task(args.env_id, physics="")
        except ValueError as error:
            cli.fail(str(error))


def make(args: Args, num_envs: int, device, seed: int, threads: int = 0):
    if peg_isaac.is_factory(args.env_id):
        video_dir = str(Path(args.log_dir) / "videos") if args.capture_video else ""
        return peg_isaac.FactoryPegEnv(num_envs, device, seed, args, args.env_id, video_dir)
    return PegInsertEnv(num_envs, device, seed, cfg=args, physics_threads=threads)


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
    agent = Agent(envs, args).to(device)
    checkpoint.begin_with(agent, args, SCRIPT)
    learning_rate = torch.tensor(args.learning_rate, device=device)
    desired_kl = torch.tensor(args.desired_kl, device=device)
    optimizer = FlatAdam(agent.parameters(), learning_rate, eps=1e-5)  # detail 3: Adam's epsilon

    @torch.no_grad()
    def policy(obs):
        return agent.sample(agent.get_dist(agent.normalise(obs)))

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

    # --- resume
    torch.manual_seed(seed)
    learned = {"agent": agent, "optimizer": optimizer}
    run = checkpoint.Run(SCRIPT, args, learned, ENV_SETTINGS, envs.exact_resume)
    if run.own:
        envs.load_state_dict(run.own["envs"])
        next_obs = to(run.own["next_obs"], device)
        next_start = run.own["next_start"].to(device)
        running_return = run.own["running_return"].to(device)
    else:
        next_obs, _ = envs.reset(seed=seed, options={"random_phase": True})

    logger = Logger(run.dir, args, num_iterations * T * args.num_envs, run.global_step, enabled=rank == 0)
    interrupt = checkpoint.Interrupt()
    episodes = Meter()
    losses = Meter()
    stopped = False

    while run.iteration < num_iterations and not stopped:
        # --- anneal
        progress = run.iteration / num_iterations
        desired_kl.fill_(args.desired_kl + progress * (args.final_kl - args.desired_kl))
        if args.anneal_lr and not args.desired_kl:  # detail 4: linear annealing
            learning_rate.fill_(args.learning_rate * (1 - progress))

        # --- rollout: the actions alone; what else is known of a step follows for all of them in one batch
        for t in range(T):
            put(obs, t, next_obs)
            starts[t] = next_start
            actions[t] = policy(next_obs)
            # detail 27: the environment gets a copy of the action and clips what it must; the raw one is stored
            next_obs, rewards[t], terminations[t], truncations[t], info = envs.step(actions[t])
            next_start = info["_episode"].float()
            final_obs.add(truncations[t], info["final_obs"])
            episodes.add(episode_metrics(info), info["_episode"])
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
            b_obs = agent.normalise(flatten(obs))
            b_actions = flatten(actions)
            samples = in_chunks(agent.get_action_and_value, args.chunk_size, b_obs, b_actions)
            _, b_logprobs, _, b_values, b_dists = samples
            limits = truncations.nonzero(as_tuple=True)
            limit_obs = final_obs.take_all()

            # --- bootstrap and advantages
            # A time limit is no failure: its reward includes the value of the true last observation.
            rewards[limits] += args.gamma * in_chunks(agent.get_value, args.chunk_size, agent.normalise(limit_obs))
            next_value = agent.get_value(agent.normalise(next_obs))
            values = b_values.view(T, N)
            b_advantages = flatten(compute_gae(rewards, values, dones, next_value, args.gamma, args.gae_lambda))
            b_returns = b_advantages + b_values
            old_std = agent.std()
        batch = {"obs": b_obs, "actions": b_actions, "logprobs": b_logprobs, "dists": b_dists}
        batch |= {"returns": b_returns, "values": b_values}

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
            if args.target_kl and stats["kl"] > args.target_kl:
                break
        agent.update_stats(flatten(obs))  # after the update, so that the first minibatch's ratio is exactly 1
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
            metrics["charts/action_std"] = agent.std().mean()
            metrics |= {f"losses/{name}": value for name, value in losses.means().items()}
            metrics |= episodes.means()
            logger.log(metrics, run.global_step)
        logger.progress(run.global_step)

        # --- checkpoint and evaluate
        name = f"model_{run.iteration}.pt"
        evaluate_now = args.eval_interval and run.iteration % args.eval_interval == 0 and not last
        if last or evaluate_now or run.iteration % args.checkpoint_interval == 0:
            own = {"envs": envs.state_dict(), "next_obs": next_obs}
            own |= {"next_start": next_start, "running_return": running_return}
            run.save(own, name, *(["final_model.pt"] if run.iteration == num_iterations else []))
        if evaluate_now and rank == 0:
            result = run_evaluation(agent, args, envs)
            with tolerant("the evaluation", run.dir):
                write_json(run.dir / "eval" / f"model_{run.iteration}.json", result)
            logger.log({f"eval/{k}": v for k, v in result.items() if isinstance(v, float)}, run.global_step)
            run.keep_best(result["score"], name)
            if peg_isaac.is_factory(args.env_id):  # a simulator runs once per process, so it was evaluated in
                next_obs, _ = envs.reset()
                next_start = torch.ones_like(next_start)
        films = args.capture_video and not peg_isaac.is_factory(args.env_id)  # which has a recorder of its own
        if films and run.iteration % args.video_interval == 0 and rank == 0:
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
            checkpoint.export_onnx(agent, to(take(next_obs, slice(0, 1)), "cpu"), run.dir / "policy.onnx")
        result = run_evaluation(agent, args, envs)
        run.keep_best(result["score"], "final_model.pt")
        with tolerant("the final evaluation", run.dir, saved):
            films = args.save_video and not peg_isaac.is_factory(args.env_id)
            report(agent, args, result, run.dir, "final_model", films)
            write_json(run.dir / "summary.json", summary | result | run_info())
        print(f"{run.global_step:,} steps in {summary['wall_seconds']:.0f} s; everything is in {run.dir}")
    logger.close()
    envs.close()


def run_evaluation(agent: Agent, args: Args, envs) -> dict:
    """`evaluate` of the deterministic policy in new environments, or in `envs`, where a process can have only one."""
    only = envs if peg_isaac.is_factory(args.env_id) else None
    result = evaluate(agent, args, envs.device, args.eval_episodes, envs=only)
    return result | {"score": result["success_rate"] + 1e-4 * result["mean_return"]}


def evaluate_checkpoint(args: Args):
    """--eval-only: metrics and video of --model-path."""
    state = checkpoint.load(args.model_path, SCRIPT)
    path, run_dir = Path(args.model_path), Path(args.log_dir)
    envs = make(args, args.num_envs if peg_isaac.is_factory(args.env_id) else 1, args.device, args.seed)
    agent = Agent(envs, args).to(args.device)
    checkpoint.load_agent(agent, state, "--model-path")
    result = run_evaluation(agent, args, envs)
    report(agent, args, result, run_dir, path.stem, args.save_video and not peg_isaac.is_factory(args.env_id))
    print(f"everything is in {run_dir}")


if __name__ == "__main__":
    agents.resume_all(Args, PRESETS, default_preset)
    args = checkpoint.parse_run_args(Args, SCRIPT, PRESETS, default_preset)
    if not args.ranks:
        alone = args.device != "cpu" or args.eval_only or args.num_agents > 1
        args.ranks = 1 if alone else distributed.even_ranks(args.num_envs)
    check_args(args)
    if args.eval_only:
        evaluate_checkpoint(args)
    else:
        if os.environ.get("RANK", "0") == "0":
            args.log_dir = str(make_run_dir(args, args.env_id))
            what = f"{args.num_envs} environments, {args.ranks} ranks, {args.device}"
            print(f"preset {args.preset}: {what}, into {args.log_dir}")
        if args.num_agents > 1:
            agents.train(args.log_dir, args.device)
        distributed.launch(main, args, args.ranks)
