"""What the learner of ppo_continuous_isaac.py promises beyond test_ppo_scripts.py: discrete actions, LSTMs, scaled
rewards, evaluation, export, presets.
"""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from harness import (
    ACTIONS,
    SCRIPTS,
    ScriptedEnv,
    SilentLogger,
    advantages_by_definition,
    kept,
    shaken,
    unshuffled,
)
from torch.distributions import Categorical, Normal, kl_divergence

import ppo_continuous_isaac as ppo
from common import cli
from common.envs.isaac import make_env
from common.envs.isaac_eval import evaluate

pytestmark = pytest.mark.usefixtures("restored")


@pytest.fixture
def script():
    return SCRIPTS["ppo_continuous_isaac"]


def starts_of(done, first=True):
    """(T, N): 1 where an episode begins with the step."""
    return torch.cat((torch.full_like(done[:1], first), done[:-1])).float()


def make_agent(actions="box", obs_dim=4, policy_dim=None, critic_dim=None, **settings):
    script = replace(SCRIPTS["ppo_continuous_isaac"], spaces={"policy_dim": policy_dim, "critic_dim": critic_dim})
    return script.agent(obs_dim, actions, **{"lstm_size": 8} | settings)


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


@pytest.mark.parametrize("actions", ["discrete", "multi"])
def test_kl_of_discrete_components_is_exact(actions):
    agent = make_agent(actions)
    old, new = torch.randn(20, agent.dist_dim), torch.randn(20, agent.dist_dim)
    parts = zip(old.split(agent.nvec, 1), new.split(agent.nvec, 1), strict=True)
    expected = sum(kl_divergence(Categorical(logits=a), Categorical(logits=b)) for a, b in parts)
    assert expected.min() > 1e-3
    torch.testing.assert_close(agent.kl(old, None, new), expected)


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


# --- rollout, bootstrap and advantages


@pytest.mark.parametrize("norm_obs", [False, True])
def test_time_limits_of_an_lstm_are_bootstrapped_from_its_state(run_main, minibatches, norm_obs):
    run_main(lstm=True, norm_obs=norm_obs, norm_adv=False, gamma=0.9, gae_lambda=0.8)
    assert len(minibatches) == 2 and len(ScriptedEnv.kept) == 16
    state, begin = torch.zeros(2, 6, 8), torch.ones(6)
    for iteration, minibatch in enumerate(minibatches):
        steps = kept(8 * iteration, 8 * iteration + 8)
        agent = minibatch.agent  # as it was during the rollout
        starts = torch.cat((begin[None], steps["done"][:-1].float()))
        with torch.no_grad():
            observations = agent.normalise(steps["obs"])
            following = agent.normalise(torch.where(steps["done"][..., None], steps["final_obs"], steps["next_obs"]))
            values, states = lstm_by_hand(agent.critic, observations, state, starts)
            after = [
                lstm_by_hand(agent.critic, x[None], s, torch.zeros(1, 6))[0][0]
                for x, s in zip(following, states, strict=True)
            ]
            values, next_values = values[..., 0], torch.stack(after)[..., 0]
        state, begin = states[-1], steps["done"][-1].float()
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


def test_what_the_task_logs_itself_is_logged(run_main):
    run_main(num_iterations=2, log_interval=2)
    [line] = SilentLogger.lines
    assert line["env/Episode_term"] == pytest.approx(2 * 8.5)


# --- minibatches


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
    half = 2.306 * np.std([10, 20, 30] * 3, ddof=1) / 3
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


def test_tasks_name_presets():
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
