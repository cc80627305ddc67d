"""Whole runs of ppo_go2_mujoco.py as its users start them: what they leave, resume, signals, mistakes."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import alive, differences, finish, wait_for

import ppo_go2_mujoco as ppo
from common import checkpoint, distributed
from common.envs.go2 import Go2Env

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "ppo_go2_mujoco.py"
EVALUATION = ["--episode-seconds", 1, "--eval-episodes", 8, "--no-save-video", "--device", "cpu"]
TINY = ["--num-envs", 32, "--num-steps", 24, "--num-iterations", 6, *EVALUATION]
TINY += ["--checkpoint-interval", 3, "--log-interval", 3]
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def start(*argv, ranks=0, program=(sys.executable,), cwd=ROOT, environment=None):
    """A run in a process group of its own. With `ranks`, that many, and with one of them on one core and thread."""
    argv = [*program, SCRIPT, *argv, *(["--ranks", ranks] if ranks else [])]

    def one_core():
        os.sched_setaffinity(0, {CORES[-1]})

    return subprocess.Popen(
        [str(word) for word in argv],
        cwd=cwd,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=one_core if ranks == 1 and CORES else None,
    )


def learned(path, keys=("agent", "optimizer", "global_step", "iteration")):
    state = checkpoint.load(path, ppo.SCRIPT)
    return {key: state[key] for key in keys} | {
        "ranks": [{k: r[k] for k in ("envs", "next_obs")} for r in state["ranks"]]
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder, stdout and stderr of a training of six iterations on two ranks, named as by default."""
    folder = tmp_path_factory.mktemp("finished")
    out, err = finish(start(*TINY, "--eval-interval", 4, "--exp-name", "x", "--seed", 5, ranks=2, cwd=folder))
    [run] = (folder / "runs" / "x").iterdir()
    return run, out, err


# --- what a run leaves


def test_a_run_leaves_its_settings(finished):
    run, out, err = finished
    assert run.name.startswith("Go2-v0__5__20")
    settings = yaml.safe_load((run / "args.yaml").read_text())
    info = settings.pop("run_info")
    assert settings.keys() == ppo.Args.__dataclass_fields__.keys()
    assert (settings["num_envs"], settings["seed"], settings["ranks"], settings["preset"]) == (32, 5, 2, "laptop")
    assert info["versions"]["torch"].startswith(torch.__version__.split("+")[0]) and "mujoco" in info["versions"]
    assert len(info["commit"]) >= 7 and info["hardware"]["cores"] >= 1
    assert "preset laptop" in out and "Traceback" not in err and str(run.name) in out


def test_a_run_leaves_metrics(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0])).Reload()
    tags = {"charts/SPS", "charts/episodic_return", "charts/learning_rate", "losses/policy_loss", "losses/value_loss"}
    tags |= {"losses/approx_kl", "losses/clipfrac", "losses/explained_variance", "charts/nan_resets", "eval/fall_rate"}
    assert tags <= set(events.Tags()["scalars"])
    points = events.Scalars("losses/policy_loss")
    assert [point.step for point in points] == [3 * 32 * 24, 6 * 32 * 24]
    assert all(np.isfinite(point.value) for point in points)
    assert events.Scalars("charts/episodic_return")


def test_a_run_leaves_checkpoints(finished):
    run, *_ = finished
    folder = run / "checkpoints"
    names = {"model_3.pt", "model_4.pt", "model_6.pt", "final_model.pt", "best_model.pt"}  # what is evaluated is kept
    assert {f.name for f in folder.iterdir()} == names
    states = {f.name: checkpoint.load(f, ppo.SCRIPT) for f in folder.iterdir()}
    assert states["model_3.pt"]["iteration"] == 3 and states["final_model.pt"]["iteration"] == 6
    assert states["best_model.pt"]["iteration"] in (4, 6)
    assert states["final_model.pt"]["global_step"] == 6 * 32 * 24 and len(states["final_model.pt"]["ranks"]) == 2


def test_a_run_leaves_an_evaluation_and_a_summary(finished):
    run, *_ = finished
    assert {f.name for f in (run / "eval").iterdir()} == {"model_4.json", "final_model.json", "final_model.png"}
    result = json.loads((run / "eval" / "final_model.json").read_text())
    keys = "episodes mean_return return_ci95 mean_length fall_rate lin_vel_error yaw_rate_error foot_lift duty_factor"
    assert set(keys.split()) <= set(result) and result["episodes"] >= 8
    assert [len(result[key]) for key in ("return_ci95", "foot_lift", "duty_factor")] == [2, 4, 4]
    summary = json.loads((run / "summary.json").read_text())
    assert {"SPS", "wall_seconds", "peak_memory_mb", "commit", "versions", "hardware"} <= set(summary)
    assert summary["global_step"] == 6 * 32 * 24 and summary["fall_rate"] == result["fall_rate"]
    assert not (run / "videos").exists()  # --no-save-video


def test_onnx_is_the_policy_with_its_normaliser(finished):
    onnxruntime = pytest.importorskip("onnxruntime")
    run, *_ = finished
    state = checkpoint.load(run / "checkpoints" / "final_model.pt", ppo.SCRIPT)
    args = ppo.Args(**state["args"] | {"precision": "float32"})
    env = Go2Env(8, "cpu", seed=3, cfg=args)
    agent = ppo.Agent(env, args)
    agent.load_state_dict(state["agent"])
    seen, obs = [], env.reset(seed=3)[0]
    with torch.no_grad():
        for _ in range(30):
            seen.append(obs)
            obs = env.step(agent(obs) + 0.5 * torch.randn(8, 12))[0]
        seen = torch.cat(seen)
        expected, raw = agent(seen).numpy(), agent.actor(seen).numpy()
    session = onnxruntime.InferenceSession(str(run / "policy.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 7, 240):
        (actions,) = session.run(["actions"], {"obs": seen[:batch].numpy()})
        np.testing.assert_allclose(actions, expected[:batch], atol=1e-5)
    assert np.abs(raw - expected).max() > 1e-2  # without the normaliser
    (actions,) = session.run(None, {"obs": 1e4 * seen.numpy()})
    np.testing.assert_allclose(actions, agent(1e4 * seen).detach().numpy(), atol=1e-5)  # clipped at 10


# --- resume


@pytest.mark.parametrize(
    "flags", [[], ["--randomise", "--commands", "full", "--history", "2"]], ids=["default", "full"]
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, flags):
    finish(start(*TINY, *flags, "--log-dir", tmp_path / "a", ranks=1))
    begin = tmp_path / "a" / "checkpoints" / "model_3.pt"
    finish(start("--resume", begin, "--log-dir", tmp_path / "b", ranks=1))
    names = [folder / "checkpoints" / "model_6.pt" for folder in (tmp_path / "a", tmp_path / "b")]
    assert differences(*(learned(name) for name in names)) == []
    moved = differences(learned(begin), learned(names[0]))
    assert "agent.actor.0.weight" in " ".join(moved)  # it went on learning


def test_a_run_of_two_ranks_resumes_exactly(finished, tmp_path):
    begin = finished[0] / "checkpoints" / "model_3.pt"
    finish(start("--resume", begin, "--log-dir", tmp_path, ranks=2))
    a, b = (learned(folder / "checkpoints" / "model_6.pt") for folder in (finished[0], tmp_path))
    assert differences(a, b) == []


def test_resume_goes_on_in_the_same_folder_to_more_iterations(tmp_path):
    finish(start(*TINY, "--num-iterations", 2, "--log-dir", "old", "--kp", 33, ranks=1, cwd=tmp_path))
    assert (tmp_path / "old" / "checkpoints" / "model_2.pt").exists()
    shutil.move(tmp_path / "old", tmp_path / "new")  # to where it goes on, whatever folder it is started from
    more = ["--num-iterations", 4, "--num-envs", 16]
    out, _ = finish(start("--resume", tmp_path / "new", *more, ranks=1, cwd=tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"new"}
    state = checkpoint.load(tmp_path / "new" / "checkpoints" / "model_4.pt", ppo.SCRIPT)
    assert state["args"]["kp"] == 33 and state["global_step"] == (2 * 32 + 2 * 16) * 24
    assert "warning" in out and "num-envs" in out  # the episodes could not be restored


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("to_all", [True, False], ids=["group", "parent"])
def test_a_signal_finishes_the_iteration_and_saves(tmp_path, number, to_all):
    settings = ["--num-iterations", 100_000, "--checkpoint-interval", 100_000, "--log-interval", 1]
    process = start(*TINY, *settings, "--log-dir", tmp_path, ranks=2)
    try:
        assert "preset" in process.stdout.readline()
        assert process.stdout.readline().startswith("step")  # the first iteration is done
        assert len(alive(process.pid)) == 2
        (os.killpg if to_all else os.kill)(process.pid, number)
        out, err = finish(process, 0, 60)
        assert alive(process.pid) == []
    finally:
        for pid in alive(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert "Traceback" not in err and "stopping" in err and "--resume" in out
    [saved] = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.load(saved, ppo.SCRIPT)["iteration"] == int(saved.stem.removeprefix("model_")) >= 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no parent-death signal")
def test_killed_again_and_again_a_run_loses_at_most_one_interval(tmp_path):
    def newest():
        files = (tmp_path / "checkpoints").glob("model_*.pt") if (tmp_path / "checkpoints").exists() else []
        return max((int(file.stem.removeprefix("model_")) for file in files), default=0)

    rng, flags = np.random.default_rng(0), [*TINY, "--checkpoint-interval", 1, "--log-dir", tmp_path]
    flags += ["--num-iterations", 100_000]
    for attempt in range(4):
        before = newest()
        process = start(*(["--resume", tmp_path] if attempt else flags), ranks=2)
        wait_for(lambda: newest() > before or process.poll() is not None)  # noqa: B023
        time.sleep(rng.uniform(0, 0.2))
        [child] = set(alive(process.pid)) - {process.pid}
        seen = newest()
        if attempt == 2:  # so that it cannot notice by itself that its peer is gone
            os.kill(child, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        try:
            wait_for(lambda: alive(process.pid) == [], 20)  # noqa: B023
        finally:
            for pid in alive(process.pid):
                os.kill(pid, signal.SIGKILL)
        found = checkpoint.latest(tmp_path)
        assert int(found.stem.removeprefix("model_")) >= seen > before
        assert checkpoint.load(found, ppo.SCRIPT)["iteration"] >= seen
    finish(start("--resume", tmp_path, "--num-iterations", newest() + 2, ranks=2))
    assert (tmp_path / "summary.json").exists()


# --- other ways to run it


def test_eval_only(finished, tmp_path):
    model = finished[0] / "checkpoints" / "final_model.pt"
    flags = [
        "--eval-only",
        "--model-path",
        model,
        "--eval-episodes",
        64,
        "--log-dir",
        tmp_path,
        "--command-vx",
        0.5,
        0.5,
    ]
    flags += ["--save-trajectories", tmp_path / "out.hdf5", "--num-trajectories", 2]
    out, _ = finish(start(*flags))
    result = json.loads((tmp_path / "eval" / "final_model.json").read_text())
    assert result["episodes"] >= 64 and {command[0] for command in result["grid"]["command"]} == {0.5}
    assert (tmp_path / "eval" / "final_model.png").exists() and (tmp_path / "out.hdf5").exists()
    assert "velocity error" in out and not (tmp_path / "checkpoints").exists()


def test_yaml_aliases_and_tracking(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("n_envs: 16\nmax-iterations: 9\nhidden: [32, 16]\nrewards: reference\n")
    flags = ["--config", config, "--max-iterations", 2, "--checkpoint-freq", 1, "--n_steps", 8, "--use-wandb"]
    flags += ["--log-dir", tmp_path / "run", *EVALUATION]
    wandb = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    out, err = finish(start(*flags, ranks=1, environment=wandb))
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "model_1.pt", ppo.SCRIPT)
    args = state["args"]
    assert (args["num_envs"], args["num_iterations"], args["num_steps"], args["track"]) == (16, 2, 8, True)
    assert tuple(args["hidden"]) == (32, 16) and args["rewards"] == "reference"
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*")) and "losses" not in out + err  # quiet


def test_torchrun(tmp_path):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    out, _ = finish(start(*TINY, "--num-iterations", 2, "--exp-name", "t", program=program, cwd=tmp_path))
    [run] = (tmp_path / "runs" / "t").iterdir()  # one folder, not one per rank
    state = checkpoint.load(run / "checkpoints" / "final_model.pt", ppo.SCRIPT)
    assert len(state["ranks"]) == 2 and state["global_step"] == 2 * 32 * 24 and out.count("preset") == 1


# --- mistakes

NO_JOINTS = '<mujoco><worldbody><body><freejoint/><geom size=".1"/></body></worldbody></mujoco>'
MISTAKES = [
    ("--num-envs 0", "--num-envs", "above 0"),
    ("--num-envs 33 --ranks 2", "--num-envs", "2 ranks"),
    ("--num-envs 4 --num-steps 8 --num-minibatches 5 --ranks 1", "--num-minibatches", "divisor of the 32"),
    ("--ranks -1", "--ranks"),
    ("--num-env 3", "--num-env;", "--num-envs"),
    ("--gamma 1.5", "--gamma", "1.5", "from 0 to below 1"),
    ("--learning-rate nan", "--learning-rate", "nan"),
    ("--final-std -1", "--final-std"),
    ("--hidden 64 0", "--hidden"),
    ("--reward-weights nonsense=1", "--reward-weights", "nonsense", "air_time"),
    ("--xml-path {tmp}/robot.xml", "--xml-path", "FR_hip_joint"),
    ("--xml-path {tmp}/absent.xml", "--xml-path", "absent.xml"),
    ("--action-latency 9", "--action-latency", "9"),
    ("--device cuda", "--device", "cuda"),
    ("--device gpu", "--device", "gpu", "cuda"),
    ("--device cuda:99", "--device", "cuda:99"),
    ("--backend warp --solver pgs", "warp", "PGS"),
    ("--config {tmp}/config.yaml", "num_robots", "config.yaml"),
    ("--resume {tmp}/absent", "--resume", "absent"),
    ("--resume {tmp}/other.pt", "--resume", "sac_other"),
    ("--eval-only", "--eval-only", "--model-path"),
    ("--eval-only --model-path {tmp}/damaged.pt", "--model-path", "damaged"),
    ("--save-trajectories out.hdf5", "--save-trajectories", "--eval-only"),
    ("--log-dir {tmp}/damaged.pt", "--log-dir", "a folder"),
]


SYNTAX_ERRORS = ["--num-envs many", "--commands sideways", "--command-vx 1", "--hidden wide"]


@pytest.fixture(scope="module")
def mistakes(finished, tmp_path_factory):
    """A folder with the files of MISTAKES, and an empty one within to start in."""
    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "robot.xml").write_text(NO_JOINTS)
    (tmp / "config.yaml").write_text("num_robots: 3")
    model = (finished[0] / "checkpoints" / "final_model.pt").read_bytes()
    (tmp / "damaged.pt").write_bytes(model[: len(model) // 2])
    checkpoint.save(tmp / "other.pt", {"script": "sac_other", "args": {}})
    (tmp / "cwd").mkdir()
    return tmp


def check_sentence(code, err, words):
    lines = [line for line in err.splitlines() if not line.startswith("Warp CUDA warning")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, err)
    assert all(word in lines[0] for word in words), err


@pytest.mark.parametrize(("flags", "words"), [(m[0], m[1:]) for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_ends_with_one_sentence_before_anything_is_written(mistakes, monkeypatch, capfd, flags, words):
    if flags == "--device cuda" and torch.cuda.is_available():
        pytest.skip("no mistake here")
    argv = flags.format(tmp=mistakes).split()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *argv, *(["--device", "cpu"] if "--device" not in flags else [])])
    monkeypatch.setattr(distributed, "launch", lambda *args: None)  # where training would begin
    monkeypatch.chdir(mistakes / "cwd")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    check_sentence(stop.value.code, capfd.readouterr().err, words)
    assert not list((mistakes / "cwd").iterdir())


@pytest.mark.parametrize("flags", SYNTAX_ERRORS)
def test_a_syntax_error_names_the_flag(monkeypatch, tmp_path, capfd, flags):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split(), "--device", "cpu"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    err = capfd.readouterr().err
    assert stop.value.code == 2 and flags.split()[0] in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num-envs", 0], ["--num-envs got 0"]),
        (["--xml-path", "{tmp}/robot.xml"], ["--xml-path", "FR_hip_joint"]),
        (["--resume", "{run}", "--hidden", 32], ["--resume", "hidden"]),
        (["--eval-only", "--model-path", "{run}", "--observation", "proprioceptive"], ["--model-path", "observations"]),
    ],
    ids=lambda value: value[0],
)
def test_a_mistake_ends_the_process_with_one_sentence(finished, mistakes, tmp_path, flags, words):
    flags = [str(word).format(tmp=mistakes, run=finished[0]) for word in flags]
    out, err = finish(start(*flags, "--log-dir", tmp_path, "--device", "cpu", ranks=2), code=2)
    check_sentence(2, err, words)
