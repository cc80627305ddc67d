"""What rsl_rl is given by benchmark/rsl_rl_peer.py, and how its steps are counted."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gymnasium.spaces import Box

pytest.importorskip("rsl_rl")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))

import rsl_rl_peer

import ppo_continuous_isaac as ppo


class Counter:
    """With every third step world 0 falls and world 1 comes to a time limit; the reward is the number of the step."""

    num_envs, device = 2, torch.device("cpu")
    single_action_space = Box(-1, 1, (3,))

    def __init__(self):
        self.steps = 0

    def observe(self):
        return torch.tensor([[self.steps, 0.0, 1.0], [self.steps, 1.0, 0.0]])

    def step(self, actions):
        assert actions.shape == (2, 3)
        self.steps += 1
        ends = self.steps % 3 == 0
        reward = torch.full((2,), float(self.steps))
        return self.observe(), reward, torch.tensor([ends, False]), torch.tensor([False, ends]), {}


def test_the_adapter_tells_observation_reward_ends_and_time_limits():
    env = Counter()
    adapter = rsl_rl_peer.Adapter(env, env.observe())
    assert adapter.num_actions == 3 and torch.equal(adapter.get_observations()["policy"], env.observe())
    for step in range(1, 4):
        obs, reward, dones, extras = adapter.step(torch.zeros(2, 3))
        assert torch.equal(obs["policy"], env.observe()) and reward.tolist() == [step, step]
        assert dones.tolist() == [step == 3] * 2
        assert extras["time_outs"].tolist() == [False, step == 3]


def test_it_trains_for_as_many_iterations_as_are_asked_for(monkeypatch):
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(rsl_rl_peer, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    torch.manual_seed(0)
    env = Counter()
    args = ppo.Args(num_envs=2, num_steps=6, num_minibatches=2, update_epochs=1, hidden=(8,))
    runner = rsl_rl_peer.make_runner(env, env.observe(), args)
    before = [p.clone() for p in runner.alg.get_policy().parameters()]
    rate = rsl_rl_peer.train(runner, iterations=5, warm_up=2)
    assert env.steps == 5 * 6 and rate == 3 * 6 * 2 / 4
    after = list(runner.alg.get_policy().parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
