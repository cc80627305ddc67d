"""What a Go2 policy is worth: a grid of commands on fresh seeds, a video, demonstrations."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.envs.go2 import CONTROL_DT, LEGS, Go2Env
from common.logger import mean_ci95, wilson_ci95

Policy = Callable[[torch.Tensor], torch.Tensor]  # raw observations -> actions
FOOT_ORDER = tuple(LEGS.index(leg) for leg in ("FL", "FR", "RL", "RR"))
SETTLE = round(1.0 / CONTROL_DT)  # steps from standing to the commanded velocity that do not count as error


def command_grid(env_config: dict, num_commands: int, episodes: int, counts=(7, 3, 3)) -> torch.Tensor:
    """(n >= episodes, num_commands): an even grid over the ranges of vx, vy and yaw rate, repeated to `episodes`."""
    low_high = [env_config[f"command_{name}"] for name in ("vx", "vy", "yaw")]
    axes = [torch.linspace(*lh, n) if lh[0] < lh[1] else torch.tensor(lh[:1]) for lh, n in zip(low_high, counts, strict=True)]
    grid = torch.cartesian_prod(*axes)
    grid = grid.repeat(math.ceil(episodes / len(grid)), 1)
    return torch.nn.functional.pad(grid, (0, num_commands - 3))


@torch.no_grad()
def evaluate(policy: Policy, env_config: dict, device, episodes: int = 128, seed: int = 10_000, counts=(7, 3, 3)) -> dict:
    """Runs one episode per command of the grid to its end. Velocities are compared step by step, after one second.

    Returns the metrics of docs/go2.md (m/s, rad/s, W, m) and, under `grid`, the same per episode.
    """
    config = env_config | {"resample_seconds": 1e6, "jump_interval": math.inf}
    num_commands = 5 if env_config["commands"] == "full" else 3
    commands = command_grid(config, num_commands, episodes, counts).to(device)
    if num_commands == 5:
        commands[:, 3] = env_config["base_height_target"]
    env = Go2Env(len(commands), device, seed, **config)
    env.fixed_commands = commands
    obs, _ = env.reset(seed=seed)
    N = len(commands)
    zero = lambda *shape: torch.zeros(N, *shape, device=device)  # noqa: E731
    alive, fallen = torch.ones(N, dtype=torch.bool, device=device), torch.zeros(N, dtype=torch.bool, device=device)
    returns, lengths, counted, lin_error, yaw_error, power = (zero() for _ in range(6))
    mean_velocity = zero(3)
    duty, peak, lift, swings = (zero(4) for _ in range(4))
    radius = env.foot_radius
    for step in range(env.max_episode_length):
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        live = (alive & ~(terminated | truncated)).float()  # the state after a reset belongs to the next episode
        returns += reward * alive
        lengths += alive
        fallen |= terminated & alive
        if step >= SETTLE:
            counted += live
            lin_error += live * (commands[:, :2] - env.lin_vel[:, :2]).norm(dim=1)
            yaw_error += live * (commands[:, 2] - env.ang_vel[:, 2]).abs()
            mean_velocity += live[:, None] * torch.cat((env.lin_vel[:, :2], env.ang_vel[:, 2:]), 1)
            power += live * (env.physics.actuator_force.float() * env.dof_vel).abs().sum(1)
            sensors = env.physics.sensordata.float()
            height, contact = sensors[:, :12].view(N, 4, 3)[..., 2] - radius, sensors[:, 12:] > 0
            duty += live[:, None] * contact
            landed = contact & (peak > 0) & (live > 0)[:, None]
            lift += torch.where(landed, peak, 0.0)
            swings += landed
            peak = torch.where(contact, 0.0, torch.maximum(peak, height))
        alive &= ~(terminated | truncated)
    counted.clamp_(min=1)
    moving = commands[:, :3].norm(dim=1) > 0.1
    speed = (mean_velocity / counted[:, None])[:, :2].norm(dim=1)
    power, lin_error, yaw_error = power / counted, lin_error / counted, yaw_error / counted
    walking = moving & (speed > 0.1)
    weight = float(env.model.body_mass.sum() * abs(env.model.opt.gravity[2]))
    feet = lambda total, n: (total[moving].sum(0) / n.clamp(min=1))[list(FOOT_ORDER)].tolist()  # noqa: E731
    mean_return, return_ci = mean_ci95(returns.tolist())
    lin_mean, lin_ci = mean_ci95(lin_error.tolist())
    yaw_mean, yaw_ci = mean_ci95(yaw_error.tolist())
    return {
        "episodes": N,
        "seed": seed,
        "mean_return": mean_return,
        "return_ci95": [mean_return - return_ci, mean_return + return_ci],
        "mean_length": lengths.mean().item(),
        "fall_rate": fallen.float().mean().item(),
        "falls": int(fallen.sum()),
        "fall_ci95": list(wilson_ci95(int(fallen.sum()), N)),
        "lin_vel_error": lin_mean,
        "lin_vel_error_ci95": [lin_mean - lin_ci, lin_mean + lin_ci],
        "yaw_rate_error": yaw_mean,
        "yaw_rate_error_ci95": [yaw_mean - yaw_ci, yaw_mean + yaw_ci],
        "mean_power": power[moving].mean().item() if moving.any() else 0.0,
        "cost_of_transport": (power / (weight * speed))[walking].mean().item() if walking.any() else 0.0,
        "foot_lift": feet(lift, swings[moving].sum(0)),
        "duty_factor": feet(duty, counted[moving].sum()),
        "grid": {
            "command": commands.tolist(),
            "mean_velocity": (mean_velocity / counted[:, None]).tolist(),
            "lin_vel_error": lin_error.tolist(),
            "yaw_rate_error": yaw_error.tolist(),
            "fallen": fallen.tolist(),
            "return": returns.tolist(),
        },
    }


def record_video(): ...
def save_trajectories(): ...
