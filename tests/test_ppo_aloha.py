"""What ppo_aloha_cnn.py has of its own: the warm start, the cloning term, the privileged critic, evaluation."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from harness import ALOHA, SCRIPTS, ScriptedEnv, SilentLogger, kept, shaken, unshuffled

from common import checkpoint
from common.dagger import Replay, pose_loss, shifted
from common.envs import aloha_eval
from common.envs.aloha import AlohaConfig


@pytest.fixture
def script():
    return SCRIPTS["ppo_aloha_cnn"]


class Env(ScriptedEnv):
    def step(self, actions):
        *found, info = super().step(actions)
        info["episode"]["success"] = torch.zeros(self.num_envs)
        return *found, info


def expert(env):
    """A function of what is observed alone, so that every label can be checked."""
    return torch.tanh(env.obs[:, :3])


# --- the warm start


@pytest.fixture
def warm_start(script, monkeypatch):
    """Runs clone_expert on a clock that goes on by a tenth of a second each time it is read."""

    def run(interrupt=False, **settings):
        clock, drawn, stored = iter(range(10**9)), [], []
        monkeypatch.setattr(script.ppo.time, "time", lambda: next(clock) / 10)
        add = Replay.add
        monkeypatch.setattr(Replay, "add", lambda self, rows: (stored.append(rows), add(self, rows))[1])
        args, envs = script.args(**{"bc_minutes": 1.0, "bc_batch": 32, "init_std": 0.05} | settings), Env(6, 1)
        agent = script.ppo.Agent(envs, args)
        learning_rate = torch.tensor(args.learning_rate)
        optimizer = script.ppo.FlatAdam(agent.parameters(), learning_rate)
        sample = agent.sample
        monkeypatch.setattr(agent, "sample", lambda dist: (drawn.append(dist), sample(dist))[1])
        before = {name: p.clone() for name, p in agent.named_parameters()}
        obs, _ = envs.reset()
        obs, done = script.ppo.dagger.clone_expert(agent, args, envs, expert, optimizer, obs, interrupt)
        assert torch.equal(obs, envs.obs) and learning_rate == args.learning_rate
        return SimpleNamespace(agent=agent, before=before, drawn=drawn, stored=stored, done=done)

    return run


def test_the_expert_labels_every_state_that_the_mixture_visits(warm_start):
    run, steps = warm_start(), kept()
    assert len(run.stored) == len(run.drawn) == len(steps["obs"]) > 100
    for stored, obs in zip(run.stored, steps["obs"], strict=True):
        assert torch.equal(stored["obs"], obs) and torch.equal(stored["labels"], torch.tanh(obs[:, :3]))
    assert run.done["warm_start_frames"] == 6 * len(steps["obs"])
    by_expert = [(dist == stored["labels"]).all(1) for dist, stored in zip(run.drawn, run.stored, strict=True)]
    shares = torch.stack(by_expert).float().mean(1)
    tenth = len(shares) // 10
    assert shares[0] == 1 and shares[:tenth].mean() > 0.8  # the expert acts
    assert shares[-tenth:].mean() < 0.2  # the policy acts, and the expert labels
    noise = torch.stack([kept()["actions"][t] - run.drawn[t] for t in range(len(run.drawn))])
    assert noise.std() == pytest.approx(0.05, rel=0.1)


def test_the_warm_start_clones_the_means_and_leaves_the_critic(warm_start, capsys):
    run, obs = warm_start(bc_learning_rate=1e-2), kept()["obs"].flatten(0, 1)
    with torch.no_grad():
        error = (run.agent(obs) - torch.tanh(obs[:, :3])).abs().mean()
    assert error < 0.3 < torch.tanh(obs[:, :3]).abs().mean()
    moved = {name for name, p in run.agent.named_parameters() if not torch.equal(p, run.before[name])}
    assert moved and all(name.startswith("actor.") for name in moved)
    assert "warm start, " in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_expert_may_act_less_often_from_the_beginning(warm_start, share):
    run = warm_start(bc_expert=share)
    by_expert = [(dist == stored["labels"]).all(1) for dist, stored in zip(run.drawn, run.stored, strict=True)]
    first = torch.stack(by_expert[: len(by_expert) // 5]).float().mean()
    assert first == 0 if share == 0 else 0.2 < first < 0.7


def test_training_may_begin_with_a_policy(script, run_main, minibatches):
    state = run_main(learning_rate=1e-2)
    path = f"{state['args']['log_dir']}/checkpoints/final_model.pt"
    minibatches.clear()
    again = run_main(model_path=path, seed=7)
    begun = minibatches[0].agent.state_dict()
    assert all(torch.equal(value, state["agent"][name]) for name, value in begun.items())
    assert again["iteration"] == state["iteration"]  # its iterations and steps count from zero
    assert not torch.equal(again["agent"]["actor.0.weight"], state["agent"]["actor.0.weight"])


def test_an_interrupt_ends_the_warm_start(warm_start):
    assert warm_start(interrupt=True).done["warm_start_frames"] == 0


def test_the_warm_start_is_saved_and_not_repeated_by_a_resumed_run(script, run_main, monkeypatch):
    calls, clone = [], script.ppo.dagger.clone_expert
    monkeypatch.setattr(script.ppo, "AlohaEnv", lambda num_envs, device, seed, **settings: Env(num_envs, seed))
    monkeypatch.setattr(script.ppo, "Expert", lambda cfg, device: expert)
    monkeypatch.setattr(script.ppo.dagger, "clone_expert", lambda *args: (calls.append(1), clone(*args))[1])
    state = run_main(bc_init=True, bc_minutes=0.001)
    folder = state["args"]["log_dir"]
    warm = checkpoint.load(f"{folder}/checkpoints/model_0.pt", script.name)
    assert calls == [1] and warm["iteration"] == warm["global_step"] == 0
    assert not torch.equal(warm["agent"]["actor.0.weight"], state["agent"]["actor.0.weight"])
    again = run_main(bc_init=True, resume=f"{folder}/checkpoints/model_0.pt", log_dir=folder)
    assert calls == [1] and again["iteration"] == 2


def test_a_replay_holds_the_newest_and_no_more():
    replay = Replay({"obs": ALOHA, "labels": Box(-1, 1, (2,))}, 10, "cpu")
    assert replay.rows["obs"]["pixels"].dtype == torch.uint8
    memory = replay.rows["labels"].data_ptr()
    for i in range(7):
        rows = torch.arange(4.0 * i, 4 * i + 4)
        obs = {"pixels": rows.byte().view(4, 1, 1, 1).expand(4, 36, 36, 3), "agent_pos": rows[:, None].expand(4, 5)}
        replay.add({"obs": obs, "labels": rows[:, None].expand(4, 2)})
        drawn = replay.sample(500)
        newest = set(range(max(0, 4 * i + 4 - 10), 4 * i + 4))
        assert set(drawn["labels"][:, 0].int().tolist()) == newest
        assert torch.equal(drawn["obs"]["pixels"][:, 0, 0, 0].float(), drawn["labels"][:, 0])
        assert torch.equal(drawn["obs"]["agent_pos"][:, 0], drawn["labels"][:, 0])
    assert len(replay.rows["labels"]) == 10 and replay.rows["labels"].data_ptr() == memory


def test_pictures_are_shifted_each_for_itself_and_their_borders_repeated():
    pixels = torch.randint(0, 256, (200, 6, 7, 3), dtype=torch.uint8)
    assert shifted(pixels, 0) is pixels
    moved = shifted({"pixels": pixels, "agent_pos": None}, 2)["pixels"]
    padded = np.pad(pixels.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    found = set()
    for before, after in zip(padded, moved.numpy(), strict=True):
        places = [(y, x) for y in range(5) for x in range(5) if (before[y : y + 6, x : x + 7] == after).all()]
        assert len(places) == 1
        found |= set(places)
    assert len(found) == 25


# --- PPO after it


def test_the_cloning_term_is_added_to_the_loss_of_ppo(script):
    agent, args = shaken(script.agent()), script.args()
    obs, labels = torch.randn(20, 4), torch.randn(20, 3)
    with torch.no_grad():
        actions, logprobs, _, values, dists = agent.get_action_and_value(obs)
    minibatch = dict(obs=obs, actions=actions, logprobs=logprobs, values=values, dists=dists, old_std=agent.std())
    minibatch |= dict(advantages=torch.randn(20), returns=torch.randn(20))
    plain, stats = script.ppo.ppo_loss(agent, args, minibatch)
    both, more = script.ppo.ppo_loss(agent, args, minibatch | {"labels": labels, "bc_coef": torch.full((20,), 0.7)})
    expected = (dists - labels).abs().mean()
    torch.testing.assert_close(both - plain, 0.7 * expected)
    assert "bc_loss" not in stats and more["bc_loss"] == expected


def test_the_cloning_term_fades_and_its_labels_are_of_the_states_of_the_rollout(
    script, run_main, minibatches, monkeypatch
):
    monkeypatch.setattr(script.ppo, "Expert", lambda cfg, device: expert)
    run_main(bc_coef=0.8, bc_fade=0.5, num_iterations=4, norm_obs=False)
    assert [m.bc_coef.unique().item() for m in minibatches] == pytest.approx([0.8, 0.4, 0.0, 0.0])
    for i, minibatch in enumerate(minibatches):
        unshuffled([minibatch], kept(8 * i, 8 * i + 8)["obs"])  # all of the rollout
        assert torch.equal(minibatch.labels, torch.tanh(minibatch.obs[:, :3]))
    assert "losses/bc_loss" in SilentLogger.lines[0]


def test_at_first_the_critic_alone_may_learn(script, run_main, minibatches):
    run_main(critic_iterations=1, norm_obs=False)
    first, second = (m.agent.state_dict() for m in minibatches)
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert any(name.startswith("critic.") for name in moved) and not any(name.startswith("actor") for name in moved)
    assert not minibatches[0].advantages.any() and minibatches[1].advantages.any()


@pytest.mark.parametrize(("anneal", "rates"), [(True, [3e-3, 7.5e-4, 5e-4, 2.5e-4]), (False, [3e-3, 1e-3, 1e-3, 1e-3])])
def test_after_the_critic_alone_the_learning_rate_is_what_it_would_have_been(run_main, anneal, rates):
    settings = dict(critic_iterations=1, critic_learning_rate=3e-3, learning_rate=1e-3, desired_kl=0.0)
    run_main(num_iterations=4, anneal_lr=anneal, **settings)
    assert [line["charts/learning_rate"] for line in SilentLogger.lines] == pytest.approx(rates)


@pytest.mark.parametrize("clip_reward", [False, True])
def test_rewards_are_clipped_to_their_sign(script, run_main, minibatches, clip_reward):
    run_main(clip_reward=clip_reward, gamma=0.0, num_iterations=1, norm_adv=False)
    assert (set(minibatches[0].returns.round(decimals=4).tolist()) <= {-1.0, 1.0}) == clip_reward


# --- networks

PRIVILEGED = Dict(dict(ALOHA.spaces) | {"state": Box(-np.inf, np.inf, (7,))})


def observations(n, space=PRIVILEGED):
    parts = {name: torch.randn(n, *part.shape) for name, part in space.spaces.items()}
    return parts | {"pixels": torch.randint(0, 256, (n, 36, 36, 3), dtype=torch.uint8)}


def agent_for(script, space, **settings):
    envs = SimpleNamespace(single_observation_space=space, single_action_space=Box(-1, 1, (3,)))
    return shaken(script.ppo.Agent(envs, script.args(**settings)), 0.02)


@torch.no_grad()
def test_the_critic_alone_sees_the_state(script):
    agent = agent_for(script, PRIVILEGED)
    a = observations(4)
    b, c = a | {"state": torch.randn(4, 7)}, observations(4) | {"state": a["state"]}
    value, mean = (lambda obs: agent.get_value(agent.normalise(obs))), agent.forward
    assert torch.equal(value(a), value(c)) and not torch.allclose(value(a), value(b))
    assert torch.equal(mean(a), mean(b)) and not torch.allclose(mean(a), mean(c))
    assert torch.equal(mean({name: a[name] for name in ("pixels", "agent_pos")}), mean(a))  # as it is deployed
    assert torch.equal(agent.get_action_and_value(agent.normalise(a))[3], value(a))
    agent.update_stats(a)
    torch.testing.assert_close(agent.critic[0].mean, a["state"].double().mean(0))


@torch.no_grad()
def test_pictures_alone_and_grey_ones(script):
    space = ALOHA["pixels"]
    pixels = observations(4)["pixels"]
    grey = pixels.float().mean(3, keepdim=True).round().byte().expand(4, 36, 36, 3)
    assert agent_for(script, space)(pixels).shape == (4, 3)
    agent = agent_for(script, space, grey=True)
    assert agent.encoder.cnn[0].in_channels == 1
    torch.testing.assert_close(agent(pixels), agent(grey), atol=2e-3, rtol=0)
    assert not torch.allclose(agent(pixels), agent(255 - pixels), atol=5e-3)


def test_the_impala_encoder_is_residual(script):
    pixels = observations(4)["pixels"]
    agent = agent_for(script, ALOHA["pixels"], encoder="impala")
    convolutions = [module for module in agent.encoder.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [module.out_channels for module in convolutions] == 5 * [16] + 10 * [32]
    agent(pixels).sum().backward()
    assert all(module.weight.grad.abs().sum() > 0 for module in convolutions)
    block, features = script.ppo.Residual(8), torch.randn(2, 8, 5, 5)
    assert not torch.allclose(block(features), features)
    torch.nn.init.zeros_(block.layers[3].weight)
    assert torch.equal(block(features), features)


def test_the_warm_start_may_teach_the_encoder_where_the_objects_are(script):
    envs = SimpleNamespace(single_observation_space=PRIVILEGED, single_action_space=Box(-1, 1, (3,)), pose_dim=2)
    agent = script.ppo.Agent(envs, script.args(pose_coef=0.5))
    obs = observations(64)
    agent.update_stats(obs)
    target = agent.critic[0](obs["state"])[:, -2:]
    loss = pose_loss(agent, agent.embed(agent.normalise(obs)), obs["state"])
    assert loss == (agent.pose(agent.embed(agent.normalise(obs))) - target).abs().mean()
    encoder = torch.autograd.grad(loss, list(agent.encoder.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in encoder)
    assert script.ppo.Agent(envs, script.args()).pose is None


@torch.no_grad()
def test_layers_are_normalised(script):
    x = 5 + 3 * torch.randn(8, 100)
    expected = torch.nn.functional.layer_norm(x, (100,)).relu()
    torch.testing.assert_close(script.ppo.NormReLU()(x), expected)
    kinds = [type(module) for module in agent_for(script, ALOHA, layer_norm=True, hidden=(8, 9)).modules()]
    assert kinds.count(script.ppo.NormReLU) == 1 + 2 + 2  # the embedding, actor and critic


@torch.no_grad()
def test_training_may_be_in_bfloat16_and_what_is_deployed_is_not(script):
    obs = observations(4, ALOHA)
    exact = agent_for(script, ALOHA, precision="float32")
    rough = agent_for(script, ALOHA, precision="bfloat16")
    rough.load_state_dict(exact.state_dict())
    assert torch.equal(rough(obs), exact(obs))
    mean = rough.get_dist(rough.normalise(obs))
    assert mean.dtype == torch.float32 and not torch.equal(mean, exact(obs))
    torch.testing.assert_close(mean, exact(obs), atol=0.02, rtol=0.02)


def test_the_documents_network_is_that_of_nature_with_two_heads(script):
    preset = {name: value for name, value in script.ppo.PRESETS["document"].items() if name in ("hidden", "embedding")}
    envs = SimpleNamespace(single_observation_space=Box(0, 255, (84, 84, 3), np.uint8))
    envs.single_action_space = Box(-1, 1, (14,))
    agent = script.ppo.Agent(envs, script.ppo.Args(**preset))
    shapes = [tuple(p.shape) for name, p in agent.named_parameters() if name.endswith("weight")]
    heads = [(256, 512), (256, 256)]
    convolutions = [(32, 3, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 64 * 7 * 7)]
    assert shapes == [*convolutions, *heads, (1, 256), *heads, (14, 256)]


# --- the command line


def test_the_task_is_that_of_the_flag(tmp_path):
    flags = "--env-id AlohaTransferCube-v0 --obs-type state --num-envs 2 --num-steps 2 --num-minibatches 1 --device cpu"
    flags += " --ranks 1 --num-iterations 1 --episode-steps 2 --eval-episodes 1 --no-save-video"
    command = [sys.executable, "ppo_aloha_cnn.py", *flags.split(), "--log-dir", str(tmp_path / "run")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, capture_output=True)
    state = checkpoint.load(tmp_path / "run", "ppo_aloha_cnn")
    assert state["args"]["env_id"] == "AlohaTransferCube-v0"
    assert state["ranks"][0]["envs"]["physics"]["qpos"].shape == (2, 16 + 7)  # one object


# --- evaluation


class Race:
    """World 0 succeeds in every second step, world 1 never within the five steps of an episode."""

    num_envs, device, metric_names = 2, "cpu", ("success", "highest_level", "mean_reward")
    watching = []

    def __init__(self, num_envs, device, seed, **settings):
        assert num_envs == 2 and settings["reward"] == "sparse" and settings["env_backend"] == "fast"
        self.clock = 0

    def reset(self):
        self.clock = 0
        return torch.zeros(2, 1), {}

    def step(self, actions):
        self.clock += 1
        self.watching.append(self.watched.tolist())
        success = torch.tensor([self.clock % 2 == 0, False])
        done = success | torch.tensor([False, self.clock % 5 == 0])
        episode = {"l": torch.tensor([2, 5]), "success": success.float(), "highest_level": torch.tensor([4.0, 1.0])}
        info = {"_episode": done, "episode": episode | {"mean_reward": torch.tensor([2.0, 0.2])}}
        return torch.zeros(2, 1), torch.zeros(2), success, done & ~success, info

    def close(self):
        pass


def test_every_world_counts_once_a_round_on_the_packages_reward(monkeypatch):
    monkeypatch.setattr(aloha_eval, "AlohaEnv", Race)
    monkeypatch.setitem(aloha_eval.MOST_ENVS, "fast", 2)
    monkeypatch.setattr(Race, "watching", [])
    result = aloha_eval.evaluate(lambda obs: obs, AlohaConfig(reward="progress"), "cpu", 5)
    assert Race.watching == 3 * (2 * [[True, True]] + 3 * [[False, True]])
    assert result["episodes"] == 6 and result["success_rate"] == 0.5
    assert result["highest_level"] == [0, 3, 0, 0, 3] and result["mean_highest_level"] == 2.5
    assert result["mean_return"] == pytest.approx((2 * 2.0 + 5 * 0.2) / 2) and result["mean_length"] == 3.5
    assert result["success_ci95"][0] < 0.5 < result["success_ci95"][1]


@pytest.mark.parametrize(("threads", "expected"), [(0, 6), (2, 2)])
def test_an_evaluation_has_all_cores(monkeypatch, threads, expected):
    found = []

    class Slow(Race):
        def __init__(self, num_envs, device, seed, **settings):
            found.append(settings["threads"])
            super().__init__(num_envs, device, seed, **settings)

    monkeypatch.setattr(aloha_eval, "AlohaEnv", Slow)
    monkeypatch.setattr(aloha_eval, "num_cores", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    aloha_eval.evaluate(lambda obs: obs, AlohaConfig(threads=threads), "cpu", 2)
    assert found == [expected]


@pytest.mark.parametrize("backend", ["fast", "gym-aloha"])
def test_an_evaluation_of_both_backends(backend):
    cfg = AlohaConfig(obs_type="state", episode_steps=3)
    result = aloha_eval.evaluate(lambda obs: torch.zeros(len(obs), 14), cfg, "cpu", 2, backend)
    assert (result["episodes"], result["success_rate"], result["mean_length"]) == (2, 0.0, 3)
    assert sum(result["highest_level"]) == 2 and result["backend"] == backend


def test_the_task_survives_another_setting(script):
    args = script.ppo.Args(env_id="AlohaTransferCube-v0")
    cfg = AlohaConfig(**aloha_eval.plain(replace(args, shadows=True)))
    assert (cfg.task, cfg.shadows) == ("transfer_cube", True)


def test_what_is_seen_keeps_its_shape():
    pixels = torch.full((1, 30, 60, 6), 9, dtype=torch.uint8)
    picture = aloha_eval.seen({"pixels": pixels}, 120)
    assert picture.shape == (120, 120, 3) and (picture[:60] == 9).all() and not picture[60:].any()
    assert not aloha_eval.seen(torch.zeros(1, 40), 20).any()
