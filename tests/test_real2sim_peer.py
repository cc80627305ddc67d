"""What CleanRL's script is given in benchmark/real2sim.py, and what is kept of it."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))

import real2sim_peer

from common.envs.real2sim import Real2SimEnv


def test_arrays_are_the_environment_s_tensors():
    peer = real2sim_peer.ArrayEnv(2, seed=3)
    ours = Real2SimEnv(2, seed=3, physics_threads=1, observation="full")
    obs, _ = peer.reset(seed=3)
    expected, _ = ours.reset(seed=3)
    assert np.array_equal(obs, expected.numpy())
    rng = np.random.default_rng(0)
    limit = ours.cfg.max_episode_steps
    for step in range(1, limit + 1):
        actions = rng.uniform(-1, 1, (2, 9)).astype(np.float32)
        obs, rewards, terminated, truncated, ended = peer.step(actions)
        expected, reward, _, _, info = ours.step(torch.as_tensor(actions))
        assert np.array_equal(obs, expected.numpy()) and np.array_equal(rewards, reward.numpy())
        if step < limit:
            assert not ended and not truncated.any()
    assert truncated.all() and not terminated.any()
    assert np.array_equal(ended["final_observation"], info["final_obs"].numpy())
    assert not np.array_equal(ended["final_observation"], obs)  # which is the first of the next episode
    assert [row["episode"]["r"] for row in ended["final_info"]] == info["episode"]["r"].tolist()
    peer.close()


def test_a_kept_policy_is_the_actor_without_its_noise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real2sim_peer, "KEEP_EVERY", 100)
    torch.manual_seed(0)
    sizes = {"fc1": (58, 256), "fc2": (256, 256), "fc_mean": (256, 9), "fc_logstd": (256, 9)}
    actor = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
    peer = real2sim_peer.ArrayEnv(2, seed=3)
    for steps in range(1, 111):
        peer.keep(actor, steps)
        if steps == 60:
            nn.init.zeros_(actor["fc_mean"].weight)
    peer.close()
    kept = real2sim_peer.policies(tmp_path)
    assert [when["steps"] for when, _ in kept] == [100, 200]  # 50 and 100 steps of two environments
    obs = torch.randn(4, 58)
    hidden = actor["fc2"](actor["fc1"](obs).relu()).relu()
    torch.testing.assert_close(kept[1][1](obs), actor["fc_mean"](hidden).tanh())
    assert kept[0][1](obs).std(0).min() > 0 and torch.equal(kept[1][1](obs).std(0), torch.zeros(9))
