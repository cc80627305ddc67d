"""Whole runs of ppo_continuous_isaac.py as its users start them: what they leave, resume, signals, mistakes."""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import yaml
from gymnasium.spaces import Box, MultiBinary
from helpers import alive, differences, finish, wait_for

import ppo_continuous_isaac as ppo
from common import checkpoint, distributed
from common.envs import isaac, isaac_eval

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "ppo_continuous_isaac.py"
EVALUATION = ["--eval-episodes", 4, "--no-save-video", "--device", "cpu"]
TINY = ["--env-id", "CartPole-v1", "--num-envs", 4, "--num-steps", 16, "--total-timesteps", 6 * 64, *EVALUATION]
TINY += ["--update-epochs", 2, "--num-minibatches", 2, "--checkpoint-interval", 3, "--log-interval", 3]
NORMALISED = ["--norm-obs", "--norm-reward"]


def run(*argv) -> int:
    """The script's exit code, run in this process on one thread."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                sys, "argv", [str(SCRIPT), *map(str, argv), *(["--ranks", "1"] if "--ranks" not in argv else [])]
            )
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(*argv, cwd=ROOT):
    """A run in a process group of its own."""
    return subprocess.Popen(
        [str(word) for word in (sys.executable, SCRIPT, *argv)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def learned(path):
    """All of a checkpoint that a resumed run must reach again."""
    state = checkpoint.load(path, ppo.SCRIPT)
    found = {key: state[key] for key in ("agent", "optimizer", "global_step", "iteration")}
    for rank in state["ranks"]:
        rank["rng"] = rank["rng"]["torch"]
        for env in rank["envs"]["envs"]:
            del env["attributes"]["_np_random_seed"]  # Gymnasium's note of the first seed, which nothing reads
    return found | {"ranks": state["ranks"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder, stdout and stderr of a training of six iterations on two ranks, named as by default."""
    folder = tmp_path_factory.mktemp("finished")
    flags = [*TINY, *NORMALISED, "--eval-interval", 4, "--exp-name", "x", "--seed", 5, "--ranks", 2]
    out, err = finish(start(*flags, cwd=folder))
    [run_dir] = (folder / "runs" / "x").iterdir()
    return run_dir, out, err


# --- what a run leaves


def test_a_run_leaves_its_settings(finished):
    run_dir, out, err = finished
    assert run_dir.name.startswith("CartPole-v1__5__20")
    settings = yaml.safe_load((run_dir / "args.yaml").read_text())
    info = settings.pop("run_info")
    assert settings.keys() == ppo.Args.__dataclass_fields__.keys()
    assert (settings["num_envs"], settings["seed"], settings["ranks"], settings["preset"]) == (4, 5, 2, "classic")
    assert info["versions"]["torch"].startswith(torch.__version__.split("+")[0]) and info["hardware"]["cores"] >= 1
    assert "CartPole-v1, preset classic: 4 environments" in out and str(run_dir.name) in out
    assert out.count("preset") == 1 and "Traceback" not in err


def test_a_run_leaves_metrics(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0])).Reload()
    tags = {"charts/SPS", "charts/episodic_return", "charts/learning_rate", "losses/policy_loss", "losses/value_loss"}
    tags |= {"losses/approx_kl", "losses/clipfrac", "losses/explained_variance", "charts/nan_resets"}
    assert tags | {"eval/mean_return"} <= set(events.Tags()["scalars"])
    points = events.Scalars("losses/policy_loss")
    assert [point.step for point in points] == [3 * 64, 6 * 64]
    assert all(np.isfinite(point.value) for point in points)


def test_a_run_leaves_checkpoints_evaluations_and_a_summary(finished):
    run_dir, *_ = finished
    folder = run_dir / "checkpoints"
    assert {f.name for f in folder.iterdir()} == {
        "model_3.pt",
        "model_4.pt",
        "model_6.pt",
        "final_model.pt",
        "best_model.pt",
    }
    states = {f.name: checkpoint.load(f, ppo.SCRIPT) for f in folder.iterdir()}
    assert states["model_3.pt"]["iteration"] == 3 and states["final_model.pt"]["iteration"] == 6
    assert states["best_model.pt"]["iteration"] in (4, 6)
    assert states["final_model.pt"]["global_step"] == 6 * 64 and len(states["final_model.pt"]["ranks"]) == 2
    assert {f.name for f in (run_dir / "eval").iterdir()} == {"model_4.json", "final_model.json"}
    result = json.loads((run_dir / "eval" / "final_model.json").read_text())
    assert {"mean_return", "return_ci95", "mean_length"} <= set(result) and result["episodes"] == 4
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {"SPS", "wall_seconds", "peak_memory_mb", "commit", "versions", "hardware"} <= set(summary)
    assert summary["global_step"] == 6 * 64 and summary["mean_return"] == result["mean_return"]
    assert (run_dir / "policy.onnx").stat().st_size > 1000 and not (run_dir / "videos").exists()  # --no-save-video


def test_eval_only(finished, tmp_path, capsys):
    model = finished[0] / "checkpoints" / "final_model.pt"
    flags = ["--eval-only", "--model-path", model, "--log-dir", tmp_path, "--eval-episodes", 6, "--no-save-video"]
    assert run(*flags) == 0
    result = json.loads((tmp_path / "eval" / "final_model.json").read_text())
    assert result["episodes"] == 6 and "6 episodes: mean return" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["eval"]
    assert run(*flags, "--seed", 5) == 0  # the same policy on the same seeds
    assert json.loads((tmp_path / "eval" / "final_model.json").read_text())["mean_return"] == result["mean_return"]


# --- resume


@pytest.mark.parametrize(
    "flags",
    [["--env-id", "InvertedPendulum-v5", *NORMALISED], ["--env-id", "CartPoleMasked-v0", "--lstm", *NORMALISED]],
    ids=["mlp", "lstm"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, flags):
    assert run(*TINY, *flags, "--log-dir", tmp_path / "a") == 0
    begin = tmp_path / "a" / "checkpoints" / "model_3.pt"
    assert run("--resume", begin, "--log-dir", tmp_path / "b") == 0
    end, again = (learned(tmp_path / name / "checkpoints" / "model_6.pt") for name in "ab")
    assert differences(end, again) == []
    moved = differences(learned(begin), end)
    assert ".agent.actor.mlp.0.weight" in moved and ".agent.return_stats.var" in moved  # it went on learning
    assert end["ranks"][0]["envs"]["lengths"].max() > 0
    assert ("state" in end["ranks"][0]) == ("--lstm" in flags)


def test_a_run_of_two_ranks_resumes_exactly(finished, tmp_path):
    begin = finished[0] / "checkpoints" / "model_3.pt"
    finish(start("--resume", begin, "--log-dir", tmp_path, "--ranks", 2))
    a, b = (learned(folder / "checkpoints" / "model_6.pt") for folder in (finished[0], tmp_path))
    assert len(a["ranks"]) == 2 and differences(a, b) == []


def test_the_state_of_mujoco_travels_between_ranks(tmp_path):
    """It has arrays of types that torch's pickle, as `gather_object` uses it, cannot read back."""
    flags = [*TINY, "--env-id", "Hopper-v5", "--ranks", 2, "--log-dir", tmp_path, "--total-timesteps", 192]
    finish(start(*flags))
    states = checkpoint.load(tmp_path / "checkpoints" / "model_3.pt", ppo.SCRIPT)["ranks"]
    physics = [[env["physics"] for env in state["envs"]["envs"]] for state in states]
    assert [len(envs) for envs in physics] == [2, 2] and not torch.equal(physics[0][0], physics[1][0])
    begin = tmp_path / "checkpoints" / "model_3.pt"
    finish(start("--resume", begin, "--log-dir", tmp_path / "more", "--ranks", 2, "--total-timesteps", 384))
    assert (tmp_path / "more" / "checkpoints" / "model_6.pt").exists()


def test_resume_goes_on_in_the_same_folder_to_more_steps(tmp_path, capsys):
    assert run(*TINY, "--total-timesteps", 128, "--hidden", 9, "--log-dir", tmp_path / "old") == 0
    (tmp_path / "old").rename(tmp_path / "new")
    assert run("--resume", tmp_path / "new", "--total-timesteps", 256, "--num-envs", 8) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    state = checkpoint.load(tmp_path / "new" / "checkpoints" / "final_model.pt", ppo.SCRIPT)
    assert tuple(state["args"]["hidden"]) == (9,) and state["agent"]["actor.mlp.0.weight"].shape == (9, 4)
    # Two iterations of 4 environments were done; with 8 there are two in all, so none is left.
    assert state["global_step"] == 128 and state["iteration"] == 2
    assert run("--resume", tmp_path / "new", "--total-timesteps", 512, "--num-envs", 8) == 0
    assert "warning" in capsys.readouterr().out  # the episodes could not be restored
    state = checkpoint.load(tmp_path / "new" / "checkpoints" / "final_model.pt", ppo.SCRIPT)
    assert state["iteration"] == 4 and state["global_step"] == 128 + 2 * 8 * 16


def test_flags_of_the_launcher_belong_to_the_run(finished, tmp_path, monkeypatch):
    """A task of Isaac Lab passes unknown flags on, also when it is resumed, and then remembers those it began with."""
    state = checkpoint.load(finished[0] / "checkpoints" / "model_3.pt", ppo.SCRIPT)
    state["args"] |= {"env_id": "Isaac-Cartpole-Direct", "launcher_args": ("--headless",)}
    checkpoint.save(tmp_path / "model_3.pt", state)
    began = []
    monkeypatch.setattr(isaac, "check_task", lambda env_id, physics: None)  # it may not be installed
    monkeypatch.setattr(distributed, "launch", lambda main, args, ranks: began.append(args.launcher_args))
    run_dir = ["--log-dir", tmp_path / "run"]
    assert run("--env-id", "Isaac-Cartpole-Direct", "--viz", "newton", *run_dir) == 0
    assert run("--resume", tmp_path / "model_3.pt", *run_dir) == 0
    assert run("--resume", tmp_path / "model_3.pt", "--viz", "newton", *run_dir) == 0
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


# --- signals


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGINT, True), (signal.SIGTERM, False)], ids=["INT", "TERM"])
def test_a_signal_finishes_the_iteration_and_saves(tmp_path, number, to_all):
    settings = ["--total-timesteps", 10**9, "--checkpoint-interval", 10**6, "--log-interval", 1]
    process = start(*TINY, *settings, "--log-dir", tmp_path, "--ranks", 2)
    try:
        while not process.stdout.readline().startswith("step"):  # until the first iteration is done
            assert process.poll() is None
        (os.killpg if to_all else os.kill)(process.pid, number)
        out, err = finish(process)
        wait_for(lambda: alive(process.pid) == [], 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in err and "stopping" in err and f"--resume {tmp_path}" in out
    [saved] = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.load(saved, ppo.SCRIPT)["iteration"] == int(saved.stem.removeprefix("model_")) >= 1
    assert not (tmp_path / "summary.json").exists()


# --- mistakes

MISTAKES = [
    ("--num-envs 0", "--num-envs", "above 0"),
    ("--num-steps 0", "--num-steps", "above 0"),
    ("--num-envs 9 --ranks 2", "--num-envs", "2 ranks"),
    ("--num-envs 4 --num-steps 8 --num-minibatches 5 --ranks 1", "--num-minibatches", "divisor of the 32 samples"),
    ("--lstm --num-envs 4 --num-minibatches 8 --ranks 1", "--num-minibatches", "divisor of the 4 environments"),
    ("--lstm --num-minibatches 1 --ranks 1 --compile", "--lstm", "--compile"),
    ("--ranks -1", "--ranks"),
    ("--gamma 1.5", "--gamma", "1.5", "from 0 to below 1"),
    ("--learning-rate nan", "--learning-rate", "nan"),
    ("--min-std 2", "--min-std", "--init-std"),
    ("--hidden 64 0", "--hidden", "above 0"),
    ("--history 0", "--history", "above 0"),
    ("--clip-actions -1", "--clip-actions"),
    ("--num-env 3", "--num-env;", "--num-envs"),
    ("--headless", "--headless"),  # a flag of Isaac Lab's launcher, where there is no Isaac Lab
    ("--config {tmp}/config.yaml", "num_robots", "config.yaml"),
    ("--resume {tmp}/absent", "--resume", "absent"),
    ("--resume {tmp}/other.pt", "--resume", "sac_other"),
    ("--eval-only", "--eval-only", "--model-path"),
    ("--eval-only --model-path {tmp}/damaged.pt", "--model-path", "damaged"),
    ("--log-dir {tmp}/damaged.pt", "--log-dir", "a folder"),
]
SYNTAX_ERRORS = [("--num-envs many", "--num-envs"), ("--activation gelu", "tanh"), ("--preset big", "isaac-ant")]
LATER_MISTAKES = [  # told by the environment or the policy once they are made
    ("--env-id CartPole-v9", "--env-id", "CartPole-v9", "the nearest is CartPole-v1"),
    ("--env-id HalfCheeta-v5", "--env-id", "HalfCheetah-v5"),
    ("--env-id Buttons-v0", "--env-id Buttons-v0", "MultiBinary", "Box of floats, Discrete and MultiDiscrete"),
    ("--env-id Grid-v0", "--env-id Grid-v0", "(2, 3)"),
    ("--env-id Pictures-v0", "--env-id Pictures-v0", "images"),
    ("--env-id Isaac-Cartpole-Direct --num-envs 4", "--env-id Isaac-Cartpole-Direct", "Isaac Lab", "install it"),
    ("--env-id Mjlab-Cartpole-Balance --num-envs 4", "--env-id Mjlab-Cartpole-Balance", "pip install mjlab"),
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


@pytest.fixture(scope="module")
def mistakes(finished, tmp_path_factory):
    """A folder with the files of MISTAKES, and an empty one within to start in."""
    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "config.yaml").write_text("num_robots: 3")
    model = (finished[0] / "checkpoints" / "final_model.pt").read_bytes()
    (tmp / "damaged.pt").write_bytes(model[: len(model) // 2])
    checkpoint.save(tmp / "other.pt", {"script": "sac_other", "args": {}})
    (tmp / "cwd").mkdir()
    return tmp


def check_sentence(code, err, words):
    lines = err.splitlines()  # a traceback has many
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, err)
    assert all(word in lines[0] for word in words), err


@pytest.mark.parametrize(("flags", "words"), [(m[0], m[1:]) for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_ends_with_one_sentence_before_anything_is_written(mistakes, monkeypatch, capfd, flags, words):
    monkeypatch.setattr(distributed, "launch", lambda *args: None)  # where training would begin
    monkeypatch.chdir(mistakes / "cwd")
    code = run(*flags.format(tmp=mistakes).split(), "--device", "cpu")
    check_sentence(code, capfd.readouterr().err, words)
    assert not list((mistakes / "cwd").iterdir())


@pytest.mark.parametrize(("flags", "word"), SYNTAX_ERRORS)
def test_a_syntax_error_names_the_flag_or_what_it_takes(monkeypatch, tmp_path, capfd, flags, word):
    monkeypatch.chdir(tmp_path)
    code = run(*flags.split(), "--device", "cpu")
    err = capfd.readouterr().err
    assert code == 2 and flags.split()[0] in err and word in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:99"])
def test_a_device_that_is_not_there(monkeypatch, tmp_path, capfd, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("no mistake here")
    monkeypatch.chdir(tmp_path)
    check_sentence(run("--env-id", "CartPole-v1", "--device", device), capfd.readouterr().err, ["--device", device])


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
    code = run(*flags.format(run=finished[0]).split(), "--device", "cpu", "--log-dir", tmp_path / "new")
    check_sentence(code, capfd.readouterr().err, words)
    told_at_once = "--env-id" in flags and "--resume" not in flags and "--eval-only" not in flags
    assert not told_at_once or not (tmp_path / "new").exists(), "a run that never began leaves no folder"
