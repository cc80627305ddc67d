"""What every PPO script promises of its learner: each formula against its definition, and main() on known episodes.

Run as a program, this file is two ranks of one training.
"""

import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
from harness import (
    ROOT,
    SCRIPTS,
    ScriptedEnv,
    SilentLogger,
    advantages_by_definition,
    kept,
    process_restored,
    rows_of_this_rank,
    shaken,
    stand_in,
    unshuffled,
    where,
)
from helpers import undocumented
from torch.distributions import Normal, kl_divergence

from common import checkpoint, distributed
from common.logger import to_numbers
from common.storage import flatten

PPO = [name for name in SCRIPTS if name.startswith("ppo_")]
VARIANTS = [(name, variant) for name in PPO for variant in SCRIPTS[name].variants]
WITHOUT_MEMORY = [pair for pair in VARIANTS if pair[1] in ("box", "pixels")]
COMPILED = [(name, variant) for name in PPO for variant in SCRIPTS[name].compiles]


@pytest.fixture(params=PPO)
def script(request):
    reason = SCRIPTS[request.param].without.get(request.function.__name__)
    if reason:
        pytest.skip(reason)
    return SCRIPTS[request.param]


def for_variants(pairs):
    ids = [" ".join(pair) for pair in pairs]
    return pytest.mark.parametrize(("script", "variant"), pairs, indirect=["script"], ids=ids)


def first(outputs):
    """Without the state of a memory, which some networks give too."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def test_every_ppo_script_has_an_entry():
    assert set(PPO) == {path.stem for path in ROOT.glob("ppo_*.py")}


# --- the agent


def test_actions_are_independent_gaussians(script):
    agent = shaken(script.agent())
    agent.actor_logstd.data = torch.tensor([-0.5, 0.0, 0.5])
    obs = torch.randn(1, 4).expand(50_000, 4)
    with torch.no_grad():
        action, logprob, entropy, value, mean, *_ = agent.get_action_and_value(obs)
        again = agent.get_action_and_value(obs[:5], action[:5])
        expected = Normal(mean, torch.tensor([-0.5, 0.0, 0.5]).exp())
    torch.testing.assert_close(logprob, expected.log_prob(action).sum(1))
    torch.testing.assert_close(entropy, expected.entropy().sum(1).expand(50_000))
    torch.testing.assert_close(action.mean(0), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(action.std(0), expected.stddev[0], atol=0.02, rtol=0)
    torch.testing.assert_close(action.T.cov(), torch.diag(expected.variance[0]), atol=0.06, rtol=0)
    assert torch.equal(again[0], action[:5]) and value.shape == (50_000,)
    torch.testing.assert_close(again[1], logprob[:5])


def test_log_std_is_a_clamped_parameter_that_no_observation_moves(script):
    agent = shaken(script.agent(min_std=0.05))
    assert isinstance(agent.actor_logstd, torch.nn.Parameter)
    agent.actor_logstd.data = torch.tensor([-100.0, 0.0, 100.0])
    torch.testing.assert_close(agent.std(), torch.tensor([0.05, 1.0, 10.0]))
    agent.actor_logstd.data.zero_()
    agent.get_action_and_value(torch.randn(8, 4), torch.randn(8, 3))[1].sum().backward()
    assert agent.actor_logstd.grad.abs().min() > 0
    with torch.no_grad():
        near, far = (agent.get_action_and_value(x * torch.ones(1, 4))[2] for x in (0.1, 9.0))
    assert torch.equal(near, far)  # the entropy is a function of the std alone


def test_kl_is_exact(script):
    agent = script.agent()
    old, new, old_std = torch.randn(20, 3), torch.randn(20, 3), torch.rand(3) + 0.2
    agent.actor_logstd.data = torch.randn(3)
    expected = kl_divergence(Normal(old, old_std), Normal(new, agent.std())).sum(1)
    assert expected.min() > 1e-3
    torch.testing.assert_close(agent.kl(old, old_std, new), expected)


def merged(batches):
    everything = np.concatenate(batches)
    return everything.mean(0), everything.var(0), len(everything)


def uneven_batches(rank=0):
    rng = np.random.default_rng(rank)
    return [(3 + 2 * rng.normal(size=(n + 3 * rank, 4)) * [1, 10, 0.1, 1]).astype(np.float32) for n in (5, 1, 300, 17)]


def test_running_mean_std_is_that_of_all_vectors_seen_and_clips_at_10(script):
    normalise = script.ppo.RunningMeanStd(4)
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
    far = torch.tensor([[4.0, 300.0, 300.0, -300.0]])
    assert torch.equal(normalise(far)[0, 1:], torch.tensor([10.0, 10.0, -10.0]))


# --- the loss


class FixedAgent:
    """An agent whose outputs are given, so that the loss is a function of them alone."""

    def __init__(self, n, seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        self.logprob, self.entropy, self.value = (self.draw(n).requires_grad_() for _ in range(3))
        self.divergence = self.draw(n).exp()

    def draw(self, n):
        return torch.randn(n, generator=self.rng, dtype=torch.float64)

    def get_action_and_value(self, obs, actions, *memory):
        return actions, self.logprob, self.entropy, self.value, "new dist", {}

    def kl(self, *dists):
        assert dists == ("old dist", "old std", "new dist")
        return self.divergence


def loss_of(script, agent, ratio, advantages, returns, values, drawn=None, **settings):
    old_logprob = agent.logprob.detach() - torch.as_tensor(ratio, dtype=torch.float64).log()
    minibatch = dict(obs=None, actions=None, logprobs=old_logprob, dists="old dist", old_std="old std")
    minibatch |= dict(advantages=advantages, returns=returns, values=values)
    minibatch |= {} if drawn is None else {"drawn": drawn}
    args = script.ppo.Args(**{"clip_vloss": False, "vf_coef": 2.0} | settings)
    loss, stats = script.ppo.ppo_loss(agent, args, minibatch)
    loss.backward()
    return loss.item(), to_numbers(stats)


def test_clipped_surrogate_its_gradient_and_the_debug_variables_by_hand(script):
    # ratio, advantage, objective with clipping at 0.3, and its slope in the log-probability: ratio * advantage or 0
    table = [
        (1.2, 2.0, 2.4, 2.4),  # inside
        (0.8, -2.0, -1.6, -1.6),
        (1.6, 2.0, 2.6, 0.0),  # too far up, and it pays: 1.3 * 2
        (1.6, -2.0, -3.2, -3.2),  # too far up, and it costs
        (0.5, -2.0, -1.4, 0.0),  # too far down, and it pays: 0.7 * -2
        (0.5, 2.0, 1.0, 1.0),  # too far down, and it costs
        (1.25, 4.0, 5.0, 5.0),
    ]
    ratio, advantage, objective, slope = torch.tensor(table, dtype=torch.float64).T
    agent = FixedAgent(len(table))
    value = agent.value.detach()
    loss, stats = loss_of(script, agent, ratio, advantage, value, value, clip_coef=0.3, vf_coef=0.0, ent_coef=0.0)
    assert loss == pytest.approx(-objective.mean().item()) == stats["policy_loss"]
    torch.testing.assert_close(agent.logprob.grad, -slope / len(table))
    assert stats["clipfrac"] == pytest.approx(4 / 7)
    assert stats["old_approx_kl"] == pytest.approx(-ratio.log().mean().item())
    assert stats["approx_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    assert stats["kl"] == pytest.approx(agent.divergence.mean().item())
    assert stats["entropy"] == pytest.approx(agent.entropy.mean().item())


def test_ratios_are_measured_on_samples_that_were_drawn(script):
    """Those of other samples enter the loss, but say nothing of how far the policy has moved."""
    ratio, advantage = torch.tensor([1.1, 3.0, 1.5, 0.2], dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    agent, drawn = FixedAgent(4), torch.tensor([True, False, True, False])
    settings = dict(clip_coef=0.3, vf_coef=0.0)
    loss, stats = loss_of(script, agent, ratio, advantage, agent.draw(4), agent.draw(4), drawn.float(), **settings)
    ratio = ratio[drawn]
    assert stats["clipfrac"] == pytest.approx(1 / 2)
    assert stats["old_approx_kl"] == pytest.approx(-ratio.log().mean().item())
    assert stats["approx_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    assert loss == pytest.approx(-(1.1 + 1.3 + 1.3 + 0.2) / 4)
    nobody = loss_of(script, agent, torch.ones(4), advantage, agent.draw(4), agent.draw(4), torch.zeros(4))[1]
    assert nobody["approx_kl"] == nobody["clipfrac"] == 0


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_value_loss_and_its_gradient_by_hand(script, clip_vloss):
    # new value, old value, return, loss clipped at 0.2, its slope in the new value (both before 0.5 * mean)
    table = [
        (0.1, 0.0, 1.0, 0.81, -1.8),  # a step that is small enough
        (0.5, 0.0, 1.0, 0.64, 0.0),  # up by 0.5 where 0.2 is allowed: the larger loss is flat
        (-0.5, 0.0, -1.0, 0.64, 0.0),  # down alike
        (0.5, 0.0, -1.0, 2.25, 3.0),  # away from the return: the unclipped loss is the larger
        (1.5, 0.0, 1.0, 0.64, 0.0),  # beyond the return
    ]
    new, old, returns, clipped, slope = torch.tensor(table, dtype=torch.float64).T
    if not clip_vloss:
        clipped, slope = (new - returns) ** 2, 2 * (new - returns)
    agent = FixedAgent(len(table))
    agent.value = new.clone().requires_grad_()
    settings = dict(clip_coef=0.2, vf_coef=3.0, clip_vloss=clip_vloss, ent_coef=0.0)
    loss, stats = loss_of(script, agent, torch.ones(5), torch.zeros(5), returns, old, **settings)
    assert stats["value_loss"] == pytest.approx(0.5 * clipped.mean().item())
    assert loss == pytest.approx(3.0 * stats["value_loss"])
    torch.testing.assert_close(agent.value.grad, 3.0 * 0.5 * slope / 5)


def test_one_loss_of_three_terms(script):
    agent = FixedAgent(30)
    old_value, returns, advantages = agent.draw(30), agent.draw(30), agent.draw(30)
    loss, _ = loss_of(script, agent, torch.ones(30), advantages, returns, old_value, ent_coef=0.7, vf_coef=1.5)
    value_loss = 0.5 * (agent.value - returns).square().mean().item()
    assert loss == pytest.approx(-advantages.mean().item() - 0.7 * agent.entropy.mean().item() + 1.5 * value_loss)
    torch.testing.assert_close(agent.entropy.grad, torch.full_like(agent.entropy, -0.7 / 30))
    torch.testing.assert_close(agent.logprob.grad, -advantages / 30)


def test_value_coefficient_2_is_1_in_rsl_rl(script):
    agent = FixedAgent(50)
    returns, values = agent.draw(50), agent.draw(50)
    settings = dict(vf_coef=2.0, clip_vloss=True, clip_coef=0.2, ent_coef=0.0)
    loss, _ = loss_of(script, agent, torch.ones(50), torch.zeros(50), returns, values, **settings)
    clipped = values + (agent.value - values).clamp(-0.2, 0.2)
    rsl_rl = 1.0 * torch.max((agent.value - returns).pow(2), (clipped - returns).pow(2)).mean()
    assert loss == pytest.approx(rsl_rl.item())


def test_gradient_of_the_whole_loss_by_finite_differences(script):
    args = script.args(ent_coef=0.1, clip_vloss=True, vf_coef=2.0)
    agent = shaken(script.agent(hidden=(8,)), 0.3)  # large enough to be seen in float32
    obs = torch.randn(32, 4)
    with torch.no_grad():
        actions, logprobs, _, values, dists, *_ = agent.get_action_and_value(obs)
        old_std = agent.std()
        logprobs, values = logprobs + 0.2 * torch.randn(32), values + 0.2 * torch.randn(32)
    minibatch = dict(obs=obs, actions=actions, logprobs=logprobs, dists=dists, old_std=old_std)
    minibatch |= dict(advantages=torch.randn(32), returns=values + torch.randn(32), values=values)
    loss = lambda: script.ppo.ppo_loss(agent, args, minibatch)[0]  # noqa: E731
    loss().backward()
    for parameter in agent.parameters():
        direction = torch.randn_like(parameter)
        losses = []
        for step in (1e-3, -2e-3):
            with torch.no_grad():
                parameter.add_(step * direction)
                losses.append(loss().double())
        with torch.no_grad():
            parameter.add_(1e-3 * direction)
        slope = (losses[0] - losses[1]) / 2e-3
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope.item(), rel=0.03, abs=2e-3)


# --- rollout, bootstrap and advantages


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 0.0), (0.9, 1.0), (0.0, 0.9), (1.0, 1.0)])
def test_gae_is_the_sum_of_its_definition(script, gamma, gae_lambda):
    rng = np.random.default_rng(0)
    rewards, values, next_value = rng.normal(size=(12, 6)), rng.normal(size=(12, 6)), rng.normal(size=6)
    ended = rng.random((12, 6)) < 0.25
    ended[-1, :2], ended[-1, 2:] = True, False
    next_values = np.where(ended, 0.0, np.concatenate((values[1:], next_value[None])))
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (rewards, values, ended, next_value)]
    ours = script.ppo.compute_gae(*tensors, gamma, gae_lambda)
    expected = advantages_by_definition(rewards, values, next_values, ended, gamma, gae_lambda)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("norm_obs", [False, True])
@for_variants(WITHOUT_MEMORY)
def test_time_limits_are_bootstrapped_with_the_value_of_the_true_last_observation(
    script, variant, run_main, minibatches, norm_obs
):
    run_main(**script.variants[variant], norm_obs=norm_obs, norm_adv=False, gamma=0.9, gae_lambda=0.8)
    assert len(minibatches) == 2 and len(ScriptedEnv.kept) == 16
    for iteration, minibatch in enumerate(minibatches):
        steps = kept(8 * iteration, 8 * iteration + 8)
        agent = minibatch.agent  # as it was during the rollout
        # Where no episode ended, the last observation is the next one.
        following = where(steps["done"], steps["final_obs"], steps["next_obs"])
        with torch.no_grad():
            observations = agent.normalise(steps["obs"])
            values = first(agent.get_value(flatten(observations))).view(8, 6)
            next_values = first(agent.get_value(flatten(agent.normalise(following)))).view(8, 6)
        assert steps["terminated"].any() and steps["truncated"].sum() == 5
        assert next_values[steps["truncated"]].abs().min() > 1e-3  # so that forgetting one shows
        next_values = torch.where(steps["terminated"], 0.0, next_values)
        rewards, values, next_values = (x.double().numpy() for x in (steps["reward"], values, next_values))
        expected = advantages_by_definition(rewards, values, next_values, steps["done"].numpy(), 0.9, 0.8)
        ours = unshuffled([minibatch], observations)
        np.testing.assert_allclose(ours["advantages"], expected.ravel(), atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(ours["returns"], (expected + values).ravel(), atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(ours["values"], values.ravel(), atol=1e-6, rtol=1e-5)


def test_statistics_are_of_every_observation_trained_on_and_frozen_within_an_iteration(script, run_main, minibatches):
    state = run_main(norm_obs=True, num_minibatches=2)
    seen = kept()["obs"].view(-1, 5).double()
    torch.testing.assert_close(state["agent"][f"{script.statistics}.mean"], seen.mean(0))
    torch.testing.assert_close(state["agent"][f"{script.statistics}.var"], seen.var(0, unbiased=False))
    mean, std = seen[:48].mean(0), seen[:48].std(0, unbiased=False)
    for minibatch in minibatches[2:]:  # the second rollout and update use the first one's
        torch.testing.assert_close(getattr(minibatch.agent, script.statistics).mean, mean)
    expected = ((seen[48:] - mean) / std).clamp(-10, 10).float().sort(0).values
    ours = torch.cat([minibatch.obs for minibatch in minibatches[2:]]).sort(0).values
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_without_normalisation_observations_stay_as_they_are(script, run_main, minibatches):
    run_main(norm_obs=False)
    observations = kept(0, 8)["obs"]
    assert torch.equal(unshuffled(minibatches[:1], observations)["obs"], observations.view(-1, 5))


def test_environments_step_together_and_begin_at_a_random_phase(script, run_main):
    state = run_main(num_envs=12)
    assert state["global_step"] == 2 * 12 * 8 and len(ScriptedEnv.kept) == 16
    assert ScriptedEnv.kept[0]["obs"].shape == (12, 5)  # one call steps all environments
    assert ScriptedEnv.resets == [{"random_phase": True}]


def test_what_is_logged_of_the_episodes(script, run_main):
    run_main(num_iterations=2, log_interval=2)
    [line], steps = SilentLogger.lines, kept()
    returns, lengths, ended = torch.zeros(6), torch.zeros(6), []
    for reward, done in zip(steps["reward"], steps["done"], strict=True):
        returns, lengths = returns + reward, lengths + 1
        ended += list(zip(returns[done].tolist(), lengths[done].tolist(), strict=True))
        returns, lengths = returns * ~done, lengths * ~done
    assert line["charts/episodic_return"] == pytest.approx(np.mean([r for r, _ in ended]), rel=1e-5)
    assert line["charts/episodic_length"] == pytest.approx(np.mean([n for _, n in ended]))
    assert line["env/speed"] == pytest.approx(np.mean([r / n for r, n in ended]), rel=1e-5)
    assert line["step"] == 2 * 6 * 8
    names = {"policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "kl", "clipfrac", "grad_norm"}
    assert names <= {name.removeprefix("losses/") for name in line}


# --- minibatches


@for_variants(VARIANTS)
def test_log_probabilities_are_those_of_the_rollout_so_the_first_ratio_is_one(
    script, variant, run_main, minibatches, monkeypatch
):
    rollout, sample = [], script.ppo.Agent.sample

    def spy(self, dist):
        action = sample(self, dist)
        rollout.append(self.log_prob_and_entropy(dist, action)[0].view(-1))
        return action

    monkeypatch.setattr(script.ppo.Agent, "sample", spy)
    settings = dict(num_minibatches=4, update_epochs=2, learning_rate=5e-3, num_envs=8, num_iterations=3)
    run_main(**script.variants[variant], **settings)
    assert len(minibatches) == 3 * 2 * 4 and len(rollout) == 3 * 8
    for iteration in range(3):
        [begin, *others] = minibatches[8 * iteration : 8 * iteration + 8]
        observations = begin.agent.normalise(kept(8 * iteration, 8 * iteration + 8)["obs"])
        ours = unshuffled([begin, *others[:3]], observations)
        expected = torch.stack(rollout[8 * iteration : 8 * iteration + 8]).view(-1)
        torch.testing.assert_close(ours["logprobs"], expected, atol=1e-5, rtol=0)
        with torch.no_grad():
            logprob = begin.agent.get_action_and_value(begin.obs, begin.actions, *begin.memory)[1]
        assert ((logprob - begin.logprobs).exp() - 1).abs().max() < 1e-5
        assert abs(begin.stats["approx_kl"]) < 1e-6 and abs(begin.stats["kl"]) < 1e-6 and not begin.stats["clipfrac"]
        assert max(m.stats["kl"] for m in others) > 1e-5  # and then it moves
    assert expected.std() > 1e-3


def test_each_epoch_takes_every_sample_once_in_a_new_order(script, run_main, minibatches):
    run_main(num_iterations=1, num_minibatches=4, update_epochs=2, norm_obs=False)
    assert [len(m.obs) for m in minibatches] == [12] * 8
    observations = kept()["obs"]
    epochs = [torch.cat([m.obs for m in minibatches[i : i + 4]]) for i in (0, 4)]
    for i, epoch in enumerate(epochs):
        unshuffled(minibatches[4 * i : 4 * i + 4], observations)  # each once
        assert not torch.equal(epoch, observations.view(-1, 5))
    assert not torch.equal(*epochs)


@for_variants(VARIANTS)
def test_advantages_are_normalised_per_minibatch(script, variant, run_main, minibatches):
    run_main(**script.variants[variant], num_minibatches=2, update_epochs=2)
    assert len(minibatches) == 8
    for minibatch in minibatches:
        assert abs(minibatch.advantages.mean()) < 1e-5
        assert abs(minibatch.advantages.std(unbiased=False) - 1) < 1e-4
    minibatches.clear()
    run_main(**script.variants[variant], num_minibatches=2, norm_adv=False)
    assert all(abs(m.advantages.std(unbiased=False) - 1) > 1e-2 for m in minibatches)


# --- the update


def test_the_std_rises_again_from_its_floor(script, run_main, monkeypatch):
    """A log-std that has gone beyond its limits has no gradient, and would be stuck there."""
    calls = []

    def wish(agent, args, minibatch):  # less noise in the first iteration, more in the second
        calls.append(1)
        sign = 1 if len(calls) <= 40 else -1
        return sign * agent.std().log().sum() + 0 * sum(p.sum() for p in agent.parameters()), {"kl": torch.zeros(())}

    monkeypatch.setattr(script.ppo, "ppo_loss", wish)
    run_main(update_epochs=40, init_std=0.2, min_std=0.1, learning_rate=0.05, anneal_lr=False, max_grad_norm=1e9)
    low, high = (line["charts/action_std"] for line in SilentLogger.lines)
    assert low == pytest.approx(0.1) and high > 0.2


@pytest.mark.parametrize(
    ("kl", "lr", "expected"),
    [
        (0.021, 1e-3, 1e-3 / 1.5),
        (0.0199, 1e-3, 1e-3),
        (0.0051, 1e-3, 1e-3),
        (0.0049, 1e-3, 1.5e-3),
        (0.0, 1e-3, 1e-3),  # rsl_rl: only a positive divergence raises it
        (math.nan, 1e-3, 1e-3),
        (math.inf, 1e-3, 1e-3 / 1.5),
        (1.0, 1.2e-5, 1e-5),
        (1e-4, 9e-3, 1e-2),
    ],
)
def test_adaptive_learning_rate(script, kl, lr, expected):
    adapted = script.ppo.adapt_learning_rate(torch.tensor(lr), torch.tensor(kl), 0.01)
    assert adapted.item() == pytest.approx(expected, rel=1e-6)


def test_main_adapts_the_learning_rate_to_the_kl_of_each_update(script, run_main, minibatches):
    state = run_main(num_minibatches=2, update_epochs=4, learning_rate=3e-3, desired_kl=0.02)
    rate, rates = torch.tensor(3e-3), []
    for minibatch in minibatches:
        rate = script.ppo.adapt_learning_rate(rate, torch.tensor(minibatch.stats["kl"]), 0.02)
        rates.append(rate.item())
    assert state["learning_rate"] == rates[-1] and len(set(rates)) > 2  # the one Adam reads


def test_without_a_desired_kl_the_learning_rate_falls_linearly(script, run_main):
    state = run_main(num_iterations=4, learning_rate=1e-3)
    rates = [line["charts/learning_rate"] for line in SilentLogger.lines]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert state["learning_rate"] == pytest.approx(2.5e-4)  # the one Adam reads
    run_main(num_iterations=3, learning_rate=1e-3, anneal_lr=False)
    assert [line["charts/learning_rate"] for line in SilentLogger.lines] == pytest.approx([1e-3] * 3)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_gradients_are_clipped_to_their_largest_norm(script, run_main, gradients, monkeypatch, scale):
    directions, loss = [], script.ppo.ppo_loss

    def scaled(agent, args, minibatch):
        value, stats = loss(agent, args, minibatch)
        parameters = [p for p in agent.parameters() if p.requires_grad]
        found = torch.autograd.grad(scale * value, parameters, retain_graph=True)
        directions.append(torch.cat([g.flatten() for g in found]))
        return scale * value, stats

    monkeypatch.setattr(script.ppo, "ppo_loss", scaled)
    run_main(max_grad_norm=0.5)
    assert len(gradients) == 2
    for gradient, direction, line in zip(gradients, directions, SilentLogger.lines, strict=True):
        norm = direction.norm().item()
        assert line["losses/grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert (norm > 0.5) == (scale > 1)
        torch.testing.assert_close(gradient, direction * min(1.0, 0.5 / norm), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@for_variants([(name, list(SCRIPTS[name].variants)[i]) for name in PPO for i in {0, len(SCRIPTS[name].variants) // 2}])
def test_a_gradient_that_is_not_finite_is_dropped_and_counted(
    script, variant, run_main, gradients, monkeypatch, poison
):
    calls, loss = [], script.ppo.ppo_loss

    def poisoned(agent, args, minibatch):
        value, stats = loss(agent, args, minibatch)
        calls.append(1)
        bad = len(calls) in (2, 5)
        return (value * poison, {k: v * poison for k, v in stats.items()}) if bad else (value, stats)

    monkeypatch.setattr(script.ppo, "ppo_loss", poisoned)
    state = run_main(**script.variants[variant], num_minibatches=2, update_epochs=2, desired_kl=0.02)
    assert len(gradients) == 8 and all(torch.isfinite(g).all() for g in gradients)
    assert [bool(g.any()) for g in gradients] == [True, False, True, True, False, True, True, True]
    assert all(torch.isfinite(tensor).all() for tensor in state["agent"].values())
    assert [line["charts/nan_updates"] for line in SilentLogger.lines] == [1, 2]


def test_target_kl_ends_the_epochs(script, run_main, minibatches):
    settings = dict(num_iterations=1, update_epochs=6, learning_rate=1e-2, num_minibatches=2)
    run_main(**settings, target_kl=1e-4)
    assert len(minibatches) == 2  # the first epoch passed it
    minibatches.clear()
    run_main(**settings, target_kl=0.0)
    assert len(minibatches) == 12


def test_adam_has_epsilon_1e_5(script, run_main):
    group = run_main()["optimizer"]["param_groups"][0]
    assert group["eps"] == 1e-5 and tuple(group["betas"]) == (0.9, 0.999) and not group["weight_decay"]


@for_variants(COMPILED)
def test_what_is_compiled_does_the_same(script, variant, run_main, monkeypatch):
    compiled, torch_compile = [], torch.compile

    def without_a_compiler(function):  # traced and taken apart like for a compiler, then run as it is
        compiled.append(function.__name__)
        return torch_compile(function, backend="eager")

    def sometimes_bad(agent, args, minibatch):  # about every third minibatch
        value, stats = loss(agent, args, minibatch)
        return value * torch.where(minibatch["obs"][0, 0] > 0.5, math.nan, 1.0), stats

    loss = script.ppo.ppo_loss
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    monkeypatch.setattr(script.ppo, "ppo_loss", sometimes_bad)
    settings = script.variants[variant] | dict(num_minibatches=4, update_epochs=3, max_grad_norm=0.1)
    settings |= dict(learning_rate=3e-3, desired_kl=0.02)
    eager = run_main(**settings)
    bad = SilentLogger.lines[-1]["charts/nan_updates"]
    assert not compiled and 0 < bad < 24
    traced = run_main(**settings, compile=True)
    assert compiled == ["policy", "update"] and SilentLogger.lines[-1]["charts/nan_updates"] == bad
    assert traced["learning_rate"] == pytest.approx(eager["learning_rate"]) != pytest.approx(3e-3)
    for name, tensor in eager["agent"].items():
        torch.testing.assert_close(traced["agent"][name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    for name, tensor in eager["optimizer"]["state"][0].items():
        torch.testing.assert_close(traced["optimizer"]["state"][0][name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_without_a_compiler_one_sentence_says_so(script, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as end:
        script.ppo.check_args(script.ppo.Args(compile=True, device="cpu", ranks=1))
    assert end.value.code == 2 and "there is no no-such-compiler" in capsys.readouterr().err


# --- the best model


def test_the_best_model_outlives_every_worse_one_also_across_a_resume(script, run_main, monkeypatch):
    scores = []
    monkeypatch.setattr(script.ppo, "run_evaluation", lambda *args: {"score": scores.pop(0)})

    def best(log_dir):
        state = checkpoint.load(f"{log_dir}/checkpoints/best_model.pt", script.ppo.SCRIPT)
        return state["iteration"], state["score"]

    scores[:] = [5.0, 3.0]  # after iteration 2 in the loop, and in the end
    state = run_main(num_iterations=3, eval_interval=2)
    folder = state["args"]["log_dir"]
    assert best(folder) == (2, 5.0)
    again = dict(log_dir=folder, eval_interval=2)
    scores[:] = [4.0, 4.5]  # after iteration 4, and in the end
    run_main(**again, resume=f"{folder}/checkpoints/model_3.pt", num_iterations=5)
    assert best(folder) == (2, 5.0) and not scores
    scores[:] = [6.0]  # iteration 6, the last one, is evaluated once
    run_main(**again, resume=f"{folder}/checkpoints/model_5.pt", num_iterations=6)
    assert best(folder) == (6, 6.0)


# --- several ranks

ROBOTS = dict(num_envs=8, num_iterations=3, update_epochs=3, gamma=0.9, desired_kl=0.01)
EQUAL = [(name, variant) for name in PPO for variant in SCRIPTS[name].variants if variant.endswith("box")]
TRAININGS = [(*pair, "") for pair in EQUAL] + [(name, "box", "poisoned") for name in PPO]


def train(key, folder, replace=setattr):
    """One training whose noise does not depend on how the robots are split; what this rank saw goes into a file."""
    script, ppo = SCRIPTS[key[0]], SCRIPTS[key[0]].ppo
    seen, loss, draws = {"advantages": [], "group": []}, REAL_LOSS[key[0]], []
    folder = folder / "-".join(key)
    folder.mkdir(exist_ok=True)
    stand_in(script, replace)

    def sample(self, dist):
        draws.append(1)
        return dist + self.std() * rows_of_this_rank(torch.randn, len(draws), *dist.shape[-2:])

    def spy(agent, args, minibatch):
        seen["advantages"].append(minibatch["advantages"].clone())
        value, stats = loss(agent, args, minibatch)
        bad = key[2] and len(seen["advantages"]) == 3 and os.environ.get("RANK") == "1"
        return value * (math.nan if bad else 1.0), stats

    def run_evaluation(*args):
        seen["group"].append(torch.distributed.is_initialized())
        return {"score": 0.0}

    replace(ppo.Agent, "sample", sample)
    replace(ppo, "ppo_loss", spy)
    replace(ppo, "run_evaluation", run_evaluation)
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
    if ranks > 1:
        distributed.init("cpu")
        normalise = ppo.RunningMeanStd(4)
        for batch in uneven_batches(int(rank)):
            normalise.update(torch.from_numpy(batch))
        seen["normalise"] = normalise.state_dict()
    settings = ROBOTS | script.variants[key[1]] | script.normalised | {"ranks": ranks, "log_dir": str(folder)}
    settings.pop("actions", None)  # they are ScriptedEnv's default
    ppo.main(script.args(**settings))
    seen["group"].append(torch.distributed.is_initialized())
    torch.save(seen | {"lines": SilentLogger.lines, "seeds": ScriptedEnv.seeds}, folder / f"rank{rank}.pt")


REAL_LOSS = {name: SCRIPTS[name].ppo.ppo_loss for name in PPO}


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    """{(script, variant, poisoned or not, ranks): (final checkpoint, [what each rank saw])}."""
    folders, runs = {ranks: tmp_path_factory.mktemp("ranks") for ranks in (1, 2)}, {}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    processes = []
    for key in TRAININGS:
        program = torchrun if key[2] else []  # both ways to start ranks
        command = [sys.executable, *program, __file__, str(folders[2]), *key]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    with pytest.MonkeyPatch.context() as patch, process_restored():
        for key in TRAININGS:
            if not key[2]:
                train(key, folders[1], patch.setattr)
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for ranks, folder in folders.items():
        for key in TRAININGS:
            run = folder / "-".join(key)
            if run.exists():
                state = checkpoint.load(run / "checkpoints" / "final_model.pt", key[0])
                runs[*key, ranks] = state, [torch.load(run / f"rank{rank}.pt") for rank in range(ranks)]
    return runs


@for_variants(EQUAL)
def test_two_ranks_of_n_robots_equal_one_rank_of_2n(by_ranks, script, variant):
    (one, [whole]), (two, halves) = (by_ranks[script.name, variant, "", ranks] for ranks in (1, 2))
    assert len(two["ranks"]) == 2 and one["global_step"] == two["global_step"] == 3 * 8 * 8
    for key, tensor in one["agent"].items():
        torch.testing.assert_close(two["agent"][key], tensor, atol=2e-6, rtol=1e-5, msg=key)
    rates = [state["optimizer"]["param_groups"][0]["lr"].item() for state in (one, two)]
    assert rates[1] == pytest.approx(rates[0], rel=1e-6)
    assert rates[0] != pytest.approx(1e-3)  # it has adapted
    # The advantages are those of the same samples in another order, and different on each rank.
    assert len(whole["advantages"]) == 9
    for a, b, c in zip(whole["advantages"], *(half["advantages"] for half in halves), strict=True):
        both = torch.cat((b.flatten(), c.flatten()))
        torch.testing.assert_close(both.sort().values, a.flatten().sort().values, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(b.flatten().sort().values, c.flatten().sort().values, atol=1e-2)
        assert abs(both.mean()) < 1e-5 and abs(both.std(unbiased=False) - 1) < 1e-4
        assert abs(b.mean()) > 1e-3  # normalised over all ranks, not each for itself
    # What is logged is of all robots.
    assert len(whole["lines"]) == 3 and not halves[1]["lines"]
    shared = ("charts/episodic", "charts/learning", "losses/grad", "env/")
    for alone, together in zip(whole["lines"], halves[0]["lines"], strict=True):
        names = [key for key in alone if key.startswith(shared)]
        assert len(names) >= 5
        for key in names:
            assert together[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-5), key


def test_running_mean_std_merges_all_ranks(by_ranks, script):
    mean, var, count = merged(uneven_batches(0) + uneven_batches(1))
    for seen in by_ranks[script.name, "box", "", 2][1]:
        np.testing.assert_allclose(seen["normalise"]["mean"], mean, rtol=1e-6)
        np.testing.assert_allclose(seen["normalise"]["var"], var, rtol=1e-5)
        assert seen["normalise"]["count"] == count


def test_a_bad_gradient_of_one_rank_is_dropped_by_all(by_ranks, script):
    state, halves = by_ranks[script.name, "box", "poisoned", 2]
    assert all(torch.isfinite(tensor).all() for tensor in state["agent"].values())
    assert halves[0]["lines"][-1]["charts/nan_updates"] == 2  # one update, counted by two ranks
    assert by_ranks[script.name, "box", "", 2][1][0]["lines"][-1]["charts/nan_updates"] == 0


@pytest.mark.parametrize("start", ["launch", "torchrun"])
def test_every_rank_leaves_the_group_before_the_final_evaluation(by_ranks, script, start):
    zero, other = by_ranks[script.name, "box", {"launch": "", "torchrun": "poisoned"}[start], 2][1]
    assert zero["group"] == [False, False]  # in the evaluation, and afterwards
    assert other["group"] == [False]


def test_the_seeds_of_two_ranks_are_far_apart(by_ranks, script):
    """Environments count on from their rank's seed: a hundred thousand of them stay below the next rank's."""
    seeds = [seen["seeds"] for seen in by_ranks[script.name, "box", "", 2][1]]
    assert all(len(set(rank)) == 1 for rank in seeds)  # of the constructor and of the reset
    assert abs(seeds[1][0] - seeds[0][0]) > 100_000


# --- settings


def test_every_setting_is_read(script):
    """Somewhere a line reads `args.name` or `cfg.name`."""
    read = set(script.read_elsewhere)
    for path in (script.path, *(path for pattern in script.sources for path in ROOT.glob(pattern))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                read |= {node.attr} if owner in ("args", "cfg") else set()
    assert [name for name in script.ppo.Args.__dataclass_fields__ if name not in read] == []


def test_every_setting_is_documented(script):
    assert undocumented(script.path, "Args") == []


def test_presets_and_what_is_not_saved_name_settings(script):
    names = set(script.ppo.Args.__dataclass_fields__)
    assert all(set(preset) <= names for preset in script.ppo.PRESETS.values())
    assert {*checkpoint.NOT_SAVED, *getattr(script.ppo, "NOT_SAVED", ())} <= names


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.launch(lambda folder: train(tuple([*sys.argv[2:], ""][:3]), folder), Path(sys.argv[1]), 2)
