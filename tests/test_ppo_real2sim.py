"""PPO's settings for pick-and-place find the grasp, in half a minute of one core."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from common.envs.real2sim_eval import evaluate
from ppo_real2sim_mjx import Args

ROOT = Path(__file__).parent.parent
EASY = dict(observation="full", object_area=(0.0, 0.0), object_yaw=0.0, goal_area=(0.0, 0.0))  # below the hand


def test_a_hundred_thousand_steps_teach_the_hand_to_grip_the_box_below_it(tmp_path):
    command = [sys.executable, ROOT / "ppo_real2sim_mjx.py", "--preset", "laptop", "--device", "cpu", "--seed", "1"]
    command += ["--ranks", "1", "--num-envs", "128", "--num-iterations", "60", "--log-interval", "20"]
    command += ["--object-area", "0", "0", "--object-yaw", "0", "--goal-area", "0", "0"]
    command += ["--eval-interval", "0", "--eval-episodes", "32", "--no-save-video", "--log-dir", tmp_path]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = json.loads((tmp_path / "eval" / "final_model.json").read_text())

    at_random = evaluate(lambda obs: torch.randn(len(obs), 9), Args(**EASY), "cpu", 32)
    shown = {name: (result[name], at_random[name]) for name in ("reward_reach", "reward_grasp", "reward_lift")}
    print(json.dumps(shown, indent=1))
    assert result["episodes"] == 32 and result["reward_reach"] > 0.6 and result["reward_grasp"] > 0.2
    assert at_random["reward_reach"] < 0.3 and at_random["reward_grasp"] < 0.05  # the thresholds mean something
