"""Evaluation and film of a policy for the ALOHA tasks, always on the package's reward and with random starts."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import video
from common.distributed import num_cores
from common.envs.aloha import SUCCESS, AlohaConfig, AlohaEnv
from common.evaluation import SEED, Policy, can_film, device_of, mean_return, play_from_resets, rates, save_and_print
from common.render import BatchedRenderer, decimate
from common.storage import take, to

FILM_SIZE = 360  # pixels a side of each of the two pictures
FILM_DETAIL = 0.003  # m, what of the meshes is finer than this is not drawn
MOST_ENVS = {"fast": 64, "gym-aloha": 2}  # environments at once


def plain(cfg: AlohaConfig) -> dict:
    """The environment's settings alone, by name, of a script's Args that inherits them."""
    return {field.name: getattr(cfg, field.name) for field in fields(AlohaConfig)}


def evaluate(
    policy: Policy, cfg: AlohaConfig, device, episodes: int, backend: str = "fast", seed: int = SEED, start_states=None
) -> dict:
    """Success, levels, return and length of `policy` in at least `episodes` fresh episodes, whatever `cfg.reward` is.

    `success_rate` is the share that reached level 4, with Wilson's 95% interval; `highest_level` how many episodes had
    0, 1, ... 4 as their highest level; `mean_return` the sum of the package's rewards. `backend` gym-aloha steps and
    draws by the package itself, on the CPU. Every world counts with one episode a round, so that short ones do not
    count more. `start_states`, as of `AlohaEnv`, takes the place of fresh starts.
    """
    num_envs = min(episodes, MOST_ENVS[backend])
    settings = plain(cfg) | {"env_backend": backend, "reward": "sparse", "critic": "pixels"}
    settings["threads"] = cfg.threads or num_cores()  # as the other ranks of a training wait meanwhile
    if backend == "gym-aloha":
        settings |= {"backend": "mujoco"}
    envs = AlohaEnv(num_envs, "cpu" if backend == "gym-aloha" else device, seed, **settings)
    envs.start_states = start_states
    columns = play_from_resets(policy, envs, device, episodes)
    envs.close()
    levels = columns["highest_level"].long()
    result = {"episodes": len(levels), "seed": seed, "backend": backend} | rates(columns, "success")
    result |= {
        "highest_level": torch.bincount(levels, minlength=SUCCESS + 1).tolist(),
        "mean_highest_level": levels.float().mean().item(),
        "mean_reward": columns["mean_reward"].mean().item(),
    }
    return result | mean_return(columns["mean_reward"] * columns["l"]) | {"mean_length": columns["l"].mean().item()}


def report(policy: Policy, cfg: AlohaConfig, result: dict, run_dir: Path, name: str, save_video: bool = True):
    """Writes eval/{name}.json and videos/{name}.mp4 into `run_dir`, and prints the main numbers."""
    levels = f"highest levels 0 to 4 {result['highest_level']}"
    more = f" ({result['backend']}), {levels}, {result['mean_length']:.0f} steps"
    save_and_print(result, run_dir, name, more)
    if save_video:
        record_video(policy, cfg, run_dir / "videos" / f"{name}.mp4")


@torch.no_grad()
def record_video(policy: Policy, cfg: AlohaConfig, path: str | Path, episodes: int = 2, seed: int = SEED):
    """Whole episodes of one world from the package's camera `angle`, in real time, with what the policy sees beside it.

    Every second step is drawn. Returns the path of the mp4; where nothing can render, says so in one sentence and
    returns None.
    """
    if not can_film():
        return None
    device = device_of(policy)
    settings = plain(cfg) | {"env_backend": "fast", "backend": "mujoco", "threads": 1, "critic": "pixels"}
    envs = AlohaEnv(1, "cpu", seed, **settings)
    model = decimate(envs.model, FILM_DETAIL)
    camera = BatchedRenderer(model, 1, "angle", FILM_SIZE, FILM_SIZE, backend="mujoco", num_threads=1, samples=4)

    def frames() -> Iterable[np.ndarray]:
        obs, _ = envs.reset(seed=seed)
        steps = ended = 0
        while ended < episodes:
            if steps % 2 == 0:
                yield np.concatenate((camera.render(envs.physics.qpos)[0].numpy(), seen(obs, FILM_SIZE)), 1)
            obs, _, _, _, info = envs.step(policy(to(obs, device)).cpu())
            steps += 1
            ended += int(info["_episode"])

    with closing(envs), closing(camera):
        return video.write_mp4(path, frames(), envs.metadata["render_fps"] / 2)


def seen(obs, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the newest picture that is observed, in its shape; black where none is."""
    canvas = np.zeros((size, size, 3), np.uint8)
    pixels = obs.get("pixels") if isinstance(obs, dict) else obs
    if pixels.dtype == torch.uint8:
        picture = Image.fromarray(take(pixels, 0)[..., -3:].contiguous().numpy())
        scale = size / max(picture.size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.NEAREST)
        canvas[: picture.height, : picture.width] = np.asarray(picture)
    return canvas
