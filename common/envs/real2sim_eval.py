"""Evaluation and film of a policy for pick-and-place."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.envs.real2sim import Real2SimConfig, Real2SimEnv
from common.files import tolerant, write_json
from common.stats import mean_ci95, wilson_ci95

Policy = Callable[[torch.Tensor], torch.Tensor]  # raw observations -> actions
SEED = 10_000  # of evaluations, far from those of training
FILM_SIZE = 480  # pixels
RATES = ("success", "success_once", "fallen")


def evaluate(policy: Policy, cfg: Real2SimConfig, device, episodes: int, seed: int = SEED) -> dict:
    """Success and return of `policy` in at least `episodes` fresh episodes, on the objects it was trained on.

    `success_rate`: the object is at the goal when the episode ends; `success_once_rate`: it was at some moment. Rates
    have Wilson's 95% interval beside them. With several objects, `objects` holds the rates of each; with
    `cfg.held_out`, `held_out` holds those of as many episodes on these.
    """
    columns = play(policy, plain(cfg), device, episodes, seed)
    mean_return, half_width = mean_ci95(columns["r"])
    result = {"episodes": len(columns["r"]), "seed": seed, "mean_return": mean_return}
    result |= {"return_ci95": [mean_return - half_width, mean_return + half_width]}
    result |= rates(columns)
    for name in sorted(columns.keys() - {"r", "object", *RATES}):
        result[{"l": "mean_length"}.get(name, name)] = columns[name].mean().item()
    if len(cfg.objects) > 1:
        result["objects"] = rates_by_object(columns, cfg.objects)
    if cfg.held_out:
        unseen = replace(plain(cfg), objects=cfg.held_out, held_out=())
        columns = play(policy, unseen, device, episodes, seed)
        result["held_out"] = rates(columns) | {"objects": rates_by_object(columns, cfg.held_out)}
    return result


@torch.no_grad()
def play(policy: Policy, cfg: Real2SimConfig, device, episodes: int, seed: int) -> dict[str, torch.Tensor]:
    """{metric: (episodes,)}, with `object`, the index into cfg.objects. Every environment plays the same number of
    whole episodes, since counting those that end first would favour the short ones.
    """
    num_envs = min(episodes, 128)
    rounds = -(-episodes // num_envs)
    envs = Real2SimEnv(num_envs, device, seed, cfg)
    obs, _ = envs.reset(seed=seed)
    played = torch.zeros(num_envs, dtype=torch.long, device=envs.device)
    found = []
    while bool((played < rounds).any()):
        obs, _, _, _, info = envs.step(policy(obs))
        counted = info["_episode"] & (played < rounds)
        played = played + info["_episode"]
        if counted.any():
            metrics = info["episode"] | {"object": info["object"]}
            found.append({name: value[counted].float().cpu() for name, value in metrics.items()})
    envs.close()
    return {name: torch.cat([rows[name] for rows in found]) for name in found[0]}


def rates_by_object(columns: dict[str, torch.Tensor], objects: tuple[str, ...]) -> dict[str, dict]:
    """{object: its rates and number of episodes}."""
    found = {}
    for index, name in enumerate(objects):
        rows = {metric: values[columns["object"] == index] for metric, values in columns.items()}
        if len(rows["r"]):
            found[name] = {"episodes": len(rows["r"])} | rates(rows)
    return found


def rates(columns: dict[str, torch.Tensor]) -> dict:
    """{name}_rate and {name}_ci95 of the columns named in RATES, each (episodes,) of zeros and ones."""
    result = {}
    for name in RATES:
        hits, count = int(columns[name].sum()), len(columns[name])
        result |= {f"{name}_rate": hits / count, f"{name}_ci95": list(wilson_ci95(hits, count))}
    return result


def plain(cfg: Real2SimConfig) -> Real2SimConfig:
    """The environment's settings alone, of a script's Args that inherits them."""
    return Real2SimConfig(**{name: getattr(cfg, name) for name in Real2SimConfig.__dataclass_fields__})


def report(policy: Policy, cfg: Real2SimConfig, result: dict, run_dir: Path, name: str, save_video: bool = True):
    """Writes eval/{name}.json and videos/{name}.mp4 into `run_dir`, and prints the main numbers."""
    with tolerant(f"{name}.json", run_dir / "eval"):
        write_json(run_dir / "eval" / f"{name}.json", result)
    low, high = result["success_ci95"]
    others = "".join(f", {name} {found['success_rate']:.1%}" for name, found in result.get("objects", {}).items())
    if "held_out" in result:
        others += f", held-out objects {result['held_out']['success_rate']:.1%}"
    print(
        f"{name}: success {result['success_rate']:.1%} ({low:.1%} to {high:.1%}) of {result['episodes']} episodes"
        f"{others}, mean return {result['mean_return']:.1f}",
        flush=True,
    )
    if save_video:
        record_video(policy, cfg, run_dir / "videos" / f"{name}.mp4")


@torch.no_grad()
def record_video(policy: Policy, cfg: Real2SimConfig, path: str | Path, episodes: int = 4, seed: int = SEED):
    """Whole episodes of one robot on the CPU at 25 frames/s, in real time. Returns the path of the mp4; where nothing
    can render, says so in one sentence and returns None.
    """
    from common.envs.real2sim_looks import Looks
    from common.video import find_gl, missing_gl_message, write_mp4

    if find_gl() is None:
        print(missing_gl_message(), flush=True)
        return None
    device = next((p.device for p in policy.parameters()), "cpu") if isinstance(policy, torch.nn.Module) else "cpu"
    envs = Real2SimEnv(1, "cpu", seed, plain(cfg), physics_threads=1, backend="mujoco")
    looks = Looks(replace(envs.cfg, image_size=FILM_SIZE), 1, envs.device, "mujoco", 1, "front")

    def frames() -> Iterable[np.ndarray]:
        obs, _ = envs.reset(seed=seed)
        ended = 0
        for step in range(episodes * envs.cfg.max_episode_steps):
            if step % 2 == 0:
                looks.set(envs.goal, envs.variant, envs.look)
                yield looks.renderer.render(envs.physics.qpos)[0].numpy()
            obs, _, _, _, info = envs.step(policy(obs.to(device)).cpu())
            ended += int(info["_episode"])
            if ended == episodes:
                return

    try:
        return write_mp4(path, frames(), envs.metadata["render_fps"] // 2)
    finally:
        looks.close()
        envs.close()
