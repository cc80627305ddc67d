"""The maths of GR00T on a tiny model of the real classes: its own action, probabilities, gradients, padding, files."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch.distributions import MultivariateNormal, Normal
from transformers.feature_extraction_utils import BatchFeature

import ppo_gr00t
from common import demos, gr00t
from common.flat_adam import FlatAdam

PICTURES = Box(0, 255, (56, 56, 3), np.uint8)
SPACES = Dict({"front": PICTURES, "wrist": PICTURES, "state": Box(-10, 10, (20,)), "instruction": Discrete(20)})
CHUNK, ACTIONS, BATCH = 3, 7, 6


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    yield
    torch.set_num_threads(threads)


def make(action_dim=ACTIONS, **settings):
    """The agent of --policy, with weights of GR00T that are large enough that everything shows, and statistics."""
    torch.manual_seed(0)
    settings = {"critic_hidden": (16,), "bc_tune": "head"} | settings
    args = ppo_gr00t.Args(**settings)
    envs = SimpleNamespace(single_observation_space=SPACES, single_action_space=Box(-1, 1, (CHUNK, action_dim)))
    agent, flow = ppo_gr00t.make_agent(envs, args)
    with torch.no_grad():
        for name, parameter in flow.network.model.action_head.named_parameters():
            if "norm" not in name and "lora" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    flow.network.set_ranges(
        torch.stack((-torch.ones(20), torch.ones(20))), torch.tensor([[-1.0], [1.0]]).expand(2, action_dim)
    )
    return agent, args


def observation(batch=BATCH):
    pictures = {name: torch.randint(0, 256, (batch, 56, 56, 3), dtype=torch.uint8) for name in ("front", "wrist")}
    return pictures | {"state": torch.randn(batch, 20).clamp(-1, 1), "instruction": torch.randint(0, 20, (batch,))}


def own_action(agent, obs):
    """What the model's own `get_action` makes of it, from torch's random numbers."""
    pictures = gr00t.pixel_values(agent.network.model, [obs["front"], obs["wrist"]])
    rows = obs["instruction"]
    inputs = {"eagle_input_ids": agent.network.token_ids[rows], "eagle_attention_mask": agent.network.token_mask[rows]}
    inputs |= {"eagle_pixel_values": pictures, "eagle_image_sizes": torch.tensor([[56, 56]] * len(pictures))}
    inputs |= {
        "state": agent.network.normalise_state(obs["state"]),
        "embodiment_id": torch.zeros(len(rows), dtype=torch.long),
    }
    return agent.network.model.get_action(inputs)["action_pred"]


# --- the model


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    return gr00t.load("tiny")


def test_without_noise_it_is_the_models_own_action():
    agent, _ = make(noise_level=0.0)
    obs = observation()
    torch.manual_seed(7)
    expected = own_action(agent, obs)
    torch.manual_seed(7)
    encoded = agent.encode(obs)
    ours = agent.to_env(agent.sample(encoded), encoded)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected[:, :CHUNK, :ACTIONS], atol=1e-6, rtol=0)
    torch.manual_seed(7)
    torch.testing.assert_close(agent(obs), expected[:, :CHUNK, :ACTIONS], atol=1e-6, rtol=0)


def test_the_embodiment_that_is_kept_acts_as_it_did(whole):
    head = whole.action_head
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(0, 0.1)  # which begin at zero
    inputs = {"backbone_features": torch.randn(4, 10, 64)}
    state = torch.randn(4, 1, 64)

    def act(slot):
        torch.manual_seed(1)
        rest = BatchFeature({"state": state, "embodiment_id": torch.full((4,), slot)})
        return head.get_action(BatchFeature(dict(inputs)), rest)["action_pred"]

    before = {slot: act(slot) for slot in (17, 31)}
    assert not torch.allclose(before[17], before[31], atol=1e-2)
    size = sum(p.numel() for p in head.parameters())
    gr00t.keep_embodiment(whole, 17)
    torch.testing.assert_close(act(0), before[17], atol=1e-6, rtol=0)
    assert gr00t.num_embodiments(whole) == 1 and sum(p.numel() for p in head.parameters()) < 0.3 * size


def test_dropout_is_off():
    agent, _ = make()
    assert not any(module.training for module in agent.network.model.modules())
    agent.train()
    obs = agent.encode(observation())
    with torch.no_grad():
        action = agent.sample(obs)
        one, two = (agent.get_action_and_value(obs, action)[1] for _ in range(2))
    assert torch.equal(one, two)


def test_gradient_checkpointing_changes_no_gradient():
    found = []
    for on in (False, True):
        agent, _ = make(gradient_checkpointing=on)
        agent.set_trainable(["dit", "adapter"])
        torch.manual_seed(5)
        obs = agent.encode(observation())
        agent.get_action_and_value(obs)[1].sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None]))
    assert found[0].abs().max() > 0.1
    torch.testing.assert_close(*found)


# --- probabilities


def brute_force(agent, obs, action, correlation):
    """log pi by its definition: every step's formula, written out with numbers, and torch's own Gaussians."""
    K, a = 4, 0.5
    covariance = torch.full((CHUNK, CHUNK), correlation).fill_diagonal_(1.0)
    total = torch.zeros(len(obs["state"]))
    context = agent.network.context(obs)
    for i in range(len(total)):
        for j, k in enumerate(action["step"][i].tolist()):
            x = action["x"][i : i + 1, j]
            v = agent.network.velocity(context[i : i + 1], obs["state"][i : i + 1], x, torch.tensor([250 * k]))[0]
            t, dt, x = k / K, 1 / K, x[0]
            sigma = a * math.sqrt((1 - t) / max(t, dt))
            noise, data = x - t * v, x + (1 - t) * v
            noise, data = noise[:CHUNK, :ACTIONS], data[:CHUNK, :ACTIONS]
            drift = sigma**2 * dt / (2 * (1 - t)) * covariance @ noise
            mean = noise * (1 - (t + dt)) - drift + data * (t + dt)
            drawn = action["next"][i, j]
            if correlation == 1:  # one noise for all of the chunk, so that its mean is all there is
                total[i] += Normal(mean.mean(0), sigma * math.sqrt(dt)).log_prob(drawn.mean(0)).sum()
                continue
            density = MultivariateNormal(mean.T, covariance * sigma**2 * dt)  # of each component over the chunk
            total[i] += density.log_prob(drawn.T).sum()
    return total


@pytest.mark.parametrize("correlation", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("steps", ["one", "last", "all"])
def test_log_probabilities_are_those_of_the_gaussians_by_brute_force(steps, correlation):
    agent, _ = make(sde_steps=steps, noise_correlation=correlation)
    obs = agent.encode(observation())
    with torch.no_grad():
        action, logprob, entropy, value, dist = agent.get_action_and_value(obs)
        torch.testing.assert_close(logprob, brute_force(agent, obs, action, correlation), atol=1e-3, rtol=1e-5)
    n = {"one": 1, "last": 1, "all": 4}[steps]
    rows = 1 if correlation == 1 else CHUNK
    assert dist.shape == (BATCH, n, rows, ACTIONS) and value.shape == (BATCH,)
    std = agent.step_std[action["step"]]
    alone = rows * ACTIONS * Normal(0, std).entropy().sum(1)
    assert torch.allclose(entropy, alone) if correlation in (0, 1) else (entropy < alone).all()
    assert agent.step_std.tolist() == pytest.approx([0.5, 0.433, 0.25, 0.144], abs=1e-3)


def test_what_is_drawn_has_the_mean_and_std_that_its_probability_says():
    agent, _ = make(sde_steps="all", noise_correlation=0.6)
    one = agent.encode(observation(1))
    obs = {name: value.expand(4000, *value.shape[1:]) for name, value in one.items()}
    with torch.no_grad():
        action = agent.sample(obs)
        context = agent.network.context(obs)
        for k in range(4):
            std = agent.step_std[k].expand(4000)
            mean = agent.transition(context, obs["state"], action["x"][:, k], action["step"][:, k], std)
            z = (action["next"][:, k] - agent.network.executed(mean)) / agent.step_std[k]
            assert z.mean().abs() < 0.03 and abs(z.std() - 1) < 0.03
            assert abs((z[:, 0] * z[:, 1]).mean() - 0.6) < 0.03 and abs((z[..., 0] * z[..., 1]).mean()) < 0.03
            if k < 3:  # the next step begins where this one led, and beside what is executed it is Euler's
                torch.testing.assert_close(agent.network.executed(action["x"][:, k + 1]), action["next"][:, k])
        torch.testing.assert_close(action["action"], action["next"][:, 3])


def test_one_noise_moves_a_whole_chunk():
    agent, _ = make(sde_steps="last", noise_correlation=1.0)
    obs = agent.encode(observation())
    with torch.no_grad():
        action = agent.sample(obs)
        context = agent.network.context(obs)
        std = agent.step_std[3].expand(BATCH)
        mean = agent.transition(context, obs["state"], action["x"][:, 0], action["step"][:, 0], std)
    z = (action["next"][:, 0] - agent.network.executed(mean)) / agent.step_std[3]
    assert z.std() > 0.5
    torch.testing.assert_close(z, z[:, :1].expand_as(z), atol=1e-4, rtol=0)


def test_the_noise_has_a_floor():
    agent, _ = make(noise_level=1e-3, min_std=0.05)
    torch.testing.assert_close(agent.step_std, torch.full((4,), 0.05))


@pytest.mark.parametrize("steps", ["one", "all"])
@pytest.mark.parametrize("tune", ["head", "all"])
def test_the_ratio_is_one_before_the_update_and_its_gradient_is_that_of_finite_differences(steps, tune):
    agent, args = make(sde_steps=steps, tune=tune)
    agent.set_trainable(ppo_gr00t.stages(args)[0])
    obs = agent.encode(observation())
    with torch.no_grad():
        action, logprobs, _, values, dists = agent.get_action_and_value(obs)
    minibatch = {"obs": obs, "actions": action, "logprobs": logprobs, "dists": dists, "old_std": agent.std()}
    minibatch |= {"advantages": torch.randn(BATCH), "returns": values + 1, "values": values}
    loss, stats = ppo_gr00t.ppo_loss(agent, args, minibatch)
    assert stats["ratio_error"] < 1e-5 and stats["kl"] == 0 == stats["clipfrac"]
    assert torch.isfinite(loss)

    def ratios():
        with torch.no_grad():
            return (agent.get_action_and_value(obs, action)[1] - logprobs).double().exp().sum()

    (agent.get_action_and_value(obs, action)[1] - logprobs).exp().sum().backward()
    seen = {part_of(agent, name) for name, p in agent.named_parameters() if p.grad is not None}
    assert seen == set(ppo_gr00t.TUNE[tune])
    for part in seen:  # along the gradient, where the slope is large enough for float32
        moved = [p for name, p in agent.named_parameters() if part_of(agent, name) == part]
        moved = [p for p in moved if p.grad is not None]
        norm = torch.cat([p.grad.flatten() for p in moved]).norm().item()
        h = min(1e-2, 0.1 / norm)
        values = []
        for step in (h, -2 * h):
            with torch.no_grad():
                for p in moved:
                    p += step / norm * p.grad
            values.append(ratios())
        with torch.no_grad():
            for p in moved:
                p += h / norm * p.grad
        assert norm > 0.5, part
        assert ((values[0] - values[1]) / (2 * h)).item() == pytest.approx(norm, rel=0.03), part


def test_half_precision_leaves_probabilities_and_masters_in_float32():
    agent, args = make(precision="bf16", tune="lora")
    agent.set_trainable(ppo_gr00t.stages(args)[0])
    obs = agent.encode(observation())
    assert obs["context"].dtype == torch.bfloat16
    with torch.no_grad():
        action, logprob, *_ = agent.get_action_and_value(obs)
        again = agent.get_action_and_value(obs, action)[1]
    assert logprob.dtype == torch.float32 and torch.equal(again, logprob)
    assert all(p.dtype == torch.float32 for p in agent.parameters() if p.requires_grad)
    frozen = agent.network.model.backbone.eagle_model.language_model.model.layers[0].mlp.up_proj.weight
    assert frozen.dtype == torch.bfloat16


def test_a_residual_is_one_gaussian_for_the_whole_chunk_around_the_frozen_models_action():
    agent, args = make(policy="gaussian-residual", residual_std=0.3)
    flow = agent.flow
    assert not any(p.requires_grad for p in flow.parameters())
    raw = observation()
    torch.manual_seed(7)
    expected = own_action(flow, raw)[:, :CHUNK, :ACTIONS]
    torch.manual_seed(7)
    obs = agent.encode(raw)
    torch.testing.assert_close(obs["action"], expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        action, logprob, _, _, mean = agent.get_action_and_value(obs)
        agent.actor[-1].weight.zero_()
        torch.testing.assert_close(agent.to_env(agent.get_dist(obs), obs), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(logprob, Normal(mean, 0.3).log_prob(action).sum(1))
    added = agent.to_env(action, obs) - expected
    assert action.shape == (BATCH, ACTIONS) and added.std() > 0.1
    torch.testing.assert_close(added, action[:, None].expand(-1, CHUNK, -1), atol=1e-6, rtol=1e-5)


# --- padding and masks


def test_no_signal_leaks_through_padding():
    agent, _ = make(sde_steps="all")
    agent.set_trainable(["projector", "dit", "adapter"])
    raw = observation()
    obs = agent.encode(raw)
    assert not obs["state"][..., 20:].any() and obs["state"].shape == (BATCH, 1, 64)
    with torch.no_grad():
        action = agent.sample(obs)
    # Where the padding of the drawn points goes is no part of the probability: only what is executed is stored.
    assert action["next"].shape == (BATCH, 4, CHUNK, ACTIONS) == (BATCH, 4, *action["action"].shape[1:])
    # The rows of the weights that meet padded states get no gradient.
    agent.get_action_and_value(obs, action)[1].sum().backward()
    weight = agent.network.model.action_head.state_encoder.layer1.W.grad[0]
    assert not weight[20:].any() and weight[:20].abs().max() > 0
    # Nor do those of the decoder that give padded actions, in the warm start and in PPO.
    for loss in (None, ppo_gr00t.flow_matching_loss(agent, obs, torch.rand(BATCH, CHUNK, ACTIONS))):
        if loss is not None:
            agent.zero_grad()
            loss.backward()
        decoder = agent.network.model.action_head.action_decoder.layer2
        assert not decoder.W.grad[0][:, ACTIONS:].any() and not decoder.b.grad[0][ACTIONS:].any()
        assert decoder.W.grad[0][:, :ACTIONS].abs().max() > 0


def test_text_has_one_length_and_its_padding_is_masked():
    agent, _ = make()
    ids, mask = agent.network.token_ids, agent.network.token_mask
    assert ids.shape == mask.shape == (20, 2 * 16 + gr00t.TEXT_LENGTH)
    assert len({tuple(row) for row in ids.tolist()}) == 20  # every sentence is another one
    obs = observation()
    before = agent.encode(obs)
    with torch.no_grad():
        embedding = agent.network.embedding(agent.network.context(before), before)
        agent.network.token_ids = torch.where(mask == 0, 63, ids)  # other words where there is nothing to read
        after = agent.encode(obs)
        seen = mask[obs["instruction"]].bool()
        torch.testing.assert_close(
            agent.network.backbone(obs)[seen], features_of(agent, obs, ids)[seen], atol=1e-5, rtol=0
        )
        assert before["context"].shape == after["context"].shape
        changed = before | {"context": torch.where(seen[..., None], before["context"], 9.0)}
        torch.testing.assert_close(agent.network.embedding(changed["context"], changed), embedding)


def features_of(agent, obs, ids):
    rows = obs["instruction"]
    return gr00t.features(agent.network.model, ids[rows], agent.network.token_mask[rows], [obs["front"], obs["wrist"]])


def test_statistics_map_the_ranges_to_one():
    agent, _ = make()
    state, action = torch.randn(2, 20).sort(0).values, torch.randn(2, ACTIONS).sort(0).values
    agent.network.set_ranges(state, action)
    torch.testing.assert_close(
        agent.network.normalise_state(state)[:, 0, :20], torch.tensor([[-1.0], [1.0]]).expand(2, 20)
    )
    chunk = torch.rand(5, CHUNK, ACTIONS)
    torch.testing.assert_close(
        agent.network.robot_action(agent.network.normalise_action(chunk)), chunk, atol=1e-5, rtol=1e-5
    )
    other, _ = make()
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.network.ranges()["state"], state)


# --- the stages of training: mock model, frozen backbone, unfreezing, memory


def part_of(agent, name):
    return "critic" if name.startswith("critic") else agent.network.part(name)


def hashes(agent):
    return {name: hash(p.detach().numpy().tobytes()) for name, p in agent.named_parameters()}


def test_a_mock_of_the_velocity_learns_by_the_policys_own_gradient(monkeypatch):
    """The maths without the network: a velocity that is one vector learns the action that is rewarded."""
    agent, args = make(sde_steps="all")
    target = torch.zeros(agent.network.horizon, agent.network.width, requires_grad=True)
    monkeypatch.setattr(
        agent.network, "velocity", lambda context, state, x, time: (target - x) / (1 - time[:, None, None] / 1000)
    )
    obs = agent.encode(observation(64))
    optimizer = torch.optim.Adam([target], lr=0.05)
    for _ in range(60):
        action = agent.sample(obs)
        reward = -(action["action"] - 0.5).square().mean((1, 2))
        logprob = agent.get_action_and_value(obs, action)[1]
        loss = -((reward - reward.mean()) / reward.std() * logprob).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = target.detach()
    assert (learned[:CHUNK, :ACTIONS] - 0.5).abs().mean() < 0.2
    assert not learned[CHUNK:].any() and not learned[:, ACTIONS:].any()


def test_a_frozen_backbone_runs_once_and_never_in_the_update(monkeypatch):
    agent, args = make()
    agent.set_trainable(ppo_gr00t.stages(args)[0])
    calls = []
    forward = agent.network.model.backbone.forward_eagle
    monkeypatch.setattr(agent.network.model.backbone, "forward_eagle", lambda *a: calls.append(1) or forward(*a))
    obs = agent.encode(observation())
    assert calls == [1] and "features" in obs and "front" not in obs
    agent.get_action_and_value(obs)
    agent.get_value(obs)
    assert calls == [1]
    agent.set_trainable(["lora"])
    assert "context" in agent.encode(observation())  # also the attention over vision and language is done
    agent.set_trainable(["llm"])
    assert "front" in agent.encode(observation())


def test_parts_unfreeze_one_after_the_other():
    schedule = ("critic:0", "lora:1", "projector:2", "dit:3", "adapter:4", "llm:5", "vision:6")
    agent, args = make(unfreeze_schedule=schedule, critic_learning_rate=1e-3)
    stages = ppo_gr00t.stages(args)
    assert list(stages) == list(range(7)) and stages[2] == ["critic", "lora", "projector"]
    raw = observation()
    for at, parts in stages.items():
        agent.set_trainable(parts)
        obs = agent.encode(raw)
        before = hashes(agent)
        optimizer = FlatAdam(agent.parameters(), torch.tensor(1e-2))
        for _ in range(2):  # the first step of LoRA moves but one of its two factors
            _, logprob, _, value, _ = agent.get_action_and_value(obs)
            optimizer.compute_gradients(logprob.sum() + value.square().sum())
            optimizer.step()
        moved = {part_of(agent, name) for name, value in hashes(agent).items() if value != before[name]}
        assert moved == set(parts), at
        still = [name for name, p in agent.named_parameters() if not p.requires_grad]
        assert all(hashes(agent)[name] == before[name] for name in still)


def test_the_memory_monitor_warns_once_before_the_limit(monkeypatch, capsys):
    peak = [50e9]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    memory = gr00t.GpuMemory(torch.device("cuda"), 0.9)
    assert memory.read() == {"charts/gpu_memory_gb": 50.0} and not capsys.readouterr().out
    peak[0] = 73e9
    memory.read()
    assert "--micro-batch-size" in capsys.readouterr().out
    memory.read()
    assert not capsys.readouterr().out
    assert gr00t.GpuMemory(torch.device("cpu"), 0.9).read() == {}


def test_gradients_of_micro_batches_add_up_to_those_of_the_minibatch():
    from common.storage import micro_batches

    agent, args = make()
    agent.set_trainable(ppo_gr00t.stages(args)[0])
    obs = agent.encode(observation(8))
    with torch.no_grad():
        action, logprobs, _, values, dists = agent.get_action_and_value(obs)
    minibatch = {"obs": obs, "actions": action, "logprobs": logprobs - 0.1, "dists": dists, "old_std": agent.std()}
    minibatch |= {"advantages": torch.randn(8), "returns": values + 1, "values": values}
    optimizer = FlatAdam(agent.parameters(), torch.tensor(1e-3))
    found = []
    for size in (0, 2):
        parts = micro_batches(minibatch, size)
        for i, part in enumerate(parts):
            optimizer.compute_gradients(ppo_gr00t.ppo_loss(agent, args, part)[0] / len(parts), accumulate=i > 0)
        found.append(optimizer.grad.clone())
    assert len(parts) == 4 and found[0].norm() > 1e-2
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)


# --- the warm start, LoRA, files


def test_flow_matching_learns_a_chunk():
    agent, _ = make()
    agent.set_trainable(["projector", "dit", "adapter"])
    obs = agent.encode(observation(16))
    target = obs["state"][:, :, :ACTIONS].expand(-1, CHUNK, -1)
    optimizer = FlatAdam(agent.parameters(), torch.tensor(2e-3))
    losses = []
    for _ in range(150):
        loss = ppo_gr00t.flow_matching_loss(agent, obs, target)
        optimizer.compute_gradients(loss)
        optimizer.clip_gradients(1.0)
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:5])


def test_adapters_begin_at_no_change_and_are_merged_into_the_weights():
    plain, _ = make(noise_level=0.0)
    agent, _ = make(noise_level=0.0, tune="lora")
    obs = observation()

    def act(agent):
        torch.manual_seed(1)
        return own_action(agent, obs)

    assert not any(p.any() for name, p in agent.named_parameters() if "lora_B" in name)
    plain.network.model.load_state_dict(gr00t.merged(agent.network.model).state_dict())
    torch.testing.assert_close(act(agent), act(plain), atol=1e-6, rtol=0)
    with torch.no_grad():
        for name, p in agent.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn_like(p))
    changed = act(agent)
    assert (changed - act(plain)).abs().max() > 1e-2
    merged = gr00t.merged(agent.network.model)
    assert not any("lora" in name for name in merged.state_dict()) and any("lora" in n for n in agent.state_dict())
    assert merged.state_dict().keys() == plain.network.model.state_dict().keys()
    plain.network.model.load_state_dict(merged.state_dict())
    torch.testing.assert_close(act(plain), changed, atol=1e-5, rtol=0)


def test_a_model_is_saved_and_read_back_and_a_checkpoint_leaves_out_what_never_changes(tmp_path):
    agent, _ = make()
    gr00t.save(agent.network.model, tmp_path / "model", agent.network.ranges(), "Pick-v0")
    other, _ = make(model=str(tmp_path / "model"), tune="lora", bc_tune="lora")
    for name, value in agent.network.model.action_head.state_encoder.state_dict().items():
        before = gr00t.load(str(tmp_path / "model")).action_head.state_encoder.state_dict()[name]
        assert torch.equal(before, value)
    known = gr00t.read_statistics(str(tmp_path / "model"), "new_embodiment")
    assert known["task"] == "Pick-v0" and torch.equal(torch.tensor(known["state"]), agent.network.state_range)
    saved = other.state_dict()
    assert any("lora_" in name for name in saved) and any(name.startswith("critic") for name in saved)
    assert not any("vision_model" in name and name.endswith("weight") for name in saved)
    third, _ = make(model=str(tmp_path / "model"), tune="lora", bc_tune="lora")
    third.load_state_dict(saved)


# --- mistakes


def sentence(capsys, call):
    with pytest.raises(SystemExit) as end:
        call()
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    return text


def test_mistakes_cost_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "so100" in sentence(capsys, lambda: gr00t.embodiment_slot("spot"))
    assert "35" in sentence(capsys, lambda: make(action_dim=35))
    assert "no folder" in sentence(capsys, lambda: gr00t.load("./absent"))
    assert "could not be fetched" in sentence(capsys, lambda: gr00t.load("nvidia/GR00T-N1.5-3B"))
    (tmp_path / "config.json").write_text("{}")
    assert "weights" in sentence(capsys, lambda: gr00t.load(str(tmp_path)))
    (tmp_path / "model.safetensors").write_text("nothing")
    (tmp_path / "eagle").mkdir()
    (tmp_path / "eagle" / "config.json").write_text("{}")
    assert "cannot be read" in sentence(capsys, lambda: gr00t.load(str(tmp_path)))
    agent, args = make()
    expert = ppo_gr00t.expert(args, "cpu")
    assert "--demos" in sentence(capsys, lambda: demos.wanted(agent.network, args, None, expert))
    wrong = torch.zeros(2, 3)
    assert "statistics of 3" in sentence(capsys, lambda: agent.network.set_ranges(wrong, wrong))
    bad = ppo_gr00t.Args(unfreeze_schedule=("critic:0", "legs:3"))
    assert "legs:3" in sentence(capsys, lambda: ppo_gr00t.stages(bad))
    bad = ppo_gr00t.Args(unfreeze_schedule=("dit:3",))
    assert "critic:0" in sentence(capsys, lambda: ppo_gr00t.stages(bad))
    monkeypatch.setattr(gr00t, "missing", lambda: "diffusers")
    args = ppo_gr00t.Args(device="cpu", ranks=1)
    assert "--policy mlp" in sentence(capsys, lambda: ppo_gr00t.check_args(args))
    assert ppo_gr00t.default_preset(args) == "mlp" and "diffusers" in capsys.readouterr().out


def test_the_full_model_has_the_published_size():
    with torch.device("meta"):
        network = gr00t.build(gr00t.FULL, gr00t.FULL_EAGLE)
    millions = {name: round(sum(p.numel() for p in part.parameters()) / 1e6, 1) for name, part in parts(network)}
    assert millions["action_head"] == 1068.8 and millions["dit"] == 550.4
    assert 1300 < millions["backbone"] < 1350
    gr00t.keep_embodiment(network, 31)
    assert millions["action_head"] - sum(p.numel() for p in network.action_head.parameters()) / 1e6 > 300


def parts(network):
    head = network.action_head
    return ("action_head", head), ("dit", head.model), ("backbone", network.backbone)
