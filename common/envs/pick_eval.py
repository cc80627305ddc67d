"""Evaluation and film of a policy for picking and placing on instruction."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import video
from common.distributed import num_cores
from common.envs.pick import ENV_SETTINGS, PickConfig, PickEnv, build_model
from common.evaluation import SEED, Policy, can_film, device_of, mean_return, play_from_resets, rates, save_and_print
from common.render import BatchedRenderer
from common.storage import to

MOST_ENVS = 64  # worlds at once
FILM_SIZE = 384  # pixels a side of the film's main picture


def plain(cfg: PickConfig) -> PickConfig:
    """The environment's settings alone, of a script's Args that inherits them."""
    return PickConfig(**{name: getattr(cfg, name) for name in ENV_SETTINGS})


def evaluate(policy: Policy, cfg: PickConfig, device, episodes: int, seed: int = SEED, threads: int = 0) -> dict:
    """Success, return and length of `policy` in at least `episodes` fresh episodes at `cfg.difficulty`.

    Rates have Wilson's 95% interval beside them: `success_rate`, the same by kind of instruction (`pick`, `put`; absent
    where none was drawn), `grasped_rate` (the cube was in the grip at some moment) and `wrong_cube_rate` (another one
    was lifted). `mean_length` counts control steps. `threads` are those of physics and pictures (0: all cores, as the
    other ranks of a training wait meanwhile). Every world counts with one episode a round, so that short ones do not
    count more.
    """
    num_envs = min(episodes, MOST_ENVS)
    envs = PickEnv(num_envs, device, seed, plain(cfg), threads or num_cores())
    columns = play_from_resets(policy, envs, device, episodes, lambda: {"put": envs.put.cpu()})
    envs.close()
    put = columns["put"]
    result = {"episodes": len(put), "seed": seed, "difficulty": cfg.difficulty} | mean_return(columns["r"])
    result |= {"mean_length": columns["l"].mean().item()} | rates(columns, "success", "grasped", "wrong_cube")
    for name, rows in (("pick", ~put), ("put", put)):
        if rows.any():
            result |= {f"{name}_episodes": int(rows.sum())} | rates({name: columns["success"][rows]}, name)
    return result


def report(policy: Policy, cfg: PickConfig, result: dict, run_dir: Path, name: str, save_video: bool = True):
    """Writes eval/{name}.json and videos/{name}.mp4 into `run_dir`, and prints the main numbers."""
    kinds = ", ".join(f"{kind} {result[f'{kind}_rate']:.1%}" for kind in ("pick", "put") if f"{kind}_rate" in result)
    more = f" at difficulty {cfg.difficulty:g} ({kinds}), {result['mean_length']:.0f} control steps"
    save_and_print(result, run_dir, name, more)
    if save_video:
        record_video(policy, cfg, run_dir / "videos" / f"{name}.mp4")


@torch.no_grad()
def record_video(policy: Policy, cfg: PickConfig, path: str | Path, episodes: int = 4, seed: int = SEED):
    """Whole episodes of one world on the CPU, in real time, with the instruction and what the policy sees beside it.

    The actions of a chunk are executed one by one, so that the film has all that lies between two observations.
    Returns the path of the mp4; where nothing can render, says so in one sentence and returns None.
    """
    if not can_film():
        return None
    device = device_of(policy)
    settings = replace(plain(cfg), backend="mujoco", chunk=1)
    envs = PickEnv(1, "cpu", seed, settings, physics_threads=1)
    model, per_world = build_model(settings, visual=True), ("geom_rgba", "mocap_pos")
    camera = BatchedRenderer(model, 1, "film", FILM_SIZE, FILM_SIZE, num_threads=1, per_world=per_world, samples=4)

    def frames() -> Iterable[np.ndarray]:
        obs, _ = envs.reset(seed=seed)
        ended = 0
        while ended < episodes:
            beside = seen(obs, settings.cameras, FILM_SIZE)
            actions = policy(to(obs, device)).cpu().view(cfg.chunk, 1, 7)
            for action in actions:
                envs.paint(camera)
                picture = written(camera.render(envs.physics.qpos)[0].numpy(), envs.instructions[0])
                yield np.concatenate((picture, beside), 1)
                obs, _, _, _, info = envs.step(action)
                if info["_episode"]:
                    ended += 1
                    break

    with closing(envs), closing(camera):
        return video.write_mp4(path, frames(), envs.metadata["render_fps"])


def written(picture: np.ndarray, line: str) -> np.ndarray:
    """uint8 (height, width, 3): the picture with a line of text at its top."""
    canvas = Image.fromarray(picture)
    font = ImageFont.load_default(picture.shape[0] // 20)
    ImageDraw.Draw(canvas).text((10, 8), line, "white", font, stroke_width=2, stroke_fill="black")
    return np.asarray(canvas)


def seen(obs, cameras: tuple[str, ...], size: int) -> np.ndarray:
    """uint8 (size, size / 2, 3): the pictures that are observed, one above the other; black where none is."""
    half = size // 2
    canvas = np.zeros((size, half, 3), np.uint8)
    if isinstance(obs, dict):
        for i, name in enumerate(cameras):
            picture = Image.fromarray(obs[name][0].numpy()).resize((half, half), Image.NEAREST)
            canvas[i * half : (i + 1) * half] = np.asarray(picture)
    return canvas
