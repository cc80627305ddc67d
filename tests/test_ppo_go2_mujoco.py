"""What the learner of ppo_go2_mujoco.py promises beyond test_ppo_scripts.py: mirroring, schedules, types, presets."""

import math
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from harness import ROOT, SCRIPTS, SilentLogger, advantages_by_definition, kept
from helpers import undocumented

import ppo_go2_mujoco as ppo
from common import cli
from common.envs.go2 import Go2Config, Go2Env

SCRIPT = SCRIPTS["ppo_go2_mujoco"]


@pytest.fixture
def script():
    return SCRIPT


# --- mirrored samples


def test_mirror_exchanges_the_sides_of_whole_trajectories(run_main, minibatches):
    """About half of the robots: observations, actions, means, values and bootstrapped values are the mirror's, rewards
    and log-probabilities those of what happened.
    """
    run_main(norm_adv=False, norm_obs=False, num_iterations=1, gamma=0.9, gae_lambda=0.8, mirror=True)
    (minibatch,), agent, steps = minibatches, minibatches[0].agent, kept()
    plain, mirror = (
        (side * steps["obs"].view(-1, 1, 5) == minibatch.obs).all(2) for side in (1, -1)
    )  # (all samples in order, those of the minibatch)
    mirrored = mirror.any(1).view(8, 6)
    assert torch.equal(mirrored, mirrored[:1].expand(8, 6)) and 0 < mirrored[0].sum() < 6
    match = (plain | mirror).float().argmax(1)
    assert sorted(match.tolist()) == list(range(48))
    sign = torch.where(mirrored, -1.0, 1.0)[..., None]
    last_obs = torch.where(steps["done"][..., None], steps["final_obs"], steps["next_obs"])
    with torch.no_grad():
        drawn = sign.view(-1, 1) * minibatch.actions[match]
        happened, _ = agent.log_prob_and_entropy(agent.get_dist(steps["obs"].view(-1, 5)), drawn)
        values, next_values = agent.get_value(sign * steps["obs"]), agent.get_value(sign * last_obs)
        means = agent.get_dist(sign.view(-1, 1) * steps["obs"].view(-1, 5))
    torch.testing.assert_close(minibatch.logprobs[match], happened)
    torch.testing.assert_close(minibatch.dists[match], means)
    next_values = torch.where(steps["terminated"], 0.0, next_values).numpy()
    rewards, done = steps["reward"].double().numpy(), steps["done"].numpy()
    expected = advantages_by_definition(rewards, values.numpy(), next_values, done, 0.9, 0.8)
    np.testing.assert_allclose(minibatch.advantages[match], expected.ravel(), atol=1e-5)
    assert torch.equal(minibatch.drawn[match].bool(), ~mirrored.flatten())


def test_before_an_update_the_mirrors_ratios_are_not_1_and_the_logged_divergences_are_0(run_main, minibatches):
    run_main(mirror=True, num_minibatches=2, num_envs=16, init_std=0.02, learning_rate=1e-2, update_epochs=2)
    begin, *others = minibatches
    with torch.no_grad():
        logprob = begin.agent.get_action_and_value(begin.obs, begin.actions)[1]
    moved = ((logprob - begin.logprobs).exp() - 1).abs()
    drawn = begin.drawn.bool()
    assert moved[drawn].max() < 1e-5 and moved[~drawn].mean() > 0.05 and drawn.any() and not drawn.all()
    for name in ("approx_kl", "old_approx_kl", "clipfrac"):
        assert abs(begin.stats[name]) < 1e-6, name
    assert max(m.stats["approx_kl"] for m in others) > 1e-4  # and then it moves


# --- the agent


def test_orthogonal_initialisation_and_the_scale_of_the_heads():
    agent = SCRIPT.agent(48, gym.spaces.Box(-1, 1, (12,)), hidden=(64, 32), init_std=0.7)
    for network, head in ((agent.actor, 0.01), (agent.critic, 1.0)):
        layers = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
        assert [layer.out_features for layer in layers[:-1]] == [64, 32] and len(network) == 5
        for layer, scale in zip(layers, (3**-0.5, 3**-0.5, head), strict=True):
            weight = layer.weight if len(layer.weight) < layer.weight.shape[1] else layer.weight.T
            torch.testing.assert_close(weight @ weight.T, scale**2 * torch.eye(len(weight)), atol=1e-5, rtol=1e-5)
            assert not layer.bias.any()
    torch.testing.assert_close(agent.std(), torch.full((12,), 0.7))
    assert not {id(p) for p in agent.actor.parameters()} & {id(p) for p in agent.critic.parameters()}


def test_network_outputs_are_float32_in_bfloat16_too():
    agent, exact = (SCRIPT.agent(48, hidden=(512, 256, 128), precision=p) for p in ("bfloat16", "float32"))
    obs = torch.randn(64, 48)
    rounded, right = (
        agent.get_action_and_value(obs, torch.zeros(64, 3)),
        exact.get_action_and_value(obs, torch.zeros(64, 3)),
    )
    assert all(x.dtype == torch.float32 for x in rounded)
    assert not torch.equal(rounded[3], right[3])  # it really was bfloat16
    torch.testing.assert_close(rounded[3], right[3], atol=0.03, rtol=0.03)
    assert torch.equal(agent(obs), exact(obs))  # what is evaluated and exported is float32


# --- schedules


def test_the_desired_kl_falls_linearly_to_its_end(run_main, minibatches):
    state = run_main(num_minibatches=2, update_epochs=4, learning_rate=3e-3, desired_kl=0.02, final_kl=0.01)
    rate = torch.tensor(3e-3)
    for i, minibatch in enumerate(minibatches):
        wanted = 0.02 if i < 8 else 0.015  # the second of two iterations: half-way
        rate = ppo.adapt_learning_rate(rate, torch.tensor(minibatch.stats["kl"]), wanted)
    assert state["learning_rate"] == rate.item() != pytest.approx(3e-3)


def test_the_horizon_of_the_discount_grows_linearly_to_its_end(run_main, monkeypatch):
    seen, gae = [], ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *args: (seen.append(args[4:]), gae(*args))[1])
    bootstrapped = run_main(gamma=0.9, final_gamma=0.95, gae_lambda=0.8)
    # 10 steps at first, 20 after the last of two iterations, so 15 in the second.
    assert bootstrapped["iteration"] == 2
    assert seen == [(pytest.approx(1 - 1 / 10), 0.8), (pytest.approx(1 - 1 / 15), 0.8)]


def test_the_largest_std_falls_to_final_std(run_main):
    steps = 6 * 8
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
    settings = dict(num_iterations=6, desired_kl=0.0, learning_rate=0.05, std_anneal_steps=6 * 8)
    run_main(**settings, final_std=0.25, min_std=0.05)
    assert SilentLogger.lines[-1]["charts/action_std"] < 0.24


# --- the update


def test_compiled_by_a_compiler_is_eager(run_main, monkeypatch):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    monkeypatch.setattr(ppo, "Go2Env", Go2Env)
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # the same noise as eager
    settings = dict(num_envs=8, num_minibatches=2, update_epochs=2, desired_kl=0.02, episode_seconds=0.1)
    eager = run_main(**settings)
    compiled = run_main(**settings, compile=True)
    initial = run_main(**settings | dict(learning_rate=1e-12, desired_kl=0.0))
    assert eager["global_step"] == compiled["global_step"] == 128
    for name, tensor in eager["agent"].items():
        torch.testing.assert_close(compiled["agent"][name], tensor, atol=2e-5, rtol=1e-4, msg=name)
    change = (eager["agent"]["actor.0.weight"] - initial["agent"]["actor.0.weight"]).abs().max()
    assert change > 1e-3  # far beyond the tolerance


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
    agent = SCRIPT.agent(48, **vars(args))
    assert sum(isinstance(layer, torch.nn.ELU) for layer in agent.actor) == 3


def test_presets_by_device_and_their_overrides():
    def parse(*argv):
        return cli.parse_args(ppo.Args, ppo.PRESETS, ppo.default_preset, argv=list(argv))

    assert parse("--device", "cuda").preset == "reference" and parse("--device", "cpu").preset == "laptop"
    assert parse("--device", "cpu") == ppo.Args(**ppo.PRESETS["laptop"] | {"preset": "laptop", "device": "cpu"})
    args = parse("--preset", "reference", "--num-envs", "64", "--ent-coef", "0.5")
    assert (args.num_envs, args.ent_coef, args.num_iterations) == (64, 0.5, 10_000)


def test_every_setting_of_the_environment_is_a_documented_flag():
    assert undocumented(ROOT / "common/envs/go2_config.py", "Go2Config") == []
    assert set(Go2Config.__dataclass_fields__) <= set(ppo.Args.__dataclass_fields__)
