"""The default settings learn: the Go2 to walk, in about a minute on two cores; a CartPole to stand, in ten seconds."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

import ppo_go2_mujoco as ppo
from common import checkpoint
from common.envs.go2 import Go2Env
from common.envs.go2_eval import evaluate
from common.envs.gym_loop import GymnasiumEnv
from common.envs.isaac_eval import evaluate as evaluate_tasks

ROOT = Path(__file__).parent.parent


def test_a_hundred_iterations_teach_the_go2_to_follow_forward_commands(tmp_path):
    command = [sys.executable, ROOT / "ppo_go2_mujoco.py", "--preset", "laptop", "--device", "cpu", "--seed", "1"]
    command += ["--num-iterations", "100", "--final-gamma", "0.97", "--log-interval", "50", "--no-save-video"]
    command += ["--log-dir", tmp_path]
    subprocess.run(command, check=True, cwd=tmp_path)

    state = checkpoint.load(tmp_path / "checkpoints" / "final_model.pt", ppo.SCRIPT)
    args = ppo.Args(**state["args"])
    cfg = replace(args, command_vx=(0.3, 1.0), command_vy=(0.0, 0.0), command_yaw=(0.0, 0.0))
    torch.manual_seed(0)
    env = Go2Env(1, "cpu", cfg=args)
    trained, untrained = ppo.Agent(env, args), ppo.Agent(env, args)
    trained.load_state_dict(state["agent"])

    def at_random(obs):
        return torch.randn(len(obs), 12)

    walks, stands, shakes = (evaluate(p, cfg, "cpu", 64, seed=777) for p in (trained, untrained, at_random))
    shown = "fall_rate", "lin_vel_error", "mean_length"
    print(json.dumps([{key: result[key] for key in shown} for result in (walks, stands, shakes)], indent=1))
    assert walks["fall_rate"] < 0.1 and walks["lin_vel_error"] < 0.35
    # The thresholds mean something: standing still and shaking fail them by far.
    assert stands["lin_vel_error"] > 0.55 and shakes["lin_vel_error"] > 0.55 and shakes["fall_rate"] > 0.9


def test_forty_thousand_steps_teach_the_cartpole_to_stand(tmp_path):
    command = [sys.executable, ROOT / "ppo_continuous_isaac.py", "--env-id", "CartPole-v1", "--device", "cpu"]
    command += ["--seed", "1", "--ranks", "1", "--total-timesteps", "40000", "--log-interval", "50"]
    command += ["--eval-episodes", "32", "--no-save-video", "--log-dir", tmp_path]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = json.loads((tmp_path / "eval" / "final_model.json").read_text())

    envs = GymnasiumEnv("CartPole-v1", 16)
    torch.manual_seed(0)
    at_random = evaluate_tasks(lambda obs: torch.randint(2, (len(obs),)), envs, 32, seed=10_001)
    assert result["episodes"] == 32 and result["mean_return"] > 250
    assert at_random["mean_return"] < 50  # the threshold means something
