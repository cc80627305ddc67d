"""Evaluation and film of a policy for peg insertion."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from PIL import Image

from common import video
from common.envs.peg_insert import PegInsertConfig, PegInsertEnv, build_model
from common.evaluation import SEED, Policy, can_film, device_of, mean_return, play, rates, save_and_print
from common.render import BatchedRenderer
from common.storage import to

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # difficulties that `evaluate_levels` tries


def evaluate(
    policy: Policy, cfg: PegInsertConfig, device, episodes: int, seed: int = SEED, envs: VectorEnv | None = None
) -> dict:
    """Success and return of `policy` in at least `episodes` fresh episodes at `cfg.difficulty`, in environments of
    their own or in `envs`.

    `success_rate`: the peg is seated when the episode ends; `success_once_rate`: it was at some moment. Rates have
    Wilson's 95% interval beside them.
    """
    own = envs is None
    if own:
        envs = PegInsertEnv(min(episodes, 128), device, seed, replace(plain(cfg), curriculum=False))
    obs, _ = envs.reset(seed=seed)
    columns = play(policy, envs, obs, device, rounds=-(-episodes // envs.num_envs))
    if own:
        envs.close()
    result = {"episodes": len(columns["r"]), "seed": seed, "difficulty": cfg.difficulty} | mean_return(columns["r"])
    result |= rates(columns, "success", "success_once", "engaged")
    if "keypoint_distance" in columns:
        result["keypoint_distance"] = columns["keypoint_distance"].mean().item()
    return result


def evaluate_levels(policy: Policy, cfg: PegInsertConfig, device, episodes: int) -> dict:
    """{difficulty: `evaluate`'s success rate and interval}, over LEVELS up to `cfg.difficulty`."""
    found = {}
    for level in LEVELS:
        if level <= cfg.difficulty:
            result = evaluate(policy, replace(plain(cfg), difficulty=level), device, episodes)
            found[str(level)] = {name: result[name] for name in ("episodes", "success_rate", "success_ci95")}
    return found


def plain(cfg: PegInsertConfig) -> PegInsertConfig:
    """The environment's settings alone, of a script's Args that inherits them."""
    return PegInsertConfig(**{name: getattr(cfg, name) for name in PegInsertConfig.__dataclass_fields__})


def report(policy: Policy, cfg: PegInsertConfig, result: dict, run_dir: Path, name: str, save_video: bool = True):
    """Writes eval/{name}.json and videos/{name}.mp4 into `run_dir`, and prints the main numbers."""
    more = f" at difficulty {cfg.difficulty:g}, mean return {result['mean_return']:.1f}"
    save_and_print(result, run_dir, name, more)
    if save_video:
        record_video(policy, cfg, run_dir / "videos" / f"{name}.mp4")


@torch.no_grad()
def record_video(policy: Policy, cfg: PegInsertConfig, path: str | Path, episodes: int = 2, seed: int = SEED):
    """Whole episodes of one robot on the CPU from its side camera, in real time, with what it sees and feels beside
    it. Returns the path of the mp4; where nothing can render, says so in one sentence and returns None.
    """
    if not can_film():
        return None
    device = device_of(policy)
    settings = replace(plain(cfg), backend="mujoco", curriculum=False)
    envs = PegInsertEnv(1, "cpu", seed, settings, physics_threads=1)
    model = build_model(replace(settings, observation="state"), visual=True)
    camera = BatchedRenderer(model, 1, "side", 384, 384, per_world=("mocap_pos", "mocap_quat"))

    def frames() -> Iterable[np.ndarray]:
        obs, _ = envs.reset(seed=seed)
        for _ in range(episodes * settings.max_episode_steps):
            for name, field in camera.fields.items():
                field.copy_(getattr(envs.physics, name))
            picture = camera.render(envs.physics.qpos)[0].numpy()
            yield np.concatenate((picture, senses(obs, len(picture))), 1) if isinstance(obs, dict) else picture
            obs, *_ = envs.step(policy(to(obs, device)).cpu())

    with closing(envs), closing(camera):
        return video.write_mp4(path, frames(), envs.metadata["render_fps"])


def senses(obs: dict, size: int) -> np.ndarray:
    """uint8 (size, size / 2, 3): the robot's own picture, and below it both pads (red normal, green and blue shear)."""
    half = size // 2
    canvas = np.zeros((size, half, 3), np.uint8)
    if "rgb" in obs:
        canvas[:half] = np.asarray(Image.fromarray(obs["rgb"][0].numpy()).resize((half, half), Image.NEAREST))
    if "tactile" in obs:
        pads = obs["tactile"][0].view(2, 3, *obs["tactile"].shape[-2:]).permute(0, 2, 3, 1)
        scale = torch.tensor((0.4, 0.1, 0.1))  # N per taxel at full brightness
        pads = (255 * (pads / scale).abs().clamp(0, 1)).byte().numpy()
        width = half // 2
        for i, pad in enumerate(pads):
            canvas[half : half + width, i * width : (i + 1) * width] = np.asarray(
                Image.fromarray(pad).resize((width, width), Image.NEAREST)
            )
    return canvas
