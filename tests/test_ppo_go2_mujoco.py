"""The learner of ppo_go2_mujoco.py: each formula against its definition, and main() on episodes with known answers.

Run as a program, this file is one rank of the tests on two ranks.
"""

import ast
import copy
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import undocumented
from torch.distributions import Normal, kl_divergence

import ppo_go2_mujoco as ppo
from common import checkpoint, cli, distributed
from common.envs.go2 import Go2Config, Go2Env
from common.logger import to_numbers

ROOT = Path(__file__).parent.parent
TINY = ppo.PRESETS["laptop"] | dict(device="cpu", precision="float32", ranks=1, hidden=(16, 16))
TINY |= dict(log_interval=1, checkpoint_interval=1000)
TINY |= dict(num_envs=4, num_steps=8, num_iterations=2, num_minibatches=1, update_epochs=1, episode_seconds=1.0)
TINY |= dict(mirror=False)


class SilentLogger:
    """Keeps what main() logs."""

    lines = []

    def __init__(self, *args, enabled=True):
        SilentLogger.lines, self.enabled = [], enabled

    def log(self, metrics, step):
        if self.enabled:
            SilentLogger.lines.append(to_numbers(metrics) | {"step": step})

    def progress(self, step):
        pass

    def close(self):
        pass


class ScriptedEnv:
    """Robots whose episodes end when `ENDS` says so, with random rewards and observations. All of it is kept."""

    ENDS = {(2, 0): "terminated", (3, 1): "truncated", (7, 3): "truncated", (7, 4): "terminated"}
    ENDS |= {(0, 5): "truncated", (1, 5): "terminated", (4, 5): "truncated", (5, 5): "truncated"}
    metric_names, exact_resume = (), True
    kept = []

    def __init__(self, num_envs, device, seed=1, **config):
        self.num_envs, self.nan_resets = num_envs, torch.zeros(())
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (5,))
        self.single_action_space = gym.spaces.Box(-np.inf, np.inf, (3,))
        self.generator = torch.Generator().manual_seed(7)
        ScriptedEnv.kept = []

    def _draw(self, *shape):
        return 1 + 2 * torch.randn(self.num_envs, *shape, generator=self.generator)

    def reset(self, seed=None, options=None):
        self.obs = self._draw(5)
        return self.obs, {}

    def step(self, actions):
        t = len(ScriptedEnv.kept) % 8
        ends = [self.ENDS.get((t, i)) for i in range(self.num_envs)]
        terminated = torch.tensor([end == "terminated" for end in ends])
        truncated = torch.tensor([end == "truncated" for end in ends])
        final_obs, reward, done = self._draw(5), self._draw(), terminated | truncated
        next_obs = torch.where(done[:, None], self._draw(5), final_obs)
        kept = dict(obs=self.obs, reward=reward, terminated=terminated, truncated=truncated)
        ScriptedEnv.kept.append(kept | dict(final_obs=final_obs, next_obs=next_obs))
        self.obs = next_obs
        zero = torch.zeros(self.num_envs)
        info = {"final_obs": final_obs, "_episode": done, "episode": {"r": zero, "l": zero}}
        return next_obs, reward.clone(), terminated, truncated, info

    def mirror_obs(self, obs):
        return -obs

    def mirror_actions(self, actions):
        return -actions

    def state_dict(self):
        return {}

    def close(self):
        pass


def make_agent(obs_dim, action_dim, args):
    spaces = {"single_observation_space": gym.spaces.Box(-1, 1, (obs_dim,))}
    spaces["single_action_space"] = gym.spaces.Box(-1, 1, (action_dim,))
    return ppo.Agent(SimpleNamespace(**spaces), args)


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """Runs main() with tiny settings, without evaluation, and gives the final checkpoint."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    monkeypatch.setattr(ppo, "run_evaluation", lambda *args: {"score": 0.0})
    monkeypatch.setattr(ppo, "report", lambda *args: None)
    monkeypatch.setattr(ppo, "Logger", SilentLogger)
    monkeypatch.setattr(distributed, "num_cores", lambda: 1)
    runs = []

    def run(**settings):
        runs.append(tmp_path / f"run{len(runs)}")
        ppo.main(ppo.Args(**TINY | {"log_dir": str(runs[-1])} | settings))
        state = checkpoint.load(runs[-1] / "checkpoints" / "final_model.pt", ppo.SCRIPT)
        return state | {"learning_rate": state["optimizer"]["param_groups"][0]["lr"].item()}

    yield run
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def minibatches(monkeypatch):
    """All that ppo_loss receives while main() runs, with a copy of the agent, and the statistics it gives."""
    calls, loss = [], ppo.ppo_loss

    def spy(agent, args, minibatch):
        call = SimpleNamespace(agent=copy.deepcopy(agent), **minibatch)
        result = loss(agent, args, minibatch)
        call.stats = to_numbers(result[1])
        calls.append(call)
        return result

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    return calls


# --- advantages


def advantages_by_definition(rewards, values, next_values, ended, gamma, gae_lambda):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, up to the end of the episode or of the rollout."""
    deltas = rewards + gamma * next_values - values
    advantages = np.zeros_like(rewards)
    for t, i in np.ndindex(*rewards.shape):
        for k in range(t, len(rewards)):
            advantages[t, i] += (gamma * gae_lambda) ** (k - t) * deltas[k, i]
            if ended[k, i]:
                break
    return advantages


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 0.0), (0.9, 1.0), (0.0, 0.9), (1.0, 1.0)])
def test_gae_is_the_sum_of_its_definition(gamma, gae_lambda):
    rng = np.random.default_rng(0)
    rewards, values, next_value = rng.normal(size=(12, 6)), rng.normal(size=(12, 6)), rng.normal(size=6)
    ended = rng.random((12, 6)) < 0.25
    ended[-1, :2], ended[-1, 2:] = True, False
    next_values = np.where(ended, 0.0, np.concatenate((values[1:], next_value[None])))
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (rewards, values, ended, next_value)]
    ours = ppo.compute_gae(*tensors, gamma, gae_lambda)
    expected = advantages_by_definition(rewards, values, next_values, ended, gamma, gae_lambda)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("norm_obs", [False, True])
def test_main_bootstraps_time_limits_with_the_true_last_observation(run_main, minibatches, monkeypatch, norm_obs):
    monkeypatch.setattr(ppo, "Go2Env", ScriptedEnv)
    run_main(num_envs=6, norm_adv=False, norm_obs=norm_obs, gamma=0.9, final_gamma=0.95, gae_lambda=0.8)
    gammas = (1 - 1 / 10, 1 - 1 / 15)  # the horizon grows linearly from 10 steps to 20 after the last iteration
    assert len(minibatches) == 2 and len(ScriptedEnv.kept) == 16
    for iteration, minibatch in enumerate(minibatches):
        steps = ScriptedEnv.kept[8 * iteration : 8 * iteration + 8]
        kept = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
        agent = minibatch.agent  # as it was during the rollout
        with torch.no_grad():
            observations = agent.normalise(kept["obs"])
            values = agent.get_value(observations).double().numpy()
            final_values = agent.get_value(agent.normalise(kept["final_obs"])).double().numpy()
        assert np.abs(final_values).min() > 1e-3  # so that forgetting one shows
        terminated, truncated = kept["terminated"].numpy(), kept["truncated"].numpy()
        assert terminated.any() and truncated.any()
        # Where no episode ended, the last observation is the next one.
        next_values = np.where(terminated, 0.0, final_values)
        rewards = kept["reward"].double().numpy()
        expected = advantages_by_definition(
            rewards, values, next_values, terminated | truncated, gammas[iteration], 0.8
        )
        # The minibatch is shuffled; its observations tell which sample is which.
        match = (observations.view(-1, 1, 5) == minibatch.obs).all(2).float().argmax(1)
        assert sorted(match.tolist()) == list(range(48))
        np.testing.assert_allclose(minibatch.advantages[match], expected.ravel(), atol=1e-5)
        np.testing.assert_allclose(minibatch.returns[match], (expected + values).ravel(), atol=1e-5)
        np.testing.assert_allclose(minibatch.values[match], values.ravel(), atol=1e-6)


def test_mirror_exchanges_the_sides_of_whole_trajectories(run_main, minibatches, monkeypatch):
    """About half of the robots: observations, actions, means, values and bootstrapped values are the mirror's, rewards
    and log-probabilities those of what happened.
    """
    monkeypatch.setattr(ppo, "Go2Env", ScriptedEnv)
    settings = dict(num_envs=6, norm_adv=False, norm_obs=False, num_iterations=1, gamma=0.9, gae_lambda=0.8)
    run_main(**settings, mirror=True)
    (minibatch,), agent = minibatches, minibatches[0].agent
    kept = {name: torch.stack([step[name] for step in ScriptedEnv.kept]) for name in ScriptedEnv.kept[0]}
    plain, mirror = (
        (side * kept["obs"].view(-1, 1, 5) == minibatch.obs).all(2) for side in (1, -1)
    )  # (all samples in order, those of the minibatch)
    mirrored = mirror.any(1).view(8, 6)
    assert torch.equal(mirrored, mirrored[:1].expand(8, 6)) and 0 < mirrored[0].sum() < 6
    match = (plain | mirror).float().argmax(1)
    assert sorted(match.tolist()) == list(range(48))
    sign = torch.where(mirrored, -1.0, 1.0)[..., None]
    with torch.no_grad():
        drawn = sign.view(-1, 1) * minibatch.actions[match]
        happened, _ = agent.log_prob_and_entropy(agent.get_dist(kept["obs"].view(-1, 5)), drawn)
        values, final_values = agent.get_value(sign * kept["obs"]), agent.get_value(sign * kept["final_obs"])
        means = agent.get_dist(sign.view(-1, 1) * kept["obs"].view(-1, 5))
    torch.testing.assert_close(minibatch.logprobs[match], happened)
    torch.testing.assert_close(minibatch.dists[match], means)
    terminated, truncated = kept["terminated"].numpy(), kept["truncated"].numpy()
    next_values = np.where(terminated, 0.0, final_values.numpy())
    rewards = kept["reward"].double().numpy()
    expected = advantages_by_definition(rewards, values.numpy(), next_values, terminated | truncated, 0.9, 0.8)
    np.testing.assert_allclose(minibatch.advantages[match], expected.ravel(), atol=1e-5)


def test_main_normalises_advantages_per_minibatch(run_main, minibatches):
    run_main(num_minibatches=2, update_epochs=2)
    assert len(minibatches) == 8
    for minibatch in minibatches:
        assert abs(minibatch.advantages.mean()) < 1e-5
        assert abs(minibatch.advantages.std(unbiased=False) - 1) < 1e-4


def test_each_epoch_takes_every_sample_once_in_a_new_order(run_main, minibatches, monkeypatch):
    monkeypatch.setattr(ppo, "Go2Env", ScriptedEnv)
    run_main(num_iterations=1, num_minibatches=4, update_epochs=2, norm_obs=False)
    assert [len(m.obs) for m in minibatches] == [8] * 8
    first, second = torch.cat([m.obs for m in minibatches[:4]]), torch.cat([m.obs for m in minibatches[4:]])
    everything = torch.stack([step["obs"] for step in ScriptedEnv.kept]).view(-1, 5)
    for epoch in (first, second):
        assert torch.equal(epoch.sort(0).values, everything.sort(0).values) and not torch.equal(epoch, everything)
    assert not torch.equal(first, second)


# --- the loss


class FixedAgent:
    """An agent whose outputs are given, so that the loss is a function of them alone."""

    def __init__(self, n, seed=0, dim=3):
        self.rng = torch.Generator().manual_seed(seed)
        self.logprob, self.entropy, self.value = self.draw(n), self.draw(n), self.draw(n)
        self.mean, self.std_ = self.draw(n, dim), self.draw(dim).exp()
        for tensor in (self.logprob, self.entropy, self.value):
            tensor.requires_grad_()

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.rng, dtype=torch.float64)

    def std(self):
        return self.std_

    def get_action_and_value(self, obs, actions):
        return actions, self.logprob, self.entropy, self.value, self.mean

    kl = ppo.Agent.kl


def loss_of(agent, ratio, advantages, returns, values, old_mean=None, old_std=None, **settings):
    old_logprob = agent.logprob.detach() - torch.as_tensor(ratio, dtype=torch.float64).log()
    old_mean, old_std = agent.mean if old_mean is None else old_mean, agent.std_ if old_std is None else old_std
    minibatch = dict(obs=None, actions=None, logprobs=old_logprob, dists=old_mean, old_std=old_std)
    minibatch |= dict(advantages=advantages, returns=returns, values=values)
    loss, stats = ppo.ppo_loss(agent, ppo.Args(**settings), minibatch)
    return loss, to_numbers(stats)


def test_clipped_surrogate_and_its_gradient_by_hand():
    # ratio, advantage, objective, gradient of the objective by log-probability (ratio * advantage, or 0 if clipped)
    table = [
        (1.1, 2.0, 2.2, 2.2),  # inside
        (0.9, -2.0, -1.8, -1.8),
        (1.5, 2.0, 2.4, 0.0),  # too far up where that pays: 1.2 * 2
        (1.5, -2.0, -3.0, -3.0),  # too far up where that costs: pulled back
        (0.5, -2.0, -1.6, 0.0),  # too far down where that pays: .8 * -2
        (0.5, 2.0, 1.0, 1.0),  # too far down where that costs: pulled back
    ]
    ratio, advantage, objective, gradient = torch.tensor(table, dtype=torch.float64).T
    agent = FixedAgent(len(table))
    value = agent.value.detach()
    loss, stats = loss_of(agent, ratio, advantage, value, value, clip_coef=0.2, vf_coef=0.0, ent_coef=0.0)
    loss.backward()
    assert stats["policy_loss"] == pytest.approx(-objective.mean().item()) == pytest.approx(loss.item())
    torch.testing.assert_close(agent.logprob.grad, -gradient / len(table))
    assert stats["clipfrac"] == pytest.approx(4 / 6)
    assert stats["old_approx_kl"] == pytest.approx(-ratio.log().mean().item())
    assert stats["approx_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item())


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_value_loss_and_its_gradient_by_hand(clip_vloss):
    # new value, old value, return, clipped loss, gradient by the new value (before 0.5 * mean)
    table = [
        (0.1, 0.0, 1.0, 0.81, -1.8),  # a small step is not clipped
        (0.5, 0.0, 1.0, 0.64, 0.0),  # up by .5, allowed .2: the larger loss (1 - .2)^2 has no gradient
        (-0.5, 0.0, -1.0, 0.64, 0.0),  # the same downwards
        (0.5, 0.0, -1.0, 2.25, 3.0),  # up, away from the return: the unclipped loss is the larger one
        (1.5, 0.0, 1.0, 0.64, 0.0),  # past the return: clipped again
    ]
    new, old, returns, clipped, gradient = torch.tensor(table, dtype=torch.float64).T
    if not clip_vloss:
        clipped, gradient = (new - returns) ** 2, 2 * (new - returns)
    agent = FixedAgent(len(table))
    agent.value = new.clone().requires_grad_()
    settings = dict(clip_coef=0.2, vf_coef=3.0, clip_vloss=clip_vloss)
    loss, stats = loss_of(agent, torch.ones(5), torch.zeros(5), returns, old, **settings)
    loss.backward()
    assert stats["value_loss"] == pytest.approx(0.5 * clipped.mean().item())
    assert loss.item() == pytest.approx(3.0 * 0.5 * clipped.mean().item())
    torch.testing.assert_close(agent.value.grad, 3.0 * 0.5 * gradient / 5)


def test_value_coefficient_2_is_1_in_rsl_rl():
    agent = FixedAgent(50)
    returns, values, advantages = agent.draw(50), agent.draw(50), torch.zeros(50)
    loss, _ = loss_of(agent, torch.ones(50), advantages, returns, values, vf_coef=ppo.Args.vf_coef, ent_coef=0.0)
    clipped = values + (agent.value - values).clamp(-0.2, 0.2)
    rsl_rl = 1.0 * torch.max((agent.value - returns).pow(2), (clipped - returns).pow(2)).mean()
    assert ppo.Args.vf_coef == 2.0 and loss.item() == pytest.approx(rsl_rl.item())


def test_entropy_bonus_and_exact_kl():
    agent = FixedAgent(20)
    old_mean, old_std, zero = agent.draw(20, 3), agent.draw(3).exp(), torch.zeros(20, dtype=torch.float64)
    value = agent.value.detach()
    loss, stats = loss_of(agent, torch.ones(20), zero, value, value, old_mean, old_std, ent_coef=0.7)
    loss.backward()
    assert loss.item() == pytest.approx(-0.7 * agent.entropy.mean().item())
    torch.testing.assert_close(agent.entropy.grad, torch.full_like(agent.entropy, -0.7 / 20))
    exact = kl_divergence(Normal(old_mean, old_std), Normal(agent.mean, agent.std_)).sum(1).mean()
    assert stats["kl"] == pytest.approx(exact.item()) and stats["entropy"] == pytest.approx(agent.entropy.mean().item())


def test_gradient_of_the_whole_loss_by_finite_differences():
    torch.manual_seed(0)
    args = ppo.Args(hidden=(8,), ent_coef=0.1, precision="float32")
    agent = make_agent(4, 2, args)
    obs = torch.randn(32, 4)
    with torch.no_grad():
        for parameter in agent.parameters():  # large enough to be seen in float32
            parameter.add_(0.3 * torch.randn_like(parameter))
        actions, logprobs, _, values, means = agent.get_action_and_value(obs)
        old_std = agent.std()
        logprobs, values = logprobs + 0.2 * torch.randn(32), values + 0.2 * torch.randn(32)
    minibatch = dict(obs=obs, actions=actions, logprobs=logprobs, dists=means, old_std=old_std)
    minibatch |= dict(advantages=torch.randn(32), returns=values + torch.randn(32), values=values)
    ppo.ppo_loss(agent, args, minibatch)[0].backward()
    for parameter in agent.parameters():
        direction = torch.randn_like(parameter)
        losses = []
        for step in (1e-3, -2e-3):
            with torch.no_grad():
                parameter.add_(step * direction)
                losses.append(ppo.ppo_loss(agent, args, minibatch)[0].double())
        with torch.no_grad():
            parameter.add_(1e-3 * direction)
        slope = (losses[0] - losses[1]) / 2e-3
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope.item(), rel=0.03, abs=2e-3)


# --- the agent


def test_orthogonal_initialisation_and_the_scale_of_the_heads():
    torch.manual_seed(0)
    agent = make_agent(48, 12, ppo.Args(hidden=(64, 32), init_std=0.7))
    for network, head in ((agent.actor, 0.01), (agent.critic, 1.0)):
        layers = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        assert [layer.out_features for layer in layers[:-1]] == [64, 32] and len(network) == 5
        for layer, scale in zip(layers, (3**-0.5, 3**-0.5, head), strict=True):
            weight = layer.weight if len(layer.weight) < layer.weight.shape[1] else layer.weight.T
            torch.testing.assert_close(weight @ weight.T, scale**2 * torch.eye(len(weight)), atol=1e-5, rtol=1e-5)
            assert not layer.bias.any()
    torch.testing.assert_close(agent.std(), torch.full((12,), 0.7))
    assert not {id(p) for p in agent.actor.parameters()} & {id(p) for p in agent.critic.parameters()}


def test_actions_are_independent_gaussians():
    torch.manual_seed(0)
    agent = make_agent(4, 3, ppo.Args(hidden=(8,), precision="float32"))
    agent.actor_logstd.data = torch.tensor([-0.5, 0.0, 0.5])
    obs = torch.randn(1, 4).expand(100_000, 4)
    with torch.no_grad():
        action, logprob, entropy, value, mean = agent.get_action_and_value(obs)
        again = agent.get_action_and_value(obs[:5], action[:5])
    std = torch.tensor([-0.5, 0.0, 0.5]).exp()
    torch.testing.assert_close(action.mean(0), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(action.std(0), std, atol=0.02, rtol=0)
    by_hand = -0.5 * ((action - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(logprob, by_hand.sum(1))
    torch.testing.assert_close(entropy, (0.5 + 0.5 * math.log(2 * math.pi) + std.log()).sum().expand(100_000))
    torch.testing.assert_close(again[1], logprob[:5])
    assert torch.equal(again[0], action[:5]) and value.shape == (100_000,)


def test_log_std_is_clamped():
    agent = make_agent(4, 3, ppo.Args(hidden=(8,), min_std=0.05))
    agent.actor_logstd.data = torch.tensor([-100.0, 0.0, 100.0])
    torch.testing.assert_close(agent.std(), torch.tensor([0.05, 1.0, 10.0]))


def test_network_outputs_are_float32_in_bfloat16_too():
    torch.manual_seed(0)
    agent = make_agent(48, 12, ppo.Args(precision="bfloat16"))
    exact = copy.deepcopy(agent)
    exact.autocast = make_agent(48, 12, ppo.Args(precision="float32")).autocast
    obs = torch.randn(64, 48)
    rounded, right = (
        agent.get_action_and_value(obs, torch.zeros(64, 12)),
        exact.get_action_and_value(obs, torch.zeros(64, 12)),
    )
    assert all(x.dtype == torch.float32 for x in rounded)
    assert not torch.equal(rounded[3], right[3])  # it really was bfloat16
    torch.testing.assert_close(rounded[3], right[3], atol=0.03, rtol=0.03)
    assert torch.equal(agent(obs), exact(obs))  # what is evaluated and exported is float32


def merged(batches):
    everything = np.concatenate(batches)
    return everything.mean(0), everything.var(0), len(everything)


def uneven_batches(rank=0):
    rng = np.random.default_rng(rank)
    return [(3 + 2 * rng.normal(size=(n + 3 * rank, 4)) * [1, 10, 0.1, 1]).astype(np.float32) for n in (5, 1, 300, 17)]


def test_running_mean_std_is_that_of_all_vectors_seen():
    normalise = ppo.RunningMeanStd(4)
    x = torch.tensor([[-5.0, 0.5, 20.0, -20.0]])
    torch.testing.assert_close(normalise(x), torch.tensor([[-5.0, 0.5, 10.0, -10.0]]))  # nothing seen: only clipped
    for i, batch in enumerate(uneven_batches()):
        normalise.update(torch.from_numpy(batch))
        mean, var, count = merged(uneven_batches()[: i + 1])
        np.testing.assert_allclose(normalise.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(normalise.var, var, rtol=1e-5)
        assert normalise.count == count
    expected = np.clip((x.numpy() - mean) / np.sqrt(var), -10, 10)
    np.testing.assert_allclose(normalise(x).numpy(), expected, rtol=1e-4, atol=1e-5)


# --- schedules


@pytest.mark.parametrize(
    ("kl", "lr", "expected"),
    [
        (0.021, 1e-3, 1e-3 / 1.5),
        (0.0049, 1e-3, 1.5e-3),
        (0.0051, 1e-3, 1e-3),
        (0.0199, 1e-3, 1e-3),
        (0.0, 1e-3, 1e-3),  # rsl_rl: only a positive divergence raises it
        (math.nan, 1e-3, 1e-3),
        (math.inf, 1e-3, 1e-3 / 1.5),
        (1.0, 1.2e-5, 1e-5),
        (1e-4, 9e-3, 1e-2),
    ],
)
def test_adaptive_learning_rate(kl, lr, expected):
    assert ppo.adapt_learning_rate(torch.tensor(lr), torch.tensor(kl), 0.01).item() == pytest.approx(expected, rel=1e-6)


def test_main_adapts_the_learning_rate_to_the_kl_of_each_update(run_main, minibatches):
    state = run_main(num_minibatches=2, update_epochs=4, learning_rate=3e-3, desired_kl=0.02, final_kl=0.01)
    lr = torch.tensor(3e-3)
    for i, minibatch in enumerate(minibatches):
        wanted = 0.02 if i < 8 else 0.015  # the second of two iterations: half-way
        lr = ppo.adapt_learning_rate(lr, torch.tensor(minibatch.stats["kl"]), wanted)
    assert state["learning_rate"] == lr.item() != pytest.approx(3e-3)


def test_without_a_desired_kl_the_learning_rate_falls_linearly(run_main):
    state = run_main(num_iterations=4, learning_rate=1e-3, desired_kl=0.0)
    rates = [line["charts/learning_rate"] for line in SilentLogger.lines]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4]) and state["learning_rate"] == pytest.approx(2.5e-4)
    assert state["optimizer"]["param_groups"][0]["lr"].item() == pytest.approx(2.5e-4)  # the one Adam reads


def test_the_largest_std_falls_to_final_std(run_main):
    steps = 4 * 8
    settings = dict(init_std=1.0, min_std=0.05, learning_rate=1e-5)
    state = run_main(**settings, num_iterations=5, final_std=0.25, std_anneal_steps=3 * steps)
    stds = [line["charts/action_std"] for line in SilentLogger.lines]
    assert stds == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.25], rel=1e-3)
    assert state["agent"]["logstd_limits"][1].item() == pytest.approx(math.log(0.25))
    run_main(**settings, num_iterations=2, final_std=0.0)
    assert [line["charts/action_std"] for line in SilentLogger.lines] == pytest.approx([1.0, 1.0], rel=1e-3)


def test_the_std_can_still_fall_below_its_limit(run_main, monkeypatch):
    """A log-std above the clamp has no gradient, and would be stuck there."""

    def want_less_noise(agent, args, minibatch):
        return agent.std().sum() + 0 * sum(p.sum() for p in agent.parameters()), {"kl": torch.zeros(())}

    monkeypatch.setattr(ppo, "ppo_loss", want_less_noise)
    settings = dict(num_iterations=6, desired_kl=0.0, learning_rate=0.05, std_anneal_steps=4 * 8)
    run_main(**settings, final_std=0.25, min_std=0.05)
    assert SilentLogger.lines[-1]["charts/action_std"] < 0.24


# --- the update


def test_first_minibatch_has_ratio_one(run_main, minibatches):
    run_main(num_envs=16, num_steps=12, num_iterations=4, num_minibatches=4, update_epochs=2, norm_obs=True)
    firsts, others = minibatches[::8], [m for i, m in enumerate(minibatches) if i % 8]
    assert len(firsts) == 4
    for minibatch in firsts:
        with torch.no_grad():
            logprob = minibatch.agent.get_action_and_value(minibatch.obs, minibatch.actions)[1]
        assert (logprob - minibatch.logprobs).abs().max() < 2e-5  # what rounding leaves of a sum of twelve terms
        assert abs(minibatch.stats["approx_kl"]) < 1e-6 and minibatch.stats["clipfrac"] == 0
        assert abs(minibatch.stats["kl"]) < 1e-6
    assert max(m.stats["approx_kl"] for m in others) > 1e-4  # and then it moves


def test_statistics_are_of_every_observation_trained_on(run_main, minibatches, monkeypatch):
    monkeypatch.setattr(ppo, "Go2Env", ScriptedEnv)
    state = run_main(norm_obs=True)
    seen = torch.stack([step["obs"] for step in ScriptedEnv.kept]).view(-1, 5).double()
    torch.testing.assert_close(state["agent"]["normalise.mean"], seen.mean(0))
    torch.testing.assert_close(state["agent"]["normalise.var"], seen.var(0, unbiased=False))
    # Frozen within an iteration: the second one's rollout and update use those of the first.
    torch.testing.assert_close(minibatches[1].agent.normalise.mean, seen[:32].mean(0))


@pytest.fixture
def gradients(monkeypatch):
    """Every gradient as Adam sees it, in one vector each."""
    seen = []

    class Adam(torch.optim.Adam):
        def step(self):
            seen.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]).clone())
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    return seen


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_gradients_are_clipped_to_their_largest_norm(run_main, gradients, monkeypatch, scale):
    directions, loss = [], ppo.ppo_loss

    def scaled(agent, args, minibatch):
        value, stats = loss(agent, args, minibatch)
        parameters = list(agent.parameters())
        found = torch.autograd.grad(scale * value, parameters, retain_graph=True)
        directions.append(torch.cat([g.flatten() for g in found]))
        return scale * value, stats

    monkeypatch.setattr(ppo, "ppo_loss", scaled)
    run_main(max_grad_norm=0.5, num_iterations=2)
    assert len(gradients) == 2
    for gradient, direction, line in zip(gradients, directions, SilentLogger.lines, strict=True):
        norm = direction.norm().item()
        assert line["losses/grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert (norm > 0.5) == (scale > 1)
        torch.testing.assert_close(gradient, direction * min(1.0, 0.5 / norm), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_dropped_and_counted(run_main, gradients, monkeypatch, poison):
    calls, loss = [], ppo.ppo_loss

    def poisoned(agent, args, minibatch):
        value, stats = loss(agent, args, minibatch)
        calls.append(1)
        bad = len(calls) in (2, 5)
        return (value * poison, {k: v * poison for k, v in stats.items()}) if bad else (value, stats)

    monkeypatch.setattr(ppo, "ppo_loss", poisoned)
    state = run_main(num_minibatches=2, update_epochs=2, num_iterations=2)
    assert len(gradients) == 8 and all(torch.isfinite(g).all() for g in gradients)
    assert [bool(g.any()) for g in gradients] == [True, False, True, True, False, True, True, True]
    assert all(torch.isfinite(tensor).all() for tensor in state["agent"].values())
    assert [line["charts/nan_updates"] for line in SilentLogger.lines] == [1, 2]


def test_target_kl_ends_the_epochs(run_main, minibatches):
    run_main(num_iterations=1, update_epochs=6, learning_rate=1e-2, target_kl=1e-4, num_minibatches=2)
    assert len(minibatches) == 2  # the first epoch passed it
    minibatches.clear()
    run_main(num_iterations=1, update_epochs=6, learning_rate=1e-2, target_kl=0.0, num_minibatches=2)
    assert len(minibatches) == 12


def test_adam_has_epsilon_1e_5(run_main):
    group = run_main()["optimizer"]["param_groups"][0]
    assert group["eps"] == 1e-5 and tuple(group["betas"]) == (0.9, 0.999) and not group["weight_decay"]


def test_compiled_is_eager(run_main, monkeypatch):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # the same noise as eager
    settings = dict(num_envs=8, num_minibatches=2, update_epochs=2, num_iterations=2, episode_seconds=0.1)
    eager = run_main(**settings)
    compiled = run_main(**settings, compile=True)
    initial = run_main(**settings, learning_rate=1e-12, desired_kl=0.0)
    assert eager["global_step"] == compiled["global_step"] == 128
    for name, tensor in eager["agent"].items():
        torch.testing.assert_close(compiled["agent"][name], tensor, atol=2e-5, rtol=1e-4, msg=name)
    change = (eager["agent"]["actor.0.weight"] - initial["agent"]["actor.0.weight"]).abs().max()
    assert change > 1e-3  # far beyond the tolerance


# --- several ranks


class SplitEnv(Go2Env):
    """What a robot draws depends on its index over all ranks and on the time, not on how the robots are split."""

    def __init__(self, num_envs, device, seed, **settings):
        self.clock = 0
        super().__init__(num_envs, device, seed, **settings)

    def _uniform(self, *shape, low=0.0, high=1.0):
        return low + (high - low) * rows_of_this_rank(torch.rand, 1000 * self.clock + len(shape), *shape)

    def step(self, actions):
        self.clock += 1
        return super().step(actions)


def rows_of_this_rank(draw, seed, n, *shape):
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    everyone = draw(n * world_size, *shape, generator=torch.Generator().manual_seed(seed))
    return everyone[rank * n : rank * n + n]


def rank_main(args):
    """One rank of a training on SplitEnv; what it saw goes into its own file."""
    kept, loss, draws = {"advantages": []}, ppo.ppo_loss, []

    def sample(self, mean):
        draws.append(1)
        return mean + self.std() * rows_of_this_rank(torch.randn, len(draws), *mean.shape)

    def spy(agent, args, minibatch):
        kept["advantages"].append(minibatch["advantages"].clone())
        value, stats = loss(agent, args, minibatch)
        poison = math.nan if len(kept["advantages"]) == int(os.environ["POISON"]) and rank == 1 else 1.0
        return value * poison, stats

    ppo.Agent.sample, ppo.ppo_loss, ppo.Go2Env, ppo.Logger = sample, spy, SplitEnv, SilentLogger
    ppo.run_evaluation = lambda *args: {"score": 0.0}
    ppo.report = lambda *args: None
    _, rank, world_size = distributed.init("cpu")
    if world_size > 1:
        normalise = ppo.RunningMeanStd(4)
        for batch in uneven_batches(rank):
            normalise.update(torch.from_numpy(batch))
        kept["normalise"] = normalise.state_dict()
    ppo.main(args)
    kept["lines"] = SilentLogger.lines
    torch.save(kept, Path(args.log_dir) / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    """{(ranks, poison): (final checkpoint, [what each rank kept])} of the same training."""
    runs = {}
    for ranks, poison in ((1, 0), (2, 0), (2, 3)):
        folder = tmp_path_factory.mktemp("ranks")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "POISON": str(poison)}
        command = [sys.executable, __file__, str(folder), str(ranks)]
        runs[ranks, poison] = folder, subprocess.Popen(command, env=environment)
    for (ranks, poison), (folder, process) in runs.items():
        assert process.wait(120) == 0
        state = checkpoint.load(folder / "checkpoints" / "final_model.pt", ppo.SCRIPT)
        runs[ranks, poison] = state, [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
    return runs


def test_two_ranks_of_n_robots_equal_one_rank_of_2n(by_ranks):
    (one, [whole]), (two, halves) = by_ranks[1, 0], by_ranks[2, 0]
    assert len(two["ranks"]) == 2 and one["global_step"] == two["global_step"] == 3 * 16 * 10
    for name, tensor in one["agent"].items():
        torch.testing.assert_close(two["agent"][name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    rates = [state["optimizer"]["param_groups"][0]["lr"].item() for state in (one, two)]
    assert rates[1] == pytest.approx(rates[0], rel=1e-6)
    assert rates[0] != pytest.approx(1e-3)  # it has adapted
    # The advantages are those of the same samples, in another order, and different on each rank.
    for a, b, c in zip(whole["advantages"], *(half["advantages"] for half in halves), strict=True):
        torch.testing.assert_close(torch.cat((b, c)).sort().values, a.sort().values, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(b.sort().values, c.sort().values, atol=1e-2)
    # What is logged is of all robots.
    assert len(whole["lines"]) == 3 and not halves[1]["lines"]
    for alone, together in zip(whole["lines"], halves[0]["lines"], strict=True):
        for name in alone:
            if name.startswith(("env/", "charts/episodic", "charts/learning", "losses/grad")):
                assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5), name
    assert any("charts/episodic_return" in line for line in whole["lines"])


def test_advantages_are_normalised_over_all_ranks(by_ranks):
    for b, c in zip(*(half["advantages"] for half in by_ranks[2, 0][1]), strict=True):
        both = torch.cat((b, c))
        assert abs(both.mean()) < 1e-5 and abs(both.std(unbiased=False) - 1) < 1e-4
        assert abs(b.mean()) > 1e-3  # not each rank for itself


def test_running_mean_std_merges_all_ranks(by_ranks):
    batches = uneven_batches(0) + uneven_batches(1)
    mean, var, count = merged(batches)
    for kept in by_ranks[2, 0][1]:
        np.testing.assert_allclose(kept["normalise"]["mean"], mean, rtol=1e-6)
        np.testing.assert_allclose(kept["normalise"]["var"], var, rtol=1e-5)
        assert kept["normalise"]["count"] == count


def test_a_bad_gradient_of_one_rank_is_dropped_by_all(by_ranks):
    state, halves = by_ranks[2, 3]
    assert all(torch.isfinite(tensor).all() for tensor in state["agent"].values())
    assert halves[0]["lines"][-1]["charts/nan_updates"] == 2  # one update, counted by two ranks


# --- settings


def test_the_reference_preset_is_to_the_letter():
    args = cli.parse_args(ppo.Args, ppo.PRESETS, ppo.default_preset, argv=["--preset", "reference"])
    letter = dict(num_envs=4096, num_steps=24, num_iterations=10_000, clip_coef=0.2, desired_kl=0.01, ent_coef=0.01)
    letter |= dict(gamma=0.99, gae_lambda=0.95, learning_rate=1e-3, max_grad_norm=1.0, update_epochs=5)
    letter |= dict(
        num_minibatches=4,
        final_kl=0.01,
        final_gamma=0.99,
        clip_vloss=True,
        vf_coef=2.0,
        hidden=(512, 256, 128),
        init_std=1.0,
    )
    letter |= dict(checkpoint_interval=100, log_interval=1, rewards="reference", action_scale=0.3, episode_seconds=20.0)
    letter |= dict(termination_degrees=10.0, commands="velocity", observation="full", target_kl=0.0, final_std=0.0)
    letter |= dict(command_vx=(-1.0, 2.0), command_vy=(-0.5, 0.5), command_yaw=(-0.6, 0.6), randomise=False)
    assert {name: getattr(args, name) for name in letter} == letter
    agent = make_agent(48, 12, args)
    assert sum(isinstance(layer, torch.nn.ELU) for layer in agent.actor) == 3


def test_presets_by_device_and_their_overrides():
    def parse(*argv):
        return cli.parse_args(ppo.Args, ppo.PRESETS, ppo.default_preset, argv=list(argv))

    assert parse("--device", "cuda").preset == "reference" and parse("--device", "cpu").preset == "laptop"
    assert parse("--device", "cpu") == ppo.Args(**ppo.PRESETS["laptop"] | {"preset": "laptop", "device": "cpu"})
    args = parse("--preset", "reference", "--num-envs", "64", "--ent-coef", "0.5")
    assert (args.num_envs, args.ent_coef, args.num_iterations) == (64, 0.5, 10_000)
    names = set(ppo.Args.__dataclass_fields__)
    assert all(set(preset) <= names for preset in ppo.PRESETS.values())
    assert {*checkpoint.NOT_SAVED, *ppo.NOT_SAVED} <= names


def test_every_setting_is_read():
    """Somewhere a line reads `args.name` or `cfg.name`, or one of the two other ways below."""
    sources = [ROOT / "ppo_go2_mujoco.py", *(ROOT / "common").rglob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    read = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if owner in ("args", "cfg"):
                read.add(node.attr)
    if 'getattr(cfg, f"command_{name}")' in text:
        read |= {f"command_{name}" for name in ("vx", "vy", "yaw", "height", "jump")}
    unread = [name for name in ppo.Args.__dataclass_fields__ if name not in read]
    assert not unread and set(Go2Config.__dataclass_fields__) <= set(ppo.Args.__dataclass_fields__)


def test_every_setting_is_documented():
    assert undocumented(ROOT / "ppo_go2_mujoco.py", "Args") == []
    assert undocumented(ROOT / "common/envs/go2.py", "Go2Config") == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.num_cores = lambda: 1
    log_dir, ranks = sys.argv[1], int(sys.argv[2])
    settings = TINY | dict(num_envs=16, num_steps=10, num_iterations=3, update_epochs=3, ranks=ranks)
    settings |= dict(episode_seconds=0.14, resample_seconds=0.1, termination_degrees=6.0, log_dir=log_dir)
    distributed.launch(rank_main, ppo.Args(**settings), ranks)
