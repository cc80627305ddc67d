"""Evaluation and film of a policy for pick-and-place."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common import evaluation, video
from common.envs.real2sim import Real2SimConfig, Real2SimEnv
from common.envs.real2sim_looks import Looks
from common.evaluation import SEED, Policy, can_film, device_of, mean_return, rates, save_and_print

FILM_SIZE = 480  # pixels
RATES = ("success", "success_once", "fallen", "lifted")


def evaluate(policy: Policy, cfg: Real2SimConfig, device, episodes: int, seed: int = SEED) -> dict:
    """Success and return of `policy` in at least `episodes` fresh episodes, on the objects it was trained on.

    `success_rate`: the object is at the goal when the episode ends; `success_once_rate`: it was at some moment;
    `lifted_rate`: it was held 5 cm above where it lay. Rates have Wilson's 95% interval beside them. With several
    objects, `objects` holds the rates of each; with `cfg.held_out`, `held_out` those of as many episodes on these.
    """
    columns = play(policy, plain(cfg), device, episodes, seed)
    result = {"episodes": len(columns["r"]), "seed": seed} | mean_return(columns["r"]) | rates(columns, *RATES)
    for name in sorted(columns.keys() - {"r", "object", *RATES}):
        result[{"l": "mean_length"}.get(name, name)] = columns[name].mean().item()
    if len(cfg.objects) > 1:
        result["objects"] = rates_by_object(columns, cfg.objects)
    if cfg.held_out:
        unseen = replace(plain(cfg), objects=cfg.held_out, held_out=())
        columns = play(policy, unseen, device, episodes, seed)
        result["held_out"] = rates(columns, *RATES) | {"objects": rates_by_object(columns, cfg.held_out)}
    return result


def play(policy: Policy, cfg: Real2SimConfig, device, episodes: int, seed: int) -> dict[str, torch.Tensor]:
    """{metric: (episodes,)}, with `object`, the index into cfg.objects, of as many episodes in every environment."""
    num_envs = min(episodes, 128)
    with closing(Real2SimEnv(num_envs, device, seed, cfg)) as envs:
        obs, _ = envs.reset(seed=seed)
        return evaluation.play(policy, envs, obs, device, rounds=-(-episodes // num_envs), also=("object",))


def rates_by_object(columns: dict[str, torch.Tensor], objects: tuple[str, ...]) -> dict[str, dict]:
    """{object: its rates and number of episodes}."""
    found = {}
    for index, name in enumerate(objects):
        rows = {metric: values[columns["object"] == index] for metric, values in columns.items()}
        if len(rows["r"]):
            found[name] = {"episodes": len(rows["r"])} | rates(rows, *RATES)
    return found


def plain(cfg: Real2SimConfig) -> Real2SimConfig:
    """The environment's settings alone, of a script's Args that inherits them."""
    return Real2SimConfig(**{name: getattr(cfg, name) for name in Real2SimConfig.__dataclass_fields__})


def report(policy: Policy, cfg: Real2SimConfig, result: dict, run_dir: Path, name: str, save_video: bool = True):
    """Writes eval/{name}.json and videos/{name}.mp4 into `run_dir`, and prints the main numbers."""
    more = "".join(f", {name} {found['success_rate']:.1%}" for name, found in result.get("objects", {}).items())
    if "held_out" in result:
        more += f", held-out objects {result['held_out']['success_rate']:.1%}"
    save_and_print(result, run_dir, name, f"{more}, mean return {result['mean_return']:.1f}")
    if save_video:
        record_video(policy, cfg, run_dir / "videos" / f"{name}.mp4")


@torch.no_grad()
def record_video(policy: Policy, cfg: Real2SimConfig, path: str | Path, episodes: int = 4, seed: int = SEED):
    """Whole episodes of one robot on the CPU at 25 frames/s, in real time. Returns the path of the mp4; where nothing
    can render, says so in one sentence and returns None.
    """
    if not can_film():
        return None
    device = device_of(policy)
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

    with closing(envs), closing(looks):
        return video.write_mp4(path, frames(), envs.metadata["render_fps"] // 2)
