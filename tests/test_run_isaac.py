"""Whole runs of ppo_continuous_isaac.py beyond test_run_scripts.py: resumed tasks, launchers, videos, tasks that are
not there.
"""

import sys
from types import SimpleNamespace

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, MultiBinary
from harness import SCRIPTS
from helpers import ALWAYS, check_sentence, finish, run, start, tiny

import ppo_continuous_isaac as ppo
from common import checkpoint, distributed
from common.envs import isaac, isaac_eval

SCRIPT = SCRIPTS["ppo_continuous_isaac"]


@pytest.fixture
def script():
    return SCRIPT


# --- resume


def test_the_state_of_mujoco_travels_between_ranks(tmp_path):
    """It has arrays of types that torch's pickle, as `gather_object` uses it, cannot read back."""
    finish(start(SCRIPT, *tiny(SCRIPT, 3), "--env-id", "Hopper-v5", "--ranks", 2, "--log-dir", tmp_path))
    states = checkpoint.load(tmp_path / "checkpoints" / "model_3.pt", ppo.SCRIPT)["ranks"]
    physics = [[env["physics"] for env in state["envs"]["envs"]] for state in states]
    assert [len(envs) for envs in physics] == [2, 2] and not torch.equal(physics[0][0], physics[1][0])
    begin = tmp_path / "checkpoints" / "model_3.pt"
    more = [*SCRIPT.length(6), "--log-dir", tmp_path / "more", "--ranks", 2, *ALWAYS]
    finish(start(SCRIPT, "--resume", begin, *more))
    assert (tmp_path / "more" / "checkpoints" / "model_6.pt").exists()


def test_steps_already_done_count_whatever_the_number_of_environments(tmp_path, capsys):
    assert run(SCRIPT, *tiny(SCRIPT, 2), "--hidden", 9, "--log-dir", tmp_path) == 0
    assert run(SCRIPT, "--resume", tmp_path, "--total-timesteps", 256, "--num-envs", 8, *ALWAYS) == 0
    state = checkpoint.load(tmp_path / "checkpoints" / "final_model.pt", ppo.SCRIPT)
    assert tuple(state["args"]["hidden"]) == (9,) and state["agent"]["actor.mlp.0.weight"].shape == (9, 4)
    # Two iterations of 4 environments were done; with 8 there are two in all, so none is left.
    assert state["global_step"] == 128 and state["iteration"] == 2
    assert run(SCRIPT, "--resume", tmp_path, "--total-timesteps", 512, "--num-envs", 8, *ALWAYS) == 0
    assert "warning" in capsys.readouterr().out  # the episodes could not be restored
    state = checkpoint.load(tmp_path / "checkpoints" / "final_model.pt", ppo.SCRIPT)
    assert state["iteration"] == 4 and state["global_step"] == 128 + 2 * 8 * 16


def test_with_another_environment_the_episodes_begin_anew(finished, tmp_path, capsys):
    begin = finished[0] / "checkpoints" / "model_3.pt"
    for flags, named in (([], ""), (["--clip-actions", 2], "--clip-actions"), (["--physics", "physx"], "--physics")):
        capsys.readouterr()
        more = [*SCRIPT.length(4), "--log-dir", tmp_path, "--ranks", 1, *ALWAYS]
        assert run(SCRIPT, "--resume", begin, *flags, *more) == 0
        [warning] = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
        named = ", ".join(filter(None, (named, "--ranks")))
        assert warning == f"warning: the checkpoint was written with other {named}, so the episodes begin anew"
        assert checkpoint.load(tmp_path / "checkpoints" / "final_model.pt", ppo.SCRIPT)["iteration"] == 4


def test_flags_of_the_launcher_belong_to_the_run(finished, tmp_path, monkeypatch):
    """A task of Isaac Lab passes unknown flags on, also when it is resumed, and then remembers those it began with."""
    state = checkpoint.load(finished[0] / "checkpoints" / "model_3.pt", ppo.SCRIPT)
    state["args"] |= {"env_id": "Isaac-Cartpole-Direct", "launcher_args": ("--headless",)}
    checkpoint.save(tmp_path / "model_3.pt", state)
    began = []
    monkeypatch.setattr(isaac, "check_task", lambda env_id, physics: None)  # it may not be installed
    monkeypatch.setattr(isaac, "check_launcher_args", lambda *args: None)
    monkeypatch.setattr(distributed, "launch", lambda main, args, ranks: began.append(args.launcher_args))
    run_dir = ["--log-dir", tmp_path / "run"]
    assert run(SCRIPT, "--env-id", "Isaac-Cartpole-Direct", "--viz", "newton", *run_dir) == 0
    assert run(SCRIPT, "--resume", tmp_path / "model_3.pt", *run_dir) == 0
    assert run(SCRIPT, "--resume", tmp_path / "model_3.pt", "--viz", "newton", *run_dir) == 0
    assert [tuple(flags) for flags in began] == [("--viz", "newton"), ("--headless",), ("--viz", "newton")]


# --- videos


class Drawn(gym.Env):
    """Episodes of seven steps; each picture is a little brighter than the last."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space, action_space = Box(-1, 1, (2,)), Box(-1, 1, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.clock = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.clock += 1
        return np.zeros(2, np.float32), 0.0, self.clock == 7, False, {}

    def render(self):
        return np.full((32, 48, 3), 30 * self.clock, np.uint8)


def film(env_id, path, **settings):
    args = ppo.Args(env_id=env_id, device="cpu", hidden=(8,), lstm_size=8, **settings)
    envs = ppo.make(args, 1, 1)
    ppo.record_video(ppo.Agent(envs, args), args, path)
    envs.close()


@pytest.mark.parametrize("lstm", [False, True])
def test_a_video_is_one_episode_at_the_tasks_own_speed(tmp_path, monkeypatch, lstm):
    monkeypatch.setitem(gym.registry, "Drawn-v0", gym.envs.registration.EnvSpec("Drawn-v0", Drawn))
    monkeypatch.setattr(isaac_eval, "find_gl", lambda: "egl")
    film("Drawn-v0", tmp_path / "a.mp4", lstm=lstm)
    frames = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    meta = next(frames)
    brightness = [np.frombuffer(frame, np.uint8).mean() for frame in frames]
    assert meta["size"] == (48, 32) and meta["fps"] == 10
    assert brightness == pytest.approx([30 * i for i in range(7)], abs=6)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "CartPoleMultiDiscrete-v0"])
def test_a_task_that_cannot_be_drawn_costs_a_sentence_and_not_the_run(tmp_path, monkeypatch, capsys, env_id):
    monkeypatch.setattr(isaac_eval, "find_gl", lambda: "egl")
    monkeypatch.setitem(sys.modules, "pygame", None)  # as if it were not installed
    film(env_id, tmp_path / "a.mp4")
    out = capsys.readouterr().out
    assert out.startswith("no video: ") and out.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("env_id", "filmed"), [("Mjlab-X", True), ("Isaac-X", False), ("IsaacContrib-X", False)])
def test_mjlab_is_filmed_as_it_was_trained_and_isaac_lab_is_left_to_its_recorder(tmp_path, monkeypatch, env_id, filmed):
    made = []

    def make_env(*args, **settings):
        made.append((args, settings))
        raise ValueError("enough")

    monkeypatch.setattr(isaac_eval, "find_gl", lambda: "egl")
    monkeypatch.setattr(ppo, "make_env", make_env)
    args = ppo.Args(env_id=env_id, device="cpu", hidden=(8,), history=3, clip_actions=0.5)
    space = SimpleNamespace(single_observation_space=Box(-1, 1, (2,)), single_action_space=Box(-1, 1, (1,)))
    space.policy_dim = space.critic_dim = 2
    ppo.record_video(ppo.Agent(space, args), args, tmp_path / "a.mp4")
    settings = {"history": 3, "clip_actions": 0.5, "render_mode": "rgb_array"}
    assert made == ([((env_id, 1, "cpu", 1), settings)] if filmed else [])


# --- mistakes


LATER_MISTAKES = [  # told by the environment or the policy once they are made
    ("--env-id CartPole-v9", "--env-id", "CartPole-v9", "the nearest is CartPole-v1"),
    ("--env-id HalfCheeta-v5", "--env-id", "HalfCheetah-v5"),
    ("--env-id Buttons-v0", "--env-id Buttons-v0", "MultiBinary", "Box of floats, Discrete and MultiDiscrete"),
    ("--env-id Grid-v0", "--env-id Grid-v0", "(2, 3)"),
    ("--env-id Pictures-v0", "--env-id Pictures-v0", "images"),
    ("--env-id Isaac-Cartpole-Direct --num-envs 4", "--env-id Isaac-Cartpole-Direct", "Isaac Lab", "install it"),
    ("--env-id Mjlab-Cartpole-Balance --num-envs 4", "Mjlab-Cartpole-Balance", "pip install -r requirements-mjlab.txt"),
    ("--resume {run} --env-id Acrobot-v1", "--resume", "another task"),
    ("--resume {run} --hidden 32", "--resume", "networks"),
    ("--resume {run} --lstm --num-minibatches 1", "--resume", "networks"),
    ("--eval-only --model-path {run} --env-id Acrobot-v1", "--model-path", "another task"),
]


class Buttons(gym.Env):
    observation_space, action_space = Box(-1, 1, (2,)), MultiBinary(3)


class Grid(Drawn):
    action_space = Box(-1, 1, (2, 3))


class Pictures(gym.Env):
    observation_space, action_space = Box(0, 255, (8, 8, 3), np.uint8), Box(-1, 1, (2,))


@pytest.mark.parametrize(
    ("flags", "words"), [(m[0], m[1:]) for m in LATER_MISTAKES], ids=[m[0] for m in LATER_MISTAKES]
)
def test_a_task_that_cannot_be_made_or_does_not_fit_ends_with_one_sentence(
    finished, monkeypatch, tmp_path, capfd, flags, words
):
    for name, env in (("Buttons-v0", Buttons), ("Grid-v0", Grid), ("Pictures-v0", Pictures)):
        monkeypatch.setitem(gym.registry, name, gym.envs.registration.EnvSpec(name, env))
    for package in ("isaaclab", "mjlab"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    code = run(SCRIPT, *flags.format(run=finished[0]).split(), "--device", "cpu", "--log-dir", tmp_path / "new")
    check_sentence(code, capfd.readouterr().err, words)
    told_at_once = "--env-id" in flags and "--resume" not in flags and "--eval-only" not in flags
    assert not told_at_once or not (tmp_path / "new").exists(), "a run that never began leaves no folder"
