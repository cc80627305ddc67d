"""The learner of ppo_continuous_isaac.py: each formula against its definition, and main() on episodes with known ends.

Run as a program, this file is two ranks of one training.
"""

import ast
import contextlib
import copy
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from helpers import undocumented
from torch.distributions import Categorical, Normal, kl_divergence

import ppo_continuous_isaac as ppo
from common import checkpoint, cli, distributed
from common.envs.isaac import make_env
from common.envs.isaac_eval import evaluate
from common.logger import to_numbers

ROOT = Path(__file__).parent.parent
TINY = ppo.PRESETS["mujoco"] | dict(device="cpu", ranks=1, hidden=(16, 16), lstm_size=8)
TINY |= dict(log_interval=1, checkpoint_interval=1000)
TINY |= dict(
    save_video=False, num_envs=6, num_steps=8, num_iterations=2, num_minibatches=1, update_epochs=1, norm_reward=False
)
ACTIONS = {"box": Box(-1, 1, (3,)), "discrete": Discrete(4), "multi": MultiDiscrete([2, 3, 4])}


@contextlib.contextmanager
def process_restored():
    """One thread for torch; afterwards the signal handlers and the threads are as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def restored():
    with process_restored():
        yield


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


def rows_of_this_rank(draw, seed, n, *shape):
    """(n, *shape): this rank's part of what all ranks draw together."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    everyone = draw(n * world_size, *shape, generator=torch.Generator().manual_seed(seed))
    return everyone[rank * n : rank * n + n]


class ScriptedEnv:
    """Robots whose episodes end when ENDS says so: {(step within the rollout, robot over all ranks): how}. What they
    observe depends on time and robot alone, the reward on the action too. Everything is kept.
    """

    ENDS = {(2, 0): "terminated", (3, 1): "truncated", (7, 3): "truncated", (7, 4): "terminated"}
    ENDS |= {(0, 5): "truncated", (1, 5): "terminated", (4, 5): "truncated", (5, 5): "truncated"}
    single_action_space, outlier = ACTIONS["box"], None
    single_observation_space, policy_dim, critic_dim = Box(-np.inf, np.inf, (5,)), 5, 5
    exact_resume, kept, resets = False, [], []

    def __init__(self, env_id, num_envs, device, seed, **config):
        self.num_envs, self.device, self.clock = num_envs, device, 0
        self.nan_resets, self.returns, self.lengths = torch.zeros(()), torch.zeros(num_envs), torch.zeros(num_envs)
        self.first = num_envs * int(os.environ.get("RANK", 0))
        ScriptedEnv.kept, ScriptedEnv.resets = [], []

    def _draw(self, what, *shape):
        return 1 + 2 * rows_of_this_rank(torch.randn, 10 * self.clock + what, self.num_envs, *shape)

    def reset(self, seed=None, options=None):
        ScriptedEnv.resets.append(options)
        self.obs = self._draw(0, 5)
        return self.obs, {}

    def step(self, actions):
        ends = [self.ENDS.get((self.clock % 8, self.first + i)) for i in range(self.num_envs)]
        self.clock += 1
        terminated = torch.tensor([end == "terminated" for end in ends])
        truncated = torch.tensor([end == "truncated" for end in ends])
        reward = self._draw(1) + 0.3 * actions.float().reshape(self.num_envs, -1).mean(1)
        if self.outlier and self.clock == self.outlier:
            reward[2] = 1000.0
        done, next_obs = terminated | truncated, self._draw(0, 5)
        # Nothing is promised about the rows of final_obs where no episode has ended.
        final_obs = torch.where(done[:, None], self._draw(2, 5), 1e6)
        kept = dict(obs=self.obs, actions=actions.clone(), reward=reward.clone(), final_obs=final_obs)
        ScriptedEnv.kept.append(kept | dict(next_obs=next_obs, terminated=terminated, truncated=truncated))
        self.obs, self.returns, self.lengths = next_obs, self.returns + reward, self.lengths + 1
        info = {"final_obs": final_obs, "_episode": done, "episode": {"r": self.returns, "l": self.lengths}}
        self.returns, self.lengths = self.returns * ~done, self.lengths * ~done
        return next_obs, reward, terminated, truncated, info | {"log": {"Episode/term": 2.0 * self.clock}}

    def state_dict(self):
        return {}

    def close(self):
        pass


def kept(first=0, last=None):
    """What ScriptedEnv kept of the steps `first` to `last`, stacked: {name: (steps, num_envs, ...)}."""
    steps = ScriptedEnv.kept[first:last]
    found = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    found["done"] = found["terminated"] | found["truncated"]
    return found


def starts_of(done, first=True):
    """(T, N): 1 where an episode begins with the step."""
    return torch.cat((torch.full_like(done[:1], first), done[:-1])).float()


def stand_in(replace):
    """Replaces what main() would do besides learning."""
    replace(ppo, "make_env", ScriptedEnv)
    replace(ppo, "run_evaluation", lambda *args: {"score": 0.0})
    replace(ppo, "report", lambda *args: None)
    replace(ppo, "export", lambda *args: None)
    replace(ppo, "run_info", dict)
    replace(ppo, "Logger", SilentLogger)
    replace(distributed, "num_cores", lambda: 1)


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """Runs main() with tiny settings on ScriptedEnv and gives the final checkpoint."""
    stand_in(monkeypatch.setattr)
    runs = []

    def run(actions="box", **settings):
        monkeypatch.setattr(ScriptedEnv, "single_action_space", ACTIONS[actions])
        runs.append(tmp_path / f"run{len(runs)}")
        ppo.main(ppo.Args(**TINY | {"log_dir": str(runs[-1])} | settings))
        state = checkpoint.load(runs[-1] / "checkpoints" / "final_model.pt", ppo.SCRIPT)
        return state | {"learning_rate": state["optimizer"]["param_groups"][0]["lr"].item()}

    return run


@pytest.fixture
def minibatches(monkeypatch):
    """All that ppo_loss receives while main() runs, with a copy of the agent, and the statistics it gives."""
    calls, loss = [], ppo.ppo_loss

    def spy(agent, args, minibatch):
        memory = [minibatch[name] for name in ("state", "starts") if name in minibatch]
        call = SimpleNamespace(agent=copy.deepcopy(agent), memory=memory, **minibatch)
        result = loss(agent, args, minibatch)
        call.stats = to_numbers(result[1])
        calls.append(call)
        return result

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    return calls


def unshuffled(minibatches, observations):
    """The samples of one epoch's minibatches in the order of `observations` (T, N, dim): {name: (T * N, ...)}."""
    names = ("obs", "actions", "logprobs", "advantages", "returns", "values")
    samples = {n: torch.cat([getattr(m, n).flatten(0, m.obs.dim() - 2) for m in minibatches]) for n in names}
    match = (observations.flatten(0, 1)[:, None] == samples["obs"]).all(2)
    assert (match.sum(0) == 1).all() and (match.sum(1) == 1).all()  # every sample once
    order = match.float().argmax(1)
    return {name: tensor[order] for name, tensor in samples.items()}


def make_agent(actions="box", obs_dim=4, policy_dim=None, critic_dim=None, **settings):
    torch.manual_seed(0)
    space = ACTIONS[actions] if isinstance(actions, str) else actions
    envs = SimpleNamespace(single_observation_space=Box(-1, 1, (obs_dim,)), single_action_space=space)
    envs.policy_dim, envs.critic_dim = policy_dim or obs_dim, critic_dim or obs_dim
    return ppo.Agent(envs, ppo.Args(**{"hidden": (16,), "lstm_size": 8} | settings))


def shaken(agent, scale=0.5):
    """The agent away from its initial weights, where all outputs are nearly zero."""
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return agent


# --- the agent


@pytest.mark.parametrize("lstm", [False, True])
def test_orthogonal_weights_zero_biases_and_the_scale_of_the_heads(lstm):
    agent = make_agent(obs_dim=6, hidden=(32, 12), lstm=lstm, lstm_size=10, init_std=0.7, activation="elu")
    for network, head in ((agent.actor, 0.01), (agent.critic, 1.0)):
        layers = [layer for layer in network.mlp if isinstance(layer, torch.nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in layers[:2]] == [(10 if lstm else 6, 32), (32, 12)]
        assert sum(isinstance(layer, torch.nn.ELU) for layer in network.mlp) == 2 and len(network.mlp) == 5
        weights = [(layer.weight, scale) for layer, scale in zip(layers, (2**0.5, 2**0.5, head), strict=True)]
        biases = [layer.bias for layer in layers]
        if lstm:
            weights += [(network.lstm.weight_ih_l0, 1.0), (network.lstm.weight_hh_l0, 1.0)]
            biases += [network.lstm.bias_ih_l0, network.lstm.bias_hh_l0]
        for weight, scale in weights:
            weight = weight if len(weight) < weight.shape[1] else weight.T
            torch.testing.assert_close(weight @ weight.T, scale**2 * torch.eye(len(weight)), atol=1e-5, rtol=1e-5)
        assert not any(bias.any() for bias in biases)
    torch.testing.assert_close(agent.std(), torch.full((3,), 0.7))


@pytest.mark.parametrize("lstm", [False, True])
@pytest.mark.parametrize("actions", ACTIONS)
def test_actor_and_critic_share_nothing(actions, lstm):
    agent = shaken(make_agent(actions, lstm=lstm))
    obs, memory = torch.randn(5, 4), (None, None)
    if lstm:
        obs, memory = torch.randn(5, 3, 4), (torch.randn(5, 4, 8), torch.zeros(5, 3))
    with torch.no_grad():
        action = agent.get_action_and_value(obs, None, *memory)[0]
    _, logprob, _, value, *_ = agent.get_action_and_value(obs, action, *memory)
    networks = {"actor": set(agent.actor.parameters()), "critic": set(agent.critic.parameters())}
    for output, name in ((logprob, "actor"), (value, "critic")):
        agent.zero_grad()
        output.sum().backward()
        moved = {p for p in agent.parameters() if p.grad is not None and p.grad.any()}
        assert moved - {getattr(agent, "actor_logstd", None)} == networks[name]


def test_actions_are_independent_gaussians():
    agent = shaken(make_agent())
    agent.actor_logstd.data = torch.tensor([-0.5, 0.0, 0.5])
    obs = torch.randn(1, 4).expand(50_000, 4)
    with torch.no_grad():
        action, logprob, entropy, value, mean, _ = agent.get_action_and_value(obs)
        again = agent.get_action_and_value(obs[:5], action[:5])
        expected = Normal(mean, torch.tensor([-0.5, 0.0, 0.5]).exp())
    torch.testing.assert_close(logprob, expected.log_prob(action).sum(1))
    torch.testing.assert_close(entropy.expand(50_000), expected.entropy().sum(1))
    torch.testing.assert_close(action.mean(0), mean[0], atol=0.03, rtol=0)
    covariance = torch.diag(expected.variance[0])
    torch.testing.assert_close(action.T.cov(), covariance, atol=0.06, rtol=0)
    assert torch.equal(again[0], action[:5]) and value.shape == (50_000,)
    torch.testing.assert_close(again[1], logprob[:5])


def test_log_std_is_a_clamped_parameter_that_no_observation_moves():
    agent = shaken(make_agent(min_std=0.05))
    assert isinstance(agent.actor_logstd, torch.nn.Parameter)
    agent.actor_logstd.data = torch.tensor([-100.0, 0.0, 100.0])
    torch.testing.assert_close(agent.std(), torch.tensor([0.05, 1.0, 10.0]))
    agent.actor_logstd.data.zero_()
    agent.get_action_and_value(torch.randn(8, 4), torch.randn(8, 3))[1].sum().backward()
    assert agent.actor_logstd.grad.abs().min() > 0
    with torch.no_grad():
        near, far = (agent.get_action_and_value(x * torch.ones(1, 4))[2] for x in (0.1, 9.0))
    assert torch.equal(near, far)  # the entropy is a function of the std alone


@pytest.mark.parametrize("actions", ["discrete", "multi"])
def test_discrete_components_are_independent_categoricals(actions):
    agent, n = shaken(make_agent(actions)), 60_000
    nvec = [4] if actions == "discrete" else [2, 3, 4]
    obs = torch.randn(1, 4).expand(n, 4)
    with torch.no_grad():
        action, logprob, entropy, _, params, _ = agent.get_action_and_value(obs)
    assert action.dtype == torch.long and action.shape == ((n,) if actions == "discrete" else (n, 3))
    components = [Categorical(logits=logits) for logits in params.split(nvec, 1)]
    columns = action.view(n, -1)
    expected = sum(c.log_prob(columns[:, i]) for i, c in enumerate(components))
    torch.testing.assert_close(logprob, expected)
    torch.testing.assert_close(entropy, sum(c.entropy() for c in components))
    # How often each combination comes, against the product of the components' probabilities.
    product = torch.ones(())
    for component in components:
        product = product[..., None] * component.probs[0]
    shape = [1, *nvec[1:], 1]
    index = sum(columns[:, i] * math.prod(shape[i + 1 :]) for i in range(len(nvec)))
    seen = torch.bincount(index, minlength=math.prod(nvec)) / n
    assert product.std() > 0.01  # far from all alike
    torch.testing.assert_close(seen, product.flatten(), atol=4 * math.sqrt(0.25 / n), rtol=0)
    likeliest = torch.stack([c.probs[0].argmax() for c in components])
    assert torch.equal(agent.mode(params[:1]).flatten(), likeliest)


@pytest.mark.parametrize("actions", ACTIONS)
def test_kl_is_exact(actions):
    agent = make_agent(actions)
    old, new, old_std = torch.randn(20, agent.dist_dim), torch.randn(20, agent.dist_dim), torch.rand(3) + 0.2
    if actions == "box":
        agent.actor_logstd.data = torch.randn(3)
        pairs = [(Normal(old, old_std), Normal(new, agent.std()))]
    else:
        parts = zip(old.split(agent.nvec, 1), new.split(agent.nvec, 1), strict=True)
        pairs = [(Categorical(logits=a), Categorical(logits=b)) for a, b in parts]
    expected = sum(kl_divergence(a, b).view(20, -1).sum(1) for a, b in pairs)
    assert expected.min() > 1e-3
    torch.testing.assert_close(agent.kl(old, old_std, new), expected)


@pytest.mark.parametrize("lstm", [False, True])
def test_the_critic_alone_reads_its_observations(lstm):
    agent = shaken(make_agent(obs_dim=7, policy_dim=5, critic_dim=3, lstm=lstm))
    agent.normalise.update(3 + 2 * torch.randn(50, 7))
    memory = (torch.randn(6, 4, 8), torch.zeros(6)) if lstm else (None, None)
    obs = torch.randn(6, 7)

    def outputs(obs):
        with torch.no_grad():
            *_, value, params, _ = agent.get_action_and_value(agent.normalise(obs), torch.zeros(6, 3), *memory)
        return params, value

    params, value = outputs(obs)
    for column in range(7):  # 0 to 3 the policy's, 5 and 6 the critic's, 4 of both
        changed = obs.clone()
        changed[..., column] += 1
        new_params, new_value = outputs(changed)
        assert torch.equal(new_params, params) == (column >= 5)
        assert torch.equal(new_value, value) == (column < 4)
    # What acts without the critic's part is the same policy.
    with torch.no_grad():
        if lstm:
            action, state = agent(obs[:, :5], memory[0][:, :2].transpose(0, 1))
            assert state.shape == (2, 6, 8)
        else:
            action = agent(obs[:, :5])
    torch.testing.assert_close(action, params.view(6, 3))


def lstm_by_hand(network, x, state, starts):
    """Outputs (T, N, out_dim) of a Network and its states after each step, by the LSTM's own equations."""
    lstm, (h, c), outputs, states = network.lstm, state, [], []
    for t in range(len(x)):
        h, c = (torch.where(starts[t, :, None] > 0, 0.0, memory) for memory in (h, c))
        gates = x[t] @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(network.mlp(h))
        states.append(torch.stack((h, c)))
    return torch.stack(outputs), states


def test_a_sequence_with_starts_equals_stepping_one_by_one():
    network = shaken(make_agent(lstm=True)).actor
    x, state = torch.randn(9, 4, 4), torch.randn(2, 4, 8)
    starts = torch.zeros(9, 4)
    for t, i in ((0, 1), (3, 0), (3, 2), (4, 0), (8, 3)):
        starts[t, i] = 1
    with torch.no_grad():
        together, states = network(x.transpose(0, 1), state.transpose(0, 1), starts.T)
        together = together.transpose(0, 1)
        by_hand, all_states = lstm_by_hand(network, x, state, starts)
        torch.testing.assert_close(together, by_hand)
        assert sorted(states) == [2, 3, 7, 8]  # before each start, and at the end
        for t, after in states.items():
            torch.testing.assert_close(after.transpose(0, 1), all_states[t])
        memory = state.transpose(0, 1)
        for t in range(9):
            output, memory = network(x[t], memory, starts[t])
            torch.testing.assert_close(output, together[t])
        # The episode that begins remembers nothing; the others do.
        other, _ = network(torch.cat((x[:3] + 1, x[3:])).transpose(0, 1), state.transpose(0, 1), starts.T)
        differs = (other.transpose(0, 1) - together).abs().amax(2) > 1e-5
        assert not differs[3:, [0, 2]].any() and differs[:3].all() and differs[3:8, [1, 3]].all()
        assert not differs[8, 3]


def test_the_first_state_is_zero(run_main, minibatches):
    assert make_agent().zero_state(5) is None
    assert torch.equal(make_agent(lstm=True).zero_state(5), torch.zeros(2, 5, 8))
    run_main(lstm=True)
    first, second = minibatches
    assert torch.equal(first.state, torch.zeros(6, 4, 8)) and first.starts[:, 0].all()
    assert second.state.abs().amax((1, 2)).min() > 1e-3  # the second rollout goes on from the first


def test_observations_are_normalised_and_clipped_at_10():
    normalise, seen = ppo.RunningMeanStd(3), torch.Generator().manual_seed(0)
    batches = [3 + 2 * torch.randn(n, 3, generator=seen) for n in (5, 1, 300)]
    for batch in batches:
        normalise.update(batch)
    mean, std = torch.cat(batches).mean(0), torch.cat(batches).std(0, unbiased=False)
    x = torch.tensor([[4.0, 300.0, -300.0]])
    assert torch.equal(normalise(x)[0, 1:], torch.tensor([10.0, -10.0]))
    torch.testing.assert_close(normalise(x)[:, 0], ((x - mean) / std)[:, 0], rtol=1e-4, atol=1e-5)


# --- the loss


class FixedAgent:
    """An agent whose outputs are given, so that the loss is a function of them alone."""

    def __init__(self, n, seed=0):
        self.rng = torch.Generator().manual_seed(seed)
        self.logprob, self.entropy, self.value = (self.draw(n).requires_grad_() for _ in range(3))
        self.divergence = self.draw(n).exp()

    def draw(self, n):
        return torch.randn(n, generator=self.rng, dtype=torch.float64)

    def get_action_and_value(self, obs, actions, state, starts):
        return actions, self.logprob, self.entropy, self.value, None, {}

    def kl(self, old_params, old_std, params):
        return self.divergence


def loss_of(agent, ratio, advantages, returns, values, **settings):
    old_logprob = agent.logprob.detach() - torch.as_tensor(ratio, dtype=torch.float64).log()
    minibatch = dict(obs=None, actions=None, logprobs=old_logprob, dists=None, old_std=None)
    minibatch |= dict(advantages=advantages, returns=returns, values=values)
    loss, stats = ppo.ppo_loss(agent, ppo.Args(**{"clip_vloss": False} | settings), minibatch)
    loss.backward()
    return loss.item(), to_numbers(stats)


def test_clipped_surrogate_its_gradient_and_the_debug_variables_by_hand():
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
    loss, stats = loss_of(agent, ratio, advantage, value, value, clip_coef=0.3, vf_coef=0.0, ent_coef=0.0)
    assert loss == pytest.approx(-objective.mean().item()) == stats["policy_loss"]
    torch.testing.assert_close(agent.logprob.grad, -slope / len(table))
    assert stats["clipfrac"] == pytest.approx(4 / 7)
    assert stats["old_approx_kl"] == pytest.approx(-ratio.log().mean().item())
    assert stats["approx_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    assert stats["kl"] == pytest.approx(agent.divergence.mean().item())
    assert stats["entropy"] == pytest.approx(agent.entropy.mean().item())


@pytest.mark.parametrize("clip_vloss", [True, False])
def test_value_loss_and_its_gradient_by_hand(clip_vloss):
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
    settings = dict(clip_coef=0.2, vf_coef=3.0, clip_vloss=clip_vloss)
    loss, stats = loss_of(agent, torch.ones(5), torch.zeros(5), returns, old, **settings)
    assert stats["value_loss"] == pytest.approx(0.5 * clipped.mean().item())
    assert loss == pytest.approx(3.0 * stats["value_loss"])
    torch.testing.assert_close(agent.value.grad, 3.0 * 0.5 * slope / 5)


def test_one_loss_of_three_terms():
    agent = FixedAgent(30)
    old_value, returns, advantages = agent.draw(30), agent.draw(30), agent.draw(30)
    loss, stats = loss_of(agent, torch.ones(30), advantages, returns, old_value, ent_coef=0.7, vf_coef=1.5)
    value_loss = 0.5 * (agent.value - returns).square().mean().item()
    assert loss == pytest.approx(-advantages.mean().item() - 0.7 * agent.entropy.mean().item() + 1.5 * value_loss)
    torch.testing.assert_close(agent.entropy.grad, torch.full_like(agent.entropy, -0.7 / 30))
    torch.testing.assert_close(agent.logprob.grad, -advantages / 30)


def test_value_coefficient_2_is_1_in_rsl_rl():
    agent = FixedAgent(50)
    returns, values = agent.draw(50), agent.draw(50)
    isaac = ppo.Args(**ppo.PRESETS["isaac"])
    settings = {name: getattr(isaac, name) for name in ("vf_coef", "clip_vloss")}
    loss, _ = loss_of(agent, torch.ones(50), torch.zeros(50), returns, values, **settings)
    clipped = values + (agent.value - values).clamp(-0.2, 0.2)
    rsl_rl = 1.0 * torch.max((agent.value - returns).pow(2), (clipped - returns).pow(2)).mean()
    assert loss == pytest.approx(rsl_rl.item())


# --- rollout, bootstrap and advantages


def advantages_by_definition(rewards, values, next_values, ended, gamma, gae_lambda):
    """A_t = sum_k (gamma lambda)^(k - t) (r_k + gamma V_{k+1} - V_k), up to the episode's or the rollout's end."""
    advantages = np.zeros_like(rewards)
    for t, i in np.ndindex(*rewards.shape):
        for k in range(t, len(rewards)):
            delta = rewards[k, i] + gamma * next_values[k, i] - values[k, i]
            advantages[t, i] += (gamma * gae_lambda) ** (k - t) * delta
            if ended[k, i]:
                break
    return advantages


@pytest.mark.parametrize("norm_obs", [False, True])
@pytest.mark.parametrize("lstm", [False, True])
def test_time_limits_are_bootstrapped_with_the_value_of_the_true_last_observation(
    run_main, minibatches, lstm, norm_obs
):
    run_main(lstm=lstm, norm_obs=norm_obs, norm_adv=False, gamma=0.9, gae_lambda=0.8)
    assert len(minibatches) == 2 and len(ScriptedEnv.kept) == 16
    state, first = torch.zeros(2, 6, 8), True
    for iteration, minibatch in enumerate(minibatches):
        steps = kept(8 * iteration, 8 * iteration + 8)
        agent = minibatch.agent  # as it was during the rollout
        starts = torch.ones(1, 6) if first is True else first[None].float()
        starts = torch.cat((starts, steps["done"][:-1].float()))
        with torch.no_grad():
            observations = agent.normalise(steps["obs"])
            following = agent.normalise(torch.where(steps["done"][..., None], steps["final_obs"], steps["next_obs"]))
            if lstm:
                values, states = lstm_by_hand(agent.critic, observations, state, starts)
                after = [
                    lstm_by_hand(agent.critic, x[None], s, torch.zeros(1, 6))[0][0]
                    for x, s in zip(following, states, strict=True)
                ]
                values, next_values = values[..., 0], torch.stack(after)[..., 0]
                state, first = states[-1], steps["done"][-1]
            else:
                values, next_values = agent.critic.mlp(observations)[..., 0], agent.critic.mlp(following)[..., 0]
        assert steps["terminated"].any() and steps["truncated"].sum() == 5
        assert next_values[steps["truncated"]].abs().min() > 1e-3  # so that forgetting one shows
        next_values = torch.where(steps["terminated"], 0.0, next_values)
        rewards, values, next_values = (x.double().numpy() for x in (steps["reward"], values, next_values))
        expected = advantages_by_definition(rewards, values, next_values, steps["done"].numpy(), 0.9, 0.8)
        ours = unshuffled([minibatch], observations)
        np.testing.assert_allclose(ours["advantages"], expected.ravel(), atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(ours["returns"], (expected + values).ravel(), atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(ours["values"], values.ravel(), atol=1e-5, rtol=1e-5)


def test_rewards_are_scaled_by_the_std_of_the_discounted_return_and_clipped(run_main, monkeypatch):
    seen, gae = [], ppo.compute_gae

    def spy(rewards, *rest):
        seen.append(rewards.clone())
        return gae(rewards, *rest)

    monkeypatch.setattr(ppo, "compute_gae", spy)
    monkeypatch.setattr(ScriptedEnv, "outlier", 11)  # a reward of 1000 in the second of three rollouts
    state = run_main(num_envs=32, num_iterations=3, gamma=0.5, norm_reward=True)
    steps, running, returns = kept(), np.zeros(32), []
    starts, rewards = starts_of(steps["done"]).numpy(), steps["reward"].double().numpy()
    assert starts[1:].any()
    for t in range(24):
        running = 0.5 * running * (1 - starts[t]) + rewards[t]
        returns.append(running)
    for iteration in range(3):
        window = slice(8 * iteration, 8 * iteration + 8)
        scale = np.std(returns[: window.stop])  # of all rollouts so far, this one included
        expected = np.clip(rewards[window] / scale, -10, 10)
        plain = ~steps["truncated"][window].numpy()  # the others include the value beyond the time limit
        np.testing.assert_allclose(seen[iteration].numpy()[plain], expected[plain], rtol=1e-4, atol=1e-5)
        assert (expected == 10).sum() == (iteration == 1)
    assert state["agent"]["return_stats.var"].item() == pytest.approx(np.var(returns), rel=1e-5)


def test_without_reward_scaling_rewards_stay_as_they_are(run_main, monkeypatch):
    seen, gae = [], ppo.compute_gae
    monkeypatch.setattr(
        ppo, "compute_gae", lambda rewards, *rest: (seen.append(rewards.clone()), gae(rewards, *rest))[1]
    )
    run_main(norm_reward=False)
    steps = kept()
    plain = ~steps["truncated"]
    assert torch.equal(torch.cat(seen)[plain], steps["reward"][plain])


class Recording(gym.Env):
    """Observes (which environment, how many steps) and keeps the actions it gets, which must be within 0.1."""

    observation_space, action_space = Box(-np.inf, np.inf, (2,)), Box(-0.1, 0.1, (2,))
    received, made = {}, 0

    def __init__(self):
        self.index, self.clock = Recording.made, 0
        Recording.made += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([self.index, self.clock], np.float32), {}

    def step(self, action):
        Recording.received[self.index, self.clock] = action.copy()
        self.clock += 1
        return np.array([self.index, self.clock], np.float32), 1.0, False, False, {}


def test_the_raw_action_is_learned_from_while_the_environment_gets_it_clipped(run_main, minibatches, monkeypatch):
    spec = gym.envs.registration.EnvSpec("Recording-v0", Recording, max_episode_steps=5)
    monkeypatch.setitem(gym.registry, "Recording-v0", spec)
    monkeypatch.setattr(ppo, "make_env", make_env)
    monkeypatch.setattr(Recording, "received", {})
    monkeypatch.setattr(Recording, "made", 0)
    run_main(env_id="Recording-v0", num_envs=3, norm_obs=False)
    samples = 0
    for minibatch in minibatches:
        assert minibatch.actions.abs().max() > 1.0
        for (index, clock), raw in zip(minibatch.obs.int().tolist(), minibatch.actions.numpy(), strict=True):
            np.testing.assert_array_equal(Recording.received[index, clock], raw.clip(-0.1, 0.1))
            samples += 1
        with torch.no_grad():
            params = minibatch.agent.actor.mlp(minibatch.obs)
        expected = Normal(params, minibatch.agent.std()).log_prob(minibatch.actions).sum(1)
        torch.testing.assert_close(minibatch.logprobs, expected)
    assert samples == len(Recording.received) == 2 * 3 * 8


def test_statistics_are_of_every_observation_trained_on_and_frozen_within_an_iteration(run_main, minibatches):
    state = run_main(norm_obs=True, num_minibatches=2)
    seen = kept()["obs"].view(-1, 5).double()
    torch.testing.assert_close(state["agent"]["normalise.mean"], seen.mean(0))
    torch.testing.assert_close(state["agent"]["normalise.var"], seen.var(0, unbiased=False))
    mean, std = seen[:48].mean(0), seen[:48].std(0, unbiased=False)
    for minibatch in minibatches[2:]:  # the second rollout and update use the first one's
        torch.testing.assert_close(minibatch.agent.normalise.mean, mean)
    expected = ((seen[48:] - mean) / std).clamp(-10, 10).float().sort(0).values
    ours = torch.cat([minibatch.obs for minibatch in minibatches[2:]]).sort(0).values
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_without_normalisation_observations_stay_as_they_are(run_main, minibatches):
    run_main(norm_obs=False)
    observations = kept(0, 8)["obs"]
    assert torch.equal(unshuffled(minibatches[:1], observations)["obs"], observations.view(-1, 5))


def test_environments_are_split_and_begin_at_a_random_phase(run_main):
    state = run_main(num_envs=12)
    assert state["global_step"] == 2 * 12 * 8 and len(ScriptedEnv.kept) == 16
    assert ScriptedEnv.kept[0]["obs"].shape == (12, 5)  # one call steps all environments
    assert ScriptedEnv.resets == [{"random_phase": True}]


def test_what_is_logged_of_the_episodes(run_main):
    run_main(num_iterations=2, log_interval=2)
    [line], steps = SilentLogger.lines, kept()
    returns, lengths, ended = torch.zeros(6), torch.zeros(6), []
    for reward, done in zip(steps["reward"], steps["done"], strict=True):
        returns, lengths = returns + reward, lengths + 1
        ended += list(zip(returns[done].tolist(), lengths[done].tolist(), strict=True))
        returns, lengths = returns * ~done, lengths * ~done
    assert line["charts/episodic_return"] == pytest.approx(np.mean([r for r, _ in ended]), rel=1e-5)
    assert line["charts/episodic_length"] == pytest.approx(np.mean([n for _, n in ended]))
    assert line["env/Episode_term"] == pytest.approx(2 * 8.5) and line["step"] == 2 * 6 * 8
    names = {"policy_loss", "value_loss", "entropy", "old_approx_kl", "approx_kl", "kl", "clipfrac", "grad_norm"}
    assert names <= {name.removeprefix("losses/") for name in line}


# --- minibatches


@pytest.mark.parametrize("lstm", [False, True])
@pytest.mark.parametrize("actions", ACTIONS)
def test_log_probabilities_are_those_of_the_rollout_so_the_first_ratio_is_one(
    run_main, minibatches, monkeypatch, actions, lstm
):
    rollout, sample = [], ppo.Agent.sample

    def spy(self, params):
        action = sample(self, params)
        rollout.append(self.log_prob_and_entropy(params, action)[0].view(-1))
        return action

    monkeypatch.setattr(ppo.Agent, "sample", spy)
    settings = dict(num_minibatches=4, update_epochs=2, learning_rate=5e-3, lstm=lstm)
    run_main(actions, num_envs=8, num_iterations=3, **settings)
    assert len(minibatches) == 3 * 2 * 4 and len(rollout) == 3 * 8
    for iteration in range(3):
        [first, *others] = minibatches[8 * iteration : 8 * iteration + 8]
        observations = first.agent.normalise(kept(8 * iteration, 8 * iteration + 8)["obs"])
        ours = unshuffled([first, *others[:3]], observations)
        expected = torch.stack(rollout[8 * iteration : 8 * iteration + 8]).view(-1)
        torch.testing.assert_close(ours["logprobs"], expected, atol=1e-5, rtol=0)
        with torch.no_grad():
            logprob = first.agent.get_action_and_value(first.obs, first.actions, *first.memory)[1]
        assert ((logprob - first.logprobs).exp() - 1).abs().max() < 1e-5
        assert abs(first.stats["approx_kl"]) < 1e-6 and abs(first.stats["kl"]) < 1e-6 and not first.stats["clipfrac"]
        assert max(m.stats["kl"] for m in others) > 1e-5  # and then it moves
    assert expected.std() > 1e-3


def test_each_epoch_takes_every_sample_once_in_a_new_order(run_main, minibatches):
    run_main(num_iterations=1, num_minibatches=4, update_epochs=2, norm_obs=False)
    assert [len(m.obs) for m in minibatches] == [12] * 8
    observations = kept()["obs"]
    epochs = [torch.cat([m.obs for m in minibatches[i : i + 4]]) for i in (0, 4)]
    for i, epoch in enumerate(epochs):
        unshuffled(minibatches[4 * i : 4 * i + 4], observations)  # each once
        assert not torch.equal(epoch, observations.view(-1, 5))
    assert not torch.equal(*epochs)


def test_minibatches_of_an_lstm_are_whole_sequences_of_distinct_environments(run_main, minibatches):
    run_main(num_envs=8, num_minibatches=4, update_epochs=2, norm_obs=False, lstm=True)
    orders = []
    for iteration in range(2):
        steps = kept(8 * iteration, 8 * iteration + 8)
        starts = starts_of(steps["done"])
        if iteration:
            starts[0] = kept(7, 8)["done"][0]
        for epoch in range(2):
            first = 8 * iteration + 4 * epoch
            order = []
            for minibatch in minibatches[first : first + 4]:
                assert minibatch.obs.shape == (2, 8, 5) and minibatch.state.shape == (2, 4, 8)
                for i in range(2):
                    [index] = (steps["obs"] == minibatch.obs[i][:, None]).all(2).all(0).nonzero().flatten().tolist()
                    assert torch.equal(minibatch.starts[i], starts[:, index])
                    assert torch.equal(minibatch.actions[i], steps["actions"][:, index])
                    order.append(index)
            assert sorted(order) == list(range(8))
            orders.append(order)
    assert orders[0] != orders[1] and orders[2] != orders[3]


@pytest.mark.parametrize("lstm", [False, True])
def test_advantages_are_normalised_per_minibatch(run_main, minibatches, lstm):
    run_main(num_minibatches=2, update_epochs=2, lstm=lstm)
    assert len(minibatches) == 8
    for minibatch in minibatches:
        assert abs(minibatch.advantages.mean()) < 1e-5
        assert abs(minibatch.advantages.std(unbiased=False) - 1) < 1e-4
    minibatches.clear()
    run_main(num_minibatches=2, norm_adv=False, lstm=lstm)
    assert all(abs(m.advantages.std(unbiased=False) - 1) > 1e-2 for m in minibatches)


# --- the update


def test_the_std_rises_again_from_its_floor(run_main, monkeypatch):
    """A log-std that has gone beyond its limits has no gradient, and would be stuck there."""
    calls = []

    def wish(agent, args, minibatch):  # less noise in the first iteration, more in the second
        calls.append(1)
        sign = 1 if len(calls) <= 40 else -1
        return sign * agent.std().log().sum() + 0 * sum(p.sum() for p in agent.parameters()), {"kl": torch.zeros(())}

    monkeypatch.setattr(ppo, "ppo_loss", wish)
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
def test_adaptive_learning_rate(kl, lr, expected):
    assert ppo.adapt_learning_rate(torch.tensor(lr), torch.tensor(kl), 0.01).item() == pytest.approx(expected, rel=1e-6)


def test_main_adapts_the_learning_rate_to_the_kl_of_each_update(run_main, minibatches):
    state = run_main(num_minibatches=2, update_epochs=4, learning_rate=3e-3, desired_kl=0.02)
    rate, rates = torch.tensor(3e-3), []
    for minibatch in minibatches:
        rate = ppo.adapt_learning_rate(rate, torch.tensor(minibatch.stats["kl"]), 0.02)
        rates.append(rate.item())
    assert state["learning_rate"] == rates[-1] and len(set(rates)) > 2
    assert state["optimizer"]["param_groups"][0]["lr"].item() == rates[-1]  # the one Adam reads


def test_the_learning_rate_falls_linearly(run_main):
    state = run_main(num_iterations=4, learning_rate=1e-3)
    rates = [line["charts/learning_rate"] for line in SilentLogger.lines]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert state["optimizer"]["param_groups"][0]["lr"].item() == pytest.approx(2.5e-4)
    run_main(num_iterations=3, learning_rate=1e-3, anneal_lr=False)
    assert [line["charts/learning_rate"] for line in SilentLogger.lines] == pytest.approx([1e-3] * 3)


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
        parameters = [p for p in agent.parameters() if p.requires_grad]
        found = torch.autograd.grad(scale * value, parameters, retain_graph=True)
        directions.append(torch.cat([g.flatten() for g in found]))
        return scale * value, stats

    monkeypatch.setattr(ppo, "ppo_loss", scaled)
    run_main(max_grad_norm=0.5)
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
        return (value * poison, stats) if len(calls) in (2, 5) else (value, stats)

    monkeypatch.setattr(ppo, "ppo_loss", poisoned)
    state = run_main(num_minibatches=2, update_epochs=2, lstm=True)
    assert len(gradients) == 8 and all(torch.isfinite(g).all() for g in gradients)
    assert [bool(g.any()) for g in gradients] == [True, False, True, True, False, True, True, True]
    assert all(torch.isfinite(tensor).all() for tensor in state["agent"].values())
    assert [line["charts/nan_updates"] for line in SilentLogger.lines] == [1, 2]


def test_target_kl_ends_the_epochs(run_main, minibatches):
    settings = dict(num_iterations=1, update_epochs=6, learning_rate=1e-2, num_minibatches=2)
    run_main(**settings, target_kl=1e-4)
    assert len(minibatches) == 2  # the first epoch passed it
    minibatches.clear()
    run_main(**settings, target_kl=0.0)
    assert len(minibatches) == 12


def test_adam_has_epsilon_1e_5(run_main):
    group = run_main()["optimizer"]["param_groups"][0]
    assert group["eps"] == 1e-5 and tuple(group["betas"]) == (0.9, 0.999) and not group["weight_decay"]


@pytest.mark.parametrize("actions", ["box", "multi"])
def test_what_is_compiled_does_the_same(run_main, monkeypatch, actions):
    compiled, torch_compile = [], torch.compile

    def without_a_compiler(function):  # traced and taken apart like for a compiler, then run as it is
        compiled.append(function.__name__)
        return torch_compile(function, backend="eager")

    def sometimes_bad(agent, args, minibatch):  # about every third minibatch
        value, stats = loss(agent, args, minibatch)
        return value * torch.where(minibatch["obs"][0, 0] > 0.5, math.nan, 1.0), stats

    loss = ppo.ppo_loss
    monkeypatch.setattr(torch, "compile", without_a_compiler)
    monkeypatch.setattr(ppo, "ppo_loss", sometimes_bad)
    settings = dict(num_minibatches=4, update_epochs=3, learning_rate=3e-3, desired_kl=0.02, max_grad_norm=0.1)
    eager = run_main(actions, **settings)
    bad = SilentLogger.lines[-1]["charts/nan_updates"]
    assert not compiled and 0 < bad < 24
    traced = run_main(actions, **settings, compile=True)
    assert compiled == ["policy", "update"] and SilentLogger.lines[-1]["charts/nan_updates"] == bad
    assert traced["learning_rate"] == pytest.approx(eager["learning_rate"]) != pytest.approx(3e-3)
    for name, tensor in eager["agent"].items():
        torch.testing.assert_close(traced["agent"][name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    for name, tensor in eager["optimizer"]["state"][0].items():
        torch.testing.assert_close(traced["optimizer"]["state"][0][name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_without_a_compiler_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as end:
        ppo.check_args(ppo.Args(compile=True, device="cpu", ranks=1))
    assert end.value.code == 2 and "there is no no-such-compiler" in capsys.readouterr().err


# --- several ranks

ROBOTS = dict(num_envs=8, num_iterations=3, update_epochs=3, gamma=0.9, norm_reward=True, desired_kl=0.01)
TRAININGS = {"mlp": ROBOTS, "lstm": ROBOTS | {"lstm": True}, "poisoned": ROBOTS}


def train(name, folder, replace=setattr):
    """One training whose noise does not depend on how the robots are split; what this rank saw goes into a file."""
    seen, loss, draws = {"advantages": []}, REAL_LOSS, []
    (folder / name).mkdir(exist_ok=True)
    stand_in(replace)

    def sample(self, params):
        draws.append(1)
        return params + self.std() * rows_of_this_rank(torch.randn, len(draws), *params.shape[-2:])

    def spy(agent, args, minibatch):
        seen["advantages"].append(minibatch["advantages"].clone())
        value, stats = loss(agent, args, minibatch)
        bad = name == "poisoned" and len(seen["advantages"]) == 3 and os.environ.get("RANK") == "1"
        return value * (math.nan if bad else 1.0), stats

    replace(ppo.Agent, "sample", sample)
    replace(ppo, "ppo_loss", spy)
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
    ppo.main(ppo.Args(**TINY | TRAININGS[name] | {"ranks": ranks, "log_dir": str(folder / name)}))
    torch.save(seen | {"lines": SilentLogger.lines}, folder / name / f"rank{rank}.pt")


REAL_LOSS = ppo.ppo_loss


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    """{(training, ranks): (final checkpoint, [what each rank saw])}."""
    one, two, runs = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two"), {}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, __file__, str(two), name], env=environment) for name in TRAININGS]
    with pytest.MonkeyPatch.context() as patch, process_restored():
        for name in ("mlp", "lstm"):
            train(name, one, patch.setattr)
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    for folder, ranks in ((one, 1), (two, 2)):
        for run in folder.iterdir():
            state = checkpoint.load(run / "checkpoints" / "final_model.pt", ppo.SCRIPT)
            runs[run.name, ranks] = state, [torch.load(run / f"rank{rank}.pt") for rank in range(ranks)]
    return runs


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_two_ranks_of_n_robots_equal_one_rank_of_2n(by_ranks, name):
    (one, [whole]), (two, halves) = by_ranks[name, 1], by_ranks[name, 2]
    assert len(two["ranks"]) == 2 and one["global_step"] == two["global_step"] == 3 * 8 * 8
    for key, tensor in one["agent"].items():
        torch.testing.assert_close(two["agent"][key], tensor, atol=2e-6, rtol=1e-5, msg=key)
    rates = [state["optimizer"]["param_groups"][0]["lr"].item() for state in (one, two)]
    assert rates[1] == pytest.approx(rates[0], rel=1e-6)
    assert rates[0] != pytest.approx(3e-4)  # it has adapted
    # The advantages are those of the same samples in another order, and different on each rank.
    assert len(whole["advantages"]) == 9
    for a, b, c in zip(whole["advantages"], *(half["advantages"] for half in halves), strict=True):
        both = torch.cat((b.flatten(), c.flatten()))
        torch.testing.assert_close(both.sort().values, a.flatten().sort().values, atol=1e-3, rtol=1e-3)
        assert abs(both.mean()) < 1e-5 and abs(both.std(unbiased=False) - 1) < 1e-4
        assert abs(b.mean()) > 1e-3  # normalised over all ranks, not each for itself
    # What is logged is of all robots.
    assert len(whole["lines"]) == 3 and not halves[1]["lines"]
    shared = ("charts/episodic", "charts/learning", "losses/grad")
    for alone, together in zip(whole["lines"], halves[0]["lines"], strict=True):
        names = [key for key in alone if key.startswith(shared)]
        assert len(names) == 4
        for key in names:
            assert together[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-5), key


def test_a_bad_gradient_of_one_rank_is_dropped_by_all(by_ranks):
    state, halves = by_ranks["poisoned", 2]
    assert all(torch.isfinite(tensor).all() for tensor in state["agent"].values())
    assert halves[0]["lines"][-1]["charts/nan_updates"] == 2  # one update, counted by two ranks
    assert by_ranks["mlp", 2][1][0]["lines"][-1]["charts/nan_updates"] == 0


# --- evaluation and export


class Unequal:
    """Environment i plays episodes of i + 1 steps, each step with reward 10; it observes (its step, a secret)."""

    num_envs, device, policy_dim = 3, "cpu", 1

    def reset(self, seed=None, options=None):
        self.seed, self.step_count = seed, torch.zeros(3)
        return self._obs(), {}

    def _obs(self):
        return torch.stack((self.step_count, torch.full((3,), math.nan)), 1)

    def step(self, actions):
        self.step_count += 1
        done = self.step_count > torch.arange(3)
        info = {"episode": {"r": 10 * self.step_count.clone(), "l": self.step_count.clone()}}
        self.step_count = self.step_count * ~done
        return self._obs(), torch.full((3,), 10.0), done, torch.zeros_like(done), info


def test_evaluation_counts_as_many_episodes_of_each_environment():
    envs, seen = Unequal(), []

    def policy(obs):
        seen.append(obs)
        return torch.zeros(3)

    result = evaluate(policy, envs, 7, seed=5)
    # Nine episodes: three of 1, three of 2 and three of 3 steps; the first seven would have been shorter.
    assert result["episodes"] == 9 and envs.seed == result["seed"] == 5 and len(seen) == 9
    assert result["mean_length"] == 2.0 and result["mean_return"] == 20.0
    half = 1.96 * np.std([10, 20, 30] * 3, ddof=1) / 3
    assert result["return_ci95"] == pytest.approx([20 - half, 20 + half])
    assert all(obs.shape == (3, 1) for obs in seen)  # the policy's part alone


def test_evaluation_begins_each_episode_with_a_zero_state():
    seen = []

    def policy(obs, state):
        seen.append((obs[:, 0].clone(), state.clone()))
        return torch.zeros(3), state + 1

    evaluate(policy, Unequal(), 3, seed=1, state=torch.zeros(2, 3, 4))
    assert len(seen) == 3
    for step, state in seen:
        assert torch.equal(state, step[None, :, None].expand(2, 3, 4))


@pytest.mark.parametrize("lstm", [False, True])
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1", "CartPoleMultiDiscrete-v0"])
def test_onnx_is_the_policy_with_its_normaliser_and_its_memory(tmp_path, env_id, lstm):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    args = ppo.Args(env_id=env_id, device="cpu", lstm=lstm, hidden=(16,), lstm_size=8, history=2)
    envs = ppo.make(args, 3, 1)
    agent = shaken(ppo.Agent(envs, args), 0.7)
    agent.normalise.update(torch.tensor(2.0) + 0.3 * torch.randn(100, agent.obs_dim))
    ppo.export(agent, tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"])
    obs, _ = envs.reset(seed=3)
    state = memory = agent.zero_state(3)

    def both(obs, *state):
        """The policy's outputs, after those of the file have been compared with them."""
        with torch.no_grad():
            expected = agent(obs, *state)
        expected = expected if state else (expected,)
        inputs = dict(zip(("obs", "state"), (obs.numpy(), *(s.numpy() for s in state)), strict=False))
        for ours, theirs in zip(session.run(None, inputs), expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-5, rtol=1e-5)
        return expected

    for _ in range(25):
        action, *memory = both(obs, *([state] if lstm else []))
        both(obs[:1], *([state[:, :1]] if lstm else []))  # another batch size
        obs, _, terminated, truncated, _ = envs.step(action)
        state = memory[0] * ~(terminated | truncated)[:, None] if lstm else None
    envs.close()

    wide, state = 2 + torch.randn(300, agent.policy_dim), torch.randn(2, 300, 8)
    actions = both(wide, *([state] if lstm else []))[0].float()
    with torch.no_grad():
        raw, _ = agent.actor(wide, state.transpose(0, 1), torch.zeros(300)) if lstm else agent.actor(wide)
    assert actions.std(0).max() > 0.05
    assert (actions - agent.mode(raw).view_as(actions)).abs().max() > 1e-2  # without the normaliser it is another


def test_export_leaves_the_policy_on_its_device(tmp_path, monkeypatch):
    """The evaluation that follows goes on where training was."""
    moved, agent = [], make_agent()
    monkeypatch.setattr(torch.nn.Module, "cpu", lambda module: moved.append(module) or module)
    ppo.export(agent, tmp_path / "policy.onnx")
    assert (tmp_path / "policy.onnx").exists() and not any(module is agent for module in moved)


# --- settings


@pytest.mark.parametrize(
    ("env_id", "preset"),
    [
        ("HalfCheetah-v5", "mujoco"),
        ("Ant-v4", "mujoco"),
        ("Humanoid-v4", "mujoco-humanoid"),
        ("CartPole-v1", "classic"),
        ("CartPoleMultiDiscrete-v0", "classic"),
        ("CartPoleMasked-v0", "memory"),
        ("Isaac-Cartpole-Direct", "isaac-cartpole"),
        ("Mjlab-Cartpole-Balance", "mjlab-cartpole"),
        ("Isaac-Ant-v0", "isaac-ant"),
        ("Isaac-Humanoid-Direct-v0", "isaac-humanoid"),
        ("Isaac-Velocity-Flat-Unitree-Go2-v0", "isaac"),
        ("IsaacContrib-Reach-v0", "isaac"),
        ("Mjlab-Velocity-Flat-Unitree-Go1", "isaac"),
    ],
)
def test_the_tasks_id_chooses_the_preset_and_every_flag_overrides_it(env_id, preset):
    def parse(*argv):
        return cli.parse_args(ppo.Args, ppo.PRESETS, ppo.default_preset, argv=["--env-id", env_id, *argv])

    assert parse() == ppo.Args(env_id=env_id, **ppo.PRESETS[preset] | {"preset": preset})
    assert parse("--num-steps", "7", "--hidden", "5").num_steps == 7
    assert parse("--hidden", "5", "6", "--no-norm-obs").hidden == (5, 6)


def test_presets_name_settings():
    names = set(ppo.Args.__dataclass_fields__)
    assert all(set(preset) <= names for preset in ppo.PRESETS.values()) and {*checkpoint.NOT_SAVED} <= names
    assert set(ppo.TASKS.values()) <= set(ppo.PRESETS)


def test_isaac_cartpole_is_rsl_rls_to_the_letter():
    args = cli.parse_args(ppo.Args, ppo.PRESETS, ppo.default_preset, argv=["--env-id", "Isaac-Cartpole-Direct"])
    letter = dict(num_envs=4096, num_steps=16, num_iterations=150, total_timesteps=0, learning_rate=1e-3)
    letter |= dict(desired_kl=0.01, gamma=0.99, gae_lambda=0.95, num_minibatches=4, update_epochs=5, clip_coef=0.2)
    letter |= dict(clip_vloss=True, vf_coef=2.0, ent_coef=0.005, max_grad_norm=1.0, hidden=(32, 32), activation="elu")
    letter |= dict(init_std=1.0, norm_obs=False, norm_reward=False, norm_adv=True)
    assert {name: getattr(args, name) for name in letter} == letter


def test_the_environments_settings_reach_the_environment(monkeypatch):
    got = {}

    def spy(env_id, num_envs, device, seed, **settings):
        got.update(settings | {"env_id": env_id, "num_envs": num_envs, "device": device, "seed": seed})

    monkeypatch.setattr(ppo, "make_env", spy)
    settings = dict(physics="p", clip_actions=2.5, history=3, launcher_args=("--headless",))
    ppo.make(ppo.Args(env_id="Isaac-X", device="cpu", **settings), 5, 9, video_dir="v")
    assert got == settings | {"env_id": "Isaac-X", "num_envs": 5, "device": "cpu", "seed": 9, "video_dir": "v"}


def test_every_setting_is_read():
    """Somewhere a line reads `args.name`; or it goes to the environment, as the test above sees."""
    read = {"physics", "clip_actions", "history", "launcher_args"}
    for path in (ROOT / "ppo_continuous_isaac.py", *(ROOT / "common").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                read |= {node.attr} if owner == "args" else set()
    assert [name for name in ppo.Args.__dataclass_fields__ if name not in read] == []


def test_every_setting_is_documented():
    assert undocumented(ROOT / "ppo_continuous_isaac.py", "Args") == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.launch(lambda folder: train(sys.argv[2], folder), Path(sys.argv[1]), 2)
