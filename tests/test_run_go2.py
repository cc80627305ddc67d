"""Whole runs of ppo_go2_mujoco.py beyond test_run_scripts.py: export, evaluation, other robots in a resumed run."""

import json
import math

import numpy as np
import pytest
import torch
from harness import SCRIPTS
from helpers import ALWAYS, check_sentence, run, tiny

import ppo_go2_mujoco as ppo
from common import checkpoint
from common.envs.go2 import Go2Env

SCRIPT = SCRIPTS["ppo_go2_mujoco"]


@pytest.fixture
def script():
    return SCRIPT


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


def test_eval_only_of_one_velocity_with_demonstrations(finished, tmp_path, capsys):
    model = finished[0] / "checkpoints" / "final_model.pt"
    flags = ["--eval-only", "--model-path", model, "--eval-episodes", 64, "--log-dir", tmp_path, *ALWAYS]
    flags += ["--command-vx", 0.5, 0.5, "--save-trajectories", tmp_path / "out.hdf5", "--num-trajectories", 2]
    assert run(SCRIPT, *flags) == 0
    result = json.loads((tmp_path / "eval" / "final_model.json").read_text())
    assert result["episodes"] >= 64 and {command[0] for command in result["grid"]["command"]} == {0.5}
    assert [len(result[key]) for key in ("foot_lift", "duty_factor")] == [4, 4]
    assert (tmp_path / "eval" / "final_model.png").exists() and (tmp_path / "out.hdf5").exists()
    assert "velocity error" in capsys.readouterr().out


# --- resume with another environment


@pytest.fixture(scope="module")
def randomised(tmp_path_factory):
    """The folder of two iterations with robots of other masses, and a cap on the standard deviation."""
    folder = tmp_path_factory.mktemp("randomised")
    flags = ["--randomise", "--mass-range", 0.9, 1.1, "--final-std", 0.3, "--std-anneal-steps", 1, "--min-std", 0.05]
    assert run(SCRIPT, *tiny(SCRIPT, 2), *flags, "--log-dir", folder) == 0
    return folder


def go_on(folder, tmp_path, capsys, *flags) -> tuple[dict, str]:
    """The checkpoint two iterations later, and what was printed."""
    capsys.readouterr()
    code = run(SCRIPT, "--resume", folder, "--num-iterations", 4, *flags, "--log-dir", tmp_path, *ALWAYS)
    out, err = capsys.readouterr()
    assert code == 0 and "Traceback" not in err
    state = checkpoint.load(tmp_path / "checkpoints" / "model_4.pt", ppo.SCRIPT)
    assert state["iteration"] == 4
    return state, out


def masses(state) -> torch.Tensor:
    """Of the robots' bodies without the payload, over those of the model."""
    env = Go2Env(1, "cpu")
    return state["ranks"][0]["envs"]["physics"]["fields.body_mass"][:, env.base + 1 :] / torch.from_numpy(
        env.model.body_mass[env.base + 1 :]
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--mass-range", 0.5, 0.6], ["--mass-range"]),
        (["--no-randomise"], ["--randomise"]),
        (["--rewards", "reference", "--commands", "velocity"], ["--rewards"]),
        (["--mass-range", 0.5, 0.6, "--push-interval", 3], ["--mass-range", "--push-interval"]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_with_another_environment_the_episodes_begin_anew(randomised, tmp_path, capsys, flags, named):
    _, out = go_on(randomised, tmp_path, capsys, *flags)
    [warning] = [line for line in out.splitlines() if "warning" in line]
    assert warning == f"warning: the checkpoint was written with other {', '.join(named)}, so the episodes begin anew"


def test_other_masses_are_those_of_the_robots(randomised, tmp_path, capsys):
    before = checkpoint.load(randomised / "checkpoints" / "model_2.pt", ppo.SCRIPT)
    assert masses(before).min() >= 0.9 and masses(before).max() <= 1.1
    after, _ = go_on(randomised, tmp_path, capsys, "--mass-range", 0.5, 0.6)
    assert masses(after).min() >= 0.5 and masses(after).max() <= 0.6


def test_a_plain_run_goes_on_randomised(finished, tmp_path, capsys):
    capsys.readouterr()
    flags = ["--resume", finished[0], "--num-iterations", 8, "--randomise", "--log-dir", tmp_path, *ALWAYS]
    assert run(SCRIPT, *flags) == 0
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "--randomise" in out and "--ranks" in out
    assert "fields.body_mass" in checkpoint.load(tmp_path, ppo.SCRIPT)["ranks"][0]["envs"]["physics"]


def test_without_a_change_the_episodes_go_on(randomised, tmp_path, capsys):
    assert "warning" not in go_on(randomised, tmp_path, capsys)[1]


def test_the_cap_of_the_standard_deviation_can_be_lifted(randomised, tmp_path, capsys):
    saved = checkpoint.load(randomised / "checkpoints" / "model_2.pt", ppo.SCRIPT)["agent"]
    assert saved["logstd_limits"][1].item() == pytest.approx(math.log(0.3), abs=1e-5)
    state, _ = go_on(randomised, tmp_path, capsys, "--final-std", 0)
    assert state["agent"]["logstd_limits"][1].item() == pytest.approx(math.log(10))


# --- mistakes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--resume", "{run}", "--hidden", 32], ["--resume", "hidden"]),
        (["--eval-only", "--model-path", "{run}", "--observation", "proprioceptive"], ["--model-path", "observations"]),
    ],
    ids=lambda value: value[0],
)
def test_a_policy_that_does_not_fit_ends_with_one_sentence(finished, tmp_path, capfd, flags, words):
    argv = [str(word).format(run=finished[0]) for word in flags]
    capfd.readouterr()
    code = run(SCRIPT, *argv, "--log-dir", tmp_path, "--device", "cpu")
    check_sentence(code, capfd.readouterr().err, words)
