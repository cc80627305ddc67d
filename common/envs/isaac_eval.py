"""What a policy for the tasks of common/envs/isaac.py is worth: episodes on fresh seeds, a video."""

import math
from pathlib import Path

import gymnasium as gym
import torch

from common.stats import mean_ci95
from common.video import find_gl, missing_gl_message, write_mp4


def _act(policy, obs, state):
    """The action, and the LSTM's next state; `state` (2, N, size), or None for a policy without memory."""
    return (policy(obs), None) if state is None else policy(obs, state)


@torch.no_grad()
def evaluate(policy, envs, episodes: int, seed: int, state: torch.Tensor | None = None) -> dict:
    """The deterministic `policy`, a map from observations (N, policy_dim) to actions, on fresh seeds. Every environment
    plays the same number of episodes, at least `episodes` in all: else short ones would be counted more often.

    state: zeros (2, num_envs, size) for a policy with an LSTM, which then maps (obs, state) to (actions, next state).
    """
    per_env = math.ceil(episodes / envs.num_envs)
    obs, _ = envs.reset(seed=seed)
    counts, returns, lengths = torch.zeros(envs.num_envs, device=envs.device), [], []
    while counts.min() < per_env:
        actions, state = _act(policy, obs[:, : envs.policy_dim], state)
        obs, _, terminated, truncated, info = envs.step(actions)
        done = terminated | truncated
        counted = done & (counts < per_env)
        returns.append(info["episode"]["r"][counted])
        lengths.append(info["episode"]["l"][counted])
        counts += done
        state = None if state is None else state * ~done[:, None]
    returns, lengths = torch.cat(returns), torch.cat(lengths).float()
    mean, half_width = mean_ci95(returns)
    result = {"episodes": len(returns), "seed": seed, "mean_return": mean}
    result |= {"return_ci95": [mean - half_width, mean + half_width], "mean_length": lengths.mean().item()}
    print(f"{len(returns)} episodes: mean return {mean:.2f} +- {half_width:.2f}", flush=True)
    return result


@torch.no_grad()
def record_video(policy, make_envs, path: Path, seed: int, state: torch.Tensor | None = None) -> Path | None:
    """The first ten seconds of an episode of `policy` as an mp4. `make_envs()` gives one environment that renders;
    where nothing can render, prints one sentence and returns None.
    """
    if find_gl() is None:
        print(missing_gl_message())
        return None
    try:
        envs = make_envs()
        obs, _ = envs.reset(seed=seed)
        envs.render_frame()
    except (ValueError, gym.error.Error) as error:
        print(f"no video: {' '.join(str(error).split())}")
        return None
    fps = envs.metadata.get("render_fps") or 30
    frames, done = [], False
    while not done and len(frames) < 10 * fps:
        frame = envs.render_frame()
        if frame is None:
            print("no video: the task does not render")
            return None
        frames.append(frame)
        actions, state = _act(policy, obs[:, : envs.policy_dim], state)
        obs, _, terminated, truncated, _ = envs.step(actions)
        done = bool(terminated | truncated)
    envs.close()
    return write_mp4(path, frames, fps)
