"""What a Go2 policy is worth: a grid of commands on fresh seeds, a video, demonstrations."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import mujoco
import numpy as np
import torch

from common.cli import require
from common.envs.go2 import (
    ANG_VEL_SCALE,
    COMMAND_SCALE,
    DOF_VEL_SCALE,
    JUMP_LANDING,
    JUMP_TOLERANCE,
    JUMP_WINDOW,
    LIN_VEL_SCALE,
    Go2Env,
)
from common.envs.go2_config import CONTROL_DT, JOINTS, LEGS, Go2Config, build_model
from common.evaluation import Policy, can_film, device_of
from common.files import write_json
from common.stats import mean_ci95, wilson_ci95

FOOT_ORDER = tuple(LEGS.index(leg) for leg in ("FL", "FR", "RL", "RR"))
SETTLE = round(1.0 / CONTROL_DT)  # steps from standing to the commanded velocity that do not count as error
TRAJECTORY_BATCH = 250  # robots at once in save_trajectories: about 140 MB of memory for 20 s episodes


def command_grid(cfg: Go2Config, num_commands: int, episodes: int, counts=(7, 3, 3)) -> torch.Tensor:
    """(n >= episodes, num_commands): an even grid over the ranges of vx, vy and yaw rate, repeated to `episodes`."""
    low_high = [getattr(cfg, f"command_{name}") for name in ("vx", "vy", "yaw")]
    axes = [torch.linspace(low, high, n if low < high else 1) for (low, high), n in zip(low_high, counts, strict=True)]
    grid = torch.cartesian_prod(*axes)
    grid = grid.repeat(math.ceil(episodes / len(grid)), 1)
    return torch.nn.functional.pad(grid, (0, num_commands - 3))


@torch.no_grad()
def evaluate(policy: Policy, cfg: Go2Config, device, episodes: int = 128, seed: int = 10_000, counts=(7, 3, 3)) -> dict:
    """Runs one episode per command of the grid to its end. Velocities are compared step by step, after one second.

    Returns the metrics of docs/go2_data.md (m/s, rad/s, W, m) and, under `grid`, the same per episode.
    """
    num_commands = 5 if cfg.commands == "full" else 3
    commands = command_grid(cfg, num_commands, episodes, counts).to(device)
    if num_commands == 5:
        commands[:, 3] = cfg.base_height_target
    env = Go2Env(len(commands), device, seed, cfg, resample_seconds=1e6, jump_interval=math.inf)
    env.fixed_commands = commands
    obs, _ = env.reset(seed=seed)
    N = len(commands)
    zero = lambda *shape: torch.zeros(N, *shape, device=device)  # noqa: E731
    alive, fallen = torch.ones(N, dtype=torch.bool, device=device), torch.zeros(N, dtype=torch.bool, device=device)
    returns, lengths, counted, lin_error, yaw_error, power, tilt = (zero() for _ in range(7))
    mean_velocity = zero(3)
    duty, peak, lift, swings = (zero(4) for _ in range(4))
    radius = env.foot_radius
    for step in range(env.max_episode_length):
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        live = (alive & ~(terminated | truncated)).float()  # the state after a reset belongs to the next episode
        returns += reward * alive
        lengths += alive
        fallen |= terminated & alive
        tilt = torch.maximum(tilt, env.tilt * alive)
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
    # A robot that fell before anything was counted tracked nothing: its error is that of standing still, not zero.
    early = counted == 0
    lin_error += early * commands[:, :2].norm(dim=1)
    yaw_error += early * commands[:, 2].abs()
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
            "max_tilt": tilt.tolist(),
            "return": returns.tolist(),
        },
    }


def command_script(cfg: Go2Config) -> list[tuple[str, float, tuple[float, ...]]]:
    """[(title, share of the time, (vx, vy, yaw rate, height))]: what the video shows, inside the trained ranges."""

    def move(vx: float, vy: float = 0.0, yaw: float = 0.0, height: float = cfg.base_height_target):
        wanted = {"vx": vx, "vy": vy, "yaw": yaw}
        ranges = {name: getattr(cfg, f"command_{name}") for name in wanted}
        return (*(min(max(value, ranges[name][0]), ranges[name][1]) for name, value in wanted.items()), height)

    script = [
        ("forward, slow", 1.5, move(0.5)),
        ("forward, fast", 2.0, move(cfg.command_vx[1])),
        ("turn left", 1.5, move(0.5, yaw=cfg.command_yaw[1])),
        ("turn right", 1.5, move(0.5, yaw=cfg.command_yaw[0])),
        ("sideways, left", 1.5, move(0.0, cfg.command_vy[1])),
        ("sideways, right", 1.5, move(0.0, cfg.command_vy[0])),
        ("stand", 1.0, (0.0, 0.0, 0.0, cfg.base_height_target)),
    ]
    if cfg.command_vx[0] < 0:
        script.insert(-1, ("backward", 1.5, move(cfg.command_vx[0])))
    if cfg.commands == "full":
        low, high = cfg.command_height
        script += [("low", 1.5, move(0.5, height=low)), ("high", 1.5, move(0.5, height=high))]
        script += [("jump", 2.0, (0.0, 0.0, 0.0, cfg.base_height_target))]
    return script


@torch.no_grad()
def record_video(policy: Policy, cfg: Go2Config, path: str | Path, seconds: float = 12, seed: int = 10_000):
    """One robot on the CPU follows `command_script`, filmed in real time at 25 frames per second.

    Green is the commanded velocity, orange the measured one, averaged over about a quarter of a second. Returns the
    path of the mp4; where nothing can render, says so in one sentence and returns None.
    """
    from common.video import Recorder

    if not can_film():
        return None
    device = device_of(policy)
    changes = {
        "resample_seconds": CONTROL_DT,
        "jump_interval": math.inf,
        "jump_tracking": math.inf,
        "episode_seconds": seconds + 1,
    }
    env = Go2Env(1, "cpu", seed, cfg, physics_threads=1, **changes)
    script = command_script(env.cfg)
    ends = np.cumsum([share for _, share, _ in script]) * seconds / sum(share for _, share, _ in script)
    full = env.cfg.commands == "full"
    model = build_model(env.cfg, visual=True)
    measured, heading, fell, previous = np.zeros(3), 0.0, -math.inf, ""
    with Recorder(model, path, fps=round(0.5 / CONTROL_DT)) as recorder:
        recorder.camera.elevation, recorder.camera.distance = -16.0, 1.7
        for step in range(round(seconds / CONTROL_DT)):
            title, _, command = script[min(int(np.searchsorted(ends, step * CONTROL_DT, "right")), len(script) - 1)]
            # The command takes effect within the step: `fixed_commands` is what every step draws.
            env.fixed_commands = torch.tensor([[*command, 0.0][: env.command.shape[1]]])
            env.cfg.jump_interval = CONTROL_DT if title == "jump" != previous else math.inf
            previous = title
            if step == 0:
                obs, _ = env.reset(seed=seed)
            obs, _, terminated, _, _ = env.step(policy(obs.to(device)))
            velocity = torch.cat((env.lin_vel[0, :2], env.ang_vel[0, 2:])).double().numpy()
            fell = step if terminated else fell
            measured = np.zeros(3) if terminated else measured + 0.08 * (velocity - measured)
            if step % 2 == 0:
                lines = _captions(title, step, env.command[0].tolist(), measured, float(env.height[0]), full)
                if step - fell < 1 / CONTROL_DT:
                    lines.append(("fell and starts again", "#FF6060"))
                qpos = env.physics.qpos[0].double().numpy()
                w, x, y, z = qpos[3:7]
                yaw = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
                heading += 0.03 * math.remainder(yaw - heading, 2 * math.pi)  # the camera turns with it, slowly
                recorder.camera.azimuth = 130.0 + math.degrees(heading)
                arrows = _velocity_arrows(qpos, yaw, env.command[0, :2].numpy(), measured[:2])
                recorder.frame(qpos, lines, model.body(env.base).name, arrows)
    return Path(path)


def _captions(title: str, step: int, command: list[float], measured: np.ndarray, height: float, full: bool) -> list:
    row = "{}\tvx {:+.2f} m/s\tvy {:+.2f} m/s\tyaw {:+.2f} rad/s"
    lines = [row.format("commanded", *command[:3]), row.format("measured", *measured)]
    if full:
        wanted = f"jump {command[4]:.2f} m" if command[4] > 0 else f"height {command[3]:.2f} m"
        lines = [f"{lines[0]}\t{wanted}", f"{lines[1]}\theight {height:.2f} m"]
    return [f"{title}   ({step * CONTROL_DT:.1f} s)", (lines[0], "#7CF08A"), (lines[1], "#FFB15C")]


def _velocity_arrows(qpos: np.ndarray, yaw: float, command: np.ndarray, measured: np.ndarray) -> list[tuple]:
    """The two velocities above the trunk, 0.45 m long per m/s, turned from the robot's heading to world axes."""
    turn = np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
    arrows = []
    for velocity, up, rgba in ((command, 0.20, (0.1, 0.75, 0.2, 1)), (measured, 0.26, (1.0, 0.5, 0.05, 1))):
        if np.linalg.norm(velocity) > 0.05:
            arrows.append((qpos[:3] + (0, 0, up), (*(turn @ velocity * 0.45), 0.0), rgba))
    return arrows


@torch.no_grad()
def evaluate_jumps(policy: Policy, cfg: Go2Config, device, episodes: int = 128, seed: int = 30_000) -> dict:
    """One jump per robot, from standing, at heights drawn from `command_jump`. In a success all four feet leave the
    ground, the base comes within JUMP_TOLERANCE of the commanded height, and the robot still stands after the landing.
    """
    changes = {"jump_interval": math.inf, "jump_tracking": math.inf, "resample_seconds": 1e6}
    env = Go2Env(episodes, device, seed, cfg, **changes)
    env.fixed_commands = torch.zeros(episodes, 5, device=device)
    env.fixed_commands[:, 3] = cfg.base_height_target
    obs, _ = env.reset(seed=seed)
    alive, flew = (torch.full((episodes,), value, device=device) for value in (True, False))
    apex, target = (torch.zeros(episodes, device=device) for _ in range(2))
    settle = round(0.5 / CONTROL_DT)
    for step in range(settle + round((JUMP_WINDOW + JUMP_LANDING) / CONTROL_DT) + 1):
        if step == settle:
            env.cfg.jump_interval = 1e-9  # now
        obs, _, terminated, _, _ = env.step(policy(obs))
        alive &= ~terminated
        if step >= settle:
            target = torch.maximum(target, env.command[:, 4] * alive)
            apex = torch.maximum(apex, env.height * alive)
            flew |= alive & (env.physics.sensordata[:, 12:] == 0).all(1)
    success = alive & flew & (apex > target - JUMP_TOLERANCE)
    rate = int(success.sum())
    return {
        "jump_episodes": episodes,
        "jump_success_rate": rate / episodes,
        "jump_success_ci95": list(wilson_ci95(rate, episodes)),
        "jump_airborne_rate": flew.float().mean().item(),
        "jump_fall_rate": 1 - alive.float().mean().item(),
        "jump_apex": apex.mean().item(),
        "jump_target": target.mean().item(),
    }


def observation_layout(cfg: Go2Config) -> list[tuple[str, int, float]]:
    """[(name, size, scale)] of one observation, in order; `--history` stacks several, oldest first."""
    names = ("vx", "vy", "yaw", "height", "jump")[: 5 if cfg.commands == "full" else 3]
    layout = [("lin_vel", 3, LIN_VEL_SCALE)] if cfg.observation == "full" else []
    layout += [("ang_vel", 3, ANG_VEL_SCALE), ("gravity", 3, 1.0)]
    layout += [(f"command_{name}", 1, scale) for name, scale in zip(names, COMMAND_SCALE, strict=False)]
    return layout + [("dof_pos", 12, 1.0), ("dof_vel", 12, DOF_VEL_SCALE), ("last_action", 12, 1.0)]


@torch.no_grad()
def save_trajectories(
    policy: Policy, cfg: Go2Config, device, path: str | Path, num_trajectories: int, seed: int = 20_000
) -> Path:
    """Whole episodes with the commands of training, as HDF5 in robomimic's layout; docs/go2_data.md describes the file.

    Every robot of a batch gives its first episode, so that short ones are not over-represented. Row t holds the state,
    command and observation before action t. The file appears whole, when the last batch is in it.
    """
    h5py = require("h5py", "h5py")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    env = Go2Env(min(num_trajectories, TRAJECTORY_BATCH), device, seed, cfg)
    joints = sorted(JOINTS, key=lambda name: int(env.model.joint(name).qposadr[0]))
    env_args = {"env_name": "Go2-v0", "env_type": 2, "env_kwargs": asdict(env.cfg)}  # 2 is robomimic's "gym"
    try:
        with h5py.File(temporary, "w") as file:
            data = file.create_group("data")
            total = 0
            for first in range(0, num_trajectories, env.num_envs):
                episodes = _collect_episodes(policy, env, seed + first, num_trajectories - first)
                for index, (latency, episode) in enumerate(episodes, first):
                    demo = data.create_group(f"demo_{index}")
                    demo.attrs["num_samples"] = len(episode["actions"])
                    demo.attrs["latency"] = latency
                    for name, values in episode.items():
                        demo.create_dataset(name, data=values)  # gzip would save a tenth and cost half the time
                    total += len(episode["actions"])
            data.attrs["total"], data.attrs["num_demos"] = total, num_trajectories
            data.attrs["env_args"] = json.dumps(env_args)
            data.attrs["observation_layout"] = json.dumps(observation_layout(env.cfg))
            data.attrs["action_joints"], data.attrs["qpos_joints"] = json.dumps(JOINTS), json.dumps(joints)
            data.attrs["control_dt"], data.attrs["seed"] = CONTROL_DT, seed
            data.attrs["mujoco"] = mujoco.__version__
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _collect_episodes(policy: Policy, env: Go2Env, seed: int, count: int):
    """Yields (latency, {dataset: array}) of the first episode of up to `count` robots."""
    obs, _ = env.reset(seed=seed)
    N, T = env.num_envs, env.max_episode_length
    widths = {"obs": obs.shape[1], "actions": 12, "commands": env.command.shape[1]}
    buffers = {name: np.empty((N, T, width), np.float32) for name, width in widths.items()}
    buffers["states"] = np.empty((N, T, 37))  # float64, so that a replay is exact
    buffers["rewards"] = np.empty((N, T), np.float32)
    last_obs, fallen = np.empty((N, obs.shape[1]), np.float32), np.zeros(N, bool)
    alive, lengths, latency = np.ones(N, bool), np.zeros(N, int), env.latency.tolist()
    for t in range(T):
        actions = policy(obs)
        state = torch.cat((env.physics.qpos, env.physics.qvel), 1)
        for name, value in (("obs", obs), ("actions", actions), ("commands", env.command), ("states", state)):
            buffers[name][:, t] = value.cpu().numpy()
        obs, reward, terminated, truncated, info = env.step(actions)
        buffers["rewards"][:, t] = reward.cpu().numpy()
        ended = (terminated | truncated).cpu().numpy() & alive
        if ended.any():
            last_obs[ended] = info["final_obs"].cpu().numpy()[ended]
            fallen |= terminated.cpu().numpy() & ended
            lengths[ended] = t + 1
            alive &= ~ended
            if not alive.any():
                break
    for i in range(min(N, count)):
        episode = {name: values[i, : lengths[i]] for name, values in buffers.items()}
        seen, states, last = episode.pop("obs"), episode["states"], np.arange(lengths[i]) == lengths[i] - 1
        episode |= {"obs/policy": seen, "next_obs/policy": np.concatenate((seen[1:], last_obs[i : i + 1]))}
        episode |= {"qpos": states[:, :19], "qvel": states[:, 19:]}
        episode |= {"dones": last, "terminated": last & fallen[i], "truncated": last & ~fallen[i]}
        yield latency[i], episode


def plot_grid(result: dict, path: str | Path) -> Path:
    """Draws `result["grid"]` of `evaluate` as heat maps: tracking errors over vx and vy, and over vx and yaw rate.

    A cell is the mean over all episodes with its two commands; where some of them fell, it says how many.
    """
    figure_module = require("matplotlib.figure", "matplotlib")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = np.array(result["grid"]["command"])
    fallen = np.array(result["grid"]["fallen"], float)
    panels = {"velocity error (m/s)": "lin_vel_error", "yaw rate error (rad/s)": "yaw_rate_error"}
    rows = {1: "commanded vy (m/s)", 2: "commanded yaw rate (rad/s)"}
    figure = figure_module.Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, (title, key) in enumerate(panels.items()):
        values = np.array(result["grid"][key])
        tables = {row: _pivot(command[:, 0], command[:, row], values) for row in rows}
        highest = max(1e-3, *(table.max() for _, _, table in tables.values()))
        for ax, (row, label) in zip(axes[:, column], rows.items(), strict=True):
            xs, ys, table = tables[row]
            falls = _pivot(command[:, 0], command[:, row], fallen, np.sum)[2]
            episodes = _pivot(command[:, 0], command[:, row], fallen, len)[2]
            image = ax.imshow(table, origin="lower", cmap="YlGnBu", vmin=0, vmax=highest, aspect="auto")
            for (j, i), value in np.ndenumerate(table):
                color = "white" if value > 0.6 * highest else "black"
                ax.text(i, j, f"{value:.2f}", ha="center", va="center", color=color, fontsize=10)
                if falls[j, i]:
                    text = f"{falls[j, i]:.0f} of {episodes[j, i]:.0f} fell"
                    box = {"facecolor": "#C81E1E", "edgecolor": "none", "pad": 1.5}
                    ax.text(i, j - 0.33, text, ha="center", va="center", color="white", fontsize=7, bbox=box)
            ax.set_xticks(range(len(xs)), [f"{x:.2g}" for x in xs])
            ax.set_yticks(range(len(ys)), [f"{y:.2g}" for y in ys])
            over = "yaw rates" if row == 1 else "vy"
            ax.set(xlabel="commanded vx (m/s)", ylabel=label, title=f"{title}, mean over {over}")
            figure.colorbar(image, ax=ax, shrink=0.9)
    figure.suptitle(
        f"Go2, deterministic policy: {result['episodes']} episodes, {result['falls']} falls, velocity error "
        f"{result['lin_vel_error']:.3f} m/s, yaw rate error {result['yaw_rate_error']:.3f} rad/s"
    )
    figure.savefig(path, dpi=110)
    return path


def _pivot(x: np.ndarray, y: np.ndarray, values: np.ndarray, reduce=np.mean):
    """Distinct x, distinct y, and `reduce` of the values in each cell, (len(y), len(x))."""
    x, y = np.round(x, 6), np.round(y, 6)
    xs, ys = np.unique(x), np.unique(y)
    return xs, ys, np.array([[reduce(values[(x == a) & (y == b)]) for a in xs] for b in ys], float)


def report(policy: Policy, cfg: Go2Config, result: dict, run_dir: Path, name: str, save_video: bool = True) -> None:
    """Writes eval/{name}.json, eval/{name}.png and videos/{name}.mp4 into `run_dir`, and prints the main numbers."""
    write_json(run_dir / "eval" / f"{name}.json", result)
    plot_grid(result, run_dir / "eval" / f"{name}.png")
    print(
        f"{name}: {result['falls']} of {result['episodes']} fell, velocity error {result['lin_vel_error']:.3f} m/s, "
        f"yaw rate error {result['yaw_rate_error']:.3f} rad/s, mean return {result['mean_return']:.2f}",
        flush=True,
    )
    if save_video:
        record_video(policy, cfg, run_dir / "videos" / f"{name}.mp4")
