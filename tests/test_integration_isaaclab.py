"""The adapter and the script on Isaac Lab itself, where it can be imported; skipped elsewhere.

A process can hold one simulation, so each test runs this file as a program, which steps a task and saves what it saw.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.envs.isaac import make_env

pytestmark = pytest.mark.isaaclab
ROOT = Path(__file__).parent.parent
CARTPOLE = "Isaac-Cartpole-Direct"
CAMERAS = ("Isaac-Cartpole-Camera-Presets-Direct-v0", "Isaac-Cartpole-Camera-Direct")  # the 3.0 beta's, 3.0's
LIMIT_SOON = 5  # so many steps before its time limit does the first environment of `contract` begin


@pytest.fixture(autouse=True)
def isaaclab():
    return pytest.importorskip("isaaclab")


def run(folder, *words):
    """What the program part of this file saved, run with `words`."""
    command = [sys.executable, __file__, str(folder / "saved.pt"), *map(str, words)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return torch.load(folder / "saved.pt")


def test_episodes_end_with_their_true_last_observation_and_begin_anew_in_the_same_step(tmp_path):
    seen = run(tmp_path, "contract", 5)
    obs, final, terminated, truncated = (seen[k] for k in ("obs", "final_obs", "terminated", "truncated"))
    steps, num_envs = terminated.shape
    assert obs.shape == final.shape == (steps, num_envs, 4) and obs.dtype == seen["reward"].dtype == torch.float32
    assert terminated.dtype == truncated.dtype == torch.bool and not seen["overwritten"]

    # The first environment reaches its time limit, which is no failure; in so few steps none fails.
    assert truncated.nonzero().tolist() in ([[LIMIT_SOON - 2, 0]], [[LIMIT_SOON - 1, 0]])  # 3.0's beta a step early
    assert not terminated[:LIMIT_SOON].any()
    # Pushed, the cart runs away: the last observation is outside the task's bounds, the next one is a start.
    assert terminated.any(0).all()
    fallen, anew = final[terminated], obs[terminated]  # 3.0 has the cart's position first, its beta the pole's angle
    assert ((fallen[:, 0].abs() > math.pi / 2) | (fallen[:, 2].abs() > 3)).all()
    assert (anew.abs() <= 1 + 1e-3).all()

    # Lengths count from the step after an end to the next one.
    done = terminated | truncated
    for env in range(num_envs):
        ends = done[:, env].nonzero().flatten()
        lengths = torch.diff(ends, prepend=torch.tensor([-1]))
        assert torch.equal(seen["lengths"][ends, env].long(), lengths)


def test_the_same_seed_gives_the_same_trajectory_and_another_seed_another(tmp_path):
    first, again, other = (run(tmp_path, "contract", seed) for seed in (5, 5, 6))
    assert torch.equal(first["obs"], again["obs"]) and torch.equal(first["reward"], again["reward"])
    assert not torch.equal(first["obs"], other["obs"])


def test_the_camera_sees_the_pole_move_and_the_adapter_refuses_images(tmp_path):
    seen = run(tmp_path, "camera", 5)
    images = seen["images"].float()  # (steps, environments, *image); 3.0 puts the channels first
    assert images.shape[:2] == (11, 2) and sorted(images.shape[2:])[1] >= 96
    assert images.isfinite().all() and images.std() > 0
    assert (images[-1] - images[0]).abs().flatten(1).amax(1).min() > 0.01
    assert "observes images" in seen["refusal"]


def test_a_task_of_images_is_refused_at_once_and_leaves_no_folder(tmp_path):
    check_refusal(tmp_path / "run", run(tmp_path, "camera_name", 0)["task"], "observes images")


def test_an_unknown_task_is_refused_with_the_nearest_name_in_one_sentence(tmp_path):
    check_refusal(tmp_path / "run", "Isaac-Cartpole-Direkt", CARTPOLE)


def check_refusal(folder, task, words):
    command = [sys.executable, ROOT / "ppo_continuous_isaac.py", "--env-id", task, "--log-dir", folder]
    done = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not folder.exists()
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in sentence


def test_training_keeps_the_pole_up_far_longer_than_random_actions(tmp_path):
    task = run(tmp_path, "contract", 5)["task"]
    command = [sys.executable, ROOT / "ppo_continuous_isaac.py", "--env-id", task, "--device", "cpu", "--seed", "1"]
    command += ["--num-envs", "512", "--num-iterations", "75", "--eval-episodes", "512", "--no-save-video"]
    subprocess.run([*command, "--log-dir", tmp_path / "run"], check=True, cwd=ROOT)
    result = json.loads((tmp_path / "run" / "summary.json").read_text())
    best = 300 if task.endswith("-v0") else 5  # 3.0 pays per second what its beta pays per step
    assert result["mean_return"] > best * 2 / 3  # random actions get less than a hundredth of it


# --- the program


def make_first(names, *args, **kwargs):
    """The first of these tasks that this Isaac Lab has, and its name: 3.0 dropped the version from the names."""
    for name in names[:-1]:
        with contextlib.suppress(ValueError):
            return make_env(name, *args, **kwargs), name
    return make_env(names[-1], *args, **kwargs), names[-1]


def names_of(task):
    return [f"{task}-v0", task]


def contract(seed):
    env, task = make_first(names_of(CARTPOLE), 8, "cpu", seed)
    keys = ("obs", "final_obs", "reward", "terminated", "truncated", "lengths")
    seen, copies = {key: [] for key in keys}, []
    env.reset(seed=seed)
    env.sim.episode_length_buf[0] = env.sim.max_episode_length - LIMIT_SOON
    for _ in range(150):
        obs, reward, terminated, truncated, info = env.step(torch.ones(8, 1))
        values = obs, info["final_obs"], reward, terminated, truncated, info["episode"]["l"]
        copies.append([value.clone() for value in values])
        for key, value in zip(keys, values, strict=True):
            seen[key].append(value)
    overwritten = not all(
        torch.equal(kept, seen[key][step])
        for step, row in enumerate(copies)
        for key, kept in zip(keys, row, strict=True)
    )
    return {key: torch.stack(values) for key, values in seen.items()} | {"overwritten": overwritten, "task": task}, env


def camera(seed):
    """Isaac Lab's own environment: the adapter takes no images."""
    import argparse

    import gymnasium as gym
    import isaaclab_tasks  # noqa: F401
    from isaaclab_tasks.utils.hydra import resolve_presets
    from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

    from common.envs.isaac import IsaacEnv, _find_launcher

    launch_simulation, _ = _find_launcher()  # of 3.x: 2.x has no camera without Kit
    task = next(name for name in CAMERAS if name in gym.registry)
    cfg = resolve_presets(load_cfg_from_registry(task, "env_cfg_entry_point"), ("newton_mjwarp", "newton_renderer"))
    cfg.sim.device, cfg.scene.num_envs, cfg.seed = "cpu", 2, seed
    with launch_simulation(cfg, argparse.Namespace(device="cpu")):
        env = gym.make(task, cfg=cfg)
    images = [env.reset(seed=seed)[0]["policy"].clone()]
    images += [env.step(torch.ones(2, 1))[0]["policy"].clone() for _ in range(10)]
    refusal = ""
    try:
        IsaacEnv(env, task, seed)
    except ValueError as error:
        refusal = str(error)
    return {"images": torch.stack(images), "refusal": refusal}, env


def camera_name(seed):
    import gymnasium as gym
    import isaaclab_tasks  # noqa: F401

    return {"task": next(name for name in CAMERAS if name in gym.registry)}, None


if __name__ == "__main__":
    path, what, seed = sys.argv[1:]
    sys.argv[1:] = []  # Isaac Lab reads the command line too
    saved, env = {"contract": contract, "camera": camera, "camera_name": camera_name}[what](int(seed))
    torch.save(saved, path)  # before closing, which ends the process where there is Kit
    if env is not None:
        env.close()
