"""Evaluation and film of a policy for the ALOHA tasks, always on the package's reward and with random starts."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.envs.aloha import SUCCESS, AlohaConfig, AlohaEnv
from common.files import tolerant, write_json
from common.stats import mean_ci95, wilson_ci95
from common.storage import take, to

Policy = Callable[[torch.Tensor | dict], torch.Tensor]  # raw observations -> actions
SEED = 10_000  # of evaluations, far from those of training
FILM_SIZE = 360  # pixels a side of each of the two pictures
FILM_DETAIL = 0.003  # m, what of the meshes is finer than this is not drawn
MOST_ENVS = {"fast": 64, "gym-aloha": 2}  # environments at once; the package draws long for those that wait, too


def plain(cfg: AlohaConfig) -> dict:
    """The environment's settings alone, by name, of a script's Args that inherits them."""
    return {field.name: getattr(cfg, field.name) for field in fields(AlohaConfig)}


@torch.no_grad()
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
    if backend == "gym-aloha":
        settings |= {"backend": "mujoco"}
    envs = AlohaEnv(num_envs, "cpu" if backend == "gym-aloha" else device, seed, **settings)
    envs.start_states = start_states
    found = []
    while len(found) * num_envs < episodes:
        obs, _ = envs.reset()
        waiting = torch.ones(num_envs, dtype=torch.bool, device=envs.device)
        last = {name: torch.zeros(num_envs, device=envs.device) for name in ("l", *envs.metric_names)}
        while waiting.any():
            obs, _, _, _, info = envs.step(policy(to(obs, device)).to(envs.device))
            ended = waiting & info["_episode"]
            last = {name: torch.where(ended, info["episode"][name].float(), value) for name, value in last.items()}
            waiting = waiting & ~ended
        found.append({name: value.cpu() for name, value in last.items()})
    envs.close()
    columns = {name: torch.cat([round_[name] for round_ in found]) for name in found[0]}
    count, hits = len(columns["l"]), int(columns["success"].sum())
    mean_return, half_width = mean_ci95(columns["mean_reward"] * columns["l"])
    levels = columns["highest_level"].long()
    return {
        "episodes": count,
        "seed": seed,
        "backend": backend,
        "success_rate": hits / count,
        "success_ci95": list(wilson_ci95(hits, count)),
        "highest_level": torch.bincount(levels, minlength=SUCCESS + 1).tolist(),
        "mean_highest_level": levels.float().mean().item(),
        "mean_reward": columns["mean_reward"].mean().item(),
        "mean_return": mean_return,
        "return_ci95": [mean_return - half_width, mean_return + half_width],
        "mean_length": columns["l"].mean().item(),
    }


def report(policy: Policy, cfg: AlohaConfig, result: dict, run_dir: Path, name: str, save_video: bool = True):
    """Writes eval/{name}.json and videos/{name}.mp4 into `run_dir`, and prints the main numbers."""
    with tolerant(f"{name}.json", run_dir / "eval"):
        write_json(run_dir / "eval" / f"{name}.json", result)
    low, high = result["success_ci95"]
    print(
        f"{name}: success {result['success_rate']:.1%} ({low:.1%} to {high:.1%}) of {result['episodes']} episodes "
        f"({result['backend']}), highest levels 0 to 4 {result['highest_level']}, {result['mean_length']:.0f} steps",
        flush=True,
    )
    if save_video:
        record_video(policy, cfg, run_dir / "videos" / f"{name}.mp4")


@torch.no_grad()
def record_video(policy: Policy, cfg: AlohaConfig, path: str | Path, episodes: int = 2, seed: int = SEED):
    """Whole episodes of one world from the package's camera `angle`, in real time, with what the policy sees beside it.

    Every second step is drawn. Returns the path of the mp4; where nothing can render, says so in one sentence and
    returns None.
    """
    from common.render import BatchedRenderer, decimate
    from common.video import find_gl, missing_gl_message, write_mp4

    if find_gl() is None:
        print(missing_gl_message(), flush=True)
        return None
    device = next((p.device for p in policy.parameters()), "cpu") if isinstance(policy, torch.nn.Module) else "cpu"
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

    try:
        return write_mp4(path, frames(), envs.metadata["render_fps"] / 2)
    finally:
        camera.close()
        envs.close()


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
