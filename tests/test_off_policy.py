"""SAC and DDPG: the replay buffer against one in plain Python, critics' targets by hand, what main() learns from."""

import ast
import copy
import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from harness import ROOT, SCRIPTS, SilentLogger, kept
from helpers import ALWAYS, check_sentence, run, undocumented
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from common import checkpoint

NAMES = [name for name in SCRIPTS if not name.startswith("ppo_")]


@pytest.fixture(params=NAMES)
def script(request):
    return SCRIPTS[request.param]


@pytest.fixture(scope="module")
def sac():
    return importlib.import_module("sac_real2sim_mjx")


def agent_of(module, low=(-1.0, -1.0), high=(1.0, 1.0), **settings):
    torch.manual_seed(0)
    space = Box(np.array(low, np.float32), np.array(high, np.float32))
    envs = SimpleNamespace(single_observation_space=Box(-1, 1, (3,)), single_action_space=space)
    args = module.Args(**{"hidden": (8,), "norm_obs": False} | settings)
    return module.Agent(envs, args), args


# --- the replay buffer


class SlowReplay:
    """Every environment's history as a list of steps; windows are followed step by step."""

    def __init__(self, num_envs):
        self.steps = [[] for _ in range(num_envs)]

    def add(self, obs, actions, rewards, terminated, truncated, following):
        for i, steps in enumerate(self.steps):
            step = dict(obs=obs[i], action=actions[i], reward=rewards[i].item(), next_obs=following[i])
            steps.append(step | dict(terminated=bool(terminated[i]), truncated=bool(truncated[i])))

    def returns(self, env, first, n_step, gamma):
        steps, total, k = self.steps[env], 0.0, 0
        while True:
            step = steps[first + k]
            total += gamma**k * step["reward"]
            k += 1
            if step["terminated"] or step["truncated"] or k == n_step or first + k == len(steps):
                discount = 0.0 if step["terminated"] else gamma**k
                return dict(returns=total, discounts=discount, next_obs=step["next_obs"])


def filled(module, num_envs=3, capacity=12, steps=31, ends=0.2, seed=0):
    """A buffer and its slow twin after the same steps, whose observations are all different numbers."""
    rng = torch.Generator().manual_seed(seed)
    fast, slow = module.Replay(num_envs, capacity, 1, 2, "cpu"), SlowReplay(num_envs)
    obs = torch.rand(num_envs, 1, generator=rng)
    for _ in range(steps):
        next_obs, final_obs = torch.rand(2, num_envs, 1, generator=rng)
        how = torch.rand(num_envs, generator=rng)
        terminated, truncated = how < ends, (how >= ends) & (how < 2 * ends)
        following = torch.where(truncated[:, None], final_obs, next_obs)
        actions, rewards = torch.rand(num_envs, 2, generator=rng), torch.rand(num_envs, generator=rng)
        for replay in (fast, slow):
            replay.add(obs, actions, rewards, terminated, truncated, following)
        obs = next_obs
    return fast, slow


@pytest.mark.parametrize(("steps", "ends"), [(1, 0.5), (5, 0.0), (11, 0.2), (12, 0.0), (31, 0.0), (31, 0.2), (40, 0.5)])
@pytest.mark.parametrize("n_step", [1, 3, 5])
def test_every_kept_step_has_the_return_of_the_slow_reference(script, steps, ends, n_step):
    """Cut at the end of the episode, at a time limit, and at the newest step; also once the ring has come round."""
    fast, slow = filled(script.ppo, steps=steps, ends=ends)
    for env, history in enumerate(slow.steps):
        written = int(fast.written[env])
        assert written == len(history) + sum(step["truncated"] for step in history)
        slots = torch.arange(written - min(written, fast.capacity - 1), written)
        found = fast.returns(torch.full_like(slots, env), slots, n_step, 0.9)
        known = {step["obs"].item(): i for i, step in enumerate(history)}
        seen = []
        for row in range(len(slots)):
            value = found["obs"][row].item()
            if found["weights"][row] == 0:
                assert value not in known  # a true last observation, which begins no step
                continue
            first = known[value]
            expected = slow.returns(env, first, n_step, 0.9)
            seen.append(first)
            assert found["returns"][row].item() == pytest.approx(expected["returns"], rel=1e-5)
            assert found["discounts"][row].item() == pytest.approx(expected["discounts"], rel=1e-5)
            assert torch.equal(found["actions"][row], history[first]["action"])
            if expected["discounts"]:
                assert torch.equal(found["next_obs"][row], expected["next_obs"])
        assert seen == list(range(len(history) - len(seen), len(history)))  # the newest ones, in order
        assert len(seen) + (found["weights"] == 0).sum() == min(written, fast.capacity - 1)


def test_samples_are_drawn_evenly_from_the_steps_that_are_kept(script):
    torch.manual_seed(0)
    fast, slow = filled(script.ppo)
    found = fast.sample(60_000, 1, 0.9)
    values, counts = found["obs"][found["weights"] > 0].flatten().unique(return_counts=True)
    everything = {step["obs"].item() for history in slow.steps for step in history}
    oldest = {step["obs"].item() for history in slow.steps for step in history[:15]}
    assert set(values.tolist()) <= everything - oldest
    slots = 3 * (fast.capacity - 1)
    assert len(values) == int(sum(fast.is_step[i].sum() for i in range(3))) <= slots
    expected = 60_000 / slots
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)  # five standard deviations


def test_a_buffer_that_has_one_step_gives_it(script):
    fast, slow = filled(script.ppo, steps=1, ends=0.0)
    found = fast.sample(50, 3, 0.9)
    first = torch.stack([history[0]["obs"] for history in slow.steps])
    assert set(found["obs"].flatten().tolist()) == set(first.flatten().tolist())
    assert found["weights"].all() and torch.allclose(found["discounts"], torch.tensor(0.9))


@pytest.mark.parametrize("steps", [4, 31])
def test_a_restored_buffer_gives_the_same_samples_and_goes_on_alike(script, steps):
    fast, _ = filled(script.ppo, steps=steps)
    again = script.ppo.Replay(3, 12, 1, 2, "cpu")
    state = fast.state_dict()
    assert state["obs"].shape[1] == min(int(fast.written.max()) + 1, 12)  # nothing that was never written
    again.load_state_dict(copy.deepcopy(state))
    for replay in (fast, again):
        more = torch.full((3,), 0.5)
        replay.add(more[:, None], torch.ones(3, 2), more, more > 1, more < 1, more[:, None])
    samples = []
    for replay in (fast, again):
        torch.manual_seed(3)
        samples.append(replay.sample(200, 3, 0.9))
    assert all(torch.equal(samples[0][name], samples[1][name]) for name in samples[0])


# --- critics


def test_the_projection_onto_atoms_by_hand(script):
    atoms = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    moved = torch.tensor([[-3.0, 0.25, 1.0, 9.0], [0.5, 0.5, 2.0, -1.0]])
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.5, 0.1, 0.3, 0.1]])
    expected = torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.1, 0.3, 0.3, 0.3]])
    torch.testing.assert_close(script.ppo.project(atoms, moved, probs), expected)


def test_the_projection_keeps_the_mean_within_the_atoms(script):
    atoms = torch.linspace(-10, 10, 101)
    moved = atoms * 0.7 + 2 * torch.rand(50, 1) - 1
    probs = torch.rand(50, 101).softmax(-1)
    projected = script.ppo.project(atoms, moved, probs)
    torch.testing.assert_close(projected.sum(-1), torch.ones(50))
    torch.testing.assert_close((projected * atoms).sum(-1), (probs * moved).sum(-1), atol=1e-4, rtol=1e-4)


class FixedCritics(SimpleNamespace):
    """An agent of two critics whose outputs are given."""

    def expected(self, outputs):
        return (outputs.softmax(-1) * self.atoms).sum(-1) if self.atoms is not None else outputs.squeeze(-1)

    def get_next_action(self, obs):
        return obs, self.cost


def critics_of(outputs, next_outputs, cost, atoms=None):
    outputs, next_outputs = (torch.as_tensor(x, dtype=torch.float32).requires_grad_() for x in (outputs, next_outputs))
    critics, target = (lambda obs, actions: outputs), (lambda obs, actions: next_outputs)
    agent = FixedCritics(critics=critics, target_critics=target, cost=torch.tensor(cost), atoms=atoms)
    return agent, outputs


MINIBATCH = dict(returns=torch.tensor([1.0, 2.0, 3.0]), discounts=torch.tensor([0.9, 0.0, 0.5]), obs=torch.zeros(3, 1))
MINIBATCH |= dict(actions=None, next_obs=torch.zeros(3, 1), weights=torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize(("aggregation", "next_value"), [("min", 4.0), ("mean", 7.0)])
def test_targets_and_the_loss_of_the_critics_by_hand(script, aggregation, next_value):
    args = script.ppo.Args(critic_aggregation=aggregation, distributional=False, reward_scale=2.0)
    outputs = [[[1.0], [5.0], [0.0]], [[3.0], [2.0], [0.0]]]
    agent, outputs = critics_of(outputs, [[[4.0], [9.0], [9.0]], [[10.0], [9.0], [9.0]]], [0.5, 0.5, 0.5])
    loss, stats = script.ppo.critic_loss(agent, args, MINIBATCH)
    first = 2 * 1.0 + 0.9 * (next_value - 0.5)
    second = 2 * 2.0  # the episode ended
    expected = ((1 - first) ** 2 + (5 - second) ** 2 + (3 - first) ** 2 + (2 - second) ** 2) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # the third is no step and counts for nothing
    loss.backward()
    slopes = torch.tensor([[1 - first, 5 - second, 0.0], [3 - first, 2 - second, 0.0]])
    torch.testing.assert_close(outputs.grad.squeeze(-1), slopes)
    assert stats["qf_loss"] == loss


@pytest.mark.parametrize("aggregation", ["min", "mean"])
def test_the_distributional_target_by_hand(script, aggregation):
    args = script.ppo.Args(critic_aggregation=aggregation, distributional=True, reward_scale=1.0)
    atoms = torch.tensor([0.0, 1.0, 2.0, 3.0])
    low, high = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.1, 0.7])
    next_outputs = torch.stack((high.log().expand(3, 4), low.log().expand(3, 4)))
    outputs = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    agent, _ = critics_of(outputs, next_outputs, [0.0, 0.0, 0.0], atoms)
    minibatch = MINIBATCH | {"discounts": torch.tensor([0.5, 0.0, 0.5]), "returns": torch.tensor([1.0, 2.0, 3.0])}
    loss, _ = script.ppo.critic_loss(agent, args, minibatch)
    p = low if aggregation == "min" else (low + high) / 2
    # 1 + 0.5 * (0, 1, 2, 3) = 1, 1.5, 2, 2.5
    first = torch.tensor([0.0, p[0] + p[1] / 2, p[1] / 2 + p[2] + p[3] / 2, p[3] / 2])
    second = torch.tensor([0.0, 0.0, 1.0, 0.0])
    logs = outputs.log_softmax(-1)
    expected = -sum((first * logs[c, 0]).sum() + (second * logs[c, 1]).sum() for c in range(2)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("distributional", [False, True])
def test_values_are_the_least_or_the_mean_of_the_critics(script, distributional):
    obs, actions = torch.randn(5, 3), torch.rand(5, 2)
    settings = dict(distributional=distributional, v_min=-3.0, v_max=3.0, num_atoms=7)
    agent, _ = agent_of(script.ppo, critic_aggregation="min", **settings)
    outputs = agent.critics(obs, actions)
    assert outputs.shape == (2, 5, 7 if distributional else 1)
    values = (outputs.softmax(-1) * torch.linspace(-3, 3, 7)).sum(-1) if distributional else outputs[..., 0]
    assert (values[0] - values[1]).abs().min() > 1e-5
    torch.testing.assert_close(agent.get_value(obs, actions), values.min(0).values)
    agent, _ = agent_of(script.ppo, critic_aggregation="mean", **settings)
    torch.testing.assert_close(agent.get_value(obs, actions), values.mean(0))


def test_target_critics_follow_by_tau(script):
    agent, _ = agent_of(script.ppo)
    before = [p.clone() for p in agent.target_critics.parameters()]
    for p in agent.critics.parameters():
        p.data += 1.0
    agent.update_targets(0.25)
    for old, new in zip(before, agent.target_critics.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)
        assert not new.requires_grad


# --- the actor of SAC


def test_the_log_probability_is_that_of_a_gaussian_squashed_by_tanh(sac):
    agent, _ = agent_of(sac)
    obs = 3 * torch.randn(200, 3)
    actions, logprob = agent.get_action(obs)
    mean, std = agent.get_dist(obs)
    expected = TransformedDistribution(Independent(Normal(mean, std), 1), TanhTransform(cache_size=0))
    inside = (actions.abs() < 0.999).all(1)
    assert inside.sum() > 50 and actions.abs().max() <= 1
    torch.testing.assert_close(logprob[inside], expected.log_prob(actions[inside]), atol=2e-3, rtol=1e-3)


def test_the_std_stays_within_its_limits(sac):
    agent, args = agent_of(sac, log_std_min=-3.0, log_std_max=1.0)
    with torch.no_grad():
        agent.actor[-1].bias[2:] = torch.tensor([-100.0, 100.0])
    std = agent.get_dist(torch.zeros(1, 3))[1]
    torch.testing.assert_close(std, torch.tensor([[math.exp(-3), math.exp(1)]]))


def test_actions_reach_the_bounds_of_the_environment(script):
    agent, _ = agent_of(script.ppo, low=(-2.0, 0.0), high=(2.0, 1.0))
    ends = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(agent.to_env(ends), torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.0, 0.5]]))
    obs = 100 * torch.randn(500, 3)
    actions = agent(obs)
    assert actions[:, 0].abs().max() <= 2 and actions[:, 1].min() >= 0 and actions[:, 1].max() <= 1
    unbounded, _ = agent_of(script.ppo, low=(-np.inf, -1.0), high=(np.inf, 1.0))
    torch.testing.assert_close(unbounded.to_env(ends), ends)


def test_the_losses_of_actor_and_temperature_by_hand(sac):
    agent, args = agent_of(sac, alpha=0.3, target_entropy=-0.7)
    obs = torch.randn(64, 3)
    torch.manual_seed(1)
    loss, alpha_loss, stats = sac.actor_loss(agent, args, {"obs": obs})
    torch.manual_seed(1)
    actions, logprob = agent.get_action(obs)
    values = agent.critics(obs, actions).squeeze(-1).min(0).values
    assert loss.item() == pytest.approx((0.3 * logprob - values).mean().item(), rel=1e-4)
    assert stats["entropy"].item() == pytest.approx(-logprob.mean().item(), rel=1e-4)
    # The slope in log alpha: alpha times how far the entropy lies above the target, here 2 x -0.7.
    [slope] = torch.autograd.grad(alpha_loss, agent.log_alpha)
    assert slope.item() == pytest.approx(0.3 * (-logprob.mean().item() + 1.4), rel=1e-4)
    assert not torch.autograd.grad(loss, agent.log_alpha, allow_unused=True)[0]


def test_the_entropy_belongs_to_the_value_beyond(sac):
    agent, _ = agent_of(sac, alpha=0.3)
    obs = torch.randn(10, 3)
    torch.manual_seed(1)
    actions, cost = agent.get_next_action(obs)
    torch.manual_seed(1)
    again, logprob = agent.get_action(obs)
    assert torch.equal(actions, again)
    torch.testing.assert_close(cost, 0.3 * logprob)


# --- the actor of DDPG


def test_the_actor_of_ddpg_by_hand():
    ddpg = importlib.import_module("ddpg_real2sim_mjx")
    agent, args = agent_of(ddpg)
    obs = torch.randn(16, 3)
    loss, stats = ddpg.actor_loss(agent, args, {"obs": obs})
    actions = agent.actor(obs).tanh()
    assert loss.item() == pytest.approx(-agent.critics(obs, actions).amin(0).mean().item(), rel=1e-5)
    assert torch.equal(agent(obs), actions)  # what is evaluated has no noise
    with torch.no_grad():
        for p in agent.actor.parameters():
            p += 0.3
    next_actions, cost = agent.get_next_action(obs)
    assert torch.equal(next_actions, actions) and not cost.any()  # the target actor is as the actor was
    agent.update_target_actor(1.0)
    assert torch.equal(agent.get_next_action(obs)[0], agent.actor(obs).tanh())


def test_every_environment_of_ddpg_has_a_noise_of_its_own(script, run_ddpg, monkeypatch):
    monkeypatch.setattr(script.ppo.Agent, "get_action", lambda self, obs: 0 * self.actor(obs))
    run_ddpg(num_steps=300, num_iterations=1, learning_starts=0, noise_min=0.0, noise_max=0.4)
    noise = kept()["actions"].std(0).mean(-1)
    torch.testing.assert_close(noise, torch.linspace(0, 0.4, 6), atol=0.03, rtol=0)
    assert kept()["actions"].abs().max() == 1.0  # clipped


# --- main()


@pytest.fixture
def run_ddpg(script, run_main):
    """`run_main`, for the script with noise of its own."""
    if script.name != "ddpg_real2sim_mjx":
        pytest.skip("its noise is learned")
    return run_main


@pytest.fixture
def run_sac(script, run_main):
    """`run_main`, for the script with a temperature."""
    if script.name != "sac_real2sim_mjx":
        pytest.skip("it has no temperature")
    return run_main


@pytest.fixture
def spied(script, monkeypatch):
    """What main() gives its buffer, and with which minibatches it updates what, in order."""
    adds, updates = [], []
    add, of_critics, of_actor = script.ppo.Replay.add, script.ppo.critic_loss, script.ppo.actor_loss

    def spy_add(self, *step):
        adds.append([x.clone() for x in step])
        add(self, *step)

    def spy_critics(agent, args, minibatch):
        updates.append(("critics", len(adds), copy.deepcopy(agent), minibatch))
        return of_critics(agent, args, minibatch)

    def spy_actor(agent, args, minibatch):
        updates.append(("actor", len(adds), None, minibatch))
        return of_actor(agent, args, minibatch)

    monkeypatch.setattr(script.ppo.Replay, "add", spy_add)
    monkeypatch.setattr(script.ppo, "critic_loss", spy_critics)
    monkeypatch.setattr(script.ppo, "actor_loss", spy_actor)
    return adds, updates


def test_the_buffer_gets_every_step_and_the_true_last_observation_of_a_truncated_one(script, run_main, spied):
    run_main()
    adds, _ = spied
    steps = kept()
    obs, actions, rewards, terminated, truncated, following = (torch.stack(parts) for parts in zip(*adds, strict=True))
    assert torch.equal(obs, steps["obs"]) and torch.equal(rewards, steps["reward"])
    assert torch.equal(actions, steps["actions"])  # ScriptedEnv's bounds are -1 and 1
    assert torch.equal(terminated, steps["terminated"]) and torch.equal(truncated, steps["truncated"])
    assert truncated.sum() == 10
    assert torch.equal(following[truncated], steps["final_obs"][truncated])
    assert torch.equal(following[~truncated], steps["next_obs"][~truncated])


def test_updates_begin_after_the_random_steps_and_are_as_many_as_was_said(script, run_main, spied):
    run_main(num_envs=6, num_steps=8, num_iterations=2, learning_starts=30, updates_per_step=3, policy_frequency=2)
    _, updates = spied
    assert [at for _, at, *_ in updates][0] == 5  # 5 steps of 6 robots
    critics = [at for what, at, *_ in updates if what == "critics"]
    assert critics == [at for at in range(5, 17) for _ in range(3)]
    order = [what for what, *_ in updates]
    assert order == ["critics", "critics", "actor"] * 18
    assert len(updates[0][3]["obs"]) == 16  # --batch-size


def test_a_policy_to_begin_with_acts_from_the_first_step(script, run_main, monkeypatch):
    state = run_main()

    def at_random(*args):
        raise LookupError

    monkeypatch.setattr(torch, "rand_like", at_random)
    with pytest.raises(LookupError):
        run_main()
    again = run_main(model_path=f"{state['args']['log_dir']}/checkpoints/final_model.pt", learning_starts=70)
    assert again["ranks"][0]["steps_at_random"] == 0  # as a resumed run must know
    assert not torch.equal(again["agent"]["actor.0.weight"], state["agent"]["actor.0.weight"])


def test_samples_are_normalised_by_the_statistics_of_everything_observed_in_earlier_iterations(script, run_main, spied):
    state = run_main(norm_obs=True, num_iterations=3)
    seen = kept()["obs"].view(-1, 5).double()
    torch.testing.assert_close(state["agent"]["normalise.mean"], seen.mean(0))
    torch.testing.assert_close(state["agent"]["normalise.var"], seen.var(0, unbiased=False))
    _, updates = spied
    _, _, agent, minibatch = next(update for update in updates if update[1] > 16)  # in the third iteration
    torch.testing.assert_close(agent.normalise.mean, seen[:96].mean(0))
    mean, std = seen[:96].mean(0), seen[:96].std(0, unbiased=False)
    everything = ((seen - mean) / std).float()
    near = (minibatch["obs"][minibatch["weights"] > 0][:, None] - everything).abs().amax(-1).amin(1)
    assert near.max() < 1e-3


@pytest.mark.parametrize(("target", "way"), [(10.0, 1), (-10.0, -1)])
def test_the_temperature_rises_while_the_entropy_is_below_its_target_and_falls_above(run_sac, target, way):
    state = run_sac(target_entropy=target, alpha=0.5, alpha_learning_rate=0.01)
    assert way * (state["agent"]["log_alpha"].item() - math.log(0.5)) > 0.05
    state = run_sac(target_entropy=target, alpha=0.5, autotune=False)
    assert state["agent"]["log_alpha"].item() == pytest.approx(math.log(0.5))


def test_a_gradient_that_is_not_finite_is_dropped_and_counted(script, run_main, monkeypatch):
    calls, loss = [], script.ppo.critic_loss

    def poisoned(agent, args, minibatch):
        calls.append(1)
        value, stats = loss(agent, args, minibatch)
        return value * (math.nan if len(calls) == 2 else 1.0), stats

    monkeypatch.setattr(script.ppo, "critic_loss", poisoned)
    state = run_main()
    assert all(torch.isfinite(tensor).all() for tensor in state["agent"].values())

    assert SilentLogger.lines[-1]["charts/nan_updates"] == 1


@pytest.mark.parametrize("settings", [{}, {"distributional": True, "critic_aggregation": "mean"}])
def test_what_is_compiled_does_the_same(script, run_main, monkeypatch, settings):
    compiled, torch_compile = [], torch.compile

    def without_a_compiler(function):
        compiled.append(function.__name__)
        return torch_compile(function, backend="eager")

    monkeypatch.setattr(torch, "compile", without_a_compiler)
    eager = run_main(**settings)
    traced = run_main(**settings, compile=True)
    assert compiled == ["policy", "update_critics", "update_actor"]
    for name, tensor in eager["agent"].items():
        torch.testing.assert_close(traced["agent"][name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_learning_rates_fall_linearly_if_told_to(script, run_main):

    run_main(num_iterations=4, learning_rate=1e-3, anneal_lr=True)
    assert [line["charts/learning_rate"] for line in SilentLogger.lines] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    run_main(num_iterations=2, learning_rate=1e-3)
    assert [line["charts/learning_rate"] for line in SilentLogger.lines] == pytest.approx([1e-3] * 2)


def test_without_the_buffer_a_resumed_run_fills_it_anew_before_it_learns(script, tmp_path, restored, capsys):
    """--no-save-replay: the environments and the networks go on exactly, the updates wait for --learning-starts."""
    flags = [*script.flags, *script.size, *ALWAYS, "--no-save-replay", "--num-steps", 8, "--learning-starts", 64]
    assert run(script, *flags, "--num-iterations", 6, "--log-dir", tmp_path / "a") == 0
    begin = tmp_path / "a" / "checkpoints" / "model_6.pt"
    state = checkpoint.load(begin, script.name)
    [rank] = state["ranks"]
    assert "replay" not in rank and "buffer is empty" not in capsys.readouterr().out
    assert run(script, "--resume", begin, "--num-iterations", 7, "--log-dir", tmp_path / "b", *ALWAYS) == 0
    assert "the replay buffer is empty, so the next update comes after 64 steps" in capsys.readouterr().out
    after = checkpoint.load(tmp_path / "b" / "checkpoints" / "model_7.pt", script.name)
    assert after["global_step"] == 7 * 8 * script.num_envs
    # 32 steps were collected since, fewer than 64: the networks are as they were, the environments are not.
    assert all(torch.equal(after["agent"][n], x) for n, x in state["agent"].items() if not n.startswith("normalise"))
    assert not torch.equal(after["ranks"][0]["next_obs"], rank["next_obs"])
    assert run(script, "--resume", begin, "--num-iterations", 9, "--log-dir", tmp_path / "c", *ALWAYS) == 0
    later = checkpoint.load(tmp_path / "c" / "checkpoints" / "model_9.pt", script.name)
    assert not torch.equal(later["agent"]["actor.0.weight"], state["agent"]["actor.0.weight"])


@pytest.mark.parametrize(("learning_starts", "says"), [(96, False), (97, True)])
def test_a_run_that_ends_before_it_learns_says_so(script, run_main, capsys, learning_starts, says):
    run_main(num_envs=6, num_steps=8, num_iterations=2, learning_starts=learning_starts)
    assert (f"--learning-starts {learning_starts}: nothing is learned" in capsys.readouterr().out) == says


def test_a_buffer_beyond_all_memory_costs_one_sentence(script, tmp_path, restored, capfd):
    code = run(script, *script.flags, "--buffer-size", 10**15, "--log-dir", tmp_path, *ALWAYS)
    check_sentence(code, capfd.readouterr().err, ["--buffer-size", str(10**15), "memory"])


def test_a_mistake_does_not_cost_a_user_the_settings_beside_it(script, tmp_path, monkeypatch):
    """A folder with nothing but args.yaml in it is not always one that a run has made."""
    (tmp_path / "args.yaml").write_text("seed: 3\n")
    monkeypatch.chdir(tmp_path)
    assert run(script, "--config", "args.yaml", "--env-id", "CartPole-v1", *ALWAYS) == 2
    assert (tmp_path / "args.yaml").exists()


def test_every_setting_is_documented_and_read(script):

    assert undocumented(script.path, "Args") == []
    read = set(script.read_elsewhere)
    for path in (script.path, *(path for pattern in script.sources for path in ROOT.glob(pattern))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                read |= {node.attr} if owner in ("args", "cfg") else set()
    assert [name for name in script.ppo.Args.__dataclass_fields__ if name not in read] == []
    names = set(script.ppo.Args.__dataclass_fields__)
    assert all(set(preset) <= names for preset in script.ppo.PRESETS.values())
