"""Demonstrations: the file is whole, in robomimic's layout, and gives the same motion again."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from common.envs import go2_eval
from common.envs.go2 import COMMAND_SCALE, JOINTS, Go2Config, Go2Env

DOCS = Path(__file__).parents[1] / "docs"
NAMES = {"actions", "rewards", "dones", "terminated", "truncated", "states", "qpos", "qvel", "commands"}
NAMES |= {"obs/policy", "next_obs/policy"}


def config(**changes) -> Go2Config:
    # Commands at the ends of their ranges would make the linear policies fall sooner.
    quick = {"episode_seconds": 2.0, "resample_seconds": 0.5, "command_ends": 0.0}
    return Go2Config(**quick | changes)


def linear_policy(strength: float):
    """A fixed linear policy: small ones wobble to the time limit, large ones fall."""
    weights = {}

    def policy(obs):
        width = obs.shape[1]
        if width not in weights:
            generator = torch.Generator().manual_seed(0)
            weights[width] = strength * torch.randn(width, 12, generator=generator)
        return torch.tanh(obs @ weights[width])

    return policy


def read(path) -> tuple[dict, list[dict]]:
    with h5py.File(path) as file:
        data = file["data"]
        demos = []
        for i in range(len(data)):
            demo = data[f"demo_{i}"]
            demos.append({name: demo[name][:] for name in NAMES} | dict(demo.attrs))
        return dict(data.attrs), demos


@pytest.fixture(
    scope="module", params=({}, {"solver": "newton"}, {"action_latency": 2, "substeps": 4, "commands": "full"})
)
def recorded(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("demos") / "demos.hdf5"
    changes = request.param
    go2_eval.save_trajectories(linear_policy(0.1), config(**changes), "cpu", path, 4, seed=3)
    return config(**changes), *read(path)


def test_layout(recorded):
    cfg, attributes, demos = recorded
    num_commands = 5 if cfg.commands == "full" else 3
    assert attributes["num_demos"] == len(demos) == 4
    assert attributes["total"] == sum(demo["num_samples"] for demo in demos)
    env_args = json.loads(attributes["env_args"])
    assert env_args["env_name"] == "Go2-v0" and env_args["env_type"] == 2
    made = asdict(Go2Env(1, **env_args["env_kwargs"]).cfg)
    assert made == json.loads(json.dumps(asdict(cfg)))
    assert json.loads(attributes["action_joints"]) == json.loads(attributes["qpos_joints"]) == list(JOINTS)
    obs_dim = sum(size for _, size, _ in json.loads(attributes["observation_layout"]))
    widths = {"obs/policy": obs_dim, "next_obs/policy": obs_dim, "actions": 12, "commands": num_commands}
    for demo in demos:
        T = demo["num_samples"]
        for name, width in (widths | {"states": 37, "qpos": 19, "qvel": 18}).items():
            assert demo[name].shape == (T, width)
            assert demo[name].dtype == (np.float64 if name in ("states", "qpos", "qvel") else np.float32)
        for name in ("rewards", "dones", "terminated", "truncated"):
            assert demo[name].shape == (T,)
        np.testing.assert_array_equal(demo["states"], np.concatenate((demo["qpos"], demo["qvel"]), 1))
        np.testing.assert_array_equal(demo["dones"], np.arange(T) == T - 1)
        np.testing.assert_array_equal(demo["dones"], demo["terminated"] | demo["truncated"])
        assert demo["latency"] == cfg.action_latency


def test_rows_belong_together(recorded):
    cfg, attributes, demos = recorded
    offsets, start = {}, 0
    for name, size, _ in json.loads(attributes["observation_layout"]):
        offsets[name] = slice(start, start + size)
        start += size
    for demo in demos:
        obs, next_obs = demo["obs/policy"], demo["next_obs/policy"]
        np.testing.assert_array_equal(next_obs[:-1], obs[1:])
        start, num_commands = offsets["command_vx"].start, demo["commands"].shape[1]
        scale = np.array(COMMAND_SCALE[:num_commands], np.float32)
        np.testing.assert_allclose(obs[:, start : start + num_commands], demo["commands"] * scale, atol=1e-6)
        np.testing.assert_allclose(obs[:, offsets["dof_vel"]], demo["qvel"][:, 6:] * 0.05, atol=1e-5)
        np.testing.assert_array_equal(next_obs[:, offsets["last_action"]], demo["actions"])
        assert (demo["actions"] == linear_policy(0.1)(torch.from_numpy(obs)).numpy()).mean() > 0.9
    velocities = np.concatenate([demo["commands"][:, :3] for demo in demos])
    assert len(np.unique(velocities, axis=0)) > 4  # commands change within an episode, and differ between them
    assert not np.array_equal(demos[0]["qpos"][0], demos[1]["qpos"][0])


def start_at(env: Go2Env, demo: dict, t: int):
    """Puts the one robot of `env` where the demonstration was before action t, with the actions under way."""
    env.reset(seed=0)
    qpos, qvel = (torch.from_numpy(demo[name][t])[None] for name in ("qpos", "qvel"))
    env.physics.reset(torch.ones(1, dtype=torch.bool), qpos, qvel)
    for age in range(min(t, env.pending.shape[1])):
        env.pending[0, age] = torch.from_numpy(demo["actions"][t - 1 - age])
    env.episode_length[:] = t


def test_open_loop_replay_is_exact(recorded):
    """The first state and the stored actions give back every state of the episode, bit for bit."""
    cfg, _, demos = recorded
    env = Go2Env(1, "cpu", 99, cfg)
    for demo in demos:
        start_at(env, demo, 0)
        for t, action in enumerate(torch.from_numpy(demo["actions"])):
            np.testing.assert_array_equal(env.physics.qpos[0].numpy(), demo["qpos"][t])
            np.testing.assert_array_equal(env.physics.qvel[0].numpy(), demo["qvel"][t])
            env.command = torch.from_numpy(demo["commands"][t])[None]
            _, reward, terminated, truncated, info = env.step(action[None])
            if t > 1 and cfg.commands == "velocity":  # the reward of a jump also depends on what went before
                assert reward.item() == pytest.approx(demo["rewards"][t], abs=1e-5)
        assert terminated.item() == demo["terminated"][-1] and truncated.item() == demo["truncated"][-1]
        np.testing.assert_allclose(info["final_obs"][0], demo["next_obs/policy"][-1], atol=1e-6)


def test_single_steps_replay(recorded):
    """From any state in the middle: only the solver's warm start is missing."""
    cfg, _, demos = recorded
    env = Go2Env(1, "cpu", 99, cfg)
    worst = []
    for demo in demos:
        for t in range(5, demo["num_samples"] - 1, 7):
            start_at(env, demo, t)
            env.step(torch.from_numpy(demo["actions"][t])[None])
            worst.append(np.abs(env.physics.qpos[0].numpy() - demo["qpos"][t + 1]).max())
    if cfg.solver == "newton":  # which converges, so that it does not matter where it starts
        assert max(worst) < 1e-9
    else:
        assert np.median(worst) < 2e-4 and max(worst) < 5e-3, (np.median(worst), max(worst))


def test_falls_and_batches(tmp_path, monkeypatch):
    """Episodes that end early are whole, and there are as many as asked for, from batches of another size."""
    monkeypatch.setattr(go2_eval, "TRAJECTORY_BATCH", 4)
    path = go2_eval.save_trajectories(linear_policy(3.0), config(), "cpu", tmp_path / "a" / "demos.hdf5", 6)
    attributes, demos = read(path)
    lengths = [demo["num_samples"] for demo in demos]
    assert len(demos) == 6 and attributes["total"] == sum(lengths)
    assert len(set(lengths)) > 1 and min(lengths) < 100
    for demo in demos:
        assert demo["terminated"][-1] == (demo["num_samples"] < 100)
        tilt = np.abs(demo["next_obs/policy"][-1, 6:8]).max()  # gravity's x and y: sine of pitch and roll
        assert (tilt > np.sin(np.radians(9))) == demo["terminated"][-1]
    assert not np.array_equal(demos[0]["qpos"][0], demos[4]["qpos"][0])  # another batch, another seed


def test_whole_or_not_at_all(tmp_path):
    steps = 0

    def break_down(obs):
        nonlocal steps
        steps += 1
        if steps > 10:
            raise RuntimeError("out of order")
        return torch.zeros(len(obs), 12)

    path = tmp_path / "demos.hdf5"
    path.write_text("an older file")
    with pytest.raises(RuntimeError, match="out of order"):
        go2_eval.save_trajectories(break_down, config(), "cpu", path, 2)
    assert path.read_text() == "an older file" and list(tmp_path.iterdir()) == [path]


def test_reader_of_the_docs(tmp_path, monkeypatch, capsys):
    """The ten lines in docs/go2*.md read the file."""
    text = "".join(path.read_text() for path in DOCS.glob("go2*.md"))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (reader,) = [block for block in blocks if "h5py" in block]
    assert len(reader.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    go2_eval.save_trajectories(linear_policy(0.1), config(), "cpu", "demos.hdf5", 3)
    namespace = {}
    exec(reader, namespace)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["demo_0", "demo_1", "demo_2"]
    assert namespace["transitions"].shape == (99, 37 + 12 + 37)
