"""Evaluation and film of a policy for pick-and-place of scanned objects."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from common.envs.real2sim import Real2SimConfig, Real2SimEnv, build_model
from common.files import tolerant, write_json
from common.stats import mean_ci95, wilson_ci95

Policy = Callable[[torch.Tensor], torch.Tensor]  # raw observations -> actions
SEED = 10_000  # of evaluations, far from those of training


@torch.no_grad()
def evaluate(policy: Policy, cfg: Real2SimConfig, device, episodes: int, seed: int = SEED) -> dict:
    """Success and return of `policy` in at least `episodes` fresh episodes.

    `success_rate`: the object is at the goal when the time is up; `success_once_rate`: it was at some moment. Rates
    have Wilson's 95% interval beside them.
    """
    num_envs = min(episodes, 128)
    rounds = -(-episodes // num_envs)
    envs = Real2SimEnv(num_envs, device, seed, plain(cfg))
    counts = torch.zeros(num_envs, device=envs.device)
    found = []
    obs, _ = envs.reset(seed=seed)
    while counts.min() < rounds:  # every environment as often, or short episodes would count more
        obs, _, terminated, truncated, info = envs.step(policy(obs))
        done = terminated | truncated
        counted = done & (counts < rounds)
        found.append({name: value[counted].float().cpu() for name, value in info["episode"].items()})
        counts += done
    envs.close()
    columns = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    count = len(columns["r"])
    mean_return, half_width = mean_ci95(columns["r"])
    result = {"episodes": count, "seed": seed, "mean_return": mean_return}
    result |= {"return_ci95": [mean_return - half_width, mean_return + half_width]}
    for name in ("success", "success_once"):
        hits = int(columns[name].sum())
        result |= {f"{name}_rate": hits / count, f"{name}_ci95": list(wilson_ci95(hits, count))}
    for name in sorted(columns.keys() - {"r", "success", "success_once"}):
        result[{"l": "mean_length"}.get(name, name)] = columns[name].mean().item()
    return result


def plain(cfg: Real2SimConfig) -> Real2SimConfig:
    """The environment's settings alone, of a script's Args that inherits them."""
    return Real2SimConfig(**{name: getattr(cfg, name) for name in Real2SimConfig.__dataclass_fields__})


def report(policy: Policy, cfg: Real2SimConfig, result: dict, run_dir: Path, name: str, save_video: bool = True):
    """Writes eval/{name}.json and videos/{name}.mp4 into `run_dir`, and prints the main numbers."""
    with tolerant(f"{name}.json", run_dir / "eval"):
        write_json(run_dir / "eval" / f"{name}.json", result)
    low, high = result["success_ci95"]
    print(
        f"{name}: success {result['success_rate']:.1%} ({low:.1%} to {high:.1%}) of {result['episodes']} episodes, "
        f"mean return {result['mean_return']:.1f}",
        flush=True,
    )
    if save_video:
        record_video(policy, cfg, run_dir / "videos" / f"{name}.mp4")


@torch.no_grad()
def record_video(policy: Policy, cfg: Real2SimConfig, path: str | Path, episodes: int = 3, seed: int = SEED):
    """Whole episodes of one robot on the CPU, in real time. Returns the path of the mp4; where nothing can render,
    says so in one sentence and returns None.
    """
    from common.render import BatchedRenderer
    from common.video import find_gl, missing_gl_message, write_mp4

    if find_gl() is None:
        print(missing_gl_message(), flush=True)
        return None
    device = next((p.device for p in policy.parameters()), "cpu") if isinstance(policy, torch.nn.Module) else "cpu"
    settings = replace(plain(cfg), backend="mujoco")
    envs = Real2SimEnv(1, "cpu", seed, settings, physics_threads=1)
    camera = BatchedRenderer(build_model(settings, visual=True), 1, "front", 480, 480, per_world=("mocap_pos",))

    def frames():
        obs, _ = envs.reset(seed=seed)
        ended = 0
        while ended < episodes:
            camera.fields["mocap_pos"].copy_(envs.goal.view(1, 1, 3))
            yield camera.render(envs.physics.qpos)[0].numpy()
            obs, _, terminated, truncated, _ = envs.step(policy(obs.to(device)).cpu())
            ended += int(terminated | truncated)

    try:
        return write_mp4(path, frames(), envs.metadata["render_fps"])
    finally:
        camera.close()
        envs.close()
