"""PPO teaches a Unitree Go2 to walk in MuJoCo: on a laptop's CPU, or with thousands of robots on a GPU.

    python ppo_go2_mujoco.py                                        # the defaults of this machine, see --preset
    python ppo_go2_mujoco.py --num-envs 4096 --randomise            # a policy meant for the real robot
    python ppo_go2_mujoco.py --eval-only --model-path runs/.../checkpoints/final_model.pt

Measured on 2 CPU cores without a GPU, seeds 1 to 3 (benchmark/results/go2_time_to_walk.json): the deterministic policy
walks after 29 to 52 s; the whole laptop preset takes 4 to 5 minutes and ends at returns of 57 to 58, with a velocity
error of 0.06 to 0.07 m/s over all commands and no fall in 189 episodes. Nothing has been measured on a GPU yet.

Of the 37 details, those of Atari (14-22), of reward scaling (30, 31), LSTMs (32-36) and MultiDiscrete actions (37) have
no place here; docs/details.md gives the reason for each.
"""

import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn

from common import checkpoint, cli, distributed
from common.cuda_graph import CudaGraph
from common.envs.go2 import Go2Config, Go2Env
from common.envs.go2_eval import evaluate, evaluate_jumps, record_video, report, save_trajectories
from common.logger import Logger, make_run_dir, peak_memory_mb, run_info, write_json

SCRIPT = "ppo_go2_mujoco"
# Settings of a run that its checkpoint does not pass on, beside those of common/checkpoint.py.
NOT_SAVED = ("physics_threads", "save_trajectories", "num_trajectories")
# Every flag that differs from the defaults of Args, which are those of `laptop`.
PRESETS = {
    "laptop": {},
    "reference": dict(
        num_envs=4096,
        num_steps=24,
        num_iterations=10_000,
        learning_rate=1e-3,
        desired_kl=0.01,
        final_kl=0.01,
        gamma=0.99,
        final_gamma=0.99,
        gae_lambda=0.95,
        ent_coef=0.01,
        update_epochs=5,
        num_minibatches=4,
        hidden=(512, 256, 128),
        init_std=1.0,
        final_std=0.0,
        min_std=0.01,
        mirror=False,
        norm_obs=False,
        rewards="reference",
        kp=20.0,
        kd=0.5,
        action_latency=1,
        spawn_height=0.42,
        spawn_noise=0.0,
        command_ends=0.0,
        standing_fraction=0.0,
        checkpoint_interval=100,
        log_interval=1,
    ),
}


@dataclass
class Args(cli.RunArgs, Go2Config):
    preset: Literal["auto", "laptop", "reference"] = "auto"
    """group of defaults; auto: reference on a GPU, laptop on a CPU"""
    exp_name: str = SCRIPT
    """name of the experiment"""
    save_trajectories: str = ""
    """HDF5 file for demonstrations, with --eval-only"""
    num_trajectories: int = 100
    """episodes in that file"""
    num_envs: int = 512
    """parallel robots, over all ranks"""
    num_steps: int = 24
    """control steps per robot and iteration"""
    num_iterations: int = 600
    """iterations; --total-timesteps overrides it"""
    total_timesteps: int = 0
    """environment steps to train for (0: num_iterations)"""
    learning_rate: float = 1e-3
    """Adam's step size"""
    desired_kl: float = 0.02
    """adapt the learning rate to this KL divergence per update (0: anneal it linearly to zero)"""
    final_kl: float = 0.002
    """desired_kl falls linearly to this by the end"""
    gamma: float = 0.97
    """discount at the start"""
    final_gamma: float = 0.99
    """discount at the end; in between its horizon 1 / (1 - gamma) grows linearly"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 5
    """epochs per iteration"""
    norm_adv: bool = True
    """normalise advantages per minibatch"""
    clip_coef: float = 0.2
    """clipping of the probability ratio, and of the value update"""
    clip_vloss: bool = True
    """clip the value loss"""
    ent_coef: float = 0.0
    """entropy bonus"""
    vf_coef: float = 2.0
    """value loss coefficient; the loss has CleanRL's factor 0.5, so 2.0 is rsl_rl's 1.0"""
    max_grad_norm: float = 1.0
    """largest norm of the gradient"""
    target_kl: float = 0.0
    """end the epochs of an iteration when the KL divergence passes this (0: never)"""
    mirror: bool = True
    """half of the robots learn from their experience with left and right exchanged"""
    norm_obs: bool = True
    """normalise observations by running statistics and clip them at 10"""
    hidden: tuple[int, ...] = (256, 128, 64)
    """widths of the hidden layers of actor and critic"""
    init_std: float = 1.0
    """initial standard deviation of the actions"""
    min_std: float = 0.3
    """smallest standard deviation"""
    final_std: float = 0.3
    """the largest allowed standard deviation falls linearly from init_std to this (0: no limit)"""
    std_anneal_steps: int = 1_000_000
    """environment steps in which it falls"""

    ranks: int = 0
    """processes that share the robots on a CPU (0: one per core); on GPUs use torchrun"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the networks; auto: bfloat16 where the hardware has it, else float32"""
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


class Agent(nn.Module):
    """Actor and critic take normalised observations; `normalise` makes them."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()

        def mlp(out_dim, out_std):  # detail 26: separate MLPs
            layers, width = [], obs_dim
            for size in args.hidden:
                # As large as torch's default; with gain sqrt(2) it takes more samples to track a command closely.
                layers += [layer_init(nn.Linear(width, size), std=3**-0.5), nn.ELU(inplace=True)]
                width = size
            return nn.Sequential(*layers, layer_init(nn.Linear(width, out_dim), std=out_std))

        self.normalise = RunningMeanStd(obs_dim) if args.norm_obs else nn.Identity()  # detail 28
        self.critic = mlp(1, 1.0)  # detail 13: separate networks
        self.actor_mean = mlp(action_dim, 0.01)
        # detail 24: state-independent log-std, clamped, so it can neither vanish nor explode
        self.actor_logstd = nn.Parameter(torch.full((action_dim,), math.log(args.init_std)))
        self.register_buffer("logstd_limits", torch.tensor([math.log(args.min_std), math.log(10.0)]))
        use_bf16 = args.precision == "bfloat16"
        self.autocast = lambda x: torch.autocast(x.device.type, torch.bfloat16) if use_bf16 else nullcontext()

    def std(self):  # (action_dim,)
        return self.actor_logstd.clamp(self.logstd_limits[0], self.logstd_limits[1]).exp()

    @torch.no_grad()
    def clamp_std(self):  # beyond its limits it has no gradient, and could not come back
        self.actor_logstd.clamp_(self.logstd_limits[0], self.logstd_limits[1])

    def get_value(self, obs):  # (batch, obs_dim) -> (batch,)
        with self.autocast(obs):
            value = self.critic(obs)
        return value.float().squeeze(-1)

    def get_mean(self, obs):  # (batch, obs_dim) -> (batch, action_dim)
        with self.autocast(obs):
            mean = self.actor_mean(obs)
        return mean.float()

    def sample(self, mean):  # detail 23: Gaussian actions
        return mean + self.std() * torch.randn_like(mean)

    def log_prob(self, mean, action):  # detail 25: independent components, so log-probabilities and entropies add up
        std = self.std()
        return (-0.5 * ((action - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(1)

    def get_action_and_value(self, obs, action=None):
        mean = self.get_mean(obs)
        if action is None:
            action = self.sample(mean)
        entropy = (self.std().log() + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(obs))
        return action, self.log_prob(mean, action), entropy, self.get_value(obs), mean

    def forward(self, obs):
        """The deterministic policy on raw observations, in float32: what is evaluated and exported."""
        return self.actor_mean(self.normalise(obs))


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


def ppo_loss(agent, args, mb_obs, mb_actions, mb_logprobs, mb_means, old_std, mb_advantages, mb_returns, mb_values):
    """The loss of one minibatch, and the STATS (7,). `kl` is the exact divergence of the Gaussians, old to new."""
    _, newlogprob, entropy, newvalue, mean = agent.get_action_and_value(mb_obs, mb_actions)
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
        std = agent.std()
        kl = torch.log(std / old_std) + (old_std.square() + (mean - mb_means).square()) / (2 * std.square()) - 0.5
        clipfrac = ((ratio - 1.0).abs() > args.clip_coef).float().mean()
        stats = (pg_loss, v_loss, entropy, (-logratio).mean(), ((ratio - 1) - logratio).mean(), kl.sum(1).mean())
        stats = torch.stack((*stats, clipfrac)).detach()
    return loss, stats


def adapt_learning_rate(learning_rate, kl, desired_kl):
    """rsl_rl's rule, on the device: by 1.5 down above twice the desired KL, up below half of it (but not at zero)."""
    factor = torch.where(kl > 2 * desired_kl, 1 / 1.5, torch.where((kl > 0) & (kl < desired_kl / 2), 1.5, 1.0))
    return (learning_rate * factor).clamp(1e-5, 1e-2)


def env_config(args: Args) -> dict:
    return {name: getattr(args, name) for name in Go2Config.__dataclass_fields__}


def default_preset(args: Args) -> str:
    on_gpu = args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())
    return "reference" if on_gpu else "laptop"


def check_args(args: Args):
    require_that = partial(cli.check_flag, args)
    positive = ("num_envs", "num_steps", "num_minibatches", "update_epochs", "num_iterations", "substeps", "init_std")
    positive += ("log_interval", "checkpoint_interval", "video_interval", "eval_episodes", "learning_rate", "min_std")
    positive += ("ranks", "num_trajectories", "max_grad_norm", "clip_coef", "std_anneal_steps")
    for name in positive:
        require_that(getattr(args, name) > 0, name, "a number above 0")
    for name in ("total_timesteps", "desired_kl", "final_std", "target_kl", "eval_interval", "vf_coef"):
        require_that(getattr(args, name) >= 0, name, "0 or a number above it")
    require_that(args.min_std <= (args.final_std or args.init_std), "min_std", "at most --final-std and --init-std")
    require_that(args.hidden and min(args.hidden) > 0, "hidden", "numbers above 0")
    for name in ("gamma", "final_gamma"):
        require_that(0 <= getattr(args, name) < 1, name, "a number from 0 to below 1")
    require_that(0 <= args.gae_lambda <= 1, "gae_lambda", "a number from 0 to 1")
    require_that(args.num_envs % args.ranks == 0, "num_envs", f"a multiple of the {args.ranks} ranks")
    per_rank = args.num_envs // args.ranks * args.num_steps
    what = f"a divisor of the {per_rank} samples per rank and iteration"
    require_that(per_rank % args.num_minibatches == 0, "num_minibatches", what)
    require_that(args.eval_only or not args.save_trajectories, "save_trajectories", "a file only with --eval-only")
    cli.check_compiler(args)
    if os.environ.get("RANK", "0") == "0":
        try:
            Go2Env(1, args.device, **env_config(args) | {"physics_threads": 1})
        except ValueError as error:
            cli.fail(str(error))


def main(args: Args):
    # --- seeding and devices
    device = torch.device(args.device)
    rank, world_size = distributed.init(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(max(1, distributed.num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        distributed.keep_freed_memory()
    torch.manual_seed(args.seed)  # the same networks on every rank
    args.physics_threads = args.physics_threads or torch.get_num_threads()

    # --- environments
    num_envs = args.num_envs // world_size  # detail 1: vectorised architecture
    args.batch_size = num_envs * args.num_steps
    args.minibatch_size = args.batch_size // args.num_minibatches
    num_iterations = args.num_iterations
    if args.total_timesteps:
        num_iterations = math.ceil(args.total_timesteps / (args.batch_size * world_size))
    envs = Go2Env(num_envs, device, args.seed + 1000 * rank, **env_config(args))
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]

    # --- agent
    agent = Agent(obs_dim, action_dim, args).to(device)
    learning_rate, desired_kl = (torch.tensor(x, device=device) for x in (args.learning_rate, args.desired_kl))

    def policy(obs):
        with torch.no_grad():
            return agent.sample(agent.get_mean(agent.normalise(obs)))

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

    # --- storage, allocated once
    T, N = args.num_steps, num_envs
    obs = torch.zeros(T, N, obs_dim, device=device)
    final_obs = torch.zeros(T, N, obs_dim, device=device)
    actions = torch.zeros(T, N, action_dim, device=device)
    rewards, dones = torch.zeros(T, N, device=device), torch.zeros(T, N, device=device)
    truncations = torch.zeros(T, N, dtype=torch.bool, device=device)

    # --- resume
    iteration, global_step, elapsed, best_score, stopped = 0, 0, 0.0, -math.inf, False
    torch.manual_seed(args.seed + 1000 * rank)
    state = checkpoint.load(args.resume, SCRIPT, "cpu", "--resume") if args.resume else None
    if state:
        checkpoint.load_agent(agent, state, "--resume")
        checkpoint.load_optimizer(optimizer, state["optimizer"])
        optimizer.param_groups[0]["lr"] = learning_rate
        learning_rate.fill_(state["learning_rate"])
        iteration, global_step = state["iteration"], state["global_step"]
        elapsed, best_score = state["elapsed"], state["best_score"]
    if state and len(state["ranks"]) == world_size and state["args"]["num_envs"] == args.num_envs:
        envs.load_state_dict(state["ranks"][rank]["envs"])
        checkpoint.set_rng_state(state["ranks"][rank]["rng"])
        next_obs = state["ranks"][rank]["next_obs"].to(device)
    else:
        if state and rank == 0:
            print("warning: the checkpoint is of other ranks or num-envs, so the episodes begin anew")
        next_obs, _ = envs.reset(seed=args.seed + 1000 * rank, options={"random_phase": True})

    run_dir = Path(args.log_dir)
    logger = Logger(run_dir, args, num_iterations * args.batch_size * world_size, global_step, enabled=rank == 0)
    interrupt = checkpoint.Interrupt().__enter__()
    start_time, start_step, log_time, log_step = time.time() - elapsed, global_step, time.time(), global_step
    episodes = torch.zeros(2 + len(envs.metric_names), device=device)  # sums of return, length and metrics
    num_episodes = torch.zeros((), device=device)
    stats_sum, num_updates, bad_updates = torch.zeros(len(STATS), device=device), 0, torch.zeros((), device=device)

    def save(*names: str):
        mine = {"envs": envs.state_dict(), "rng": checkpoint.rng_state(), "next_obs": next_obs.cpu()}
        ranks = distributed.gather(mine)
        if rank == 0:
            state = {"script": SCRIPT, "args": asdict(args), "iteration": iteration, "global_step": global_step}
            state |= {"elapsed": time.time() - start_time, "best_score": best_score, "ranks": ranks}
            state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"learning_rate": learning_rate.item()}
            for name in names:
                checkpoint.save(run_dir / "checkpoints" / name, state)

    while iteration < num_iterations:
        # --- anneal
        progress = iteration / num_iterations
        gamma = 1 - 1 / ((1 - progress) / (1 - args.gamma) + progress / (1 - args.final_gamma))
        desired_kl.fill_(args.desired_kl + progress * (args.final_kl - args.desired_kl))
        if not args.desired_kl:  # detail 4: linear annealing
            learning_rate.fill_(args.learning_rate * (1 - progress))
        if args.final_std:
            fraction = min(1.0, global_step / args.std_anneal_steps)
            agent.logstd_limits[1] = math.log((1 - fraction) * args.init_std + fraction * args.final_std)
            agent.clamp_std()

        # --- rollout: the actions alone; what else is known of a step follows for all of them in one batch
        for t in range(T):
            obs[t] = next_obs
            actions[t] = policy(next_obs)
            # detail 27: the environment gets a copy of the action and clips what it must; the raw one is stored
            next_obs, rewards[t], terminated, truncations[t], info = envs.step(actions[t])
            dones[t] = terminated | truncations[t]
            final_obs[t] = info["final_obs"]
            ended = info["episode"]
            ended = torch.stack([ended["r"], ended["l"], *(ended[name] for name in envs.metric_names)])
            episodes += torch.where(info["_episode"], ended, 0.0).sum(1)
            num_episodes += info["_episode"].sum()
        global_step += args.batch_size * world_size

        # --- bootstrap and advantages
        with torch.no_grad():
            b_obs, b_actions = agent.normalise(obs.view(-1, obs_dim)), actions.view(-1, action_dim)
            b_means = agent.get_mean(b_obs)
            b_logprobs = agent.log_prob(b_means, b_actions)
            last_obs = next_obs
            if args.mirror:  # Mittal et al. 2024 (arXiv 2403.04359); the log-probabilities stay those of the sampling
                half = torch.rand(N, 1, device=device) < 0.5
                seen = obs, final_obs, next_obs
                obs, final_obs, last_obs = (torch.where(half, envs.mirror_obs(x), x) for x in seen)
                actions = torch.where(half, envs.mirror_actions(actions), actions)
                b_obs, b_actions = agent.normalise(obs.view(-1, obs_dim)), actions.view(-1, action_dim)
                b_means = agent.get_mean(b_obs)
            b_values = agent.get_value(b_obs)
            # A time limit is no failure: its reward includes the value of the true last observation.
            limits = truncations.nonzero(as_tuple=True)
            rewards[limits] += gamma * agent.get_value(agent.normalise(final_obs[limits]))
            next_value = agent.get_value(agent.normalise(last_obs))
            advantages = compute_gae(rewards, b_values.view(T, N), dones, next_value, gamma, args.gae_lambda)
            b_advantages = advantages.view(-1)
            b_returns = b_advantages + b_values
            old_std = agent.std()

        # --- update
        for _ in range(args.update_epochs):
            b_inds = torch.randperm(args.batch_size, device=device)  # detail 6: shuffled, without replacement
            mb_advantages = b_advantages[b_inds].view(-1, args.minibatch_size)
            if args.norm_adv:  # detail 7: advantages normalised per minibatch, over all ranks
                moments = torch.stack((mb_advantages.mean(1), mb_advantages.square().mean(1)))
                if world_size > 1:
                    dist.all_reduce(moments)
                    moments /= world_size
                mean, std = moments[0], (moments[1] - moments[0].square()).clamp(min=0).sqrt()
                mb_advantages = (mb_advantages - mean[:, None]) / (std[:, None] + 1e-8)
            for mb_inds, mb_advantage in zip(b_inds.view(-1, args.minibatch_size), mb_advantages, strict=True):
                stats, grad_norm, not_finite = update(
                    b_obs[mb_inds],
                    b_actions[mb_inds],
                    b_logprobs[mb_inds],
                    b_means[mb_inds],
                    old_std,
                    mb_advantage,
                    b_returns[mb_inds],
                    b_values[mb_inds],
                )
                stats_sum += stats
                bad_updates += not_finite
                num_updates += 1
            if args.target_kl and flat_grad[-1] > args.target_kl:
                break
        if args.norm_obs:  # after the update, so that the first minibatch's ratio is exactly 1
            agent.normalise.update(obs.view(-1, obs_dim))
        iteration += 1

        # --- log
        stop = torch.tensor(float(bool(interrupt)), device=device)
        if world_size > 1:
            dist.all_reduce(stop)
        stopped = stop.item() > 0
        last = iteration == num_iterations or stopped
        if iteration % args.log_interval == 0 or last:
            summary = torch.cat((episodes, num_episodes[None], envs.nan_resets[None], bad_updates[None]))
            if world_size > 1:
                dist.all_reduce(summary)
            if rank == 0:
                now, count = time.time(), max(1.0, summary[-3].item())
                explained = 1 - (b_returns - b_values).var() / b_returns.var()
                metrics = {
                    "charts/SPS": (global_step - log_step) / (now - log_time),
                    "charts/learning_rate": learning_rate,
                    "charts/elapsed": now - start_time,
                    "charts/nan_resets": summary[-2],
                    "charts/nan_updates": summary[-1],
                    "charts/action_std": agent.std().mean(),
                    "losses/explained_variance": explained,
                    "losses/grad_norm": grad_norm,
                }
                metrics |= {f"losses/{k}": v / num_updates for k, v in zip(STATS, stats_sum, strict=True)}
                names = ("charts/episodic_return", "charts/episodic_length", *(f"env/{k}" for k in envs.metric_names))
                if summary[-3] > 0:
                    metrics |= {name: total / count for name, total in zip(names, summary, strict=False)}
                logger.log(metrics, global_step)
                log_time, log_step = now, global_step
            episodes.zero_(), num_episodes.zero_(), stats_sum.zero_()
            num_updates = 0
        logger.progress(global_step)

        # --- checkpoint and evaluate
        names = [f"model_{iteration}.pt"] if iteration % args.checkpoint_interval == 0 or last else []
        if args.eval_interval and iteration % args.eval_interval == 0 and not last:
            score = torch.zeros((), device=device)
            if rank == 0:
                result = run_evaluation(agent, args, device)
                write_json(run_dir / "eval" / f"model_{iteration}.json", result)
                logger.log({f"eval/{k}": v for k, v in result.items() if isinstance(v, float)}, global_step)
                score.fill_(-result["fall_rate"] - result["lin_vel_error"])
            if world_size > 1:
                dist.broadcast(score, 0)
            if score > best_score:
                best_score = score.item()
                names.append("best_model.pt")
        if args.capture_video and iteration % args.video_interval == 0 and rank == 0:
            path = record_video(agent, env_config(args), run_dir / "videos" / f"model_{iteration}.mp4")
            if path:
                logger.video("videos/policy", path, global_step)
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
        checkpoint.export_onnx(agent.cpu(), torch.zeros(1, obs_dim), run_dir / "policy.onnx")
        result = run_evaluation(agent, args, "cpu" if envs.physics.backend == "mujoco" else device)
        report(agent.cpu(), env_config(args), result, run_dir, "final_model", args.save_video)
        final = {"iterations": iteration, "global_step": global_step, "wall_seconds": wall}
        final |= {"SPS": (global_step - start_step) / (wall - elapsed), "peak_memory_mb": peak_memory_mb(device)}
        final |= {k: v for k, v in result.items() if k != "grid"}
        write_json(run_dir / "summary.json", final | run_info())
        if -result["fall_rate"] - result["lin_vel_error"] > best_score:
            final_model = checkpoint.load(run_dir / "checkpoints" / "final_model.pt", SCRIPT)
            checkpoint.save(run_dir / "checkpoints" / "best_model.pt", final_model)
        print(f"{global_step:,} steps in {wall:.0f} s; everything is in {run_dir}")
    logger.close()


def evaluate_checkpoint(args: Args):
    """--eval-only: metrics, heat map and video of --model-path, and demonstrations if asked for."""
    state = checkpoint.load(args.model_path, SCRIPT, "cpu")
    device = torch.device(args.device)
    env = Go2Env(1, device, **env_config(args))
    agent = Agent(env.single_observation_space.shape[0], env.single_action_space.shape[0], args).to(device)
    checkpoint.load_agent(agent, state, "--model-path")
    path, run_dir = Path(args.model_path), Path(args.log_dir)
    result = run_evaluation(agent, args, device)
    report(agent.cpu(), env_config(args), result, run_dir, path.stem, args.save_video)
    if args.save_trajectories:
        save_trajectories(agent.to(device), env_config(args), device, args.save_trajectories, args.num_trajectories)
    print(f"everything is in {run_dir}")


def run_evaluation(agent: Agent, args: Args, device) -> dict:
    """`evaluate` of the deterministic policy, with every core at its disposal."""
    config = env_config(args) | {"physics_threads": 0}
    result = evaluate(agent.to(device), config, device, args.eval_episodes)
    return result | (evaluate_jumps(agent, config, device, args.eval_episodes) if args.commands == "full" else {})


if __name__ == "__main__":
    args = checkpoint.parse_run_args(Args, SCRIPT, PRESETS, default_preset, NOT_SAVED)
    if args.precision == "auto":
        args.precision = "bfloat16" if distributed.has_bfloat16(args.device) else "float32"
    if not args.ranks:
        args.ranks = 1 if args.device != "cpu" or args.eval_only else distributed.num_cores()
    check_args(args)
    if args.eval_only:
        evaluate_checkpoint(args)
    else:
        if os.environ.get("RANK", "0") == "0":
            args.log_dir = str(make_run_dir(args, "Go2-v0"))
            what = f"{args.num_envs} robots, {args.precision}, {args.ranks} ranks"
            print(f"preset {args.preset}: {what}, into {args.log_dir}")
        distributed.launch(main, args, args.ranks)
